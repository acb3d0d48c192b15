"""The command `ipmerge drift`: its options, and how its progress and result are printed."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from ipmerge_core.cli.printing import Progress, print_result
from ipmerge_core.errors import PlanError
from ipmerge_core.finetuning.settings import (
    PLACEMENT_NAMES,
    PRECISIONS,
    RULE_NAMES,
    TRAINED,
    DriftSettings,
    PriorSettings,
    TrainingSettings,
)

if TYPE_CHECKING:
    from ipmerge_core.finetuning.train import DriftRequest, DriftStep

_VERBS = {"prior": "prior", "encoded": "encoding", "written": "writing"}
_TRAINING = TrainingSettings()  # its values are the defaults of the options
_EXAMPLES = 2


def drift(options: argparse.Namespace) -> int:
    """Fine-tune the MLLM with a reasoning prior in its gradient, or check a run with --dry-run."""
    from ipmerge_core.finetuning import baselines, train

    settings = read_settings(options)
    for warning in settings.prior.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    request = train.DriftRequest(
        options.mllm, options.math, options.data, options.output, settings,
        options.math_base, options.limit,
    )  # fmt: skip
    names = baselines.find_baselines(options.baseline)
    if options.dry_run:
        shown = _EXAMPLES if options.show_examples is None else options.show_examples
        return _print_check(options, request, shown)
    how: dict[str, Any] = {
        "device": options.device,
        "resume": options.resume is not False,
        "force": bool(options.force),
        "keep_checkpoints": bool(options.keep_checkpoints),
    }
    pair = _pair_of(options) if names else None
    if pair is not None:
        baselines.check_baselines(pair, options.target, names)
    with Progress(options) as progress:
        last = _train(progress, request, how)
        written = {}
        if pair is not None:
            for step in baselines.iter_baselines(pair, options.target, names, options.device):
                written[step.baseline] = step.out
                progress.show("merging", step.done, step.total, step.baseline)
    if int(os.environ.get("RANK", "0")):
        return 0  # the first process prints the result
    result = {"model": options.output, "steps": last.done, "baselines": written}
    result |= {name: value for name, value in last.figures().items() if name in _SHOWN}
    text = f"Wrote {options.output} after {last.done} steps: {_figures(last)}."
    text += "".join(f"\nWrote {folder}: {name}." for name, folder in written.items())
    return print_result(options, result, text)


_SHOWN = ("loss", "cosine", "to_start", "to_expert", "moved_cosine")


def _train(progress: Progress, request: DriftRequest, how: dict[str, Any]) -> DriftStep:
    """Run the training with a progress bar; return the last point of its curves."""
    from ipmerge_core.finetuning.train import DriftStep, iter_drift

    last = DriftStep("trained", 0, 0)
    for step in iter_drift(request, **how):
        if step.action == "trained":
            last = step
        progress.show(_VERBS.get(step.action, "training"), step.done, step.total, _what(step))
    return last


def _what(step: DriftStep) -> str:
    if step.eval_loss is not None:
        return f"held-out loss {step.eval_loss:.4f}"
    return step.what if step.loss is None else _figures(step)


def _figures(step: DriftStep) -> str:
    """Describe a point of the curves in a few numbers."""
    named = (
        ("loss", step.loss, ".4f"),
        ("cos(g, D)", step.cosine, ".3f"),
        ("moved", step.to_start, ".2%"),
        ("to the expert", step.to_expert, ".2%"),
    )
    return ", ".join(f"{name} {value:{form}}" for name, value, form in named if value is not None)


def _print_check(options: argparse.Namespace, request: DriftRequest, shown: int) -> int:
    from ipmerge_core.finetuning.train import check_drift

    found = check_drift(request, device=options.device, shown=shown)
    lines = [
        f"The prior acts on {found.parameters} parameters: {found.description}.",
        f"The expert differs from the MLLM by {found.relative_norm:.2%} of the weights (sampled).",
        found.memory.describe(),
        f"Data: {found.data}. The loss is on the text in \N{LEFT WHITE SQUARE BRACKET}"
        f"\N{RIGHT WHITE SQUARE BRACKET}:",
        *found.examples,
        "Dry run: nothing was trained or written.",
    ]
    content = {**found._asdict(), "memory": found.memory._asdict()}
    return print_result(options, content, "\n".join(lines))


def _pair_of(options: argparse.Namespace) -> Any:  # noqa: ANN401
    from ipmerge_core.models.pairing import open_pair

    if not options.base:
        raise PlanError("--baseline needs --base, the text model that both were fine-tuned from.")
    return open_pair(options.mllm, options.math, options.base)


# --- options ---------------------------------------------------------------------------------


def read_settings(options: argparse.Namespace) -> DriftSettings:
    """Return the settings of the options. Raises: PlanError."""
    from ipmerge_core.finetuning.scope import Scope

    scope = Scope(
        tuple(options.modules or Scope().modules),
        options.skip_first_layers,
        options.last_layer,
        options.biases,
        tuple(map(_strength, options.module_strength)),
    )
    prior = PriorSettings(
        rule=options.rule,
        strength=1.0 if options.strength is None else options.strength,
        scope=scope,
        per_micro_batch=bool(options.per_micro_batch),
        normalize=bool(options.normalize_prior),
        placement=options.prior_on,
    )
    named = {name: getattr(options, name) for name in _NUMBERS | _CHOICES.keys()}
    training = TrainingSettings(
        **named,
        gradient_checkpointing=options.gradient_checkpointing,
        tokens=tuple(options.add_token),
        report_to=tuple(options.report_to),
    )
    return DriftSettings(prior, training)


def _strength(text: str) -> tuple[str, float]:
    pattern, separator, value = text.rpartition("=")
    try:
        strength = float(value)
    except ValueError:
        separator = ""
    if not separator or not pattern:
        raise PlanError(
            f"--module-strength is '{text[:80]}'; expected PATTERN=STRENGTH, such as mlp=0.5."
        )
    return pattern, strength


_NUMBERS = {
    "learning_rate": (float, "peak learning rate"),
    "epochs": (float, "passes over the data"),
    "max_steps": (int, "optimizer steps, instead of --epochs"),
    "batch_size": (int, "conversations of a micro-batch"),
    "accumulation": (int, "micro-batches of an optimizer step"),
    "warmup": (float, "share of the steps in which the learning rate rises"),
    "weight_decay": (float, "of AdamW"),
    "max_grad_norm": (float, "clip the gradient to this norm after the rule; 0: never"),
    "seed": (int, "of the order of the data"),
    "longest": (int, "skip conversations of more tokens"),
    "most_pixels": (int, "scale larger images down"),
    "held_out": (float, "share of the conversations to evaluate the loss on"),
    "patience": (int, "stop after so many evaluations without a lower held-out loss"),
    "save_every": (int, "steps between checkpoints and evaluations; by default an epoch"),
    "log_every": (int, "steps between points of the curves"),
}
_CHOICES = {
    "precision": (PRECISIONS, "auto: fp32 on a CPU, bf16-mixed elsewhere"),
    "trained": (TRAINED, "part that is trained"),
    "schedule": (("cosine", "linear", "constant_with_warmup"), "of the learning rate"),
}


def add_drift_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command, apart from --output and --device."""
    parser.add_argument("--mllm", metavar="FOLDER", required=True, help="the model to fine-tune")
    parser.add_argument("--math", metavar="MODEL", required=True, help="expert of the prior")
    parser.add_argument("--math-base", metavar="MODEL", help="its base: D = expert - base instead")
    parser.add_argument(
        "--data",
        required=True,
        help="jsonl file of images and conversations, datasets:NAME:SPLIT, or demo",
    )
    parser.add_argument("--limit", type=int, help="use only the first rows")
    _add_prior_options(parser)
    for name, (kind, words) in _NUMBERS.items():
        default = getattr(_TRAINING, name)
        shown = words if default is None else f"{words} ({default:g} by default)"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default, help=shown)
    for name, (choices, words) in _CHOICES.items():
        flag = f"--{name}"
        parser.add_argument(flag, choices=choices, default=getattr(_TRAINING, name), help=words)
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for more computing"
    )
    parser.add_argument(
        "--add-token", metavar="TOKEN", action="append", default=[],
        help="token of the answers, such as <think>, that is added if it is new; can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--report-to", metavar="NAME", action="append", default=[],
        help="integration of the Trainer, such as trackio or tensorboard; can be repeated",
    )  # fmt: skip
    _add_run_options(parser)


def _add_prior_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rule",
        choices=RULE_NAMES,
        default="adaptive",
        help="how the gradient is tilted (adaptive by default); none: plain fine-tuning",
    )
    parser.add_argument("--strength", type=float, help="1 (default) is the paper's alpha = -1")
    parser.add_argument(
        "--modules",
        nargs="+",
        metavar="SET",
        help="attn mlp (default), norm, embed, head, full, or re:PATTERN",
    )
    parser.add_argument(
        "--skip-first-layers", type=int, default=0, metavar="N", help="leave out N layers"
    )
    parser.add_argument("--last-layer", type=int, metavar="N", help="leave out layers after it")
    parser.add_argument(
        "--biases",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="include biases of the modules (default)",
    )
    parser.add_argument(
        "--module-strength", metavar="PATTERN=STRENGTH", action="append", default=[],
        help="another strength for parameters whose name the pattern is found in; can be repeated",
    )  # fmt: skip
    for name, words in (
        ("--per-micro-batch", "act on every backward pass, as the authors' code does"),
        ("--normalize-prior", "scale the prior to the norm of each weight (absolute rule)"),
    ):
        parser.add_argument(name, action="store_true", default=None, help=words)
    parser.add_argument(
        "--prior-on",
        choices=PLACEMENT_NAMES,
        default="cpu",
        help="keep the prior in CPU memory (default), on the device, or read it from the files",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baseline", metavar="NAME", action="append", default=[],
        help="also write this merge of the paper's comparison, or all, to OUT-NAME; needs --base",
    )  # fmt: skip
    parser.add_argument("--base", metavar="MODEL", help="common base of both, for --baseline")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="continue an unfinished run of the same work (default)",
    )
    for name, words in (
        ("--keep-checkpoints", "keep the folder OUT.training"),
        ("--dry-run", "check everything that needs no step, show the first examples, and exit"),
        ("--force", "start although memory does not suffice or the models seem unrelated"),
    ):
        parser.add_argument(name, action="store_true", default=None, help=words)
    parser.add_argument(
        "--show-examples", type=int, metavar="N", help=f"with --dry-run ({_EXAMPLES} by default)"
    )
