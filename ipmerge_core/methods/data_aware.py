"""Merge methods that weigh models by what they see in data: Fisher merging and RegMean.

In: matrices of one shape (m, n) and, per model, what a calibration run measured: the diagonal of
the Fisher information (m, n), or the Gram matrix of the inputs (n, n). Out: the merged matrix in
fp32, or fp64 for fp64 inputs. No data is touched here; without measurements the methods refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.errors import PlanError, ShapeError
from ipmerge_core.methods.blocks import blockwise, blockwise_sum, result_dtype, squares
from ipmerge_core.methods.declarations import Matrix, Statistic
from ipmerge_core.methods.elementwise import as_list
from ipmerge_core.methods.registry import Experts, Range, Supplied, WholeModel, merge_method

MllmShare: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="share of the MLLM; the experts share the rest")
]
OffDiagonal: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="factor on the products of different inputs")
]
Normalised: TypeAlias = Annotated[
    Literal["model", "tensor", "none"],
    Range(help="information is divided by its norm over the model, the matrix, or not"),
]
Floor: TypeAlias = Annotated[
    float, Range(low=0, help="added to the Fisher information, as `floor_is` says; 0 adds nothing")
]
FloorIs: TypeAlias = Annotated[
    Literal["relative", "absolute"],
    Range(
        help="the floor is a factor on each model's mean information, or the number itself",
        before="absolute",
    ),
]
Measured: TypeAlias = Float[Tensor, "..."]  # shapes are compared in `_measured`, in words
MeasuredList: TypeAlias = Measured | Sequence[Measured]
FisherInput: TypeAlias = Annotated[Measured | None, Supplied("diagonal of the Fisher information")]
FisherInputs: TypeAlias = Annotated[MeasuredList | None, Supplied("the same, of every expert")]
GramInput: TypeAlias = Annotated[Measured | None, Supplied("X^T X / tokens of the inputs")]
GramInputs: TypeAlias = Annotated[MeasuredList | None, Supplied("the same, of every expert")]
_NOTHING = 1e-30  # decides only where no model has any information and the floor is 0


def shares(alpha: float, experts: int) -> list[float]:
    """The MLLM's share alpha and what is left for every expert."""
    return [alpha] + [(1 - alpha) / experts] * experts


def _mean_of_weights(parameters: Mapping[str, Any], experts: int) -> tuple[float, float]:
    """Weigh vectors, of which nothing is measured, by the models' shares."""
    own, other = shares(parameters["alpha"], experts)[:2]
    return own, other


def _measured(
    label: str,
    what: str,
    shapes: Sequence[tuple[int, ...]],
    mllm: Tensor | None,
    math: Tensor | Sequence[Tensor] | None,
    experts: int,
) -> list[Tensor]:
    """One measurement per model, all of the expected shape, or a refusal in words."""
    if mllm is None or math is None:
        missing = "the MLLM" if mllm is None else "the math model"
        raise PlanError(
            f"{label} needs the {what} of every model and got none of {missing}. Run a "
            f"calibration on samples first, or choose a method that needs no data, such as "
            f"task_arithmetic."
        )
    found = [mllm, *as_list(math)]
    if len(found) != 1 + experts:
        raise PlanError(
            f"{label} got the {what} of {len(found) - 1} math models for {experts} of them; it "
            f"needs one each."
        )
    for matrix in found:
        if matrix.shape not in shapes:
            raise ShapeError(
                f"{label} got the {what} of shape {tuple(matrix.shape)}; expected "
                f"{shapes[0]}. "
                f"Calibrate the models that are merged."
            )
    return found


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
    """Norm and mean of every model's information: over the whole model, or over this matrix."""
    count = len(information)
    if whole is None:
        found = blockwise_sum(_squares_and_sums, *information).tolist()
        size = max(1, information[0].numel())
        return [square**0.5 for square in found[:count]], [sum_ / size for sum_ in found[count:]]
    if len(whole) not in ((2 * count,) if means else (count, 2 * count)):
        raise PlanError(
            f"Fisher merging got {len(whole)} numbers of the whole models for {count} models; it "
            f"needs the norm of each model's information, then the mean of each."
        )
    return whole[:count], whole[count:]


@merge_method(
    label="Fisher merging",
    source="arXiv 2111.09832",
    formula="W = sum_i c_i (F_i + e_i) W_i / sum_i c_i (F_i + e_i), elementwise; "
    "e_i = floor mean(F_i)",
    several_experts=True,
    unknown="every element moves by what the calibration measured for it",
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
    """Average every element in proportion to how much each model's likelihood depends on it.

    Math:   F_i = mean over samples of (d log p(y | x) / dW)^2, one sample at a time;
            w_i = c_i (F_i + e_i) / (||F_i|| + e_i);  W = sum_i w_i W_i / sum_i w_i.
            c is alpha for the MLLM, the rest shared by the experts. e_i is floor * mean(F_i), or
            floor itself where it is absolute. Norm and mean are taken over the calibrated matrices
            of the whole model (`statistic`), or over this one. With scope "none" the divisor
            ||F_i|| + e_i is 1 and the mean that of this matrix.
    Shapes: W, F (m, n). Where no model has information the result is the mean weighted by c.
    Raises: PlanError without F, ShapeError for a wrong shape.
    Source: Fisher-weighted averaging, arXiv 2111.09832. The floor is added for every model; the
            authors' code takes a maximum with it, by default for the first model only, and has
            1e-6 for it, which in models of billions of weights is thousands of times the mean.

    A relative floor makes the result the same whatever the scale of the information.
    """
    experts = as_list(math)
    label, what = "Fisher merging", "Fisher information"
    found = _measured(label, what, [tuple(mllm.shape)], mllm_fisher, math_fisher, len(experts))
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
    unknown="every matrix is solved for with the inputs that the calibration measured",
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
    """Find the matrix whose outputs are closest to every model's on that model's own inputs.

    Math:   G_i = X_i^T X_i / tokens, off-diagonal entries times `off_diagonal`;
            W^T = (sum_i c_i G_i)^-1 sum_i c_i G_i W_i^T, c = alpha for the MLLM, the rest shared by
            the experts. Solved in fp64 by Cholesky for the change from the mean sum_i c_i W_i,
            so that an input no model has seen gets the mean.
    Shapes: W (m, n), G (n, n), m outputs, n inputs; or (n,), its diagonal, where n is large.
    Raises: PlanError without G, ShapeError for a wrong shape.
    Source: RegMean, arXiv 2212.09849, whose alpha is `off_diagonal` here.
    """
    experts = as_list(math)
    n = mllm.shape[1]
    grams = _measured("RegMean", "Gram matrix", [(n, n), (n,)], mllm_gram, math_gram, len(experts))
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
    """Weighted mean of every column, for inputs whose products are taken as zero."""
    total, change = torch.zeros_like(mean[0]), torch.zeros_like(mean)
    for share, gram, model in zip(coefficients, grams, models, strict=True):
        weight = share * (gram if gram.ndim == 1 else gram.diagonal()).double()
        total += weight
        change += weight * (model - mean)
    return change / total.masked_fill(total <= 0, 1)


def _solve(left: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric positive semidefinite system; a jitter grows until Cholesky succeeds."""
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
        "RegMean's Gram matrices are not positive semidefinite, so they cannot come from inputs. "
        "Run the calibration again."
    )
