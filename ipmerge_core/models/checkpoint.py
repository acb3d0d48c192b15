"""Open safetensors checkpoints by their headers and read single tensors.

In: a folder or a hub id (`org/name` or `org/name@revision`). Out: a `TensorSpec` per tensor without
reading any weights, and the bytes or values of one tensor on request, by positioned reads, so that
memory never holds more than the requested data. Format: safetensors (an 8-byte length, a JSON
header, the data). Headers are untrusted: sizes, offsets, overlaps and names are validated before
use. `weight_files.py` selects the weight files; `writer.py` writes checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ipmerge_core.errors import CheckpointError, CorruptShardError, MissingTensorError
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.files import Files, find_files
from ipmerge_core.models.weight_files import find_weights, read_json
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    Count,
    InvalidContentError,
    Name,
    Schema,
    parse_json,
)

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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_FLOATS = frozenset(DTYPES[name] for name in FLOAT_DTYPES)
_BLOCKS, _BLOCK = 16, 512  # of every tensor that `content` covers, and their size in bytes
_HEADER_LIMIT = 16 * MEGABYTE  # more than 100 000 tensors
_MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class TensorSpec:
    """Header entry of one tensor. `start` and `stop` are byte offsets in the shard file."""

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


class Checkpoint:
    """One model: its config, its files, and a `TensorSpec` per tensor, in file order."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.config = read_json(files, "config.json")
        self.weights = find_weights(files, self.config)
        self.shards = list(self.weights.shards)
        self.tensors: dict[str, TensorSpec] = {}
        for shard in self.shards:
            for spec in _read_header(files, shard):
                if spec.name in self.tensors:
                    raise CorruptShardError(
                        f"'{spec.name}' is in both '{self.tensors[spec.name].shard}' and "
                        f"'{shard}' of '{self.id}'; each tensor must be in exactly one shard."
                    )
                self.tensors[spec.name] = spec
        self.weights.check_index(self.id, {name: spec.shard for name, spec in self.tensors.items()})
        self._refuse_partitioned()

    @classmethod
    def open(cls, source: str | Path, *, hub_only: bool = False) -> Checkpoint:
        """Open a model folder or a hub id by its headers, without reading weights.

        Args:
            source: a folder, or `org/name`, or `org/name@revision`.
            hub_only: accept only hub ids, for untrusted input.

        Raises:
            CheckpointError: the model does not exist or has no safetensors weights.
            CorruptShardError: a header is inconsistent with its file.
        """
        return cls(find_files(source, hub_only=hub_only))

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
        """Return the header entry of a tensor, or of a part of one by its address.

        A part is contiguous on disk, so that it is read like a separate tensor. Rows of a
        transposed matrix are not: `start` and `stop` are then those of the whole matrix, and
        `shape` is that of the rows. Raises: MissingTensorError.
        """
        if name in self.tensors:
            return self.tensors[name]
        address = split_address(name)
        whole = self.tensors.get(address.name)
        part = None if whole is None else part_of(whole, name)
        if part is None:
            raise MissingTensorError(
                f"'{self.id}' has no tensor '{name}' (it has {len(self.tensors)} tensors)."
            )
        return part

    def read_bytes(self, name: str) -> bytearray:
        """Read the stored bytes of a tensor."""
        spec = self.spec(name)
        return self.files.read(spec.shard, spec.start, spec.stop)

    def iter_bytes(self, name: str, step: int = 1 << 20) -> Iterator[bytearray]:
        """Read the stored bytes of a tensor in pieces."""
        spec = self.spec(name)
        for start in range(spec.start, spec.stop, step):
            yield self.files.read(spec.shard, start, min(start + step, spec.stop))

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype, on the CPU."""
        spec = self.spec(name)
        data = torch.empty(spec.nbytes, dtype=torch.uint8)  # a bytearray would be zeroed first
        self.files.read_into(data.numpy().data, spec.shard, spec.start)
        return arranged(data.view(DTYPES[spec.dtype]), spec)

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


def part_of(whole: TensorSpec, name: str) -> TensorSpec | None:
    """Return the header entry of the part of a tensor with that address; None if it has none."""
    address = split_address(name)
    start, stop, shape = whole.start, whole.stop, whole.shape
    if address.number is not None:
        if len(shape) < 2 or address.number >= shape[0]:
            return None
        size = whole.nbytes // shape[0]
        start += address.number * size
        stop, shape = start + size, shape[1:]
    if address.transposed:
        if len(shape) != 2:
            return None
        shape = shape[::-1]
    if address.rows is not None:
        if not shape or address.rows.stop > shape[0]:
            return None
        if not address.transposed:
            row = (stop - start) // shape[0]
            start, stop = start + address.rows.start * row, start + address.rows.stop * row
        shape = (len(address.rows), *shape[1:])
    return TensorSpec(name, whole.dtype, shape, whole.shard, start, stop)


def arranged(stored: Tensor, spec: TensorSpec) -> Tensor:
    """View the stored elements of a tensor or a part as `spec.shape`.

    Shapes: stored (n,), the elements between `spec.start` and `spec.stop`. The result shares their
    memory, also if it is a part of a transposed matrix.
    """
    address = split_address(spec.name)
    if not address.transposed:
        return stored.reshape(spec.shape)
    turned = stored.reshape(spec.shape[1], -1).T
    rows = address.rows or range(turned.shape[0])
    return turned[rows.start : rows.stop]


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


def _read_header(files: Files, shard: str) -> list[TensorSpec]:
    """Parse the header of a shard and validate it against the file, in data order."""
    size = files.size(shard)
    fault = _Fault(files.id, shard)
    if size < 8:
        raise fault(f"it has {size} bytes, too few for a header")
    length = int.from_bytes(files.read(shard, 0, 8), "little")
    if length > min(_HEADER_LIMIT, size - 8):
        raise fault(
            f"its header claims {length} bytes in a file of {size}; the maximum is {_HEADER_LIMIT}"
        )
    try:
        content = parse_json(files.read(shard, 8, 8 + length), _HEADER_LIMIT)
        if isinstance(content, dict):
            content.pop("__metadata__", None)
        header = _HEADER.validate(content)
    except InvalidContentError as error:
        raise fault(f"its header cannot be read ({error})") from error
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
    """Creates a CorruptShardError that names the file and the remedy."""

    def __init__(self, model: str, shard: str) -> None:
        self.model, self.shard = model, shard

    def __call__(self, what: str) -> CorruptShardError:
        return CorruptShardError(
            f"'{self.shard}' of '{self.model}' is damaged or incomplete: {what}. Download it again."
        )


@dataclass(frozen=True)
class _Entry:
    """The header's entry of one tensor."""

    dtype: Name
    shape: Annotated[list[Count], Field(max_length=_MOST_DIMENSIONS)]
    data_offsets: tuple[Count, Count]


_HEADER = Schema[dict[Name, _Entry]](dict[Name, _Entry])


def _read_entry(fault: _Fault, shard: str, data: int, name: str, entry: _Entry) -> TensorSpec:
    dtype, shape, (start, stop) = entry.dtype, entry.shape, entry.data_offsets
    if dtype not in DTYPES:
        raise fault(f"'{name}' has the unknown dtype {dtype!r}")
    spec = TensorSpec(name, dtype, tuple(shape), shard, data + start, data + stop)
    expected = spec.numel * DTYPES[dtype].itemsize
    if spec.nbytes != expected:
        raise fault(f"'{name}' has {spec.nbytes} bytes; its shape and dtype require {expected}")
    return spec
