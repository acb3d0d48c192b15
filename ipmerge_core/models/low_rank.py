"""The change of a matrix as two thin factors, as an adapter stores it.

In: what `AdaptedCheckpoint` knows of a matrix. Out: `Factors`, which `spectral/low_rank.py`
decomposes without forming the matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A change dW = scale left @ right, in the stored dtypes.

    Shapes: left (m, r), right (r, n).
    """

    left: Tensor
    right: Tensor
    scale: float

    def to(self, device: str | torch.device) -> Factors:
        """Return a copy on another device."""
        return Factors(self.left.to(device), self.right.to(device), self.scale)

    def rows(self, rows: range | None) -> Factors:
        """Return the change of some rows of the matrix; None selects all."""
        return self if rows is None else self._replace(left=self.left[rows.start : rows.stop])
