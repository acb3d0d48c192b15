"""Measures of a search: regret, regret over random, and the price of weights that sum to one.

In: traces of values in the order of evaluation, or a table of results on a grid. Higher is better
everywhere. No optimizer and no model is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ipmerge_core.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

TOLERANCE = 1e-9  # of |s - 1| <= delta, so that 0.8 + 0.4 is within 0.2 of 1
_NO_REGRET = 1e-9  # mean regret of random below which a ratio to it means nothing


def normalized_regret(trace: ArrayLike, highest: float, lowest: float) -> NDArray[np.float64]:
    """Compute the regret of the best value so far after every evaluation, in [0, 1].

    Math:   r_T = (f_max - max_{t <= T} f_t) / (f_max - f_min); 0 if f_max = f_min. f_max and f_min
            are the global extremes of the objective that was optimised.

    >>> normalized_regret([1.0, 3.0, 2.0], highest=5.0, lowest=1.0).tolist()
    [1.0, 0.5, 0.5]
    """
    best = np.maximum.accumulate(np.asarray(trace, dtype=float))
    if highest <= lowest:
        return np.zeros_like(best)
    return np.clip((highest - best) / (highest - lowest), 0.0, 1.0)


def regret_over_random(regrets: ArrayLike, of_random: ArrayLike) -> float | None:
    """Compute the ratio of mean final regrets over seeds; None if random has none.

    The mean of ratios per seed would be dominated by seeds in which random is lucky.

    >>> regret_over_random([0.1, 0.3], [0.4, 0.4])
    0.5
    """
    mean = float(np.mean(np.asarray(of_random, dtype=float)))
    return None if mean < _NO_REGRET else float(np.mean(np.asarray(regrets, dtype=float))) / mean


class SumRegret(NamedTuple):
    """What it costs to require weights that sum to about one; `regret` is in percent."""

    delta: float
    points: int
    best: float
    regret: float


def sum_regret(sums: ArrayLike, values: ArrayLike, delta: float) -> SumRegret | None:
    """Compare the best point with the best whose weights sum to one; None if no point does.

    Math:   100 (f* - f*_delta) / f*, f*_delta over points with |s - 1| <= delta + 1e-9.
    Raises: RunError unless the best value is positive, which a ratio of scores needs.
    """
    sums, values = np.ravel(sums).astype(float), np.ravel(values).astype(float)
    best = float(values.max())
    if best <= 0:
        raise RunError(f"The best value is {best:g}; relative regret needs positive scores.")
    near = np.abs(sums - 1) <= delta + TOLERANCE
    if not near.any():
        return None
    found = float(values[near].max())
    return SumRegret(delta, int(near.sum()), found, 100 * (best - found) / best)


def expected_random_regret(values: ArrayLike, budget: int, highest: float, lowest: float) -> float:
    """Compute the expected regret of `budget` uniform picks from a table, with replacement.

    Math:   with sorted values f_1 <= .. <= f_n, E max = sum_i f_i ((i/n)^T - ((i-1)/n)^T).
    """
    ordered = np.sort(np.ravel(values).astype(float))
    share = (np.arange(len(ordered) + 1) / len(ordered)) ** budget
    return float(normalized_regret([float(ordered @ np.diff(share))], highest, lowest)[0])


def mean_curve(traces: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Average curves of equal length over seeds."""
    mean: NDArray[np.float64] = np.mean(np.asarray(traces, dtype=float), axis=0)
    return mean
