"""Implement the commands, one function each, which returns the exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from threading import Event
from typing import TYPE_CHECKING

from ipmerge_core.cli.combinations import is_given
from ipmerge_core.cli.printing import (
    Progress,
    finding_line,
    plan_sentence,
    preview_of,
    print_result,
    task_vector_lines,
)
from ipmerge_core.cli.reading import (
    open_models,
    read_method_options,
    read_pack,
    read_plan,
    read_plan_options,
    read_recipe,
)
from ipmerge_core.errors import PlanError, RunError, first_line
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.paths import input_file, resolve_path

AUTO = "auto"

if TYPE_CHECKING:
    from ipmerge_core.analysis.records import Analysis
    from ipmerge_core.merging.whole_model import FirstPassStep
    from ipmerge_core.models.pairing import ModelPair
    from ipmerge_core.planning.plan import MergePlan


def check(options: argparse.Namespace) -> int:
    """Run the sibling check: exit code 2 for a refusal, 1 for warnings with --strict."""
    findings = open_models(options).check(exact=options.exact)
    content = [finding._asdict() for finding in findings]
    print_result(options, content, "\n".join(map(finding_line, findings)))
    levels = {finding.level for finding in findings}
    if "refusal" in levels:
        return 2
    return 1 if options.strict and "warning" in levels else 0


def analyse(options: argparse.Namespace) -> int:
    """Write a pack; resume an interrupted analysis."""
    from ipmerge_core.analysis.analyse import iter_pack_of
    from ipmerge_core.analysis.comparison import Options
    from ipmerge_core.analysis.records import Analysis
    from ipmerge_core.runtime.pipeline import keep_freed_memory

    keep_freed_memory()
    pair = open_models(options)
    if not options.force:
        pair.require_common_base("Use --force to analyse anyway.")
    how = Options(options.rank, options.temperature, options.quick, options.directions).check()
    with Progress(options) as progress:
        steps = iter_pack_of(
            pair, options.target, how, device=options.device, updates=options.updates
        )
        for step in steps:
            what = f"{step.number}/{step.total} {step.matrix}"
            progress.show("analysing", step.cost_done, step.cost_total, what)
    analysis = Analysis.load(options.target)
    summary = {
        "pack": options.output,
        "records": len(analysis.records),
        "device": options.device,
        "seconds": progress.seconds,
        "task_vectors": [
            {"norm_ratio": found.norm_ratio, "cosine": found.cosine}
            for found in map(analysis.products, range(len(analysis.sources.math)))
        ],
    }
    quality = ", approximate" if analysis.approximate else ""
    text = f"Wrote {options.output}: {len(analysis.records)} records of {analysis.name}{quality}."
    text += "".join(f"\n{line}" for line in task_vector_lines(analysis))
    return print_result(options, summary, text)


def calibrate(options: argparse.Namespace) -> int:
    """Run a calibration and write the measurements to a folder."""
    from ipmerge_core.calibration.calibrate import estimate_calibration, iter_calibration
    from ipmerge_core.calibration.passes import CalibrationSettings
    from ipmerge_core.calibration.samples import load_samples
    from ipmerge_core.calibration.store import Measurements

    pair = open_models(options)
    names = ("estimator", "image_tokens", "wide")
    chosen = {name: vars(options)[name] for name in names if is_given(options, name)}
    how = CalibrationSettings(options.kind, **chosen)
    mllm = load_samples(options.mllm_samples, options.limit, takes_images=True)
    math = load_samples(options.math_samples, options.limit, takes_images=False)
    if options.dry_run:
        need = estimate_calibration(pair, options.target, how, len(mllm), len(math))
        text = (
            f"{need.passes} passes, {need.nbytes_model / 1e9:.3f} GB for the largest model and "
            f"{need.nbytes_held / 1e9:.3f} GB for sums in memory, {need.nbytes_written / 1e9:.3f} "
            f"GB on disk ({need.nbytes_free / 1e9:.1f} GB free). Dry run: nothing was written."
        )
        return print_result(options, need._asdict(), text)
    with Progress(options) as progress:
        sources = (options.mllm_samples, options.math_samples)
        steps = iter_calibration(
            pair, options.target, how, mllm, math, device=options.device, sources=sources
        )
        for step in steps:
            what = f"{step.role}, layers {step.group + 1}/{step.groups}"
            resumed = step.action == "resumed"
            progress.show("calibrating", step.done, step.total, what, resumed=resumed)
    found = Measurements.open(options.target)
    tokens = {model.role: model.tokens for model in found.models}
    doubts = found.doubts(max(matrix.shape[1] for matrix in pair.matrices))
    counted = ", ".join(f"{count} tokens for {role}" for role, count in tokens.items())
    text = (
        f"Wrote {options.output}: {counted}. Use it with "
        f"`ipmerge plan --calibration {options.output}`."
        f"{''.join(f' WARNING: {what} {remedy}' for what, remedy in doubts)}"
    )
    result = {
        "calibration": options.output,
        "kind": options.kind,
        "device": options.device,
        "tokens": tokens,
    }
    return print_result(options, result, text)


def plan(options: argparse.Namespace) -> int:
    """Write a plan and print its preview."""
    from ipmerge_core.planning.description import describe_empty
    from ipmerge_core.planning.plan import make_plan

    source: Analysis | ModelPair
    if options.recipe:
        source, choice = read_recipe(options)
    else:
        choice = read_method_options(options)
        source = read_pack(options) if options.pack else open_models(options)
    made = make_plan(source, options=read_plan_options(options), **choice)
    if options.measure:
        made = _measured(made, options)
    made.save(options.target)
    text = f"Wrote {options.output}: plan {made.hash}, {plan_sentence(made)}"
    text += f" WARNING: {empty}" if (empty := describe_empty(made)) else ""
    return print_result(
        options, {"plan": options.output, "hash": made.hash, **preview_of(made)}, text
    )


def _measured(plan: MergePlan, options: argparse.Namespace) -> MergePlan:
    from ipmerge_core.merging.whole_model import is_due, iter_first_pass
    from ipmerge_core.methods.declarations import drained, relayed

    if not is_due(plan):
        why = "is already known" if plan.statistic else "is not needed by this method"
        raise PlanError(f"--measure has no effect: the result of a first pass {why}. Omit it.")
    with Progress(options) as progress:

        def show(step: FirstPassStep) -> None:
            what = f"{step.number}/{step.total} {step.tensor}"
            progress.show("measuring", step.nbytes_done, step.nbytes_total, what)

        return drained(relayed(iter_first_pass(plan, device=options.device), show))


def recipe(options: argparse.Namespace) -> int:
    """Export a plan as a mergekit recipe."""
    from ipmerge_core.planning.mergekit import export_recipe

    write_whole(options.target, export_recipe(read_plan(options)))
    return print_result(options, {"recipe": options.output}, f"Wrote {options.output}.")


def merge(options: argparse.Namespace) -> int:
    """Execute a plan, or with --dry-run print an estimate."""
    from ipmerge_core.merging.merge import estimate_merge, iter_merge, require_common_base
    from ipmerge_core.merging.provenance import is_finished, read_manifest
    from ipmerge_core.planning.description import describe_empty
    from ipmerge_core.runtime.devices import describe_device
    from ipmerge_core.runtime.pipeline import keep_freed_memory

    keep_freed_memory()
    plan = read_plan(options)
    if empty := describe_empty(plan):
        print(f"WARNING: {empty}", file=sys.stderr)
    if options.dry_run:
        require_common_base(plan, force=options.force)
        need = estimate_merge(plan, options.target, device=options.device)
        text = (
            f"Plan {plan.hash}, {plan_sentence(plan)}\nReads {need.nbytes_read / 1e9:.3f} GB, "
            f"writes {need.nbytes_written / 1e9:.3f} GB to '{options.output}' "
            f"({need.nbytes_free / 1e9:.1f} GB free), takes about {max(need.seconds, 1):.0f} s on "
            f"{describe_device(need.device)}. Nothing was written."
        )
        text += f"\n{need.advice}" if need.advice else ""
        return print_result(options, need._asdict(), text)
    resume = options.resume is not False
    verb = "Already complete" if resume and is_finished(plan, options.target) else "Wrote"
    with Progress(options) as progress:
        how = {"device": options.device, "resume": resume, "force": options.force}
        how["updates"] = _updates_of(options, plan)
        for step in iter_merge(plan, options.target, **how):
            doing = "measuring" if step.action == "measured" else "merging"
            what = f"{step.index}/{step.total} {step.action} {step.tensor}"
            resumed = step.action == "resumed"
            progress.show(doing, step.nbytes_done, step.nbytes_total, what, resumed=resumed)
    manifest = read_manifest(options.target)
    text = f"{verb} {options.output}: {manifest['n_merged']} matrices merged, plan {plan.hash}."
    result = {"model": options.output, "hash": plan.hash, "device": manifest["device"]}
    return print_result(options, result, text)


def _updates_of(options: argparse.Namespace, plan: MergePlan) -> str | None:
    """Return the folder of kept updates. Raises: PlanError for a plan that has none."""
    folder: str | None = options.updates
    if folder and not plan.has_updates:
        raise PlanError(
            f"--updates has no effect with plan {plan.hash} ({plan.method}): only IP-Merging with "
            f"projection has updates, without a budget and with input_share=1. Omit it."
        )
    return folder


def adapter(options: argparse.Namespace) -> int:
    """Export an IP-Merging plan as a LoRA adapter."""
    from ipmerge_core.adapters.export import REPORT, iter_adapter

    plan = read_plan(options)
    how = {"tolerance": options.tolerance, "max_rank": options.max_rank, "force": options.force}
    how["updates"] = options.updates
    with Progress(options) as progress:
        for step in iter_adapter(plan, options.target, device=options.device, **how):
            what = f"{step.index}/{step.total} rank {step.rank} {step.tensor}"
            progress.show("factorising", step.index, step.total, what)
    report = json.loads((options.target / REPORT).read_text(encoding="utf-8"))
    ranks = [matrix["rank"] for matrix in report["matrices"].values()]
    text = (
        f"Wrote {options.output}: {len(ranks)} matrices, rank {min(ranks)} to {max(ranks)}, "
        f"{report['nbytes'] / 1e6:.1f} MB, plan {plan.hash}. Load it with PEFT on the MLLM."
    )
    return print_result(options, {"adapter": options.output, **report}, text)


def chat(options: argparse.Namespace) -> int:
    """Ask one or two models and print the answers."""
    from ipmerge_core.inference.generation import answer

    models = [options.model, *([options.compare] if options.compare else [])]
    if len({resolve_path(model) for model in models}) < len(models):
        raise PlanError(
            f"'{options.model}' and '{options.compare}' are the same model. Specify another one "
            f"with --compare, or omit it."
        )
    image = input_file(options.image, "image") if options.image else None
    names = ("max_new_tokens", "max_thinking_tokens", "device", "precision")
    how = {name: vars(options)[name] for name in names}
    answers = {model: answer(model, options.prompt, image, **how) for model in models}
    text = "\n\n".join(f"{model}:\n{reply}" for model, reply in answers.items())
    return print_result(options, answers, text)


def record(options: argparse.Namespace) -> int:
    """Record the replies of a model and of a merge of it to a set of prompts."""
    from ipmerge_core.evaluation.recording import iter_recording, read_prompts
    from ipmerge_core.inference.sampling import GenerationSettings

    plan, prompts = read_plan(options), read_prompts(options.prompts)
    settings = GenerationSettings(
        max_new_tokens=options.max_new_tokens, max_thinking_tokens=options.max_thinking_tokens
    )
    how = {name: vars(options)[name] for name in ("device", "precision")}
    how["updates"] = _updates_of(options, plan)
    with Progress(options) as progress:
        for step in iter_recording(plan, prompts, options.target, settings=settings, **how):
            progress.show("recording", step.number, step.total, step.what)
    content = json.loads(options.target.read_text(encoding="utf-8"))
    counts = Counter(example["verdict"] for example in content["examples"])
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    text = f"Wrote {options.output}: {len(prompts)} prompts with plan {plan.hash} ({said})."
    return print_result(options, {"records": options.output, "verdicts": dict(counts)}, text)


def app(options: argparse.Namespace) -> int:
    """Serve the web app until it is interrupted."""
    from ipmerge_core.ui.app import launch

    device = AUTO if options.device is None else options.device
    if device != AUTO:
        from ipmerge_core.runtime.devices import resolve_device

        resolve_device(device)  # fail before the app is served
    silent = options.json or options.quiet
    try:
        served = launch(
            options.host,
            options.port,
            block=not options.json,
            device=device,
            precision=options.precision,
            quiet=silent,
        )
    except (OSError, OverflowError) as error:  # the port is in use, or there is no such address
        raise RunError(
            f"Cannot serve the app at {options.host}, port {options.port or 'from 7860 on'} "
            f"({first_line(error)}). Choose another --port or --host."
        ) from error
    if options.json:
        print_result(options, {"address": served[1], "device": device}, served[1])
        Event().wait()
    return 0
