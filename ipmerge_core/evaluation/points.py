"""List the plans of a sweep or of an ablation.

In: the analysis of a pair, a method with its parameters, and the values to try. Out: `Point`s, each
a plan (or the unmerged model, or a control) with a label. Plans are made from records, so that the
whole list is checked before any model is loaded. Reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import find_method
from ipmerge_core.methods.declarations import ParameterValue
from ipmerge_core.planning.options import PlanOptions, shown
from ipmerge_core.planning.plan import MergePlan, make_plan
from ipmerge_core.planning.scope import needed_data

ABLATED = "ip_merging"
MOST_POINTS = 400
UNMERGED = "unmerged"


@dataclass(frozen=True)
class Axis:
    """A parameter of a sweep with its values, in the order in which they are tried."""

    parameter: str
    values: tuple[ParameterValue, ...]


@dataclass(frozen=True)
class Point:
    """One model of a sweep: a plan, or the unmerged model if there is none.

    With `permuted`, a control of the plan: every merged matrix changes by as much as in the plan,
    with gamma permuted over the directions by that seed (see `controls`).
    """

    label: str
    plan: MergePlan | None = None
    values: Mapping[str, ParameterValue] = field(default_factory=dict)
    permuted: int | None = None

    @property
    def key(self) -> str:
        """The digest of the plan, marked for a control; "" for the unmerged model."""
        if self.plan is None:
            return ""
        mark = "" if self.permuted is None else f":permuted:{self.permuted}"
        return f"{self.plan.digest}{mark}"


def check_axes(axes: Sequence[Axis]) -> None:
    """Check that one or two parameters have distinct values. Raises: PlanError."""
    if not 1 <= len(axes) <= 2:
        raise PlanError(f"A sweep varies one or two parameters; got {len(axes)}.")
    for axis in axes:
        if not axis.values:
            raise PlanError(f"{axis.parameter} has no values. Give at least one, such as 0.1,0.3.")
        if len(set(map(repr, axis.values))) < len(axis.values):
            raise PlanError(f"A value of {axis.parameter} is given twice. Give each value once.")
    if len({axis.parameter for axis in axes}) < len(axes):
        raise PlanError(f"{axes[0].parameter} is varied twice. Choose two different parameters.")
    count = len(axes[0].values) * (len(axes[1].values) if len(axes) > 1 else 1)
    if count > MOST_POINTS:
        raise PlanError(f"The sweep has {count} points; at most {MOST_POINTS}. Give fewer values.")


def sweep_points(analysis: Analysis, axes: Sequence[Axis], **fixed: Any) -> list[Point]:  # noqa: ANN401
    """Make the plans of a sweep over one or two parameters, the unmerged model first.

    Args:
        analysis: the pair.
        axes: the varied parameters: similarity_threshold, lambda_, similarity, or any parameter of
            the method.
        **fixed: the method and all other arguments of `make_plan`.

    Raises: PlanError for values that the method does not accept, before anything is computed.
    """
    check_axes(axes)
    if twice := sorted(set(fixed) & {axis.parameter for axis in axes}):
        raise PlanError(f"{twice[0]} is varied, and has a fixed value too. Omit one of them.")
    points = [Point(UNMERGED)]
    for first in axes[0].values:
        for second in axes[1].values if len(axes) > 1 else (None,):
            values = {axes[0].parameter: first}
            if len(axes) > 1:
                values[axes[1].parameter] = second
            points.append(Point(label_of(values), plan_at(analysis, fixed, values), values))
    if "calibration" in fixed and not any(p.plan and p.plan.calibration for p in points):
        make_plan(analysis, **{**fixed, **points[1].values})  # refuses it
    return points


def plan_at(analysis: Analysis, fixed: Mapping[str, Any], values: Mapping[str, Any]) -> MergePlan:
    """Make the plan of one point of a sweep or a search, where not all points need a calibration.

    Args:
        analysis: the pair.
        fixed: the method and other arguments of `make_plan`; a calibration is used where the point
            needs it, such as one with `input_share` below 1.
        values: the varied arguments.

    Raises: PlanError for values that the method does not accept.
    """
    arguments = {**fixed, **values}
    if arguments.get("calibration") is not None:
        method = find_method(arguments.get("method", ABLATED))
        own = {p.name: arguments[p.name] for p in method.parameters if p.name in arguments}
        options = (arguments.get("options") or PlanOptions()).updated(arguments)
        if needed_data(method, own, options) is None:
            del arguments["calibration"]
    return make_plan(analysis, **arguments)


def label_of(values: Mapping[str, ParameterValue]) -> str:
    """Name a point by its values.

    >>> label_of({"similarity_threshold": 0.4, "lambda_": 2.0})
    'similarity threshold 0.4, lambda 2'
    """
    return ", ".join(
        f"{name.rstrip('_').replace('_', ' ')} {shown(value)}" for name, value in values.items()
    )


def ablation_points(analysis: Analysis, seeds: Iterable[int] = (0,), **fixed: Any) -> list[Point]:  # noqa: ANN401
    """Make the plans of the ablation of an IP-Merging plan, the unmerged model first.

    The parts of the formula (selection alone, with rescaling, and with projection), its layers (the
    first third, and the others), and two references that change the decoder as much as the full
    plan: task arithmetic on all matrices, and gamma permuted over the directions.

    Args:
        analysis: the pair.
        seeds: one permuted control each.
        **fixed: arguments of `make_plan` for the full plan, such as lambda_.

    Raises: PlanError for another method, an ablation in `fixed`, or a plan that selects nothing.
    """
    if fixed.get("method", ABLATED) != ABLATED or fixed.get("ablation", "none") != "none":
        raise PlanError(
            f"The ablation removes parts of IP-Merging (method {ABLATED}, ablation none). Omit "
            f"other methods and ablations."
        )
    full = make_plan(analysis, **fixed)
    if not full.selected:
        raise PlanError(
            "The plan selects no matrix, so that there is nothing to remove from it. Choose a "
            "lower similarity threshold."
        )
    parts = [
        Point(label, make_plan(analysis, **_ablated(fixed, ablation)))
        for label, ablation in (
            ("selection only", "select_only"),
            ("selection and rescaling", "rescale_only"),
        )
    ]
    layers = [
        Point(label, make_plan(analysis, **{**fixed, "overrides": _only(full, chosen)}))
        for label, chosen in _thirds(full)
    ]
    controls = [Point(f"gamma permuted, seed {seed}", full, {}, seed) for seed in seeds]
    return [
        Point(UNMERGED),
        *parts,
        Point("full", full),
        *layers,
        _arithmetic_as_large_as(full, analysis),
        *controls,
    ]


def _ablated(fixed: Mapping[str, Any], ablation: str) -> dict[str, Any]:
    """Return the arguments of an ablation, without parameters of the parts that it leaves out."""
    method = find_method(ABLATED)
    names = {parameter.name for parameter in method.parameters}
    used = {
        name: value
        for name, value in fixed.items()
        if name not in names or not method.without_effect({name: value, "ablation": ablation})
    }
    return {**used, "ablation": ablation}


def _thirds(plan: MergePlan) -> list[tuple[str, set[int]]]:
    """Split the layers: the first third (at least one), and the rest."""
    layers = sorted({decision.layer for decision in plan.decisions})
    first = layers[: max(1, len(layers) // 3)]
    rest = layers[len(first) :]
    return [(f"{_span(part)} only", set(part)) for part in (first, rest) if part]


def _span(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {layers[0]} to {layers[-1]}"


def _only(plan: MergePlan, layers: set[int]) -> dict[str, str]:
    """Return overrides that keep what the plan merges in other layers."""
    outside = {d.name: "keep" for d in plan.selected if d.layer not in layers}
    return {**plan.options.overrides, **outside}


def _arithmetic_as_large_as(plan: MergePlan, analysis: Analysis) -> Point:
    """Make task arithmetic on all matrices with the relative change of another plan.

    Math:   ||math_weight dM||_F over all matrices = ||lambda sum P||_F over the selected ones
    """
    unit = make_plan(analysis, method="task_arithmetic", math_weight=1.0).preview().relative_change
    if unit <= 0:
        raise PlanError("The math model equals its base: task arithmetic has nothing to add.")
    weight = plan.preview().relative_change / unit
    made = make_plan(analysis, method="task_arithmetic", math_weight=weight)
    label = f"task arithmetic, equal size of change (math weight {weight:.3g})"
    return Point(label, made, {"math_weight": weight})
