"""The part of a task vector outside the leading directions of another: hard or soft complements.

In: the spectra of an MLLM's and an expert's task vectors, or the Gram matrices of layer inputs, for
one matrix. Out: how many directions are left out, the weight of each, and the task vector without
them. The derivations are in docs/variants.md. No IO.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from ipmerge_core.errors import PlanError
from ipmerge_core.spectral.kinds import WANTED_ENERGY
from ipmerge_core.spectral.spectrum import Spectrum, as_float

RIDGE = 1e-3  # of the input filter, relative to the mean diagonal entry of a Gram matrix
NOTHING = 1e-4  # of the norm of a change: what rounding can leave of it when all of it is left out
_SLACK = 1e-6  # of a share: fp32 singular values that tie with it are included
_EPS = 1.2e-7  # relative rounding error of a Gram matrix, which is stored in fp32


def energy_rank(S: Float[Tensor, " r"], share: float, total: float | None = None) -> int:
    """Count the leading directions that hold a share of the energy.

    Math:   the least k with sum_{i<=k} S_i^2 >= share * total; total is sum_i S_i^2 by default,
            or that of a spectrum whose other values were not computed. All r if they do not hold
            the share, and at least one for a share above 0 of a matrix that is not zero.
    Raises: PlanError for a share outside [0, 1].

    >>> energy_rank(torch.tensor([3.0, 2.0, 1.0]), 0.9)
    2
    >>> energy_rank(torch.tensor([3.0, 2.0, 1.0]), 0.0)
    0
    """
    if not 0 <= share <= 1:
        raise PlanError(f"The share of the energy is {share}; expected a number in [0, 1].")
    if share == 1:
        return int((S > 0).sum())
    energy = S.double().square()
    if not share or not float(energy.sum()):
        return 0
    goal = (share - _SLACK) * (float(energy.sum()) if total is None else total)
    return min(len(S), int((energy.cumsum(0) < goal).sum()) + 1)


def protection(mllm: Spectrum, expert: Spectrum) -> Float[Tensor, " r"]:
    """Compute how much of each of the MLLM's directions is held back from an expert's change.

    Math:   w_i = e_i (1 - a_i) with e_i = S_V,i / S_V,1, how strongly the MLLM's tuning used the
            direction, and a_i = ||V_M,K^T v_V,i||^2, its part inside the directions K that hold
            90 % of the expert's energy. The subspaces are compared, not single directions, so that
            w does not depend on signs, nor on the order of directions of nearly equal strength.
    Shapes: result (r,) in fp64, in [0, 1], for the r directions of the MLLM.
    """
    if not len(mllm.S):
        return mllm.S.double()
    wanted = expert.Vh[: energy_rank(expert.S, WANTED_ENERGY)]
    agreement = (wanted @ mllm.Vh.T).square().sum(0, dtype=torch.float64).clamp(max=1)
    strength = mllm.S.double() / mllm.S[0].double().clamp(min=torch.finfo(torch.float64).tiny)
    return strength * (1 - agreement)


def held_back(
    change: Float[Tensor, "m n"], mllm: Spectrum, weights: Float[Tensor, " k"]
) -> Float[Tensor, "m n"]:
    """Compute dM (I - V_k diag(w) V_k^T) for the MLLM's first k right directions.

    What is left of dM inside these directions is rounding, which a budget would scale up: a result
    below 1e-4 ||dM|| is zero (`NOTHING`), as it is in the records of an analysis.

    >>> held_back(torch.ones(1, 2), Spectrum(None, torch.ones(1), torch.eye(2)[:1]), torch.ones(1))
    tensor([[0., 1.]])
    """
    dM = as_float(change)
    V = mllm.Vh[: len(weights)].to(dM)
    rest = dM - ((dM @ V.T) * weights.to(dM)) @ V
    is_left = torch.linalg.matrix_norm(rest) > NOTHING * torch.linalg.matrix_norm(dM)
    return rest if bool(is_left) else torch.zeros_like(rest)


# --- filters by the inputs of layers ---


def off_inputs(
    change: Float[Tensor, "m n"], mllm_gram: Float[Tensor, "..."], beta: float
) -> Float[Tensor, "m n"]:
    """Reduce a change on the inputs that the MLLM sees, and pass it elsewhere.

    Math:   argmin_U ||U - dM||^2 + beta tr(U G U^T) = dM (I + beta G)^-1, with G the MLLM's Gram
            matrix divided by its mean diagonal entry. ||P|| <= ||dM|| for any beta; beta = 0 is dM.
            I is scaled up to the rounding of beta G, which matters for a very large beta only.
    Shapes: gram (n, n), or (n,) for its diagonal.
    Raises: PlanError if the Gram matrix is not positive semidefinite.
    """
    return _filtered(change, mllm_gram, None, beta)


def input_filter(
    change: Float[Tensor, "m n"],
    mllm_gram: Float[Tensor, "..."],
    math_gram: Float[Tensor, "..."],
    beta: float,
) -> Float[Tensor, "m n"]:
    """Follow a change on the expert's inputs and reduce it on those of the MLLM.

    Math:   argmin_U tr((U - dM) (G_e + ridge I) (U - dM)^T) + beta tr(U G_v U^T)
            = dM (G_e + ridge I) (G_e + ridge I + beta G_v)^-1, each G divided by its mean diagonal
            entry. The ridge pulls towards dM, not towards 0: inputs that neither model sees pass,
            and beta = 0 is dM. It is 1e-3, or the rounding of beta G_v if that is larger.
            tr(P G_v P^T) <= tr(dM G_v dM^T) for any beta, but ||P|| can be several times ||dM||.
    Shapes: grams (n, n), or (n,) for their diagonals; of two kinds, both are used as diagonals.
    Raises: PlanError if a Gram matrix is not positive semidefinite.
    """
    own, other = mllm_gram, math_gram
    if own.ndim != other.ndim:
        own, other = (G if G.ndim == 1 else G.diagonal() for G in (own, other))
    return _filtered(change, own, other, beta)


def activation_informed(
    merged: Float[Tensor, "m n"],
    mllm: Float[Tensor, "m n"],
    mllm_gram: Float[Tensor, "..."],
    share: float,
) -> Float[Tensor, "m n"]:
    """Reduce a merge's change of the input channels that are active in the MLLM (AIM).

    Math:   W' = W_v + (W - W_v) diag(1 - (1 - share) a_j / max a), so that the most active channel
            keeps `share` of its change and a silent one all of it; share = 1 is W. Channels that
            are all silent are not reduced.
    Shapes: gram (n, n), or (n,) for its diagonal.
    Source: Activation-Informed Merging, arXiv 2502.02421, with the MLLM as the model to preserve.
            Its a_j is the mean of |x_j| over the samples; here it is sqrt(mean x_j^2) = sqrt(G_jj),
            which a calibration contains. Both are equal up to the spread of |x_j|.

    >>> W_v, W = torch.zeros(1, 2), torch.ones(1, 2)
    >>> activation_informed(W, W_v, torch.tensor([4.0, 1.0]), 0.2)
    tensor([[0.2000, 0.6000]])
    """
    diagonal = mllm_gram if mllm_gram.ndim == 1 else mllm_gram.diagonal()
    activity = diagonal.double().clamp(min=0).sqrt()
    most = float(activity.max())
    factor = 1 - (1 - share) * (activity / most if most > 0 else activity)
    origin = mllm.to(merged)
    return origin + (merged - origin) * factor.to(merged)


def output_norm2(matrix: Float[Tensor, "m n"], gram: Float[Tensor, "..."]) -> float:
    """Return tr(A G A^T), the mean squared norm of the outputs A x over the measured inputs.

    >>> output_norm2(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.5]))
    17.0
    """
    A, G = matrix.double(), gram.double()
    return float(((A * G if G.ndim == 1 else A @ G) * A).sum())


def _scaled(gram: Tensor) -> Tensor:
    """Divide by the mean diagonal entry in fp64; a Gram matrix of zeros stays so.

    Raises: PlanError for a negative diagonal entry, which no Gram matrix has.
    """
    G = gram.double()
    diagonal = G if G.ndim == 1 else G.diagonal()
    if float(diagonal.min()) < 0:
        raise PlanError(
            f"A Gram matrix has the diagonal entry {float(diagonal.min()):.3g}, and a mean square "
            f"is not negative. Run the calibration again."
        )
    mean = float(diagonal.mean())
    return G / mean if mean > 0 else torch.zeros_like(G)


def _filtered(change: Tensor, own: Tensor, other: Tensor | None, beta: float) -> Tensor:
    """Compute dM A (A + B)^-1 with B = beta G_v and A = G_e + ridge I, or A = I without G_e.

    As dM - dM B (A + B)^-1, which is dM exactly where B is 0.
    """
    dM = as_float(change).double()
    if own.ndim == 1:
        B = beta * _scaled(own)
        A = torch.ones_like(B) if other is None else _scaled(other) + RIDGE
        return (dM - dM * (B / (A + B))).to(as_float(change))
    B, factor = _factored(own, other, beta)
    correction = torch.cholesky_solve((dM @ B).T, factor).T
    return (dM - correction).to(as_float(change))


class _Factored(NamedTuple):
    """B and the Cholesky factor of A + B, with what they were computed from."""

    beta: float
    other: WeakIdRef | None
    versions: tuple[int, ...]
    B: Tensor
    factor: Tensor

    def is_with(self, other: Tensor | None) -> bool:
        """Return whether the factor is with this Gram matrix of an expert, or with none."""
        if self.other is None:
            return other is None
        return other is not None and self.other() is other

    def serves(self, other: Tensor | None, beta: float, versions: tuple[int, ...]) -> bool:
        """Return whether the factor is that of these unchanged Gram matrices."""
        return self.is_with(other) and (self.beta, self.versions) == (beta, versions)

    def stays(self, other: Tensor | None, beta: float, version: int) -> bool:
        """Return whether the factor is still of use, when one with `other` is added."""
        ended = self.other is not None and self.other() is None
        same = (self.beta, self.versions[0]) == (beta, version)
        return same and not ended and not self.is_with(other)


# q, k and v (gate and up) have one Gram matrix: its factors, one per expert, live while it does
_FACTORS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _factored(own: Tensor, other: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """Return B and the Cholesky factor of A + B; computed once per pair of Gram matrices."""
    versions = tuple(G._version for G in (own, other) if G is not None)
    known: list[_Factored] = _FACTORS.setdefault(own, [])  # type: ignore[no-untyped-call]
    for each in known:
        if each.serves(other, beta, versions):
            return each.B, each.factor
    known[:] = [each for each in known if each.stays(other, beta, versions[0])]
    B = known[0].B if known else beta * _scaled(own)
    system = B.clone() if other is None else B + _scaled(other)
    rounding = _EPS * float(torch.linalg.matrix_norm(B))
    system.diagonal().add_(max(1.0 if other is None else RIDGE, rounding))
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise PlanError(
            "A Gram matrix is not positive semidefinite, so that it is invalid. Run the "
            "calibration again."
        )
    seen = None if other is None else WeakIdRef(other)
    known.append(_Factored(beta, seen, versions, B, factor))
    return B, factor
