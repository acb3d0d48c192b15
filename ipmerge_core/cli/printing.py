"""Format findings, plans, results and progress for the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ipmerge_core.errors import PlanError, RunError

if TYPE_CHECKING:
    from ipmerge_core.analysis.records import Analysis
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.planning.plan import MergePlan

_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
_LINE = _BAR.replace("|{bar}|", ",")
_LONGEST_NAME = 120  # characters
_MARKS = {"ok": "ok     ", "warning": "WARNING", "refusal": "REFUSAL"}


def finding_line(finding: Finding) -> str:
    """Format one finding of the sibling check."""
    remedy = f" {finding.remedy}" if finding.remedy else ""
    return f"{_MARKS[finding.level]}  {finding.subject}: {finding.message}{remedy}"


def task_vector_lines(analysis: Analysis) -> Iterator[str]:
    """Describe the size and direction of each expert's task vector relative to the MLLM's."""
    for expert, source in enumerate(analysis.sources.math):
        found = analysis.products(expert)
        ratios = [
            ratio
            for record in analysis.records
            if record.expert == expert and (ratio := record.products.norm_ratio) is not None
        ]
        if found.describe() and ratios:
            yield (
                f"{Path(source.id).name}: {found.describe()} over all decoder matrices; norm ratio "
                f"of single matrices {min(ratios):#.3g} to {max(ratios):#.3g}."
            )


def preview_of(plan: MergePlan) -> dict[str, Any]:
    """Return the preview of a plan, or the reason why it is not available."""
    try:
        return asdict(plan.preview())
    except PlanError as error:
        return {"selected": [d.name for d in plan.selected], "preview": str(error)}


def plan_sentence(plan: MergePlan) -> str:
    """Summarize a plan in one sentence."""
    from ipmerge_core.planning.description import (
        advice_on,
        describe_change,
        describe_selection,
        rounding_on,
    )

    extras = "; ".join(plan.extras)
    extras = f" Also merged, not included in these figures: {extras}." if extras else ""
    change = describe_change(plan)
    if "relative_change" not in preview_of(plan):
        return f"{describe_selection(plan)} are merged.{extras} {change}"
    advice = "".join(f" {found}" for found in (advice_on(plan), rounding_on(plan)) if found)
    values = _analysis_values(plan)
    return f"{describe_selection(plan)} are merged; {change}{values}.{extras}{advice}"


def _analysis_values(plan: MergePlan) -> str:
    """List the parameters that come from the analysis and are not the defaults."""
    from ipmerge_core.methods import find_method
    from ipmerge_core.planning.options import shown

    method, values, analysed = find_method(plan.method), plan.parameters, plan.analysed or {}
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    names = [name for name in method.from_analysis if values[name] == analysed.get(name)]
    changed = [f"{name} {shown(values[name])}" for name in names if values[name] != defaults[name]]
    return f", with {' and '.join(changed)} from the analysis" if changed else ""


def print_result(options: argparse.Namespace, content: Any, text: str) -> int:  # noqa: ANN401
    """Print the result as text or JSON and return the exit code for success.

    Raises: BrokenPipeError if the reader of stdout has closed it, RunError if its disk is full.
    """
    shown = json.dumps(content, indent=1) if options.json else text
    try:
        print(shown, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(
            f"Cannot write the result to the standard output: {error.strerror}. Other results of "
            f"the command are complete."
        ) from error
    return 0


class Progress:
    """A progress bar on stderr: percent by cost rather than by count, and the time left.

    For commands that compute on a device the first line names it, and the number of threads if it
    was not specified. Files and pipes get one line every five seconds. Closed at the end of its
    `with` block.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, monotonic()
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        """Start; nothing is shown before the first step."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the line, also where the work has failed."""
        self._close()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return round(monotonic() - self.started, 3)

    def show(self, verb: str, done: int, total: int, what: str, *, resumed: bool = False) -> None:
        """Show how much of the total is done; another verb starts another bar.

        Speed and time left are those since the first step; `resumed` work does not count either.
        `what` may contain names from untrusted models: control characters are replaced.
        """
        if self.options.quiet:
            return
        if self.bar is None and "device" in self.options:
            print(_place(self.options), file=sys.stderr)
        if self.bar is None or self.bar.desc != verb:
            self._close()
            self.bar = _new_bar(verb, total)
            resumed = True  # the first step tells where the bar starts
        if resumed:
            self.bar.initial = self.bar.n = done
            self.bar.start_t = self.bar.last_print_t = time()
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in what)
        self.bar.set_postfix_str(shown[:_LONGEST_NAME], refresh=False)
        self.bar.update(done - self.bar.n)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _Log(tqdm):  # type: ignore[misc]
    """Progress where no line can be overwritten: each is written below the last."""

    disable: bool

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line."""
        self.fp.write(f"{self}\n")

    def close(self) -> None:
        """Write the final state, unless the last line already shows it."""
        if not self.disable and self.n != self.last_print_n:
            self.display()
        self.disable = True


def _new_bar(verb: str, total: int) -> tqdm[Any]:
    how = {"total": max(total, 1), "file": sys.stderr, "smoothing": 0, "miniters": 0}
    if sys.stderr.isatty():
        return tqdm(desc=verb, bar_format=_BAR, dynamic_ncols=True, **how)
    return _Log(desc=verb, bar_format=_LINE, mininterval=5, **how)


def _place(options: argparse.Namespace) -> str:
    from ipmerge_core.runtime.devices import describe_device, is_cpu

    where = f"Computing on {describe_device(options.device)}"
    if options.one_thread and is_cpu(options.device):
        where += " with one thread; OMP_NUM_THREADS sets another number"
    return f"{where}."
