"""Reject options that would have no effect in combination with others.

In: parsed options, in which an option that was not given is None or an empty list. Out: nothing, or
an error that names the option and what it does not go together with. Each command has its rules;
what depends on the content of a file is checked where that file is read.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ipmerge_core.errors import PlanError
from ipmerge_core.planning.options import OPTIONS

METHOD = "ip_merging"  # of a plan, by default
MODELS = ("mllm", "math", "base", "base_mllm")
_FLAGS = {"lambda_": "--lambda", "pack": "PACK"}


class Rule(NamedTuple):
    """Options without effect where `reason` returns a text; it continues "... has no effect"."""

    names: tuple[str, ...]
    reason: Callable[[argparse.Namespace], str]


def is_given(options: argparse.Namespace, name: str) -> bool:
    """Return whether an option was given on the command line."""
    return getattr(options, name, None) not in (None, [])


def flag_of(name: str) -> str:
    """Return how an option is written on the command line.

    >>> flag_of("base_mllm"), flag_of("lambda_")
    ('--base-mllm', '--lambda')
    """
    return _FLAGS.get(name) or f"--{name.replace('_', '-')}"


def check_combination(options: argparse.Namespace) -> None:
    """Check that every given option has an effect. Raises: PlanError for the first without."""
    for rule in RULES.get(options.run.__name__, ()):
        given = next((name for name in rule.names if is_given(options, name)), None)
        if given and (reason := rule.reason(options)):
            raise PlanError(f"{flag_of(given)} has no effect {reason}. Omit it.")
    if options.run.__name__ in ("plan", "sweep", "search", "experiment"):
        _check_rules(options)


def _when(name: str, words: str) -> Callable[[argparse.Namespace], str]:
    """Return a reason that applies if another option is given."""
    return lambda options: words if is_given(options, name) else ""


def _unless(name: str, words: str) -> Callable[[argparse.Namespace], str]:
    """Return a reason that applies if another option is missing."""
    return lambda options: "" if is_given(options, name) else words


def _unless_kind(kind: str) -> Callable[[argparse.Namespace], str]:
    """Return a reason that applies to calibrations of another kind."""
    return lambda options: "" if options.kind == kind else f"with --kind {options.kind}"


def _unless_selecting(options: argparse.Namespace) -> str:
    from ipmerge_core.methods import find_method

    method = find_method(options.method or METHOD)
    return "" if method.needs_analysis else f"with {method.label}, which does not select matrices"


def _unless_scaled(options: argparse.Namespace) -> str:
    from ipmerge_core.methods import find_method

    method = find_method(options.method or METHOD)
    names = [parameter.name for parameter in method.parameters]
    if "lambda_" in names:
        return ""
    return f"with {method.label}, whose parameters are {', '.join(names) or 'none'}"


def _when_folder(options: argparse.Namespace) -> str:
    folder = Path(options.model).expanduser().is_dir()
    return "with a model folder, which is evaluated as it is" if folder else ""


def _unless_lmms_eval(options: argparse.Namespace) -> str:
    return "" if options.harness == "lmms-eval" else "without --harness lmms-eval"


def _when_written(options: argparse.Namespace) -> str:
    written = options.harness == "vlmevalkit"
    return "with --harness vlmevalkit, which writes a configuration only" if written else ""


def _check_rules(options: argparse.Namespace) -> None:
    """Check that no value is given twice. Raises: PlanError."""
    forced = Counter(
        name for rule in ("merge", "keep") for name in set(vars(options)[f"force_{rule}"])
    )
    twice = [name for name, count in forced.items() if count > 1]
    if twice:
        raise PlanError(f"'{twice[0]}' is given with both --force-merge and --force-keep.")
    names = Counter(assignment.partition("=")[0] for assignment in options.set)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise PlanError(f"--set {repeated[0]} is given {names[repeated[0]]} times; expected once.")
    for name in names:
        if name in _OWN_OPTIONS:
            raise PlanError(f"'{name}' is not a parameter of a method. Use {_OWN_OPTIONS[name]}.")


_CHOICES = ("method", "similarity_threshold", "similarity", "lambda_", "set", "calibration")
_OWN_OPTIONS = {  # what --set must not set, and what sets it
    **{name: flag_of(name) for name in (*_CHOICES, *OPTIONS) if name != "set"},
    "overrides": "--force-merge and --force-keep",
    "options": "the options by their names",
    "source": "PACK or --mllm, --math and --base",
}
_WITH_RECIPE = _when("recipe", "with --recipe, which specifies the models and the method")
RULES: Mapping[str, tuple[Rule, ...]] = {
    "plan": (
        Rule(("pack", "mllm", "math", "base_mllm", *_CHOICES), _WITH_RECIPE),
        Rule(("similarity_threshold", "similarity"), _unless_selecting),
        Rule(("lambda_",), _unless_scaled),
        Rule(("device",), _unless("measure", "without --measure: a plan is made from records")),
    ),
    "calibrate": (
        Rule(("estimator",), _unless_kind("fisher")),
        Rule(("wide", "image_tokens"), _unless_kind("gram")),
        Rule(("device",), _when("dry_run", "with --dry-run: the estimate does not depend on it")),
    ),
    "sweep": (
        Rule(
            ("parameter", "values", "parameter2", "values2"),
            _when("ablation", "with --ablation, which has points of its own"),
        ),
        Rule(("controls",), _unless("ablation", "without --ablation")),
        Rule(("parameter2", "values2"), _unless("parameter", "without --parameter and --values")),
        Rule(("similarity_threshold", "similarity"), _unless_selecting),
        Rule(("lambda_",), _unless_scaled),
    ),
    "search": (
        Rule(("similarity_threshold", "similarity"), _unless_selecting),
        Rule(("lambda_",), _unless_scaled),
    ),
    "experiment": (
        Rule(("similarity_threshold", "similarity"), _unless_selecting),
        Rule(("lambda_",), _unless_scaled),
    ),
    "knockout": (
        Rule(("pack", *MODELS), _when_folder),
    ),
    "evaluate": (
        Rule(("harness_model",), _unless("harness", "without --harness")),
        Rule(("harness_python", "harness_include"), _unless_lmms_eval),
        Rule(
            ("seed", "max_new_tokens", "resume", "no_guard"),
            _when("harness", "with --harness, which has its own settings"),
        ),
        Rule(("limit", "batch_size", "store", "device"), _when_written),
    ),
    "drift": (
        Rule(("resume", "keep_checkpoints"), _when("dry_run", "with --dry-run")),
        Rule(("show_examples",), _unless("dry_run", "without --dry-run")),
        Rule(
            ("strength", "module_strength", "per_micro_batch"),
            lambda options: "with --rule none" if options.rule == "none" else "",
        ),
        Rule(
            ("normalize_prior",),
            lambda options: "" if options.rule == "absolute" else f"with --rule {options.rule}",
        ),
        Rule(("base",), _unless("baseline", "without --baseline")),
        Rule(("baseline",), _when("dry_run", "with --dry-run")),
    ),
    "merge": (
        Rule(("resume", "updates"), _when("dry_run", "with --dry-run, which merges nothing")),
    ),
}  # fmt: skip
