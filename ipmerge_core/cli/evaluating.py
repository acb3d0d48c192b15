"""Implement `ipmerge evaluate`: score models on tasks, with intervals and paired tests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ipmerge_core.cli.printing import Progress, print_result
from ipmerge_core.cli.reading import read_evaluation_settings, read_store, read_tasks
from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.paths import resolve_path

if TYPE_CHECKING:
    from ipmerge_core.evaluation.evaluate import EvaluationStep
    from ipmerge_core.evaluation.report import Comparison, PartScore, Report, TaskFacts
    from ipmerge_core.evaluation.subjects import Subject

_LISTED = 5  # faults and notes per kind
_WIDEST = 24  # characters of a name in a table


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate models on tasks, resuming from stored replies."""
    from ipmerge_core.evaluation.evaluate import iter_evaluation
    from ipmerge_core.methods.declarations import drained, relayed
    from ipmerge_core.runtime.pipeline import keep_freed_memory

    keep_freed_memory()
    if options.harness:
        return run_harness(options)
    tasks, settings = read_tasks(options), read_evaluation_settings(options)
    subjects = read_subjects(options)
    with Progress(options) as progress:

        def show(step: EvaluationStep) -> None:
            progress.show(
                "evaluating",
                step.done,
                step.total,
                f"{step.subject} {step.task} {step.done}/{step.total}",
                resumed=step.action != "answered",
            )

        report = drained(
            relayed(iter_evaluation(subjects, tasks, settings, read_store(options)), show)
        )
    if report is None:  # a process of another rank than 0
        return 0
    if options.target is not None:
        report.save(options.target)
    text = "\n".join(report_lines(report))
    text += f"\nWrote {options.output}." if options.output else ""
    return print_result(options, report.to_dict(), text)


def read_paths(options: argparse.Namespace) -> list[Path]:
    """Return the folders of the models. Raises: PlanError."""
    from ipmerge_core.models.files import find_files
    from ipmerge_core.models.weight_files import is_adapter

    paths = [resolve_path(model) for model in options.models]
    if len(set(paths)) < len(paths):
        raise PlanError("A model is given twice. Specify each once.")
    if options.base and not any(is_adapter(find_files(path).names()) for path in paths):
        raise PlanError("--base has no effect: none of the models is an adapter. Omit it.")
    return paths


def run_harness(options: argparse.Namespace) -> int:
    """Run lmms-eval on each model, or write a configuration for VLMEvalKit."""
    from ipmerge_core.evaluation import harness
    from ipmerge_core.models.opening import open_model
    from ipmerge_core.runtime.host import home_folder

    tasks = tuple(
        name.strip() for each in options.tasks for name in each.split(",") if name.strip()
    )
    paths = read_paths(options)
    if options.harness == harness.VLMEVALKIT:
        if options.target is None:
            raise PlanError("Specify the configuration file with -o, such as -o config.json.")
        types = [str(open_model(p, base=options.base).config.get("model_type")) for p in paths]
        models = [(p.name, p, kind) for p, kind in zip(paths, types, strict=True)]
        config = harness.kit_config(models, tasks, options.harness_model or "")
        write_whole(options.target, json.dumps(config, indent=1))
        text = f"Wrote {options.output}. Run it with: python run.py --config {options.output}"
        return print_result(options, config, text)
    if not options.harness_python:
        raise PlanError("Specify the Python of the environment with lmms-eval: --harness-python.")
    store = Path(options.store) if options.store else home_folder() / "evaluations"
    content: dict[str, object] = {}
    lines: list[str] = []
    for path, model in zip(paths, options.models, strict=True):
        run = harness.HarnessRun(
            model=path,
            tasks=tasks,
            python=options.harness_python,
            output=store / harness.LMMS_EVAL / path.name,
            name=options.harness_model or "",
            base=options.base or "",
            limit=options.limit,
            batch_size=options.batch_size or 1,
            device=options.device,
            include=options.harness_include or "",
        )
        scores = harness.run_lmms_eval(run)
        content[model] = harness.as_values(scores)
        lines += [f"{model}:", *harness.score_lines(scores)]
    if options.target is not None:
        write_whole(options.target, json.dumps(content, indent=1))
    return print_result(options, content, "\n".join(lines))


def read_subjects(options: argparse.Namespace) -> list[Subject]:
    """Return the models of the command line, each named by its folder, or as typed if that recurs.

    Raises: PlanError if one is given twice; CheckpointError for a folder that is not a model.
    """
    from ipmerge_core.evaluation.subjects import subject_of_folder

    paths = read_paths(options)
    names = [path.name for path in paths]
    return [
        subject_of_folder(path, name if names.count(name) == 1 else model, base=options.base)
        for path, name, model in zip(paths, names, options.models, strict=True)
    ]


# --- the report as text ----------------------------------------------------------------------


def report_lines(report: Report) -> Iterator[str]:
    """Yield the report as lines: a table per task, then what limits its meaning."""
    for facts in report.tasks:
        yield from _task_lines(report, facts)
        yield ""
    yield from _power_lines(report)
    yield from report.notes


def _task_lines(report: Report, facts: TaskFacts) -> Iterator[str]:
    names = list(report.subjects)
    results = [report.result(name, facts.name) for name in names]
    yield f"{facts.label} ({facts.source}; prompt: {facts.prompt})"
    head = ["", "n", *(_short(name) for name in names), *("vs first" for _ in names[1:])]
    rows = [
        [
            f"{'  ' if part.kind == 'skill' else ''}{_short(part.part)}",
            str(part.n),
            *(_share(result.part(part.part)) for result in results),
            *(_compared(report, name, facts.name, part.part) for name in names[1:]),
        ]
        for part in results[0].parts
    ]
    yield from aligned([head, *rows])
    if facts.unofficial:
        yield f"Not the official number: {facts.unofficial}"
    if any(result.parts[0].is_small for result in results):
        yield f"Small sample: {results[0].parts[0].n} items; intervals are wide."
    for result in results:
        yield f"{_short(result.subject)}: {_described(report, facts, result.subject)}"
        yield from _listed(list(_uncounted(report, facts, result.subject)), "items")
    faults = [f"Row {name} is not used: {reason}" for name, reason in facts.faults]
    yield from _listed(faults, "rows that are not used")


def _uncounted(report: Report, facts: TaskFacts, subject: str) -> Iterator[str]:
    """Yield the items that are neither right nor wrong, with the reason."""
    for item, reply in zip(facts.items, report.replies[subject][facts.name], strict=True):
        if not reply.counts:
            reason = reply.reason or f"rules cannot compare {reply.text[:80]!r} with the reference."
            yield f"  Item {item['id']} is not counted: {reason}"


def _listed(lines: Sequence[str], what: str) -> Iterator[str]:
    """Yield the first lines, and how many more there are."""
    yield from lines[:_LISTED]
    if len(lines) > _LISTED:
        yield f"... and {len(lines) - _LISTED} more {what}."


def _described(report: Report, facts: TaskFacts, subject: str) -> str:
    """Describe the replies of one model: lengths, limits, processor, what does not count."""
    result = report.result(subject, facts.name)
    length, whole = result.length, result.parts[0]
    count = max(length.replies, 1)
    parts = [
        f"{length.mean_tokens:.1f} tokens per reply (limit {facts.max_new_tokens}, "
        f"{100 * length.cut / count:.1f} % cut off)",
        f"{length.seconds:.1f} s",
    ]
    for what, number in (
        ("empty", length.empty),
        ("without an answer", length.without_answer),
        ("not decidable by rules", whole.unjudged),
        ("missing", whole.missing),
    ):
        if number:
            parts.append(f"{number} {what}")
    if processor := result.facts.get("image_processor"):
        size = result.facts.get("picture_size", {}).get("size", "")
        parts.append(f"{processor} {size}".strip())
    if dtype := result.facts.get("dtype"):
        parts.append(f"{dtype} on {result.facts['device']}, {result.facts['generation']}")
    return "; ".join(parts)


def _share(part: PartScore | None) -> str:
    if part is None or not part.n:
        return "-"
    return f"{100 * part.share:.1f} % ({100 * part.low:.1f}-{100 * part.high:.1f})"


def _compared(report: Report, subject: str, task: str, part: str) -> str:
    found = _find(report, subject, task, part)
    if found is None or not found.test.n:
        return "-"
    test = found.test
    p = "p < 0.0001" if found.p_holm < 1e-4 else f"p = {found.p_holm:.2g}"
    return f"{100 * test.difference:+.1f}, {test.fixed} fixed, {test.broken} broken, {p}"


def _find(report: Report, subject: str, task: str, part: str) -> Comparison | None:
    wanted = subject, task, part
    return next((c for c in report.comparisons if (c.second, c.task, c.part) == wanted), None)


def _power_lines(report: Report) -> Iterator[str]:
    """Yield how many items a difference of 2 points would need, and how p values are corrected."""
    for found in report.comparisons:
        if found.kind == "all" and found.test.needed is not None:
            yield (
                f"{found.task}: a difference of 2 points between {_short(found.first)} and "
                f"{_short(found.second)} would need about {found.test.needed} items (power 80 %); "
                f"this run has {found.test.n}."
            )
    if report.comparisons:
        yield "p values: exact paired test, with Holm's correction. Intervals: 95 % (Wilson)."


def _short(name: str) -> str:
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return shown if len(shown) <= _WIDEST else f"...{shown[3 - _WIDEST :]}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows with columns of equal width, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


def optional_file(path: str | None) -> Path | None:
    """Check the path of an optional output file. Raises: RunError as `output_file`."""
    from ipmerge_core.runtime.paths import output_file

    return None if path is None else output_file(path)
