"""Summarize searches and replays as tables of numbers, which figures and CSV files show.

In: evaluations of a study, or replays. Out: plain rows. Nothing is run.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ipmerge_core.errors import RunError
from ipmerge_core.search.optimizers import OPTIMIZERS
from ipmerge_core.search.regret import mean_curve, regret_over_random, sum_regret
from ipmerge_core.search.study import COMPLETE, Evaluation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ipmerge_core.search.replay import Replay, Table

_FEWEST_FOR_IMPORTANCE = 10
WEIGHTS = ("mllm_weight", "math_weight")  # whose sum is compared with one


class Standing(NamedTuple):
    """How an optimizer did on one table: mean final regret over seeds, and relative to random."""

    method: str
    task: str
    domain: str
    optimizer: str
    seeds: int
    regret: float
    error: float  # standard error of the mean
    over_random: float | None
    test_regret: float | None


def standings(replays: Sequence[Replay]) -> list[Standing]:
    """Summarize replays per table and optimizer, in the order in which they ran."""
    runs = _grouped(replays)
    found = []
    for (label, name), own in runs.items():
        random = runs.get((label, "random"))
        final = [each.final for each in own]
        found.append(
            Standing(
                *label,
                name,
                len(own),
                float(np.mean(final)),
                float(np.std(final, ddof=1)) / math.sqrt(len(own)) if len(own) > 1 else 0.0,
                regret_over_random(final, [r.final for r in random]) if random else None,
                _mean_of([float(each.test[-1]) for each in own if each.test is not None]),
            )
        )
    return found


def _grouped(replays: Sequence[Replay]) -> dict[tuple[tuple[str, str, str], str], list[Replay]]:
    runs: dict[tuple[tuple[str, str, str], str], list[Replay]] = defaultdict(list)
    for replay in replays:
        table = replay.table
        runs[(table.method, table.task, table.domain), replay.optimizer].append(replay)
    return runs


def _mean_of(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


class Ranking(NamedTuple):
    """One optimizer over all tables: mean regret, and the median of its ratios to random."""

    optimizer: str
    regret: float
    over_random: float | None
    tables: int


def ranking(found: Sequence[Standing]) -> list[Ranking]:
    """Rank optimizers by their mean regret over tables, the best first."""
    own: dict[str, list[Standing]] = defaultdict(list)
    for each in found:
        own[each.optimizer].append(each)
    ranked = []
    for name, rows in own.items():
        ratios = [row.over_random for row in rows if row.over_random is not None]
        median = float(np.median(ratios)) if ratios else None
        ranked.append(Ranking(name, float(np.mean([r.regret for r in rows])), median, len(rows)))
    return sorted(ranked, key=lambda each: each.regret)


class Curve(NamedTuple):
    """The mean regret of an optimizer after each evaluation, over tables and seeds."""

    optimizer: str
    regret: NDArray[np.float64]
    test: NDArray[np.float64] | None


def curves(replays: Sequence[Replay]) -> list[Curve]:
    """Average the regret of every optimizer on tables of equal budget; runs end when they end.

    A run that visited all points of a grid keeps its last regret.
    """
    found = []
    longest = max((len(each.regret) for each in replays), default=0)
    for name in OPTIMIZERS:
        own = [each for each in replays if each.optimizer == name]
        if not own:
            continue
        tests = [_extended(each.test, longest) for each in own if each.test is not None]
        found.append(
            Curve(
                name,
                mean_curve([_extended(each.regret, longest) for each in own]),
                mean_curve(tests) if tests else None,
            )
        )
    return found


def _extended(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    return np.pad(values, (0, length - len(values)), mode="edge")


class TableFacts(NamedTuple):
    """What is known of one table: its best point, surrogate errors, and the price of sum one."""

    method: str
    task: str
    points: int
    best: float
    at: dict[str, float]
    surrogate_best: float
    loo: float | None
    loo_of_draws: float | None
    sum_one: float | None  # relative regret in percent of weights that sum to one
    sum_near: float | None  # ... within one step of the grid


def table_facts(table: Table) -> TableFacts:
    """Return the facts of a table."""
    surrogate = table.scores
    best = int(np.argmax(surrogate.values))
    errors: tuple[float | None, float | None] = (None, None)
    with contextlib.suppress(RunError):  # no point is inside the others
        loo = surrogate.leave_one_out()
        errors = (loo.rmse, loo.rmse_of_draws)
    one, near = _sum_regrets(table)
    return TableFacts(
        table.method,
        table.task,
        len(surrogate.values),
        float(surrogate.values[best]),
        table.space.at(surrogate.points[best]),
        surrogate.extremes.highest,
        *errors,
        one,
        near,
    )


def _sum_regrets(table: Table) -> tuple[float | None, float | None]:
    if not set(WEIGHTS) <= set(table.space.names) or table.scores.values.max() <= 0:
        return None, None
    parameters = [table.space.at(point) for point in table.scores.points]
    sums = [sum(each[name] for name in WEIGHTS) for each in parameters]
    values = {axis.name: axis.values for axis in table.space.axes}["math_weight"]
    step = min(np.diff(values)) if len(values) > 1 else 0.0
    found = [sum_regret(sums, table.scores.values, delta) for delta in (0.0, float(step))]
    one, near = (each.regret if each else None for each in found)
    return one, near


# --- studies ---


def best_of(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """Return the best evaluation that was not given up early; the first of equal ones."""
    complete = [each for each in evaluations if each.state == COMPLETE]
    return max(complete, key=lambda each: each.value or 0.0, default=None)


def pareto_front(evaluations: Iterable[Evaluation], objectives: Sequence[str]) -> list[Evaluation]:
    """Return the evaluations that no other one beats in all objectives, by the first descending.

    Scores are the fact "scores" of an evaluation; those given up early are left out, and of equal
    ones all but the first.
    """
    points: dict[tuple[float, ...], Evaluation] = {}
    for each in evaluations:
        if each.state == COMPLETE and "scores" in each.facts:
            points.setdefault(tuple(each.facts["scores"][name] for name in objectives), each)
    front = [e for point, e in points.items() if not any(_beats(other, point) for other in points)]
    return sorted(front, key=lambda each: -float(each.facts["scores"][objectives[0]]))


def _beats(first: Sequence[float], second: Sequence[float]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def importances(study: Any) -> dict[str, float]:  # noqa: ANN401 (an optuna study)
    """Return the share of the value's variance that each parameter explains (fANOVA).

    Source: `optuna.importance`; empty for fewer than 10 evaluations or equal values.
    """
    import optuna

    values = {trial.value for trial in study.get_trials(deepcopy=False) if trial.value is not None}
    if len(values) < 2 or len(study.best_trials) < 1:
        return {}
    complete = [t for t in study.get_trials(deepcopy=False) if t.value is not None]
    if len(complete) < _FEWEST_FOR_IMPORTANCE:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV with the columns of all of them; spreadsheets run no text as a formula."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: object) -> object:
    text = isinstance(value, str) and value[:1] in "=+-@\t\r"
    return f"'{value}" if text and value else value
