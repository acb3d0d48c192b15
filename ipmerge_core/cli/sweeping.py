"""Implement `ipmerge sweep` and `ipmerge knockout`: many models in memory, each evaluated once."""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ipmerge_core.cli.evaluating import aligned
from ipmerge_core.cli.printing import Progress, print_result
from ipmerge_core.cli.reading import (
    read_evaluation_settings,
    read_method_options,
    read_pack,
    read_plan,
    read_plan_options,
    read_store,
    read_tasks,
)
from ipmerge_core.errors import PlanError
from ipmerge_core.planning.options import read_value
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.paths import output_file, resolve_path

if TYPE_CHECKING:
    from ipmerge_core.evaluation.evaluate import EvaluationStep
    from ipmerge_core.evaluation.knockout import CutChoice, Knockout, Steps
    from ipmerge_core.evaluation.points import Axis
    from ipmerge_core.evaluation.report import Report
    from ipmerge_core.evaluation.sweeps import Sweep

_Found = TypeVar("_Found")
MOST_CONTROLS = 100


def sweep(options: argparse.Namespace) -> int:
    """Evaluate the plans of a sweep or of an ablation, resuming from stored replies."""
    from ipmerge_core.evaluation.sweeps import iter_ablation, iter_sweep

    analysis, tasks = read_pack(options), read_tasks(options)
    settings = read_evaluation_settings(options)
    how: dict[str, Any] = {
        **read_method_options(options),
        "options": read_plan_options(options),
        "store": read_store(options),
        "force": options.force,
    }
    if options.ablation:
        steps = iter_ablation(analysis, tasks, settings, seeds=range(_controls(options)), **how)
    else:
        steps = iter_sweep(analysis, _axes(options), tasks, settings, **how)
    found = _shown(options, "sweeping", steps)
    if found is None:  # a process of another rank than 0
        return 0
    found.save(options.target)
    text = "\n".join([*_sweep_lines(found), f"Wrote {options.output}."])
    return print_result(options, found.to_dict(), text)


def knockout(options: argparse.Namespace) -> int:
    """Replace one module of one block at a time and evaluate, resuming from stored replies."""
    csv_file, map_file = (
        output_file(path) if path else None for path in (options.csv, options.map)
    )
    found = _shown(options, "knocking out", _knockout_steps(options))
    if found is None:
        return 0
    found.save(options.target)
    if csv_file is not None:
        write_whole(csv_file, found.to_csv())
    if map_file is not None:
        found.summary().save(map_file)
    written = ", ".join(filter(None, (options.output, options.csv, options.map)))
    text = "\n".join([*_knockout_lines(found), f"Wrote {written}."])
    return print_result(options, found.to_dict(), text)


def _knockout_steps(options: argparse.Namespace) -> Steps:
    """Open the model, or the plan whose unmerged and merged models are compared."""
    from ipmerge_core.evaluation.knockout import iter_knockout, iter_model_knockout

    tasks, choice = read_tasks(options), _choice(options)
    settings = read_evaluation_settings(options)
    store = read_store(options)
    if resolve_path(options.model).is_dir():
        return iter_model_knockout(options.model, tasks, choice, settings, store)
    plan = read_plan(argparse.Namespace(**{**vars(options), "plan": options.model}))
    return iter_knockout(plan, tasks, choice, settings, store, force=options.force)


def _choice(options: argparse.Namespace) -> CutChoice:
    from ipmerge_core.evaluation.knockout import CutChoice

    layers = None if options.layers is None else tuple(_integers(options.layers, "--layers"))
    modules = tuple(part.strip() for part in options.modules.split(",") if part.strip())
    return CutChoice(options.replace_by, modules, layers, options.stride)


def _axes(options: argparse.Namespace) -> list[Axis]:
    """Read the varied parameters. Raises: PlanError for a parameter without values."""
    from ipmerge_core.evaluation.points import Axis
    from ipmerge_core.methods import find_method

    method = find_method(read_method_options(options)["method"])
    kinds = {parameter.name: parameter.kind for parameter in method.parameters}
    kinds["similarity"] = "choice"
    axes = []
    for name, values in (
        (options.parameter, options.values),
        (options.parameter2, options.values2),
    ):
        if name is None and values is None:
            continue
        if name is None or values is None:
            raise PlanError(
                "A parameter and its values belong together: --parameter lambda --values 1,2,4."
            )
        parameter = "lambda_" if name == "lambda" else name.replace("-", "_")
        texts = [text.strip() for text in values.split(",") if text.strip()]
        kind = kinds.get(parameter, "float")
        axes.append(Axis(parameter, tuple(read_value(text, kind) for text in texts)))
    if not axes:
        raise PlanError("Specify what to vary, --parameter and --values, or --ablation.")
    return axes


def _controls(options: argparse.Namespace) -> int:
    count = 3 if options.controls is None else int(options.controls)
    if not 0 <= count <= MOST_CONTROLS:
        raise PlanError(f"--controls is {count}; expected an integer from 0 to {MOST_CONTROLS}.")
    return count


def _integers(text: str, flag: str) -> Iterator[int]:
    for part in text.split(","):
        try:
            yield int(part)
        except ValueError:
            raise PlanError(f"{flag} is '{text[:80]}'; expected integers, such as 0,4,8.") from None


def _shown(
    options: argparse.Namespace, verb: str, steps: Generator[EvaluationStep, None, _Found]
) -> _Found:
    """Run the steps with a progress bar and return their result."""
    from ipmerge_core.methods.declarations import drained, relayed
    from ipmerge_core.runtime.pipeline import keep_freed_memory

    keep_freed_memory()
    with Progress(options) as progress:

        def show(step: EvaluationStep) -> None:
            what = f"{step.done}/{step.total} {step.subject} {step.task}"
            resumed = step.action != "answered"
            progress.show(verb, step.done, step.total, what, resumed=resumed)

        return drained(relayed(steps, show))


# --- results as text -------------------------------------------------------------------------


def _sweep_lines(found: Sweep) -> Iterator[str]:
    """Yield a table of points, and what limits its meaning."""
    report = found.report
    head = ["", "matrices", "change", *(name for name, _, _ in _columns(report))]
    rows = [head]
    for point in found.points:
        size = "" if point.relative_change is None else f"{100 * point.relative_change:.2f} %"
        cells = [point.label, str(len(point.selected)) if point.plan else "", size]
        scores = (_score(report, point.label, task, part) for _, task, part in _columns(report))
        rows.append([*cells, *scores])
    yield from aligned(rows)
    yield "Scores in % with 95 % intervals; p: paired test against the unmerged model, Holm."
    yield from _limits(report)


def _knockout_lines(found: Knockout) -> Iterator[str]:
    """Yield a table of cuts for every model."""
    for model, report in found.reports.items():
        uncut, *others = report.subjects
        yield f"{model}: one module replaced at a time"
        rows = [["", *(name for name, _, _ in _columns(report))]]
        names = [f"layer {cut.layer} {cut.module} ({cut.value})" for cut in found.cuts]
        for label, subject in zip(["uncut", *names], [uncut, *others], strict=True):
            scores = (_score(report, subject, task, part) for _, task, part in _columns(report))
            rows.append([label, *scores])
        yield from aligned(rows)
        yield from _limits(report)
    yield "Scores in % with 95 % intervals; p: paired test against the uncut model, Holm."


def _columns(report: Report) -> list[tuple[str, str, str]]:
    """Return title, task and part of each column: the groups of a task, or all of it."""
    columns = []
    for facts in report.tasks:
        result = next(each for each in report.results if each.task == facts.name)
        groups = [part.part for part in result.parts if part.kind == "group"]
        named = [(f"{facts.label}, {part}", facts.name, part) for part in groups]
        columns += named if len(groups) > 1 else [(facts.label, facts.name, "all")]
    return columns


def _score(report: Report, subject: str, task: str, part: str) -> str:
    found = report.result(subject, task).part(part)
    if found is None or not found.n:
        return "-"
    wanted = subject, task, part
    test = next((c for c in report.comparisons if (c.second, c.task, c.part) == wanted), None)
    p = "" if test is None else " p<1e-4" if test.p_holm < 1e-4 else f" p={test.p_holm:.2g}"
    return f"{100 * found.share:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f}){p}"


def _limits(report: Report) -> Iterator[str]:
    sizes = [
        part.n
        for result in report.results
        for part in result.parts
        if part.kind == "all" and part.is_small
    ]
    if sizes:
        yield f"Small sample: {min(sizes)} items; intervals are wide."
    yield from report.notes
