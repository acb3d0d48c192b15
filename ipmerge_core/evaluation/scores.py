"""Scores with Wilson intervals, and the paired sign test.

In: decoded replies and the problems they answer. Out: booleans, `Score`s, a `SignTest`. Intervals
and p values are those of `scipy.stats.binomtest`, imported when the first one is computed. Does not
run models (`answers`) and never mends a reply before comparing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ipmerge_core.errors import RunError
from ipmerge_core.tasks.answers import is_right
from ipmerge_core.tasks.demo import Problem


@dataclass(frozen=True)
class Score:
    """Number of correct items out of a total."""

    right: int
    n: int

    @property
    def share(self) -> float:
        """Share of correct items in [0, 1]; NaN for no items."""
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval at 95 %."""
        return wilson_interval(self.right, self.n)

    def __add__(self, other: Score) -> Score:
        """Pool two scores."""
        return Score(self.right + other.right, self.n + other.n)

    def __str__(self) -> str:
        """Format as percent with the 95 % interval.

        >>> str(Score(150, 300))
        '50.0 (44.4-55.6)'
        """
        low, high = self.interval
        return f"{100 * self.share:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def score(problems: Iterable[Problem], replies: Iterable[str]) -> Score:
    """Count the correct replies. Raises: ValueError if the lengths differ."""
    outcomes = [is_right(problem, reply) for problem, reply in zip(problems, replies, strict=True)]
    return Score(sum(outcomes), len(outcomes))


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a binomial share; (0, 1) for no items.

    Math:   (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), p = right/n.
    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209.
    Raises: RunError unless 0 <= right <= n and 0 < confidence < 1.

    >>> low, high = wilson_interval(0, 300)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.0126)
    """
    if not (0 <= right <= n and 0 < confidence < 1):
        raise RunError(
            f"Got {right} right of {n} at confidence {confidence}; expected 0 <= right <= n and a "
            "confidence between 0 and 1."
        )
    if n == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class SignTest:
    """Two models on the same items: where they differ, who is right, and how surprising that is."""

    first_only: int
    second_only: int
    p_value: float


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> SignTest:
    """Exact two-sided sign test on the items where just one of two models is right.

    Math:   p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c)), b and c the two counts.
    Source: McNemar's test in its exact form, Psychometrika 12 (1947) 153.
    Raises: RunError when the two lists differ in length.

    >>> sign_test([True] * 5 + [False], [False] * 5 + [False])
    SignTest(first_only=5, second_only=0, p_value=0.0625)
    """
    if len(first) != len(second):
        raise RunError(
            f"A paired test needs the same items for both: got {len(first)} and {len(second)}."
        )
    first_only = sum(a and not b for a, b in zip(first, second, strict=True))
    second_only = sum(b and not a for a, b in zip(first, second, strict=True))
    n = first_only + second_only
    if n == 0:
        return SignTest(0, 0, 1.0)
    from scipy.stats import binomtest

    return SignTest(first_only, second_only, float(binomtest(first_only, n).pvalue))
