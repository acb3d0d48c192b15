"""What the check of a merge finds apart from the models: disk space, and plans hardly intended.

In: a plan, or sizes in bytes. Out: `Finding`s for the list under Check. Reads no weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.planning.plan import MergePlan


def disk_room(nbytes: int, free: int) -> Finding:
    """Compare the bytes of a model with those that are free on the disk."""
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.ui.format import format_size

    words = f"The model needs {format_size(nbytes)}; {format_size(free)} are free."
    if nbytes > free:
        return Finding("refusal", "disk", words, "Free some disk space or choose another folder.")
    return Finding("ok", "disk", words)


def plan_warnings(plan: MergePlan) -> list[Finding]:
    """Warn about plans that are valid but probably not intended."""
    from ipmerge_core.calibration.store import Measurements
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.planning.description import (
        changes_nothing,
        describe_empty,
        has_scope,
        rounding_on,
    )

    if not plan.selected:
        remedy = "Lower Sα in Explore." if has_scope(plan) else "Change the patterns or overrides."
        return [Finding("warning", "plan", describe_empty(plan), remedy)]
    found = []
    if changes_nothing(plan):
        remedy = "Check the merge weights and the layers that are kept."
        message = (
            "With these parameters, the merged model would be identical to the vision-language "
            "model."
        )
        found.append(Finding("warning", "plan", message, remedy))
    if rounded := rounding_on(plan):
        message, _, remedy = rounded.rpartition(". ")
        found.append(Finding("warning", "plan", f"{message}.", remedy))
    if plan.calibration is not None:
        measured = Measurements.open(plan.calibration.folder)
        inputs = max(record.shape[1] for record in plan.records)
        found += [Finding("warning", "calibration", *words) for words in measured.doubts(inputs)]
    return found
