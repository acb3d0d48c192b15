"""One study: its points and values in an Optuna storage, and the loop that fills it.

In: a search space, an optimizer, an objective and a budget. Out: evaluations, each stored when its
value is known. A point is evaluated once: a search that is run again after a kill, or by several
workers on one storage, uses the values that are known. A point whose evaluation fails is stored
with its reason, and the search goes on. Points and values are numbers and text, never pickles.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ipmerge_core.errors import IPMergeError, RunCancelled, RunError
from ipmerge_core.search.optimizers import (
    GP_BO,
    GRID,
    Optimizer,
    latin_points,
    run_starts,
    startup_size,
)
from ipmerge_core.search.proposals import Proposals
from ipmerge_core.search.space import SearchSpace, key_of

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

    from ipmerge_core.search.space import Point

WORST = -1e6  # what an optimizer is given for a point that failed before any other had a value
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
STOPPED = "The search was stopped; its evaluations are kept."
_LONGEST_SEQUENCE = 100_000  # points of a sequence that are drawn when all before them are known


class Measured(NamedTuple):
    """The result of one point: the value to maximise, its standard error, and other numbers.

    `facts` has what reports show: the scores of all objectives, seconds, whether it was given up.
    """

    value: float
    error: float = 0.0
    items: int = 1
    facts: Mapping[str, Any] = {}


class Objective(Protocol):
    """Measures the parameters of one point.

    `report` is called with every intermediate mean and the effort it took, in units of the first;
    when it returns true, the point is given up, and the result has the fact "pruned". Raises:
    IPMergeError if the point cannot be measured.
    """

    def __call__(
        self, parameters: Mapping[str, float], report: Callable[[float, int], bool]
    ) -> Measured:
        """Return the result at the parameters."""
        ...


class Evaluation(NamedTuple):
    """One point of a study. `state` is complete, pruned (given up early) or failed."""

    number: int
    parameters: dict[str, float]
    state: str
    value: float | None
    error: float
    items: int
    facts: dict[str, Any]
    reason: str = ""


@dataclass(frozen=True)
class Budget:
    """When a search ends: after a number of evaluations, of items, or of minutes of this run."""

    evaluations: int | None = 40
    items: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        """Check the limits. Raises: RunError."""
        for name, low in (("evaluations", 1), ("items", 1), ("minutes", 1e-3)):
            value = getattr(self, name)
            if value is not None and not low <= value <= 1e9:
                raise RunError(
                    f"The budget is {value:g} {name}; expected a number of at least {low:g}."
                )
        if self.evaluations is None and self.items is None and self.minutes is None:
            raise RunError("The search has no budget. Give evaluations, items or minutes.")

    def is_spent(self, evaluations: int, items: int, seconds: float) -> bool:
        """Whether one of the limits is reached."""
        return (
            (self.evaluations is not None and evaluations >= self.evaluations)
            or (self.items is not None and items >= self.items)
            or (self.minutes is not None and seconds >= 60 * self.minutes)
        )


class SpentError(Exception):
    """The budget of a search is spent; raised inside an optimizer to end it."""


class TakenError(Exception):
    """Another worker began with the same point at the same time."""


@dataclass
class Trials:
    """Evaluates points of a study within a budget.

    With `repeats` every request is an evaluation, known or not: on a surrogate, whose values cost
    nothing, so that optimizers are compared by equal numbers of requests.
    """

    study: Study
    space: SearchSpace
    objective: Objective
    budget: Budget
    worker: int = 0
    repeats: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    notify: Callable[[Evaluation], object] = lambda _: None
    trace: list[float] = field(default_factory=list)  # values in the order of evaluation

    def __post_init__(self) -> None:
        """Start the clock and free the points that an earlier run of this worker left."""
        self._started = time.monotonic()
        self._known: dict[tuple[float, ...], float] = {}
        self._taken: set[tuple[float, ...]] = set()
        self._done = self._items = 0
        self.proposals = Proposals(self.space)
        self.study.sampler = self.proposals
        if not self.repeats:
            _free_points(self.study, self.space, self.worker)
        self._read()

    @property
    def done(self) -> int:
        """How many evaluations the study has."""
        return len(self.trace) if self.repeats else self._done

    def _read(self) -> None:
        """Read the evaluations of all workers."""
        if self.repeats:
            return
        self._known.clear()
        found = evaluations_of(self.study)
        for each in found:
            self._known[self._key(each.parameters)] = self._optimised(each)
        self._done, self._items = len(found), sum(each.items for each in found)
        self._taken = {self._key(trial.params) for trial in _running(self.study, self.space)}

    def _key(self, parameters: Mapping[str, float]) -> tuple[float, ...]:
        return key_of(self.space.point_of(parameters))

    def _optimised(self, evaluation: Evaluation) -> float:
        """Return the value that optimizers are given: for a failed point the lowest so far."""
        if evaluation.value is not None:
            return evaluation.value
        return min(self._known.values(), default=WORST)

    def is_new(self, point: Point) -> bool:
        """Whether a point is neither known nor being evaluated by another worker."""
        key = self._key(self.space.at(point))
        return key not in self._known and key not in self._taken

    def value_at(self, point: Point) -> float:
        """Return the value of a point, evaluating it if it is not known.

        Raises: SpentError if the budget is spent, RunCancelled if the search was stopped.
        """
        key = self._key(self.space.at(point))
        if key in self._known and not self.repeats:
            return self._known[key]
        return self._evaluated(point)

    def claim(self, point: Point | None) -> None:
        """Evaluate a point that any worker may take; None for the one that gp-bo's model proposes.

        Raises: SpentError if the budget is spent, TakenError if another worker is evaluating it,
        RunCancelled if the search was stopped.
        """
        self._evaluated(point, is_shared=True)

    def _evaluated(self, point: Point | None, *, is_shared: bool = False) -> float:
        self._check_budget()
        trial = self.proposals.ask(self.study, point, self.is_new)
        trial.set_user_attr("worker", self.worker)
        if is_shared and not self.repeats:
            self._refuse_taken(trial)
        found = self._measured(trial)
        value = self._optimised(found)
        self.trace.append(value)
        self.notify(found)
        self._read()
        return value

    def _refuse_taken(self, trial: Trial) -> None:
        """Leave a point to the worker that began with it first. Raises: TakenError."""
        from optuna.trial import TrialState

        key = self._key(trial.params)
        others = (each for each in _running(self.study, self.space) if each.number < trial.number)
        if any(self._key(each.params) == key for each in others):
            self.study.tell(trial, state=TrialState.FAIL)
            self._taken.add(key)
            raise TakenError

    def _check_budget(self) -> None:
        if self.stop.is_set():
            raise RunCancelled(STOPPED)
        running = 0 if self.repeats else len(self._taken)
        seconds = time.monotonic() - self._started
        if self.budget.is_spent(self.done + running, self._items, seconds):
            raise SpentError

    def _measured(self, trial: Trial) -> Evaluation:
        from optuna.trial import TrialState

        def report(value: float, effort: int) -> bool:
            if self.stop.is_set():
                raise RunCancelled(STOPPED)
            trial.report(value, effort)
            return bool(trial.should_prune())

        try:
            found = self.objective(trial.params, report)
        except IPMergeError as error:
            stopped = isinstance(error, RunCancelled)
            trial.set_user_attr("reason", "" if stopped else str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            if stopped:
                raise
            return Evaluation(trial.number, trial.params, FAILED, None, 0.0, 0, {}, str(error))
        facts = {**found.facts, "error": found.error, "items": found.items}
        trial.set_user_attr("facts", facts)
        self.study.tell(trial, found.value)
        return _evaluation(trial.number, trial.params, found.value, facts)


def run(optimizer: Optimizer, trials: Trials, seed: int) -> None:
    """Run an optimizer until the budget of `trials` is spent, or it has visited every point.

    Raises: RunCancelled if it was stopped.
    """
    dimension = trials.space.dimension
    try:
        if optimizer.start is not None:
            start_seed = (seed, trials.worker)
            run_starts(optimizer.start, trials.value_at, dimension, start_seed, lambda: trials.done)
            return
        for point in _sequence(optimizer, trials, seed):
            if trials.repeats or trials.is_new(point):
                with contextlib.suppress(TakenError):
                    trials.claim(point)
        if optimizer.name == GP_BO:
            trials.proposals.use_model(seed, trials.worker)
            while True:
                with contextlib.suppress(TakenError):
                    trials.claim(None)
    except SpentError:
        return


def _sequence(optimizer: Optimizer, trials: Trials, seed: int) -> Iterator[Point]:
    """Yield points that do not depend on values, equal for all workers."""
    import numpy as np

    space = trials.space
    if optimizer.name == GRID:
        yield from np.random.default_rng(seed).permutation(space.grid())
    elif optimizer.name == GP_BO:
        yield from latin_points(startup_size(space.dimension), space.dimension, seed)
    elif optimizer.sequence is not None:
        count, drawn = 64, 0
        while drawn < _LONGEST_SEQUENCE:
            yield from optimizer.sequence(count, space.dimension, seed)[drawn:]
            drawn, count = count, 2 * count


def evaluations_of(study: Study) -> list[Evaluation]:
    """Return the evaluations of a study in the order in which they ended."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.FAIL)
    trials = study.get_trials(deepcopy=False, states=states)
    ended = sorted(trials, key=lambda trial: (trial.datetime_complete, trial.number))
    return [found for trial in ended if (found := _of_trial(trial)) is not None]


def _of_trial(trial: FrozenTrial) -> Evaluation | None:
    """Return the evaluation of a trial that ended; None for one that was interrupted."""
    if trial.value is not None:
        return _evaluation(trial.number, trial.params, trial.value, trial.user_attrs["facts"])
    reason = trial.user_attrs.get("reason")
    if not reason:
        return None
    return Evaluation(trial.number, trial.params, FAILED, None, 0.0, 0, {}, reason)


def _evaluation(
    number: int, parameters: dict[str, float], value: float, facts: Mapping[str, Any]
) -> Evaluation:
    rest = {name: fact for name, fact in facts.items() if name not in ("error", "items")}
    state = PRUNED if facts.get("pruned") else COMPLETE
    return Evaluation(number, parameters, state, value, facts["error"], facts["items"], rest)


def _running(study: Study, space: SearchSpace) -> list[FrozenTrial]:
    """Return the trials in progress whose parameters are all written."""
    from optuna.trial import TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if set(space.names) <= trial.params.keys()]


def _free_points(study: Study, space: SearchSpace, worker: int) -> None:
    """End the trials that an earlier run of a worker left, so that their points are free."""
    from optuna.trial import TrialState

    for trial in _running(study, space):
        if trial.user_attrs.get("worker") == worker:
            study.tell(trial.number, state=TrialState.FAIL)
