"""What a plan may merge, and from where: overrides, patterns, what is beside matrices, anchors.

In: what a user says. Out: a `Scope` that answers for a name, or a PlanError. Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import MergeMethod

Override = Literal["merge", "keep"]
Norms = Literal["keep", "merge"]
Embeddings = Literal["keep", "merge-shared"]
Anchor = Literal["two_base", "root", "inject", "interp"]


class Scope(NamedTuple):
    """What may merge at all: an override says so, or the name is included and not excluded."""

    overrides: Mapping[str, str]
    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None

    @classmethod
    def of(cls, overrides: Mapping[str, str], include: str | None, exclude: str | None) -> Scope:
        """Make a scope of what a user says. Raises: PlanError for a pattern that is none."""
        return cls(overrides, _compile("include", include), _compile("exclude", exclude))

    def allows(self, name: str, wanted: bool) -> bool:
        """Whether a tensor merges, if it is wanted at all."""
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
            f"The {role} pattern {pattern!r} is no regular expression: {error}. "
            f"Expected one such as 'mlp' or 'layers\\.(0|1)\\.'."
        ) from error


def check_beside(method: MergeMethod, norms: Norms, embeddings: Embeddings) -> None:
    """Refuse what the method cannot merge beside matrices. Raises: PlanError."""
    check_policy("norms", norms, Norms)
    check_policy("embeddings", embeddings, Embeddings)
    asked = ["norms and biases"] * (norms != "keep") + ["embeddings"] * (embeddings != "keep")
    if not asked:
        return
    if method.matrixwise:
        raise PlanError(
            f"{method.label} works on whole matrices and cannot merge {asked[0]}. Keep them, or "
            f"choose an elementwise method such as task_arithmetic."
        )
    if method.data is not None:
        raise PlanError(
            f"{method.label} needs a calibration, which measures matrices only and not {asked[0]}. "
            f"Keep them, or choose a method without data such as task_arithmetic."
        )


def check_anchor(method: MergeMethod, anchor: Anchor, parameters: Mapping[str, Any]) -> Anchor:
    """Refuse an anchor that the method has no meaning for. Raises: PlanError."""
    check_policy("anchor", anchor, Anchor)
    if anchor == "two_base":
        return anchor
    if method.matrixwise or method.data is not None:
        raise PlanError(
            f"{method.label} measures every change from the model's own base; the anchor {anchor} "
            f"is for elementwise methods without data. Leave it at two_base."
        )
    if anchor == "root":
        return anchor
    if "math_weight" not in parameters:
        raise PlanError(
            f"The anchor {anchor} needs a weight on the expert's change and {method.label} has "
            f"none. Choose a method with math_weight, such as task_arithmetic."
        )
    if parameters.get("mllm_weight", 1.0) != 1.0:
        raise PlanError(
            f"mllm_weight is {parameters['mllm_weight']!r}; with the anchor {anchor} the MLLM "
            f"stays whole, so leave it at 1 and set math_weight."
        )
    return anchor


def check_policy(role: str, value: Any, legal: Any) -> Any:  # noqa: ANN401
    """Return the value if it is one of a Literal's. Raises: PlanError."""
    if value not in get_args(legal):
        raise PlanError(f"{role} is {value!r}; expected {' or '.join(get_args(legal))}.")
    return value
