"""Sign election, and the merge methods built on it: TIES and SCE.

Where task vectors disagree in sign, one sign is elected for the element and only the vectors that
have it are added. In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in
fp32, or fp64 for fp64 inputs. Where public code differs from a paper, both behaviours are choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeAlias, cast

import torch
from torch import Tensor

from ipmerge_core.methods.blocks import TaskVector, blocks, blockwise, inner, task_vector_of
from ipmerge_core.methods.elementwise import add_to_base_, as_list
from ipmerge_core.methods.registry import (
    Coefficient,
    Density,
    Experts,
    Gain,
    Range,
    WholeModel,
    merge_method,
)
from ipmerge_core.methods.selection import (
    Trim,
    bin_of_kth,
    keep_largest_,
    kth_largest,
    magnitude_histogram,
    magnitude_of,
    zero_below,
)
from ipmerge_core.methods.traits import Matrix, ParameterValue, Statistic

UNREAD = "which elements are kept is known only when the weights are read"
Normalize: TypeAlias = Annotated[
    bool,
    Range(help="divide by the weights of what agrees: only math_weight / mllm_weight matters then"),
]
OwnDensity: TypeAlias = (
    Annotated[float, Range(low=0, high=1, low_open=True, help="in place of the shared density")]
    | None
)
Election: TypeAlias = Annotated[
    Literal["weighted", "majority"],
    Range(help="signs are elected by weighted sum, or unweighted as in the paper"),
]
TrimKind: TypeAlias = Annotated[
    Literal["exact", "official"], Range(help="official keeps one element more, as the paper's code")
]
Whole: TypeAlias = Annotated[
    Literal["tensor", "model"], Range(help="one threshold per matrix, or one for the whole model")
]
Share: TypeAlias = Annotated[float, Range(low=0, high=1, help="fraction of positions kept")]


def agreeing_sum_(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = False,
    default_sign: float | None = None,
    least_weight: float = 0.0,
) -> Tensor:
    """Add the weighted task vectors whose sign is the elected one, elementwise; overwrites them.

    Math:   d_i = w_i tau_i;  g = sign(sum_i d_i), zero counting as positive (weighted), or
            g = sign(sum_i tau_i), zero counting as `default_sign` (majority, if that is given);
            N = sum of the d_i of sign g;  divided by the sum of their w_i if `normalize`.
    """
    # Arithmetic in place on whole blocks: several times faster than masks and `where` on a CPU.
    factors = list(weights)
    if default_sign is None:
        for factor, vector in zip(factors, vectors, strict=True):
            vector.mul_(factor)
        factors = [1.0] * len(vectors)
        vote = _sum(vectors)
        elected = torch.copysign(vote.new_ones(()), vote, out=vote)
    else:
        elected = _sum(vectors).sign_()
        if default_sign:
            elected += default_sign * (elected == 0)
    for vector in vectors:
        vector.mul_(elected).clamp_(min=0)
    share = _agreeing_weight(vectors, weights, least_weight) if normalize else None
    total = vectors[0].mul_(factors[0])
    for factor, vector in zip(factors[1:], vectors[1:], strict=True):
        total.add_(vector, alpha=factor)
    total.mul_(elected)
    return total if share is None else total.div_(share)


def _agreeing_weight(agreeing: Sequence[Tensor], weights: Sequence[float], least: float) -> Tensor:
    """Sum the weights of the models that agree, per element: at least `least`, and never zero."""
    share = torch.zeros_like(agreeing[0])
    for weight, part in zip(weights, agreeing, strict=True):
        share.add_(part.sign(), alpha=weight)
    return share.clamp_(min=least) if least else share.add_(share == 0)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def majority_sign(vectors: Sequence[Tensor]) -> float:
    """Sign of the sum of all elementwise signs of sum_i tau_i: what a tied element gets."""
    flat = [vector.reshape(-1) for vector in vectors]
    votes = 0.0
    for block in blocks(flat[0]):
        summed = _sum([vector[block] for vector in flat])
        votes += float(summed.sign().sum(dtype=torch.float64))
    return float((votes > 0) - (votes < 0))


def densities_of(
    shared: float, mllm: float | None, math: float | None, experts: int
) -> list[float]:
    """Densities of the MLLM and of every expert; the shared one where none of their own is set."""
    return [shared if density is None else density for density in [mllm, *([math] * experts)]]


def _measure_magnitudes(
    base: Tensor,
    mllm: Tensor,
    experts: Sequence[Tensor],
    previous: tuple[float, ...],
    **parameters: ParameterValue,
) -> Tensor:
    prefixes: list[int | None] = [int(prefix) for prefix in previous[::2]]
    prefixes = prefixes or [None] * (1 + len(experts))
    return torch.stack(
        [
            magnitude_histogram(task_vector_of(tuned, base), prefix)
            for tuned, prefix in zip([mllm, *experts], prefixes, strict=True)
        ]
    )


def _combine_magnitudes(
    total: Tensor, previous: tuple[float, ...], **parameters: ParameterValue
) -> tuple[float, ...]:
    """After the first pass (prefix, rank below it) per model, after the second its threshold."""
    if previous:
        pairs = zip(previous[::2], previous[1::2], strict=True)
        return tuple(
            magnitude_of(int(prefix), bin_of_kth(counts, int(rank))[0])
            for (prefix, rank), counts in zip(pairs, total, strict=True)
        )
    found: list[float] = []
    names = ("density", "mllm_density", "math_density")
    shared, mllm, math = (cast("float", parameters[name]) for name in names)
    densities = densities_of(shared, mllm, math, len(total) - 1)
    for counts, density in zip(total, densities, strict=True):
        size = int(counts.sum())
        k = _count(size, density, official=parameters["trim"] == "official")
        prefix, above = bin_of_kth(counts, k)
        found += [prefix, k - above]
    return tuple(found)


def _count(size: int, density: float, *, official: bool) -> int:
    return min(max(1, int(density * size)) + official, size)


def _trim_of(
    source: TaskVector, density: float, threshold: float | None, *, official: bool
) -> Callable[[Tensor], Tensor]:
    """Zero all but the largest magnitudes: by this matrix' density or by a threshold."""
    if threshold is None:
        count = _count(source.numel(), density, official=official)
        if not official:
            return Trim(source, count)
        threshold = kth_largest(source, count)[0]
    elif source.dtype == torch.float64:  # measured thresholds are fp32
        return lambda block: block.masked_fill(block.float().abs() < threshold, 0)
    return lambda block: zero_below(block, threshold)


@merge_method(
    label="TIES",
    source="arXiv 2306.01708",
    formula="W = W0 + s sum of the trimmed a_i dW_i that have the elected sign",
    several_experts=True,
    unknown=UNREAD,
    statistic=Statistic(_measure_magnitudes, _combine_magnitudes, passes=2),
)
def ties(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 0.3,
    density: Density = 0.2,
    mllm_density: OwnDensity = None,
    math_density: OwnDensity = None,
    normalize: Normalize = False,
    election: Election = "weighted",
    trim: TrimKind = "exact",
    scope: Whole = "tensor",
    scale: Gain = 1.0,
    statistic: WholeModel = None,
) -> Matrix:
    """Trim the task vectors, elect a sign for every element, add what agrees with it.

    Math:   d_i = a_i trim(tau_i);  g = sign(sum_i d_i);  N = sum of the d_i of sign g;
            W = W0 + s N, or W0 + s N / (sum of their a_i) with `normalize`.
            trim keeps exactly max(1, int(density * m n)) largest magnitudes, of equal ones the
            first; of the whole model with scope "model" (all equal to the threshold are kept).
    Shapes: all (m, n). Densities in (0, 1]; a density of its own overrides the shared one.
    Source: TIES-Merging, arXiv 2306.01708; per-tensor trim and weights inside the election as in
            mergekit. The paper: a_i = 1, normalize, election "majority" (unweighted; a tied element
            gets the majority sign of the matrix), scope "model". The paper's code: trim "official",
            which keeps one element more, and all that equal the last.

    With `normalize` only a_e / a_v matters, and an element that one model alone kept gets its full
    task vector whatever its weight.
    """
    tuned = [mllm, *as_list(math)]
    densities = densities_of(density, mllm_density, math_density, len(tuned) - 1)
    thresholds = statistic if scope == "model" and statistic else [None] * len(tuned)
    trims = [
        _trim_of(TaskVector(matrix, base), share, threshold, official=trim == "official")
        for matrix, share, threshold in zip(tuned, densities, thresholds, strict=True)
    ]
    weights = [mllm_weight] + [math_weight] * (len(tuned) - 1)

    def merge(W0: Tensor, *matrices: Tensor) -> Tensor:
        W_v, *experts = matrices
        changes = [W_v - W0, *(W_e.sub_(W0) for W_e in experts)]
        vectors = [cut(change) for cut, change in zip(trims, changes, strict=True)]
        delta = agreeing_sum_(vectors, weights, normalize=normalize)
        return add_to_base_(W0, W_v, delta, scale)

    if election == "weighted":
        return blockwise(merge, base, *tuned)
    trimmed = [
        blockwise(lambda W0, W, cut=cut: cut(W - W0), base, matrix)
        for cut, matrix in zip(trims, tuned, strict=True)
    ]
    tied = majority_sign(trimmed)

    def merge_by_majority(W0: Tensor, W_v: Tensor, *vectors: Tensor) -> Tensor:
        delta = agreeing_sum_(vectors, weights, normalize=normalize, default_sign=tied)
        return add_to_base_(W0, W_v, delta, scale)

    return blockwise(merge_by_majority, base, mllm, *trimmed)


@merge_method(
    label="SCE",
    source="arXiv 2408.07990",
    formula="W = W0 + weighted mean of the dW_i of the elected sign, w_i = a_i mean(dW_i^2)",
    several_experts=True,
    unknown=UNREAD,
)
def sce(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    select_topk: Share = 1.0,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 1.0,
) -> Matrix:
    """Select where the models differ most, weigh them by energy, erase minority signs.

    Math:   keep the int(select_topk * #{var > 0}) positions of the largest variance over models;
            w_i = a_i mean(tau_i^2) / sum_j mean(tau_j^2); g = sign(sum_i tau_i);
            W = W0 + sum_(agreeing) w_i tau_i / max(sum_(agreeing) w_i, 1e-6).
    Shapes: all (m, n). With one expert the variance is (tau_v - tau_e)^2 / 4: disagreement.
    Source: SCE of FuseChat, arXiv 2408.07990, where a_i = 1; the a_i are ours.
    """
    tuned = [mllm, *as_list(math)]
    vectors = [task_vector_of(matrix, base) for matrix in tuned]
    if select_topk < 1:
        variance = blockwise(_variance, *vectors)
        keep_largest_(variance, int(select_topk * int(variance.count_nonzero())))
        for vector in vectors:
            vector.masked_fill_(variance == 0, 0)
    energies = [inner(vector, vector) for vector in vectors]
    total = sum(energies)
    shares = [energy / total if total > 0 else 1 / len(energies) for energy in energies]
    weights = [
        gain * share
        for gain, share in zip([mllm_weight] + [math_weight] * len(vectors), shares, strict=False)
    ]

    def merge(W0: Tensor, W_v: Tensor, *parts: Tensor) -> Tensor:
        # Unweighted election; a tied element is positive, as in the weighted form.
        delta = agreeing_sum_(parts, weights, normalize=True, default_sign=1.0, least_weight=1e-6)
        return add_to_base_(W0, W_v, delta)

    return blockwise(merge, base, mllm, *vectors)


def _variance(*vectors: Tensor) -> Tensor:
    """Population variance over the models, position by position."""
    mean = _sum(vectors) / len(vectors)
    return _sum([(vector - mean).square() for vector in vectors]) / len(vectors)
