"""Read fp8 weights as floats: a model folder as if it had been saved dequantised.

In: the files of a model with fp8 weights and their scales, and its headers. Out: `DequantisedFiles`
with the same names, in which every fp8 matrix is a float matrix, the scales and the config's
`quantization_config` are absent, and headers and index agree. Only requested rows are read and
multiplied by their scales, so that memory is about 1.5 times the requested bytes.

Math:   W = s * W8, in fp32, rounded once; s is one value, one per row, or one per block.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.files import Files, Stamp
from ipmerge_core.models.headers import DTYPES, FLOAT_DTYPES, TensorSpec
from ipmerge_core.models.quantised import CONFIG_KEYS, find_quantised, settings_of
from ipmerge_core.models.weight_files import CONFIG, WeightFiles, read_json
from ipmerge_core.runtime.input_files import InvalidContentError, Schema

_HIDDEN = ("hf_quant_config.json",)  # describes the quantisation for other programs
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = ("_scale_inv", "_scale")  # after the name of the weight; both multiply it
_UNUSED = (  # of activations and the key/value cache, in the module of a weight
    ".input_scale",
    ".input_scale_ub",
    ".activation_scale",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_DTYPE_KEYS = ("dtype", "torch_dtype")
_OTHERWISE = "bfloat16"  # for configs with another dtype or none
_STEP = 1 << 20  # elements that are multiplied at once

_Size = Annotated[int, Field(gt=0, lt=2**31)]
_Grid: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class _GroupWeights:
    block_structure: tuple[_Size, _Size] | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class _Group:
    weights: _GroupWeights | None = None


@dataclass(frozen=True)
class _Settings:
    """The block sizes of a `quantization_config`, in the forms of fp8 and compressed-tensors."""

    weight_block_size: tuple[_Size, _Size] | None = None
    config_groups: Mapping[str, _Group] | None = None

    def blocks(self) -> list[tuple[int, int]]:
        """List the block sizes that the groups declare, rows by columns."""
        found: list[tuple[int, int]] = []
        for group in (self.config_groups or {}).values():
            if group.weights is not None and group.weights.block_structure is not None:
                found.append(group.weights.block_structure)
            if group.weights is not None and (group.weights.group_size or 0) > 0:
                found.append((1, group.weights.group_size or 0))
        return found


_SETTINGS = Schema[_Settings](_Settings)


class Scale(NamedTuple):
    """The scales of one fp8 weight.

    Attributes:
        spec: their header entry.
        grid: their number along (matrix, row, column).
        block: the matrices, rows and columns that share one.
        kind: a description of what shares one.
    """

    spec: TensorSpec
    grid: _Grid
    block: _Grid
    kind: str


def dequantised(
    files: Files,
    config: Mapping[str, Any],
    weights: WeightFiles,
    tensors: Mapping[str, TensorSpec],
) -> DequantisedFiles | None:
    """Return the files of an fp8 model with its weights as floats; None for all other models.

    Models that also have weights in other quantised formats are returned as they are, as are fp8
    weights of which none has a scale.

    Args:
        files: the files of the model, as stored.
        config: its config.
        weights: its weight files.
        tensors: its tensors by name.

    Raises: CheckpointError if a weight has no scale, or one of a wrong shape or dtype.
    """
    stored = [spec for spec in tensors.values() if spec.dtype in _FP8 and len(spec.shape) > 1]
    found = {spec.name: _scale_name(spec, tensors) for spec in stored}
    names = {scale for scale in found.values() if scale is not None}
    matrices = [spec for spec in stored if spec.name not in names]
    if not names or not matrices:
        return None
    dropped = names | {name for name in tensors if name.endswith(_UNUSED)}
    rest = tensors.keys() - dropped - {spec.name for spec in matrices}
    if find_quantised({}, {name: tensors[name] for name in tensors if name in rest}) is not None:
        return None
    settings = _settings(files.id, config)
    scales: dict[str, Scale] = {}
    for spec in matrices:
        name = found[spec.name]
        if name is None:
            raise CheckpointError(
                f"'{spec.name}' of '{files.id}' is stored as {spec.dtype} without its scale "
                f"'{spec.name}{_SCALES[0]}' or '{spec.name}{_SCALES[1]}', which other weights of "
                f"the model have. Was the download complete?"
            )
        scales[spec.name] = _scale_of(files.id, spec, tensors[name], settings)
    kept = {name: spec for name, spec in tensors.items() if name not in dropped}
    return DequantisedFiles(files, config, weights, kept, scales)


class DequantisedFiles:
    """The files of a model whose fp8 weights are read as floats; see `dequantised`.

    The shards have the sizes and headers of the dequantised model, so that offsets in them are
    those of a merged model.
    """

    def __init__(
        self,
        stored: Files,
        config: Mapping[str, Any],
        weights: WeightFiles,
        tensors: Mapping[str, TensorSpec],
        scales: Mapping[str, Scale],
    ) -> None:
        self.id, self.revision, self.remote = stored.id, stored.revision, stored.remote
        self._files, self._stored, self._scales = stored, tensors, scales
        self._dtype = _target_dtype(config)
        self._parts: dict[str, list[TensorSpec]] = {}
        self._headers: dict[str, bytes] = {}
        for shard in weights.shards:
            self._headers[shard], self._parts[shard] = self._layout(shard)
        self._documents = {CONFIG: _as_json(_without_quantisation(config))}
        if weights.index is not None:
            self._documents[weights.index] = self._index(weights.index)

    def describe(self) -> str:
        """Describe the conversion for people."""
        kinds = dict.fromkeys(scale.kind for scale in self._scales.values())
        return (
            f"'{self.id}' is stored in fp8 with scales {' and '.join(kinds)}: "
            f"{len(self._scales)} matrices are dequantised while they are read, as {self._dtype}. "
            f"The rounding to fp8 (up to 6 % of a weight in E4M3) is part of the task vectors, "
            f"with an fp8 base also of their cosine, and not of the noise floor."
        )

    def stored_dtype(self, name: str) -> str:
        """Return the dtype in which a tensor is stored."""
        return self._stored[name].dtype

    def local_folder(self) -> Path:
        """Return a folder that contains the files as stored, in fp8."""
        return self._files.local_folder()

    def names(self) -> list[str]:
        """List the files, sorted."""
        return [name for name in self._files.names() if name not in _HIDDEN]

    def size(self, name: str) -> int:
        """Size of one file in bytes, of a shard with floats."""
        if name in self._documents:
            return len(self._documents[name])
        if name in self._parts:
            end = self._parts[name][-1:]
            return end[0].stop if end else len(self._headers[name])
        return self._files.size(name)

    def content_id(self, name: str) -> str | None:
        """Return the hub's hash of a file's content; of a shard, that of the stored file."""
        return None if name in self._documents else self._files.content_id(name)

    def stamp(self, name: str) -> Stamp | None:
        """Return the stamp of the stored file."""
        return self._files.stamp(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read the bytes [start, stop) of one file."""
        data = bytearray((self.size(name) if stop is None else stop) - start)
        self.read_into(memoryview(data), name, start)
        return data

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill `memory` with the bytes of one file from `start` on."""
        if name in self._documents:
            memory[:] = self._documents[name][start : start + len(memory)]
            return
        if name not in self._parts:
            self._files.read_into(memory, name, start)
            return
        stop, header = start + len(memory), self._headers[name][start : start + len(memory)]
        memory[: len(header)] = header
        for spec in self._overlapping(name, start, stop):
            first, last = max(start, spec.start), min(stop, spec.stop)
            self._fill(memory[first - start : last - start], spec, first - spec.start)

    def _layout(self, shard: str) -> tuple[bytes, list[TensorSpec]]:
        """Return the header of a shard with floats, and its tensors in file order."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position, parts = 0, []
        for name, spec in self._stored.items():
            if spec.shard != shard:
                continue
            dtype = self._dtype if name in self._scales else spec.dtype
            stop = position + spec.numel * DTYPES[dtype].itemsize
            entries[name] = {
                "dtype": dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, stop],
            }
            parts.append(replace(spec, dtype=dtype, start=position, stop=stop))
            position = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        shift = len(header)
        return header, [
            replace(part, start=part.start + shift, stop=part.stop + shift) for part in parts
        ]

    def _index(self, name: str) -> bytes:
        """Return the index without the scales."""
        content = read_json(self._files, name)
        shards = content["weight_map"]
        content["weight_map"] = {key: shards[key] for key in shards if key in self._stored}
        if isinstance(content.get("metadata"), dict):
            parts = [part for parts in self._parts.values() for part in parts]
            content["metadata"] |= {"total_size": sum(part.nbytes for part in parts)}
        return _as_json(content)

    def _overlapping(self, shard: str, start: int, stop: int) -> Iterator[TensorSpec]:
        """Yield the tensors of a shard with bytes in [start, stop)."""
        parts = self._parts[shard]
        first = max(0, bisect_right(parts, start, key=lambda part: part.start) - 1)
        for part in parts[first:]:
            if part.start >= stop:
                return
            if part.nbytes and part.stop > start:
                yield part

    def _fill(self, memory: memoryview, spec: TensorSpec, offset: int) -> None:
        """Fill `memory` with the bytes of a tensor from `offset` on."""
        stored, scale = self._stored[spec.name], self._scales.get(spec.name)
        if scale is None:
            self._files.read_into(memory, stored.shard, stored.start + offset)
            return
        row = spec.nbytes // prod(spec.shape[:-1])
        rows = range(offset // row, -(-(offset + len(memory)) // row))
        for block, values in self._dequantise(stored, scale, rows):
            data = values.to(DTYPES[spec.dtype]).reshape(-1).view(torch.uint8).numpy().data
            at = block.start * row - offset  # in `memory`
            skipped = max(0, -at)
            piece = data[skipped : len(memory) - at]
            memory[at + skipped : at + skipped + len(piece)] = piece

    def _dequantise(
        self, stored: TensorSpec, scale: Scale, rows: range
    ) -> Iterator[tuple[range, Tensor]]:
        """Yield blocks of rows of an fp8 weight times their scales, in fp32.

        The rows are those of all matrices of a stacked weight, one matrix after another.
        """
        height, width = stored.shape[-2:]
        weight = self._rows(stored, rows, width)
        index = torch.arange(rows.start, rows.stop)
        of_row = index.div(height * scale.block[0], rounding_mode="floor") * scale.grid[1]
        of_row += (index % height).div(scale.block[1], rounding_mode="floor")
        used = range(int(of_row.min()), int(of_row.max()) + 1)
        scales = self._rows(scale.spec, used, scale.grid[2]).to(torch.float32)
        step = max(1, _STEP // width)
        for start in range(0, len(rows), step):
            block = slice(start, min(start + step, len(rows)))
            factors = scales[of_row[block] - used.start]
            if scale.grid[2] > 1:
                factors = factors.repeat_interleave(scale.block[2], dim=1)[:, :width]
            yield rows[block], _as_floats(weight[block]).mul_(factors)

    def _rows(self, spec: TensorSpec, rows: range, width: int) -> Tensor:
        """Read rows of a stored tensor, seen as one matrix of `width` columns."""
        dtype = DTYPES[spec.dtype]
        row = width * dtype.itemsize
        data = torch.empty(len(rows) * row, dtype=torch.uint8)
        self._files.read_into(data.numpy().data, spec.shard, spec.start + rows.start * row)
        return data.view(dtype).reshape(len(rows), width)


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """Return the fp32 values of all 256 bit patterns of an fp8 dtype."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)


def _as_floats(values: Tensor) -> Tensor:
    """Convert fp8 to fp32 by a table, which is seven times as fast as `to` on a CPU."""
    index = values.view(torch.uint8).reshape(-1).int()
    return _table(values.dtype).index_select(0, index).reshape(values.shape)


def _scale_name(spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> str | None:
    names = (spec.name + suffix for suffix in _SCALES)
    return next((name for name in names if name in tensors), None)


def _settings(model: str, config: Mapping[str, Any]) -> _Settings:
    """Return the block sizes that the config declares. Raises: CheckpointError."""
    try:
        return _SETTINGS.validate(settings_of(config))
    except InvalidContentError as error:
        raise CheckpointError(
            f"The quantization_config of '{model}' has no valid block size: {error}. Restore the "
            f"original config.json."
        ) from error


def _scale_of(model: str, weight: TensorSpec, scale: TensorSpec, settings: _Settings) -> Scale:
    """Return how the scales of a weight apply to it. Raises: CheckpointError."""
    if scale.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"'{scale.name}' of '{model}' is quantised ({scale.dtype}); expected scales in F32, "
            f"BF16 or F16. Use the original float weights."
        )
    forms, grid = _forms(weight, settings), _grid(weight, scale)
    for kind, (expected, block) in forms.items():
        if grid == expected:
            return Scale(scale, grid, block, kind)
    *stack, _, _ = weight.shape
    wanted = [f"{(*stack, *grid[1:])} {kind}" for kind, (grid, _) in forms.items()]
    raise CheckpointError(
        f"'{scale.name}' of '{model}' has the shape {scale.shape}, which does not fit "
        f"'{weight.name}' {weight.shape}. Expected {' or '.join(wanted)}. Do the weights and the "
        f"quantization_config in config.json belong to the same model?"
    )


def _forms(weight: TensorSpec, settings: _Settings) -> dict[str, tuple[_Grid, _Grid]]:
    """Return the grids of scales that a weight may have, each with its block, by kind.

    A `weight_block_size` holds for all weights of a model.
    """
    *stack, height, width = weight.shape
    count = prod(stack)
    forms: dict[str, tuple[_Grid, _Grid]] = {}
    blocks = settings.blocks()
    if settings.weight_block_size is not None:
        blocks = [settings.weight_block_size]
    else:
        forms["per tensor"] = (1, 1, 1), (count, height, width)
        forms["per row"] = (count, height, 1), (1, 1, width)
        if count > 1:
            forms["per matrix"] = (count, 1, 1), (1, height, width)
            forms["per column"] = (count, 1, width), (1, height, 1)
    for rows, columns in blocks:
        grid = count, -(-height // rows), -(-width // columns)
        forms[f"per block of {rows} x {columns}"] = grid, (1, rows, columns)
    return forms


def _grid(weight: TensorSpec, scale: TensorSpec) -> _Grid | None:
    """Return the number of scales along (matrix, row, column); None if the shape has no such."""
    shape = scale.shape
    if scale.numel == 1:
        return 1, 1, 1
    if len(shape) == 1 and shape[0] == weight.shape[0]:  # one per row, or per matrix of a stack
        shape = (*shape, *(1 for _ in weight.shape[1:]))
    return (prod(shape[:-2]), shape[-2], shape[-1]) if len(shape) == len(weight.shape) else None


def _target_dtype(config: Mapping[str, Any]) -> str:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    named = [str(part.get(key)) for part in parts for key in _DTYPE_KEYS]
    return next((_DTYPES[name] for name in named if name in _DTYPES), _DTYPES[_OTHERWISE])


def _without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the dequantised model; parts of a multimodal model are included."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in CONFIG_KEYS:
            continue
        if key in _DTYPE_KEYS and isinstance(value, str) and value not in _DTYPES:
            changed[key] = _OTHERWISE
        else:
            changed[key] = _without_quantisation(value) if isinstance(value, dict) else value
    return changed


def _as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
