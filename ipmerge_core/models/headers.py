"""Read and validate the headers of safetensors files.

In: the files of a model and the name of a shard. Out: a `TensorSpec` per tensor, without reading
any weights. Format: an 8-byte length, a JSON header, the data. Headers are untrusted: sizes,
offsets, overlaps and names are validated before use.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
from pydantic import Field

from ipmerge_core.errors import CorruptShardError
from ipmerge_core.models.files import Files
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
# Dtypes of the format that are not read, with their size in bits.
UNSUPPORTED_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
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


def read_header(files: Files, shard: str) -> list[TensorSpec]:
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
    bits = UNSUPPORTED_BITS.get(dtype)
    if bits is None and dtype not in DTYPES:
        raise fault(f"'{name}' has the unknown dtype {dtype!r}")
    spec = TensorSpec(name, dtype, tuple(shape), shard, data + start, data + stop)
    expected = (spec.numel * (bits or 8 * DTYPES[dtype].itemsize) + 7) // 8
    if spec.nbytes != expected:
        raise fault(f"'{name}' has {spec.nbytes} bytes; its shape and dtype require {expected}")
    return spec
