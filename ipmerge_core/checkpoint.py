"""A model on disk or on the hub, opened by its headers, read one tensor at a time.

In: a folder or a hub id (`org/name` or `org/name@revision`). Out: a `TensorSpec` per tensor without
reading any weight, and the bytes or values of one tensor on request, by positioned reads: memory
never holds more than what was asked for. Format: safetensors (JSON header behind an 8-byte length,
then the data). Every header is distrusted: sizes, offsets, overlaps and names are checked before
use. Pickle files are refused, remote code is never run. Writing is `writer.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ipmerge_core.errors import CheckpointError, CorruptShardError, MissingTensorError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_LIMIT = 100 * 2**20  # the safetensors library's own limit
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor. `start` and `stop` are byte offsets in the shard file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the stored data in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Files(Protocol):
    """Where a model's files lie: the local disk or the hub."""

    id: str
    revision: str | None  # the commit, on the hub

    def names(self) -> list[str]:
        """List the files at the top of the model folder."""
        ...

    def size(self, name: str) -> int:
        """Size of one file in bytes."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read the bytes [start, stop) of one file."""
        ...


class LocalFiles:
    """A model folder on disk."""

    def __init__(self, folder: Path) -> None:
        self.id = str(folder)
        self.revision: str | None = None  # a folder has none
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """List the regular files in the folder, sorted."""
        return sorted(entry.name for entry in self.folder.iterdir() if entry.is_file())

    def size(self, name: str) -> int:
        """Size of one file in bytes."""
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read the bytes [start, stop) with positioned reads, so that no page stays mapped."""
        descriptor = self._open(name)
        stop = os.fstat(descriptor).st_size if stop is None else stop
        pieces = bytearray()
        while len(pieces) < stop - start:
            piece = os.pread(descriptor, stop - start - len(pieces), start + len(pieces))
            if not piece:
                raise CorruptShardError(
                    f"'{self.folder / name}' ended at byte {start + len(pieces)} while bytes up to "
                    f"{stop} were expected. Was it changed during the run? Copy it again."
                )
            pieces += piece
        return bytes(pieces)

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY)
            return self._descriptors[name]

    def __del__(self) -> None:
        """Close what was opened."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class HubFiles:
    """A model repository on the Hugging Face hub, read by HTTP ranges at one pinned commit."""

    def __init__(self, hub_id: str) -> None:
        from httpx import HTTPError
        from huggingface_hub import HfApi, HfFileSystem

        self.id, _, revision = hub_id.partition("@")
        try:
            info = HfApi().model_info(self.id, revision=revision or None, files_metadata=True)
        except (OSError, ValueError, HTTPError) as error:
            raise CheckpointError(_explain_hub_error(hub_id, error)) from error
        self.revision = info.sha
        self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        self._system = HfFileSystem()

    def names(self) -> list[str]:
        """List the files at the top of the repository, sorted."""
        return sorted(name for name in self._sizes if "/" not in name)

    def size(self, name: str) -> int:
        """Size of one file in bytes, from the hub's metadata."""
        return self._sizes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read the bytes [start, stop) by a range request."""
        data: bytes = self._system.cat_file(
            f"{self.id}@{self.revision}/{name}", start=start, end=stop
        )
        return data


def _explain_hub_error(hub_id: str, error: Exception) -> str:
    """Turn what huggingface_hub raised into one sentence with a remedy."""
    kind = type(error).__name__
    if "Gated" in kind:
        remedy = "The repository is gated: accept its terms on the hub and log in with `hf`."
    elif "NotFound" in kind:
        remedy = (
            "Is the name spelled right, and is it public? A local folder must exist: "
            f"{Path(hub_id).resolve()} does not."
        )
    else:
        remedy = "The hub could not be reached: check the connection, or give a local folder."
    return f"Cannot open '{hub_id}' ({kind}). {remedy}"


class Checkpoint:
    """One model: its config, its files, and a `TensorSpec` per tensor, in file order."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.config = _read_json(files, "config.json")
        self.shards = _list_shards(files)
        self.tensors: dict[str, TensorSpec] = {}
        for shard in self.shards:
            for spec in _read_header(files, shard):
                if spec.name in self.tensors:
                    raise CorruptShardError(
                        f"'{spec.name}' stands in both '{self.tensors[spec.name].shard}' and "
                        f"'{shard}' of '{self.id}'; each tensor must stand in one shard."
                    )
                self.tensors[spec.name] = spec
        _check_index(files, self.tensors)

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a model folder or a hub id by its headers; no weight is read.

        Args:
            source: a folder, or `org/name`, or `org/name@revision`.

        Raises:
            CheckpointError: there is no such model, or it holds no safetensors weights.
            CorruptShardError: a header contradicts its file.
        """
        folder = Path(source).expanduser()
        if folder.is_dir():
            return cls(LocalFiles(folder))
        if isinstance(source, str) and _HUB_ID.fullmatch(source) and not folder.exists():
            return cls(HubFiles(source))
        raise CheckpointError(
            f"There is no model folder '{source}'. Expected a folder with config.json and "
            f"safetensors files, or a hub id such as 'org/name'."
        )

    @property
    def id(self) -> str:
        """The folder or hub id, as the user knows it."""
        return self.files.id

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def numel(self) -> int:
        """Parameters of all tensors together."""
        return sum(spec.numel for spec in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 by which a plan recognises the weights it was made for, without reading them all.

        On the hub the pinned commit stands for the content. On disk it covers the headers and two
        kilobytes of every tensor: training touches every part of a tensor, so another state of the
        model gives another value; a copy of the folder elsewhere gives the same one.
        """
        if self.files.revision is not None:
            return hashlib.sha256(f"{self.id}@{self.files.revision}".encode()).hexdigest()
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(self.read_header(shard))
        for spec in self.tensors.values():
            middle = (spec.start + spec.stop) // 2
            for start in (spec.start, middle):
                digest.update(self.files.read(spec.shard, start, min(start + 1024, spec.stop)))
        return digest.hexdigest()

    def spec(self, name: str) -> TensorSpec:
        """Return what the header says of a tensor. Raises: MissingTensorError."""
        if name not in self.tensors:
            raise MissingTensorError(
                f"'{self.id}' has no tensor '{name}' among its {len(self.tensors)} tensors."
            )
        return self.tensors[name]

    def read_bytes(self, name: str) -> bytes:
        """Read a tensor's stored bytes, undecoded."""
        spec = self.spec(name)
        return self.files.read(spec.shard, spec.start, spec.stop)

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype, on the CPU."""
        spec = self.spec(name)
        if spec.numel == 0:
            return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        data = bytearray(self.read_bytes(name))
        return torch.frombuffer(data, dtype=DTYPES[spec.dtype]).reshape(spec.shape)

    def read_matrix(self, name: str) -> Tensor:
        """Read a float tensor to compute with. Raises: CheckpointError for NaN or infinity."""
        tensor = self.read(name)
        finite = torch.isfinite(tensor)
        if not finite.all():
            bad = int(tensor.numel() - finite.sum())
            raise CheckpointError(
                f"'{name}' of '{self.id}' holds {bad} NaN or infinite values of {tensor.numel()}. "
                f"The file is damaged or the training diverged: use another copy."
            )
        return tensor

    def read_header(self, shard: str) -> bytes:
        """Read a shard's length prefix and header as they are."""
        length = int.from_bytes(self.files.read(shard, 0, 8), "little")
        return self.files.read(shard, 0, 8 + length)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's elements, row-major, as safetensors stores them (little-endian)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: bytes = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return data


def _read_json(files: Files, name: str) -> dict[str, Any]:
    if name not in files.names():
        raise CheckpointError(
            f"'{files.id}' has no {name}. Expected a model folder in the transformers layout."
        )
    try:
        content = json.loads(files.read(name))
    except ValueError as error:
        raise CheckpointError(f"'{name}' of '{files.id}' is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{name}' of '{files.id}' is not a JSON object.")
    return content


def _list_shards(files: Files) -> list[str]:
    """Name the weight files: those of the index, else the single one."""
    names = files.names()
    if INDEX in names:
        weight_map = _read_json(files, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"'{INDEX}' of '{files.id}' has no weight_map.")
        return _check_shard_names(files, sorted(set(weight_map.values())))
    if WEIGHTS in names:
        return [WEIGHTS]
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"'{files.id}' has {len(found)} safetensors files and no {INDEX} that says which "
            f"belong to the model. Add the index."
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"'{files.id}' has its weights only as pickle ('{pickles[0]}'), which can run code "
            f"when read. Convert it to safetensors first (load it with transformers where you "
            f"trust it, then save_pretrained)."
        )
    raise CheckpointError(f"'{files.id}' has no safetensors weights ({WEIGHTS} or {INDEX}).")


def _check_shard_names(files: Files, shards: list[Any]) -> list[str]:
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"'{INDEX}' of '{files.id}' names the shard {shard!r}; "
                f"only bare file names are allowed."
            )
        if shard not in files.names():
            raise MissingTensorError(
                f"'{files.id}' lacks the shard '{shard}' that its index names. "
                f"Was the download complete?"
            )
    return shards


def _check_index(files: Files, tensors: Mapping[str, TensorSpec]) -> None:
    if INDEX not in files.names():
        return
    for name, shard in _read_json(files, INDEX)["weight_map"].items():
        if name not in tensors or tensors[name].shard != shard:
            where = f"it is in '{tensors[name].shard}'" if name in tensors else "it is in no shard"
            raise MissingTensorError(
                f"The index of '{files.id}' says that '{name}' is in '{shard}', but {where}."
            )


def _read_header(files: Files, shard: str) -> list[TensorSpec]:
    """Parse one shard's header and check it against the file, in the order of the data."""
    size = files.size(shard)
    fault = _Fault(files.id, shard)
    if size < 8:
        raise fault(f"it has {size} bytes, too few for a header")
    length = int.from_bytes(files.read(shard, 0, 8), "little")
    if length > min(_HEADER_LIMIT, size - 8):
        raise fault(f"its header claims {length} bytes in a file of {size}")
    try:
        header = json.loads(files.read(shard, 8, 8 + length), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise fault(f"its header cannot be read ({error})") from error
    if not isinstance(header, dict):
        raise fault("its header is not a JSON object")
    header.pop("__metadata__", None)
    specs = [_read_entry(fault, shard, 8 + length, name, header[name]) for name in header]
    specs.sort(key=lambda spec: (spec.start, spec.stop))
    position = 8 + length
    for spec in specs:
        if spec.start != position:
            raise fault(f"the data of '{spec.name}' overlaps another tensor or leaves a gap")
        position = spec.stop
    if position != size:
        raise fault(f"its tensors end at byte {position} of {size}")
    return specs


class _Fault:
    """Makes a CorruptShardError that names the file and the remedy."""

    def __init__(self, model: str, shard: str) -> None:
        self.model, self.shard = model, shard

    def __call__(self, what: str) -> CorruptShardError:
        return CorruptShardError(
            f"'{self.shard}' of '{self.model}' is damaged or incomplete: {what}. Download it again."
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return dict(pairs)


def _read_entry(fault: _Fault, shard: str, data: int, name: str, entry: Any) -> TensorSpec:  # noqa: ANN401
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise fault(f"the entry of '{name}' lacks dtype, shape or data_offsets") from error
    if dtype not in DTYPES:
        raise fault(f"'{name}' has the unknown dtype {dtype!r}")
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise fault(f"'{name}' has the impossible shape {shape!r} or offsets {start!r}, {stop!r}")
    spec = TensorSpec(name, dtype, tuple(shape), shard, data + start, data + stop)
    expected = spec.numel * DTYPES[dtype].itemsize
    if spec.nbytes != expected:
        raise fault(f"'{name}' has {spec.nbytes} bytes; its shape and dtype need {expected}")
    return spec
