"""Define the commands and options of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from ipmerge_core.cli import commands
from ipmerge_core.cli.evaluating import evaluate, optional_file
from ipmerge_core.cli.experimenting import add_experiment, experiment
from ipmerge_core.cli.finetuning import add_drift_options, drift
from ipmerge_core.cli.option_groups import (
    add_calibration,
    add_device,
    add_flag,
    add_force,
    add_lengths,
    add_method,
    add_models,
    add_output,
    add_plan,
    add_precision,
    add_tasks,
    add_updates,
)
from ipmerge_core.cli.searching import add_replay, add_search, replay, search
from ipmerge_core.cli.sweeping import knockout, sweep
from ipmerge_core.runtime.paths import output_file
from ipmerge_core.spectral.kinds import TEMPERATURE
from ipmerge_core.version import __version__

_KEPT = "use the updates kept there by an analysis instead of decomposing again"


def make_parser() -> argparse.ArgumentParser:
    """Create the parser; the namespace has the command's function as `run`.

    Options whose effect depends on others are None if they are not given: see `combinations`.
    `door` checks the path given with --output.
    """
    parser = argparse.ArgumentParser(
        prog="ipmerge",
        description="Compare and merge the weights of models fine-tuned from one base.",
    )
    parser.add_argument("--version", action="version", version=f"ipmerge {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, summary, add_options in COMMANDS:
        command = subparsers.add_parser(run.__name__, help=summary, description=summary)
        command.set_defaults(run=run, door=None)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--quiet", action="store_true", help="do not show progress on stderr")
        add_options(command)
    return parser


def _check(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    parser.add_argument("--strict", action="store_true", help="exit with code 1 on warnings")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="compare the task vectors over all decoder weights instead of samples",
    )


def _pack_file(path: str) -> Path:
    """Check the path of a pack, whose journal has a longer name, for `door`."""
    from ipmerge_core.analysis.partial import SUFFIX  # takes pydantic

    return output_file(path, suffix=SUFFIX)


def _analyse(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    add_output(parser, "PACK", "output file, such as pack.json.gz")
    parser.set_defaults(door=_pack_file)
    add_device(parser)
    parser.add_argument("--rank", type=int, help="keep only the leading singular triplets")
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="softmax temperature over directions"
    )
    parser.add_argument(
        "--directions",
        choices=("existing", "all"),
        default="existing",
        help="exclude directions within the rounding noise (default), or use all, as in the paper",
    )
    parser.add_argument(
        "--quick", action="store_true", help="approximate results from the leading directions"
    )
    add_updates(parser, "keep the updates of IP-Merging there for later merges and chats")
    add_force(parser)


def _calibrate(parser: argparse.ArgumentParser) -> None:
    add_models(parser)
    add_calibration(parser)
    add_device(parser, fp64=False)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", nargs="?", help="pack of an analysis; otherwise specify models")
    add_models(parser, "; with PACK, where it is now")
    add_method(parser)
    parser.add_argument(
        "--recipe", metavar="YAML", help="read models and method from a mergekit recipe"
    )
    add_output(parser, "PLAN", "output file, such as plan.json")
    add_device(parser)


def _recipe(parser: argparse.ArgumentParser) -> None:
    add_plan(parser, own_base=False)  # which a recipe cannot express
    add_output(parser, "YAML", "output file, such as recipe.yaml")


def _merge(parser: argparse.ArgumentParser) -> None:
    add_plan(parser)
    add_output(parser, "FOLDER", "output folder of the model")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="resume an unfinished run of the same plan (default)",
    )
    add_flag(parser, "--dry-run", "print an estimate and exit")
    add_updates(parser, _KEPT)
    add_force(parser)
    add_device(parser)


def _adapter(parser: argparse.ArgumentParser) -> None:
    add_plan(parser)
    add_output(parser, "FOLDER", "output folder of the adapter")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="maximum relative residual")
    parser.add_argument("--max-rank", type=int, default=64, help="maximum rank per matrix")
    add_updates(parser, _KEPT)
    add_force(parser)
    add_device(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder")
    parser.add_argument("--compare", metavar="MODEL", help="folder of a second model")
    parser.add_argument("--image", help="image file")
    parser.add_argument("--prompt", required=True, help="the question")
    add_lengths(parser)
    add_precision(parser)
    add_device(parser, fp64=False)


def _record(parser: argparse.ArgumentParser) -> None:
    add_plan(parser)
    parser.add_argument(
        "--prompts", required=True, metavar="JSONL", help="questions, images and reference answers"
    )
    add_output(parser, "FILE", "output file, such as NAME.records.json next to NAME.pack.json.gz")
    add_lengths(parser)
    add_precision(parser)
    add_updates(parser, _KEPT)
    add_device(parser)


def _search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", help="pack of an analysis")
    add_models(parser, ", if it has moved since the analysis")
    add_search(parser)
    add_method(parser, measure=False)
    add_tasks(parser)
    add_force(parser)
    add_output(parser, "FOLDER", "folder of the study, which is continued if it exists")
    add_device(parser, fp64=False)


def _replay(parser: argparse.ArgumentParser) -> None:
    add_replay(parser)
    add_output(parser, "FOLDER", "output folder of the report")


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", help="pack of an analysis")
    add_models(parser, ", if it has moved since the analysis")
    for number in ("", "2"):
        words = "second parameter" if number else "parameter"
        parser.add_argument(
            f"--parameter{number}",
            metavar="NAME",
            help=f"{words} to vary: similarity_threshold, lambda, or one of the method",
        )
        parser.add_argument(f"--values{number}", metavar="A,B,C", help=f"values of the {words}")
    add_flag(parser, "--ablation", "leave out parts of the method's formula and of its layers")
    parser.add_argument(
        "--controls", type=int, metavar="N", help="controls with permuted weights (3 by default)"
    )
    add_method(parser, measure=False)
    add_tasks(parser)
    add_force(parser)
    add_output(parser, "FILE", "output file, such as sweep.json")
    add_device(parser, fp64=False)


def _knockout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="model folder, or plan.json for the unmerged and the merged model"
    )
    parser.add_argument(
        "--pack", metavar="FILE", help="pack of an app's plan, if it is not one of the app's"
    )
    add_models(parser, ", if it has moved since the plan was made")
    parser.add_argument(
        "--replace-by",
        choices=("constant", "zero", "base", "math", "update"),
        default="constant",
        help="1/N (default), zero, the weights of the base or of the math model, or update: those "
        "of the unmerged model",
    )
    parser.add_argument(
        "--modules", default="attention,mlp", help="attention, mlp, or single ones such as q,down"
    )
    parser.add_argument("--layers", metavar="0,4,8", help="only these layers; all by default")
    parser.add_argument("--stride", type=int, default=1, help="every N-th layer")
    parser.add_argument("--csv", metavar="FILE", help="also write the rows as CSV")
    parser.add_argument(
        "--map",
        metavar="FILE",
        help="also write the changes alone, such as NAME.knockout.json",
    )
    add_tasks(parser)
    add_force(parser)
    add_output(parser, "FILE", "output file, such as knockout.json")
    add_device(parser, fp64=False)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="model or adapter folder; the first is compared"
    )
    parser.add_argument("--base", metavar="MODEL", help="base of adapters; default: as they name")
    add_tasks(parser)
    parser.add_argument(
        "--harness",
        choices=("lmms-eval", "vlmevalkit"),
        help="run lmms-eval, or write a configuration for VLMEvalKit; tasks are those of it",
    )
    parser.add_argument("--harness-python", metavar="PYTHON", help="Python with lmms-eval")
    parser.add_argument("--harness-model", metavar="NAME", help="its class for this model")
    parser.add_argument("--harness-include", metavar="FOLDER", help="folder with further tasks")
    parser.add_argument("-o", "--output", metavar="REPORT", help="output file, such as report.json")
    parser.set_defaults(door=optional_file)
    add_device(parser, fp64=False)


def _experiment(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    add_output(parser, "FOLDER", "folder of the experiment, which is continued if it exists")
    add_device(parser)


def _drift(parser: argparse.ArgumentParser) -> None:
    add_drift_options(parser)
    add_output(parser, "FOLDER", "output folder of the model")
    add_device(parser, fp64=False)


def _app(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to")
    parser.add_argument("--port", type=int, help="port; by default the first free one from 7860")
    add_precision(parser)
    parser.add_argument(
        "--device",
        default="auto",
        help="device of its runs: auto (default), cpu, cuda, cuda:1, xpu",
    )


COMMANDS = (
    (commands.check, "check that the models share one base", _check),
    (commands.analyse, "decompose the task vectors and write a pack", _analyse),
    (
        commands.calibrate,
        "measure layer statistics on samples, for methods that need data",
        _calibrate,
    ),
    (commands.plan, "create a merge plan and show its preview", _plan),
    (commands.recipe, "export a plan as a mergekit recipe", _recipe),
    (commands.merge, "execute a merge plan", _merge),
    (commands.adapter, "export an IP-Merging plan as a LoRA adapter", _adapter),
    (commands.chat, "ask one model, or two for comparison", _chat),
    (commands.record, "record the replies of a model and of a plan to prompts", _record),
    (search, "search the coefficients of a method by merges in memory", _search),
    (replay, "compare optimizers on a table of past results", _replay),
    (sweep, "score the plans of a sweep or an ablation, without writing a model", _sweep),
    (knockout, "score a model with one module of one layer replaced at a time", _knockout),
    (evaluate, "score models on tasks, with intervals and paired tests", _evaluate),
    (
        experiment,
        "analyse, merge and evaluate a pair in one run, from its models to a report",
        _experiment,
    ),
    (drift, "fine-tune the MLLM with a reasoning prior in its gradient (DRIFT)", _drift),
    (commands.app, "start the web app", _app),
)
