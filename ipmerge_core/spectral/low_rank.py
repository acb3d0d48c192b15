"""Task vectors of low rank, given as the product of two thin factors.

In: the factors of an adapter in their stored dtypes. Out: a `LowRank` with the level of their
rounding noise, which is decomposed without forming the (m, n) matrix. No IO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.spectral.spectrum import (
    EXISTS,
    Spectrum,
    as_float,
    spacing_sums,
    svd_of_product,
)


@dataclass(frozen=True)
class LowRank:
    """A task vector dW = left @ right of rank at most r.

    `noise` is the singular value that rounding of the stored factors can cause in it.

    Shapes: left (m, r), right (r, n).
    """

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "r n"]
    noise: float = 0.0

    @classmethod
    def of(cls, left: Float[Tensor, "m r"], right: Float[Tensor, "r n"], scale: float) -> LowRank:
        """Create scale left @ right from factors as stored.

        Math:   with rounding errors E_l and E_r of the factors, the error of the product is
                E_l right + left E_r; its norm is at most |scale| (e_l ||right|| + ||left|| e_r),
                where e is the bound of `noise_floor` for one factor.
        """
        noise = _noise(left) * _norm(right) + _norm(left) * _noise(right)
        return cls(as_float(left) * scale, as_float(right), abs(scale) * noise)

    def matrix(self) -> Float[Tensor, "m n"]:
        """Multiply the factors."""
        return self.left @ self.right

    def scaled(self, factor: float) -> LowRank:
        """Return factor * dW."""
        return replace(self, left=factor * self.left, noise=abs(factor) * self.noise)

    def without(self, directions: Float[Tensor, "m c"]) -> LowRank:
        """Return (I - U U^T) dW in fp64 for orthonormal columns U."""
        U, left = directions.double(), self.left.double()
        return replace(self, left=left - U @ (U.T @ left), right=self.right.double())

    def spectrum(
        self,
        *,
        rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        vectors: str = "both",
    ) -> Spectrum:
        """Compute the SVD with at most r triplets, those of rounding included."""
        return svd_of_product(self.left, self.right, rank=rank, dtype=dtype, vectors=vectors)

    def existing(
        self,
        *,
        rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        vectors: str = "both",
        noise: float | None = None,
    ) -> Spectrum:
        """Keep the directions that rounding cannot have caused, as `spectrum.existing` does."""
        floor = EXISTS * (self.noise if noise is None else noise)
        return self.spectrum(rank=rank, dtype=dtype, vectors=vectors).above(floor)


def sum_of(changes: Sequence[LowRank]) -> LowRank:
    """Add task vectors of one shape by placing their factors next to each other."""
    return LowRank(
        torch.cat([change.left for change in changes], dim=1),
        torch.cat([change.right for change in changes], dim=0),
        sum(change.noise for change in changes),
    )


def _noise(factor: Tensor) -> float:
    rows, columns = spacing_sums(factor)
    return float((rows.max() / 12).sqrt() + (columns.max() / 12).sqrt())


def _norm(factor: Tensor) -> float:
    """Return the spectral norm, from the Gram matrix of the short side."""
    wide = as_float(factor).cpu().double()
    short = wide if wide.shape[0] < wide.shape[1] else wide.T
    return float(torch.linalg.eigvalsh(short @ short.T)[-1].clamp(min=0).sqrt())
