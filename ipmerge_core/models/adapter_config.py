"""Read the configuration of a LoRA adapter in the PEFT format.

In: `adapter_config.json`, written by other programs. Out: an `AdapterConfig` that answers, for the
name of a module, which rank and scale PEFT gives it and whether it is a target. Options that change
the weights in a way that is not implemented are refused by name, and so are unknown ones.
Source: peft 0.21, `LoraConfig`, `get_pattern_key` and `check_target_module_exists`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import sqrt
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.files import Files, is_hub_id
from ipmerge_core.models.weight_files import ADAPTER_CONFIG, read_json
from ipmerge_core.runtime.input_files import InvalidContentError, Name, Number, Schema
from ipmerge_core.runtime.patterns import Pattern, compile_pattern

MERGE_FIRST = "merge it into its base with PEFT (merge_and_unload) and use the resulting model"
_MOST_NAMES = 100_000
_LONGEST_PATTERN = 10_000  # characters; a longer one of PEFT's is not checked
_MOST_PATTERNS = 1024  # each is compared with every adapted module
Rank: TypeAlias = Annotated[int, Field(ge=1, le=2**20)]
_Few: TypeAlias = Annotated[list[Name], Field(max_length=_MOST_PATTERNS)]
_Selection: TypeAlias = (
    Annotated[str, Field(max_length=1_000_000)]
    | Annotated[list[Name], Field(max_length=_MOST_NAMES)]
    | None
)
_Text: TypeAlias = Name | None
_Flag: TypeAlias = bool | None

# Settings of the training, and notes: they do not change what the stored factors mean.
_OF_TRAINING = frozenset({
    "auto_mapping", "buffer_size", "corda_config", "direction", "dirichlet_prior",
    "ensure_weight_tying", "eva_config", "inference_mode", "kl_loss_weight", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "num_samples", "peft_version",
    "qalora_group_size", "runtime_config", "sample_scaler", "scale", "stable_gamma", "task_type",
    "use_entropy",
})  # fmt: skip
# What leaves the base as it is; others, such as PiSSA, move a part of the base into the factors.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an `adapter_config.json` that determine the weights.

    `r`, `lora_alpha` and their patterns give the scale of a module: alpha / r, or with `use_rslora`
    alpha / sqrt(r). `target_modules` is a list of names, a pattern for whole names, or
    "all-linear".
    """

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: Number = 8
    base_model_name_or_path: _Text = None
    revision: _Text = None
    rank_pattern: Annotated[dict[Name, Rank], Field(max_length=_MOST_PATTERNS)] | None = None
    alpha_pattern: Annotated[dict[Name, Number], Field(max_length=_MOST_PATTERNS)] | None = None
    use_rslora: _Flag = False
    use_dora: _Flag = False
    fan_in_fan_out: _Flag = False
    bias: Literal["none", "all", "lora_only"] | None = "none"
    init_lora_weights: bool | Name | None = True
    target_modules: _Selection = None
    exclude_modules: _Selection = None
    modules_to_save: _Few | None = None
    layers_to_transform: int | Annotated[list[int], Field(max_length=_MOST_PATTERNS)] | None = None
    layers_pattern: Name | _Few | None = None

    @classmethod
    def read(cls, files: Files) -> AdapterConfig:
        """Read the configuration of an adapter folder.

        Raises: CheckpointError if it is damaged, not of LoRA, or uses an unsupported option.
        """
        content = read_json(files, ADAPTER_CONFIG)
        kind = content.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"'{files.id}' is a PEFT adapter of type {reprlib.repr(kind)}; expected 'LORA'. "
                f"If it can be merged, {MERGE_FIRST}."
            )
        known = {field.name for field in fields(cls)}
        _refuse_options(files.id, content, known)
        try:
            found = _SCHEMA.validate({key: content[key] for key in known & content.keys()})
            found.compile()
        except InvalidContentError as error:
            raise CheckpointError(
                f"'{ADAPTER_CONFIG}' of '{files.id}' is damaged: {error}. Download or save it "
                f"again."
            ) from error
        return found

    def compile(self) -> None:
        """Compile all patterns. Raises: InvalidContentError for an invalid one."""
        _ = self._ranks, self._alphas, self._layer_names, self._saved
        _ = self._targeted, self._excluded

    @property
    def base(self) -> str | None:
        """The folder or hub id of the model that the adapter was trained on."""
        name = self.base_model_name_or_path or None
        if name and self.revision and is_hub_id(name) and "@" not in name:
            return f"{name}@{self.revision}"
        return name

    def rank_of(self, module: str) -> int:
        """Return the rank that PEFT gives a module."""
        return next((r for pattern, r in self._ranks if _search(pattern, module)), self.r)

    def scale_of(self, module: str) -> float:
        """Return the factor of B A in the change of a module."""
        found = (alpha for pattern, alpha in self._alphas if _search(pattern, module))
        alpha, rank = next(found, self.lora_alpha), self.rank_of(module)
        return alpha / sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts a module of this name.

        A pattern outside RE2's syntax (look-around, which patterns for multimodal models often use)
        is not evaluated: the modules are then those with stored factors, as PEFT saves them.
        """
        if self.exclude_modules and self._excluded.selects(module):
            return False
        if any(_search(pattern, module) for pattern in self._saved):
            return False
        chosen = self.target_modules
        if chosen is None or chosen == "all-linear":
            return True
        if self._targeted.selects(module) is False:
            return False
        return isinstance(chosen, str) or self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """Whether the first number in a name, after `layers_pattern`, is one of those chosen."""
        chosen = self.layers_to_transform
        if chosen is None or chosen == [] or module in (self._targeted.names or ()):
            return True
        parts = module.split(".")
        numbers = [chosen] if isinstance(chosen, int) else chosen
        for place in range(1, len(parts) - 1):
            before = ".".join(parts[:place])
            if parts[place].isdecimal() and self._names_layers(before):
                return int(parts[place]) in numbers
        return False

    def _names_layers(self, before: str) -> bool:
        if not self._layer_names:
            return "." in before
        return any(_search(pattern, before) for pattern in self._layer_names)

    @cached_property
    def _layer_names(self) -> list[Pattern]:
        given = self.layers_pattern or []
        return [_suffix(name) for name in ([given] if isinstance(given, str) else given)]

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return [(_suffix(key), rank) for key, rank in (self.rank_pattern or {}).items()]

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return [(_suffix(key), alpha) for key, alpha in (self.alpha_pattern or {}).items()]

    @cached_property
    def _saved(self) -> list[Pattern]:
        return [_compiled(rf"(?:^|\.)(?:{name})(?:$|\.)") for name in self.modules_to_save or ()]

    @cached_property
    def _targeted(self) -> _Modules:
        return _Modules.of(self.target_modules)

    @cached_property
    def _excluded(self) -> _Modules:
        return _Modules.of(self.exclude_modules)


@dataclass(frozen=True)
class _Modules:
    """Modules by the ends of their names, or by a pattern; unknown without either."""

    names: frozenset[str] | None
    pattern: Pattern | None

    @classmethod
    def of(cls, chosen: str | Sequence[str] | None) -> _Modules:
        """Read a selection; that of a pattern that RE2 cannot express is unknown."""
        if not isinstance(chosen, str):
            return cls(frozenset(chosen or ()), None)
        try:
            return cls(None, compile_pattern(f"^(?:{chosen})$"))
        except ValueError as error:
            if _is_invalid(chosen):
                raise _invalid(chosen, error) from error
            return cls(None, None)

    def selects(self, module: str) -> bool | None:
        """Return whether the module's name, or its end after a dot, is selected; None: unknown."""
        if self.names is None:
            return None if self.pattern is None else _search(self.pattern, module)
        parts = module.split(".")
        return any(".".join(parts[start:]) in self.names for start in range(len(parts)))


_SCHEMA = Schema[AdapterConfig](AdapterConfig)


def _refuse_options(adapter: str, content: Mapping[str, Any], known: set[str]) -> None:
    """Refuse options that change the weights in another way than W0 + s B A."""
    start = content.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise CheckpointError(
            f"The adapter '{adapter}' was initialised with {reprlib.repr(start)}, which moves a "
            f"part of the base into its factors: they do not apply to the base itself. Save it "
            f"with path_initial_model_for_weight_conversion, or {MERGE_FIRST}."
        )
    for name, value in content.items():
        if value and name not in known and name not in _OF_TRAINING:
            raise CheckpointError(
                f"The adapter '{adapter}' uses {reprlib.repr(name)} ({reprlib.repr(value)}), which "
                f"is not supported: {MERGE_FIRST}."
            )


def _search(pattern: Pattern, text: str) -> bool:
    return pattern.search(text) is not None


def _suffix(key: str) -> Pattern:
    return _compiled(rf"^(?:.*\.)?(?:{key})$")


def _compiled(pattern: str) -> Pattern:
    try:
        return compile_pattern(pattern)
    except ValueError as error:
        raise _invalid(pattern, error) from error


def _invalid(pattern: str, error: Exception) -> InvalidContentError:
    return InvalidContentError(
        f"its pattern {reprlib.repr(pattern)} is not a valid regular expression ({error})"
    )


def _is_invalid(pattern: str) -> bool:
    """Whether Python's own syntax, with which PEFT reads patterns, rejects one; never searches."""
    if len(pattern) > _LONGEST_PATTERN:
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return True
    return False
