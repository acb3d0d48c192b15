"""The optimizers: each proposes points of the unit cube and receives their values.

In: an `evaluate` function, which raises when the budget is spent, the dimension, and a random
generator. All maximise. An optimizer that converges starts again from a new uniform point until the
budget is spent (`run_starts`), so that all of them get the same number of evaluations.

Optuna's samplers are used where they add something (the Gaussian process of gp-bo), and SciPy's
Sobol sequence, Latin hypercube and Powell method. CMA-ES is the `cmaes` package directly: Optuna's
sampler stores its state as a pickle in the study, which another machine would execute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from ipmerge_core.errors import PlanError

if TYPE_CHECKING:
    from ipmerge_core.search.space import Point

    Evaluate: TypeAlias = Callable[[Point], float]
    Start: TypeAlias = Callable[[Evaluate, int, np.random.Generator], None]

PATTERN_STEP, PATTERN_END = 0.25, 1 / 32
POWELL_XTOL, POWELL_FTOL = 1e-2, 1e-3
CMA_SIGMA, CMA_TOLX, CMA_TOLFUN = 0.3, 1e-3, 1e-4
_SPENT_STARTS = 1000  # starts without a new evaluation: the whole space is known


class Optimizer(NamedTuple):
    """An optimizer and its settings as printed in reports.

    Exactly one of `sequence` and `start` proposes points, or neither for gp-bo, whose proposals
    depend on all results of a study (`study.Trials.propose`).
    """

    name: str
    label: str
    settings: str
    sequence: Callable[[int, int, int], Point] | None = None
    start: Start | None = None


def random_points(count: int, dimension: int, seed: int) -> Point:
    """Return independent uniform points, shape (count, dimension).

    More points of the same seed start with these.
    """
    return np.random.default_rng(seed).random((count, dimension))


def sobol_points(count: int, dimension: int, seed: int) -> Point:
    """Return the first points of a scrambled Sobol sequence, shape (count, dimension).

    Source: `scipy.stats.qmc.Sobol`; its balance holds for the whole power of two that is drawn.
    """
    from scipy.stats import qmc

    points: Point = qmc.Sobol(dimension, seed=np.random.default_rng(seed)).random_base2(
        max(1, math.ceil(math.log2(max(count, 1))))
    )
    return points[:count]


def latin_points(count: int, dimension: int, seed: int) -> Point:
    """Return a Latin hypercube sample, shape (count, dimension): the first points of gp-bo."""
    from scipy.stats import qmc

    points: Point = qmc.LatinHypercube(dimension, seed=np.random.default_rng(seed)).random(count)
    return points


def pattern_search(evaluate: Evaluate, start: Point) -> tuple[Point, float]:
    """Climb by compass search: poll +-e_j, take the first improvement, halve the step on failure.

    Math:   polls x + h e_1, x - h e_1, x + h e_2, ... clipped to the cube, beginning again at
            +e_1 after an improvement; h starts at 1/4 and ends below 1/32.
    Returns: the best point and its value.

    >>> best, _ = pattern_search(lambda p: 1 - (p[0] - 0.7)**2 - 2 * (p[1] - 0.3)**2,
    ...                          np.array([0.5, 0.5]))
    >>> best.tolist()
    [0.6875, 0.3125]
    """
    best, value, step = start, evaluate(start), PATTERN_STEP
    while step >= PATTERN_END:
        for polled in _polls(best, step):
            found = evaluate(polled)
            if found > value:
                best, value = polled, found
                break
        else:
            step /= 2
    return best, value


def _polls(point: Point, step: float) -> Iterator[Point]:
    for axis, sign in itertools.product(range(len(point)), (1, -1)):
        polled = point.copy()
        polled[axis] = min(max(polled[axis] + sign * step, 0.0), 1.0)
        if polled[axis] != point[axis]:
            yield polled


def _pattern(evaluate: Evaluate, dimension: int, rng: np.random.Generator) -> None:
    pattern_search(evaluate, rng.random(dimension))


def _powell(evaluate: Evaluate, dimension: int, rng: np.random.Generator) -> None:
    from scipy.optimize import minimize

    minimize(
        lambda point: -evaluate(np.clip(point, 0.0, 1.0)),
        rng.random(dimension),
        method="Powell",
        bounds=[(0.0, 1.0)] * dimension,
        options={"xtol": POWELL_XTOL, "ftol": POWELL_FTOL},
    )


def _cma(evaluate: Evaluate, dimension: int, rng: np.random.Generator) -> None:
    from cmaes import CMA

    population = population_size(dimension)
    search = CMA(
        mean=rng.random(dimension),
        sigma=CMA_SIGMA,
        bounds=np.array([[0.0, 1.0]] * dimension),
        population_size=population,
        seed=int(rng.integers(2**31)),
    )
    while True:
        points = [search.ask() for _ in range(population)]
        told = [(point, -evaluate(point)) for point in points]
        search.tell(told)
        values = [value for _, value in told]
        near = float(np.std(points, axis=0).max()) < CMA_TOLX
        if near or max(values) - min(values) < CMA_TOLFUN or search.should_stop():
            return


def population_size(dimension: int) -> int:
    """Return the population of CMA-ES: 4 + floor(3 ln d).

    >>> population_size(2), population_size(3)
    (6, 7)
    """
    return 4 + math.floor(3 * math.log(dimension))


def startup_size(dimension: int) -> int:
    """Return how many points gp-bo evaluates before its first model: 2 d + 1."""
    return 2 * dimension + 1


def run_starts(
    start: Start,
    evaluate: Evaluate,
    dimension: int,
    seed: tuple[int, ...],
    news: Callable[[], int],
) -> None:
    """Run a local method from uniform points until `evaluate` raises.

    Start k of one seed is always the same, so that a search that is run again visits the points
    that it knows. `news` counts new evaluations: if many starts in a row bring none, the method
    only visits known points, and the search ends.
    """
    before, idle = news(), 0
    for number in itertools.count():
        start(evaluate, dimension, np.random.default_rng([*seed, number]))
        idle = 0 if news() > before else idle + 1
        before = news()
        if idle >= _SPENT_STARTS:
            return


GRID, GP_BO = "grid", "gp-bo"
OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer(GRID, "Grid", "all combinations of the listed values, in shuffled order"),
        Optimizer("random", "Random", "uniform, independent", sequence=random_points),
        Optimizer(
            "sobol",
            "Sobol",
            "scipy.stats.qmc.Sobol, scrambled; the first T of a power of two; no restart",
            sequence=sobol_points,
        ),
        Optimizer(
            "cma-es",
            "CMA-ES",
            f"cmaes.CMA: uniform mean, sigma {CMA_SIGMA}, population 4 + floor(3 ln d), bounds by "
            f"resampling; restart when a generation spans < {CMA_TOLX:g} or its values "
            f"< {CMA_TOLFUN:g}",
            start=_cma,
        ),
        Optimizer(
            GP_BO,
            "GP-BO",
            "2 d + 1 points of a Latin hypercube, then optuna.samplers.GPSampler: Matern-5/2 with "
            "one length scale per axis, noise, maximum a posteriori, log expected improvement; a "
            "known point is replaced by a uniform one",
        ),
        Optimizer(
            "pattern",
            "Pattern search",
            f"compass search, step {PATTERN_STEP}, first improvement, halved below 1/32, restarted",
            start=_pattern,
        ),
        Optimizer(
            "powell",
            "Powell",
            f"scipy.optimize.minimize(method='Powell'), xtol {POWELL_XTOL:g}, ftol "
            f"{POWELL_FTOL:g}, restarted",
            start=_powell,
        ),
    )
}


def find_optimizer(name: str) -> Optimizer:
    """Return an optimizer by name. Raises: PlanError for an unknown one."""
    if name not in OPTIMIZERS:
        raise PlanError(f"Unknown optimizer '{name[:80]}'. Available: {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]
