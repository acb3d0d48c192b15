"""Compare optimizers on tables of past results, on a surrogate in place of merges.

In: a CSV table of results, one row per evaluated plan. Out: the regret of every optimizer and seed
after each evaluation, on the scores that are optimised and, where the table has them, on held-out
scores. No model is run.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.input_files import MEGABYTE, FileKind
from ipmerge_core.search.optimizers import OPTIMIZERS, find_optimizer
from ipmerge_core.search.regret import normalized_regret
from ipmerge_core.search.space import Axis, SearchSpace
from ipmerge_core.search.storage import memory_study, quiet
from ipmerge_core.search.study import Budget, Measured, Trials, run
from ipmerge_core.search.surrogate import Surrogate

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

TABLE = FileKind(
    "a table of results",
    "Write a CSV file with one column per parameter, a column `score`, and optionally the columns "
    "method, task, domain and test.",
    RunError,
    largest=16 * MEGABYTE,
)
SCORE, TEST = "score", "test"
LABELS = ("method", "task", "domain")
MOST_ROWS = 20_000
MOST_TABLES = 200
SEEDS = 10
EVALUATIONS = {1: 20, 2: 40}  # by dimension; 60 for more, as the cross-modal study
_MORE = 60


@dataclass(frozen=True)
class Table:
    """Past results of one method on one task: points of a grid and their scores.

    `scores` are optimised; `test` are those of the same plans on held-out items, if known.
    """

    method: str
    task: str
    domain: str
    space: SearchSpace
    scores: Surrogate
    test: Surrogate | None = None

    @property
    def label(self) -> str:
        """The method and the task."""
        return " · ".join(part for part in (self.method, self.task) if part) or "results"

    @property
    def budget(self) -> int:
        """The number of evaluations in the cross-modal study: 40 in two dimensions, 60 in three."""
        return EVALUATIONS.get(self.space.dimension, _MORE)


@dataclass(frozen=True)
class Replay:
    """The course of one optimizer with one seed on one table: regret after each evaluation.

    `test` is the regret on held-out scores of the plan that is best so far on the optimised ones.
    """

    table: Table
    optimizer: str
    seed: int
    regret: NDArray[np.float64]
    test: NDArray[np.float64] | None = field(default=None)

    @property
    def final(self) -> float:
        """The regret at the end."""
        return float(self.regret[-1])


class ReplayStep(NamedTuple):
    """One finished replay, and how many of all there are."""

    replay: Replay
    done: int
    total: int


def read_tables(path: str | Path) -> list[Table]:
    """Read the tables of a CSV file, one per method, task and domain.

    Raises: RunError if a column is missing, a value is not a number, or a table has too few points.
    """
    text = bytes(TABLE.read(path)).decode("utf-8-sig", errors="replace")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    names = [name for name in rows.fieldnames or () if name]
    if SCORE not in names:
        raise RunError(
            f"'{path}' has the columns {', '.join(names[:20]) or 'none'}; expected one named "
            f"'{SCORE}'. {TABLE.remedy}"
        )
    parameters = [name for name in names if name not in (SCORE, TEST, *LABELS)]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for number, row in enumerate(rows, 2):
        if number > MOST_ROWS:
            raise RunError(f"'{path}' has more than {MOST_ROWS} rows. Split it.")
        label = tuple((row.get(name) or "").strip()[:200] for name in LABELS)
        groups.setdefault(label, []).append({"": str(number), **row})
    if not groups or not parameters:
        raise RunError(f"'{path}' has no rows, or no column of a parameter. {TABLE.remedy}")
    if len(groups) > MOST_TABLES:
        raise RunError(f"'{path}' has {len(groups)} tables; the maximum is {MOST_TABLES}.")
    return [_table(path, label, found, parameters) for label, found in groups.items()]


def _table(
    path: str | Path, label: tuple[str, ...], rows: list[dict[str, str]], names: Sequence[str]
) -> Table:
    used = [name for name in names if any((row.get(name) or "").strip() for row in rows)]
    columns = {name: [_number(path, row, name) for row in rows] for name in used}
    axes = []
    for name, column in columns.items():
        distinct = sorted(set(column))
        if len(distinct) > 1:
            axes.append(Axis(name, distinct[0], distinct[-1], tuple(distinct)))
    if not axes:
        raise RunError(f"All rows of '{label[0]}' in '{path}' have the same parameters.")
    points = np.array([[axis.share_of(value) for value in columns[axis.name]] for axis in axes]).T
    scores, test = (
        Surrogate(*_averaged(points, [_number(path, row, name) for row in rows]))
        if all((row.get(name) or "").strip() for row in rows) or name == SCORE
        else None
        for name in (SCORE, TEST)
    )
    assert scores is not None
    space = SearchSpace(tuple(axes))
    method, task, domain = label
    return Table(method, task, domain, space, scores, test)


def _number(path: str | Path, row: Mapping[str, str], name: str) -> float:
    text = (row.get(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or abs(value) > 1e12:
        raise RunError(
            f"Row {row['']} of '{path}' has {name} = {text[:40]!r}; expected a finite number."
        )
    return value


def _averaged(
    points: NDArray[np.float64], values: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average the values of equal points, such as those of several seeds."""
    unique, index = np.unique(points.round(9), axis=0, return_inverse=True)
    index = index.reshape(-1)
    sums = np.bincount(index, weights=np.asarray(values, dtype=float))
    return unique, sums / np.bincount(index)


def iter_replays(
    tables: Sequence[Table],
    optimizers: Sequence[str] = tuple(OPTIMIZERS),
    seeds: int = SEEDS,
    budget: int | None = None,
    stop: threading.Event | None = None,
) -> Iterator[ReplayStep]:
    """Run every optimizer on every table with several seeds, yielding after each run.

    Args:
        tables: past results.
        optimizers: names of `OPTIMIZERS`.
        seeds: number of seeds, 0, 1, ...
        budget: evaluations per run; None for those of the cross-modal study.
        stop: ends the comparison at the next evaluation.

    Raises: PlanError for an unknown optimizer, RunError for a number that is not valid,
        RunCancelled if it was stopped.
    """
    chosen = [find_optimizer(name) for name in optimizers]
    if not 1 <= seeds <= 1000:
        raise RunError(f"The number of seeds is {seeds}; expected 1 to 1000.")
    total, done = len(tables) * len(chosen) * seeds, 0
    for table in tables:
        for optimizer in chosen:
            for seed in range(seeds):
                how = Budget(table.budget if budget is None else budget)
                points: list[NDArray[np.float64]] = []
                trials = Trials(
                    memory_study(),
                    table.space,
                    partial(_look_up, table, points),
                    how,
                    repeats=True,
                    stop=stop or threading.Event(),
                )
                with quiet():
                    run(optimizer, trials, seed)
                done += 1
                found = _replay(table, optimizer.name, seed, trials.trace, points)
                yield ReplayStep(found, done, total)


def _look_up(
    table: Table,
    points: list[NDArray[np.float64]],
    parameters: Mapping[str, float],
    _report: Callable[[float, int], bool],
) -> Measured:
    points.append(table.space.point_of(parameters))
    return Measured(table.scores(points[-1]))


def _replay(
    table: Table,
    optimizer: str,
    seed: int,
    trace: Sequence[float],
    points: Sequence[NDArray[np.float64]],
) -> Replay:
    extremes = table.scores.extremes
    regret = normalized_regret(trace, extremes.highest, extremes.lowest)
    if table.test is None:
        return Replay(table, optimizer, seed, regret)
    best = np.maximum.accumulate(trace)
    leader = [int(np.argmax(np.asarray(trace[: t + 1]) == best[t])) for t in range(len(trace))]
    values = table.test.at(np.array(points))[leader]
    ends = table.test.extremes
    spread = max(ends.highest - ends.lowest, 1e-300)
    return Replay(table, optimizer, seed, regret, np.clip((ends.highest - values) / spread, 0, 1))
