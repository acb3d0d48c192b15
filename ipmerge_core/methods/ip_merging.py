"""IP-Merging: identify, rescale and project an expert's task vector into the MLLM's subspace.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Which matrices take part is the plan's decision (similarity >= S_alpha); this is what
happens to one that does. Source: arXiv 2510.14387 and its public snapshot; where they leave a
choice the docstring names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ipmerge_core.methods.registry import Experts, Gain, Range, merge_method
from ipmerge_core.methods.traits import AffineUpdate, Matrix
from ipmerge_core.similarity import (
    corresponding_angles,
    importance,
    nuclear_ratio,
    projected_update,
    top_k_importance,
)
from ipmerge_core.spectrum import as_float, svd, task_vector

Ablation = Annotated[
    Literal["none", "rescale_only", "select_only"], Range(help="leave out the projection, or more")
]
GammaNorm = Annotated[
    Literal["sum", "max"], Range(help="gamma adds up to 1, or its largest value is 1")
]
Projector = Annotated[
    Literal["softmax", "top_k"], Range(help="weights by similarity, or the first directions whole")
]
Temperature = Annotated[float, Range(low=0, low_open=True, help="of the softmax over directions")]
TopK = Annotated[int, Range(low=1, help="directions of the projector top_k")]
Rank = Annotated[int, Range(low=1, help="singular triplets kept; none: all")] | None


# The options of an analysis that each of its directions depends on.
_MEASURED_WITH = {
    "sum": ("temperature", "rank"),
    "max": ("temperature", "rank"),
    "rescale_only": ("rank",),
    "select_only": (),
}


def _affine(parameters: Mapping[str, Any]) -> AffineUpdate | None:
    """Name the direction an analysis holds; None where these parameters change the direction."""
    ablated = parameters["ablation"] != "none"
    if not ablated and parameters["projector"] != "softmax":
        return None
    direction = parameters["ablation" if ablated else "gamma_norm"]
    return AffineUpdate(
        0.0, parameters["lambda_"], direction, measured_with=_MEASURED_WITH[direction]
    )


@merge_method(
    label="IP-Merging",
    source="arXiv 2510.14387",
    formula="W = W_v + lambda sum_k rho_k dW_e,k V_v diag(gamma_k^2) V_v^T",
    gains=("lambda_",),
    several_experts=True,
    selective=True,
    affine=_affine,
    from_analysis=("temperature", "rank"),
    matrixwise=True,
)
def ip_merging(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    lambda_: Gain = 1.0,
    temperature: Temperature = 32.0,
    gamma_norm: GammaNorm = "sum",
    projector: Projector = "softmax",
    top_k: TopK = 64,
    rank: Rank = None,
    ablation: Ablation = "none",
) -> Matrix:
    """Add every expert's rescaled task vector, projected on the MLLM's leading directions.

    Math:   dV = W_v - W0 = U_V S_V V_V^T,  dM_k = W_e,k - W0,  s_i = |<v_M,i , v_V,i>|
            rho = sum(S_V) / sum(S_M),  gamma = softmax(temperature * s)
            P_k = rho dM_k V_V diag(gamma^2) V_V^T
            W   = W_v + lambda sum_k P_k
    Variants, by name: `gamma_norm="max"` divides gamma by its largest value, so that the
            best-aligned direction passes in full; `projector="top_k"` lets the first `top_k`
            directions of the MLLM pass in full and no others; `rank` keeps that many singular
            triplets of both task vectors (the public snapshot: 1024); `ablation="rescale_only"`
            adds rho dM_k unprojected, `"select_only"` dM_k itself.
    Source: IP-Merging, arXiv 2510.14387. The absolute value is ours: a singular vector's sign is
            arbitrary, and without it the result would depend on it.
    """
    experts = [math] if isinstance(math, Tensor) else math
    V = task_vector(mllm, base)
    vision = None if ablation == "select_only" else svd(V, rank=rank, vectors="right")
    merged = as_float(mllm)
    for expert in experts:
        M = task_vector(expert, base)
        if vision is None:
            merged = merged + lambda_ * M
            continue
        decomposed = svd(M, rank=rank, vectors="right")
        rho = nuclear_ratio(vision, decomposed)
        kept = decomposed if rank is not None else None
        if ablation == "rescale_only":  # a projection on its own directions is a truncation
            P = projected_update(M, kept, torch.ones_like(kept.S), rho) if kept else rho * M
            merged = merged + lambda_ * P
            continue
        angles = corresponding_angles(vision, decomposed)
        gamma = (
            top_k_importance(angles, top_k)
            if projector == "top_k"
            else importance(angles, temperature, gamma_norm)
        )
        merged = merged + lambda_ * projected_update(M, vision, gamma, rho, math=kept)
    return merged
