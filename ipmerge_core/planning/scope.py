"""Validate the options of a plan: name patterns, norms and embeddings, layer gains, anchors.

In: user input. Out: a `Scope` that selects tensors by name, or a PlanError. Independent of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import MergeMethod
from ipmerge_core.methods.declarations import Anchor

SIMILARITIES = ("first", "max", "weighted")
Override = Literal["merge", "keep"]
Norms = Literal["keep", "merge"]
Embeddings = Literal["keep", "merge-shared"]


class Scope(NamedTuple):
    """Selects tensors by name: an override, or included and not excluded."""

    overrides: Mapping[str, str]
    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None

    @classmethod
    def of(cls, overrides: Mapping[str, str], include: str | None, exclude: str | None) -> Scope:
        """Create a scope from user input. Raises: PlanError for an invalid pattern."""
        return cls(overrides, _compile("include", include), _compile("exclude", exclude))

    def allows(self, name: str, wanted: bool) -> bool:
        """Return whether a tensor is merged; `wanted` is the default decision."""
        if name in self.overrides:
            return self.overrides[name] == "merge"
        if self.include and not self.include.search(name):
            return False
        return wanted and not (self.exclude and self.exclude.search(name))


def _compile(role: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise PlanError(
            f"The {role} pattern {pattern!r} is not a valid regular expression: {error}. "
            f"Expected for example 'mlp' or 'layers\\.(0|1)\\.'."
        ) from error


def check_extras(method: MergeMethod, norms: Norms, embeddings: Embeddings) -> None:
    """Check that the method supports merging norms or embeddings. Raises: PlanError."""
    check_policy("norms", norms, Norms)
    check_policy("embeddings", embeddings, Embeddings)
    asked = ["norms and biases"] * (norms != "keep") + ["embeddings"] * (embeddings != "keep")
    if asked and method.matrixwise and method.vectors is None:
        raise PlanError(
            f"{method.label} operates on whole matrices and does not support {asked[0]}. Keep "
            f"them, or choose another method, such as task_arithmetic."
        )


def check_choice(threshold: float, similarity: str, overrides: Mapping[str, str]) -> None:
    """Validate threshold, similarity and overrides. Raises: PlanError."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise PlanError(f"The similarity threshold is {threshold!r}; expected a number in [0, 1].")
    if not 0 <= threshold <= 1:  # also rejects NaN
        raise PlanError(
            f"The similarity threshold is {threshold}; expected a number in [0, 1], such as the "
            f"default 0.4."
        )
    if similarity not in SIMILARITIES:
        raise PlanError(f"Unknown similarity {similarity!r}. Available: {', '.join(SIMILARITIES)}.")
    for name, override in overrides.items():
        if override not in ("merge", "keep"):
            raise PlanError(f"The override of '{name}' is {override!r}; expected merge or keep.")


def check_layer_gains(
    method: MergeMethod, factors: Sequence[float], parameters: Mapping[str, Any]
) -> tuple[float, ...]:
    """Validate layer gains for the method. Raises: PlanError."""
    wrong = [f for f in factors if not isinstance(f, int | float) or not 0 <= f < math.inf]
    if wrong:
        raise PlanError(f"A layer gain is {wrong[0]!r}; expected finite numbers >= 0.")
    for factor in factors:
        scaled = method.scaled(parameters, factor)
        if scaled is None:
            raise PlanError(f"{method.label} does not support layer gains: it has no gain.")
        method.complete(scaled)
    return tuple(float(factor) for factor in factors)


def spread(factors: Sequence[float], layers: Iterable[int]) -> dict[int, float]:
    """Return a factor per layer: evenly spaced from the first to the last, and interpolated.

    >>> spread((0, 1), range(3))
    {0: 0.0, 1: 0.5, 2: 1.0}
    """
    ordered = sorted(layers)
    places = np.linspace(0, len(factors) - 1, num=len(ordered))
    return dict(zip(ordered, np.interp(places, range(len(factors)), factors).tolist(), strict=True))


def choose_anchor(
    method: MergeMethod, anchor: Anchor | None, parameters: Mapping[str, Any]
) -> Anchor:
    """Return the requested anchor, or the method's default.

    A plain sum uses inject: the MLLM's own change is kept, and its base is not used. Methods that
    average weights use interp. Methods that weight the models' changes against each other also need
    the MLLM's change and use two_base, as does a sum that scales the MLLM's change.

    Raises: PlanError for an anchor that the method does not support.
    """
    if anchor is None:
        scaled = method.anchor == "inject" and parameters.get("mllm_weight") != 1.0
        return "two_base" if scaled else method.anchor
    check_policy("anchor", anchor, Anchor)
    if method.selective and anchor != "two_base":
        raise PlanError(
            f"{method.label} adds to the MLLM and requires both task vectors, each relative to its "
            f"model's own base; use the anchor two_base."
        )
    if method.data is not None and anchor not in ("interp", "root"):
        raise PlanError(
            f"{method.label} requires exactly the weights that were calibrated, which the anchor "
            f"{anchor} would change. Use the anchor interp."
        )
    if anchor in ("two_base", "root"):
        return anchor
    if method.anchor != "interp" and parameters.get("mllm_weight", 1.0) != 1.0:
        raise PlanError(
            f"mllm_weight is {parameters['mllm_weight']!r}; with the anchor {anchor} the MLLM's "
            f"task vector is not scaled. Use mllm_weight=1 and set math_weight."
        )
    own_norms = method.statistic is not None and method.statistic.from_own_base
    if own_norms and parameters["scope"] != "model":
        raise PlanError(
            f"With the anchor {anchor} a matrix has one task vector, but {method.label} weights "
            f"two. Use scope=model, or the anchor two_base."
        )
    return anchor


def engine_anchor(method: MergeMethod, anchor: Anchor) -> Anchor:
    """Return the anchor to compute with.

    A plain sum added to the MLLM is the same for any base of the MLLM; with the experts' base no
    weights have to be shifted, which saves time and a rounding.
    """
    return "root" if anchor == "inject" and method.anchor == "inject" else anchor


def check_policy(role: str, value: Any, legal: Any) -> Any:  # noqa: ANN401
    """Return the value if it is a member of a Literal. Raises: PlanError."""
    if value not in get_args(legal):
        raise PlanError(f"{role} is {value!r}; expected {' or '.join(get_args(legal))}.")
    return value
