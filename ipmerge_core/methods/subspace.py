"""Merge methods that work on the singular directions of task vectors: TSV, Iso-C, Iso-CTS, KnOTS.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Decompositions come from the spectral engine. A model whose task vector is zero, or
whose weight is 0, has no directions and takes no part; a single one that is left is taken whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.methods.blocks import result_dtype, task_vector_of
from ipmerge_core.methods.election import (
    LaterTrimKind,
    Normalize,
    OwnDensity,
    agreeing_sum_,
    densities_of,
    majority_sign,
    trimmed_,
)
from ipmerge_core.methods.elementwise import add_to_base, as_list
from ipmerge_core.methods.registry import (
    Coefficient,
    Density,
    Experts,
    Gain,
    Range,
    merge_method,
)
from ipmerge_core.methods.traits import Matrix
from ipmerge_core.spectrum import Spectrum, as_float, svd

ANEW = "the directions of all task vectors are combined anew"
Common: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="share of directions taken from the sum of all")
]
Cutoff: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="directions weaker than this times the first are dropped")
]


def living_task_vectors(
    base: Tensor, mllm: Tensor, experts: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """Weighted task vectors of the models that change something."""
    vectors = [
        weight * task_vector_of(matrix, base)
        for matrix, weight in zip([mllm, *experts], weights, strict=True)
    ]
    return [vector for vector in vectors if bool(vector.any())]


def mean_of_changes(parameters: Mapping[str, Any], experts: int) -> tuple[float, float]:
    """Weigh vectors, which have no directions to share: the mean of the weighted task vectors."""
    count = 1 + experts
    return parameters["mllm_weight"] / count, parameters["math_weight"] / count


def _start(
    base: Tensor, mllm: Tensor, math: Experts, mllm_weight: float, math_weight: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    experts = as_list(math)
    weights = [mllm_weight] + [math_weight] * len(experts)
    dtype = result_dtype(base, mllm, *experts)
    vectors = living_task_vectors(base, mllm, experts, weights)
    return as_float(base).to(dtype), as_float(mllm).to(dtype), [v.to(dtype) for v in vectors]


def polar(matrix: Float[Tensor, "m r"]) -> Float[Tensor, "m r"]:
    """Nearest matrix with orthonormal columns; the least one where columns depend on each other.

    Math: A = P S Q^T -> P Q^T over the singular values that are not rounding.
    """
    found = svd(matrix)
    kept = _rounding(matrix) * found.S[0] < found.S
    U = _left(found)
    return U[:, kept] @ found.Vh[kept]


def orthogonalised_pair(
    A: Float[Tensor, "m k"], B: Float[Tensor, "m l"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m l"]]:
    """Polar factor of [A, B], both with orthonormal columns, from one small decomposition.

    Math:   A^T B = P diag(c) Q^T, x = 1 / sqrt(1 + c), y = 1 / sqrt(1 - c),
            a = (x + y) / 2, b = (x - y) / 2;  A' = A + [A P (a - 1) + B Q b] P^T and likewise B'.
            A shared direction (c = 1) has y = 0: both halves get the common part.
    """
    found = svd(A.T @ B, dtype=torch.float64)
    P, c, Q = _left(found).to(A), found.S.clamp(max=1.0), found.Vh.T.to(A)
    x = (1 + c).rsqrt()
    apart = 1 - c > 4 * _rounding(A)
    y = torch.where(apart, (1 - c).clamp(min=_rounding(A)).rsqrt(), 0.0)
    a, b = ((x + y) / 2).to(A), ((x - y) / 2).to(A)
    AP, BQ = A @ P, B @ Q
    first = A + (AP * (a - 1) + BQ * b) @ P.T
    second = B + (AP * b + BQ * (a - 1)) @ Q.T
    return first, second


def _rounding(matrix: Tensor) -> float:
    return max(matrix.shape) * torch.finfo(matrix.dtype).eps


def _left(found: Spectrum) -> Tensor:
    assert found.U is not None, "svd without U"
    return found.U


@merge_method(
    label="TSV-Merge",
    source="arXiv 2412.00081",
    formula="W = W0 + s U' diag(S) V'^T, U', V' nearest orthonormal to the stacked top r / T",
    several_experts=True,
    unknown=ANEW,
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
) -> Matrix:
    """Keep the top directions of every task vector and make them orthogonal to each other.

    Math:   a_i tau_i = U_i S_i V_i^T, the first k = int(min(m, n) / T) triplets; U = [U_1 .. U_T],
            V likewise; U' = polar(U), V' = polar(V); W = W0 + s U' diag(S_1 .. S_T) V'^T.
            For T = 2 the polar factors come from the k x k overlap U_1^T U_2.
    Shapes: all (m, n). T counts the models whose task vector is not zero; one alone is taken
            whole. Matrices with fewer than T rows or columns get the mean of the task vectors.
    Source: Task Singular Vectors, arXiv 2412.00081, where a_i = 1. Directions that two models share
            have no unique polar factor; here both halves get the common direction.
    """
    W0, W_v, vectors = _start(base, mllm, math, mllm_weight, math_weight)
    if len(vectors) < 2:
        return add_to_base(W0, W_v, vectors[0] if vectors else torch.zeros_like(W0), scale)
    k = min(W0.shape) // len(vectors)
    if k == 0:
        return add_to_base(W0, W_v, torch.stack(vectors).mean(0), scale)
    found = [svd(vector, rank=k) for vector in vectors]
    lefts, rights = [_left(s) for s in found], [s.Vh.T for s in found]
    if len(found) == 2:
        lefts = list(orthogonalised_pair(lefts[0], lefts[1]))
        rights = list(orthogonalised_pair(rights[0], rights[1]))
    else:
        lefts = list(torch.split(polar(torch.cat(lefts, dim=1)), k, dim=1))
        rights = list(torch.split(polar(torch.cat(rights, dim=1)), k, dim=1))
    delta = torch.zeros_like(W0)
    for left, spectrum, right in zip(lefts, found, rights, strict=True):
        delta.addmm_(left * spectrum.S, right.T)
    return add_to_base(W0, W_v, delta, scale)


def _numerical_rank(found: Spectrum, shape: torch.Size) -> int:
    bound = max(shape) * torch.finfo(found.S.dtype).eps * found.S[0]
    return int((bound < found.S).sum())


@merge_method(
    label="Iso-C",
    source="arXiv 2502.04959",
    formula="W = W0 + s mean(S) U V^T, U S V^T = sum_i a_i dW_i",
    several_experts=True,
    unknown=ANEW,
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
) -> Matrix:
    """Sum the task vectors and make all directions of the sum equally strong.

    Math:   sum_i a_i tau_i = U S V^T; W = W0 + s mean(S) U V^T over the r directions that are not
            rounding, so that a low-rank sum is not filled up with noise.
    Shapes: all (m, n).
    Source: Isotropic merging, arXiv 2502.04959, where a_i = 1 and s is tuned.
    """
    W0, W_v, vectors = _start(base, mllm, math, mllm_weight, math_weight)
    delta = torch.zeros_like(W0)
    if vectors:
        found = svd(torch.stack(vectors).sum(0))
        r = _numerical_rank(found, W0.shape)
        if r:
            delta = found.S[:r].mean() * _left(found)[:, :r] @ found.Vh[:r]
    return add_to_base(W0, W_v, delta, scale)


@merge_method(
    label="Iso-CTS",
    source="arXiv 2502.04959",
    formula="W = W0 + s mean(S) U' V'^T, common directions of the sum and task-specific ones",
    several_experts=True,
    unknown=ANEW,
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
) -> Matrix:
    """Keep the common directions of the sum, fill up with each task's own, level all.

    Math:   r = min(m, n); t = round((r - int(f r)) / T) directions per task (half to even), the
            first c = r - T t of sum_i a_i tau_i are common: U_c, S_c, V_c. Per task the first t of
            (I - U_c U_c^T) a_i tau_i. [tasks .., common] stacked; U' and V' their polar factors;
            W = W0 + s mean(all S) U' V'^T.
    Shapes: all (m, n). Directions that are rounding are left out; f = 1 is `iso_c`.
    Source: Isotropic merging in common and task-specific subspaces, arXiv 2502.04959.
    """
    W0, W_v, vectors = _start(base, mllm, math, mllm_weight, math_weight)
    if not vectors:
        return add_to_base(W0, W_v, torch.zeros_like(W0), scale)
    r, tasks = min(W0.shape), len(vectors)
    own = round((r - int(r * common_fraction)) / tasks)
    whole = svd(torch.stack(vectors).sum(0))
    common = _first(whole, min(r - own * tasks, _numerical_rank(whole, W0.shape)))
    parts = []
    if own:
        U_c = common[0]
        for vector in vectors:
            found = svd(vector - U_c @ (U_c.T @ vector), rank=own)
            floor = _rounding(vector) * torch.linalg.matrix_norm(vector)
            parts.append(_first(found, int((floor < found.S).sum())))
    parts.append(common)
    strengths = torch.cat([S for _, S, _ in parts])
    if not len(strengths):
        return add_to_base(W0, W_v, torch.zeros_like(W0), scale)
    left = polar(torch.cat([U for U, _, _ in parts], dim=1))
    right = polar(torch.cat([V for _, _, V in parts], dim=1))
    return add_to_base(W0, W_v, strengths.mean() * left @ right.T, scale)


def _first(found: Spectrum, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return _left(found)[:, :count], found.S[:count], found.Vh[:count].T


@merge_method(
    label="KnOTS with TIES",
    source="arXiv 2410.19735",
    formula="W = W0 + s U ties(U^T dW_v, U^T dW_e), U from the SVD of [dW_v | dW_e]",
    several_experts=True,
    unknown=ANEW,
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
    """Write all task vectors in one shared basis of outputs and merge them there with TIES.

    Math:   [tau_1 | .. | tau_T] = U S [V_1^T | .. | V_T^T]; P_i = S V_i^T = U^T tau_i over the
            S above the cutoff; delta = U ties(P_1 .. P_T) with the trim of exactly int(density N)
            elements each, or the official one of `ties`, and the unweighted majority of signs;
            W = W0 + s delta. A density of its own overrides the shared one.
    Shapes: all (m, n); the decomposed matrix is (m, T n). With density 1 and no conflict of signs
            this is the mean of what is kept, or task arithmetic with normalize "none".
    Source: KnOTS, arXiv 2410.19735, with the election and mean of the TIES paper; the authors'
            code trims as trim "official" does. The cutoff is relative here (1e-5 absolute in the
            authors' code), so small changes survive.
    """
    W0, W_v, vectors = _start(base, mllm, math, 1.0, 1.0)
    if not vectors:
        return add_to_base(W0, W_v, torch.zeros_like(W0), scale)
    models = [task_vector_of(matrix, base).to(W0) for matrix in (mllm, *as_list(math))]
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
