"""Format findings, plans, results and progress for the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from copy import copy
from dataclasses import asdict
from time import monotonic
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import PlanError

if TYPE_CHECKING:
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.planning.plan import MergePlan

_MARKS = {"ok": "ok     ", "warning": "WARNING", "refusal": "REFUSAL"}


def finding_line(finding: Finding) -> str:
    """Format one finding of the sibling check."""
    remedy = f" {finding.remedy}" if finding.remedy else ""
    return f"{_MARKS[finding.level]}  {finding.subject}: {finding.message}{remedy}"


def preview_of(plan: MergePlan) -> dict[str, Any]:
    """Return the preview of a plan, or the reason why it is not available."""
    try:
        return asdict(plan.preview())
    except PlanError as error:
        return {"selected": [d.name for d in plan.selected], "preview": str(error)}


def plan_sentence(plan: MergePlan) -> str:
    """Summarize a plan in one sentence."""
    chosen = f"{len(plan.selected)} of {len(plan.decisions)} matrices are merged"
    preview = preview_of(plan)
    extras = "; ".join(plan.extras)
    extras = f" Also merged, not included in these figures: {extras}." if extras else ""
    if "relative_change" not in preview:
        return f"{chosen}.{extras} {preview['preview']}"
    loose = f", approximate: {preview['approximate']}" if preview["approximate"] else ""
    change = f"{preview['relative_change']:.3%} (relative Frobenius norm{loose})"
    return f"{chosen}; decoder weights change by {change}{_analysis_values(plan)}.{extras}"


def _analysis_values(plan: MergePlan) -> str:
    """List the parameters that come from the analysis and are not the defaults."""
    from ipmerge_core.methods import find_method
    from ipmerge_core.planning.preview import shown

    method, values, analysed = find_method(plan.method), plan.parameters, plan.analysed or {}
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    names = [name for name in method.from_analysis if values[name] == analysed.get(name)]
    changed = [f"{name} {shown(values[name])}" for name in names if values[name] != defaults[name]]
    return f", with {' and '.join(changed)} from the analysis" if changed else ""


def print_result(options: argparse.Namespace, content: Any, text: str) -> int:  # noqa: ANN401
    """Print the result as text or JSON and return the exit code for success."""
    print(json.dumps(content, indent=1) if options.json else text)
    return 0


class Progress:
    """One line on stderr: percent, what is done, time left; by cost, not by count.

    Starts with a line about the device, and the number of threads if it was not set explicitly.
    """

    def __init__(self, verb: str, total: int, options: argparse.Namespace) -> None:
        self.verb, self.total, self.quiet = verb, max(total, 1), options.quiet
        if not self.quiet:
            print(_place(options), file=sys.stderr)
        self.live = sys.stderr.isatty()
        self.started = monotonic()
        self.last = 0.0

    @classmethod
    def of(
        cls, before: Progress | None, verb: str, total: int, options: argparse.Namespace
    ) -> Progress:
        """Continue the previous line, or start a new one if the kind of work has changed."""
        if before is not None and before.verb == verb:
            return before
        if before is None:
            return cls(verb, total, options)
        before.close()
        after = copy(before)
        after.verb, after.total, after.started, after.last = verb, max(total, 1), monotonic(), 0.0
        return after

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return round(monotonic() - self.started, 3)

    def show(self, done: int, what: str) -> None:
        """Show how much of the total is done, at most ten times a second."""
        now, fraction = monotonic(), done / self.total
        if self.quiet or (now - self.last < (0.1 if self.live else 5) and fraction < 1):
            return
        self.last = now
        left = (now - self.started) * (1 - fraction) / fraction if fraction else 0
        line = f"{self.verb} {fraction:4.0%}, {left:.0f} s left: {what}"
        print(
            f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr
        )

    def close(self) -> None:
        """End the line."""
        if self.live and not self.quiet:
            print(file=sys.stderr)


def _place(options: argparse.Namespace) -> str:
    from ipmerge_core.runtime.devices import describe_device, is_cpu

    where = f"Computing on {describe_device(options.device)}"
    if options.one_thread and is_cpu(options.device):
        where += " with one thread; OMP_NUM_THREADS sets another number"
    return f"{where}."
