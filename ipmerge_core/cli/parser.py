"""Define the commands and options of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ipmerge_core.cli import commands
from ipmerge_core.cli.combinations import METHOD
from ipmerge_core.cli.evaluating import evaluate, optional_file
from ipmerge_core.cli.finetuning import add_drift_options, drift
from ipmerge_core.cli.searching import add_replay, add_search, replay, search
from ipmerge_core.cli.sweeping import knockout, sweep
from ipmerge_core.inference.precisions import PRECISIONS
from ipmerge_core.planning.options import OPTIONS, Option
from ipmerge_core.runtime.paths import output_file, output_folder
from ipmerge_core.spectral.kinds import SIMILARITIES, TEMPERATURE
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
    _add_models(parser)
    parser.add_argument("--strict", action="store_true", help="exit with code 1 on warnings")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="compare the task vectors over all decoder weights instead of samples",
    )


def _add_output(parser: argparse.ArgumentParser, metavar: str, help: str) -> None:  # noqa: A002
    """Add --output, whose path `main` checks before any work, as a file or as a folder."""
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=help)
    parser.set_defaults(door=output_folder if metavar == "FOLDER" else output_file)


def _pack_file(path: str) -> Path:
    """Check the path of a pack, whose journal has a longer name, for `door`."""
    from ipmerge_core.analysis.partial import SUFFIX  # takes pydantic

    return output_file(path, suffix=SUFFIX)


def _analyse(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    _add_output(parser, "PACK", "output file, such as pack.json.gz")
    parser.set_defaults(door=_pack_file)
    _add_device(parser)
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
    _add_updates(parser, "keep the updates of IP-Merging there for later merges and chats")
    _add_force(parser)


def _calibrate(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    _add_calibration(parser)
    _add_device(parser, fp64=False)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", nargs="?", help="pack of an analysis; otherwise specify models")
    _add_models(parser, "; with PACK, where it is now")
    _add_method(parser)
    parser.add_argument(
        "--recipe", metavar="YAML", help="read models and method from a mergekit recipe"
    )
    _add_output(parser, "PLAN", "output file, such as plan.json")
    _add_device(parser)


def _recipe(parser: argparse.ArgumentParser) -> None:
    _add_plan(parser, own_base=False)  # which a recipe cannot express
    _add_output(parser, "YAML", "output file, such as recipe.yaml")


def _merge(parser: argparse.ArgumentParser) -> None:
    _add_plan(parser)
    _add_output(parser, "FOLDER", "output folder of the model")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="resume an unfinished run of the same plan (default)",
    )
    _add_flag(parser, "--dry-run", "print an estimate and exit")
    _add_updates(parser, _KEPT)
    _add_force(parser)
    _add_device(parser)


def _adapter(parser: argparse.ArgumentParser) -> None:
    _add_plan(parser)
    _add_output(parser, "FOLDER", "output folder of the adapter")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="maximum relative residual")
    parser.add_argument("--max-rank", type=int, default=64, help="maximum rank per matrix")
    _add_updates(parser, _KEPT)
    _add_force(parser)
    _add_device(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder")
    parser.add_argument("--compare", metavar="MODEL", help="folder of a second model")
    parser.add_argument("--image", help="image file")
    parser.add_argument("--prompt", required=True, help="the question")
    _add_lengths(parser)
    _add_precision(parser)
    _add_device(parser, fp64=False)


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum answer length")
    parser.add_argument(
        "--max-thinking-tokens", type=int, default=1024, help="limit of a model that thinks first"
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the model in memory; auto: the most exact that fits",
    )


def _record(parser: argparse.ArgumentParser) -> None:
    _add_plan(parser)
    parser.add_argument(
        "--prompts", required=True, metavar="JSONL", help="questions, images and reference answers"
    )
    _add_output(parser, "FILE", "output file, such as NAME.records.json next to NAME.pack.json.gz")
    _add_lengths(parser)
    _add_precision(parser)
    _add_updates(parser, _KEPT)
    _add_device(parser)


def _search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", help="pack of an analysis")
    _add_models(parser, ", if it has moved since the analysis")
    add_search(parser)
    _add_method(parser, measure=False)
    _add_tasks(parser)
    _add_force(parser)
    _add_output(parser, "FOLDER", "folder of the study, which is continued if it exists")
    _add_device(parser, fp64=False)


def _replay(parser: argparse.ArgumentParser) -> None:
    add_replay(parser)
    _add_output(parser, "FOLDER", "output folder of the report")


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", help="pack of an analysis")
    _add_models(parser, ", if it has moved since the analysis")
    for number in ("", "2"):
        words = "second parameter" if number else "parameter"
        parser.add_argument(
            f"--parameter{number}",
            metavar="NAME",
            help=f"{words} to vary: similarity_threshold, lambda, or one of the method",
        )
        parser.add_argument(f"--values{number}", metavar="A,B,C", help=f"values of the {words}")
    _add_flag(parser, "--ablation", "leave out parts of the method's formula and of its layers")
    parser.add_argument(
        "--controls", type=int, metavar="N", help="controls with permuted weights (3 by default)"
    )
    _add_method(parser, measure=False)
    _add_tasks(parser)
    _add_force(parser)
    _add_output(parser, "FILE", "output file, such as sweep.json")
    _add_device(parser, fp64=False)


def _knockout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="model folder, or plan.json for the unmerged and the merged model"
    )
    parser.add_argument(
        "--pack", metavar="FILE", help="pack of an app's plan, if it is not one of the app's"
    )
    _add_models(parser, ", if it has moved since the plan was made")
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
    _add_tasks(parser)
    _add_force(parser)
    _add_output(parser, "FILE", "output file, such as knockout.json")
    _add_device(parser, fp64=False)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="model or adapter folder; the first is compared"
    )
    parser.add_argument("--base", metavar="MODEL", help="base of adapters; default: as they name")
    _add_tasks(parser)
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
    _add_device(parser, fp64=False)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the tasks of an evaluation, which items are used, and where replies are stored."""
    parser.add_argument(
        "--tasks",
        metavar="TASK",
        action="append",
        required=True,
        help="tasks, comma-separated: demo, demo:math, mathvista, mathverse, mmmu, jsonl:FILE, ...",
    )
    parser.add_argument("--limit", type=int, help="items per task (demo: per skill)")
    parser.add_argument("--seed", type=int, help="selects the items (0 by default)")
    parser.add_argument("--max-new-tokens", type=int, help="token limit; default: the task's")
    parser.add_argument("--batch-size", type=int, help="prompts per batch (64 by default)")
    parser.add_argument(
        "--store", metavar="FOLDER", help="folder of stored replies; default: in the home folder"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="use stored replies of the same model content (default)",
    )
    _add_flag(parser, "--no-guard", "leave out the perception guard of math tasks")


def _drift(parser: argparse.ArgumentParser) -> None:
    add_drift_options(parser)
    _add_output(parser, "FOLDER", "output folder of the model")
    _add_device(parser, fp64=False)


def _app(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to")
    parser.add_argument("--port", type=int, help="port; by default the first free one from 7860")
    _add_precision(parser)
    parser.add_argument(
        "--device",
        default="auto",
        help="device of its runs: auto (default), cpu, cuda, cuda:1, xpu",
    )


def _add_plan(parser: argparse.ArgumentParser, *, own_base: bool = True) -> None:
    """Add the plan, and where its models are now if they have moved since it was made."""
    parser.add_argument("plan", help="plan.json, or the file of the app's Plan as JSON")
    parser.add_argument(
        "--pack", metavar="FILE", help="pack of an app's plan, if it is not one of the app's"
    )
    _add_models(parser, ", if it has moved since the plan was made", own_base=own_base)


def _add_models(parser: argparse.ArgumentParser, moved: str = "", *, own_base: bool = True) -> None:
    roles = (
        ("--mllm", "folder or hub id of the multimodal model, or of a LoRA adapter of one"),
        ("--math", "expert model or LoRA adapter; can be repeated"),
        ("--base", "text model that all were fine-tuned from; default: the one an adapter names"),
        ("--base-mllm", "base of the MLLM, if it differs"),
    )
    for name, words in roles if own_base else roles[:-1]:
        several: dict[str, Any] = {"action": "append", "default": []} if name == "--math" else {}
        parser.add_argument(name, metavar="MODEL", help=words + moved, **several)


def _add_flag(parser: argparse.ArgumentParser, name: str, words: str) -> None:
    """Add a switch that is None if it is not given."""
    parser.add_argument(name, action="store_true", default=None, help=words)


def _add_updates(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument("--updates", metavar="FOLDER", help=words)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="continue even if the sibling check fails"
    )


def _add_device(parser: argparse.ArgumentParser, *, fp64: bool = True) -> None:
    """Add --device, which `main` resolves; `fp64` sets whether 64-bit floats are required."""
    parser.add_argument(
        "--device",
        help="auto (default: fastest available), cpu, cuda, cuda:1, xpu, mps",
    )
    parser.set_defaults(fp64=fp64)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", choices=("gram", "fisher"), required=True, help="statistic to measure"
    )
    for role, tasks in (("mllm", "all"), ("math", "math")):
        source = f"a jsonl file, datasets:NAME, demo ({tasks} tasks), demo:perception or demo:math"
        parser.add_argument(f"--{role}-samples", default="demo", help=source)
    parser.add_argument("--limit", type=int, default=500, help="maximum number of samples of each")
    parser.add_argument(
        "--estimator",
        choices=("sampled", "empirical"),
        help="answers for the Fisher information: sampled from the model (default), or given",
    )
    parser.add_argument(
        "--wide",
        choices=("full", "diagonal"),
        help="Gram matrices of down projections: full (default), or their diagonal",
    )
    parser.add_argument(
        "--image-tokens",
        action=argparse.BooleanOptionalAction,
        help="include image positions in Gram matrices (default)",
    )
    _add_output(parser, "FOLDER", "output folder")
    _add_flag(parser, "--dry-run", "print an estimate and exit")


_FORMS: dict[str, dict[str, Any]] = {  # how argparse reads each kind of a plan's options
    "pattern": {"metavar": "REGEX"},
    "factors": {"metavar": "FACTOR", "type": float, "nargs": "+"},
    "choice": {},
}


def _add_method(parser: argparse.ArgumentParser, *, measure: bool = True) -> None:
    parser.add_argument("--method", help=f"name of the merge method ({METHOD} by default)")
    parser.add_argument(
        "--similarity-threshold",
        type=float,
        metavar="S_ALPHA",
        help="merge matrices with at least this similarity (0.4 by default)",
    )
    parser.add_argument("--similarity", help=f"{' | '.join(SIMILARITIES)} (the first by default)")
    parser.add_argument(
        "--lambda", dest="lambda_", type=float, help="scale of the update (1 by default)"
    )
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="parameter of the method"
    )
    parser.add_argument(
        "--calibration", metavar="FOLDER", help="output of calibrate, for methods that need data"
    )
    if measure:
        _add_flag(
            parser,
            "--measure",
            "run the method's first pass over the weights now and store its result in the plan",
        )
    for option in OPTIONS.values():
        _add_option(parser, option)


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """Add one of a plan's options; rules by matrix as one flag for each value of a rule."""
    if option.kind == "rules":
        for rule in ("merge", "keep"):
            parser.add_argument(
                f"--force-{rule}",
                metavar="MATRIX",
                action="append",
                default=[],
                help=f"{rule} it at any similarity",
            )
        return
    more: dict[str, Any] = {"choices": tuple(option.choices)} if option.choices else {}
    parser.add_argument(
        f"--{option.name.replace('_', '-')}",
        help=option.help,
        **more,
        **_FORMS[option.kind],
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
    (drift, "fine-tune the MLLM with a reasoning prior in its gradient (DRIFT)", _drift),
    (commands.app, "start the web app", _app),
)
