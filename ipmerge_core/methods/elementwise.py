"""Merge methods that treat every element of a matrix by itself (or by its rank among the others).

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Sources are named at each function. No IO, no global random state.
"""

from __future__ import annotations

from torch import Tensor

from ipmerge_core.methods.registry import AffineUpdate, Coefficient, Experts, Matrix, merge_method
from ipmerge_core.spectrum import as_float


@merge_method(
    label="Task arithmetic",
    source="arXiv 2212.04089",
    formula="W = W0 + a_v dW_v + a_e sum_k dW_e,k",
    gains=("mllm_weight", "math_weight"),
    several_experts=True,
    affine=lambda p: AffineUpdate(p["mllm_weight"] - 1.0, p["math_weight"], "select_only"),
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
            a_v = 1, a_e = 0 gives W_v to the last bit.
    Source: Task Arithmetic, arXiv 2212.04089; separate coefficients as in arXiv 2605.19523.
    """
    W0, W_v = as_float(base), as_float(mllm)
    experts = [math] if isinstance(math, Tensor) else math
    merged = W_v + (mllm_weight - 1.0) * (W_v - W0)
    for expert in experts:
        merged = merged + math_weight * (as_float(expert) - W0)
    return merged
