"""Merge methods on singular vectors of task vectors: TSV, Iso-C, Iso-CTS and KnOTS.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Decompositions come from `spectral/`. A model whose task vector is zero, or
whose weight is 0, has no directions and is not used; a single remaining model keeps all directions.
In KnOTS every model votes, as in TIES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.methods.blocks import result_dtype, task_vector_of
from ipmerge_core.methods.declarations import Matrix
from ipmerge_core.methods.elementwise import add_to_base
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import (
    Changes,
    Coefficient,
    Density,
    Experts,
    Gain,
    Noise,
    as_list,
    merge_method,
)
from ipmerge_core.methods.sign_election import (
    LaterTrimKind,
    Normalize,
    OwnDensity,
    agreeing_sum_,
    densities_of,
    majority_sign,
    trimmed_,
)
from ipmerge_core.spectral.low_rank import LowRank, sum_of
from ipmerge_core.spectral.spectrum import EXISTS, Spectrum, as_float, existing, noise_floor, svd
from ipmerge_core.spectral.svd_algorithms import RESOLUTION

_NEAR = 3e-3  # 1 - c below which fp32 does not resolve the angle between two directions
SHARED = 2e-5  # relative singular value below which stacked directions count as identical
RECOMBINED = "it recombines the singular directions of all task vectors"
Common: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="share of directions from the sum of all task vectors")
]
Cutoff: TypeAlias = Annotated[
    float,
    Range(low=0, high=1, help="drop directions below this fraction of the largest singular value"),
]


class Change(NamedTuple):
    """A weighted task vector a dW, the norm of its rounding noise, and its factors if known."""

    vector: Tensor
    noise: float
    low_rank: LowRank | None = None

    @property
    def arithmetic_noise(self) -> float:
        """The rounding noise, or that of arithmetic on a vector of this norm, if larger."""
        size = float(torch.linalg.matrix_norm(self.vector, dtype=torch.float64))
        return max(self.noise, RESOLUTION / EXISTS * size)

    def existing(
        self, *, method: str = "auto", rank: int | None = None, dtype: torch.dtype | None = None
    ) -> Spectrum:
        """Decompose the vector, from its factors if known, and keep the existing directions."""
        if self.low_rank is None:
            return existing(self.vector, self.noise, method=method, rank=rank, dtype=dtype)
        return self.low_rank.existing(rank=rank, dtype=dtype or self.vector.dtype, noise=self.noise)

    def without(self, directions: Float[Tensor, "m c"]) -> Change:
        """Return (I - U U^T) a dW in fp64 for orthonormal columns U, with its arithmetic noise."""
        vector, factors = self.vector.double(), self.low_rank
        rest = vector - directions @ (directions.T @ vector)
        known = None if factors is None else factors.without(directions)
        return Change(rest, self.arithmetic_noise, known)


def changes_of(
    base: Tensor,
    mllm: Tensor,
    experts: Sequence[Tensor],
    weights: Sequence[float],
    noise: Sequence[float] | None = None,
    low_rank: Sequence[LowRank | None] | None = None,
) -> list[Change]:
    """Return the non-zero weighted task vectors in the result's precision."""
    dtype = result_dtype(base, mllm, *experts)
    models = [mllm, *experts]
    floors = noise or [noise_floor(model, base) for model in models]
    vectors = [task_vector_of(model, base).to(dtype) for model in models]
    known = low_rank or [None] * len(models)
    return [
        Change(
            vector if weight == 1 else weight * vector,
            abs(weight) * floor,
            factors and factors.scaled(weight),
        )
        for vector, weight, floor, factors in zip(vectors, weights, floors, known, strict=True)
        if weight and bool(vector.any())
    ]


def mean_of_changes(parameters: Mapping[str, Any], experts: int) -> tuple[float, float]:
    """Return the weights for vectors, which have no directions: the mean of the task vectors.

    As for matrices, a model whose weight is 0 does not count.
    """
    weights = parameters["mllm_weight"], parameters["math_weight"]
    count = (weights[0] != 0) + experts * (weights[1] != 0)
    return weights[0] / max(1, count), weights[1] / max(1, count)


def start(
    base: Tensor,
    mllm: Tensor,
    math: Experts,
    mllm_weight: float,
    math_weight: float,
    noise: Sequence[float] | None,
    low_rank: Sequence[LowRank | None] | None,
) -> tuple[Tensor, Tensor, list[Change]]:
    """Return the base and the MLLM in the result's precision, and the weighted changes."""
    experts = as_list(math)
    weights = [mllm_weight] + [math_weight] * len(experts)
    dtype = result_dtype(base, mllm, *experts)
    changes = changes_of(base, mllm, experts, weights, noise, low_rank)
    return as_float(base).to(dtype), as_float(mllm).to(dtype), changes


def polar(matrix: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """Return the polar factor: the nearest matrix with orthonormal columns.

    Math: A = P S Q^T -> P Q^T over the singular values above `SHARED` S_1, which is of lower rank
          if columns are linearly dependent.
    """
    found = svd(matrix, floor=0.0)
    found = found.above(SHARED * float(found.S[0]))
    return _left(found) @ found.Vh


def orthogonalised_pair(
    A: Float[Tensor, "m k"], B: Float[Tensor, "m l"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m l"]]:
    """Compute the polar factor of [A, B], both with orthonormal columns, from one small SVD.

    Math:   A^T B = P diag(c) Q^T, x = 1 / sqrt(1 + c), y = 1 / sqrt(1 - c),
            a = (x + y) / 2, b = (x - y) / 2;  A' = A + [A P (a - 1) + B Q b] P^T and likewise B'.
            The overlap is multiplied in fp64. For nearly identical directions 1 - c is still mostly
            rounding of A and B; these few columns of A P and B Q are stacked, and their polar
            factor is computed in fp64.
    """
    found = svd(A.double().T @ B.double())
    P, c, Q = _left(found), found.S, found.Vh.T
    near = 1 - c < _NEAR
    x, y = (1 + c).rsqrt(), (1 - c).clamp(min=_NEAR).rsqrt()
    a, b = ((x + y) / 2).to(A), ((x - y) / 2).to(A)
    a[near], b[near] = 0.0, 0.0
    AP, BQ = A @ P.to(A), B @ Q.to(A)
    first = A + (AP * (a - 1) + BQ * b) @ P.to(A).T
    second = B + (AP * b + BQ * (a - 1)) @ Q.to(A).T
    if bool(near.any()):
        P, Q = P[:, near], Q[:, near]
        both = polar(torch.cat([A.double() @ P, B.double() @ Q], dim=1))
        first += (both[:, : P.shape[1]] @ P.T).to(A)
        second += (both[:, P.shape[1] :] @ Q.T).to(A)
    return first, second


def _orthogonalised(parts: Sequence[Tensor]) -> list[Tensor]:
    """Compute the polar factor of stacked parts with orthonormal columns, and split it again."""
    if len(parts) == 2:
        return list(orthogonalised_pair(parts[0], parts[1]))
    sizes = [part.shape[1] for part in parts]
    return list(torch.split(polar(torch.cat(list(parts), dim=1)), sizes, dim=1))


def _left(found: Spectrum) -> Tensor:
    assert found.U is not None, "svd without U"
    return found.U


@merge_method(
    label="TSV-Merge",
    source="arXiv 2412.00081",
    formula="W = W0 + s U' diag(S) V'^T, U', V' nearest orthonormal to the stacked top r / T",
    several_experts=True,
    unknown=RECOMBINED,
    vectors=mean_of_changes,
    matrixwise=True,
)
def tsv(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 1.0,
    scale: Gain = 1.0,
    noise: Noise = None,
    low_rank: Changes = None,
) -> Matrix:
    """Keep the top singular directions of every task vector and orthogonalise them.

    Math:   a_i tau_i = U_i S_i V_i^T, restricted to the existing ones (`spectrum.existing`) of
            the first k = int(min(m, n) / T) triplets; U = [U_1 .. U_T], V likewise;
            U' = polar(U), V' = polar(V); W = W0 + s U' diag(S_1 .. S_T) V'^T.
            For T = 2 the polar factors are computed from the k x k overlap U_1^T U_2.
    Shapes: all (m, n). T is the number of non-zero task vectors; a single one is used unchanged.
            Matrices with fewer than T rows or columns get the mean of the task vectors.
    Source: Task Singular Vectors, arXiv 2412.00081, where a_i = 1 and all directions are used. The
            polar factor of directions shared by two models is not unique; here both get the
            common direction.
    """
    W0, W_v, changes = start(base, mllm, math, mllm_weight, math_weight, noise, low_rank)
    vectors = [change.vector for change in changes]
    if len(vectors) < 2:
        return add_to_base(W0, W_v, vectors[0] if vectors else torch.zeros_like(W0), scale)
    k = min(W0.shape) // len(vectors)
    if k == 0:
        return add_to_base(W0, W_v, torch.stack(vectors).mean(0), scale)
    spectra = [change.existing(method="gram", rank=k) for change in changes]
    found = [spectrum for spectrum in spectra if len(spectrum.S)]
    delta = torch.zeros_like(W0)
    if found:
        lefts = _orthogonalised([_left(spectrum) for spectrum in found])
        rights = _orthogonalised([spectrum.Vh.T for spectrum in found])
        for left, spectrum, right in zip(lefts, found, rights, strict=True):
            delta.addmm_(left * spectrum.S, right.T)
    return add_to_base(W0, W_v, delta, scale)


@merge_method(
    label="Iso-C",
    source="arXiv 2502.04959",
    formula="W = W0 + s mean(S) U V^T, U S V^T = sum_i a_i dW_i",
    several_experts=True,
    unknown=RECOMBINED,
    vectors=mean_of_changes,
    matrixwise=True,
)
def iso_c(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 1.0,
    scale: Gain = 1.0,
    noise: Noise = None,
    low_rank: Changes = None,
) -> Matrix:
    """Sum the task vectors and equalise the singular values of the sum.

    Math:   sum_i a_i tau_i = U S V^T; W = W0 + s mean(S) U V^T over the directions that exist
            (`spectrum.existing`), so that noise is not amplified in a low-rank sum.
    Shapes: all (m, n).
    Source: Isotropic merging, arXiv 2502.04959, where a_i = 1 and s is tuned.
    """
    W0, W_v, changes = start(base, mllm, math, mllm_weight, math_weight, noise, low_rank)
    delta = torch.zeros_like(W0)
    if changes:
        found = _sum(changes).existing()
        if len(found.S):
            delta = found.S.mean() * _left(found) @ found.Vh
    return add_to_base(W0, W_v, delta, scale)


@merge_method(
    label="Iso-CTS",
    source="arXiv 2502.04959",
    formula="W = W0 + s mean(S) U' V'^T, common directions of the sum and task-specific ones",
    several_experts=True,
    unknown=RECOMBINED,
    vectors=mean_of_changes,
    matrixwise=True,
)
def iso_cts(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    common_fraction: Common = 0.8,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 1.0,
    scale: Gain = 1.0,
    noise: Noise = None,
    low_rank: Changes = None,
) -> Matrix:
    """Combine common directions of the sum with task-specific ones and equalise their strength.

    Math:   r = min(m, n); t = round((r - int(f r)) / T) directions per task (half to even), the
            first c = r - T t of sum_i a_i tau_i are common: U_c, S_c, V_c. Per task the first t of
            (I - U_c U_c^T) a_i tau_i. [tasks .., common] stacked; U' and V' their polar factors;
            W = W0 + s mean(all S) U' V'^T.
    Shapes: all (m, n). Directions that do not exist (`spectrum.existing`) are omitted; f = 1 is
            `iso_c`. Decomposed in fp64, since the task-specific residual is small.
    Source: Isotropic merging in common and task-specific subspaces, arXiv 2502.04959.
    """
    W0, W_v, changes = start(base, mllm, math, mllm_weight, math_weight, noise, low_rank)
    if not changes:
        return add_to_base(W0, W_v, torch.zeros_like(W0), scale)
    r, tasks = min(W0.shape), len(changes)
    own = round((r - int(r * common_fraction)) / tasks)
    common = _sum(changes).existing(dtype=torch.float64).leading(r - own * tasks)
    rests = [change.without(_left(common)) for change in changes if own]
    parts = [rest.existing(dtype=torch.float64).leading(own) for rest in rests]
    parts.append(common)
    strengths = torch.cat([part.S for part in parts])
    if not len(strengths):
        return add_to_base(W0, W_v, torch.zeros_like(W0), scale)
    left = polar(torch.cat([_left(part) for part in parts], dim=1))
    right = polar(torch.cat([part.Vh.T for part in parts], dim=1))
    return add_to_base(W0, W_v, (strengths.mean() * left @ right.T).to(W0), scale)


def _sum(changes: Sequence[Change]) -> Change:
    """Sum task vectors and their noise.

    Math:   half of a task vector's noise variance is the base's, which all share, half its own:
            n^2 = (sum_i n_i^2 + (sum_i n_i)^2) / 2.
    """
    noise = [change.noise for change in changes]
    known = [change.low_rank for change in changes if change.low_rank is not None]
    return Change(
        torch.stack([change.vector for change in changes]).sum(0),
        hypot(sum(noise), *noise) / 2**0.5,
        sum_of(known) if len(known) == len(changes) else None,
    )


@merge_method(
    label="KnOTS with TIES",
    source="arXiv 2410.19735",
    formula="W = W0 + s U ties(U^T dW_v, U^T dW_e), U from the SVD of [dW_v | dW_e]",
    several_experts=True,
    unknown=RECOMBINED,
    vectors=mean_of_changes,
    matrixwise=True,
)
def knots_ties(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 1.0,
    density: Density = 0.2,
    mllm_density: OwnDensity = None,
    math_density: OwnDensity = None,
    normalize: Normalize = "weights",
    trim: LaterTrimKind = "exact",
    cutoff: Cutoff = 1e-5,
    scale: Gain = 1.0,
) -> Matrix:
    """Express all task vectors in a shared output basis and merge them there with TIES.

    Math:   [tau_1 | .. | tau_T] = U S [V_1^T | .. | V_T^T]; P_i = S V_i^T = U^T tau_i over the
            S above the cutoff; delta = U ties(P_1 .. P_T) with a trim of exactly int(density N)
            elements each, or the official one of `ties`, and the unweighted majority of signs;
            W = W0 + s delta. Per-model densities override the shared one.
    Shapes: all (m, n); the decomposed matrix is (m, T n). With density 1 and no sign conflicts
            this is the mean of the kept elements, or task arithmetic with normalize "none".
    Source: KnOTS, arXiv 2410.19735, with the election and mean of the TIES paper; the authors'
            code trims like trim "official". The cutoff is relative here (1e-5 absolute in the
            authors' code), so that small changes are kept.
    """
    tuned = [mllm, *as_list(math)]
    dtype = result_dtype(base, *tuned)
    W0, W_v = as_float(base).to(dtype), as_float(mllm).to(dtype)
    models = [task_vector_of(matrix, base).to(dtype) for matrix in tuned]
    if not any(bool(model.any()) for model in models):
        return add_to_base(W0, W_v, torch.zeros_like(W0), scale)
    found = svd(torch.cat(models, dim=1), dtype=torch.float64)
    U = _left(found)[:, cutoff * found.S[0] < found.S]
    parts = [U.T @ model.double() for model in models]
    densities = densities_of(density, mllm_density, math_density, len(parts) - 1)
    parts = [
        trimmed_(part, share, official=trim == "official")
        for part, share in zip(parts, densities, strict=True)
    ]
    weights = [mllm_weight] + [math_weight] * (len(models) - 1)
    merged = agreeing_sum_(parts, weights, normalize=normalize, default_sign=majority_sign(parts))
    return add_to_base(W0, W_v, (U @ merged).to(W0), scale)
