"""Format numbers, findings and progress for the screen.

In: findings of a check, an estimate, the status of a job. Out: text, or small pieces of HTML in
which every name is escaped. Pure, and without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.ui.safe_text import as_html as escape

if TYPE_CHECKING:
    from ipmerge_core.models.pairing import Finding


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


def device_words(device: str) -> str:
    """Write a device for people, as far as its name says.

    >>> device_words("cpu"), device_words("cuda:1"), device_words("mps")
    ('the CPU', 'the GPU (cuda:1)', 'the GPU (mps)')
    """
    return "the CPU" if device == "cpu" else f"the GPU ({device})"
