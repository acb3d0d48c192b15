"""Merge methods weighted by calibration data: Fisher merging and RegMean.

In: matrices of one shape (m, n) and, per model, the result of a calibration: the diagonal of the
Fisher information (m, n), or the Gram matrix of the inputs (n, n). Out: the merged matrix in fp32,
or fp64 for fp64 inputs. Reads no data; without measurements the methods raise PlanError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.methods.blocks import blockwise, blockwise_sum, result_dtype, squares
from ipmerge_core.methods.declarations import Matrix, Statistic
from ipmerge_core.methods.measurements import (
    FisherInput,
    FisherInputs,
    GramInput,
    GramInputs,
    checked,
)
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import Experts, WholeModel, as_list, merge_method

MllmShare: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="share of the MLLM; the experts split the rest")
]
OffDiagonal: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="factor on the off-diagonal entries of the Gram matrices")
]
Normalised: TypeAlias = Annotated[
    Literal["model", "tensor", "none"],
    Range(help="normalize the information by its norm over the model, the matrix, or not"),
]
Floor: TypeAlias = Annotated[
    float, Range(low=0, help="added to the Fisher information, see floor_is; 0 adds nothing")
]
FloorIs: TypeAlias = Annotated[
    Literal["relative", "absolute"],
    Range(
        help="the floor is relative to each model's mean information, or absolute",
        before="absolute",
    ),
]
_NOTHING = 1e-30  # only relevant if no model has any information and the floor is 0


def shares(alpha: float, experts: int) -> list[float]:
    """Return the MLLM's share alpha and the share of every expert."""
    return [alpha] + [(1 - alpha) / experts] * experts


def _mean_of_weights(parameters: Mapping[str, Any], experts: int) -> tuple[float, float]:
    """Return the weights for vectors, which are not calibrated: the models' shares."""
    own, other = shares(parameters["alpha"], experts)[:2]
    return own, other


def _measure_fisher(
    base: Tensor,
    mllm: Tensor,
    experts: Sequence[Tensor],
    previous: tuple[float, ...],
    *,
    mllm_fisher: Tensor,
    math_fisher: Experts,
    **parameters: Any,  # noqa: ANN401
) -> Tensor:
    found = [mllm_fisher, *as_list(math_fisher)]
    total = blockwise_sum(_squares_and_sums, *found).cpu()
    return torch.cat([total, total.new_tensor([mllm_fisher.numel()])])


def _combine_fisher(
    total: Tensor,
    previous: tuple[float, ...],
    **parameters: Any,  # noqa: ANN401
) -> tuple[float, ...]:
    *found, size = total.tolist()
    models = len(found) // 2
    norms = [square**0.5 for square in found[:models]]
    return (*norms, *(value / size for value in found[models:]))


def _squares_and_sums(*information: Tensor) -> Tensor:
    sums = [F.sum(dtype=torch.float64) for F in information]
    return torch.cat([squares(*information), torch.stack(sums)])


def _is_relative(floor: float, floor_is: str) -> bool:
    return floor_is == "relative" and floor > 0


def _numbers_of_fisher(parameters: Mapping[str, Any]) -> tuple[Literal["norm", "mean"], ...]:
    relative = _is_relative(parameters["floor"], parameters["floor_is"])
    return ("norm", "mean") if relative else ("norm",)


def _norms_and_means(
    information: Sequence[Tensor], whole: Sequence[float] | None, *, means: bool
) -> tuple[Sequence[float], Sequence[float]]:
    """Return norm and mean of every model's information, over the whole model or this matrix."""
    count = len(information)
    if whole is None:
        found = blockwise_sum(_squares_and_sums, *information).tolist()
        size = max(1, information[0].numel())
        return [square**0.5 for square in found[:count]], [sum_ / size for sum_ in found[count:]]
    if len(whole) not in ((2 * count,) if means else (count, 2 * count)):
        raise PlanError(
            f"Fisher merging got a statistic of {len(whole)} numbers for {count} models; expected "
            f"the norm of each model's information, then the mean of each."
        )
    return whole[:count], whole[count:]


@merge_method(
    label="Fisher merging",
    source="arXiv 2111.09832",
    formula="W = sum_i c_i (F_i + e_i) W_i / sum_i c_i (F_i + e_i), elementwise; "
    "e_i = floor mean(F_i)",
    several_experts=True,
    unknown="the change of every element depends on the calibration",
    anchor="interp",
    vectors=_mean_of_weights,
    statistic=Statistic(_measure_fisher, _combine_fisher, calibrated=_numbers_of_fisher),
    data="fisher",
)
def fisher(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    alpha: MllmShare = 0.5,
    floor: Floor = 1e-3,
    floor_is: FloorIs = "relative",
    scope: Normalised = "model",
    mllm_fisher: FisherInput = None,
    math_fisher: FisherInputs = None,
    statistic: WholeModel = None,
) -> Matrix:
    """Average every element, weighted by the Fisher information of each model.

    Math:   F_i = mean over samples of (d log p(y | x) / dW)^2, one sample at a time;
            w_i = c_i (F_i + e_i) / (||F_i|| + e_i);  W = sum_i w_i W_i / sum_i w_i.
            c is alpha for the MLLM; the experts split the rest. e_i is floor * mean(F_i), or floor
            if absolute. Norm and mean are computed over the calibrated matrices of the whole model
            (`statistic`), or over this one. With scope "none" the divisor ||F_i|| + e_i is 1 and
            the mean is that of this matrix.
    Shapes: W, F (m, n). Where no model has information, the result is the mean weighted by c.
    Raises: PlanError without F, ShapeError for a wrong shape.
    Source: Fisher-weighted averaging, arXiv 2111.09832. The floor is added for every model; the
            authors' code takes a maximum with it, by default for the first model only, and uses
            1e-6, which for models with billions of weights is thousands of times the mean.

    With a relative floor the result is independent of the scale of the information.
    """
    experts = as_list(math)
    label, what = "Fisher merging", "Fisher information"
    found = checked(label, what, [tuple(mllm.shape)], mllm_fisher, math_fisher, len(experts))
    relative = _is_relative(floor, floor_is)
    whole = statistic if scope == "model" else None
    norms, means = _norms_and_means(found, whole, means=relative)
    floors = [floor * mean for mean in means] if relative else [floor] * len(found)
    divisors = [norm + own for norm, own in zip(norms, floors, strict=True)]
    if scope == "none":
        divisors = [1.0] * len(found)
    coefficients = shares(alpha, len(experts))
    gains = [c / norm if norm > 0 else c for c, norm in zip(coefficients, divisors, strict=True)]

    def average(W_v: Tensor, *rest: Tensor) -> Tensor:
        others, information = rest[: len(experts)], rest[len(experts) :]
        weights = [
            gain * (F + own) + _NOTHING * share
            for gain, own, share, F in zip(gains, floors, coefficients, information, strict=True)
        ]
        total, change = weights[0].clone(), torch.zeros_like(W_v)
        for weight, W_e in zip(weights[1:], others, strict=True):
            total += weight
            change += weight * (W_e - W_v)
        return W_v + change / total

    return blockwise(average, mllm, *experts, *found)


@merge_method(
    label="RegMean",
    source="arXiv 2212.09849",
    formula="W^T = (sum_i c_i G_i)^-1 sum_i c_i G_i W_i^T, G_i = X_i^T X_i / tokens",
    several_experts=True,
    unknown="every matrix is the solution of a least-squares problem of the calibration",
    anchor="interp",
    vectors=_mean_of_weights,
    data="gram",
    matrixwise=True,
)
def regmean(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    off_diagonal: OffDiagonal = 0.9,
    alpha: MllmShare = 0.5,
    mllm_gram: GramInput = None,
    math_gram: GramInputs = None,
) -> Matrix:
    """Solve for the matrix whose outputs are closest to each model's on that model's inputs.

    Math:   G_i = X_i^T X_i / tokens, off-diagonal entries times `off_diagonal`;
            W^T = (sum_i c_i G_i)^-1 sum_i c_i G_i W_i^T, c = alpha for the MLLM; the experts split
            the rest. Solved in fp64 by Cholesky for the change from the mean sum_i c_i W_i, so
            that an input that is always zero gets the mean.
    Shapes: W (m, n), G (n, n), m outputs, n inputs; or (n,), its diagonal, if n is large.
    Raises: PlanError without G, ShapeError for a wrong shape.
    Source: RegMean, arXiv 2212.09849; its alpha is called `off_diagonal` here.
    """
    experts = as_list(math)
    n = mllm.shape[1]
    grams = checked("RegMean", "Gram matrix", [(n, n), (n,)], mllm_gram, math_gram, len(experts))
    models = [matrix.double() for matrix in (mllm, *experts)]
    coefficients = shares(alpha, len(experts))
    mean = models[0].clone()
    for share, model in zip(coefficients[1:], models[1:], strict=True):
        mean += share * (model - models[0])
    if off_diagonal == 0 or all(gram.ndim == 1 for gram in grams):
        change = _solve_diagonal(coefficients, grams, models, mean)
    else:
        left = torch.zeros(n, n, dtype=torch.float64, device=mllm.device)
        right = torch.zeros(n, mllm.shape[0], dtype=torch.float64, device=mllm.device)
        for share, gram, model in zip(coefficients, grams, models, strict=True):
            shrunk = torch.diag(gram.double()) if gram.ndim == 1 else gram.double() * off_diagonal
            shrunk.diagonal().copy_(gram if gram.ndim == 1 else gram.diagonal())
            left.add_(shrunk, alpha=share)
            right.addmm_(shrunk, (model - mean).T, alpha=share)
        change = _solve(left, right).T
    return (mean + change).to(result_dtype(base, mllm, *experts))


def _solve_diagonal(
    coefficients: Sequence[float], grams: Sequence[Tensor], models: Sequence[Tensor], mean: Tensor
) -> Tensor:
    """Compute the weighted mean of every column, for diagonal Gram matrices."""
    total, change = torch.zeros_like(mean[0]), torch.zeros_like(mean)
    for share, gram, model in zip(coefficients, grams, models, strict=True):
        weight = share * (gram if gram.ndim == 1 else gram.diagonal()).double()
        total += weight
        change += weight * (model - mean)
    return change / total.masked_fill(total <= 0, 1)


def _solve(left: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive semidefinite system with increasing jitter until it succeeds."""
    scale = float(left.diagonal().mean())
    if scale <= 0:
        return torch.zeros_like(right)
    for jitter in (0.0, 1e-10, 1e-8, 1e-6, 1e-4):
        shifted = left.clone()
        shifted.diagonal().add_(jitter * scale)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not int(failed) and float(factor.diagonal().min()) > 1e-8 * scale**0.5:
            return torch.cholesky_solve(right, factor)
    raise PlanError(
        "RegMean's Gram matrices are not positive semidefinite, so that they are invalid. Run "
        "the calibration again."
    )
