"""Preview the change of a merge from inner products, without reading weights.

In: the decisions of a plan, the records of an analysis, and the affine form of the method's change
in measured directions. Out: a `Preview`. The browser computes the same while a slider moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipmerge_core.analysis.records import Index, LayerRecord, Totals, check_records
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import MergeMethod
from ipmerge_core.methods.declarations import AffineUpdate, ParameterValue
from ipmerge_core.planning.options import shown
from ipmerge_core.runtime.input_files import CLOSED, Count, InvalidContentError, Name
from ipmerge_core.spectral.kinds import Anchor

SMALL_SHARE = 0.25  # of the expert's change: no smaller update moved the demo's skill
_QUICK = "the analysis was a quick one of the leading directions only"
_NOT_MEASURED = (
    "the analysis does not contain this update of every matrix: an older version made it, or "
    "some are experts of a mixture. Analyse the pair again for a preview"
)
_UNKNOWN = "the plan does not record its analysis options; make it again for an exact preview"


@dataclass(frozen=True)
class Decision:
    """Decision for one matrix: the indices of the experts to merge; empty if kept."""

    __pydantic_config__ = CLOSED

    name: Name
    layer: Index
    module: Name
    numel: Count
    experts: tuple[Index, ...]


def check_consistent(
    decisions: Sequence[Decision], records: Sequence[LayerRecord], experts: int
) -> None:
    """Check that decisions and records are about the same matrices. Raises: InvalidContentError."""
    for number, decision in enumerate(decisions):
        if list(decision.experts) != sorted({e for e in decision.experts if e < experts}):
            raise InvalidContentError(
                f"'decisions[{number}].experts' is {list(decision.experts)[:8]}; expected "
                f"increasing indices below {experts}"
            )
    check_records(records, experts)
    decided = [decision.name for decision in decisions]
    recorded = [record.name for record in records[::experts]]
    if len(set(decided)) != len(decided) or (recorded and recorded != decided):
        raise InvalidContentError("its decisions and records are not of the same matrices")


@dataclass(frozen=True)
class Preview:
    """Predicted change of a plan. Fractions are in [0, 1], angles are cosines in [-1, 1].

    `relative_change` is ||W_merged - W_mllm||_F / ||W_mllm||_F over all decoder matrices, and
    `layer_change` the same per layer. `keep` is the cosine between the merged and the MLLM's task
    vector, `absorb` the one between the merged task vector and the experts' update. Both are None
    if one of the two is zero. They describe geometry, not accuracy. `not_counted` lists what is
    merged in addition to the decoder matrices and not included in the numbers. `approximate` states
    why the numbers are approximate; empty if they are exact.

    `update_share` is the size of the experts' part of the update relative to the experts' own
    change, ||b X||_F / ||sum dM_k||_F, as the median over the merged matrices, without those that a
    layer gain of 0 keeps; None if nothing is merged. `expert_change` is the size of the experts'
    own change, relative to the weights of the merged matrices.
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
    update_share: float | None = None
    expert_change: float = 0.0
    not_counted: tuple[str, ...] = ()
    approximate: str = ""

    @property
    def advice(self) -> str:
        """A sentence on an update that is probably too small to matter; empty for others."""
        share, change = self.update_share, self.expert_change
        if share is None or share >= SMALL_SHARE or not change or not self.relative_change:
            return ""
        return (
            f"In half of the merged matrices the update has less than {max(share, 1e-4):.2g} of "
            f"the size of the math model's own change, which is probably too small to matter. A "
            f"budget of {change:.2g} at lambda 1 gives every matrix the relative change that the "
            f"math model has on average."
        )


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
    dd: float = 0.0  # ||sum dM_k||^2 of the experts' own changes
    share: float = 0.0  # ||b X|| / ||sum dM_k|| of one matrix

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
    update_of: Callable[[Decision, Sequence[LayerRecord]], AffineUpdate],
    totals: Totals,
) -> Preview:
    """Sum the records' inner products over the decisions.

    Math:   per matrix, with selected experts E: X = sum_E w_k P_k, U = a dV + b X
            (`AffineUpdate`), so ||U||^2 = a^2 ||dV||^2 + 2 a b <dV, X> + b^2 ||X||^2, plus the
            expectation over random drops,
            change = sqrt(sum ||U||^2 / sum ||W_mllm||^2), keep = cos(dV, dV + U),
            absorb = cos(X, dV + U), sums over matrices.

    Args:
        decisions: the decisions of the plan.
        records: records of the analysis, for all matrices and experts.
        update_of: returns the change of a matrix, given its records; gains can depend on the layer.
        totals: sizes of the model.
    """
    by_matrix: dict[str, list[LayerRecord]] = {}
    for record in records:
        by_matrix.setdefault(record.name, []).append(record)
    decisions = list(decisions)
    whole = _Products()
    layers: dict[int, _Products] = {}
    shares: list[float] = []
    kept_by_layer = 0
    chosen = _Products()
    reasons: set[str] = set()
    for decision in decisions:
        records_of = by_matrix[decision.name]
        update = update_of(decision, records_of)
        reasons |= {update.approximate} if decision.experts else set()
        products = _matrix_products(records_of, decision.experts, update)
        whole.add(products)
        if decision.experts:
            shares.append(products.share)
            kept_by_layer += update.expert == 0  # by a layer gain, or all by lambda
            chosen.add(products)
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
        # A layer that keeps its weights says nothing about the size of the update.
        update_share=_median(sorted(shares)[kept_by_layer:] or shares),
        expert_change=math.sqrt(max(chosen.dd, 0.0) / chosen.weight) if chosen.weight else 0.0,
        approximate="; ".join(sorted(reasons - {""})),
    )


def _matrix_products(
    records: list[LayerRecord], experts: tuple[int, ...], update: AffineUpdate
) -> _Products:
    first = records[0]
    products = _Products(weight=first.weight_norm2, vv=first.mllm_norm2)
    if not experts:
        return products
    a, b = update.mllm, update.expert
    share = dict(enumerate(update.shares)) if update.shares else dict.fromkeys(experts, 1.0)
    noise = update.mllm_noise * products.vv
    for expert in experts:
        norms, own = records[expert].updates[update.direction], share[expert]
        products.vx += own * norms.inner
        crossed = sum(share[other] * norms.cross[other] for other in experts if other < expert)
        products.xx += own * own * norms.norm2 + 2 * own * crossed
        plain = records[expert].updates["select_only"]
        products.dd += plain.norm2 + 2 * sum(plain.cross[e] for e in experts if e < expert)
        noise += update.expert_noise * own * own * norms.norm2
    if update.budget:
        factor = _budget_factor(update.budget, products)
        products.vx *= factor
        products.xx *= factor * factor
    if products.dd > 0:
        products.share = abs(b) * math.sqrt(max(products.xx, 0.0) / products.dd)
    products.vu = a * products.vv + b * products.vx
    products.ux = a * products.vx + b * products.xx
    products.uu = a * products.vu + b * products.ux + noise
    return products


def _median(values: Sequence[float]) -> float | None:
    ordered, middle = sorted(values), len(values) // 2
    if not ordered:
        return None
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _budget_factor(budget: float, products: _Products) -> float:
    """Return budget ||W_mllm|| / ||X||; 0 if X is zero."""
    return budget * math.sqrt(products.weight / products.xx) if products.xx > 0 else 0.0


def known_statistic(
    method: MergeMethod,
    parameters: Mapping[str, ParameterValue],
    records: Sequence[LayerRecord],
    decisions: Iterable[Decision],
) -> tuple[float, ...] | None:
    """Compute the method's statistic from an analysis, if it contains the required norms.

    Math:   ||dV||^2 of the MLLM and ||dM_k||^2 of every expert, each summed over merged matrices.
    """
    statistic = method.statistic
    if statistic is None or not method.needs_statistic(parameters):
        return None
    taken = {decision.name for decision in decisions if decision.experts}
    sums: dict[int, float] = {}
    for record in records:
        if record.name in taken:
            own = {-1: record.mllm_norm2} if record.expert == 0 else {}
            for model, norm2 in {**own, record.expert: record.math_norm2}.items():
                sums[model] = sums.get(model, 0.0) + norm2
    if not sums or not statistic.of_norms(parameters):
        return None
    return statistic.combine(list(sums.values()), (), **parameters)


def known_update(
    method: MergeMethod,
    parameters: Mapping[str, ParameterValue],
    anchor: Anchor,
    statistic: tuple[float, ...] | None,
    layer: int,
    records: Sequence[LayerRecord],
    *,
    own_base: bool,
) -> AffineUpdate:
    """Return the change of a matrix, computed from its records.

    Raises: PlanError with the reason if the change cannot be computed without the weights.
    """
    parallel = anchor in (
        "two_base",
        "root",
    )  # otherwise there is only one task vector, and no angle
    norms2 = math.sqrt(records[0].mllm_norm2 * records[0].math_norm2)
    facts = {
        "statistic": statistic,
        "layer": layer,
        "experts": len(records),
        "cosine": records[0].inner / norms2 if parallel and norms2 > 0 else None,
        "squared_norms": (records[0].mllm_norm2, *(record.math_norm2 for record in records)),
    }
    update = method.affine({**parameters, **facts}) if method.affine else None
    if update is None:
        raise _unknown(method, method.reason_unknown(parameters))
    if update.direction not in records[0].updates:
        raise _unknown(method, _NOT_MEASURED)
    # The analysis has no inner products for task vectors relative to other bases.
    elsewhere = own_base and anchor in ("root", "interp")
    moved = None if elsewhere else update.from_anchor(anchor, len(records))
    if moved is None:
        raise _unknown(
            method, f"the analysis does not contain the task vectors of the anchor {anchor}"
        )
    return moved


def checked_options(method: MergeMethod, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an analysis, validated if the method depends on them.

    Raises: PlanError for a value that the method does not support.
    """
    for parameter in method.parameters:
        if parameter.name in method.from_analysis and parameter.name in options:
            parameter.check(options[parameter.name])
    return dict(options)


def as_measured(
    method: MergeMethod,
    update: AffineUpdate,
    parameters: Mapping[str, ParameterValue],
    analysed: Mapping[str, ParameterValue] | None,
    shape: tuple[int, int],
) -> AffineUpdate:
    """Return the update, marked as approximate if the analysis was not exact.

    Args:
        method: the method.
        update: the change of one matrix.
        parameters: parameters of the method.
        analysed: the options of the analysis; None if the plan does not record them.
        shape: shape of the matrix.

    Raises: PlanError if the analysis measured the direction with other options.
    """
    if not update.measured_with:
        return update
    if analysed is None:
        return update._replace(approximate=_UNKNOWN)
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    for name in update.measured_with:
        there, here = analysed.get(name, defaults[name]), parameters[name]
        if _effective(name, there, shape) != _effective(name, here, shape):
            raise _unknown(
                method,
                f"the analysis used {name} {shown(there)} and the plan has {name} {shown(here)}. "
                f"Omit {name} from the plan to use that of the analysis, or analyse the pair with "
                f"{name} {shown(here)}",
            )
    return update._replace(approximate=_QUICK) if analysed.get("quick") else update


def _effective(name: str, value: ParameterValue, shape: tuple[int, int]) -> ParameterValue:
    """Return the effective value for one matrix: a rank is bounded by its dimensions."""
    if name != "rank":
        return value
    return min(shape) if value is None else min(int(value), *shape)


def _unknown(method: MergeMethod, reason: str) -> PlanError:
    return PlanError(
        f"{method.label} with these parameters is not previewable: {reason}. The merge itself "
        f"works."
    )
