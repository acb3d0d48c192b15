"""The command line: `ipmerge check | analyse | plan | merge | adapter | chat | app`.

Parses arguments, calls the package, prints. Results go to stdout (as JSON with --json), progress
and errors to stderr. Exit codes: 0 done, 2 the input is at fault (one sentence, no traceback), 1 a
bug, 130 interrupted (finished work is kept). Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import IPMergeError, PlanError
from ipmerge_core.version import __version__

if TYPE_CHECKING:
    from ipmerge_core.pairing import Finding, ModelPair
    from ipmerge_core.plan import MergePlan, Override

_MARKS = {"ok": "ok     ", "warning": "WARNING", "refusal": "REFUSAL"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy core spin, 25 x slower
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except IPMergeError as error:
        print(f"ipmerge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nipmerge: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    return code


# --- commands ---


def _check(options: argparse.Namespace) -> int:
    findings = _open(options).check()
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(_finding_line(finding))
    levels = {finding.level for finding in findings}
    if "refusal" in levels:
        return 2
    return 1 if options.strict and "warning" in levels else 0


def _analyse(options: argparse.Namespace) -> int:
    from ipmerge_core.analysis import assemble, iter_analysis
    from ipmerge_core.comparison import Options

    pair = _open(options)
    _refuse_strangers(pair, options.force)
    _check_target(options.output)
    how = Options(options.rank, options.temperature, options.quick).check()
    journal = Path(options.output + ".journal")
    costs = [m.shape[0] * m.shape[1] * min(m.shape) for m in pair.matrices for _ in pair.math]
    progress = _Progress("analysing", sum(costs), options.quiet)
    records, done = [], 0
    for cost, record in zip(
        costs, iter_analysis(pair, how, device=options.device, journal=journal), strict=True
    ):
        records.append(record)
        done += cost
        progress.show(done, f"{len(records)}/{len(costs)} {record.name}")
    progress.close()
    analysis = assemble(pair, tuple(records), how)
    analysis.save(options.output)
    journal.unlink()
    summary = {"pack": options.output, "records": len(records), "seconds": progress.seconds}
    quality = ", approximate" if analysis.approximate else ""
    text = f"Wrote {options.output}: {len(records)} records of {analysis.name}{quality}."
    return _print(options, summary, text)


def _calibrate(options: argparse.Namespace) -> int:
    from ipmerge_core.calibration import estimate, iter_calibration
    from ipmerge_core.passes import Settings
    from ipmerge_core.samples import load_samples

    pair = _open(options)
    how = Settings(options.kind, options.estimator, options.image_tokens, options.wide)
    seen = load_samples(options.mllm_samples, options.limit, sees=True)
    told = load_samples(options.math_samples, options.limit, sees=False)
    if options.dry_run:
        need = estimate(pair, options.output, how, len(seen), len(told))
        text = (
            f"{need.passes} passes, {need.nbytes_model / 1e9:.3f} GB for the largest model and "
            f"{need.nbytes_held / 1e9:.3f} GB for sums in memory, {need.nbytes_written / 1e9:.3f} "
            f"GB written ({need.nbytes_free / 1e9:.1f} GB free). Nothing was written."
        )
        return _print(options, need._asdict(), text)
    progress = None
    for step in iter_calibration(pair, options.output, how, seen, told, device=options.device):
        progress = progress or _Progress("calibrating", step.total, options.quiet)
        progress.show(step.done, f"{step.role}, layers {step.group + 1}/{step.groups}")
    assert progress is not None
    progress.close()
    text = f"Wrote {options.output}. Use it with `ipmerge plan --calibration {options.output}`."
    return _print(options, {"calibration": options.output, "kind": options.kind}, text)


def _plan(options: argparse.Namespace) -> int:
    from ipmerge_core.plan import make_plan
    from ipmerge_core.records import Analysis

    choice = _read_method_options(options)
    if options.pack:
        source: Analysis | ModelPair = Analysis.load(options.pack)
    else:
        source = _open(options)
    plan = make_plan(source, overrides=_read_overrides(options), **choice)
    plan.save(options.output)
    text = f"Wrote {options.output}: plan {plan.hash}, {_plan_sentence(plan)}"
    return _print(options, {"plan": options.output, "hash": plan.hash, **_preview(plan)}, text)


def _merge(options: argparse.Namespace) -> int:
    from ipmerge_core.merging import MANIFEST, estimate, iter_merge
    from ipmerge_core.plan import MergePlan

    plan = MergePlan.load(options.plan)
    if options.dry_run:
        need = estimate(plan, options.output)
        text = (
            f"Plan {plan.hash}, {_plan_sentence(plan)}\nReads {need.nbytes_read / 1e9:.3f} GB, "
            f"writes {need.nbytes_written / 1e9:.3f} GB to '{options.output}' "
            f"({need.nbytes_free / 1e9:.1f} GB free). Nothing was written."
        )
        return _print(options, need._asdict(), text)
    progress = None
    for step in iter_merge(plan, options.output, device=options.device, resume=options.resume):
        progress = progress or _Progress("merging", step.nbytes_total, options.quiet)
        progress.show(step.nbytes_done, f"{step.index}/{step.total} {step.action} {step.tensor}")
    assert progress is not None
    progress.close()
    manifest = json.loads((Path(options.output) / MANIFEST).read_text(encoding="utf-8"))
    text = f"Wrote {options.output}: {manifest['n_merged']} matrices merged, plan {plan.hash}."
    return _print(options, {"model": options.output, "hash": plan.hash}, text)


def _adapter(options: argparse.Namespace) -> int:
    from ipmerge_core.adapter import REPORT, iter_adapter
    from ipmerge_core.plan import MergePlan

    plan = MergePlan.load(options.plan)
    limits = {"tolerance": options.tolerance, "max_rank": options.max_rank}
    progress = None
    for step in iter_adapter(plan, options.output, device=options.device, **limits):
        progress = progress or _Progress("factorising", step.total, options.quiet)
        progress.show(step.index, f"{step.index}/{step.total} rank {step.rank} {step.tensor}")
    assert progress is not None
    progress.close()
    report = json.loads((Path(options.output) / REPORT).read_text(encoding="utf-8"))
    ranks = [matrix["rank"] for matrix in report["matrices"].values()]
    text = (
        f"Wrote {options.output}: {len(ranks)} matrices, rank {min(ranks)} to {max(ranks)}, "
        f"{report['nbytes'] / 1e6:.1f} MB, plan {plan.hash}. Load it with PEFT on the MLLM."
    )
    return _print(options, {"adapter": options.output, **report}, text)


def _chat(options: argparse.Namespace) -> int:
    from ipmerge_core.inference import answer

    models = [options.model, *([options.compare] if options.compare else [])]
    answers = {
        model: answer(model, options.prompt, options.image, max_new_tokens=options.max_new_tokens)
        for model in models
    }
    text = "\n\n".join(f"{model}:\n{reply}" for model, reply in answers.items())
    return _print(options, answers, text)


def _app(options: argparse.Namespace) -> int:
    from ipmerge_core.ui.app import launch

    launch(host=options.host, port=options.port)
    return 0


# --- reading options ---


def _open(options: argparse.Namespace) -> ModelPair:
    from ipmerge_core.pairing import open_pair

    if not (options.mllm and options.math and options.base):
        raise PlanError("Name the models: --mllm A --math B --base Z (several --math are allowed).")
    return open_pair(options.mllm, options.math, options.base, base_mllm=options.base_mllm)


def _refuse_strangers(pair: ModelPair, force: bool) -> None:
    from ipmerge_core.errors import PairingError

    refusals = [finding for finding in pair.check() if finding.level == "refusal"]
    if refusals and not force:
        first = refusals[0]
        raise PairingError(
            f"{first.subject}: {first.message} {first.remedy} (--force analyses anyway.)"
        )


def _check_target(path: str) -> None:
    folder = Path(path).expanduser().absolute().parent
    if not folder.is_dir():
        raise PlanError(f"Cannot write '{path}': there is no folder '{folder}'. Make it first.")


def _read_method_options(options: argparse.Namespace) -> dict[str, Any]:
    from ipmerge_core.methods import find_method

    kinds = {parameter.name: parameter.kind for parameter in find_method(options.method).parameters}
    chosen: dict[str, Any] = {
        "method": options.method,
        "similarity_threshold": options.similarity_threshold,
        "lambda_": options.lambda_,
        "similarity": options.similarity,
    }
    for name in ("include", "exclude", "layer_gains", "calibration"):
        chosen[name] = getattr(options, name)
    for assignment in options.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise PlanError(f"--set {assignment}: expected NAME=VALUE, such as math_weight=0.5.")
        chosen[name] = _parse_value(text, kinds.get(name, "float"))
    return chosen


def _parse_value(text: str, kind: str) -> float | int | bool | str | None:
    if kind == "choice":
        return text
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return text  # the method's own check names the parameter and what it expects


def _read_overrides(options: argparse.Namespace) -> dict[str, Override]:
    merged: dict[str, Override] = dict.fromkeys(options.force_merge, "merge")
    kept: dict[str, Override] = dict.fromkeys(options.force_keep, "keep")
    return merged | kept


# --- printing ---


def _finding_line(finding: Finding) -> str:
    remedy = f" {finding.remedy}" if finding.remedy else ""
    return f"{_MARKS[finding.level]}  {finding.subject}: {finding.message}{remedy}"


def _preview(plan: MergePlan) -> dict[str, Any]:
    try:
        return asdict(plan.preview())
    except PlanError as error:
        return {"selected": [d.name for d in plan.selected], "preview": str(error)}


def _plan_sentence(plan: MergePlan) -> str:
    chosen = f"{len(plan.selected)} of {len(plan.decisions)} matrices merge"
    preview = _preview(plan)
    if "relative_change" in preview:
        return f"{chosen}, the decoder changes by {preview['relative_change']:.3%} of its norm."
    return f"{chosen}."


def _print(options: argparse.Namespace, content: Any, text: str) -> int:  # noqa: ANN401
    print(json.dumps(content, indent=1) if options.json else text)
    return 0


class _Progress:
    """One line on stderr: percent, what is done, time left; by cost, not by count."""

    def __init__(self, verb: str, total: int, quiet: bool) -> None:
        self.verb, self.total, self.quiet = verb, max(total, 1), quiet
        self.live = sys.stderr.isatty()
        self.started = time.monotonic()
        self.last = 0.0

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def show(self, done: int, what: str) -> None:
        now, fraction = time.monotonic(), done / self.total
        if self.quiet or (now - self.last < (0.1 if self.live else 5) and fraction < 1):
            return
        self.last = now
        left = (now - self.started) * (1 - fraction) / fraction if fraction else 0
        line = f"{self.verb} {fraction:4.0%}, {left:.0f} s left: {what}"
        print(
            f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr
        )

    def close(self) -> None:
        if self.live and not self.quiet:
            print(file=sys.stderr)


# --- the parser ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipmerge", description="Compare and merge the weights of sibling models."
    )
    parser.add_argument("--version", action="version", version=f"ipmerge {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--quiet", action="store_true", help="no progress on stderr")
        return sub

    check = command("check", _check, "are these models siblings? reads headers, no weights")
    _add_models(check)
    check.add_argument("--strict", action="store_true", help="exit with 1 on warnings")

    analyse = command("analyse", _analyse, "decompose the task vectors into a small pack")
    _add_models(analyse)
    analyse.add_argument("-o", "--output", required=True, metavar="PACK", help="pack.json.gz")
    _add_device(analyse)
    analyse.add_argument("--rank", type=int, help="keep only the leading singular triplets")
    analyse.add_argument("--temperature", type=float, default=32.0, help="of the direction weights")
    analyse.add_argument(
        "--quick", action="store_true", help="approximate, from the leading directions only"
    )
    analyse.add_argument("--force", action="store_true", help="go on although the check refuses")

    calibrate = command("calibrate", _calibrate, "measure the models on samples, for a method")
    _add_models(calibrate)
    _add_calibration(calibrate)
    _add_device(calibrate)

    plan = command("plan", _plan, "decide what merges; shows what changes")
    plan.add_argument("pack", nargs="?", help="the pack, or name the models instead")
    _add_models(plan)
    _add_method(plan)
    plan.add_argument("-o", "--output", required=True, metavar="PLAN", help="plan.json")

    merge = command("merge", _merge, "carry out a plan")
    merge.add_argument("plan", help="plan.json")
    merge.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the new model")
    merge.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with an unfinished run of the same plan (default)",
    )
    merge.add_argument("--dry-run", action="store_true", help="only say what it would take")
    _add_device(merge)

    adapter = command("adapter", _adapter, "write an IP-Merging plan's change as a LoRA adapter")
    adapter.add_argument("plan", help="plan.json")
    adapter.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the new adapter")
    adapter.add_argument("--tolerance", type=float, default=1e-3, help="relative residual allowed")
    adapter.add_argument("--max-rank", type=int, default=64, help="directions per matrix, at most")
    _add_device(adapter)

    chat = command("chat", _chat, "ask one model, or two side by side")
    chat.add_argument("model", help="a model folder")
    chat.add_argument("--compare", metavar="MODEL", help="another model folder")
    chat.add_argument("--image", help="an image file")
    chat.add_argument("--prompt", required=True)
    chat.add_argument("--max-new-tokens", type=int, default=256)

    app = command("app", _app, "serve the app")
    app.add_argument("--host", default="127.0.0.1")
    app.add_argument("--port", type=int, help="the first free one from 7860 on, if not given")
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mllm", metavar="MODEL", help="folder or hub id of the multimodal model")
    parser.add_argument(
        "--math", metavar="MODEL", action="append", default=[], help="an expert; may be repeated"
    )
    parser.add_argument("--base", metavar="MODEL", help="the text model they descend from")
    parser.add_argument("--base-mllm", metavar="MODEL", help="the MLLM's own base, if another")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="as torch names it: cpu, cuda, cuda:1")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=("gram", "fisher"), required=True)
    for role in ("mllm", "math"):
        parser.add_argument(f"--{role}-samples", default="demo", help="a jsonl file, or demo")
    parser.add_argument("--limit", type=int, default=500, help="samples of each, at most")
    parser.add_argument("--estimator", choices=("sampled", "empirical"), default="sampled")
    parser.add_argument("--wide", choices=("full", "diagonal"), default="full")
    parser.add_argument(
        "--image-tokens", action=argparse.BooleanOptionalAction, default=True, help="count them"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="only say what it would take")


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="ip_merging")
    parser.add_argument("--similarity-threshold", type=float, default=0.4, metavar="S_ALPHA")
    parser.add_argument("--similarity", default="first", help="first, max or weighted")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=1.0)
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="a method's parameter"
    )
    parser.add_argument("--calibration", metavar="FOLDER", help="for the methods that need data")
    parser.add_argument("--include", metavar="REGEX", help="merge only matrices it finds")
    parser.add_argument("--exclude", metavar="REGEX", help="keep the matrices it finds")
    parser.add_argument(
        "--layer-gains",
        type=float,
        nargs="+",
        default=(),
        metavar="FACTOR",
        help="factors on the gain from the first layer to the last, interpolated",
    )
    for option, words in (("--force-merge", "merge"), ("--force-keep", "keep")):
        parser.add_argument(
            option,
            metavar="MATRIX",
            action="append",
            default=[],
            help=f"{words} it at any similarity",
        )
