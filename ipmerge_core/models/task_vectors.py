"""Size and direction of two task vectors relative to each other, from three sums.

No torch: analysis records contain the same sums, and the app shows them before torch is loaded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# Our limit for a warning, not a published one: DRIFT (arXiv 2510.15050) reports that plain merges
# hurt where the task vectors differ much in norm, without a number.
UNEQUAL = 4.0


class TaskVectorProducts(NamedTuple):
    """||dV||^2 of the MLLM, ||dM||^2 of an expert and <dV, dM>, over any set of weights.

    >>> TaskVectorProducts(4.0, 1.0, 1.0).norm_ratio, TaskVectorProducts(4.0, 1.0, 1.0).cosine
    (0.5, 0.5)
    """

    mllm2: float
    math2: float
    inner: float

    @property
    def cosine(self) -> float | None:
        """<dV, dM> / (||dV|| ||dM||), in [-1, 1]; None if one of them is zero."""
        if not (self.mllm2 > 0 and self.math2 > 0):
            return None
        cosine = self.inner / (math.sqrt(self.mllm2) * math.sqrt(self.math2))
        return max(-1.0, min(1.0, cosine))

    @property
    def norm_ratio(self) -> float | None:
        """||dM|| / ||dV||; None if the MLLM's is zero."""
        return math.sqrt(self.math2) / math.sqrt(self.mllm2) if self.mllm2 > 0 else None

    @property
    def is_unequal(self) -> bool:
        """Whether one norm is more than `UNEQUAL` times the other."""
        ratio = self.norm_ratio
        return ratio is not None and not 1 / UNEQUAL <= ratio <= UNEQUAL

    def plus(self, other: TaskVectorProducts) -> TaskVectorProducts:
        """Return the products over both sets of weights."""
        return TaskVectorProducts(
            self.mllm2 + other.mllm2, self.math2 + other.math2, self.inner + other.inner
        )

    def describe(self) -> str:
        """Describe both numbers; empty if a task vector is zero or not finite.

        >>> TaskVectorProducts(4.0, 1.0, 1.0).describe()
        'norm ratio math / MLLM 0.500, cosine 0.500'
        """
        ratio, cosine = self.norm_ratio, self.cosine
        if ratio is None or cosine is None or not math.isfinite(ratio):
            return ""
        return f"norm ratio math / MLLM {ratio:#.3g}, cosine {cosine:.3f}"


NOTHING = TaskVectorProducts(0.0, 0.0, 0.0)
