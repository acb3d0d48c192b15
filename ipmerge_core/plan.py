"""Decisions before bytes: which matrices merge, with what method and gains, and what that changes.

In: an `Analysis` (or a bare `ModelPair` for methods that need no similarity), a threshold and
gains. Out: a `MergePlan`, one small JSON file that repeats the merge anywhere, and its `preview()`,
which is arithmetic on the analysis' inner products: exact, without reading a weight. The browser
does the same arithmetic while a slider moves. Nothing is written here but plan files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ipmerge_core.analysis import describe
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import MergeMethod, find_method
from ipmerge_core.methods.registry import AffineUpdate, ParameterValue
from ipmerge_core.pairing import MatrixMatch, ModelPair
from ipmerge_core.records import Analysis, LayerRecord, Sources, Totals

Override = Literal["merge", "keep"]
SIMILARITIES = ("first", "max", "weighted")
_FORMAT, _VERSION = "ipmerge-plan", 1


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
    where one of the two is zero. They are geometry, not accuracy.
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


@dataclass(frozen=True)
class MergePlan:
    """Everything that is needed to repeat a merge; made by `make_plan`, carried out by `merge`."""

    name: str
    method: str
    parameters: Mapping[str, ParameterValue]
    similarity: str | None
    similarity_threshold: float | None
    overrides: Mapping[str, Override]
    sources: Sources
    totals: Totals
    decisions: tuple[Decision, ...]
    records: tuple[LayerRecord, ...] = ()  # without spectra; empty for a plan from a ModelPair

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the merged bytes."""
        fingerprints = [source.fingerprint for source in self.sources.all()]
        chosen = [[d.name, list(d.experts)] for d in self.decisions if d.experts]
        content = [self.method, dict(sorted(self.parameters.items())), chosen, fingerprints]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def hash(self) -> str:
        """The first eight digits of the digest: the plan's name among people."""
        return self.digest[:8]

    @property
    def selected(self) -> tuple[Decision, ...]:
        """The decisions that merge at least one expert."""
        return tuple(decision for decision in self.decisions if decision.experts)

    def preview(self) -> Preview:
        """Compute what the merge will change, without reading a weight.

        Raises: PlanError when the method's change is not affine in directions that the analysis
            holds, or the plan was made without an analysis.
        """
        return preview_of(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "hash": self.hash,
            **asdict(self),
            "totals": self.totals._asdict(),
            "records": [record.to_dict() for record in self.records],
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MergePlan:
        """Read a plan that `save` wrote. Raises: PlanError when it is no plan."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(content)
        except OSError as error:
            raise PlanError(f"Cannot read the plan '{path}': {error.strerror}.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"'{path}' is not a plan of this version ({type(error).__name__}: {error}). "
                f"Make it with `ipmerge plan`."
            ) from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergePlan:
        """Rebuild a plan from its JSON content and check its values again."""
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        plan = cls(
            name=content["name"],
            method=content["method"],
            parameters=find_method(content["method"]).complete(content["parameters"]),
            similarity=content["similarity"],
            similarity_threshold=content["similarity_threshold"],
            overrides=content["overrides"],
            sources=Sources.from_dict(content["sources"]),
            totals=Totals(**content["totals"]),
            decisions=tuple(
                Decision(**{**entry, "experts": tuple(entry["experts"])})
                for entry in content["decisions"]
            ),
            records=tuple(LayerRecord.from_dict(entry) for entry in content["records"]),
        )
        if plan.hash != content["hash"]:
            raise ValueError(f"its hash is {plan.hash} and the file says {content['hash']}")
        return plan


def make_plan(
    source: Analysis | ModelPair,
    method: str = "ip_merging",
    similarity_threshold: float = 0.4,
    lambda_: float = 1.0,
    similarity: str = "first",
    overrides: Mapping[str, Override] | None = None,
    **parameters: ParameterValue,
) -> MergePlan:
    """Decide what merges.

    Args:
        source: an Analysis; a ModelPair is enough for methods that do not select by similarity.
        method: a key of METHODS.
        similarity_threshold: S_alpha in [0, 1]; a matrix merges iff its similarity reaches it.
        lambda_: gain >= 0 on the update, for the methods that have one.
        similarity: "first", "max" or "weighted".
        overrides: per matrix name "merge" or "keep", whatever its similarity.
        **parameters: the method's own parameters; the rest take their defaults.

    Raises:
        PlanError: a value is out of range, a name unknown, or the source does not suffice.
    """
    chosen = find_method(method)
    overrides = dict(overrides or {})
    if "lambda_" in {parameter.name for parameter in chosen.parameters}:
        parameters["lambda_"] = lambda_
    elif lambda_ != 1.0:
        raise PlanError(
            f"{chosen.label} has no lambda (got {lambda_!r}). Its parameters are: "
            f"{', '.join(parameter.name for parameter in chosen.parameters) or 'none'}."
        )
    complete = chosen.complete(parameters)
    _check_choice(similarity_threshold, similarity, overrides)
    if chosen.selective and not isinstance(source, Analysis):
        raise PlanError(
            f"{chosen.label} selects matrices by similarity. Analyse the pair first and make the "
            f"plan from the analysis."
        )
    decisions = (
        _decide(source, chosen, similarity, similarity_threshold, overrides)
        if isinstance(source, Analysis)
        else _take_all(source.matrices, len(source.math), overrides)
    )
    _check_overrides(overrides, decisions)
    sources, totals = (
        (source.sources, source.totals) if isinstance(source, Analysis) else describe(source)
    )
    return MergePlan(
        name=source.name,
        method=method,
        parameters=complete,
        similarity=similarity if chosen.selective else None,
        similarity_threshold=similarity_threshold if chosen.selective else None,
        overrides=overrides,
        sources=sources,
        totals=totals,
        decisions=tuple(decisions),
        records=_without_spectra(source.records) if isinstance(source, Analysis) else (),
    )


def _check_choice(threshold: float, similarity: str, overrides: Mapping[str, str]) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise PlanError(f"The similarity threshold is {threshold!r}; expected a number in [0, 1].")
    if not 0 <= threshold <= 1:  # also refuses NaN
        raise PlanError(
            f"The similarity threshold (S_alpha) is {threshold}; similarities lie in [0, 1], so "
            f"choose a value there, such as the default 0.4."
        )
    if similarity not in SIMILARITIES:
        raise PlanError(f"Unknown similarity {similarity!r}. Available: {', '.join(SIMILARITIES)}.")
    for name, override in overrides.items():
        if override not in ("merge", "keep"):
            raise PlanError(f"The override of '{name}' is {override!r}; expected merge or keep.")


def _check_overrides(overrides: Mapping[str, str], decisions: Iterable[Decision]) -> None:
    unknown = sorted(set(overrides) - {decision.name for decision in decisions})
    if unknown:
        raise PlanError(
            f"An override names '{unknown[0]}', which is no decoder matrix of this pair. "
            f"Use the base's names, such as 'model.layers.0.self_attn.q_proj.weight'."
        )


def _decide(
    analysis: Analysis,
    method: MergeMethod,
    similarity: str,
    threshold: float,
    overrides: Mapping[str, str],
) -> list[Decision]:
    """Apply the rule "merges iff similarity >= S_alpha, unless overridden" per expert."""

    def merges(record: LayerRecord) -> bool:
        if record.name in overrides:
            return overrides[record.name] == "merge"
        return not method.selective or record.similarity[similarity] >= threshold

    decisions: dict[str, Decision] = {}
    for record in analysis.records:
        before = decisions.get(record.name)
        experts = before.experts if before else ()
        decisions[record.name] = Decision(
            name=record.name,
            layer=record.layer,
            module=record.module,
            numel=math.prod(record.shape),
            experts=(*experts, record.expert) if merges(record) else experts,
        )
    return list(decisions.values())


def _take_all(
    matrices: Iterable[MatrixMatch], n_experts: int, overrides: Mapping[str, str]
) -> list[Decision]:
    return [
        Decision(
            name=matrix.name,
            layer=matrix.layer,
            module=matrix.module,
            numel=math.prod(matrix.shape),
            experts=() if overrides.get(matrix.name) == "keep" else tuple(range(n_experts)),
        )
        for matrix in matrices
    ]


def _without_spectra(records: Iterable[LayerRecord]) -> tuple[LayerRecord, ...]:
    return tuple(
        replace(record, index=(), mllm_sigma=(), math_sigma=(), angles=()) for record in records
    )


# --- preview ---


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


def preview_of(plan: MergePlan) -> Preview:
    """Sum the records' inner products over the plan's decisions.

    Math:   per matrix, with selected experts E: X = sum_E P_k, U = a dV + b X (`AffineUpdate`), so
            ||U||^2 = a^2 ||dV||^2 + 2 a b <dV, X> + b^2 ||X||^2,
            change = sqrt(sum ||U||^2 / sum ||W_mllm||^2), keep = cos(dV, dV + U),
            absorb = cos(X, dV + U), sums over matrices.
    """
    update = _affine_update(plan)
    by_matrix: dict[str, list[LayerRecord]] = {}
    for record in plan.records:
        by_matrix.setdefault(record.name, []).append(record)
    whole = _Products()
    layers: dict[int, _Products] = {}
    for decision in plan.decisions:
        products = _matrix_products(by_matrix[decision.name], decision.experts, update)
        whole.add(products)
        layers.setdefault(decision.layer, _Products()).add(products)
    touched = sum(decision.numel for decision in plan.selected)
    return Preview(
        selected=tuple(decision.name for decision in plan.selected),
        n_matrices=len(plan.decisions),
        parameters_touched=touched,
        decoder_parameters=plan.totals.decoder_parameters,
        llm_parameters=plan.totals.llm_parameters,
        bytes_rewritten=touched * plan.totals.decoder_itemsize,
        relative_change=whole.change,
        layer_change={layer: products.change for layer, products in sorted(layers.items())},
        keep=whole.keep,
        absorb=whole.absorb,
    )


def _affine_update(plan: MergePlan) -> AffineUpdate:
    method = find_method(plan.method)
    if not plan.records:
        raise PlanError(
            "This plan was made from a bare pair, so there is nothing to preview from. Analyse "
            "the pair and make the plan from the analysis."
        )
    update = method.affine(plan.parameters) if method.affine else None
    if update is None or update.direction not in plan.records[0].updates:
        raise PlanError(
            f"{method.label} with these parameters has no exact preview: its change is not a "
            f"multiple of a direction that the analysis measured. The merge itself works."
        )
    return update


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
