"""Read what a user has chosen for a pair, describe it, and make its plan.

In: the data of the layer map's events, which is untrusted and checked against the pack
(`read_commit`, `read_cells`). Out: a `PlanChoice` of plain values that fits in gr.State, a short
description, and on demand the `MergePlan` (this imports torch).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.errors import PlanError
from ipmerge_core.planning.map_variants import (
    LARGEST_BUDGET,
    LARGEST_LAMBDA,
    VARIANTS,
    variant_with,
)
from ipmerge_core.planning.options import shown
from ipmerge_core.runtime.atomic import FileVersion, version_of
from ipmerge_core.runtime.host import is_hosted
from ipmerge_core.spectral.kinds import (
    COMPLEMENTS,
    ENERGY_SHARES,
    KEPT_SHARES,
    SIMILARITIES,
    TRUNCATIONS,
)
from ipmerge_core.ui.pairs import ROOT, find_pack

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

VARIANT_LABELS = {
    "sum": "IP-Merging",
    "max": "γ max",
    "rescale_only": "rescale only",
    "select_only": "select only",
    "protect": "protect",
    **{
        name: f"off the directions of {share:.0%} of the MLLM's energy"
        for name, share in zip(COMPLEMENTS, ENERGY_SHARES, strict=True)
    },
    **{
        name: f"truncated to {share:.0%} of the math change's energy"
        for name, share in zip(TRUNCATIONS, KEPT_SHARES, strict=True)
    },
}


class PlanChoice(NamedTuple):
    """The choices of a user for a pair: plain values that fit in gr.State."""

    similarity_threshold: float = 0.4
    lambda_: float = 1.0
    similarity: str = "first"
    variant: str = "sum"  # a key of VARIANTS
    overrides: Mapping[str, Literal["merge", "keep"]] = {}
    budget: float = 0.0  # 0: none

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
            **({"budget": self.budget} if self.budget else {}),
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> PlanChoice | None:
        """Return the choice with these arguments of `make_plan`; None if the map has none.

        >>> PlanChoice.from_arguments({"gamma_norm": "max", "lambda_": 4.0}).variant
        'max'
        >>> PlanChoice.from_arguments({"rank": 8}) is None
        True
        """
        fields = ("similarity_threshold", "lambda_", "similarity", "budget", "overrides")
        own = {name: arguments[name] for name in fields if name in arguments}
        rest = {name: value for name, value in arguments.items() if name not in fields}
        variant = variant_with(rest)
        return None if variant is None else cls(**own, variant=variant)

    def to_browser(self) -> dict[str, Any]:
        """Return the plan in the format of the layer map.

        >>> PlanChoice(lambda_=2.0).to_browser()["lambda"]
        2.0
        """
        return {
            "s": self.similarity_threshold,
            "lambda": self.lambda_,
            "similarity": self.similarity,
            "variant": self.variant,
            "overrides": dict(self.overrides),
            "budget": self.budget,
        }


def read_commit(values: object, pack: Mapping[str, Any]) -> PlanChoice:
    """Read the data of a `commit` event.

    Raises: PlanError if a value is missing, of the wrong type, out of range or unknown.
    """
    if not isinstance(values, Mapping):
        raise PlanError(f"The plan is of type {type(values).__name__}; expected a mapping.")
    return PlanChoice(
        similarity_threshold=_number("similarity threshold", values.get("s"), 1.0),
        lambda_=_number("lambda", values.get("lambda"), LARGEST_LAMBDA),
        similarity=_choice("similarity", values.get("similarity"), SIMILARITIES),
        variant=_choice("update", values.get("variant"), tuple(VARIANTS)),
        overrides=_overrides(values.get("overrides") or {}, pack),
        budget=_number("budget", values.get("budget") or 0, LARGEST_BUDGET),
    )


def read_cell(values: object, pack: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the record that a `cellselect` event names. Raises: PlanError if there is none."""
    if isinstance(values, Mapping):
        for record in pack["records"]:
            if record["name"] == values.get("name") and record["expert"] == values.get("expert"):
                return dict(record)
    raise PlanError("This matrix is not in the current analysis. Select one on the map again.")


def read_cells(values: object, pack: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Find the record of the selected matrix and, if the event names one, of the pinned one."""
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
            raise PlanError(f"The override {str(name)[:80]!r} is not a matrix of this pair.")
        if value not in ("merge", "keep"):
            raise PlanError(
                f"The override of {name!r} is {str(value)[:40]!r}; expected merge or keep."
            )
    return dict(values)


def plan_of(pack_id: str, choice: PlanChoice, **more: Any) -> MergePlan:  # noqa: ANN401
    """Make the plan of a choice, with more arguments of `make_plan`. Raises: PlanError.

    Another projector replaces that of the choice.
    """
    from ipmerge_core.planning.plan import make_plan

    own = choice.arguments
    if "projector" in more:
        own = {name: value for name, value in own.items() if name not in ("projector", "energy")}
    return make_plan(analysis_of(pack_id), **{**own, **more})


def describe_choice(choice: PlanChoice) -> str:
    """Describe a choice briefly, its numbers with all their digits.

    >>> describe_choice(PlanChoice(0.1, 4.0, variant="max"))
    'Sα 0.1, λ 4, γ max'
    """
    words = [f"Sα {shown(choice.similarity_threshold)}", f"λ {shown(choice.lambda_)}"]
    if choice.similarity != "first":
        words.append(f"similarity {choice.similarity}")
    if choice.variant != "sum":
        words.append(VARIANT_LABELS[choice.variant])
    if choice.budget:
        words.append(f"budget {shown(choice.budget)}")
    if choice.overrides:
        words.append(f"{len(choice.overrides)} set by hand")
    return ", ".join(words)


def shown_path(path: str | Path) -> str:
    """Return a path of this machine as it may be shown: never an absolute one.

    A file of the repository is relative to it, one in the user's home folder begins with `~`, and
    of any other only the name is left; on a Space, of all but the repository's.
    """
    path = Path(path)
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    home = Path.home()
    if not is_hosted() and path.is_relative_to(home) and path != home:
        return f"~/{path.relative_to(home).as_posix()}"
    return path.name


def choice_digest(pack_id: str, plan: MergePlan, device: str) -> str:
    """Return the SHA-256 of what a merge would do: pair, plan and device.

    Unlike the plan's own digest it covers the whole of `MergePlan.to_dict`.
    """
    content = [pack_id, device, plan.to_dict()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def analysis_of(pack_id: str) -> Analysis:
    """Return a pair's analysis, read once per version of its file. Raises: PlanError."""
    path = find_pack(pack_id).path
    return _load(path, version_of(path))


@lru_cache(maxsize=4)
def _load(path: Path, _version: FileVersion) -> Analysis:
    return Analysis.load(path)
