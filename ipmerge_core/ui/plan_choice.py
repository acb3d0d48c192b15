"""What a user has chosen for a pair, and the plan that it stands for.

In: the data of the layer map's events, untrusted and checked against the pack (`read_commit`,
`read_cells`). Out: a `PlanChoice`, small plain values that fit in gr.State, a short description,
and on demand (this loads torch) the `MergePlan`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.errors import PlanError
from ipmerge_core.ui.pairs import find_pack

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

SIMILARITIES = ("first", "max", "weighted")
VARIANTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sum": {},
        "max": {"gamma_norm": "max"},
        "rescale_only": {"ablation": "rescale_only"},
        "select_only": {"ablation": "select_only"},
    }
)
LARGEST_LAMBDA = 32.0  # the end of the slider
VARIANT_WORDS = {
    "sum": "IP-Merging",
    "max": "gamma max",
    "rescale_only": "rescaled only",
    "select_only": "selected only",
}


class PlanChoice(NamedTuple):
    """What a visitor has chosen for a pair: small plain values, fit for gr.State."""

    similarity_threshold: float = 0.4
    lambda_: float = 1.0
    similarity: str = "first"
    variant: str = "sum"  # a key of VARIANTS
    overrides: Mapping[str, Literal["merge", "keep"]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that `make_plan` takes for this choice.

        >>> PlanChoice(variant="max").arguments["gamma_norm"]
        'max'
        """
        return {
            "similarity_threshold": self.similarity_threshold,
            "lambda_": self.lambda_,
            "similarity": self.similarity,
            "overrides": dict(self.overrides),
            **VARIANTS[self.variant],
        }

    def to_browser(self) -> dict[str, Any]:
        """The plan as the component writes and reads it.

        >>> PlanChoice(lambda_=2.0).to_browser()["lambda"]
        2.0
        """
        return {
            "s": self.similarity_threshold,
            "lambda": self.lambda_,
            "similarity": self.similarity,
            "variant": self.variant,
            "overrides": dict(self.overrides),
        }


def read_commit(values: object, pack: Mapping[str, Any]) -> PlanChoice:
    """Turn the data of a `commit` event into a plan, or say what is wrong with it.

    Raises: PlanError when a value is missing, of the wrong kind, out of range or unknown.
    """
    if not isinstance(values, Mapping):
        raise PlanError(f"A plan arrived as {type(values).__name__}; expected its five values.")
    return PlanChoice(
        similarity_threshold=_number("S_alpha", values.get("s"), 1.0),
        lambda_=_number("lambda", values.get("lambda"), LARGEST_LAMBDA),
        similarity=_choice("similarity", values.get("similarity"), SIMILARITIES),
        variant=_choice("update", values.get("variant"), tuple(VARIANTS)),
        overrides=_overrides(values.get("overrides") or {}, pack),
    )


def read_cell(values: object, pack: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the record that a `cellselect` event names. Raises: PlanError when there is none."""
    if isinstance(values, Mapping):
        for record in pack["records"]:
            if record["name"] == values.get("name") and record["expert"] == values.get("expert"):
                return dict(record)
    raise PlanError("This matrix is not in the analysis on show. Choose one in the map again.")


def read_cells(values: object, pack: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Find the chosen matrix's record and, if the event names one, the pinned one's."""
    pinned = values.get("pinned") if isinstance(values, Mapping) else None
    return [read_cell(each, pack) for each in ([values, pinned] if pinned else [values])]


def _number(label: str, value: object, highest: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= highest:  # type: ignore[operator]  # False for NaN
        return float(value)  # type: ignore[arg-type]
    raise PlanError(f"{label} is {str(value)[:40]!r}; expected a number from 0 to {highest:g}.")


def _choice(label: str, value: object, options: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise PlanError(f"Unknown {label} {str(value)[:40]!r}. Available: {', '.join(options)}.")
    return value


def _overrides(values: object, pack: Mapping[str, Any]) -> dict[str, Literal["merge", "keep"]]:
    if not isinstance(values, Mapping):
        raise PlanError("The overrides must map matrix names to 'merge' or 'keep'.")
    known = {record["name"] for record in pack["records"]}
    for name, value in values.items():
        if name not in known:
            raise PlanError(f"An override names {str(name)[:80]!r}, no matrix of this pair.")
        if value not in ("merge", "keep"):
            raise PlanError(
                f"The override of {name!r} is {str(value)[:40]!r}; expected merge or keep."
            )
    return dict(values)


def plan_of(pack_id: str, choice: PlanChoice, **more: Any) -> MergePlan:  # noqa: ANN401
    """Make the plan that a choice stands for, with more arguments of it. Raises: PlanError."""
    from ipmerge_core.planning.plan import make_plan

    return make_plan(analysis_of(pack_id), **choice.arguments, **more)


def describe_choice(choice: PlanChoice) -> str:
    """Say in a few words what is chosen.

    >>> describe_choice(PlanChoice(0.1, 4.0, variant="max"))
    'S_α 0.1, λ 4, gamma max'
    """
    words = [f"S_α {choice.similarity_threshold:.3g}", f"λ {choice.lambda_:.3g}"]
    if choice.similarity != "first":
        words.append(f"similarity {choice.similarity}")
    if choice.variant != "sum":
        words.append(VARIANT_WORDS[choice.variant])
    if choice.overrides:
        words.append(f"{len(choice.overrides)} set by hand")
    return ", ".join(words)


def choice_digest(pack_id: str, plan: MergePlan, device: str) -> str:
    """Return the SHA-256 of exactly what a merge would do: pair, plan and device.

    Unlike the plan's own digest it covers how the plan came about, as it is shown to people.
    """
    content = [pack_id, device, plan.to_dict()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def analysis_of(pack_id: str) -> Analysis:
    """Return a pair's analysis, read once per version of its file. Raises: PlanError."""
    path = find_pack(pack_id).path
    return _load(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(path: Path, _modified: int) -> Analysis:
    return Analysis.load(path)
