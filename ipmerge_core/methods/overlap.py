"""RAM and RAM+: average what several models change, and pass in full what one of them changes.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Counts of changed elements are of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.methods.blocks import blockwise, blockwise_sum
from ipmerge_core.methods.declarations import Matrix
from ipmerge_core.methods.elementwise import add_to_base_, changes_
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import Experts, as_list, merge_method

Threshold: TypeAlias = Annotated[
    float, Range(low=0, help="an element counts as changed if it differs by more than this")
]
Boost: TypeAlias = Annotated[
    float, Range(low=0, usual=(0.0, 1.0), help="RAM+: amplifies what one model changed; 0 is RAM")
]
BoostCap: TypeAlias = Annotated[
    float, Range(low=0, usual=(0.0, 1.0), help="largest ratio of shared to own changes that counts")
]


@merge_method(
    label="RAM",
    source="arXiv 2601.13572",
    formula="W = W0 + sum_i l_i dW_i / c, c models changed the element, l_i = 1 unless c = 1",
    several_experts=True,
    unknown="it depends on which elements each model has changed",
)
def ram(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    epsilon: Threshold = 1e-5,
    boost: Boost = 0.0,
    boost_cap: BoostCap = 0.2,
) -> Matrix:
    """Average elements that several models change, and keep in full those that one changes.

    Math:   z_i = [|dW_i| > epsilon], c = sum_i z_i, elementwise;
            W = W0 + sum_i z_i dW_i ([c = 1] l_i + [c > 1] / c)
            l_i = 1 + boost * min(rho_i, boost_cap), rho_i = #(z_i, c > 1) / max(#(z_i, c = 1), 1),
            counted over the matrix; boost 0 is RAM, 0.1 the default of RAM+.
    Shapes: all (m, n).
    Source: Reinforced Agent Merging, arXiv 2601.13572, for experts tuned by reinforcement learning,
            which change few elements; as in mergekit (`ram`, `ramplus_tl`), whose divisor is at
            least epsilon instead of 1, which differs where a model has no change of its own and
            then has no effect. Differences of bf16 weights around 0.02 are 0 or at least 6e-5, so
            that the default epsilon only distinguishes equal elements there.
    """
    tuned = [mllm, *as_list(math)]

    def changed(W0: Tensor, *models: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        changes = changes_(W0, *models)
        masks = [(change.abs() > epsilon).to(change) for change in changes]
        return changes, masks, torch.stack(masks).sum(0)

    def counts(*models: Tensor) -> Tensor:
        _, masks, together = changed(*models)
        own = [(mask * (together == 1)).sum(dtype=torch.float64) for mask in masks]
        shared = [(mask * (together > 1)).sum(dtype=torch.float64) for mask in masks]
        return torch.stack([torch.stack(own), torch.stack(shared)])

    factors = [1.0] * len(tuned)
    if boost:
        own, shared = blockwise_sum(counts, base, *tuned).cpu()
        ratios = (shared / own.clamp(min=1)).clamp(max=boost_cap)
        factors = (1 + boost * ratios).tolist()

    def merge(W0: Tensor, W_v: Tensor, *experts: Tensor) -> Tensor:
        changes, masks, together = changed(W0, W_v, *experts)
        return add_to_base_(W0, W_v, _combined(changes, masks, together, factors))

    return blockwise(merge, base, *tuned)


def _combined(
    changes: Sequence[Tensor], masks: Sequence[Tensor], together: Tensor, factors: Sequence[float]
) -> Tensor:
    """Return sum_i z_i dW_i ([c = 1] l_i + [c > 1] / c)."""
    alone, average = (together == 1).to(together), 1 / together.clamp(min=1)
    total = torch.zeros_like(together)
    for change, mask, factor in zip(changes, masks, factors, strict=True):
        total += change * mask * torch.where(alone > 0, factor * alone, average)
    return total
