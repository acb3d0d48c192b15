"""Describe a merge before it starts and after it has finished, as HTML.

In: a plan with its preview and estimate, the result of a run. Out: small pieces of HTML in which
every name is escaped. Pure functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ipmerge_core.planning.options import ANCHORS
from ipmerge_core.ui.format import format_count, format_device, format_estimate, format_size
from ipmerge_core.ui.safe_text import as_html as escape

if TYPE_CHECKING:
    from ipmerge_core.merging.merge import Estimate
    from ipmerge_core.planning.plan import MergePlan


def confirm_html(
    plan: MergePlan,
    change: str,
    extras: Sequence[str],
    need: Estimate,
    kept: Mapping[str, str],
    *,
    device: str,
    digest: str,
) -> str:
    """Describe the changed and unchanged tensors and the cost of the merge.

    Args:
        plan: the plan to execute.
        change: the change of the weights, see `describe_change`.
        extras: what is merged in addition to decoder matrices, see `count_extras`.
        need: its estimated cost.
        kept: the reason for every unchanged tensor.
        device: the display name of the device.
        digest: the digest of everything that was checked.
    """
    from ipmerge_core.planning.description import describe_selection

    reasons = Counter(kept.values())
    unselected = len(plan.decisions) - len(plan.selected)
    stays = [f"{unselected} decoder matrices not selected by the plan"] if unselected else []
    stays += [f"{count} tensors ({reason})" for reason, count in reasons.most_common()]
    touched = sum(decision.numel for decision in plan.selected)
    share = touched / max(plan.totals.llm_parameters, 1)
    rows = {
        "Pair": escape(plan.name),
        "Method": escape(describe_method(plan)),
        "Plan": f"<code>{plan.hash}</code>; digest with pair and device <code>{digest[:8]}</code>",
        "Changes": f"{escape(describe_selection(plan))}, "
        f"{format_count(touched)} parameters ({share:.0%} of the language model)"
        f"{''.join(f', {escape(what)}' for what in extras)}; {escape(change)}",
        "Reference weights": f"{escape(ANCHORS[plan.anchor])} (<code>{plan.anchor}</code>)",
        "Unchanged (bitwise identical)": escape("; ".join(stays))
        + "; tokenizer, processor, configs",
        "Reads": format_size(need.nbytes_read),
        "Writes": f"{format_size(need.nbytes_written)} ({format_size(need.nbytes_free)} free)",
        "Device": escape(device),
        "Time": f"{format_estimate(need.seconds, need.device)}, estimated from the sizes",
    }
    if need.advice:
        rows["Advice"] = escape(need.advice)
    cells = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items())
    return f'<dl class="facts" data-digest="{digest}">{cells}</dl>'


def describe_method(plan: MergePlan) -> str:
    """Describe a plan's method with its settings; the anchor has a row of its own."""
    from ipmerge_core.methods import find_method
    from ipmerge_core.planning.description import settings_of

    settings = {name: text for name, text in settings_of(plan).items() if name != "anchor"}
    words = [f"{name} {text}" for name, text in settings.items() if text != "none"]
    return f"{find_method(plan.method).label}{': ' if words else ''}{', '.join(words)}"


def result_html(out: str, link: str | None, *, show_path: bool, device: str = "") -> str:
    """Describe where the model is, with a download link for the browser that started the run."""
    made = f'<p class="run-device">Merged on {escape(format_device(device))}.</p>' if device else ""
    path = f'<p>Saved to <code id="result-path">{escape(out)}</code></p>' if show_path else ""
    download = (
        f'<p><a class="whole-model" href="{escape(link)}" download>Download as zip file</a></p>'
        if link
        else "<p>Only the browser that started this run can download it.</p>"
    )
    return f"{path}{made}{download}"
