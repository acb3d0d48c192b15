"""Optimizers: their definitions, and a ranking on a known surrogate."""

from __future__ import annotations

import numpy as np
import pytest
from test_search_surrogate import GRID, POINTS, SCORES

from ipmerge_core.errors import PlanError
from ipmerge_core.search.optimizers import (
    OPTIMIZERS,
    find_optimizer,
    latin_points,
    pattern_search,
    population_size,
    random_points,
    sobol_points,
)
from ipmerge_core.search.replay import Replay, Table, iter_replays
from ipmerge_core.search.space import Axis, SearchSpace
from ipmerge_core.search.surrogate import Surrogate


def hill(point: np.ndarray) -> float:
    return float(1 - (point[0] - 0.7) ** 2 - 2 * (point[1] - 0.3) ** 2)


def test_pattern_search_polls_in_its_order() -> None:
    visited: list[list[float]] = []

    def watched(point: np.ndarray) -> float:
        visited.append(point.tolist())
        return hill(point)

    best, value = pattern_search(watched, np.array([0.5, 0.5]))
    assert best.tolist() == [0.6875, 0.3125]
    assert value == 0.99953125
    assert len(visited) == 27
    assert visited[:8] == [[0.5, 0.5], [0.75, 0.5], [1.0, 0.5], [0.5, 0.5], [0.75, 0.75],
                           [0.75, 0.25], [1.0, 0.25], [0.5, 0.25]]  # fmt: skip


def test_pattern_search_does_not_poll_outside_the_cube() -> None:
    visited: list[np.ndarray] = []
    pattern_search(lambda p: (visited.append(p), -p[0])[1], np.array([0.0]))
    assert all(0 <= point[0] <= 1 for point in visited)


@pytest.mark.parametrize("points", [random_points, sobol_points, latin_points])
def test_sequences_fill_the_cube_and_depend_on_the_seed(points: object) -> None:
    found = points(8, 3, 0)
    assert found.shape == (8, 3)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_array_equal(found, points(8, 3, 0))
    assert not np.array_equal(found, points(8, 3, 1))


@pytest.mark.parametrize("points", [random_points, sobol_points])
def test_longer_sequences_continue_shorter_ones(points: object) -> None:
    np.testing.assert_array_equal(points(100, 2, 3)[:40], points(40, 2, 3))


def test_population_sizes() -> None:
    assert [population_size(d) for d in (1, 2, 3)] == [4, 6, 7]


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(PlanError, match="Unknown optimizer 'adam'. Available: grid, random"):
        find_optimizer("adam")


@pytest.fixture(scope="module")
def table() -> Table:
    space = SearchSpace((Axis("mllm_weight", 0.2, 1, GRID), Axis("math_weight", 0.2, 1, GRID)))
    return Table("task_arithmetic", "", "", space, Surrogate(POINTS, SCORES.ravel()))


@pytest.fixture(scope="module")
def replays(table: Table) -> list[Replay]:
    cheap = [name for name in OPTIMIZERS if name != "gp-bo"]
    found = [step.replay for step in iter_replays([table], cheap, seeds=10)]
    return found + [step.replay for step in iter_replays([table], ["gp-bo"], seeds=2)]


def test_every_optimizer_spends_its_budget(replays: list[Replay]) -> None:
    for replay in replays:
        assert len(replay.regret) == (25 if replay.optimizer == "grid" else 40)
        assert (np.diff(replay.regret) <= 0).all()


def test_the_ranking_is_that_of_an_independent_implementation(replays: list[Replay]) -> None:
    """Bands around mean regrets of another implementation, on 10 seeds each."""
    bands = {
        "random": (0.04, 0.10),
        "sobol": (0.035, 0.09),
        "pattern": (0, 0.025),
        "powell": (0, 0.01),
        "cma-es": (0, 0.12),
        "gp-bo": (0, 0.005),
        "grid": (0, 0.001),
    }
    for name, (low, high) in bands.items():
        mean = np.mean([each.final for each in replays if each.optimizer == name])
        assert low <= mean <= high, (name, mean)


def test_a_seed_repeats_itself(table: Table) -> None:
    def final(name: str) -> list[float]:
        return [step.replay.final for step in iter_replays([table], [name], seeds=2, budget=15)]

    for name in OPTIMIZERS:
        assert final(name) == final(name), name
