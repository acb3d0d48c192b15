"""Format numbers, findings and progress for the screen.

In: findings of a check, an estimate, the status of a job. Out: text, or small pieces of HTML in
which every name is escaped. Pure, and without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.ui.safe_text import as_html as escape

if TYPE_CHECKING:
    from ipmerge_core.models.pairing import Finding


SIGNS = {"ok": "✓", "warning": "!", "refusal": "✕"}


STATE_LABELS = {
    "running": "running",
    "cancelling": "stopping after the current step",
    "finished": "finished",
    "cancelled": "cancelled; completed work is kept",
    "failed": "failed",
    "interrupted": "interrupted; completed work is kept",
}

PHASE_LABELS = {
    "": "no step was completed",
    "starting": "starting a process",
    "importing": "importing libraries",
    "opening": "opening the models",
    "working": "working",
}


class RunProgress(NamedTuple):
    """How much of a run is done: a number from 0 to 1, and counts, speed and time left."""

    share: float
    words: list[str]


def findings_html(findings: Iterable[Finding]) -> str:
    """Format findings as a list, each with a sign for its level, a message and a remedy."""
    rows = []
    for finding in findings:
        remedy = f" <em>{escape(finding.remedy)}</em>" if finding.remedy else ""
        rows.append(
            f'<li class="{finding.level}"><span class="sign" aria-label="{finding.level}">'
            f"{SIGNS[finding.level]}</span><span><b>{escape(finding.subject)}</b> "
            f"{escape(finding.message)}{remedy}</span></li>"
        )
    return f'<ul class="findings">{"".join(rows)}</ul>'


def format_estimate(seconds: float, device: str) -> str:
    """Format how long a run takes on a device.

    >>> format_estimate(90, "cpu"), format_estimate(4, "cuda")
    ('about 2 minutes on one CPU core', 'about 4 seconds on the GPU (cuda)')
    """
    where = "one CPU core" if device == "cpu" else format_device(device)
    return f"about {format_duration(seconds)} on {where}"


def progress_of(status: JobStatus) -> RunProgress:
    """Return how much of a run is done, in counts, speed and time left."""
    step, unit = status.step, _unit(status.step)
    done, total = step.get(f"{unit}done", 0), step.get(f"{unit}total", 0)
    share = done / total if total else 0.0
    words = _counted(step)
    # What this run did in the time since its first step; nothing is known before its second.
    fresh = done - status.first.get(f"{unit}done", done)
    working = max(status.updated - status.since, 0.0)
    if status.is_running and fresh > 0 and working > 0.5 and done < total:
        words += [f"{fresh / working / 1e6:.0f} MB/s"] if unit == "nbytes_" else []
        words.append(f"about {format_duration((total - done) * working / fresh)} left")
    return RunProgress(share, words)


def progress_html(status: JobStatus) -> str:
    """Format the progress of a run: a bar, counts, time left, and its error if it failed."""
    share, counted = progress_of(status)
    words = [f"<b>{STATE_LABELS[status.state].capitalize()}</b>", *counted]
    device = str(status.arguments.get("device", ""))
    where = f' <span class="run-device">on {escape(format_device(device))}</span>' if device else ""
    name = stage_of(status) or _current(status.step)
    if status.state == "finished":
        name = f"in {format_duration(max(status.updated - status.started, 0.0))}"
    error = f'<p class="failure">✕ {escape(status.error)}</p>' if status.error else ""
    return (
        f'<p class="run-title">{escape(status.title)}{where}</p>'
        f'<progress max="1" value="{share:.4f}" aria-label="{escape(status.title)}">'
        f"{share:.0%}</progress>"
        f'<p class="run-words">{" · ".join(words)}</p><p class="run-step">{name}</p>{error}'
    )


def _unit(step: Mapping[str, Any]) -> str:
    """Return the prefix of a step's counters: evaluations, cost, passes, items, or bytes."""
    if "evaluations_total" in step:
        return "evaluations_"
    counted = "groups" in step or "subject" in step or _trains(step)
    return "cost_" if "cost_total" in step else "" if counted else "nbytes_"


def _counted(step: Mapping[str, Any]) -> list[str]:
    """Format the counts of a step."""
    if not step:
        return []
    if "evaluations_total" in step:
        return [f"{step['evaluations_done']} of {step['evaluations_total']} evaluations"]
    if "groups" in step:
        return [f"{step['done']} of {step['total']} passes"]
    if "subject" in step:
        return [f"{step['done']} of {step['total']} items"]
    if _trains(step):
        return [_counted_training(step)]
    if "cost_total" in step:
        percent = 100 * step["cost_done"] // max(step["cost_total"], 1)
        return [f"{step['number']} of {step['total']} matrices", f"{percent} % of the work"]
    measures = step.get("action") == "measured"
    what = "matrices measured (first pass)" if measures else "tensors"
    return [
        f"{step.get('index', 0)} of {step.get('total', 0)} {what}",
        f"{format_size(step.get('nbytes_done', 0))} of {format_size(step.get('nbytes_total', 0))}",
    ]


def _trains(step: Mapping[str, Any]) -> bool:
    """Whether a step is one of a fine-tuning."""
    return "to_expert" in step


_TRAINING_UNITS = {
    "encoded": "conversations encoded",
    "prior": "parameters of the prior computed",
    "trained": "optimizer steps",
    "evaluated": "optimizer steps",
}


def _counted_training(step: Mapping[str, Any]) -> str:
    """Format the counts of a step of a fine-tuning; its last phase counts bytes.

    >>> _counted_training({"action": "trained", "done": 3, "total": 12})
    '3 of 12 optimizer steps'
    """
    if step["action"] in _TRAINING_UNITS:
        return f"{step['done']} of {step['total']} {_TRAINING_UNITS[step['action']]}"
    return f"{format_size(step['done'])} of {format_size(step['total'])} written"


def _figures_of(step: Mapping[str, Any]) -> str:
    """Format the figures of a step of a fine-tuning, or the parameter that it concerns."""
    named = (
        ("loss", "loss", ".4f"),
        ("eval_loss", "held-out loss", ".4f"),
        ("cosine", "cos(g, D)", ".3f"),
        ("to_start", "distance to the start", ".2%"),
        ("to_expert", "distance to the expert", ".2%"),
    )
    found = [
        f"{label} {step[name]:{form}}" for name, label, form in named if step[name] is not None
    ]
    what = str(step["what"])
    return ", ".join(found) or (f"<code>{escape(what)}</code>" if what else "")


def stage_of(status: JobStatus) -> str:
    """Describe what a run does before its first step and after its last; "" between them."""
    if not status.step:
        return PHASE_LABELS[status.phase]
    if "subject" in status.step or status.step.get("action") in _TRAINING_UNITS:
        return ""
    return "verifying and finishing" if progress_of(status).share >= 1 else ""


def _current(step: Mapping[str, Any]) -> str:
    """Format what a run is working on."""
    if "evaluations_total" in step:
        return escape(step["last"])
    if "groups" in step:
        model = "vision-language model" if step["role"] == "mllm" else "math model"
        return f"{model}, part {step['group'] + 1} of {step['groups']}"
    if "subject" in step:
        doing = {"loading": "loading or merging", "resumed": "reading stored replies of"}
        words = f"{doing.get(step['action'], '')} {step['subject']} {step['task']}"
        return escape(words.strip())
    if _trains(step):
        return _figures_of(step)
    name = str(step["matrix"] if "matrix" in step else step["tensor"])
    return f"<code>{escape(name)}</code>" if name else "reading weights"


def format_size(nbytes: float) -> str:
    """Format a size in bytes with at most three digits.

    >>> format_size(4_200_000), format_size(15.2e9)
    ('4.2 MB', '15.2 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def format_count(count: float) -> str:
    """Format a count with at most three digits.

    >>> format_count(870_000), format_count(5.65e9)
    ('870 thousand', '5.65 billion')
    """
    for unit, factor in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f}"


def format_duration(seconds: float) -> str:
    """Format a duration in one unit.

    >>> format_duration(0.4), format_duration(75), format_duration(4000)
    ('1 second', '1 minute', '67 minutes')
    """
    if seconds < 60:
        number, unit = max(1, round(seconds)), "second"
    elif seconds < 2 * 3600:
        number, unit = round(seconds / 60), "minute"
    else:
        number, unit = round(seconds / 3600), "hour"
    return f"{number} {unit}{'' if number == 1 else 's'}"


def format_device(device: str) -> str:
    """Format the name of a device as text.

    >>> format_device("cpu"), format_device("cuda:1"), format_device("mps")
    ('the CPU', 'the GPU (cuda:1)', 'the GPU (mps)')
    """
    return "the CPU" if device == "cpu" else f"the GPU ({device})"
