"""What the tabs say of runs: findings, what will change, how far a run is, what came out.

In: findings, a plan with its preview and estimate, a job's status. Out: small pieces of HTML, with
every name escaped. Pure; the tab decides when to show them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ipmerge_core.errors import PlanError
from ipmerge_core.planning.options import ANCHORS
from ipmerge_core.ui.format import count_words, device_words, estimate_words, size_words
from ipmerge_core.ui.safe_text import as_html as escape

if TYPE_CHECKING:
    from ipmerge_core.merging.merge import Estimate
    from ipmerge_core.planning.plan import MergePlan


def change_words(plan: MergePlan) -> str:
    """Say how far the decoder moves, or why that is not known before the merge."""
    try:
        found = plan.preview()
    except PlanError as error:
        return str(error)
    words = f"the decoder moves by {found.relative_change:.2%} of its norm"
    return f"{words} (approximate: {found.approximate})" if found.approximate else words


def confirm_html(
    plan: MergePlan,
    change: str,
    need: Estimate,
    kept: Mapping[str, str],
    *,
    device: str,
    digest: str,
) -> str:
    """Say what changes (`change` says how far), what stays, and what it takes.

    `device` is the name of the device for people, `digest` that of all that was checked.
    """
    reasons = Counter(kept.values())
    unselected = len(plan.decisions) - len(plan.selected)
    stays = [f"{unselected} decoder matrices that the plan does not select"] if unselected else []
    stays += [f"{count} tensors ({reason})" for reason, count in reasons.most_common()]
    touched = sum(decision.numel for decision in plan.selected)
    share = touched / max(plan.totals.llm_parameters, 1)
    rows = {
        "Pair": escape(plan.name),
        "Method": escape(method_words(plan)),
        "Plan": f"<code>{plan.hash}</code>; with pair and device <code>{digest[:8]}</code>",
        "Changes": f"{len(plan.selected)} of {len(plan.decisions)} decoder matrices, "
        f"{count_words(touched)} parameters ({share:.0%} of the language model)"
        f"{''.join(f', {escape(what)}' for what in plan.extras)}; {escape(change)}",
        "Measured from": f"{escape(ANCHORS[plan.anchor])} (<code>{plan.anchor}</code>)",
        "Stays, byte for byte": escape("; ".join(stays)) + "; tokenizer, processor and configs",
        "Reads, writes": f"{size_words(need.nbytes_read)}, {size_words(need.nbytes_written)} "
        f"({size_words(need.nbytes_free)} free)",
        "Device": escape(device),
        "Time": f"{estimate_words(need.seconds, need.device)}, estimated from the sizes",
    }
    cells = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items())
    return f'<dl class="facts" data-digest="{digest}">{cells}</dl>'


def method_words(plan: MergePlan) -> str:
    """Name a plan's method with its parameters."""
    from ipmerge_core.methods import find_method

    values = {name.rstrip("_"): value for name, value in plan.parameters.items()}
    if plan.similarity is not None and plan.similarity_threshold is not None:
        threshold = f"{plan.similarity_threshold:g} ({plan.similarity})"
        values = {"similarity threshold": threshold, **values}
    if plan.layer_gains:
        values["layer gains"] = " ".join(f"{gain:g}" for gain in plan.layer_gains)
    words = [
        f"{name} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in values.items()
        if value is not None
    ]
    return f"{find_method(plan.method).label}{': ' if words else ''}{', '.join(words)}"


def result_html(out: str, link: str | None, *, show_path: bool, device: str = "") -> str:
    """Say where the model is and where it was made; offer it as one file to whoever made it."""
    made = f'<p class="run-device">Merged on {escape(device_words(device))}.</p>' if device else ""
    path = (
        f'<p>The model is in <code id="result-path">{escape(out)}</code></p>' if show_path else ""
    )
    download = (
        f'<p><a class="whole-model" href="{escape(link)}" download>Download as one zip file</a></p>'
        if link
        else "<p>Only the browser that started this run can download it.</p>"
    )
    return f"{path}{made}{download}"
