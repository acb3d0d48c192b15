"""What the tabs say of runs: findings, what will change, how far a run is, what came out.

In: findings, a plan with its preview and estimate, a job's status. Out: small pieces of HTML, with
every name escaped. Pure; the tab decides when to show them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import PlanError
from ipmerge_core.jobs import JobStatus
from ipmerge_core.options import ANCHORS
from ipmerge_core.ui.written import as_html as escape

if TYPE_CHECKING:
    from ipmerge_core.merging import Estimate
    from ipmerge_core.pairing import Finding
    from ipmerge_core.plan import MergePlan

SIGNS = {"ok": "✓", "warning": "!", "refusal": "✕"}
STATE_WORDS = {
    "running": "running",
    "cancelling": "stopping after this tensor",
    "finished": "finished",
    "cancelled": "cancelled; what is finished is kept",
    "failed": "failed",
    "interrupted": "interrupted; what is finished is kept",
}


def findings_html(findings: Iterable[Finding]) -> str:
    """List the findings of the sibling check, each with a sign, a word and its remedy."""
    rows = []
    for finding in findings:
        remedy = f" <em>{escape(finding.remedy)}</em>" if finding.remedy else ""
        rows.append(
            f'<li class="{finding.level}"><span class="sign" aria-label="{finding.level}">'
            f"{SIGNS[finding.level]}</span><span><b>{escape(finding.subject)}</b> "
            f"{escape(finding.message)}{remedy}</span></li>"
        )
    return f'<ul class="findings">{"".join(rows)}</ul>'


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
        f"{''.join(f', {escape(what)}' for what in plan.beside)}; {escape(change)}",
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


def device_words(device: str) -> str:
    """Write a device for people, as far as its name says.

    >>> device_words("cpu"), device_words("cuda:1"), device_words("mps")
    ('the CPU', 'the GPU (cuda:1)', 'the GPU (mps)')
    """
    return "the CPU" if device == "cpu" else f"the GPU ({device})"


def estimate_words(seconds: float, device: str) -> str:
    """Write how long a run takes on a device.

    >>> estimate_words(90, "cpu"), estimate_words(4, "cuda")
    ('about 2 minutes on one CPU core', 'about 4 seconds on the GPU (cuda)')
    """
    where = "one CPU core" if device == "cpu" else device_words(device)
    return f"about {time_words(seconds)} on {where}"


def progress_html(status: JobStatus) -> str:
    """Draw how far a run is: a bar, and the same in words."""
    step, unit = status.step, _unit(status.step)
    done, total = step.get(f"{unit}done", 0), step.get(f"{unit}total", 0)
    fresh = done - step.get(f"{unit}before", 0)  # what an earlier run had done came at once
    share = done / total if total else 0.0
    words = [f"<b>{STATE_WORDS[status.state].capitalize()}</b>", *_counted(step)]
    device = str(status.arguments.get("device", ""))
    where = f' <span class="run-device">on {escape(device_words(device))}</span>' if device else ""
    elapsed = max(status.updated - status.started, 0.0)
    if status.is_running and fresh > 0 and elapsed > 0.5:
        words += [f"{fresh / elapsed / 1e6:.0f} MB/s"] if unit == "nbytes_" else []
        words.append(f"about {time_words((total - done) * elapsed / fresh)} left")
    name = _place(step)
    if status.state == "finished":
        name = f"in {time_words(elapsed)}"
    error = f'<p class="failure">✕ {escape(status.error)}</p>' if status.error else ""
    return (
        f'<p class="run-title">{escape(status.title)}{where}</p>'
        f'<progress max="1" value="{share:.4f}" aria-label="{escape(status.title)}">'
        f"{share:.0%}</progress>"
        f'<p class="run-words">{" · ".join(words)}</p><p class="run-step">{name}</p>{error}'
    )


def _unit(step: Mapping[str, Any]) -> str:
    """What a step counts its work in: an analysis in cost, a calibration in passes, else bytes."""
    return "cost_" if "cost_total" in step else "" if "groups" in step else "nbytes_"


def _counted(step: Mapping[str, Any]) -> list[str]:
    """Say how many of what are done."""
    if not step:
        return []
    if "groups" in step:
        return [f"{step['done']} of {step['total']} passes"]
    if "cost_total" in step:
        percent = 100 * step["cost_done"] // max(step["cost_total"], 1)
        return [f"{step['number']} of {step['total']} matrices", f"{percent} % of the work"]
    measures = step.get("action") == "measured"
    what = "matrices measured, before the merge" if measures else "tensors"
    return [
        f"{step.get('index', 0)} of {step.get('total', 0)} {what}",
        f"{size_words(step.get('nbytes_done', 0))} of {size_words(step.get('nbytes_total', 0))}",
    ]


def _place(step: Mapping[str, Any]) -> str:
    """Say what the run is busy with."""
    if not step:
        return "starting"
    if "groups" in step:
        model = "the vision model" if step["role"] == "mllm" else "the math model"
        return f"{model}, part {step['group'] + 1} of {step['groups']}"
    name = str(step["matrix"] if "matrix" in step else step["tensor"])
    return f"<code>{escape(name)}</code>" if name else "reading weights"


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


def size_words(nbytes: float) -> str:
    """Write a size in bytes with three digits at most.

    >>> size_words(4_200_000), size_words(15.2e9)
    ('4.2 MB', '15.2 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def count_words(count: float) -> str:
    """Write a count with three digits at most.

    >>> count_words(870_000), count_words(5.65e9)
    ('870 thousand', '5.65 billion')
    """
    for unit, factor in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def time_words(seconds: float) -> str:
    """Write a duration as people say it.

    >>> time_words(0.4), time_words(75), time_words(4000)
    ('1 second', '1 minute', '67 minutes')
    """
    if seconds < 60:
        number, unit = max(1, round(seconds)), "second"
    elif seconds < 2 * 3600:
        number, unit = round(seconds / 60), "minute"
    else:
        number, unit = round(seconds / 3600), "hour"
    return f"{number} {unit}{'' if number == 1 else 's'}"
