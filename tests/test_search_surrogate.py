"""Surrogates and regret, against independently computed numbers of one table."""

from __future__ import annotations

import numpy as np
import pytest

from ipmerge_core.errors import RunError
from ipmerge_core.search.regret import (
    expected_random_regret,
    normalized_regret,
    regret_over_random,
    sum_regret,
)
from ipmerge_core.search.surrogate import Surrogate, interior

GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
SCORES = np.array(
    [
        [39.8962, 40.0771, 43.345, 43.1813, 39.6648],
        [39.9444, 40.5906, 44.2273, 43.4548, 39.2329],
        [40.4609, 42.9761, 45.235, 42.4885, 39.0382],
        [40.8734, 45.1054, 48.5612, 44.1465, 38.9534],
        [40.2208, 42.4788, 44.2653, 41.2788, 37.8209],
    ]
)  # fmt: skip  (rows: weight of the MLLM, columns: weight of the expert)
POINTS = np.array([[(a - 0.2) / 0.8, (b - 0.2) / 0.8] for a in GRID for b in GRID])
SUMS = np.array([a + b for a in GRID for b in GRID])


@pytest.fixture(scope="module")
def surrogate() -> Surrogate:
    return Surrogate(POINTS, SCORES.ravel())


def test_the_surrogate_passes_through_its_points_and_agrees_between_them(
    surrogate: Surrogate,
) -> None:
    np.testing.assert_allclose(surrogate.at(POINTS), SCORES.ravel(), atol=1e-10)
    between = (np.array([[0.5, 0.5], [0.7, 0.7], [0.35, 0.9]]) - 0.2) / 0.8
    expected = [43.25333293072806, 45.91935285370536, 41.571662936285385]
    np.testing.assert_allclose(surrogate.at(between), expected, rtol=1e-12)


def test_the_leave_one_out_error_is_that_of_refitting(surrogate: Surrogate) -> None:
    found = surrogate.leave_one_out()
    inside = interior(POINTS)
    assert inside.tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    refitted = []
    for left_out in inside:
        kept = np.arange(25) != left_out
        other = Surrogate(POINTS[kept], SCORES.ravel()[kept])
        refitted.append(other(POINTS[left_out]) - SCORES.ravel()[left_out])
    np.testing.assert_allclose(found.errors, refitted, atol=1e-10)
    assert found.rmse == pytest.approx(9.733304795209424, rel=1e-10)
    assert found.rmse_of_draws == pytest.approx(10.025128825958301, rel=1e-10)


def test_the_extremes_exceed_the_table_where_the_surrogate_does(surrogate: Surrogate) -> None:
    highest, lowest, at = surrogate.extremes
    assert highest == pytest.approx(48.5661, abs=1e-3)
    assert lowest == pytest.approx(37.8209, abs=1e-6)
    assert surrogate(np.array(at)) == pytest.approx(highest)


def test_regret_of_a_trace() -> None:
    trace = [39.8962, 44.2273, 45.235, 44.1465, 48.5612]
    expected = [0.806774484885034, 0.4035175926184558, 0.30969339776356347,
                0.30969339776356347, 0.0]  # fmt: skip
    found = normalized_regret(trace, SCORES.max(), SCORES.min())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert normalized_regret([3.0], 3.0, 3.0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1, 0.6201405919760159), (5, 0.3378312580947047), (10, 0.2398849669013769),
     (20, 0.14571580311933222)],
)  # fmt: skip
def test_expected_regret_of_random_picks(budget: int, expected: float) -> None:
    found = expected_random_regret(SCORES, budget, SCORES.max(), SCORES.min())
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("delta", "points", "regret"),
    [(0.0, 4, 8.924614712980734), (0.2, 12, 6.8495012479098545), (0.4, 18, 0.0)],
)
def test_the_price_of_weights_that_sum_to_one_loses_no_cell_to_rounding(
    delta: float, points: int, regret: float
) -> None:
    found = sum_regret(SUMS, SCORES, delta)
    assert found is not None
    assert found.points == points
    assert found.regret == pytest.approx(regret, abs=1e-9)


def test_regrets_without_meaning() -> None:
    assert sum_regret([3.0, 4.0], [1.0, 2.0], 0.5) is None
    with pytest.raises(RunError, match="needs positive scores"):
        sum_regret([1.0], [0.0], 0.0)
    assert regret_over_random([0.1], [0.0]) is None
    assert regret_over_random([0.1, 0.2], [0.3, 0.6]) == pytest.approx(1 / 3)


UNUSABLE = {
    "too few": (POINTS[:3], "has 3 points in 2 dimensions"),
    "repeated": (np.vstack([POINTS, POINTS[:1]]), "several results of one point"),
    "on a line": (np.repeat(np.linspace(0, 1, 6)[:, None], 2, axis=1), "lie in a plane"),
}


@pytest.mark.parametrize(("points", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_points_that_determine_no_surrogate_are_refused(points: np.ndarray, message: str) -> None:
    with pytest.raises(RunError, match=message):
        Surrogate(points, np.arange(len(points), dtype=float))


def test_a_table_without_interior_points_has_no_leave_one_out_error() -> None:
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1.0]])
    with pytest.raises(RunError, match="No point of the table is inside"):
        Surrogate(corners, np.arange(4.0)).leave_one_out()
