"""What a plan may merge, how much, from where: the meaning of `PlanOptions` for a method.

In: options, a method and its parameters. Out: a `Scope` that answers for a name, the anchor, or a
PlanError where the method cannot follow. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import MergeMethod
from ipmerge_core.methods.registry import DataKind
from ipmerge_core.models.matrix_kinds import MODULES, is_projection, is_router
from ipmerge_core.planning.options import LayerProfile, Modules, PlanOptions, shown
from ipmerge_core.runtime.patterns import Pattern, compile_pattern
from ipmerge_core.spectral.kinds import SIMILARITIES, Anchor

SELECTION = {"similarity_threshold": 0.4, "similarity": "first"}  # defaults of the selection


class Scope(NamedTuple):
    """Selects tensors by name: an override, or of a module in scope, included and not excluded."""

    modules: Modules | None
    overrides: Mapping[str, str]
    include: Pattern | None
    exclude: Pattern | None

    @classmethod
    def of(cls, options: PlanOptions, *, calibrated: bool) -> Scope:
        """Make the scope of a plan's options; without modules for a plan that needs data."""
        modules = None if calibrated else options.modules
        return cls(modules, options.overrides, _compile(options.include), _compile(options.exclude))

    def covers(self, module: str) -> bool:
        """Return whether matrices of a module are merged unless something else keeps them."""
        if self.modules is None:
            return module in MODULES  # what a calibration measures
        if self.modules == "projections":
            return is_projection(module)
        return self.modules == "all-and-router" or not is_router(module)

    def allows(self, name: str, wanted: bool) -> bool:
        """Return whether a tensor is merged; `wanted` is the default decision."""
        if name in self.overrides:
            return self.overrides[name] == "merge"
        if self.include and not self.include.search(name):
            return False
        return wanted and not (self.exclude and self.exclude.search(name))


def _compile(pattern: str | None) -> Pattern | None:
    return None if pattern is None else compile_pattern(pattern)


def needed_data(
    method: MergeMethod, parameters: Mapping[str, Any], options: PlanOptions
) -> DataKind | None:
    """Return the calibration that a plan needs: that of its method, or Gram matrices for AIM."""
    return method.data_for(parameters) or ("gram" if options.input_share < 1 else None)


def data_reason(method: MergeMethod, parameters: Mapping[str, Any], options: PlanOptions) -> str:
    """Return which values need a calibration, for a message; "" if the method always needs one."""
    usual = {parameter.name: parameter.default for parameter in method.parameters}
    deciding = {n: parameters[n] for n in method.decides_data if parameters[n] != usual[n]}
    named = deciding if method.data_for(parameters) else {}
    if options.input_share < 1:
        named = {**named, "input_share": options.input_share}
    return f" with {', '.join(f'{n}={shown(v)}' for n, v in named.items())}" if named else ""


def check_extras(method: MergeMethod, options: PlanOptions, *, calibrated: bool) -> None:
    """Check that the method can merge the requested modules and extras. Raises: PlanError."""
    if calibrated and options.modules != "projections":
        raise PlanError(
            f"{method.label} requires calibration data, which are measured for q, k, v, o, gate, "
            f"up and down only. Use modules=projections, or a method without calibration."
        )
    if options.input_share < 1 and method.data == "fisher":
        raise PlanError(
            f"input_share is {options.input_share:g}, which needs the Gram matrices of the MLLM's "
            f"inputs, and the calibration of {method.label} has Fisher information only. Use "
            f"input_share=1, or another method."
        )
    asked = ["norms and biases"] if options.norms != "keep" else []
    asked += ["embeddings"] if options.embeddings != "keep" else []
    if asked and method.matrixwise and method.vectors is None:
        raise PlanError(
            f"{method.label} operates on whole matrices and does not support {asked[0]}. Keep "
            f"them, or choose another method, such as task_arithmetic."
        )


def check_choice(threshold: float, similarity: str) -> None:
    """Refuse an impossible threshold or similarity. Raises: PlanError."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise PlanError(f"The similarity threshold is {threshold!r}; expected a number in [0, 1].")
    if not 0 <= threshold <= 1:  # also rejects NaN
        raise PlanError(
            f"The similarity threshold is {threshold}; expected a number in [0, 1], such as the "
            f"default 0.4."
        )
    if similarity not in SIMILARITIES:
        raise PlanError(f"Unknown similarity {similarity!r}. Available: {', '.join(SIMILARITIES)}.")


def check_layer_gains(
    method: MergeMethod, options: PlanOptions, parameters: Mapping[str, Any], layers: int
) -> None:
    """Check that no gain is unused and the method's gain stays in its range. Raises: PlanError."""
    factors = options.layer_gains
    if len(factors) > layers:
        raise PlanError(
            f"layer_gains has {len(factors)} factors and the model {layers} layers, so that some "
            f"would not be used. Give at most one factor per layer."
        )
    if method.gain is not None:
        for factor in (*factors, *schedule(options, range(layers)).values()):
            method.complete({**parameters, method.gain: parameters[method.gain] * factor})


def schedule(options: PlanOptions, layers: Iterable[int]) -> dict[int, float]:
    """Return the factor of every layer: its layer gain times that of the profile.

    >>> schedule(PlanOptions(layer_gains=(2,), layer_profile="upper_half"), range(3))
    {0: 0.0, 1: 2.0, 2: 2.0}
    """
    gains = spread(options.layer_gains or (1.0,), layers)
    profile = profile_gains(options.layer_profile, len(gains))
    return {n: gains[n] * factor for n, factor in zip(sorted(gains), profile, strict=True)}


def profile_gains(profile: LayerProfile, layers: int) -> list[float]:
    """Return the factors of a preset, in the order of the layers.

    A layer is in a half by its middle, (i + 1/2) / layers: the lower and the upper half share no
    layer, and of an odd number the upper half is the larger one.

    >>> profile_gains("middle_half", 4), profile_gains("falling", 3)
    ([0.0, 1.0, 1.0, 0.0], [1.0, 0.5, 0.0])
    """
    if profile in ("rising", "falling"):
        ends = (0, 1) if profile == "rising" else (1, 0)
        return list(spread(ends, range(layers)).values())
    low, high = {
        "all": (0.0, 1.0),
        "upper_half": (0.5, 1.0),
        "lower_half": (0.0, 0.5),
        "middle_half": (0.25, 0.75),
    }[profile]
    return [float(low <= (i + 0.5) / layers < high) for i in range(layers)]


def check_used(
    method: MergeMethod, threshold: float, similarity: str, given: Mapping[str, Any]
) -> None:
    """Refuse values that the method does not use. Raises: PlanError naming the value."""
    if not method.needs_analysis:
        selection = {"similarity_threshold": threshold, "similarity": similarity}
        for name, value in selection.items():
            merges_all = name == "similarity_threshold" and value == 0
            if value != SELECTION[name] and not merges_all:
                raise PlanError(
                    f"{method.label} merges every matrix in scope and does not select by "
                    f"similarity; {name}={value} has no effect. Omit it, or select with include, "
                    f"exclude or overrides."
                )
    names = {parameter.name for parameter in method.parameters}
    known = {name: value for name, value in given.items() if name in names}
    if unused := method.without_effect(known):
        raise PlanError(f"{method.label} does not use {unused[0]}. Omit it.")


def spread(factors: Sequence[float], layers: Iterable[int]) -> dict[int, float]:
    """Return a factor per layer: evenly spaced from the first to the last, and interpolated.

    >>> spread((0, 1), range(3))
    {0: 0.0, 1: 0.5, 2: 1.0}
    """
    ordered = sorted(layers)
    places = np.linspace(0, len(factors) - 1, num=len(ordered))
    return dict(zip(ordered, np.interp(places, range(len(factors)), factors).tolist(), strict=True))


def choose_anchor(
    method: MergeMethod, anchor: Anchor | None, parameters: Mapping[str, Any]
) -> Anchor:
    """Return the requested anchor, or the method's default.

    A plain sum uses inject: the MLLM's own change is kept, and its base is not used. Methods that
    average weights use interp. Methods that weight the models' changes against each other also need
    the MLLM's change and use two_base, as does a sum that scales the MLLM's change.

    Raises: PlanError for an anchor that the method does not support.
    """
    if anchor is None:
        scaled = method.anchor == "inject" and parameters.get("mllm_weight") != 1.0
        return "two_base" if scaled else method.anchor
    if method.needs_analysis and anchor != "two_base":
        raise PlanError(
            f"{method.label} adds to the MLLM and requires both task vectors, each relative to its "
            f"model's own base; use the anchor two_base."
        )
    if method.data is not None and anchor not in ("interp", "root"):
        raise PlanError(
            f"{method.label} requires exactly the weights that were calibrated, which the anchor "
            f"{anchor} would change. Use the anchor interp."
        )
    if anchor in ("two_base", "root"):
        return anchor
    if method.anchor != "interp" and parameters.get("mllm_weight", 1.0) != 1.0:
        raise PlanError(
            f"mllm_weight is {parameters['mllm_weight']!r}; with the anchor {anchor} the MLLM's "
            f"task vector is not scaled. Use mllm_weight=1 and set math_weight."
        )
    own_norms = method.statistic is not None and method.statistic.from_own_base
    if own_norms and parameters["scope"] != "model":
        raise PlanError(
            f"With the anchor {anchor} a matrix has one task vector, but {method.label} weights "
            f"two. Use scope=model, or the anchor two_base."
        )
    return anchor


def method_anchor(method: MergeMethod, anchor: Anchor) -> Anchor:
    """Return the anchor to compute with.

    A plain sum added to the MLLM is the same for any base of the MLLM; with the experts' base no
    weights have to be shifted, which saves time and a rounding.
    """
    return "root" if anchor == "inject" and method.anchor == "inject" else anchor
