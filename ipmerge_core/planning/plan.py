"""Merge plans: which matrices are merged, with what method and parameters.

In: an `Analysis` (or a `ModelPair` for methods that need no similarity), a threshold and gains.
Out: a `MergePlan`, a small JSON file that reproduces the merge, and its `preview()`, which is
computed exactly from the inner products of the analysis without reading weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ipmerge_core.analysis.analyse import describe
from ipmerge_core.analysis.records import Analysis, LayerRecord, Sources, Totals
from ipmerge_core.analysis.updates import has_updates
from ipmerge_core.errors import PairingError, PlanError
from ipmerge_core.methods import MergeMethod, find_method
from ipmerge_core.methods.declarations import AffineUpdate, ParameterValue
from ipmerge_core.models.pairing import TO_FORCE, ModelPair, open_pair
from ipmerge_core.models.shared_tokens import SharedTokens, shared_tokens
from ipmerge_core.planning.calibrated import Calibrated
from ipmerge_core.planning.decisions import decide, take_all
from ipmerge_core.planning.options import OPTIONS, Override, PlanOptions
from ipmerge_core.planning.preview import (
    Decision,
    Preview,
    as_measured,
    check_consistent,
    checked_options,
    known_statistic,
    known_update,
    preview,
)
from ipmerge_core.planning.scope import (
    Scope,
    check_choice,
    check_extras,
    check_layer_gains,
    check_used,
    choose_anchor,
    data_reason,
    needed_data,
    schedule,
)
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.input_files import (
    CLOSED,
    MEGABYTE,
    Count,
    FileKind,
    InvalidContentError,
    Name,
    Number,
    Schema,
    versioned,
)
from ipmerge_core.spectral.kinds import SIMILARITIES, Anchor

_FORMAT, _VERSION = "ipmerge-plan", 1
PLAN = FileKind("a plan", "Create it again with `ipmerge plan`.", PlanError, largest=128 * MEGABYTE)


@dataclass(frozen=True)
class MergePlan:
    """Everything needed to reproduce a merge; created by `make_plan`, executed by `merge`."""

    __pydantic_config__ = CLOSED

    name: Name
    method: Name
    parameters: Mapping[str, ParameterValue]
    similarity: Annotated[str, Field(pattern=f"^({'|'.join(SIMILARITIES)})$")] | None
    similarity_threshold: Annotated[float, Field(ge=0, le=1)] | None
    options: PlanOptions  # its anchor is the one that was chosen, never None
    sources: Sources
    totals: Totals
    decisions: tuple[Decision, ...]
    records: tuple[LayerRecord, ...] = ()  # without spectra; empty if made from a ModelPair
    calibration: Calibrated | None = None  # for methods that need data
    tokens: SharedTokens | None = None  # merged rows of embeddings and head
    statistic: tuple[Number, ...] | None = None  # of the whole model, if already known
    analysed: Mapping[str, ParameterValue] | None = None  # the options of the analysis, if known
    method_version: Count = 1  # of the method's mathematics, see `MergeMethod.version`

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the merged bytes."""
        options = self.options
        sources = self.sources.all()
        fingerprints = [source.fingerprint for source in sources]
        contents = [source.content for source in sources]
        chosen = [[d.name, list(d.experts)] for d in self.decisions if d.experts]
        parameters = dict(sorted(find_method(self.method).as_hashed(self.parameters).items()))
        data = [self.calibration.digest] if self.calibration else []
        content: list[Any] = [
            self.method,
            parameters,
            [*options.layer_gains, *self._scaling],
            chosen,
            fingerprints,
            *data,
        ]
        if options.norms != "keep" or self.tokens:
            content.append([options.norms, self.tokens, options.include, options.exclude])
        if options.modules != "projections":
            content.append(["modules", options.modules])
        if self.anchor != "two_base":
            content.append(self.anchor)
        if self.statistic:
            content.append(list(self.statistic))
        if options.layer_profile != "all":
            content.append(["profile", options.layer_profile])
        if options.input_share < 1:
            content.append(["input share", options.input_share])
        if any(contents):
            content.append(["contents", contents])
        if self.method_version > 1:  # 1 is omitted, which keeps the digest of the first plans
            content.append(["version", self.method_version])
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def _scaling(self) -> tuple[str, ...]:
        """A mark for the digest: layer gains used to multiply the experts' weights."""
        scaled = self._graded and find_method(self.method).gain is None
        return ("change",) if scaled else ()

    @property
    def hash(self) -> str:
        """The first eight digits of the digest, the short name of the plan."""
        return self.digest[:8]

    @property
    def anchor(self) -> Anchor:
        """What changes are measured from."""
        assert self.options.anchor is not None, "make_plan chooses one"
        return self.options.anchor

    @property
    def selected(self) -> tuple[Decision, ...]:
        """The decisions that merge at least one expert."""
        return tuple(decision for decision in self.decisions if decision.experts)

    @property
    def extras(self) -> tuple[str, ...]:
        """What is merged in addition to the decoder's matrices, as far as known without the models.

        `merging.parts.count_extras` counts them for opened models.
        """
        scope = " in scope" if self.options.include or self.options.exclude else ""
        found = [f"the decoder's norms and biases{scope}"] if self.options.norms == "merge" else []
        if self.tokens:
            rows = f"{self.tokens.rows} rows of embeddings and head (shared tokens)"
            found.append(f"{rows}{scope and ', as far as they are in scope'}")
        return tuple(found)

    def allows(self, name: str) -> bool:
        """Whether an additional tensor, by the base's name, is included and not excluded."""
        options = replace(self.options, overrides={})
        return Scope.of(options, calibrated=self.calibration is not None).allows(name, True)

    def preview(self) -> Preview:
        """Compute how the merge will change the model, without reading weights.

        Raises: PlanError if the change is not affine in directions of the analysis, or the plan
            was made without an analysis.
        """
        if not self.records:
            raise PlanError(
                "This plan was made without an analysis and cannot be previewed. Analyse the pair "
                "and make the plan from the analysis."
            )
        found = preview(self.decisions, self.records, self._update_of, self.totals)
        return replace(found, not_counted=self.extras)

    def parameters_for(self, layer: int) -> dict[str, ParameterValue]:
        """Return the method's parameters for one layer, its gain scaled by the layer schedule."""
        gain, parameters = find_method(self.method).gain, dict(self.parameters)
        if gain is not None and self._graded:
            value = parameters[gain]
            assert isinstance(value, float), "a gain is a number"
            parameters[gain] = value * self._schedule[layer]
        return parameters

    @property
    def has_updates(self) -> bool:
        """Whether the change is a gain times factors that do not depend on the plan's other values.

        A budget rescales the experts' sum, and AIM the merged matrix, so that neither has them.
        """
        plain = not self.parameters.get("budget") and self.options.input_share == 1
        return plain and has_updates(self.method, self.parameters)

    def change_scale(self, layer: int) -> float:
        """Return the factor on the change W - W_mllm of one layer's matrices.

        1 if the method has a gain, which `parameters_for` scales instead, and without layer gains.
        """
        if find_method(self.method).gain is not None or not self._graded:
            return 1.0
        return self._schedule[layer]

    @cached_property
    def _schedule(self) -> dict[int, float]:
        return schedule(self.options, {decision.layer for decision in self.decisions})

    @property
    def _graded(self) -> bool:
        """Whether layers have factors of their own."""
        return bool(self.options.layer_gains) or self.options.layer_profile != "all"

    def _update_of(self, decision: Decision, records: Sequence[LayerRecord]) -> AffineUpdate:
        method, parameters = find_method(self.method), self.parameters_for(decision.layer)
        if self.options.input_share < 1:
            raise PlanError(
                f"{method.label} with input_share {self.options.input_share:g} is not previewable: "
                f"the change depends on the calibration. The merge itself works."
            )
        found = known_update(
            method,
            parameters,
            self.anchor,
            self.statistic,
            decision.layer,
            records,
            own_base=self.sources.base_mllm is not None,
        )
        found = found.scaled(self.change_scale(decision.layer))
        return as_measured(method, found, parameters, self.analysed, records[0].shape)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan's JSON content."""
        content = asdict(self)
        options = self.options.to_dict()
        del content["options"], options["embeddings"]  # `tokens` contains it
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "hash": self.hash,
            **content,
            **options,
            "totals": self.totals._asdict(),
            "tokens": self.tokens._asdict() if self.tokens else None,
            "records": [record.to_dict() for record in self.records],
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> MergePlan:
        """Read a plan written by `save`. Raises: PlanError if it is not a plan."""
        content = PLAN.content(path)
        try:
            return cls.from_dict(content)
        except (InvalidContentError, PlanError) as error:
            raise PLAN.refusal(path, error) from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergePlan:
        """Rebuild a plan from its JSON content. Raises: InvalidContentError, PlanError."""
        _, fields = versioned(content, _FORMAT, (_VERSION,))
        stored = fields.pop("hash", None)
        options = {name: fields.pop(name) for name in OPTIONS if name in fields}
        options["anchor"] = options.get("anchor") or "two_base"  # the only one of older files
        options["embeddings"] = "merge-shared" if fields.get("tokens") else "keep"
        found = _PLAN.validate({**fields, "options": options})
        method = find_method(found.method)
        plan = replace(
            found,
            parameters=method.complete(method.with_former_defaults(found.parameters)),
            analysed=checked_options(method, found.analysed) if found.analysed else None,
        )
        check_consistent(plan.decisions, plan.records, len(plan.sources.math))
        if plan.hash != stored:
            raise InvalidContentError(f"its hash is {plan.hash}, but the file has {stored!r:.80}")
        if plan.method_version != method.version:
            raise InvalidContentError(
                f"it was made for version {plan.method_version} of {method.label}; this release "
                f"computes version {method.version}, which gives other weights"
            )
        return plan


_PLAN = Schema[MergePlan](MergePlan)


def make_plan(
    source: Analysis | ModelPair,
    method: str = "ip_merging",
    similarity_threshold: float = 0.4,
    lambda_: float = 1.0,
    similarity: str = "first",
    overrides: Mapping[str, Override] | None = None,
    *,
    options: PlanOptions | None = None,
    calibration: str | Path | None = None,
    **parameters: Any,  # noqa: ANN401 (options have types of their own)
) -> MergePlan:
    """Create a plan: select the matrices to merge and set the parameters.

    Args:
        source: an Analysis, or a ModelPair for methods that do not select by similarity.
        method: a key of METHODS.
        similarity_threshold: S_alpha in [0, 1]; matrices with similarity >= S_alpha are merged.
        lambda_: gain >= 0 on the update, for methods that have one.
        similarity: "first", "max" or "weighted".
        overrides: per matrix name "merge" or "keep"; takes precedence over all other options.
        options: `PlanOptions`, which lists them: include, exclude, layer_gains, norms, embeddings,
            anchor. Each may be given by its own name instead, as `norms="merge"`.
        calibration: a folder written by `calibrate`, for methods that need data.
        **parameters: options by name, and parameters of the method; by default those of the
            analysis (temperature, rank), or the method's defaults.

    Raises:
        PlanError: a value is out of range, a name unknown, or the source is not sufficient.
        CheckpointError, PairingError: the calibration is missing or of other models.
    """
    chosen = find_method(method)
    named = parameters if overrides is None else {**parameters, "overrides": overrides}
    options = (options or PlanOptions()).updated(named)
    own = {name: value for name, value in parameters.items() if name not in OPTIONS}
    analysed = checked_options(chosen, source.parameters if isinstance(source, Analysis) else {})
    complete = _complete(chosen, {"lambda_": lambda_, **own}, analysed)
    check_choice(similarity_threshold, similarity)
    check_used(chosen, similarity_threshold, similarity, own)
    _check_source(chosen, source)
    kind = needed_data(chosen, complete, options)
    scope = Scope.of(options, calibrated=kind is not None)
    threshold = similarity_threshold if chosen.needs_analysis else None
    if isinstance(source, Analysis):
        decisions = decide(source, similarity, threshold, scope)
        sources, totals, records = source.sources, source.totals, _without_spectra(source.records)
    else:
        decisions = take_all(source.matrices, len(source.math), scope)
        (sources, totals), records = describe(source), ()
    _check_overrides(options.overrides, decisions)
    check_extras(chosen, options, calibrated=kind is not None)
    layers = len({decision.layer for decision in decisions})
    check_layer_gains(chosen, options, complete, layers)
    return MergePlan(
        name=source.name,
        method=method,
        parameters=complete,
        similarity=similarity if chosen.needs_analysis else None,
        similarity_threshold=threshold,
        options=replace(options, anchor=choose_anchor(chosen, options.anchor, complete)),
        sources=sources,
        totals=totals,
        decisions=tuple(decisions),
        records=records,
        calibration=Calibrated.find(
            chosen, kind, calibration, sources, data_reason(chosen, complete, options)
        ),
        tokens=_share_tokens(source) if options.embeddings == "merge-shared" else None,
        statistic=known_statistic(chosen, complete, records, decisions),
        analysed=analysed or None,
        method_version=chosen.version,
    )


def _complete(
    method: MergeMethod, given: Mapping[str, ParameterValue], analysed: Mapping[str, ParameterValue]
) -> dict[str, ParameterValue]:
    """Return the method's parameters: as given, as analysed, or the defaults."""
    names = [parameter.name for parameter in method.parameters]
    taken = {name: analysed[name] for name in method.from_analysis if name in analysed}
    if "lambda_" in names:
        return method.complete({**taken, **given})
    if given["lambda_"] != 1.0:
        raise PlanError(
            f"{method.label} has no parameter lambda (got {given['lambda_']!r}). It has: "
            f"{', '.join(names) or 'none'}."
        )
    return method.complete(
        taken | {name: value for name, value in given.items() if name != "lambda_"}
    )


def _check_source(method: MergeMethod, source: Analysis | ModelPair) -> None:
    experts = len(source.sources.math if isinstance(source, Analysis) else source.math)
    if experts > 1 and not method.several_experts:
        raise PlanError(
            f"{method.label} supports one expert and this pair has {experts}. Choose another "
            f"method."
        )
    if method.needs_analysis and not isinstance(source, Analysis):
        raise PlanError(
            f"{method.label} selects matrices by similarity. Analyse the pair first and make the "
            f"plan from the analysis."
        )


def open_sources(sources: Sources) -> ModelPair:
    """Open the models of a plan or an analysis, without comparing their weights."""
    return open_pair(**sources.locations()._asdict())


def reopen(plan: MergePlan) -> ModelPair:
    """Open the models of a plan and check that their weights are unchanged.

    Raises: PairingError if the weights of a model differ from those the plan was made for.
    """
    sources = plan.sources
    pair = open_sources(sources)
    for source, (_, model) in zip(sources.all(), pair.roles(), strict=True):
        if source.differs_from(model.fingerprint, model.content):
            raise PairingError(
                f"The weights of '{source.id}' have changed since the plan was made (fingerprint "
                f"{model.fingerprint[:8]}, content {str(model.content)[:8]}; the plan has "
                f"{source.fingerprint[:8]}, {str(source.content)[:8]}). Analyse the pair again and "
                f"make a new plan."
            )
    return pair


def require_common_base(plan: MergePlan, *, force: bool = False) -> None:
    """Check the models of a plan as a merge does.

    Raises: PairingError if the sibling check refuses them, or the weights have changed.
    """
    reopen(plan).require_common_base(TO_FORCE, force=force)


def _share_tokens(source: Analysis | ModelPair) -> SharedTokens:
    return shared_tokens(open_sources(source.sources) if isinstance(source, Analysis) else source)


def _check_overrides(overrides: Mapping[str, str], decisions: Iterable[Decision]) -> None:
    unknown = sorted(set(overrides) - {decision.name for decision in decisions})
    if unknown:
        raise PlanError(
            f"An override names '{unknown[0]}', which is not a decoder matrix of this pair. "
            f"Use the base's names, such as 'model.layers.0.self_attn.q_proj.weight'."
        )


def _without_spectra(records: Iterable[LayerRecord]) -> tuple[LayerRecord, ...]:
    return tuple(
        replace(record, index=(), mllm_sigma=(), math_sigma=(), angles=(), spectra=None)
        for record in records
    )
