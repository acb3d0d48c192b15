"""Merge methods with sign election: TIES and SCE.

Where task vectors disagree in sign, one sign is elected per element and only the vectors with
that sign are added. In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in
fp32, or fp64 for fp64 inputs. Where public code differs from a paper, both behaviours are
available.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, TypeAlias, cast

import torch
from torch import Tensor

from ipmerge_core.methods.blocks import (
    TaskVectors,
    blockwise,
    blockwise_sum,
    result_dtype,
    squares,
    task_vector_of,
)
from ipmerge_core.methods.declarations import Matrix, ParameterValue, Statistic
from ipmerge_core.methods.elementwise import add_to_base_, changes_, merge_cut, weighted_sum_
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import (
    Coefficient,
    Density,
    Experts,
    Gain,
    WholeModel,
    as_list,
    merge_method,
)
from ipmerge_core.methods.selection import (
    bin_of_kth,
    keep_largest_,
    kth_largest,
    magnitude_histogram,
    magnitude_of,
    trims,
    zero_below,
)

UNREAD = "the kept elements depend on the weights, which a preview does not read"
_FORMER = ((False, "none"), (True, "weights"))  # values in plans from before "count" was added
Divisors: TypeAlias = Literal["none", "weights", "count", False, True]
_NORMALIZE = Range(
    help="divide by the total weight of the models that agree (then only math_weight / "
    "mllm_weight matters), or by their number",
    former=_FORMER,
)
_IF_ELECTED = (("elect", (True,)),)
Normalize: TypeAlias = Annotated[Divisors, _NORMALIZE]
ElectedNormalize: TypeAlias = Annotated[Divisors, replace(_NORMALIZE, only_with=_IF_ELECTED)]
OwnDensity: TypeAlias = (
    Annotated[float, Range(low=0, high=1, low_open=True, help="overrides the shared density")]
    | None
)
Elections: TypeAlias = Literal["weighted", "majority", "unweighted"]
_ELECTION = Range(
    help="elect signs by weighted sum, or unweighted; ties get the majority sign of the "
    "matrix (as in the paper), or +"
)
Election: TypeAlias = Annotated[Elections, _ELECTION]
LaterElection: TypeAlias = Annotated[Elections, replace(_ELECTION, before="weighted")]
ElectedElection: TypeAlias = Annotated[
    Elections, replace(_ELECTION, before="weighted", only_with=_IF_ELECTED)
]
TrimKinds: TypeAlias = Literal["exact", "official"]
_TRIM = Range(help="official keeps one more element, as in the code of the paper")
TrimKind: TypeAlias = Annotated[TrimKinds, _TRIM]
LaterTrimKind: TypeAlias = Annotated[TrimKinds, replace(_TRIM, before="exact")]
Whole: TypeAlias = Annotated[
    Literal["tensor", "model"], Range(help="threshold per matrix, or for the whole model")
]
Share: TypeAlias = Annotated[float, Range(low=0, high=1, help="fraction of positions kept")]


def agreeing_sum_(
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: Normalize = "none",
    default_sign: float | None = None,
    least_weight: float = 0.0,
) -> Tensor:
    """Add the weighted task vectors that have the elected sign, elementwise; overwrites them.

    Math:   d_i = w_i tau_i;  g = sign(sum_i d_i), zero counting as positive (weighted), or
            g = sign(sum_i tau_i), zero counting as `default_sign` (unweighted, if that is given);
            N = sum of the d_i of sign g;  divided by the sum of their w_i, or by their number.
    """
    # In-place arithmetic on whole blocks is several times faster than masks and `where` on a CPU.
    factors = list(weights)
    if default_sign is None:
        for factor, vector in zip(factors, vectors, strict=True):
            if factor != 1:
                vector.mul_(factor)
        factors = [1.0] * len(vectors)
    elected = _signs_(_sum(vectors), 1.0 if default_sign is None else default_sign)
    for vector in vectors:
        vector.mul_(elected).relu_()
    kind = dict(_FORMER).get(normalize, normalize) if isinstance(normalize, bool) else normalize
    counted = [1.0] * len(vectors) if kind == "count" else weights
    share = None if kind == "none" else _agreeing_weight(vectors, counted, least_weight)
    total = weighted_sum_(vectors, factors).mul_(elected)
    return total if share is None else total.div_(share)


def _signs_(votes: Tensor, default: float) -> Tensor:
    """Replace the votes by their signs; ties get the default (1, -1 or 0)."""
    if default == 0:
        return votes.sign_()
    if default < 0:
        votes.neg_().add_(0.0)  # avoid negative zero for ties
    torch.copysign(votes.new_ones(()), votes, out=votes)
    return votes.neg_() if default < 0 else votes


def _agreeing_weight(agreeing: Sequence[Tensor], weights: Sequence[float], least: float) -> Tensor:
    """Sum the weights of the models that agree, per element; at least `least` and never zero."""
    share = weighted_sum_([part.sign() for part in agreeing], weights)
    if least:
        return share.clamp_(min=least)
    return share.add_(share.abs().sign_().neg_().add_(1))  # 1 where it is zero


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0] + terms[1] if len(terms) > 1 else terms[0].clone()
    for term in terms[2:]:
        total.add_(term)
    return total


def votes(*vectors: Tensor) -> Tensor:
    """Sum the elementwise signs of sum_i tau_i over a block."""
    return _sum(vectors).sign_().sum(dtype=torch.float64)


def sign_of_ties(
    election: Elections,
    base: Tensor,
    tuned: Sequence[Tensor],
    cuts: Sequence[Callable[[Tensor], Tensor]],
) -> float | None:
    """Return the sign of an element with tied votes; None if votes are weighted."""
    if election == "majority":
        return _majority(base, tuned, cuts)
    return None if election == "weighted" else 1.0


def majority_sign(vectors: Sequence[Tensor]) -> float:
    """Return the sign of the sum of all elementwise signs of sum_i tau_i, used for ties."""
    return float(blockwise_sum(votes, *vectors).sign())


def densities_of(
    shared: float, mllm: float | None, math: float | None, experts: int
) -> list[float]:
    """Return the densities of the MLLM and every expert, by default the shared one."""
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
    """Return (prefix, rank within it) per model after the first pass, then the threshold."""
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
        k = kept_count(size, density, official=parameters["trim"] == "official")
        prefix, above = bin_of_kth(counts, k)
        found += [prefix, k - above]
    return tuple(found)


def kept_count(size: int, density: float, *, official: bool) -> int:
    """Return how many elements a trim keeps, not counting ties of an official one."""
    return min(max(1, int(density * size)) + official, size)


def trimmed_(values: Tensor, density: float, *, official: bool) -> Tensor:
    """Zero all but the largest magnitudes, in place if the trim is exact."""
    count = kept_count(values.numel(), density, official=official)
    if not official:
        return keep_largest_(values, count)
    (((threshold, _),),) = kth_largest(TaskVectors([values]), [[count]])
    return zero_below(values, threshold)


def _trims(
    base: Tensor,
    tuned: Sequence[Tensor],
    densities: Sequence[float],
    thresholds: Sequence[float] | None,
    *,
    official: bool,
) -> list[Callable[[Tensor], Tensor]]:
    """Return trims by this matrix's densities, or by given thresholds."""
    vectors = TaskVectors(tuned, base)
    if thresholds is None:
        counts = [[kept_count(vectors.size, share, official=official)] for share in densities]
        if not official:
            return [trim for (trim,) in trims(vectors, counts)]
        thresholds = [threshold for ((threshold, _),) in kth_largest(vectors, counts)]
    elif result_dtype(base, *tuned) == torch.float64:  # measured thresholds are fp32
        return [partial(_zero_below_in_fp32, threshold=threshold) for threshold in thresholds]
    return [partial(zero_below, threshold=threshold) for threshold in thresholds]


def _zero_below_in_fp32(block: Tensor, threshold: float) -> Tensor:
    return block.masked_fill(block.float().abs() < threshold, 0)


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
    normalize: Normalize = "none",
    election: Election = "weighted",
    trim: TrimKind = "exact",
    scope: Whole = "tensor",
    scale: Gain = 1.0,
    statistic: WholeModel = None,
) -> Matrix:
    """Trim the task vectors, elect a sign per element, and add those that agree.

    Math:   d_i = a_i trim(tau_i);  g = sign(sum_i d_i);  N = sum of the d_i of sign g;
            W = W0 + s N; with `normalize` W0 + s N / (sum of their a_i), or s N / (their number).
            trim keeps exactly the max(1, int(density * m n)) largest magnitudes, the first of equal
            ones; of the whole model with scope "model" (all equal to the threshold are kept).
    Shapes: all (m, n). Densities in (0, 1]; per-model densities override the shared one.
    Source: TIES-Merging, arXiv 2306.01708; per-tensor trim and weights inside the election as in
            mergekit. The paper: a_i = 1, normalize "weights", election "majority" (unweighted; a
            tied element gets the majority sign of the matrix), scope "model". The paper's code:
            trim "official", which keeps one more element, and all that equal the last. PEFT and
            the code of BR2V, arXiv 2505.05464: normalize "count", election "unweighted".

    With normalize "weights" only a_e / a_v matters, and an element that only one model kept gets
    its full task vector regardless of the weight.
    """
    tuned = [mllm, *as_list(math)]
    densities = densities_of(density, mllm_density, math_density, len(tuned) - 1)
    thresholds = statistic if scope == "model" else None
    cuts = _trims(base, tuned, densities, thresholds, official=trim == "official")
    weights = [mllm_weight] + [math_weight] * (len(tuned) - 1)
    tied = sign_of_ties(election, base, tuned, cuts)
    elect = partial(agreeing_sum_, weights=weights, normalize=normalize, default_sign=tied)
    return merge_cut(base, tuned, cuts, elect, scale)


def _majority(
    base: Tensor, tuned: Sequence[Tensor], cuts: Sequence[Callable[[Tensor], Tensor]]
) -> float:
    """Return the majority sign of all trimmed elements, without advancing the cuts."""
    fresh = [copy(cut) for cut in cuts]

    def of_block(*models: Tensor) -> Tensor:
        changes = changes_(*models)
        return votes(*(cut(change) for cut, change in zip(fresh, changes, strict=True)))

    return float(blockwise_sum(of_block, base, *tuned).sign())


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
    """Select the elements with the largest variance, weight models by energy, drop minority signs.

    Math:   keep the int(select_topk * #{var > 0}) positions of the largest variance over models;
            w_i = a_i mean(tau_i^2) / sum_j mean(tau_j^2); g = sign(sum_i tau_i);
            W = W0 + sum_(agreeing) w_i tau_i / max(sum_(agreeing) w_i, 1e-6).
    Shapes: all (m, n). With one expert the variance is (tau_v - tau_e)^2 / 4: disagreement.
    Source: SCE of FuseChat, arXiv 2408.07990, where a_i = 1; the a_i are an addition.
    """
    tuned = [mllm, *as_list(math)]
    masks = [_most_different(base, tuned, select_topk)] if select_topk < 1 else []

    def selected(W0: Tensor, *rest: Tensor) -> list[Tensor]:
        vectors = changes_(W0, *rest[: len(tuned)])
        for mask in rest[len(tuned) :]:
            vectors = [vector.mul_(mask) for vector in vectors]
        return vectors

    energies = blockwise_sum(lambda *W: squares(*selected(*W)), base, *tuned, *masks).tolist()
    total = sum(energies)
    gains = [mllm_weight] + [math_weight] * (len(tuned) - 1)
    weights = [
        gain * (energy / total if total > 0 else 1 / len(energies))
        for gain, energy in zip(gains, energies, strict=True)
    ]

    def merge(W0: Tensor, W_v: Tensor, *rest: Tensor) -> Tensor:
        # Unweighted election; ties are positive, as in the weighted form.
        vectors = selected(W0, W_v, *rest)
        delta = agreeing_sum_(
            vectors, weights, normalize="weights", default_sign=1.0, least_weight=1e-6
        )
        return add_to_base_(W0, W_v, delta)

    return blockwise(merge, base, *tuned, *masks)


def _most_different(base: Tensor, tuned: Sequence[Tensor], share: float) -> Tensor:
    """Return a 0/1 mask of the share of non-constant positions with the largest variance."""
    variance = blockwise(lambda *models: _variance(*changes_(*models)), base, *tuned)
    return keep_largest_(variance, int(share * int(variance.count_nonzero()))).sign_()


def _variance(*vectors: Tensor) -> Tensor:
    """Compute the population variance over the models, per position."""
    mean = _sum(vectors) / len(vectors)
    return _sum([(vector - mean).square() for vector in vectors]) / len(vectors)
