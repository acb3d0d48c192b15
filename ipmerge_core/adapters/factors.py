"""IP-Merging's update of a stored tensor as low-rank factors, and its LoRA matrices A and B.

In: a plan, its opened models and a tensor. Out: the update of all its matrices and experts as one
product of thin factors, and the same with fewer directions. The update
P = rho dM V diag(gamma^2) V^T is numerically of low rank because gamma is squared and sums to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ipmerge_core.analysis.updates import UpdateStore
from ipmerge_core.merging.parts import Chosen, low_rank_changes, on_one_base, rounding_noise
from ipmerge_core.methods.ip_merging import ip_updates
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.pairing import MatrixWeights, ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.spectral.similarity import Update
from ipmerge_core.spectral.spectrum import svd_of_product


class LowRank(NamedTuple):
    """An update reduced to few directions: dW = B @ A, as LoRA names them.

    `needed` directions bring the residual below the tolerance; `residual` is what the kept ones
    leave out, relative to the update's Frobenius norm.
    """

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "m r"]
    needed: int
    residual: float

    @property
    def rank(self) -> int:
        """How many directions are kept."""
        return len(self.A)


def with_lambda(plan: MergePlan, lambda_: float) -> MergePlan:
    """Return the plan with another lambda; gains of single layers multiply it."""
    return replace(plan, parameters={**plan.parameters, "lambda_": lambda_})


def update_of(
    plan: MergePlan,
    pair: ModelPair,
    tensor: str,
    matrices: Sequence[Chosen],
    device: torch.device,
    kept: UpdateStore | None = None,
) -> Update:
    """Compute the update that IP-Merging adds to a stored tensor of the MLLM, as factors.

    Those that are kept in `kept` are not computed again.

    Math:   sum_k lambda P_k over the experts, see `ip_merging`; a fused tensor holds the update of
            each of its matrices in that matrix' rows.
    """
    height = pair.mllm.spec(tensor).shape[0]
    updates: list[Update] = []
    for matrix, experts in matrices:
        found = kept.read(matrix.name, experts) if kept else None
        if found is None:
            found = unit_updates(plan, pair.read(matrix, experts), device)
        gain = float(plan.parameters_for(matrix.layer)["lambda_"] or 0.0)
        rows = split_address(matrix.mllm).rows or range(height)
        scaled = [update.scaled(gain) for update in found]
        updates.append(in_rows(sum_of(scaled), rows, height))
    return sum_of(updates)


def unit_updates(
    plan: MergePlan, weights: MatrixWeights, device: torch.device
) -> tuple[Update, ...]:
    """Compute the update of one matrix for lambda = 1, one per expert, as a merge does."""
    weights = weights.to(device)
    inputs = on_one_base(weights, device, plan.anchor)
    parameters: dict[str, Any] = {**plan.parameters, "lambda_": 1.0}
    noise = rounding_noise(weights, plan.anchor)
    low_rank = low_rank_changes(weights, plan.anchor)
    with torch.no_grad():
        return tuple(ip_updates(*inputs, **parameters, noise=noise, low_rank=low_rank))


def sum_of(updates: Sequence[Update]) -> Update:
    """Add up updates of one shape by placing their factors next to each other."""
    lefts = [u.left if u.gain == 1.0 else u.gain * u.left for u in updates]
    return Update(torch.cat(lefts, dim=1), torch.cat([u.right for u in updates], dim=0))


def in_rows(update: Update, rows: range, height: int) -> Update:
    """Put the update of a block of rows into the taller matrix that it is stored in."""
    if len(rows) == height:
        return update
    left = update.left.new_zeros(height, update.left.shape[1])
    left[rows.start : rows.stop] = update.left
    return replace(update, left=left)


def reduce_rank(update: Update, tolerance: float, max_rank: int) -> LowRank:
    """Reduce an update to the fewest directions that leave a residual of at most `tolerance`.

    Math:   P = gain left right = Q_l (R_l R_r^T) Q_r^T with QR factors of left and right^T; the SVD
            of the small middle gives P = U diag(s) V^T, and the needed rank is the least r with
            sum_{i>r} s_i^2 <= tolerance^2 sum s_i^2. The factors share the weight:
            B = U sqrt(s), A = sqrt(s) V^T.
    """
    found = svd_of_product(update.gain * update.left, update.right, dtype=torch.float64)
    assert found.U is not None, "svd without U"
    U, s, Vh = found.U, found.S, found.Vh
    tail = s.square().flip(0).cumsum(0).flip(0)  # tail[r] is what r directions leave out
    whole = float(tail[0]) if len(tail) else 0.0
    needed = int((tail > tolerance**2 * whole).sum())
    rank = min(needed, max_rank)
    left_out = float(tail[rank]) if rank < len(tail) else 0.0
    root = s[:rank].sqrt()
    B = (U[:, :rank] * root).float().contiguous()
    A = (root[:, None] * Vh[:rank]).float().contiguous()
    return LowRank(A, B, needed, (left_out / whole) ** 0.5 if whole else 0.0)


def of_one_rank(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pad all pairs (A, B) with zeros to the largest rank, named as PEFT stores them.

    Math:   [B 0] [A; 0] = B A: the update is the same.
    """
    rank = max((len(A) for A, _ in factors.values()), default=0)
    tensors: dict[str, Tensor] = {}
    for module, (A, B) in factors.items():
        missing = rank - len(A)
        tensors[f"{module}.lora_A.weight"] = pad(A, (0, 0, 0, missing)).contiguous()
        tensors[f"{module}.lora_B.weight"] = pad(B, (0, missing)).contiguous()
    return tensors
