"""Open safetensors checkpoints by their headers and read single tensors.

In: a folder or a hub id (`org/name` or `org/name@revision`). Out: a `TensorSpec` per tensor without
reading any weights, and the bytes or values of one tensor on request, by positioned reads, so that
memory never holds more than the requested data. `headers.py` validates the headers,
`weight_files.py` selects the weight files, `dequantised.py` reads fp8 weights as floats, and
`writer.py` writes checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ipmerge_core.errors import CheckpointError, CorruptShardError, MissingTensorError
from ipmerge_core.models.dequantised import DequantisedFiles, dequantised
from ipmerge_core.models.files import Files, Stamp, find_files
from ipmerge_core.models.headers import DTYPES, FLOAT_DTYPES, TensorSpec, read_header
from ipmerge_core.models.low_rank import Factors
from ipmerge_core.models.quantised import refuse_unsupported_dtypes
from ipmerge_core.models.weight_files import CONFIG, WeightFiles, find_weights, read_json

__all__ = [
    "DTYPES",
    "FLOAT_DTYPES",
    "Checkpoint",
    "Remark",
    "TensorSpec",
    "as_tensor",
    "count_non_finite",
    "split_address",
    "tensor_bytes",
]

_FLOATS = frozenset(DTYPES[name] for name in FLOAT_DTYPES)
_ROWS = re.compile(r"(?P<name>.+)\[(?P<start>[0-9]{1,12}):(?P<stop>[0-9]{1,12})\]")
_BLOCKS, _BLOCK = 16, 512  # of every tensor that `content` covers, and their size in bytes


class Remark(NamedTuple):
    """A note on how a model's values are computed; with a remedy, it is a warning."""

    subject: str
    message: str
    remedy: str = ""


class Checkpoint:
    """One model: its config, its files, and a `TensorSpec` per tensor, in file order.

    Values are read only by `read`, `read_bytes` and `iter_bytes`, so that a subclass can compute
    them. With `weights` only these files are opened, and no config.
    """

    def __init__(self, files: Files, weights: WeightFiles | None = None) -> None:
        self.files = files
        self.config = read_json(files, CONFIG) if weights is None else {}
        self.weights = weights or find_weights(files, self.config)
        self.shards = list(self.weights.shards)
        self.tensors: dict[str, TensorSpec] = {}
        for shard in self.shards:
            for spec in read_header(files, shard):
                if spec.name in self.tensors:
                    raise CorruptShardError(
                        f"'{spec.name}' is in both '{self.tensors[spec.name].shard}' and "
                        f"'{shard}' of '{self.id}'; each tensor must be in exactly one shard."
                    )
                self.tensors[spec.name] = spec
        self.weights.check_index(self.id, {name: spec.shard for name, spec in self.tensors.items()})
        self._refuse_partitioned()
        refuse_unsupported_dtypes(self.id, self.config, self.tensors)

    @classmethod
    def open(cls, source: str | Path, *, hub_only: bool = False) -> Checkpoint:
        """Open a model folder or a hub id by its headers, without reading weights.

        Weights in fp8 with scales are read as floats of the config's dtype, see `dequantised`.

        Args:
            source: a folder, or `org/name`, or `org/name@revision`.
            hub_only: accept only hub ids, for untrusted input.

        Raises:
            CheckpointError: the model does not exist, has no safetensors weights, or they are of
                an unsupported dtype, or fp8 with scales that do not fit.
            CorruptShardError: a header is inconsistent with its file.
        """
        return cls.of(find_files(source, hub_only=hub_only))

    @classmethod
    def of(cls, files: Files) -> Checkpoint:
        """Open a model by its files; see `open`."""
        stored = cls(files)
        floats = dequantised(stored.files, stored.config, stored.weights, stored.tensors)
        return stored if floats is None else cls(floats)

    def _refuse_partitioned(self) -> None:
        """Refuse the placeholders that DeepSpeed ZeRO-3 saves instead of partitioned weights."""
        empty = [
            name
            for name, spec in self.tensors.items()
            if spec.shape == (0,) and name.endswith((".weight", ".bias"))
        ]
        if empty:
            raise CheckpointError(
                f"'{self.id}' was saved from DeepSpeed ZeRO-3 without its weights: '{empty[0]}' "
                f"has the shape (0,), one of {len(empty)} such tensors. Save it again with "
                f"stage3_gather_16bit_weights_on_model_save, or convert its ZeRO checkpoint with "
                f"zero_to_fp32.py."
            )

    @property
    def id(self) -> str:
        """The folder or hub id of the model."""
        return self.files.id

    @property
    def dequantised(self) -> DequantisedFiles | None:
        """The files that read fp8 weights as floats; None if all weights are read as stored."""
        return self.files if isinstance(self.files, DequantisedFiles) else None

    @property
    def remark(self) -> Remark | None:
        """How the values of this model are computed, if they are not those of its files."""
        return Remark("fp8", self.dequantised.describe()) if self.dequantised else None

    def factors(self, name: str, base: Checkpoint) -> Factors | None:
        """Return the change of a matrix relative to `base` as factors; None if unknown."""
        return None

    def read_size(self, name: str) -> int:
        """Return the size in bytes of what `read` returns."""
        return self.spec(name).nbytes

    def stamps(self) -> dict[tuple[str, str], Stamp | None]:
        """Return the stamps of the files that determine the weights, by model and name."""
        return {(self.id, shard): self.files.stamp(shard) for shard in self.shards}

    @property
    def nbytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def numel(self) -> int:
        """Total number of parameters."""
        return sum(spec.numel for spec in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights without reading all of them.

        For hub models it covers the pinned commit, on disk the headers and two kilobytes of every
        tensor: training changes every part of a tensor, so other weights give another value, and a
        copy of the folder gives the same one.
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

    @cached_property
    def content(self) -> str | None:
        """SHA-256 of blocks spread over every tensor, small tensors completely; None on the hub.

        Finds what `fingerprint` does not: a change of any contiguous tenth of a tensor. Reading all
        bytes would take as long as the merge itself (16 blocks: a twentieth of that).
        """
        if self.files.revision is not None:
            return None  # the fingerprint is that of the pinned commit, which includes all bytes
        digest = hashlib.sha256()
        for spec in self.tensors.values():
            for start in _spread(spec):
                stop = min(start + _BLOCK, spec.stop)
                digest.update(self.files.read(spec.shard, start, stop))
        return digest.hexdigest()

    @property
    def other_files(self) -> str:
        """SHA-256 of all files other than weights: config, tokenizer, templates and others."""
        digest = hashlib.sha256()
        for name in self.files.names():
            if self.weights.is_copied(name):
                known = self.files.content_id(name)
                part = known.encode() if known else hashlib.sha256(self.files.read(name)).digest()
                digest.update(json.dumps(name).encode() + part)
        return digest.hexdigest()

    def spec(self, name: str) -> TensorSpec:
        """Return the header entry of a tensor, or of rows of a tensor: `name[start:stop]`.

        Rows are contiguous on disk, so that a part of a fused matrix is read like a separate
        tensor. Raises: MissingTensorError.
        """
        if name in self.tensors:
            return self.tensors[name]
        stored, rows = split_address(name)
        whole = self.tensors.get(stored)
        if rows is None or whole is None or rows.stop > whole.shape[0]:
            raise MissingTensorError(
                f"'{self.id}' has no tensor '{name}' (it has {len(self.tensors)} tensors)."
            )
        row = whole.nbytes // whole.shape[0]
        start, stop = whole.start + rows.start * row, whole.start + rows.stop * row
        shape = (rows.stop - rows.start, *whole.shape[1:])
        return TensorSpec(name, whole.dtype, shape, whole.shard, start, stop)

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read the bytes [start, stop) of a tensor in its stored dtype."""
        spec = self.spec(name)
        last = spec.stop if stop is None else spec.start + stop
        return self.files.read(spec.shard, spec.start + start, last)

    def iter_bytes(self, name: str, step: int = 1 << 20) -> Iterator[bytearray]:
        """Read the bytes of a tensor in pieces."""
        nbytes = self.spec(name).nbytes
        for start in range(0, nbytes, step):
            yield self.read_bytes(name, start, min(start + step, nbytes))

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype, on the CPU."""
        spec = self.spec(name)
        data = torch.empty(spec.nbytes, dtype=torch.uint8)  # a bytearray would be zeroed first
        self.files.read_into(data.numpy().data, spec.shard, spec.start)
        return data.view(DTYPES[spec.dtype]).reshape(spec.shape)

    def read_matrix(self, name: str, *, check: bool = True) -> Tensor:
        """Read a floating-point tensor. Raises: CheckpointError for NaN or infinity."""
        found = self.read(name)
        if check:
            self.refuse_non_finite(name, count_non_finite(found))
        return found

    def refuse_non_finite(self, name: str, bad: int) -> None:
        """Raise CheckpointError if a tensor holds `bad` > 0 NaN or infinite values."""
        if bad:
            raise CheckpointError(
                f"'{name}' of '{self.id}' holds {bad} NaN or infinite values out of "
                f"{self.spec(name).numel}. The file is damaged or the training diverged: use "
                f"another copy."
            )

    def read_header(self, shard: str) -> bytearray:
        """Read the raw length prefix and header of a shard."""
        length = int.from_bytes(self.files.read(shard, 0, 8), "little")
        return self.files.read(shard, 0, 8 + length)


def _spread(spec: TensorSpec) -> list[int]:
    """Return the offsets of evenly spaced blocks of a tensor, the first and the last included."""
    last = max(spec.stop - _BLOCK, spec.start) - spec.start
    return sorted({spec.start + n * last // (_BLOCKS - 1) for n in range(_BLOCKS)})


def split_address(address: str) -> tuple[str, range | None]:
    """Split `name[start:stop]` into the name of a stored tensor and rows; None means all rows.

    >>> split_address("model.layers.0.self_attn.qkv_proj.weight[64:96]")
    ('model.layers.0.self_attn.qkv_proj.weight', range(64, 96))
    >>> split_address("lm_head.weight")
    ('lm_head.weight', None)
    """
    found = _ROWS.fullmatch(address)
    if found is None:
        return address, None
    return found["name"], range(int(found["start"]), int(found["stop"]))


def as_tensor(data: bytearray, dtype: str) -> Tensor:
    """View stored bytes as a flat tensor that shares their memory."""
    if not data:
        return torch.empty(0, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype])


def count_non_finite(values: Tensor) -> int:
    """Count NaN and infinite values; 0 for non-float dtypes."""
    if values.dtype not in _FLOATS or not values.numel():
        return 0
    low, high = torch.aminmax(values)  # one pass; NaN propagates
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    return int(values.numel() - torch.isfinite(values).sum())


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the elements of a tensor as safetensors stores them: row-major, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: bytes = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return data
