"""Merge methods with data-free coefficients computed from norms: MetaGPT and NAN.

In: base, mllm and math matrices of one shape (m, n), and the norms of the whole model as
`statistic`, measured by a first pass; without it, and with scope "tensor", the norms are those of
the current matrix. Out: the merged matrix in fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.methods.blocks import TaskVectors, blockwise, squares
from ipmerge_core.methods.declarations import AffineUpdate, Matrix, Statistic
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import Experts, WholeModel, as_list, merge_method

Scope: TypeAlias = Annotated[
    Literal["model", "tensor"], Range(help="norms over the whole model, or per matrix")
]
NormOf: TypeAlias = Annotated[
    Literal["weights", "tau"], Range(help="norms of the models' weights, or of their task vectors")
]
GlobalScale: TypeAlias = Annotated[
    Literal["T/2", "1"], Range(help="factor on all coefficients, for T models")
]
_UNMEASURED = (
    "its coefficients depend on norms of the whole models, which the merge measures first "
    "(or `ipmerge plan --measure`)"
)


def _of_task_vectors(parameters: Mapping[str, Any]) -> bool:
    return parameters.get("norm_of") != "weights"


def squared_norms(
    base: Tensor,
    mllm: Tensor,
    experts: Sequence[Tensor],
    previous: tuple[float, ...] = (),
    **parameters: Any,  # noqa: ANN401
) -> Tensor:
    """Compute ||x_i||^2 of the MLLM and every expert, x the task vector or, for NAN, weights."""
    vectors = TaskVectors([mllm, *experts], base if _of_task_vectors(parameters) else None)
    return torch.stack([squares(*block) for block in vectors.blocks()]).sum(0).cpu()


def metagpt_coefficients(
    squares: Tensor | Sequence[float],
    previous: tuple[float, ...] = (),
    **parameters: Any,  # noqa: ANN401
) -> tuple[float, ...]:
    """Compute coefficients proportional to the squared norms; equal if all are zero."""
    total = float(sum(squares))
    return tuple(float(s) / total if total != 0 else 1 / len(squares) for s in squares)


def nan_coefficients(
    squares: Tensor | Sequence[float],
    previous: tuple[float, ...] = (),
    *,
    global_scale: str = "T/2",
    **parameters: Any,  # noqa: ANN401
) -> tuple[float, ...]:
    """Compute coefficients inversely proportional to the norms; zero norms share all weight."""
    norms = torch.as_tensor(squares, dtype=torch.float64).sqrt()
    inverse = norms.reciprocal() if bool((norms > 0).all()) else (norms == 0).double()
    scale = len(squares) / 2 if global_scale == "T/2" else 1.0
    shares = scale * inverse / inverse.sum()
    return tuple(map(float, shares.tolist()))


def _affine_by(
    rule: Callable[..., tuple[float, ...]],
) -> Callable[[Mapping[str, Any]], AffineUpdate | None]:
    """Return the affine form, exact if the norms are known from a statistic or the analysis."""

    def affine(parameters: Mapping[str, Any]) -> AffineUpdate | None:
        found: Sequence[float] = parameters.get("statistic") or ()
        if parameters["scope"] == "tensor":
            norms2 = parameters.get("squared_norms") if _of_task_vectors(parameters) else None
            found = rule(norms2, **parameters) if norms2 else ()
        if not found:
            return None
        return AffineUpdate(found[0] - 1.0, 1.0, "select_only", shares=tuple(found[1:]))

    return affine


def _combine(
    base: Tensor, mllm: Tensor, experts: Sequence[Tensor], coefficients: Sequence[float]
) -> Tensor:
    """Compute W0 + sum_i a_i (W_i - W0) as a change of W_v; the base cancels if sum a_i = 1."""
    rest = 1.0 - sum(coefficients)

    def add(W0: Tensor, W_v: Tensor, *others: Tensor) -> Tensor:
        merged = W_v + rest * (W0 - W_v) if abs(rest) > 1e-12 else W_v.clone()
        for coefficient, W_e in zip(coefficients[1:], others, strict=True):
            merged.add_(W_e.sub_(W_v), alpha=coefficient)
        return merged

    return blockwise(add, base, mllm, *experts)


@merge_method(
    label="MetaGPT",
    source="arXiv 2406.11385",
    formula="W = W0 + sum_i a_i dW_i, a_i = |dW_i|^2 / sum_j |dW_j|^2",
    several_experts=True,
    affine=_affine_by(metagpt_coefficients),
    unknown=_UNMEASURED,
    statistic=Statistic(
        squared_norms, metagpt_coefficients, of_norms=_of_task_vectors, from_own_base=True
    ),
    local=True,
)
def metagpt(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    scope: Scope = "model",
    statistic: WholeModel = None,
) -> Matrix:
    """Weight every task vector by its share of the total squared norm.

    Math:   a_i = ||tau_i||^2 / sum_j ||tau_j||^2, norms over all merged matrices (or this one);
            W = W0 + sum_i a_i tau_i. The a_i sum to 1, so that the base cancels; larger changes
            get larger weights.
    Shapes: all (m, n). If all task vectors are zero the a_i are equal.
    Source: MetaGPT, arXiv 2406.11385 (orthogonal task vectors, locally linear loss).
    """
    experts = as_list(math)
    whole = statistic if scope == "model" else None
    found = whole or metagpt_coefficients(squared_norms(base, mllm, experts))
    return _combine(base, mllm, experts, found)


@merge_method(
    label="NAN",
    source="arXiv 2505.16148",
    formula="W = W0 + g sum_i a_i dW_i, a_i = (1 / |W_i|) / sum_j (1 / |W_j|)",
    several_experts=True,
    affine=_affine_by(nan_coefficients),
    unknown=_UNMEASURED,
    statistic=Statistic(
        squared_norms, nan_coefficients, of_norms=_of_task_vectors, from_own_base=True
    ),
    local=True,
)
def nan(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    norm_of: NormOf = "weights",
    scope: Scope = "model",
    global_scale: GlobalScale = "T/2",
    statistic: WholeModel = None,
) -> Matrix:
    """Weight every task vector by the inverse norm of its model.

    Math:   a_i = (1 / ||x_i||) / sum_j (1 / ||x_j||), x_i the weights W_i, or the task vector with
            norm_of "tau"; W = W0 + g sum_i a_i tau_i, g = T / 2 for T models, or 1.
    Shapes: all (m, n). If models have x_i = 0, they share the weight equally.
    Source: NAN, arXiv 2505.16148. The paper does not fully specify norm and scope; with weights the
            norms of fine-tunes are nearly equal and two models are averaged, with task vectors
            smaller changes get larger weights.
    """
    experts = as_list(math)
    whole = statistic if scope == "model" else None
    found = whole or nan_coefficients(
        squared_norms(base, mllm, experts, norm_of=norm_of), global_scale=global_scale
    )
    return _combine(base, mllm, experts, found)
