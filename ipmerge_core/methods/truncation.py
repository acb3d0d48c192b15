"""STAR: keep the leading singular directions of every task vector, at its original nuclear norm.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Decompositions come from `spectral/`. A model whose task vector is zero, or whose
weight is 0, is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.methods.declarations import Matrix
from ipmerge_core.methods.elementwise import add_to_base
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import Changes, Coefficient, Experts, Noise, merge_method
from ipmerge_core.methods.subspace import mean_of_changes, start
from ipmerge_core.spectral.protection import energy_rank
from ipmerge_core.spectral.spectrum import Spectrum

Kept: TypeAlias = Annotated[
    float,
    Range(low=0, high=1, low_open=True, help="share of the nuclear norm that the kept ones hold"),
]
Combine: TypeAlias = Annotated[
    Literal["sum", "mean"],
    Range(help="add the task vectors to the base, or their mean as in the paper"),
]


def _weights_for_vectors(parameters: Mapping[str, Any], experts: int) -> tuple[float, float]:
    """Return the weights for vectors, which have no directions to leave out."""
    if parameters["combine"] == "mean":
        return mean_of_changes(parameters, experts)
    return parameters["mllm_weight"], parameters["math_weight"]


@merge_method(
    label="STAR",
    source="arXiv 2502.10339",
    formula="W = W0 + sum_i a_i c_i dW_i,k, k directions hold eta of the norm that c_i restores",
    several_experts=True,
    unknown="it leaves out directions of every task vector",
    vectors=_weights_for_vectors,
    matrixwise=True,
)
def star(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 1.0,
    eta: Kept = 0.4,
    combine: Combine = "mean",
    noise: Noise = None,
    low_rank: Changes = None,
) -> Matrix:
    """Truncate every task vector and rescale it to its original nuclear norm.

    Math:   a_i dW_i = U S V^T over the existing directions (`spectrum.existing`); k is the least
            number with sum_{j<=k} S_j >= eta sum_j S_j, and c = sum_j S_j / sum_{j<=k} S_j;
            X_i = c sum_{j<=k} S_j u_j v_j^T; W = W0 + sum_i X_i, or W0 + mean_i X_i.
            The mean is over the models whose task vector is not zero and whose weight is not 0.
    Shapes: all (m, n). eta = 1 keeps the task vectors as they are: their sum or mean.
    Source: Spectral Truncation And Rescale, arXiv 2502.10339, with the authors' code (IBM/STAR,
            commit e6bfcf7), where a_i = 1, the task vectors are averaged over all models, and eta
            is 40 %; the weights and the sum are additions.
    """
    W0, W_v, changes = start(base, mllm, math, mllm_weight, math_weight, noise, low_rank)
    parts = [
        change.vector if eta == 1 else truncated_and_rescaled(change.existing(), eta)
        for change in changes
    ]
    if not parts:
        return W0.clone()
    total = torch.stack(parts).sum(0)
    return add_to_base(W0, W_v, total, 1 / len(parts) if combine == "mean" else 1.0)


def truncated_and_rescaled(found: Spectrum, eta: float) -> Float[Tensor, "m n"]:
    """Keep the directions that hold a share of the nuclear norm, and restore that norm."""
    count = energy_rank(found.S.double().sqrt(), eta)  # the energy of the roots is the sum of S
    kept = found.leading(max(1, count))
    size = float(kept.S.sum(dtype=torch.float64))
    scale = float(found.S.sum(dtype=torch.float64)) / size if size > 0 else 0.0
    return scale * kept.matrix()
