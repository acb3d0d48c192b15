"""What a decision changes, worked out from inner products: exact, without reading a weight.

In: the decisions of a plan, the records of an analysis, and how the method's change is affine in
measured directions. Out: a `Preview`. The browser does the same arithmetic while a slider moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ipmerge_core.methods.traits import AffineUpdate
from ipmerge_core.records import LayerRecord, Totals


@dataclass(frozen=True)
class Decision:
    """What happens to one matrix: the experts (by index) that are merged into it, none for kept."""

    name: str
    layer: int
    module: str
    numel: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Preview:
    """What a plan will change. Fractions are in [0, 1], angles are given as cosines in [-1, 1].

    `relative_change` is ||W_merged - W_mllm||_F / ||W_mllm||_F over all decoder matrices, and
    `layer_change` the same per layer. `keep` is the cosine between the merged and the MLLM's task
    vector, `absorb` the one between the merged task vector and the experts' update. Both are None
    where one of the two is zero. They are geometry, not accuracy. `not_counted` names what merges
    beside the decoder matrices and is in none of the numbers.
    """

    selected: tuple[str, ...]
    n_matrices: int
    parameters_touched: int
    decoder_parameters: int
    llm_parameters: int
    bytes_rewritten: int
    relative_change: float
    layer_change: dict[int, float]
    keep: float | None
    absorb: float | None
    not_counted: tuple[str, ...] = ()


@dataclass
class _Products:
    """Running sums of inner products between dV, the update U and the experts' direction X."""

    weight: float = 0.0  # ||W_mllm||^2
    vv: float = 0.0
    vu: float = 0.0
    uu: float = 0.0
    vx: float = 0.0
    ux: float = 0.0
    xx: float = 0.0

    def add(self, other: _Products) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def change(self) -> float:
        return math.sqrt(max(self.uu, 0.0) / self.weight) if self.weight else 0.0

    @property
    def keep(self) -> float | None:
        return _cosine(self.vv + self.vu, self.vv, self.vv + 2 * self.vu + self.uu)

    @property
    def absorb(self) -> float | None:
        return _cosine(self.vx + self.ux, self.xx, self.vv + 2 * self.vu + self.uu)


def _cosine(product: float, norm2_a: float, norm2_b: float) -> float | None:
    if norm2_a <= 0 or norm2_b <= 0:
        return None
    return max(-1.0, min(1.0, product / math.sqrt(norm2_a * norm2_b)))


def preview(
    decisions: Iterable[Decision],
    records: Iterable[LayerRecord],
    update_of: Callable[[int], AffineUpdate],
    totals: Totals,
) -> Preview:
    """Sum the records' inner products over the decisions.

    Math:   per matrix, with selected experts E: X = sum_E P_k, U = a dV + b X (`AffineUpdate`), so
            ||U||^2 = a^2 ||dV||^2 + 2 a b <dV, X> + b^2 ||X||^2,
            change = sqrt(sum ||U||^2 / sum ||W_mllm||^2), keep = cos(dV, dV + U),
            absorb = cos(X, dV + U), sums over matrices.

    Args:
        decisions: what merges.
        records: of the analysis, all matrices and experts.
        update_of: the change per layer, since gains may differ from layer to layer.
        totals: the model's sizes.
    """
    by_matrix: dict[str, list[LayerRecord]] = {}
    for record in records:
        by_matrix.setdefault(record.name, []).append(record)
    decisions = list(decisions)
    whole = _Products()
    layers: dict[int, _Products] = {}
    for decision in decisions:
        update = update_of(decision.layer)
        products = _matrix_products(by_matrix[decision.name], decision.experts, update)
        whole.add(products)
        layers.setdefault(decision.layer, _Products()).add(products)
    merged = [decision for decision in decisions if decision.experts]
    touched = sum(decision.numel for decision in merged)
    return Preview(
        selected=tuple(decision.name for decision in merged),
        n_matrices=len(decisions),
        parameters_touched=touched,
        decoder_parameters=totals.decoder_parameters,
        llm_parameters=totals.llm_parameters,
        bytes_rewritten=touched * totals.decoder_itemsize,
        relative_change=whole.change,
        layer_change={layer: products.change for layer, products in sorted(layers.items())},
        keep=whole.keep,
        absorb=whole.absorb,
    )


def _matrix_products(
    records: list[LayerRecord], experts: tuple[int, ...], update: AffineUpdate
) -> _Products:
    first = records[0]
    products = _Products(weight=first.weight_norm2, vv=first.mllm_norm2)
    if not experts:
        return products
    a, b = update.mllm, update.expert
    for expert in experts:
        norms = records[expert].updates[update.direction]
        products.vx += norms.inner
        crossed = sum(norms.cross[other] for other in experts if other < expert)
        products.xx += norms.norm2 + 2 * crossed
    products.vu = a * products.vv + b * products.vx
    products.ux = a * products.vx + b * products.xx
    products.uu = a * products.vu + b * products.ux
    return products
