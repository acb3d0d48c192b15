"""Define the options that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from ipmerge_core.cli.combinations import METHOD
from ipmerge_core.inference.precisions import PRECISIONS
from ipmerge_core.planning.options import OPTIONS, Option
from ipmerge_core.runtime.paths import output_file, output_folder
from ipmerge_core.spectral.kinds import SIMILARITIES


def add_output(parser: argparse.ArgumentParser, metavar: str, help: str) -> None:  # noqa: A002
    """Add --output, whose path `main` checks before any work, as a file or as a folder."""
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=help)
    parser.set_defaults(door=output_folder if metavar == "FOLDER" else output_file)


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """Add the limits of an answer and of the thinking before it."""
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum answer length")
    parser.add_argument(
        "--max-thinking-tokens", type=int, default=1024, help="limit of a model that thinks first"
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add the precision of a model in memory."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the model in memory; auto: the most exact that fits",
    )


def add_tasks(
    parser: argparse.ArgumentParser, *, required: bool = True, stored: bool = True
) -> None:
    """Add the tasks of an evaluation, which items are used, and where replies are stored."""
    parser.add_argument(
        "--tasks",
        metavar="TASK",
        action="append",
        required=required,
        help="tasks, comma-separated: demo, demo:math, mathvista, mathverse, mmmu, jsonl:FILE, ...",
    )
    parser.add_argument("--limit", type=int, help="items per task (demo: per skill)")
    parser.add_argument("--seed", type=int, help="selects the items (0 by default)")
    parser.add_argument("--max-new-tokens", type=int, help="token limit; default: the task's")
    parser.add_argument("--batch-size", type=int, help="prompts per batch (64 by default)")
    if stored:
        add_store(parser)
    add_flag(parser, "--no-guard", "leave out the perception guard of math tasks")


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add where replies are stored, and whether they are used."""
    parser.add_argument(
        "--store", metavar="FOLDER", help="folder of stored replies; default: in the home folder"
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="use stored replies of the same model content (default)",
    )


def add_plan(parser: argparse.ArgumentParser, *, own_base: bool = True) -> None:
    """Add the plan, and where its models are now if they have moved since it was made."""
    parser.add_argument("plan", help="plan.json, or the file of the app's Plan as JSON")
    parser.add_argument(
        "--pack", metavar="FILE", help="pack of an app's plan, if it is not one of the app's"
    )
    add_models(parser, ", if it has moved since the plan was made", own_base=own_base)


def add_models(parser: argparse.ArgumentParser, moved: str = "", *, own_base: bool = True) -> None:
    """Add the models of a pair; `moved` continues the help where a file names them already."""
    roles = (
        ("--mllm", "folder or hub id of the multimodal model, or of a LoRA adapter of one"),
        ("--math", "expert model or LoRA adapter; can be repeated"),
        ("--base", "text model that all were fine-tuned from; default: the one an adapter names"),
        ("--base-mllm", "base of the MLLM, if it differs"),
    )
    for name, words in roles if own_base else roles[:-1]:
        several: dict[str, Any] = {"action": "append", "default": []} if name == "--math" else {}
        parser.add_argument(name, metavar="MODEL", help=words + moved, **several)


def add_flag(parser: argparse.ArgumentParser, name: str, words: str) -> None:
    """Add a switch that is None if it is not given."""
    parser.add_argument(name, action="store_true", default=None, help=words)


def add_updates(parser: argparse.ArgumentParser, words: str) -> None:
    """Add the folder of kept updates."""
    parser.add_argument("--updates", metavar="FOLDER", help=words)


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add the option to continue in spite of the sibling check."""
    parser.add_argument(
        "--force", action="store_true", help="continue even if the sibling check fails"
    )


def add_device(parser: argparse.ArgumentParser, *, fp64: bool = True) -> None:
    """Add --device, which `main` resolves; `fp64` sets whether 64-bit floats are required."""
    parser.add_argument(
        "--device",
        help="auto (default: fastest available), cpu, cuda, cuda:1, xpu, mps",
    )
    parser.set_defaults(fp64=fp64)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add what a calibration measures, and on which samples."""
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
    add_output(parser, "FOLDER", "output folder")
    add_flag(parser, "--dry-run", "print an estimate and exit")


_FORMS: dict[str, dict[str, Any]] = {  # how argparse reads each kind of a plan's options
    "pattern": {"metavar": "REGEX"},
    "factors": {"metavar": "FACTOR", "type": float, "nargs": "+"},
    "share": {"metavar": "SHARE", "type": float},
    "choice": {},
}


def add_method(parser: argparse.ArgumentParser, *, measure: bool = True) -> None:
    """Add the method of a plan, its parameters and options."""
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
        add_flag(
            parser,
            "--measure",
            "run the method's first pass over the weights now and store its result in the plan",
        )
    for option in OPTIONS.values():
        add_option(parser, option)


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
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
