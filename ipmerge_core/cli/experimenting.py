"""Implement `ipmerge experiment`: a pair from its models to a report, in one run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ipmerge_core.cli.evaluating import report_lines
from ipmerge_core.cli.option_groups import (
    add_flag,
    add_force,
    add_method,
    add_models,
    add_tasks,
)
from ipmerge_core.cli.printing import Progress, print_result
from ipmerge_core.cli.reading import (
    read_evaluation_settings,
    read_method_options,
    read_plan_options,
    read_tasks,
)
from ipmerge_core.errors import PlanError

if TYPE_CHECKING:
    from ipmerge_core.evaluation.experiment import Experiment, ExperimentStep
    from ipmerge_core.evaluation.experiment_estimate import ExperimentEstimate

TASKS = ["mathvista", "mmmu"]  # by default


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the options of an experiment."""
    add_models(parser)
    add_method(parser, measure=False)
    add_tasks(parser, required=False, stored=False)
    parser.add_argument(
        "--prompts",
        metavar="JSONL",
        help="prompts whose replies are recorded; default: a problem of every skill of the demo",
    )
    parser.add_argument(
        "--max-reply-tokens", type=int, default=256, help="maximum length of a recorded reply"
    )
    add_flag(parser, "--dry-run", "print what is downloaded and what it takes, and exit")
    add_force(parser)


def experiment(options: argparse.Namespace) -> int:
    """Check, analyse, plan, merge, record and evaluate a pair, resuming in the folder."""
    from ipmerge_core.evaluation.experiment import STAGES, iter_experiment
    from ipmerge_core.evaluation.experiment_estimate import estimate_experiment
    from ipmerge_core.evaluation.report import Report
    from ipmerge_core.methods.declarations import drained, relayed
    from ipmerge_core.runtime.pipeline import keep_freed_memory
    from ipmerge_core.ui.evaluate.offline import page_of

    keep_freed_memory()
    what = read_experiment(options)
    if options.dry_run:
        need = estimate_experiment(what, options.target)
        return print_result(options, need._asdict(), "\n".join(_estimate_lines(need, options)))
    with Progress(options) as progress:

        def show(step: ExperimentStep) -> None:
            verb = f"{step.number}/{len(STAGES)} {step.stage}"
            progress.show(verb, step.done, step.total, step.what, resumed=step.resumed)

        summary = drained(relayed(iter_experiment(what, options.target, page_of), show))
    report = Report.load(options.target / summary["files"]["report"])
    text = "\n".join([*_summary_lines(summary, options.output), *report_lines(report)])
    return print_result(options, summary, text)


def read_experiment(options: argparse.Namespace) -> Experiment:
    """Return what to do, without opening a model. Raises: PlanError, RunError."""
    from ipmerge_core.evaluation.experiment import Experiment, Models
    from ipmerge_core.inference.sampling import GenerationSettings

    if not (options.mllm and options.math):
        raise PlanError("Specify the models: --mllm A --math B --base Z (--math can be repeated).")
    options.tasks = options.tasks or TASKS
    return Experiment(
        models=Models(options.mllm, tuple(options.math), options.base, options.base_mllm),
        tasks=read_tasks(options),
        plan=read_method_options(options),
        options=read_plan_options(options),
        evaluation=read_evaluation_settings(options),
        prompts=options.prompts,
        lengths=GenerationSettings(max_new_tokens=options.max_reply_tokens),
        force=options.force,
    )


def _summary_lines(summary: dict[str, Any], folder: str) -> Iterator[str]:
    plan = summary["plan"]
    yield (
        f"Wrote {folder}: plan {plan['hash']} merges {plan['selected']} of {plan['matrices']} "
        f"matrices; report.html shows the scores, summary.json lists everything."
    )
    said = ", ".join(f"{count} {verdict}" for verdict, count in summary["records"].items())
    yield f"Recorded replies: {said}."
    yield from summary["notes"]
    yield ""


def _estimate_lines(need: ExperimentEstimate, options: argparse.Namespace) -> Iterator[str]:
    from ipmerge_core.runtime.devices import describe_device

    def giga(nbytes: int) -> str:
        return f"{nbytes / 1e9:.3f} GB"

    most = "" if need.is_exact else "at most "
    yield (
        f"Downloads: {giga(need.nbytes_models)} of models unless they are in the hub's cache "
        f"(about {need.seconds_download:.0f} s); {giga(need.nbytes_analysis)} read by the analysis "
        f"without storing them, at most {giga(need.nbytes_merge)} of them again by the merge."
    )
    yield f"Data: {', '.join(need.tasks)}; their sizes are known after the download."
    yield (
        f"Disk: writes {giga(need.nbytes_written)} to '{options.output}' "
        f"({giga(need.nbytes_free)} free). Memory: about {giga(need.nbytes_memory)}."
    )
    yield (
        f"Time on {describe_device(options.device)}: analysis about "
        f"{max(need.seconds_analysis, 1):.0f} s, merge {most}about "
        f"{max(need.seconds_merge, 1):.0f} s; that of {need.replies} models answering "
        f"{need.limit or 'all'} items per task is shown from the first batch on."
    )
    yield "Dry run: nothing was written."
