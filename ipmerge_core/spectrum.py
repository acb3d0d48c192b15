"""One matrix: its task vector, its singular value decomposition, and numbers read off the values.

In: weight matrices (m, n) in any float dtype. Out: a `Spectrum` (U, S, Vh), as `torch.linalg.svd`
returns them, `Vh` being V transposed. No IO, no global random state, no knowledge of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.errors import CheckpointError, PlanError, ShapeError

Method = Literal["auto", "exact", "gram", "randomized"]
METHODS = ("auto", "exact", "gram", "randomized")


@dataclass(frozen=True)
class Spectrum:
    """A thin, possibly truncated, singular value decomposition A = U diag(S) Vh.

    Shapes: U (m, r) or None where it was not asked for, S (r,) descending, Vh (r, n) with
    orthonormal rows. `method` names the engine; `error` bounds the absolute error of every S.
    """

    U: Float[Tensor, "m r"] | None
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    method: str = "exact"
    error: float = 0.0

    def matrix(self) -> Float[Tensor, "m n"]:
        """Multiply the factors together: A, truncated to the kept triplets."""
        assert self.U is not None, "a spectrum without U cannot be multiplied out"
        return (self.U * self.S) @ self.Vh


def as_float(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32; fp64 is kept."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def task_vector(tuned: Float[Tensor, "m n"], base: Float[Tensor, "p q"]) -> Float[Tensor, "m n"]:
    """Return dW = W - W0 in fp32, or fp64 where either is stored so.

    Raises: ShapeError for unequal shapes.
    """
    if tuned.shape != base.shape:
        raise ShapeError(
            f"The tuned matrix has shape {tuple(tuned.shape)} and its base {tuple(base.shape)}; "
            f"a task vector needs equal shapes: are both from one family?"
        )
    return as_float(tuned) - as_float(base)


def svd(
    matrix: Float[Tensor, "m n"],
    *,
    method: str = "auto",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Spectrum:
    """Decompose a matrix into A = U diag(S) Vh, signs fixed, strongest direction first.

    The sign of a pair (u_i, v_i) is arbitrary; here the entry of v_i largest in magnitude is
    positive. A zero matrix has S = 0 and unit vectors for directions.

    Args:
        matrix: (m, n) in any float dtype.
        method: the engine.
        rank: keep the leading triplets only, at most min(m, n); None keeps all.
        dtype: of the result, fp32 (default; fp64 for fp64 input) or fp64.

    Raises:
        CheckpointError: the matrix holds NaN or infinity.
        PlanError: unknown method, or a rank below 1.
    """
    if method not in METHODS:
        raise PlanError(f"Unknown method '{method}' of svd. Available: {', '.join(METHODS)}.")
    if rank is not None and rank < 1:
        raise PlanError(f"The rank is {rank}; expected a whole number >= 1, or none for all.")
    check_finite(matrix)
    U, S, Vh = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    U, Vh = _fix_signs(U, Vh)
    dtype = dtype or as_float(matrix[:0]).dtype
    return Spectrum(U[:, :rank].to(dtype), S[:rank].to(dtype), Vh[:rank].to(dtype))


def check_finite(matrix: Tensor) -> None:
    """Raise CheckpointError when the matrix holds NaN or infinity; the caller adds its name."""
    wrong = int((~torch.isfinite(matrix)).sum())
    if wrong:
        raise CheckpointError(
            f"{wrong} of {matrix.numel()} values are NaN or infinite; expected finite weights. "
            f"The file is damaged or its training diverged: fetch or train it again."
        )


def _fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    top = Vh.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(Vh.gather(1, top) < 0, -1.0, 1.0).to(Vh.dtype)
    return U * sign.T, Vh * sign


# --- numbers read off the values ---


def stable_rank(spectrum: Spectrum) -> float:
    """Return sum S^2 / S_1^2: how many directions as strong as the first; 0 for a zero matrix."""
    S = spectrum.S.double()
    top = float(S[0])
    return float((S / top).square().sum()) if top > 0 else 0.0


def effective_rank(spectrum: Spectrum) -> float:
    """Return exp of the entropy of p_i = S_i / sum S (Roy, Vetterli 2007); 0 for a zero one."""
    S = spectrum.S.double()
    total = float(S.sum())
    if total <= 0:
        return 0.0
    p = S / total
    return math.exp(float(-torch.special.xlogy(p, p).sum()))


def energy_rank(spectrum: Spectrum, fraction: float = 0.9) -> int:
    """Least k with sum_{i<=k} S_i^2 >= fraction * sum S^2; 0 for a zero matrix."""
    if not 0 < fraction <= 1:
        raise PlanError(f"The energy fraction is {fraction}; expected a number in (0, 1].")
    energy = spectrum.S.double().square().cumsum(0)
    if float(energy[-1]) <= 0:
        return 0
    reached = energy < fraction * energy[-1]
    return min(int(reached.sum()) + 1, len(energy))


def spectral_gap(spectrum: Spectrum) -> float:
    """(S_1 - S_2) / S_1, in [0, 1]: 1 for rank one, 0 for a tie and for a zero matrix."""
    S = spectrum.S.double()
    if float(S[0]) <= 0:
        return 0.0
    return float((S[0] - S[1]) / S[0]) if len(S) > 1 else 1.0


def noise_floor(tuned: Float[Tensor, "m n"], base: Float[Tensor, "m n"]) -> float | None:
    """Singular value of tuned - base below which it may all be rounding of the stored files.

    Both files round to the spacing of their dtype (ulp), so the difference carries independent
    errors of variance (ulp_tuned^2 + ulp_base^2) / 12 per element. The norm of such noise is
    at most its largest row norm plus its largest column norm (Marchenko-Pastur's edge
    sigma (sqrt m + sqrt n) where all weights have one spacing).

    Returns None when both are stored in fp32 or better, where rounding is below interest.
    """
    coarse = [W for W in (tuned, base) if W.dtype.itemsize < 4]
    if not coarse:
        return None
    variance = torch.stack([_spacing(W).double().square() / 12 for W in coarse]).sum(0)
    return math.sqrt(float(variance.sum(1).max())) + math.sqrt(float(variance.sum(0).max()))


def _spacing(weight: Tensor) -> Tensor:
    """Distance between neighbouring numbers of the tensor's dtype at each element (ulp), fp32."""
    info = torch.finfo(weight.dtype)
    size = weight.float().abs().clamp(min=info.smallest_normal)
    exponent = torch.frexp(size).exponent - 1
    return torch.ldexp(torch.full_like(size, info.eps), exponent)
