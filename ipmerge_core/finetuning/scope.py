"""Select the parameters of a language model that a reasoning prior acts on.

In: names inside a decoder, in the common layout (`layers.3.self_attn.q_proj.weight`). Out: whether
the prior acts on each, and with which strength. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ipmerge_core.errors import PlanError
from ipmerge_core.finetuning.validation import check_flag, check_integer, check_number, check_texts
from ipmerge_core.models.matrix_kinds import is_router, module_of
from ipmerge_core.runtime.patterns import Pattern, compile_pattern

SETS = ("attn", "mlp", "norm", "embed", "head")
PRESETS = {"default": ("attn", "mlp"), "full": SETS}
MOST_STRENGTH = 1000
_MOST_LAYERS = 100_000
PATTERN = "re:"  # prefix of a regular expression in the list of modules


@dataclass(frozen=True)
class Scope:
    """The parameters that the prior acts on, and with which strength.

    Attributes:
        modules: names of `SETS` or `PRESETS`, or `re:PATTERN`, searched in the name.
        first_layer: blocks before it are left out (the paper's skip_first_n).
        last_layer: blocks after it are left out; None for none.
        biases: whether biases of the selected modules are included.
        strengths: (pattern, strength) pairs; the first whose pattern is found in a name replaces
            the strength of that parameter.
    """

    modules: tuple[str, ...] = PRESETS["default"]
    first_layer: int = 0
    last_layer: int | None = None
    biases: bool = True
    strengths: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Validate the values. Raises: PlanError."""
        check_texts("modules", self.modules)
        if not self.modules:
            raise PlanError(f"No modules are selected. {_expected()}")
        for name in self.modules:
            if name.startswith(PATTERN):
                _compiled(name.removeprefix(PATTERN))
            elif name not in SETS and name not in PRESETS:
                raise PlanError(f"Unknown modules '{name[:80]}'. {_expected()}")
        _check_strengths(self.strengths)
        check_flag("biases", self.biases)
        check_integer("first layer", self.first_layer, 0, _MOST_LAYERS)
        if self.last_layer is not None:
            check_integer("last layer", self.last_layer, 0, _MOST_LAYERS)
        last = self.first_layer if self.last_layer is None else self.last_layer
        if self.first_layer > last:
            raise PlanError(
                f"The layers {self.first_layer} to {self.last_layer} are selected; expected "
                f"0 <= first <= last."
            )

    @property
    def sets(self) -> frozenset[str]:
        """The names of `SETS` that are selected, presets resolved."""
        found = (PRESETS.get(name, (name,)) for name in self.modules)
        return frozenset(name for names in found for name in names if name in SETS)

    def includes(self, name: str, layer: int | None) -> bool:
        """Return whether the prior acts on a parameter.

        Args:
            name: in the common layout, such as `layers.3.self_attn.q_proj.bias`.
            layer: its text layer; None for embeddings, final norm and output head, which layer
                ranges do not concern.

        >>> scope = Scope()
        >>> scope.includes("layers.3.self_attn.q_proj.bias", 3), scope.includes("norm.weight", None)
        (True, False)
        """
        if layer is not None and not self._has_layer(layer):
            return False
        if name.endswith(".bias") and not self.biases:
            return False
        patterns = (m.removeprefix(PATTERN) for m in self.modules if m.startswith(PATTERN))
        return set_of(name) in self.sets or any(_compiled(p).search(name) for p in patterns)

    def strength(self, name: str, otherwise: float) -> float:
        """Return the strength of a parameter: that of the first pattern found in its name.

        >>> Scope(strengths=(("mlp", 0.5),)).strength("layers.0.mlp.up_proj.weight", 1.0)
        0.5
        """
        found = (value for pattern, value in self.strengths if _compiled(pattern).search(name))
        return next(found, otherwise)

    def _has_layer(self, layer: int) -> bool:
        return self.first_layer <= layer and (self.last_layer is None or layer <= self.last_layer)


def set_of(name: str) -> str | None:
    """Return the name in `SETS` that a parameter belongs to; None for others, such as routers.

    >>> [set_of(f"layers.0.{rest}") for rest in ("self_attn.q_norm.weight", "mlp.up_proj.weight")]
    ['norm', 'mlp']
    """
    if name.startswith("embed_tokens."):
        return "embed"
    if name.startswith("lm_head."):
        return "head"
    if "norm" in name:
        return "norm"
    parts = name.split(".")
    if is_router(module_of(name.partition(".")[2].partition(".")[2])):
        return None
    if "self_attn" in parts:
        return "attn"
    return "mlp" if "mlp" in parts else None


def _check_strengths(pairs: object) -> None:
    """Check the (pattern, strength) pairs. Raises: PlanError."""
    if not (isinstance(pairs, tuple) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs)):
        raise PlanError(f"The strengths are {pairs!r:.80}; expected (pattern, strength) pairs.")
    for pattern, strength in pairs:
        check_texts("patterns of strengths", (pattern,))
        _compiled(pattern)
        check_number(f"strength of '{pattern[:80]}'", strength, -MOST_STRENGTH, MOST_STRENGTH)


def _expected() -> str:
    return f"Expected some of {', '.join((*SETS, *PRESETS))}, or {PATTERN} and a pattern."


def _compiled(pattern: str) -> Pattern:
    try:
        return compile_pattern(pattern)
    except ValueError as error:
        raise PlanError(f"'{pattern[:80]}' is not a valid regular expression: {error}.") from error
