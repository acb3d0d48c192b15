"""Score the plan at a point of a search: a merge in memory, and answers to part of the items.

In: the analysis of a pair, a method with fixed arguments, and tasks. Out: the mean score of the
searched groups of items (mathematics, perception) on the validation items, with its standard error.
The items are split once, by a hash of their names: the search sees the validation items only, the
others are for its report. With `rungs` the validation items are shared out: a point is scored on
the first few, then on more, and can be given up in between.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.evaluation.evaluate import EvaluationSettings, iter_evaluation
from ipmerge_core.evaluation.points import Point, plan_at
from ipmerge_core.methods.declarations import drained
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.search.study import Measured
from ipmerge_core.tasks.items import Draw, ItemSet, Task

if TYPE_CHECKING:
    from ipmerge_core.analysis.records import Analysis
    from ipmerge_core.evaluation.answering import Caches
    from ipmerge_core.evaluation.merged_models import MergedModels
    from ipmerge_core.evaluation.replies import ReplyStore
    from ipmerge_core.evaluation.report import Report
    from ipmerge_core.search.space import SearchSpace

VALIDATION = 0.2  # share of items that a search sees; the others are reported
GROUPS = ("math", "perception", "other")
FULL = (1.0,)
RUNGS = (0.25, 0.5, 1.0)  # shares of the validation items, for racing


def check_items(groups: Sequence[str], validation: float) -> None:
    """Check the groups of items and the share that a search sees. Raises: RunError."""
    if not 0 < validation < 1:
        raise RunError(
            f"The validation share is {validation:g}; expected a number between 0 and 1."
        )
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown or not groups:
        raise RunError(
            f"Unknown group of items {', '.join(unknown) or 'none'}. Available: "
            f"{', '.join(GROUPS)}."
        )


def part_of(task: Task, low: float, high: float) -> Task:
    """Return a task with the items whose rank, a hash of their names, lies in [low, high).

    Ranks are uniform in [0, 1) and do not depend on the seed of a draw.
    """

    def load(draw: Draw) -> ItemSet:
        found = task.load(draw)
        kept = tuple(item for item in found.items if low <= _rank(task, item.id) < high)
        return found._replace(items=kept)

    return replace(task, load=load)


def _rank(task: Task, name: str) -> float:
    family = task.name.partition(":")[0]  # parts of a task split the same items alike
    digest = hashlib.sha256(f"{family}|{name}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


@dataclass
class MergeObjective:
    """The mean score of merges, in percent, averaged over groups of items.

    Args:
        analysis: the pair.
        space: the searched parameters.
        tasks: the tasks, whose items are split.
        models: makes the merges in memory.
        fixed: the method and other arguments of `make_plan`.
        groups: the groups of items whose mean score is maximised.
        validation: the share of items that the search sees.
        rungs: shares of these, increasing to 1; a point can be given up after each.
        settings: limits, seed and device of evaluations.
        store: where replies are kept.
        caches: prompts and image features, shared by all points.
        stops: events that cancel.
    """

    analysis: Analysis
    space: SearchSpace
    tasks: Sequence[Task]
    models: MergedModels
    fixed: Mapping[str, Any]
    groups: Sequence[str]
    validation: float = VALIDATION
    rungs: Sequence[float] = FULL
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    store: ReplyStore | None = None
    caches: Caches | None = None
    stops: Sequence[threading.Event] = ()

    def __post_init__(self) -> None:
        """Check the share of items and the groups, and load every draw once. Raises: RunError."""
        check_items(self.groups, self.validation)
        self.tasks = [replace(task, load=functools.cache(task.load)) for task in self.tasks]

    def plan_at(self, parameters: Mapping[str, float]) -> MergePlan:
        """Make the plan of a point. Raises: PlanError for values that do not go together."""
        whole = {axis.name for axis in self.space.axes if axis.whole}
        values = {n: int(v) if n in whole else v for n, v in parameters.items()}
        return plan_at(self.analysis, self.fixed, values)

    def __call__(
        self, parameters: Mapping[str, float], report: Callable[[float, int], bool]
    ) -> Measured:
        """Score the plan of a point on the validation items; see `study.Objective`."""
        started = time.monotonic()
        plan = self.plan_at(parameters)
        for rung in self.rungs:
            found = self.evaluated([Point(plan.hash, plan)], 0.0, self.validation * rung)
            measured = scored(found, plan.hash, self.groups)
            effort = round(rung / self.rungs[0])
            gave_up = rung < self.rungs[-1] and report(measured.value, effort)
            facts = {
                **measured.facts,
                "plan": plan.hash,
                "merged": len(plan.selected),
                "seconds": round(time.monotonic() - started, 3),
                "pruned": gave_up,
            }
            if gave_up:
                break
        return measured._replace(facts=facts)

    def evaluated(self, points: Iterable[Point], low: float, high: float) -> Report:
        """Evaluate points on the items of a range of ranks; replies that are stored are reused."""
        report = drained(
            iter_evaluation(
                [self.models.subject(point) for point in points],
                [part_of(task, low, high) for task in self.tasks],
                self.settings,
                self.store,
                caches=self.caches,
                stops=self.stops,
            )
        )
        if report is None:
            raise RunError("A search runs in one process. Start several workers instead.")
        return report


def scored(report: Report, subject: str, groups: Sequence[str]) -> Measured:
    """Return the mean score of groups of items in percent, with its standard error.

    Math:   value = mean_g p_g, p_g = right_g / n_g over all tasks;
            error = sqrt(sum_g p_g (1 - p_g) / n_g) / G.
    Raises: PlanError if a group has no judged items.
    """
    counts = {group: [0, 0] for group in GROUPS}
    whole = {task.name: task.group for task in report.tasks}
    for result in report.results:
        if result.subject != subject:
            continue
        parts = [part for part in result.parts if part.kind == "group"]
        if not parts:  # all items are of one group
            parts = [replace(result.parts[0], part=whole[result.task])]
        for part in parts:
            counts[part.part][0] += part.right
            counts[part.part][1] += part.n
    empty = [group for group in groups if not counts[group][1]]
    if empty:
        raise PlanError(
            f"No validation item measures {empty[0]}. Use more items, a larger validation share, "
            f"or other tasks."
        )
    shares = {group: right / n for group, (right, n) in counts.items() if n}
    variance = sum(shares[g] * (1 - shares[g]) / counts[g][1] for g in groups)
    return Measured(
        value=100 * sum(shares[group] for group in groups) / len(groups),
        error=100 * math.sqrt(variance) / len(groups),
        items=sum(n for _, n in counts.values()),
        facts={
            "scores": {group: 100 * share for group, share in shares.items()},
            "n": {group: n for group, (_, n) in counts.items() if n},
        },
    )
