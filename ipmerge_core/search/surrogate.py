"""A radial basis surrogate of a table of results, so that optimizers run without any model.

In: points of the unit cube and their values. Out: a function that passes through all of them, its
extremes, and its leave-one-out error. The interpolation is `scipy.interpolate.RBFInterpolator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ipmerge_core.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ipmerge_core.search.space import Point

KERNEL = "thin_plate_spline"
_DEGREE = 1
_SOBOL_LOG2 = 15  # points on which extremes are sought: 2^15
_POLISHED = 5  # best of them from which a local optimizer starts
DRAWS = 20  # of the leave-one-out error as the cross-modal study reports it


class Extremes(NamedTuple):
    """The highest and the lowest value of a surrogate, and where the highest is."""

    highest: float
    lowest: float
    at: tuple[float, ...]


class LeaveOneOut(NamedTuple):
    """Leave-one-out errors of interior points, in percent of the range of values.

    `errors` are predicted - true; `rmse` is over all of them, `rmse_of_draws` over 20 draws of one
    point each, some of which repeat.
    """

    errors: tuple[float, ...]
    rmse: float
    rmse_of_draws: float


@dataclass(frozen=True)
class Surrogate:
    """An interpolant f(x) = sum_i w_i phi(|x - x_i|) + c_0 + c^T x, exact at its points.

    `points` has shape (n, d) in the unit cube, `values` shape (n,).
    """

    points: Point
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check that the points determine an interpolant. Raises: RunError."""
        n, d = self.points.shape
        if n < d + 2:
            raise RunError(
                f"The table has {n} points in {d} dimensions; a surrogate needs at least {d + 2}."
            )
        if len(np.unique(self.points.round(9), axis=0)) < n:
            raise RunError("The table has several results of one point. Average them first.")
        if np.linalg.matrix_rank(np.hstack([np.ones((n, 1)), self.points])) <= d:
            raise RunError(
                "The points of the table lie in a plane; a surrogate needs different values of "
                "every parameter."
            )

    @cached_property
    def _interpolant(self) -> object:
        from scipy.interpolate import RBFInterpolator

        return RBFInterpolator(self.points, self.values, kernel=KERNEL, degree=_DEGREE)

    def at(self, points: Point) -> NDArray[np.float64]:
        """Return the values at points of shape (k, d)."""
        found: NDArray[np.float64] = self._interpolant(np.atleast_2d(points))  # type: ignore[operator]
        return found

    def __call__(self, point: Point) -> float:
        """Return the value at one point of shape (d,)."""
        return float(self.at(point[None, :])[0])

    @cached_property
    def extremes(self) -> Extremes:
        """The global extremes: the best of 2^15 Sobol points, polished locally, and of the table.

        The interpolant can exceed the best value of the table, so that a regret against the table
        would be negative.
        """
        highest, at = self._best(1.0)
        lowest, _ = self._best(-1.0)
        return Extremes(highest, -lowest, tuple(float(x) for x in at))

    def _best(self, sign: float) -> tuple[float, Point]:
        from scipy.optimize import minimize
        from scipy.stats import qmc

        d = self.points.shape[1]
        drawn = qmc.Sobol(d, seed=np.random.default_rng(0)).random_base2(_SOBOL_LOG2)
        candidates = np.vstack([drawn, self.points])
        values = sign * self.at(candidates)
        order = np.argsort(-values)[:_POLISHED]
        found = [(float(values[i]), candidates[i]) for i in order]
        for _, start in list(found):
            for method in ("L-BFGS-B", "Nelder-Mead"):
                polished = minimize(
                    lambda x: -sign * self(np.clip(x, 0, 1)),
                    start,
                    method=method,
                    bounds=[(0, 1)] * d,
                )
                found.append((-float(polished.fun), np.clip(polished.x, 0, 1)))
        best = max(found, key=lambda each: each[0])
        return best[0], best[1]

    def leave_one_out(self) -> LeaveOneOut:
        """Compute the error of predicting each interior point from all others.

        Math:   with A = [[K, P], [P^T, 0]] and w = A^-1 [f; 0], predicted - true at point i is
                -w_i / (A^-1)_ii (Rippa's identity with the polynomial part), without refitting.
                Interior points are on no face of the box of all points.
        Raises: RunError if no point is interior.
        """
        inverse = np.linalg.inv(self._system())
        n = len(self.values)
        weights = inverse[:, :n] @ self.values
        errors = -weights[:n] / np.diag(inverse)[:n]
        inside = interior(self.points)
        if not len(inside):
            raise RunError(
                "No point of the table is inside the box of the others, so that there is nothing "
                "to predict. Use at least three values of every parameter."
            )
        spread = float(np.ptp(self.values)) or 1.0
        drawn = [int(np.random.default_rng(seed).choice(inside)) for seed in range(DRAWS)]
        return LeaveOneOut(
            tuple(float(error) for error in errors[inside]),
            _percent(errors[inside], spread),
            _percent(errors[drawn], spread),
        )

    def _system(self) -> NDArray[np.float64]:
        """Return the matrix A of the interpolation conditions, shape (n + d + 1, n + d + 1)."""
        r = np.linalg.norm(self.points[:, None, :] - self.points[None, :, :], axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            K = np.where(r > 0, r**2 * np.log(r), 0.0)  # the thin plate spline
        P = np.hstack([np.ones((len(r), 1)), self.points])
        return np.block([[K, P], [P.T, np.zeros((P.shape[1], P.shape[1]))]])


def interior(points: Point) -> NDArray[np.int64]:
    """Return the indices of points on no face of the box that holds all points."""
    low, high = points.min(axis=0), points.max(axis=0)
    return np.flatnonzero(((points > low) & (points < high)).all(axis=1))


def _percent(errors: NDArray[np.float64] | Sequence[float], spread: float) -> float:
    return 100 * float(np.sqrt(np.mean(np.square(errors)))) / spread
