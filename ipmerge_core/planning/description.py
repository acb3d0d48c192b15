"""Describe a plan, once for every place that shows or records it.

In: a `MergePlan`. Out: its facts as JSON values (`facts_of`), its settings as text (`settings_of`),
its change in a sentence (`describe_change`), and the arguments of `make_plan` that reproduce it
(`arguments_of`). The confirmation, the model card, the manifest, the report of an adapter and the
command line use these, so that none of them omits or rounds what another one shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import find_method
from ipmerge_core.planning.options import OPTIONS, shown
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.planning.scope import Scope
from ipmerge_core.spectral.kinds import TEMPERATURE

_LARGEST_ROUNDED = 0.002  # relative change that 16-bit files do not hold well
_ANALYSIS = {"rank": None, "temperature": TEMPERATURE, "quick": False, "directions": "existing"}


def facts_of(plan: MergePlan) -> dict[str, Any]:
    """Return everything that determines what a plan does, as JSON values.

    Options, parameters and the selection have the names of the arguments of `make_plan`; `preview`
    contains the relative change and why it is approximate, or why it is not known.
    """
    return {
        "hash": plan.hash,
        "digest": plan.digest,
        "method": plan.method,
        "method_version": plan.method_version,
        "parameters": dict(plan.parameters),
        "similarity": plan.similarity,
        "similarity_threshold": plan.similarity_threshold,
        **plan.options.to_dict(),
        "statistic": None if plan.statistic is None else list(plan.statistic),
        "calibration": asdict(plan.calibration) if plan.calibration else None,
        "analysed": None if plan.analysed is None else dict(plan.analysed),
        "matrices": len(plan.decisions),
        "selected": len(plan.selected),
        "preview": _preview(plan),
    }


def settings_of(plan: MergePlan) -> dict[str, str]:
    """Return the settings of a plan as text, by display name: exact numbers, no paths.

    All parameters are listed, options if they differ from their default, and the anchor.
    """
    settings: dict[str, str] = {}
    if plan.similarity is not None:
        settings["similarity threshold"] = shown(plan.similarity_threshold)
        settings["similarity"] = plan.similarity
    settings |= {name.rstrip("_"): shown(value) for name, value in plan.parameters.items()}
    settings |= plan.options.describe()
    if analysis := _describe_analysis(plan.analysed):
        settings["analysis"] = analysis
    if plan.calibration:
        settings["calibration"] = plan.calibration.describe()
    return settings


def describe_change(plan: MergePlan, verb: str = "change") -> str:
    """Describe how much the decoder weights change, or why this is not known before the merge."""
    try:
        found = plan.preview()
    except PlanError as error:
        return str(error)
    change = f"decoder weights {verb} by {found.relative_change:.3%} (relative Frobenius norm)"
    return f"{change} (approximate: {found.approximate})" if found.approximate else change


def advice_on(plan: MergePlan) -> str:
    """Return what the sizes of a plan's preview suggest, as a sentence; empty for nothing."""
    if changes_nothing(plan):
        return (
            "The update is zero: the merged model would be identical to the vision-language model."
        )
    if plan.parameters.get("budget") != 0:
        return ""  # it is set, or the method has none
    try:
        return plan.preview().advice
    except PlanError:
        return ""


def changes_nothing(plan: MergePlan) -> bool:
    """Return whether a plan selects matrices and nothing else, and its update of them is zero."""
    try:
        return bool(plan.selected) and not plan.extras and not plan.preview().relative_change
    except PlanError:
        return False


def rounding_on(plan: MergePlan) -> str:
    """Return a warning of a change that bfloat16 files cannot hold well; empty for none.

    A weight of such a file is rounded by 0.16 % of itself in the root mean square, and a change
    that is not larger moves few weights, and these by too much.
    """
    try:
        found = plan.preview()
    except PlanError:
        return ""
    change = (found.update_share or 0.0) * found.expert_change
    if plan.totals.decoder_itemsize != 2 or not 0 < change < _LARGEST_ROUNDED:
        return ""
    return (
        f"In half of the merged matrices the change is less than about {change:.2g} of the "
        f"weights, which are stored in 16 bits: in bfloat16 many weights would keep their values, "
        f"and the merged files differ from the preview. Use a larger gain or budget."
    )


def describe_selection(plan: MergePlan) -> str:
    """Describe how many matrices are merged, per expert if there are several.

    Matrices that are not merged, and the extras, are described by the caller.
    """
    merged = f"{len(plan.selected)} of {len(plan.decisions)} decoder matrices"
    experts = len(plan.sources.math)
    if experts == 1:
        return merged
    counts = [sum(k in decision.experts for decision in plan.selected) for k in range(experts)]
    each = ", ".join(f"{count} with expert {k}" for k, count in enumerate(counts, 1))
    return f"{merged} ({each})"


def has_scope(plan: MergePlan) -> bool:
    """Return whether any matrix is in the plan's scope, whether or not its similarity suffices."""
    scope = Scope.of(plan.options, calibrated=plan.calibration is not None)
    return any(scope.allows(each.name, scope.covers(each.module)) for each in plan.decisions)


def describe_empty(plan: MergePlan) -> str:
    """Describe why a plan selects no matrix, and what its merge would write; "" if it selects some.

    A valid plan may do so, but it is rarely intended.
    """
    if plan.selected:
        return ""
    cause = f"No matrix reaches the similarity threshold {plan.similarity_threshold!r}"
    if not has_scope(plan):
        cause = "No matrix is in the plan's scope, which patterns and overrides limit"
    if plan.extras:
        return f"{cause}: only {' and '.join(plan.extras)} would be merged."
    return f"{cause}: the merged model would be identical to the vision-language model."


def arguments_of(plan: MergePlan) -> dict[str, Any]:
    """Return the arguments of `make_plan` that give this plan for the same models.

    Parameters are listed if they differ from what `make_plan` would choose without them. A
    statistic measured with `--measure` is not an argument.
    """
    method = find_method(plan.method)
    arguments: dict[str, Any] = {"method": plan.method}
    if plan.similarity is not None:
        arguments |= {
            "similarity_threshold": plan.similarity_threshold,
            "similarity": plan.similarity,
        }
    usual = {parameter.name: parameter.default for parameter in method.parameters}
    usual |= {name: (plan.analysed or {}).get(name, usual[name]) for name in method.from_analysis}
    arguments |= {name: value for name, value in plan.parameters.items() if value != usual[name]}
    arguments |= {name: value for name, value in plan.options.changed().items() if name in OPTIONS}
    if plan.calibration:
        arguments["calibration"] = plan.calibration.folder
    return arguments


def _preview(plan: MergePlan) -> dict[str, Any]:
    try:
        found = plan.preview()
    except PlanError as error:
        return {"relative_change": None, "unknown": str(error)}
    return {"relative_change": found.relative_change, "approximate": found.approximate}


def _describe_analysis(options: Mapping[str, Any] | None) -> str:
    """Describe the options of an analysis that are not the default; empty if all are."""
    changed = {
        name: value for name, value in (options or {}).items() if value != _ANALYSIS.get(name)
    }
    words = ["quick, approximate"] if changed.pop("quick", False) else []
    return ", ".join([*words, *(f"{name} {shown(value)}" for name, value in changed.items())])
