"""The commands and their options."""

from __future__ import annotations

import argparse
from typing import Any

from ipmerge_core.analysis.records import TEMPERATURE
from ipmerge_core.cli import commands
from ipmerge_core.planning.options import OPTIONS
from ipmerge_core.version import __version__


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; the chosen command's function is in the namespace as `run`."""
    parser = argparse.ArgumentParser(
        prog="ipmerge", description="Compare and merge the weights of sibling models."
    )
    parser.add_argument("--version", action="version", version=f"ipmerge {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, words, add_options in COMMANDS:
        command = subparsers.add_parser(run.__name__, help=words, description=words)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--quiet", action="store_true", help="no progress on stderr")
        add_options(command)
    return parser


def _check(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    parser.add_argument("--strict", action="store_true", help="exit with 1 on warnings")


def _analyse(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    parser.add_argument("-o", "--output", required=True, metavar="PACK", help="pack.json.gz")
    _add_device(parser)
    parser.add_argument("--rank", type=int, help="keep only the leading singular triplets")
    parser.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="of the direction weights"
    )
    parser.add_argument(
        "--directions",
        choices=("existing", "all"),
        default="existing",
        help="leave out directions that rounding may have made, or take all (the literal reading)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="approximate, from the leading directions only"
    )
    parser.add_argument("--force", action="store_true", help="go on although the check refuses")


def _calibrate(parser: argparse.ArgumentParser) -> None:
    _add_models(parser)
    _add_calibration(parser)
    _add_device(parser, fp64=False)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pack", nargs="?", help="the pack, or name the models instead")
    _add_models(parser)
    _add_method(parser)
    parser.add_argument(
        "--recipe", metavar="YAML", help="take models and method from a recipe of mergekit"
    )
    parser.add_argument("-o", "--output", required=True, metavar="PLAN", help="plan.json")
    _add_device(parser)


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="plan.json")
    parser.add_argument("-o", "--output", required=True, metavar="YAML", help="recipe.yaml")


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="plan.json")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the new model")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with an unfinished run of the same plan (default)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what it would take")
    _add_device(parser)


def _adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="plan.json")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the new adapter")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative residual allowed")
    parser.add_argument("--max-rank", type=int, default=64, help="directions per matrix, at most")
    _add_device(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--compare", metavar="MODEL", help="another model folder")
    parser.add_argument("--image", help="an image file")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    _add_device(parser, fp64=False)


def _app(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on, if not given")
    parser.add_argument(
        "--device", default="auto", help="for its runs: auto (the default), cpu, cuda, cuda:1, xpu"
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mllm", metavar="MODEL", help="folder or hub id of the multimodal model")
    parser.add_argument(
        "--math", metavar="MODEL", action="append", default=[], help="an expert; may be repeated"
    )
    parser.add_argument("--base", metavar="MODEL", help="the text model they descend from")
    parser.add_argument("--base-mllm", metavar="MODEL", help="the MLLM's own base, if another")


def _add_device(parser: argparse.ArgumentParser, *, fp64: bool = True) -> None:
    """Let `main` choose the device before any work; `fp64` says what it must be able to do."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto (the default: the best one here), cpu, cuda, cuda:1, xpu, mps",
    )
    parser.set_defaults(fp64=fp64)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=("gram", "fisher"), required=True)
    for role, tasks in (("mllm", "all"), ("math", "math")):
        words = f"a jsonl file, datasets:NAME, demo ({tasks} tasks), demo:perception or demo:math"
        parser.add_argument(f"--{role}-samples", default="demo", help=words)
    parser.add_argument("--limit", type=int, default=500, help="samples of each, at most")
    parser.add_argument("--estimator", choices=("sampled", "empirical"), default="sampled")
    parser.add_argument("--wide", choices=("full", "diagonal"), default="full")
    parser.add_argument(
        "--image-tokens", action=argparse.BooleanOptionalAction, default=True, help="count them"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="only say what it would take")


_FORMS: dict[str, dict[str, Any]] = {
    "include": {"metavar": "REGEX"},
    "exclude": {"metavar": "REGEX"},
    "layer_gains": {"metavar": "FACTOR", "type": float, "nargs": "+", "default": ()},
    "norms": {"default": "keep"},
    "embeddings": {"default": "keep"},
    "anchor": {},
}


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", default="ip_merging")
    parser.add_argument("--similarity-threshold", type=float, default=0.4, metavar="S_ALPHA")
    parser.add_argument("--similarity", default="first", help="first, max or weighted")
    parser.add_argument("--lambda", dest="lambda_", type=float, default=1.0)
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="a method's parameter"
    )
    parser.add_argument("--calibration", metavar="FOLDER", help="for the methods that need data")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="make a method's first pass over the weights now; the plan holds what it finds",
    )
    for known in OPTIONS:
        more: dict[str, Any] = {"choices": tuple(known.choices)} if known.choices else {}
        parser.add_argument(
            f"--{known.name.replace('_', '-')}", help=known.help, **more, **_FORMS[known.name]
        )
    for option, words in (("--force-merge", "merge"), ("--force-keep", "keep")):
        parser.add_argument(
            option,
            metavar="MATRIX",
            action="append",
            default=[],
            help=f"{words} it at any similarity",
        )


COMMANDS = (
    (commands.check, "are these models siblings? reads headers and a few small matrices", _check),
    (commands.analyse, "decompose the task vectors into a small pack", _analyse),
    (commands.calibrate, "measure the models on samples, for a method that needs data", _calibrate),
    (commands.plan, "decide what merges; shows what changes", _plan),
    (commands.recipe, "write a plan as a recipe for mergekit", _recipe),
    (commands.merge, "carry out a plan", _merge),
    (commands.adapter, "write an IP-Merging plan's change as a LoRA adapter", _adapter),
    (commands.chat, "ask one model, or two side by side", _chat),
    (commands.app, "serve the app", _app),
)
