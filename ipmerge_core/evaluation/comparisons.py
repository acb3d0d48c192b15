"""Compare two models on the same items: exact tests, corrections, intervals and power.

In: for every item, whether each of two models is right. Out: counts of fixed and broken items, an
exact p value, the interval of the difference, and how many items a smaller difference would need.
Distributions are those of scipy, imported when the first one is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.scores import sign_test, wilson_interval

SMALL_SAMPLE = 200  # items; below, a report says so
TARGET_DIFFERENCE = 0.02  # for which the number of items is reported


@dataclass(frozen=True)
class PairedTest:
    """A second model against a first one on the same items.

    Attributes:
        n: items that both answered and that rules could judge.
        fixed: items that only the second gets right.
        broken: items that only the first gets right.
        low: lower end of the 95 % interval of the difference.
        high: its upper end.
        p_value: of the exact sign test, without correction.
        needed: items that a difference of `TARGET_DIFFERENCE` would need; None if no item differs.
    """

    n: int
    fixed: int
    broken: int
    low: float
    high: float
    p_value: float
    needed: int | None

    @property
    def difference(self) -> float:
        """Share of the second minus share of the first, in [-1, 1]; NaN for no items."""
        return (self.fixed - self.broken) / self.n if self.n else math.nan


def paired_test(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Compare outcomes on the same items. Raises: RunError if the lengths differ.

    >>> found = paired_test([True] * 5 + [False] * 5, [True] * 4 + [False] + [True] * 5)
    >>> found.fixed, found.broken, found.difference
    (5, 1, 0.4)
    """
    test = sign_test(first, second)
    n, differing = len(first), test.first_only + test.second_only
    low, high = difference_interval(first, second)
    return PairedTest(
        n=n,
        fixed=test.second_only,
        broken=test.first_only,
        low=low,
        high=high,
        p_value=test.p_value,
        needed=needed_items(differing / n) if differing else None,
    )


def difference_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two paired shares; (-1, 1) for no items.

    Math:   d -+ sqrt(a^2 - 2 phi a b + b^2), a and b the distances of the shares from the ends of
            their Wilson intervals, phi the correlation of the outcomes.
    Source: Newcombe, Statistics in Medicine 17 (1998) 2635, method 10.

    >>> low, high = difference_interval([False] * 50, [False] * 50)
    >>> round(low, 3), round(high, 3)
    (-0.071, 0.071)
    """
    n = len(first)
    if n == 0:
        return -1.0, 1.0
    right_1, right_2 = sum(first), sum(second)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    phi = _correlation(n, right_1, right_2, both)
    p_1, p_2 = right_1 / n, right_2 / n
    low_1, high_1 = wilson_interval(right_1, n)
    low_2, high_2 = wilson_interval(right_2, n)
    below = _distance(p_2 - low_2, high_1 - p_1, phi)
    above = _distance(high_2 - p_2, p_1 - low_1, phi)
    return max(-1.0, p_2 - p_1 - below), min(1.0, p_2 - p_1 + above)


def _correlation(n: int, right_1: int, right_2: int, both: int) -> float:
    """Return phi of the 2 x 2 table, with Newcombe's continuity correction if it is positive."""
    spread = right_1 * (n - right_1) * right_2 * (n - right_2)
    if spread == 0:
        return 0.0
    product = both * (n - right_1 - right_2 + both) - (right_1 - both) * (right_2 - both)
    corrected = max(product - n / 2, 0.0) if product > 0 else product
    return corrected / math.sqrt(spread)


def _distance(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))


def needed_items(
    discordance: float,
    difference: float = TARGET_DIFFERENCE,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
) -> int:
    """Return how many items a paired test needs to find a difference.

    Math:   n = (z_(1-alpha/2) sqrt(psi) + z_power sqrt(psi - d^2))^2 / d^2, psi the share of items
            on which the models differ, at least d.
    Source: Connor, Biometrics 43 (1987) 207, for the asymptotic test; the exact one needs a few
        percent more.
    Raises: RunError unless 0 < difference <= 1, 0 <= discordance <= 1.

    >>> needed_items(0.2)
    3923
    """
    if not (0 < difference <= 1 and 0 <= discordance <= 1 and 0 < alpha < 1 and 0 < power < 1):
        raise RunError(
            f"Got a discordance of {discordance} and a difference of {difference} (alpha {alpha}, "
            f"power {power}); expected values between 0 and 1, a difference above 0."
        )
    from scipy.stats import norm

    psi = max(discordance, difference)
    reach = float(norm.ppf(1 - alpha / 2)) * math.sqrt(psi)
    reach += float(norm.ppf(power)) * math.sqrt(max(psi - difference**2, 0.0))
    return math.ceil(reach**2 / difference**2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the given order.

    Math:   p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)), p_(1) <= ... <= p_(m).
    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65.
    Raises: RunError for a value outside [0, 1].

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise RunError(f"Got the p values {list(p_values)}; expected values from 0 to 1.")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
