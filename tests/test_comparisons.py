"""Comparisons of two models: against enumeration, published examples and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.comparisons import (
    difference_interval,
    holm,
    needed_items,
    paired_test,
)


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    counts = ((True, True, both), (True, False, first), (False, True, second))
    rows = [(a, b) for a, b, count in (*counts, (False, False, neither)) for _ in range(count)]
    return [a for a, _ in rows], [b for _, b in rows]


@pytest.mark.parametrize("broken", range(5))
@pytest.mark.parametrize("fixed", range(5))
def test_the_p_value_is_that_of_all_coin_tosses(broken: int, fixed: int) -> None:
    n = broken + fixed
    extreme = abs(fixed - broken)
    tosses = [abs(2 * sum(toss) - n) >= extreme for toss in itertools.product((0, 1), repeat=n)]
    found = paired_test(*outcomes(3, broken, fixed, 2))
    assert found.p_value == pytest.approx(sum(tosses) / len(tosses))
    assert (found.fixed, found.broken, found.n) == (fixed, broken, n + 5)
    assert found.difference == pytest.approx((fixed - broken) / (n + 5))


def test_holm_agrees_with_its_definition_on_every_order() -> None:
    for p in itertools.permutations([0.001, 0.01, 0.02, 0.04, 0.5]):
        ranked = sorted(p)
        stepwise = [min(1.0, (5 - rank) * value) for rank, value in enumerate(ranked)]
        wanted = dict(zip(ranked, itertools.accumulate(stepwise, max), strict=True))
        assert holm(p) == pytest.approx([wanted[value] for value in p])
    assert holm([]) == []
    assert holm([0.7]) == [0.7]
    assert holm([1.0, 1.0]) == [1.0, 1.0]
    with pytest.raises(RunError, match="values from 0 to 1"):
        holm([0.1, math.nan])


def test_the_interval_of_a_difference_agrees_with_the_published_example() -> None:
    """Newcombe 1998, table III: 36, 12, 2 and 0 of 50; method 10 gives 0.0569 to 0.3404."""
    low, high = difference_interval(*outcomes(36, 2, 12, 0))
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)


def test_the_interval_covers_the_difference_as_often_as_it_states() -> None:
    rng = np.random.default_rng(0)
    shares = [0.5, 0.06, 0.14, 0.3]
    covered = 0
    for counts in rng.multinomial(150, shares, size=400):
        low, high = difference_interval(*outcomes(*map(int, counts)))
        covered += low <= shares[2] - shares[1] <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_the_number_of_items_reaches_its_power() -> None:
    """The formula is that of the asymptotic test; the exact one has a little less power."""
    rng = np.random.default_rng(1)
    psi, difference = 0.3, 0.1
    n = needed_items(psi, difference)
    found = 0
    for _ in range(300):
        differing = rng.binomial(n, psi)
        fixed = rng.binomial(differing, (psi + difference) / (2 * psi))
        found += paired_test(*outcomes(0, differing - fixed, fixed, 0)).p_value <= 0.05
    assert 0.7 <= found / 300 <= 0.86


def test_the_number_of_items_grows_with_the_discordance() -> None:
    counts = [needed_items(psi) for psi in (0.0, 0.02, 0.1, 0.5, 1.0)]
    assert counts == sorted(counts)
    for values in ((1.1, 0.02), (-0.1, 0.02), (0.2, 0.0), (math.nan, 0.02)):
        with pytest.raises(RunError, match="expected values between 0 and 1"):
            needed_items(*values)


def test_no_items_and_equal_models_are_defined() -> None:
    empty = paired_test([], [])
    assert (empty.n, empty.p_value, empty.low, empty.high, empty.needed) == (
        0,
        1.0,
        -1.0,
        1.0,
        None,
    )
    same = paired_test([True, False] * 10, [True, False] * 10)
    assert (same.difference, same.p_value, same.needed) == (0.0, 1.0, None)
    assert same.low <= 0 <= same.high
    with pytest.raises(RunError, match="the same items"):
        paired_test([True], [])
