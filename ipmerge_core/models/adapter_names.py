"""Assign the tensors of a LoRA adapter to the tensors of its base.

In: the names and shapes of `adapter_model.safetensors` and of the base. Out: a `Change` per changed
tensor of the base, after all shapes have been compared. PEFT names modules as transformers does in
memory; files of multimodal models often have other prefixes, so that names are compared without
the parts that differ, and only where that is unambiguous.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.adapter_config import MERGE_FIRST, AdapterConfig
from ipmerge_core.models.checkpoint import FLOAT_DTYPES, Checkpoint, TensorSpec

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<A>lora_A\.weight|lora_embedding_A)|(?P<B>lora_B\.weight|"
    r"lora_embedding_B)|(?P<magnitude>lora_magnitude_vector(?:\.weight)?))",
    re.DOTALL,
)
# Parts of names that layouts add or omit: outside a tower, and inside the vision tower.
_TOWERS = frozenset(("model", "language_model"))
_INSIDE = frozenset(("vision_model", "text_model"))
_HEAD = "lm_head.weight"
_NUMBER = re.compile(r"[0-9]+")
# Model types with the weights of `Conv1D` modules, which are stored transposed; PEFT ignores
# fan_in_fan_out for all others.
_TRANSPOSED_TYPES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))


class Lora(NamedTuple):
    """The names of a module's factors in the adapter, and their meaning.

    `by_rows` is whether A holds the columns of the stored matrix, as for `Linear` modules; for
    others (embeddings, `Conv1D`) the change is A^T B^T.
    """

    A: str
    B: str
    magnitude: str | None
    scale: float
    rank: int
    by_rows: bool


@dataclass(frozen=True)
class Change:
    """How an adapter changes one tensor: it replaces it by `saved`, adds `lora`, or both."""

    lora: Lora | None = None
    saved: str | None = None


class StoredNames:
    """Finds the tensor of a base by the name that it has in memory."""

    def __init__(self, base: Checkpoint) -> None:
        self._names = base.tensors.keys()
        self._plain: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in self._names:
            for plain in _plain_forms(name):
                self._plain[plain].append(name)

    def find(self, name: str) -> str | None:
        """Return the stored name; None if there is none, or several could be meant."""
        if name in self._names:
            return name
        for plain in _plain_forms(name):
            if len(found := self._plain.get(plain, [])) == 1:
                return found[0]
        return None


def _plain_forms(name: str) -> tuple[tuple[str, ...], ...]:
    """Return a name without the parts that differ between layouts; the closest form first."""
    outside = tuple(part for part in name.split(".") if part not in _TOWERS)
    inside = tuple(part for part in outside if part not in _INSIDE)
    return (outside,) if inside == outside else (outside, inside)


def changes_of(adapter: Checkpoint, config: AdapterConfig, base: Checkpoint) -> dict[str, Change]:
    """Return the changes by the base's names; the adapter's own name for a head that it adds.

    Raises: CheckpointError if the adapter is incomplete, or does not fit the base.
    """
    match = _Match(adapter, config, base, StoredNames(base))
    lora = dict(match.adapted(_factor_names(adapter)))
    saved = dict(match.saved())
    if not lora:
        raise CheckpointError(
            f"The adapter '{adapter.id}' has no LoRA factors (lora_A, lora_B) in its "
            f"{len(adapter.tensors)} tensors. Was it saved with PEFT's save_pretrained?"
        )
    return {name: Change(lora.get(name), saved.get(name)) for name in (*lora, *saved)}


def without_factors(
    changes: Mapping[str, Change], config: AdapterConfig, base: Checkpoint
) -> list[str]:
    """List the weights like the adapted ones that the configuration names but no factors change.

    "Like" means equal names except for numbers, such as those of other layers. Only for modules
    chosen by name: what a pattern selects depends on names that modules have in memory.
    """
    if not isinstance(config.target_modules, list):
        return []
    adapted = {name for name, change in changes.items() if change.lora}
    kinds = {_NUMBER.sub("", name) for name in adapted}
    return [
        name
        for name in base.tensors.keys() - adapted
        if _NUMBER.sub("", name) in kinds and config.targets(name.removesuffix(".weight"))
    ]


def _factor_names(adapter: Checkpoint) -> dict[str, dict[str, str]]:
    """Return the names of the factors by module and part. Raises: CheckpointError."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for name in adapter.tensors:
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                f"The adapter '{adapter.id}' has a tensor '{name}'; expected names that start with "
                f"'{_PREFIX}', as PEFT saves them."
            )
        found = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
        if found is not None:
            assert found.lastgroup is not None
            modules[found["module"]][found.lastgroup] = name
        elif ".lora_" in name:
            raise CheckpointError(
                f"The adapter '{adapter.id}' has the tensor '{name}', which is not supported: "
                f"{MERGE_FIRST}."
            )
    return modules


@dataclass(frozen=True)
class _Match:
    """Compares an adapter with its base, module by module."""

    adapter: Checkpoint
    config: AdapterConfig
    base: Checkpoint
    names: StoredNames

    def adapted(self, modules: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, Lora]]:
        """Yield the factors of every module by the name of the weight that they change."""
        for module, parts in modules.items():
            missing = {"A", "B", *(["magnitude"] if self.config.use_dora else [])} - parts.keys()
            if missing or len(parts) > 2 + bool(self.config.use_dora):
                what = f"no lora_{min(missing)}" if missing else "a lora_magnitude_vector"
                raise CheckpointError(
                    f"The adapter '{self.adapter.id}' has {what} for '{module}', against its "
                    f"configuration. Was it saved completely?"
                )
            if not self.config.targets(module):
                raise CheckpointError(
                    f"The adapter '{self.adapter.id}' has factors for '{module}', which its "
                    f"configuration does not select (target_modules, layers_to_transform): PEFT "
                    f"would not use them. Correct the configuration."
                )
            name = self.names.find(f"{module}.weight")
            if name is None:
                raise self._lacking(f"{module}.weight")
            yield name, self._lora(module, parts, self.base.spec(name))

    def saved(self) -> Iterator[tuple[str, str]]:
        """Yield the tensors that the adapter stores as a whole, by the base's name."""
        for stored, spec in self.adapter.tensors.items():
            name = stored.removeprefix(_PREFIX).replace(".base_layer.", ".")
            if ".lora_" in stored:
                continue
            known = self.names.find(name)
            if known is None and name.removeprefix("model.") != _HEAD:
                raise self._lacking(name)
            before = None if known is None else self.base.spec(known)
            if before is not None and (
                before.dtype not in FLOAT_DTYPES or before.shape[1:] != spec.shape[1:]
            ):
                raise self._other_shape(name, spec.shape, before)
            yield known or _HEAD, stored

    def _lora(self, module: str, parts: Mapping[str, str], weight: TensorSpec) -> Lora:
        A, B = self.adapter.spec(parts["A"]), self.adapter.spec(parts["B"])
        rank = self.config.rank_of(module)
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise CheckpointError(
                f"The factors of '{module}' in the adapter '{self.adapter.id}' have the shapes "
                f"{A.shape} and {B.shape}; expected the rank {rank} of its configuration, "
                f"({rank}, n) and (m, {rank}). Was it saved completely?"
            )
        if not {A.dtype, B.dtype} <= FLOAT_DTYPES or weight.dtype not in FLOAT_DTYPES:
            wrong = next(s for s in (weight, A, B) if s.dtype not in FLOAT_DTYPES)
            owner = self.base if wrong is weight else self.adapter
            raise CheckpointError(
                f"'{wrong.name}' of '{owner.id}' is stored as {wrong.dtype}, that is, quantised; "
                f"expected floats (F32, F16, BF16). Use the float version of '{owner.id}'."
            )
        by_rows = not self._is_transposed(parts["A"])
        change = (B.shape[0], A.shape[1]) if by_rows else (A.shape[1], B.shape[0])
        if change != weight.shape:
            raise self._other_shape(f"{module}.weight", change, weight)
        self._check_magnitude(module, parts, by_rows=by_rows, height=change[0])
        scale = self.config.scale_of(module)
        return Lora(parts["A"], parts["B"], parts.get("magnitude"), scale, rank, by_rows)

    def _is_transposed(self, name: str) -> bool:
        """Whether the module stores its weight as (inputs, outputs), unlike `Linear`."""
        in_conv = self.base.config.get("model_type") in _TRANSPOSED_TYPES
        head = name.removeprefix(_PREFIX).startswith("lm_head.")
        return "lora_embedding_" in name or (in_conv and not head)

    def _check_magnitude(
        self, module: str, parts: Mapping[str, str], *, by_rows: bool, height: int
    ) -> None:
        if "magnitude" not in parts:
            return
        shape = self.adapter.spec(parts["magnitude"]).shape
        if not by_rows or shape != (height,):
            raise CheckpointError(
                f"DoRA of '{module}' in the adapter '{self.adapter.id}' has magnitudes of shape "
                f"{shape}; supported are linear modules, here with {height} magnitudes. Otherwise "
                f"{MERGE_FIRST}."
            )

    def _lacking(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"The adapter '{self.adapter.id}' changes '{name}', which its base '{self.base.id}' "
            f"does not have. {self._remedy}"
        )

    def _other_shape(
        self, name: str, shape: tuple[int, ...], weight: TensorSpec
    ) -> CheckpointError:
        return CheckpointError(
            f"The adapter '{self.adapter.id}' changes '{name}' as a tensor of shape {shape}; in "
            f"its base '{self.base.id}' it has the shape {weight.shape}. {self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        known = self.config.base
        return f"Use the model that it was trained on{f', {known!r}' if known else ''}, as base."
