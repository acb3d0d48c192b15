"""The options of a plan other than its method: one field each, with its label, help and checks.

In: text of a form or a command, values of Python or JSON. Out: a checked `PlanOptions`, and the
description of each field for forms and parsers (`OPTIONS`). `scope` implements the options and
defines what a method allows. A new option is a field here and its implementation there. Imports
neither torch nor a method, so that a form can be laid out before either is loaded.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.patterns import compile_pattern
from ipmerge_core.spectral.kinds import Anchor

Override = Literal["merge", "keep"]
Norms = Literal["keep", "merge"]
Embeddings = Literal["keep", "merge-shared"]
Modules = Literal["projections", "all", "all-and-router"]
LayerProfile = Literal["all", "upper_half", "lower_half", "middle_half", "rising", "falling"]
Kind = Literal["pattern", "factors", "share", "choice", "rules"]
_MOST_FACTORS = 1000
LARGEST_GAIN = 1000.0  # of a layer

MODULE_CHOICES = {
    "projections": "q, k, v, o, gate, up and down, also of experts",
    "all": "every matrix of a layer except routers",
    "all-and-router": "every matrix of a layer",
}
LAYER_PROFILES = {
    "all": "every layer alike",
    "upper_half": "only the half nearest to the output",
    "lower_half": "only the half nearest to the input",
    "middle_half": "only the layers between the first and the last quarter",
    "rising": "from none in the first layer to all in the last",
    "falling": "from all in the first layer to none in the last",
}
ANCHORS = {
    "inject": "add the experts' task vectors to the MLLM",
    "two_base": "task vectors relative to each model's own base",
    "root": "all task vectors relative to the experts' base",
    "interp": "interpolate from the MLLM to the expert; no base",
}


class Option(NamedTuple):
    """The label, help and kind of one field of `PlanOptions`, for forms and parsers.

    A "pattern" is a regular expression, "factors" are numbers >= 0, a "share" is a number in
    [0, 1], a "choice" is one of `choices` (with their meanings), and "rules" map names of matrices
    to "merge" or "keep": they are set per matrix in the map, not in a form field.
    """

    name: str
    default: Any
    kind: Kind
    label: str
    help: str
    choices: Mapping[str, str] = {}


def _asked(
    kind: Kind, label: str, words: str, choices: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the metadata of a field: the rest of its `Option`."""
    return {"asked": (kind, label, words, choices or {})}


@dataclass(frozen=True)
class PlanOptions:
    """The options of a plan, checked when they are made.

    Attributes:
        modules: the matrices of a layer that are merged: "projections" (q, k, v, o, gate, up and
            down, also of experts), "all" (also others, such as those of linear attention), or
            "all-and-router" (also the routers of mixtures of experts).
        include: regular expression; only matrices with a matching name are merged.
        exclude: regular expression; matrices with a matching name are kept.
        overrides: per matrix name "merge" or "keep"; takes precedence over all other options.
        layer_gains: factors on the change of the MLLM's weights, evenly spaced from the first to
            the last layer and interpolated: (0, 1) increases linearly. 0 keeps the weights of a
            layer, 1 is the method's result. SLERP turns by that share of its angle.
        layer_profile: a preset of layer gains for any number of layers (`LAYER_PROFILES`), which
            multiplies `layer_gains`.
        input_share: 1, or AIM's omega: the change keeps this share in the MLLM's most active input
            channel, and more in less active ones (`activation_informed`); needs a calibration.
            Norms, biases and embeddings have no measured inputs and are merged as without it.
        norms: "merge" also merges the decoder's norms and biases, as one-row matrices.
        embeddings: "merge-shared" also merges the embedding and head rows of tokens shared by all
            models, row by row. Include and exclude apply to both.
        anchor: reference weights of the task vectors, and the weights they are added to; W0 is the
            experts' base, B_v the MLLM's: "inject" adds the experts' W_e - W0 to W_v; "two_base"
            uses each model's own base and adds to B_v; "root" uses W0 for all; "interp" adds W_e -
            W_v to W_v, without a base. None selects the method's default, see
            `scope.choose_anchor`.

    Raises: PlanError for a value that is out of range or of another kind.
    """

    modules: Modules = field(
        default="projections",
        metadata=_asked(
            "choice",
            "Modules",
            "matrices of a layer to merge: projections (q, k, v, o, gate, up, down, also of "
            "experts), all, or all and the routers of mixtures",
            MODULE_CHOICES,
        ),
    )
    include: str | None = field(
        default=None,
        metadata=_asked(
            "pattern",
            "Include matrices",
            "regular expression: only matrices with a matching name are merged",
        ),
    )
    exclude: str | None = field(
        default=None,
        metadata=_asked(
            "pattern",
            "Exclude matrices",
            "regular expression: matrices with a matching name are kept",
        ),
    )
    overrides: Mapping[str, Override] = field(
        default_factory=dict,
        metadata=_asked("rules", "Overrides", "merge or keep matrices at any similarity"),
    )
    layer_gains: tuple[float, ...] = field(
        default=(),
        metadata=_asked(
            "factors",
            "Layer gains",
            "update scale per layer, interpolated from first to last layer; 0 1 increases linearly",
        ),
    )
    layer_profile: LayerProfile = field(
        default="all",
        metadata=_asked(
            "choice",
            "Layer profile",
            "preset of layer gains for any number of layers; multiplies the layer gains",
            LAYER_PROFILES,
        ),
    )
    input_share: float = field(
        default=1.0,
        metadata=_asked(
            "share",
            "Input share (AIM)",
            "share of the change that stays in the MLLM's most active input channel, more in "
            "others; 1 is off, AIM's code uses 0.2; needs a calibration",
        ),
    )
    norms: Norms = field(
        default="keep",
        metadata=_asked(
            "choice",
            "Norms and biases",
            "keep the MLLM's, or merge them as one-row matrices",
            {"keep": "", "merge": ""},
        ),
    )
    embeddings: Embeddings = field(
        default="keep",
        metadata=_asked(
            "choice",
            "Embeddings and head",
            "keep the MLLM's, or merge the rows of tokens shared by all models",
            {"keep": "", "merge-shared": ""},
        ),
    )
    anchor: Anchor | None = field(
        default=None,
        metadata=_asked(
            "choice",
            "Anchor",
            "reference weights for the task vectors; the default depends on the method",
            ANCHORS,
        ),
    )

    def __post_init__(self) -> None:
        """Read and check every value. Raises: PlanError."""
        for option in OPTIONS.values():
            value = _READERS[option.kind](option, getattr(self, option.name))
            object.__setattr__(self, option.name, value)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> PlanOptions:
        """Read options by name, given as text, Python or JSON values; other names are ignored.

        >>> PlanOptions.read({"layer_gains": "0, 0.5 1", "method": "ties"}).changed()
        {'layer_gains': (0.0, 0.5, 1.0)}
        """
        return cls().updated(values)

    def updated(self, values: Mapping[str, Any]) -> PlanOptions:
        """Return these options with some replaced; names and values are as in `read`."""
        return replace(self, **{name: values[name] for name in OPTIONS if name in values})

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their default."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value != OPTIONS[name].default}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values by name, which `read` accepts."""
        return {name: _plain(getattr(self, name)) for name in OPTIONS}

    def describe(self) -> dict[str, str]:
        """Return the non-default values as text, by display name.

        >>> PlanOptions(layer_gains=(0, 1), overrides={"a.weight": "keep"}).describe()
        {'overrides': '1 set by hand', 'layer gains': '0 1'}
        """
        return {name.replace("_", " "): _words(value) for name, value in self.changed().items()}


def _option(of: Field[Any]) -> Option:
    default = of.default if of.default_factory is MISSING else of.default_factory()
    return Option(of.name, default, *of.metadata["asked"])


def _plain(value: Any) -> Any:  # noqa: ANN401 (a field's value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _words(value: Any) -> str:  # noqa: ANN401 (a field's value)
    if isinstance(value, Mapping):
        return f"{len(value)} set by hand"
    if isinstance(value, float):
        return shown(value)
    return " ".join(map(shown, value)) if isinstance(value, tuple) else str(value)


def shown(value: float | int | bool | str | None) -> str:
    """Format a value in the syntax of --set, with all its digits.

    >>> shown(8.0), shown(None), shown("sum"), shown(1.2345678)
    ('8', 'none', 'sum', '1.2345678')
    """
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return value if isinstance(value, str) else str(value).lower()


def _read_pattern(option: Option, value: Any) -> str | None:  # noqa: ANN401 (whatever was given)
    if value is None:
        return None
    try:
        if not isinstance(value, str):
            raise TypeError(f"it is of type {type(value).__name__}")
        compile_pattern(value)
    except (ValueError, TypeError) as error:
        raise PlanError(
            f"The {option.name} pattern {reprlib.repr(value)} is not a valid regular expression: "
            f"{error}. Expected one in RE2's syntax, which has no look-around and no "
            f"backreferences, such as 'mlp' or 'layers\\.(0|1)\\.'."
        ) from error
    return value


def _read_factors(option: Option, value: Any) -> tuple[float, ...]:  # noqa: ANN401
    if isinstance(value, str):
        try:
            value = [float(part) for part in re.split(r"[\s,;]+", value.strip())]
        except ValueError:
            raise PlanError(
                f"The {option.label.lower()} is '{value[:40]}'; expected numbers such as 0 0.5 1, "
                f"from the first layer to the last."
            ) from None
    if not isinstance(value, list | tuple) or len(value) > _MOST_FACTORS:
        raise PlanError(
            f"{option.name} is {reprlib.repr(value)}; expected a list of at most "
            f"{_MOST_FACTORS} numbers, as [0, 1]."
        )
    wrong = [f for f in value if not isinstance(f, int | float) or not 0 <= f <= LARGEST_GAIN]
    if wrong:
        raise PlanError(
            f"A layer gain is {wrong[0]!r:.40}; expected numbers from 0 to {LARGEST_GAIN:g}, as 0, "
            f"1."
        )
    return tuple(float(factor) for factor in value)


def _read_share(option: Option, value: Any) -> float:  # noqa: ANN401 (whatever was given)
    try:
        share = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share <= 1:
        raise PlanError(
            f"{option.name} is {reprlib.repr(value)}; expected a number from 0 to 1. The default "
            f"is {shown(option.default)}."
        )
    return share


def _read_choice(option: Option, value: Any) -> Any:  # noqa: ANN401
    if value != option.default and value not in tuple(option.choices):
        expected = " or ".join(option.choices)
        raise PlanError(f"{option.name} is {reprlib.repr(value)}; expected {expected}.")
    return value


def _read_rules(option: Option, value: Any) -> dict[str, Override]:  # noqa: ANN401
    if not isinstance(value, Mapping):
        raise PlanError(
            f"{option.name} is {reprlib.repr(value)}; expected matrix names with merge or keep."
        )
    for name, rule in value.items():
        if rule not in ("merge", "keep"):
            raise PlanError(f"The override of '{name}' is {rule!r}; expected merge or keep.")
    return dict(value)


_READERS: dict[Kind, Callable[[Option, Any], Any]] = {
    "pattern": _read_pattern,
    "factors": _read_factors,
    "share": _read_share,
    "choice": _read_choice,
    "rules": _read_rules,
}
OPTIONS: Mapping[str, Option] = {each.name: _option(each) for each in fields(PlanOptions)}


def read_value(text: str, kind: str) -> float | int | bool | str | None:
    """Convert the text of a method's parameter; what is not a value of its kind stays a text.

    The validation of the method reports such a text with the values that it expects.

    >>> read_value("0.5", "float"), read_value("None", "int"), read_value("sum", "choice")
    (0.5, None, 'sum')
    """
    if text.lower() in ("true", "false"):  # also for choices that used to be boolean
        return text.lower() == "true"
    if kind == "choice":
        return text
    if text.lower() == "none":
        return None
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return text
