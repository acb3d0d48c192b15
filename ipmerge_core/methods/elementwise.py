"""Elementwise merge methods: weighted average, task arithmetic and layer swap.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. All results are computed as a change of W_v, so that an unchanged element is bitwise
the MLLM's. Sources are given at each function. No IO, no global random state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, TypeAlias

from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.methods.blocks import blockwise
from ipmerge_core.methods.declarations import AffineUpdate, Matrix
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import Coefficient, Experts, TensorName, as_list, merge_method

_KEPT = Range(low=0, high=1, help="weight of the MLLM")
Kept: TypeAlias = Annotated[float, _KEPT]
KeptShare: TypeAlias = Annotated[float, replace(_KEPT, only_with=(("mllm_weight", (None,)),))]
OneOfTwo: TypeAlias = Annotated[float, Range(help="explicit weight, instead of alpha")] | None
Divided: TypeAlias = Annotated[bool, Range(help="divide by the sum of both weights")]
Layer: TypeAlias = Annotated[int, Range(low=-1, help="last layer that is kept unchanged")]


def add_to_base(base: Tensor, mllm: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """Compute W0 + scale * delta as a change of W_v, so that delta = dW_v gives W_v exactly."""
    return mllm + (scale * delta - (mllm - base))


def _two_weights(parameters: Mapping[str, Any]) -> tuple[float, float]:
    """Weights of the MLLM and the expert: alpha and 1 - alpha unless two are given.

    Raises: PlanError if only one is given, or both are to be normalized and sum to 0.
    """
    mllm, math = parameters["mllm_weight"], parameters["math_weight"]
    if mllm is None and math is None:
        return parameters["alpha"], 1.0 - parameters["alpha"]
    if mllm is None or math is None:
        given, missing = ("math", "mllm") if mllm is None else ("mllm", "math")
        raise PlanError(
            f"{given}_weight is set but {missing}_weight is not; expected both, or only alpha."
        )
    total = mllm + math
    if not parameters["normalize"]:
        return mllm, math
    if total == 0:
        raise PlanError(
            f"mllm_weight {mllm:g} and math_weight {math:g} sum to 0 and cannot be normalized. "
            f"Choose other weights, or normalize=false."
        )
    return mllm / total, math / total


def _affine_average(parameters: Mapping[str, Any]) -> AffineUpdate | None:
    """Return the affine form if the weights sum to 1; otherwise the base contributes too."""
    own, other = _two_weights(parameters)
    return AffineUpdate(-other, other, "select_only") if abs(own + other - 1) < 1e-12 else None


def add_to_base_(base: Tensor, mllm: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the bitwise identical result in place, for blocks, which are copies."""
    change = delta.mul_(scale) if scale != 1 else delta
    return mllm.add_(change.add_(base.sub_(mllm)))


def changes_(base: Tensor, mllm: Tensor, *experts: Tensor) -> list[Tensor]:
    """Compute the task vectors dW_i = W_i - W0 of blocks; those of the experts in their place."""
    return [mllm - base, *(expert.sub_(base) for expert in experts)]


def weighted_sum_(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Compute sum_i a_i x_i in place of the first."""
    total = vectors[0].mul_(weights[0]) if weights[0] != 1 else vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total.add_(vector, alpha=weight)
    return total


def merge_cut(
    base: Tensor,
    tuned: Sequence[Tensor],
    cuts: Sequence[Callable[[Tensor], Tensor]],
    add: Callable[[Sequence[Tensor]], Tensor],
    scale: float = 1.0,
) -> Tensor:
    """Merge task vectors after a cut: W0 + s add(cut_1(dW_1), cut_2(dW_2), ..).

    The cuts receive their task vector in blocks of whole rows, in order; they and `add` may
    overwrite their arguments.
    """

    def merge(W0: Tensor, W_v: Tensor, *experts: Tensor) -> Tensor:
        changes = changes_(W0, W_v, *experts)
        vectors = [cut(change) for cut, change in zip(cuts, changes, strict=True)]
        return add_to_base_(W0, W_v, add(vectors), scale)

    return blockwise(merge, base, *tuned)


@merge_method(
    label="Weighted average",
    source="BR2V, arXiv 2505.05464",
    formula="W = a W_v + (1 - a) W_e",
    affine=_affine_average,
    unknown="its weights do not sum to 1, so that the base contributes too",
    anchor="interp",
    check=_two_weights,
    local=True,
)
def linear(
    base: Matrix,
    mllm: Matrix,
    math: Matrix,
    *,
    alpha: KeptShare = 0.9,
    mllm_weight: OneOfTwo = None,
    math_weight: OneOfTwo = None,
    normalize: Divided = True,
) -> Matrix:
    """Interpolate between the MLLM and the expert; the base is not used.

    Math:   W = a W_v + (1 - a) W_e, computed as W_v + (1 - a) (W_e - W_v); with two weights
            W = (a_v W_v + a_e W_e) / (a_v + a_e), undivided with normalize = false.
    Shapes: all (m, n). a = 1 gives W_v bitwise.
    Raises: PlanError if only one weight is given, or the weights to be normalized sum to 0.
    Source: Bring Reason to Vision, arXiv 2505.05464, which uses a = 0.9. Two weights and
            `normalize` as in mergekit's linear.
    """
    own, other = _two_weights(
        {
            "alpha": alpha,
            "mllm_weight": mllm_weight,
            "math_weight": math_weight,
            "normalize": normalize,
        }
    )

    def mix(W_v: Tensor, W_e: Tensor) -> Tensor:
        return W_v.lerp_(W_e, other)

    def add(W_v: Tensor, W_e: Tensor) -> Tensor:
        return W_v.mul_(own).add_(W_e, alpha=other)

    return blockwise(mix if normalize or mllm_weight is None else add, mllm, math)


@merge_method(
    label="Task arithmetic",
    source="arXiv 2212.04089",
    formula="W = W0 + a_v dW_v + a_e sum_k dW_e,k",
    gains=("mllm_weight", "math_weight"),
    several_experts=True,
    affine=lambda p: AffineUpdate(p["mllm_weight"] - 1.0, p["math_weight"], "select_only"),
    anchor="inject",
    local=True,
)
def task_arithmetic(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 0.3,
) -> Matrix:
    """Add the weighted task vectors of the MLLM and of every expert to the base.

    Math:   W = W0 + a_v (W_v - W0) + a_e sum_k (W_e,k - W0), written from W_v, so that
            a_v = 1, a_e = 0 gives W_v bitwise. With a_v + a_e = 1 the base cancels.
    Shapes: all (m, n).
    Source: Task Arithmetic, arXiv 2212.04089; separate coefficients as in arXiv 2605.19523.
    """

    def add(W0: Tensor, W_v: Tensor, *experts: Tensor) -> Tensor:
        merged = W_v if mllm_weight == 1.0 else W_v + (mllm_weight - 1.0) * (W_v - W0)
        for W_e in experts:
            merged.add_(W_e.sub_(W0), alpha=math_weight)
        return merged

    return blockwise(add, base, mllm, *as_list(math))


def _affine_swap(parameters: Mapping[str, Any]) -> AffineUpdate:
    kept = parameters["layer"] <= parameters["last_kept_layer"]
    other = 0.0 if kept else 1.0 - parameters["alpha"]
    return AffineUpdate(-other, other, "select_only")


@merge_method(
    label="Layer swap",
    source="arXiv 2410.01335; arXiv 2505.05464",
    formula="W = W_v in layers 0..l, else a W_v + (1 - a) W_e",
    affine=_affine_swap,
    anchor="interp",
    local=True,
)
def layer_swap(
    base: Matrix,
    mllm: Matrix,
    math: Matrix,
    *,
    alpha: Kept = 0.9,
    last_kept_layer: Layer = 5,
    tensor_name: TensorName = "",
) -> Matrix:
    """Keep the first layers of the MLLM and average the others with the expert.

    Math:   layer <= l: W = W_v; else W = a W_v + (1 - a) W_e. a = 0 swaps whole layers.
    Shapes: all (m, n). Tensors outside the layers are kept.
    Raises: PlanError without a tensor name, from which the layer is parsed.
    Source: layer swapping, arXiv 2410.01335; averaging the later layers of an MLLM,
            arXiv 2505.05464, whose code keeps layers 0 to 5.
    """
    if not tensor_name:
        raise PlanError(
            "Layer swap parses the layer from the tensor name and got none; pass tensor_name, such "
            "as 'model.layers.7.mlp.up_proj.weight'."
        )
    found = re.search(r"\blayers\.([0-9]{1,6})\.", tensor_name)
    kept = found is None or int(found[1]) <= last_kept_layer
    return linear(base, mllm, math, alpha=1.0 if kept else alpha)
