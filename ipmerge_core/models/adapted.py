"""A base with a LoRA adapter, opened like any other model: W = W0 + s B A, computed on reading.

In: an adapter in the PEFT format and the model that it changes. Out: a `Checkpoint` with the names
and the layout of the base. Only the requested rows are computed, in fp32 (fp64 for a base in fp64).
DoRA, LoRA of embeddings, modules saved as a whole and trained biases are included; `adapter_config`
refuses other options. Source: peft 0.21, `get_delta_weight`, `DoraLinearVariant`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.adapter_config import MERGE_FIRST, AdapterConfig
from ipmerge_core.models.adapter_names import Lora, changes_of, without_factors
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.checkpoint import (
    DTYPES,
    Checkpoint,
    Remark,
    TensorSpec,
    tensor_bytes,
)
from ipmerge_core.models.files import SUBFOLDERS, Files, Stamp, is_hub_id
from ipmerge_core.models.low_rank import Factors
from ipmerge_core.models.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_weights

_CACHED = 4  # pairs of factors: those of an embedding are read for thousands of rows
_TOKENIZER = frozenset({
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
})  # fmt: skip


class AdaptedCheckpoint(Checkpoint):
    """A model of its base's layout whose values are those of the base with an adapter applied."""

    def __init__(self, files: Files, config: AdapterConfig, base: Checkpoint) -> None:
        self.base = base
        self._adapter = Checkpoint(files, adapter_weights(files))
        self._settings = config
        self._changes = changes_of(self._adapter, config, base)
        self._loaded = lru_cache(maxsize=_CACHED)(self._load)
        self.files = AdaptedFiles(files, base.files)
        self.config = base.config
        self.weights = replace(base.weights, unused=(), has_adapter=False)
        self.shards = base.shards
        self.tensors = {**base.tensors, **dict(self._resized())}

    def _resized(self) -> Iterator[tuple[str, TensorSpec]]:
        """Yield the entries of tensors that the adapter stores with another number of rows."""
        for name, change in self._changes.items():
            if change.saved is None:
                continue
            spec, before = self._adapter.spec(change.saved), self.base.tensors.get(name)
            if before is None or before.shape != spec.shape:
                yield name, replace(spec, name=name)

    @property
    def changed(self) -> list[str]:
        """The names of the tensors whose values the adapter changes."""
        return sorted(self._changes)

    @property
    def remark(self) -> Remark:
        """The rank of the adapter, what it changes, and what does not fit its configuration."""
        lora = [change.lora for change in self._changes.values() if change.lora]
        ranks = sorted({found.rank for found in lora})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        kind = "DoRA adapter" if self._settings.use_dora else "adapter"
        saved = [name for name, change in self._changes.items() if change.saved]
        more = f", with {len(saved)} tensors of its own ('{saved[0]}')" if saved else ""
        message = (
            f"{kind} of rank {rank} on {len(lora)} matrices of '{_label(self.base)}'{more}; its "
            f"weights are computed while reading."
        )
        if missing := sorted(without_factors(self._changes, self._settings, self.base)):
            return Remark(
                "adapter",
                f"{message} It has no factors for {len(missing)} weights that its configuration "
                f"names, '{missing[0]}' first: these are those of the base.",
                "Was it saved or downloaded completely?",
            )
        named = self._settings.base
        if named is None or _last(named).lower() == _last(self.base.id).lower():
            return Remark("adapter", message)
        return Remark(
            "adapter",
            f"{message} It was trained on '{named if is_hub_id(named) else _last(named)}'.",
            "Use that model as base, unless both have the same weights.",
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies the base, the adapter's weights and its configuration."""
        parts = [self.base.fingerprint, self._adapter.fingerprint, self._config_digest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def content(self) -> str | None:
        """SHA-256 of blocks of both, as `Checkpoint.content`; None if both are on the hub."""
        parts = [self.base.content, self._adapter.content]
        return None if parts == [None, None] else _digest(json.dumps(parts).encode())

    @property
    def _config_digest(self) -> str:
        return _digest(self._adapter.files.read(ADAPTER_CONFIG))

    def stamps(self) -> dict[tuple[str, str], Stamp | None]:
        """Return the stamps of the base's weights, the adapter's, and its configuration."""
        own = {(self.id, ADAPTER_CONFIG): self._adapter.files.stamp(ADAPTER_CONFIG)}
        return {**self.base.stamps(), **self._adapter.stamps(), **own}

    def read_header(self, shard: str) -> bytearray:
        """Read the raw header of a shard of the base, whose layout this model has."""
        return self.base.read_header(shard)

    def read_size(self, name: str) -> int:
        """Return the size in bytes of what `read` returns: changed matrices are in fp32."""
        spec = self.spec(name)
        change = self._changes.get(split_address(name).name)
        return spec.nbytes if change is None else spec.numel * max(4, DTYPES[spec.dtype].itemsize)

    def factors(self, name: str, base: Checkpoint) -> Factors | None:
        """Return the factors of a matrix that the adapter changes by s B A only; else None."""
        stored, _, _, rows = split_address(name)
        change = self._changes.get(stored)
        if change is None or change.lora is None or change.saved or change.lora.magnitude:
            return None
        if _place(base) != _place(self.base):
            return None
        return self._loaded(change.lora).rows(rows)

    def read(self, name: str) -> Tensor:
        """Read one tensor on the CPU; a changed matrix in fp32, or fp64 if the base is in fp64."""
        stored, _, _, rows = split_address(name)
        change = self._changes.get(stored)
        if change is None:
            return self.base.read(name)
        self.spec(name)  # raises if it does not exist
        if change.saved is None:
            found = self.base.read(name)
        else:
            found = self._adapter.read(change.saved + name.removeprefix(stored))
        return found if change.lora is None else self._adapted(found, change.lora, rows)

    def _adapted(self, weight: Tensor, lora: Lora, rows: range | None) -> Tensor:
        """Compute W0 + s B A, and for DoRA m W / ||W|| by rows, for the rows of a weight.

        Shapes: weight (m, n), result (m, n).
        """
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        left, right, scale = self._loaded(lora).rows(rows)
        changed = torch.addmm(weight.to(wide), left.to(wide), right.to(wide), alpha=scale)
        if lora.magnitude is None:
            return changed
        magnitude = self._adapter.read(lora.magnitude).to(wide)
        own = magnitude if rows is None else magnitude[rows.start : rows.stop]
        return changed.mul_((own / torch.linalg.vector_norm(changed, dim=1))[:, None])

    def _load(self, lora: Lora) -> Factors:
        A, B = self._adapter.read(lora.A), self._adapter.read(lora.B)
        return Factors(B, A, lora.scale) if lora.by_rows else Factors(A.T, B.T, lora.scale)

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read the bytes [start, stop) of a tensor; changed ones are rounded to its dtype."""
        stored, _, _, rows = split_address(name)
        if stored not in self._changes:
            return self.base.read_bytes(name, start, stop)
        spec = self.spec(name)
        stop = spec.nbytes if stop is None else stop
        if stop <= start:
            return bytearray()
        row, above = spec.nbytes // spec.shape[0], rows.start if rows else 0
        first, last = start // row, -(-stop // row)
        values = self.read(f"{stored}[{above + first}:{above + last}]").to(DTYPES[spec.dtype])
        return bytearray(tensor_bytes(values)[start - first * row : stop - first * row])


class AdaptedFiles:
    """The files of a base with the adapter's own tokenizer; `id` and `revision` of the adapter."""

    def __init__(self, adapter: Files, base: Files) -> None:
        self.id, self.revision = adapter.id, adapter.revision
        self.remote = adapter.remote or base.remote
        self._base = base
        own = {name for name in adapter.names() if _is_tokenizer(name)}
        kept = (name for name in base.names() if not (own and _is_tokenizer(name)))
        self._places = {**dict.fromkeys(kept, base), **dict.fromkeys(own, adapter)}
        self._places[ADAPTER_WEIGHTS] = adapter

    def local_folder(self) -> Path:
        """Raise CheckpointError: no folder holds the weights of a model with an adapter."""
        raise CheckpointError(
            f"'{self.id}' is a PEFT adapter and is loaded here as a whole model: {MERGE_FIRST}."
        )

    def names(self) -> list[str]:
        """List the files of the base, and the tokenizer of the adapter if it has one."""
        return sorted(self._places.keys() - {ADAPTER_WEIGHTS})

    def size(self, name: str) -> int:
        """Size of one file in bytes."""
        return self._places[name].size(name)

    def content_id(self, name: str) -> str | None:
        """Return the hub's hash of a file's content; None for weights, which are computed."""
        return None if name.endswith(".safetensors") else self._places[name].content_id(name)

    def stamp(self, name: str) -> Stamp | None:
        """Return the stamp of a file; None on the hub."""
        return self._places[name].stamp(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read the bytes [start, stop) of one file."""
        return self._places[name].read(name, start, stop)

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill `memory` with the bytes of one file from `start` on."""
        self._places[name].read_into(memory, name, start)


def _is_tokenizer(name: str) -> bool:
    return name in _TOKENIZER or name.startswith(tuple(f"{folder}/" for folder in SUBFOLDERS))


def _digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def _label(model: Checkpoint) -> str:
    return model.id if model.files.revision is not None else Path(model.id).name


def _last(model: str) -> str:
    return model.partition("@")[0].rstrip("/").rsplit("/", 1)[-1]


def _place(model: Checkpoint) -> tuple[str, str | None]:
    return model.files.id, model.files.revision
