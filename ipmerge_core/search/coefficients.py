"""Search the coefficients of a merge method for a pair; every evaluation is a real merge.

In: the analysis of a pair, a method, tasks and settings. Out: a step per evaluation, and a
`SearchResult`: all evaluations, the best plan, its scores on items that the search has not seen,
and the Pareto front of skill against perception. Evaluations are stored as they end, so that a
search that is run again, or by several workers, continues from them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.analysis.records import Analysis, Sources
from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.points import UNMERGED, Point
from ipmerge_core.evaluation.report import Report
from ipmerge_core.evaluation.result_files import ResultFile
from ipmerge_core.methods import find_method
from ipmerge_core.planning.description import arguments_of
from ipmerge_core.planning.options import PlanOptions
from ipmerge_core.runtime.pipeline import with_reports
from ipmerge_core.search.consistency import FEWEST, AnswerPath, check_path, path_of, path_order
from ipmerge_core.search.objective import FULL, RUNGS, VALIDATION, MergeObjective
from ipmerge_core.search.optimizers import GP_BO, GRID, find_optimizer
from ipmerge_core.search.space import Axis, SearchSpace, space_of
from ipmerge_core.search.storage import claim_worker, open_study, quiet
from ipmerge_core.search.study import Budget, Evaluation, Trials, evaluations_of, run
from ipmerge_core.search.summary import best_of, importances, pareto_front

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner

    from ipmerge_core.evaluation.evaluate import EvaluationSettings
    from ipmerge_core.evaluation.replies import ReplyStore
    from ipmerge_core.tasks.items import Task

METHOD = "task_arithmetic"
MOST_SHOWN = 3  # plans of the front that are evaluated on unseen items, with the best one


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and how.

    Attributes:
        method: a name of `METHODS`.
        optimizer: a name of `OPTIMIZERS`.
        ranges: texts such as `math_weight=0:1`; none selects the usual space of the method.
        fixed: further arguments of `make_plan`.
        groups: groups of items (math, perception, other) whose mean score is maximised.
        budget: when the search ends.
        seed: of the optimizer.
        validation: share of the items that the search sees.
        racing: give bad points up after a quarter or half of their items (successive halving).
        labels: choose by scores; False chooses on a path of one parameter by the consistency of
            answers, and reports what the scores would have chosen.
    """

    method: str = METHOD
    optimizer: str = GP_BO
    ranges: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ("math", "perception")
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    validation: float = VALIDATION
    racing: bool = False
    labels: bool = True

    @property
    def space(self) -> SearchSpace:
        """The searched space. Raises: PlanError, RunError if it is not valid."""
        space = space_of(find_method(self.method), self.ranges)
        fixed = sorted(set(space.names) & set(self.fixed))
        if fixed:
            raise RunError(
                f"'{fixed[0]}' is searched, and has a fixed value too. Omit one of them."
            )
        if not self.labels:
            self._check_unlabelled(space)
        if self.optimizer == GRID:
            space.grid()
        return space

    def _check_unlabelled(self, space: SearchSpace) -> None:
        """Check that all values of one parameter are evaluated completely. Raises: RunError."""
        check_path(space)
        if self.optimizer != GRID or self.racing:
            what = "racing" if self.racing else f"the optimizer '{self.optimizer}'"
            raise RunError(
                f"A search without labels evaluates all values of its parameter; got {what}. Use "
                f"the optimizer '{GRID}' without racing."
            )
        count, limit = len(space.axes[0].values), self.budget.evaluations
        if limit is not None and limit < count:
            raise RunError(
                f"The path has {count} values, and the budget is {limit} evaluations. Give at "
                f"least {count}, or fewer values."
            )


class SearchStep(NamedTuple):
    """Progress: one more evaluation; `total` is the budget, or what is done if it has no count."""

    evaluation: Evaluation | None
    done: int
    total: int


@dataclass(frozen=True)
class SearchResult(ResultFile):
    """The result of a search.

    `front` and `best` are numbers of evaluations; `report` scores the unmerged model and their
    plans on the items that the search did not see. `arguments` make the best plan again. With
    a `path`, the best plan was chosen without labels.
    """

    FORMAT = "ipmerge-search"

    name: str
    sources: Sources
    method: str
    optimizer: str
    groups: tuple[str, ...]
    axes: tuple[Axis, ...]
    evaluations: tuple[Evaluation, ...]
    best: int | None
    arguments: dict[str, Any]
    front: tuple[int, ...]
    importance: dict[str, float]
    validation: float
    report: Report | None
    path: AnswerPath | None = None

    @property
    def best_evaluation(self) -> Evaluation | None:
        """The best evaluation, if any."""
        return _numbered(self.evaluations, self.best)

    def arguments_at(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return the arguments of `make_plan` at an evaluation; empty if none is complete."""
        if not self.arguments:
            return {}
        whole = {axis.name for axis in self.axes if axis.whole}
        values = {n: int(v) if n in whole else v for n, v in evaluation.parameters.items()}
        return {**self.arguments, **values}


def iter_search(
    analysis: Analysis,
    folder: Path,
    tasks: Sequence[Task],
    how: SearchSettings,
    settings: EvaluationSettings,
    store: ReplyStore | None = None,
    *,
    url: str = "",
    worker: int | None = None,
    force: bool = False,
    stops: Sequence[threading.Event] = (),
) -> Generator[SearchStep, None, SearchResult]:
    """Search the coefficients of a method; yield a step per evaluation.

    Args:
        analysis: the pair.
        folder: where the study is stored; created if it does not exist.
        tasks: the tasks; perception guards are not added here, see `find_tasks`.
        how: what is searched.
        settings: limits, the seed of the items and the device of evaluations.
        store: where replies are stored; by default in the home folder.
        url: a database for workers on several machines, instead of a file in the folder.
        worker: the number of this worker, different for each that runs at the same time; None
            takes a free one of the folder.
        force: merge even if the sibling check refuses the models.
        stops: events that cancel.

    Raises: PlanError for a space that is not valid; RunError for a storage that cannot be used or
        holds another search; RunCancelled if one of the events was set; and as `iter_evaluation`.
    """
    from ipmerge_core.evaluation.answering import Caches
    from ipmerge_core.evaluation.merged_models import MergedModels

    space, optimizer = how.space, find_optimizer(how.optimizer)
    folder.mkdir(parents=True, exist_ok=True)
    definition = _definition(analysis, tasks, how, settings)
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        number, lock = claim_worker(folder, worker)
        stack.callback(lock.release)
        study = open_study(folder, definition, url, _pruner() if how.racing else None)
        models = stack.enter_context(
            MergedModels(analysis.sources, force=force, stops=[*stops, stop])
        )
        objective = MergeObjective(
            analysis,
            space,
            tasks,
            models,
            {"method": how.method, **how.fixed},
            how.groups,
            how.validation,
            RUNGS if how.racing else FULL,
            settings,
            store,
            Caches(),
            [*stops, stop],
        )
        stack.callback(stop.set)

        def search(report: Callable[[SearchStep], None]) -> None:
            def notify(found: Evaluation) -> None:
                try:
                    report(SearchStep(found, trials.done + 1, _total(how, trials.done + 1)))
                except CancelledError:
                    stop.set()

            trials = Trials(study, space, objective, how.budget, number, stop=stop, notify=notify)
            report(SearchStep(None, trials.done, _total(how, trials.done)))
            with quiet():
                run(optimizer, trials, how.seed)

        yield from with_reports(search)
        return _result(study, objective, how, analysis)


def _total(how: SearchSettings, done: int) -> int:
    """Return how many evaluations there will be, as far as that is known."""
    limit = how.budget.evaluations or done
    if how.optimizer == GRID:
        limit = min(limit, len(how.space.grid()))
    return max(done, limit)


def _definition(
    analysis: Analysis, tasks: Sequence[Task], how: SearchSettings, settings: EvaluationSettings
) -> dict[str, Any]:
    """Return what identifies a search: all that its values or its points depend on."""
    sources = analysis.sources
    return {
        "models": [model.fingerprint for model in sources.all()],
        "method": how.method,
        "fixed": {
            name: value.changed() if isinstance(value, PlanOptions) else value
            for name, value in how.fixed.items()
        },
        "space": how.space.to_dict(),
        "optimizer": how.optimizer,
        "seed": how.seed,
        "tasks": [task.name for task in tasks],
        "groups": list(how.groups),
        "validation": how.validation,
        "racing": how.racing,
        "items": {
            "limit": settings.limit,
            "seed": settings.seed,
            "max_new_tokens": settings.max_new_tokens,
        },
    }


def _pruner() -> BasePruner:
    """Return successive halving over the rungs: half of the points end at each."""
    from optuna.pruners import SuccessiveHalvingPruner

    return SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)


def _result(
    study: Study, objective: MergeObjective, how: SearchSettings, analysis: Analysis
) -> SearchResult:
    """Choose the best plan and the front, and score them on the items that were not seen."""
    found = evaluations_of(study)
    path = None if how.labels else _path(objective, how, found)
    best = best_of(found) if how.labels else _numbered(found, path.chosen if path else None)
    several = [g for g in ("math", "perception", "other") if _has_scores(found, g)]
    front = pareto_front(found, several) if len(several) > 1 else []
    report = None
    if best is not None:
        shown = dict.fromkeys([best.number, *(each.number for each in front[:MOST_SHOWN])])
        shown |= {path.by_labels: None} if path else {}
        plans = {e.number: objective.plan_at(e.parameters) for e in found if e.number in shown}
        points = [Point(UNMERGED)]
        points += [Point(f"evaluation {number}", plans[number]) for number in shown]
        report = objective.evaluated(points, how.validation, 1.0)
    return SearchResult(
        name=analysis.name,
        sources=analysis.sources,
        method=how.method,
        optimizer=how.optimizer,
        groups=tuple(how.groups),
        axes=objective.space.axes,
        evaluations=tuple(found),
        best=best.number if best else None,
        arguments=arguments_of(objective.plan_at(best.parameters)) if best else {},
        front=tuple(each.number for each in front),
        importance=importances(study),
        validation=how.validation,
        report=report,
        path=path,
    )


def _path(
    objective: MergeObjective, how: SearchSettings, found: Sequence[Evaluation]
) -> AnswerPath | None:
    """Choose on a path by stored replies; None if too few of its models are evaluated."""
    ordered = path_order(objective.space, found)
    if len(ordered) < FEWEST:
        return None
    plans = [objective.plan_at(each.parameters) for each in ordered]
    points = [Point(plan.hash, plan) for plan in plans]
    report = objective.evaluated(points, 0.0, how.validation)
    return path_of(ordered, [plan.hash for plan in plans], report)


def _numbered(found: Sequence[Evaluation], number: int | None) -> Evaluation | None:
    return next((each for each in found if each.number == number), None)


def _has_scores(found: Sequence[Evaluation], group: str) -> bool:
    return any(group in each.facts.get("scores", {}) for each in found)
