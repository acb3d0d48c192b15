"""Sweeps and ablations: evaluate many plans of one pair without writing a model.

In: an analysis, the points of a sweep, and tasks. Out: a step per batch, and a `Sweep`: the points
with what their plans merge, and a `Report` in which every point is compared with the unmerged
model. Replies are stored by model content, plan digest, task, item and settings, so that an
interrupted sweep, or another one with the same plans, answers only what is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ipmerge_core.analysis.records import Analysis, Sources
from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.evaluation.evaluate import EvaluationSettings, EvaluationStep, iter_evaluation
from ipmerge_core.evaluation.points import (
    UNMERGED,
    Axis,
    Point,
    ablation_points,
    sweep_points,
)
from ipmerge_core.evaluation.report import Report
from ipmerge_core.evaluation.result_files import ResultFile
from ipmerge_core.evaluation.subjects import subject_of_folder
from ipmerge_core.merging.provenance import read_provenance
from ipmerge_core.methods.declarations import ParameterValue
from ipmerge_core.planning.description import arguments_of
from ipmerge_core.tasks.registry import find_tasks

if TYPE_CHECKING:
    from ipmerge_core.evaluation.replies import ReplyStore
    from ipmerge_core.planning.plan import MergePlan
    from ipmerge_core.tasks.items import Task

Steps = Generator[EvaluationStep, None, "Sweep | None"]
Kind = Literal["sweep", "ablation", "models"]


@dataclass(frozen=True)
class SweptPoint:
    """A point of a finished sweep: what its plan merges, without the plan's records.

    `relative_change` is None where it is not known without reading weights. `arguments` make the
    plan again with `make_plan`.
    """

    label: str
    values: dict[str, ParameterValue] = field(default_factory=dict)
    plan: str = ""
    digest: str = ""
    method: str = ""
    permuted: int | None = None
    selected: tuple[str, ...] = ()
    relative_change: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep(ResultFile):
    """The result of a sweep, an ablation, or a comparison of the merges of one pair.

    Its points are the subjects of the report, in order.
    """

    FORMAT = "ipmerge-sweep"

    kind: Kind
    name: str
    sources: Sources
    axes: tuple[Axis, ...]
    points: tuple[SweptPoint, ...]
    report: Report


def iter_sweep(
    analysis: Analysis,
    axes: Sequence[Axis],
    tasks: Sequence[Task],
    settings: EvaluationSettings | None = None,
    store: ReplyStore | None = None,
    *,
    force: bool = False,
    stops: Sequence[threading.Event] = (),
    **fixed: Any,  # noqa: ANN401 (arguments of make_plan)
) -> Steps:
    """Evaluate a sweep over one or two parameters.

    Args:
        analysis: the pair.
        axes: the varied parameters with their values.
        tasks: the tasks; perception guards are not added here, see `find_tasks`.
        settings: limits and the device.
        store: where replies are stored; by default in the home folder.
        force: evaluate even if the sibling check refuses the models.
        stops: events that cancel.
        **fixed: the method and all other arguments of `make_plan`.

    Returns: the result; None in processes of other ranks than 0.

    Raises: as `sweep_points` and `iter_evaluation`.
    """
    points = sweep_points(analysis, axes, **fixed)
    run = _Run(analysis, points, tasks, settings, store, force, stops)
    return (yield from run.steps("sweep", tuple(axes)))


def iter_ablation(
    analysis: Analysis,
    tasks: Sequence[Task],
    settings: EvaluationSettings | None = None,
    store: ReplyStore | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    force: bool = False,
    stops: Sequence[threading.Event] = (),
    **fixed: Any,  # noqa: ANN401 (arguments of make_plan)
) -> Steps:
    """Evaluate the ablation of an IP-Merging plan; `seeds` are those of its permuted controls.

    The other arguments, the result and the errors are those of `iter_sweep`.
    """
    points = ablation_points(analysis, seeds, **fixed)
    run = _Run(analysis, points, tasks, settings, store, force, stops)
    return (yield from run.steps("ablation", ()))


def iter_models(
    analysis: Analysis,
    plans: Mapping[str, MergePlan],
    folders: Mapping[str, str | Path],
    tasks: Sequence[Task],
    settings: EvaluationSettings | None = None,
    store: ReplyStore | None = None,
    *,
    force: bool = False,
    stops: Sequence[threading.Event] = (),
) -> Steps:
    """Evaluate the unmerged model, plans in memory, and finished merges of one pair.

    Args:
        analysis: the pair.
        plans: plans of the pair by name.
        folders: model folders by name.
        tasks: the tasks; perception guards are not added here.
        settings: limits and the device.
        store: where replies are stored; by default in the home folder.
        force: evaluate even if the sibling check refuses the models.
        stops: events that cancel.

    Returns: the result; None in processes of other ranks than 0.

    Raises: as `iter_evaluation`; CheckpointError for a folder that is not a model.
    """
    points = [Point(UNMERGED), *(Point(name, plan) for name, plan in plans.items())]
    run = _Run(analysis, points, tasks, settings, store, force, stops)
    return (yield from run.steps("models", (), folders))


@dataclass(frozen=True)
class _Run:
    """The arguments of a sweep."""

    analysis: Analysis
    points: Sequence[Point]
    tasks: Sequence[Task]
    settings: EvaluationSettings | None
    store: ReplyStore | None
    force: bool
    stops: Sequence[threading.Event]

    def steps(
        self, kind: Kind, axes: tuple[Axis, ...], folders: Mapping[str, str | Path] | None = None
    ) -> Steps:
        """Evaluate all points and folders, and describe them."""
        from ipmerge_core.evaluation.merged_models import MergedModels

        sources, folders = self.analysis.sources, folders or {}
        with MergedModels(sources, force=self.force, stops=self.stops) as models:
            subjects = [models.subject(point) for point in self.points]
            subjects += [subject_of_folder(path, name) for name, path in folders.items()]
            report = yield from iter_evaluation(
                subjects, self.tasks, self.settings, self.store, stops=self.stops
            )
        if report is None:
            return None
        found = [swept_point(point) for point in self.points]
        found += [_described_folder(name, Path(path)) for name, path in folders.items()]
        return Sweep(kind, self.analysis.name, sources, axes, tuple(found), report)


def swept_point(point: Point) -> SweptPoint:
    """Return a point of a sweep without the records of its plan."""
    plan = point.plan
    if plan is None:
        return SweptPoint(point.label)
    return SweptPoint(
        label=point.label,
        values=dict(point.values),
        plan=plan.hash,
        digest=plan.digest,
        method=plan.method,
        permuted=point.permuted,
        selected=tuple(decision.name for decision in plan.selected),
        relative_change=_change_of(plan),
        arguments=arguments_of(plan) if point.permuted is None else {},
    )


def _described_folder(name: str, folder: Path) -> SweptPoint:
    """Describe a finished merge by its manifest; its matrices are not listed."""
    made = read_provenance(folder)
    if made is None:
        return SweptPoint(name)
    return SweptPoint(name, plan=made.plan, digest=made.digest, method=made.method)


def _change_of(plan: MergePlan) -> float | None:
    try:
        return plan.preview().relative_change
    except PlanError:  # not affine in directions of the analysis
        return None


def iter_sweep_to(
    pack: str,
    out: str,
    tasks: Sequence[str],
    axes: Sequence[Mapping[str, Any]] = (),
    *,
    fixed: Mapping[str, Any] | None = None,
    ablation: bool = False,
    device: str = "cpu",
    **limits: Any,  # noqa: ANN401 (fields of EvaluationSettings)
) -> Generator[EvaluationStep]:
    """Evaluate a sweep or an ablation of a pack and write its result; a run of the app.

    Args:
        pack: file of the analysis.
        out: file of the result, written at the end.
        tasks: names of tasks; perception guards are added.
        axes: mappings with `parameter` and `values`; empty for an ablation.
        fixed: arguments of `make_plan`.
        ablation: evaluate the ablation instead.
        device: a torch device name.
        **limits: limit, seed, max_new_tokens, batch_size.

    Raises: as `iter_sweep`; RunError for neither or both of axes and ablation.
    """
    if bool(axes) == ablation:
        raise RunError("Give the parameters of a sweep, or request the ablation: one of the two.")
    analysis, found = Analysis.load(pack), find_tasks(tasks)
    settings = EvaluationSettings(device=device, **limits)
    if ablation:
        result = yield from iter_ablation(analysis, found, settings, **(fixed or {}))
    else:
        varied = [Axis(str(axis["parameter"]), tuple(axis["values"])) for axis in axes]
        result = yield from iter_sweep(analysis, varied, found, settings, **(fixed or {}))
    if result is not None:
        result.save(Path(out))


def iter_models_to(
    pack: str,
    out: str,
    tasks: Sequence[str],
    *,
    plan: MergePlan | None = None,
    plan_name: str = "merged",
    folders: Mapping[str, str] | None = None,
    device: str = "cpu",
    **limits: Any,  # noqa: ANN401 (fields of EvaluationSettings)
) -> Generator[EvaluationStep]:
    """Evaluate the models of a pair and write the result; a run of the app.

    Args:
        pack: file of the analysis.
        out: file of the result, written at the end.
        tasks: names of tasks; perception guards are added.
        plan: a plan to evaluate in memory.
        plan_name: how it is shown.
        folders: finished merges by name.
        device: a torch device name.
        **limits: limit, seed, max_new_tokens, batch_size.

    Raises: as `iter_models`.
    """
    settings = EvaluationSettings(device=device, **limits)
    plans = {} if plan is None else {plan_name: plan}
    found = find_tasks(tasks)
    result = yield from iter_models(Analysis.load(pack), plans, folders or {}, found, settings)
    if result is not None:
        result.save(Path(out))
