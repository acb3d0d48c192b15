"""Convert command-line options to models, methods and values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ipmerge_core.cli.combinations import METHOD, MODELS, flag_of, is_given
from ipmerge_core.errors import PlanError
from ipmerge_core.planning.options import PlanOptions, read_value
from ipmerge_core.runtime.paths import input_file

if TYPE_CHECKING:
    from ipmerge_core.analysis.records import Analysis
    from ipmerge_core.evaluation.evaluate import EvaluationSettings
    from ipmerge_core.evaluation.replies import ReplyStore
    from ipmerge_core.models.pairing import ModelPair
    from ipmerge_core.planning.plan import MergePlan
    from ipmerge_core.tasks.items import Task

_Made = TypeVar("_Made", "MergePlan", "Analysis")


def open_models(options: argparse.Namespace) -> ModelPair:
    """Open the models given by the options."""
    from ipmerge_core.models.pairing import open_pair

    if not (options.mllm and options.math):
        raise PlanError("Specify the models: --mllm A --math B --base Z (--math can be repeated).")
    return open_pair(options.mllm, options.math, options.base, base_mllm=options.base_mllm)


def read_plan(options: argparse.Namespace) -> MergePlan:
    """Read the plan of a command, from `ipmerge plan` or the app, with its models where they are.

    Raises: IPMergeError for an invalid file, or models with other weights.
    """
    from ipmerge_core.planning.choice_file import plan_of_choice, read_choice
    from ipmerge_core.planning.plan import MergePlan

    path = input_file(options.plan, "plan")
    choice = read_choice(path)
    if choice is not None:
        return _relocated(plan_of_choice(choice, _pack_of(choice, options)), options)
    if options.pack:
        raise PlanError("--pack has no effect with a plan that has its own records. Omit it.")
    return _relocated(MergePlan.load(path), options)


def read_pack(options: argparse.Namespace) -> Analysis:
    """Read the pack of a command, with its models where they are. Raises: as `read_plan`."""
    from ipmerge_core.analysis.records import Analysis

    return _relocated(Analysis.load(input_file(options.pack, "pack")), options)


def _pack_of(choice: Mapping[str, Any], options: argparse.Namespace) -> Path:
    """Return the pack of an app's plan: the given one, or the app's with the id of the pair."""
    from ipmerge_core.planning.choice_file import pair_of

    pair = pair_of(choice)
    if options.pack:
        return input_file(options.pack, "pack")
    from ipmerge_core.ui.pairs import find_pack

    try:
        return find_pack(pair["id"]).path
    except PlanError as error:
        raise PlanError(
            f"The pack of the pair '{str(pair.get('name'))[:80]}' is not on this machine. Specify "
            f"it with --pack."
        ) from error


def _relocated(made: _Made, options: argparse.Namespace) -> _Made:
    """Return a plan or an analysis with the places of models that the options give."""
    places = {name: vars(options)[name] for name in MODELS if is_given(options, name)}
    if not places:
        return made
    from ipmerge_core.planning.relocation import relocate

    return replace(made, sources=relocate(made.sources, **places))


def read_method_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the method and its values, as make_plan takes them; only those that were given."""
    from ipmerge_core.methods import find_method

    method = find_method(options.method or METHOD)
    kinds = {parameter.name: parameter.kind for parameter in method.parameters}
    names = ("similarity_threshold", "lambda_", "similarity", "calibration")
    chosen = {name: vars(options)[name] for name in names if is_given(options, name)}
    chosen["method"] = method.name
    for assignment in options.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise PlanError(f"--set {assignment}: expected NAME=VALUE, such as math_weight=0.5.")
        chosen[name] = read_value(text, kinds.get(name, "float"))
    return chosen


def read_recipe(options: argparse.Namespace) -> tuple[ModelPair, dict[str, Any]]:
    """Return the models and the arguments of make_plan from a mergekit recipe.

    What a merge does in another way than mergekit is printed to stderr.
    """
    from ipmerge_core.models.pairing import open_pair
    from ipmerge_core.planning.mergekit_import import RECIPE, import_recipe

    recipe = import_recipe(RECIPE.read(input_file(options.recipe, "recipe")))
    for name, found in (("base", recipe.base), ("layer_gains", "layer_gains" in recipe.arguments)):
        if found and is_given(options, name):
            raise PlanError(f"{flag_of(name)} has no effect: the recipe specifies it. Omit it.")
    for note in recipe.notes:
        print(f"ipmerge: {note}", file=sys.stderr)
    base = recipe.base or options.base
    if not base:
        raise PlanError("The recipe has no base model. Specify it with --base Z.")
    return open_pair(recipe.mllm, recipe.math, base), recipe.arguments


def read_plan_options(options: argparse.Namespace) -> PlanOptions:
    """Return the options of a plan other than its method. Raises: PlanError."""
    rules = {name: rule for rule in ("merge", "keep") for name in vars(options)[f"force_{rule}"]}
    given = {name: vars(options)[name] for name in vars(options) if is_given(options, name)}
    return PlanOptions.read({**given, "overrides": rules})


def read_tasks(options: argparse.Namespace) -> list[Task]:
    """Return the tasks of an evaluation, with the perception guards of math tasks.

    Raises: PlanError if --no-guard has no effect.
    """
    from ipmerge_core.tasks.registry import find_tasks, missing_guards

    tasks = find_tasks(options.tasks, guards=not options.no_guard)
    if options.no_guard and not missing_guards(tasks):
        raise PlanError("--no-guard has no effect: these tasks lack no perception guard. Omit it.")
    return tasks


def read_evaluation_settings(options: argparse.Namespace) -> EvaluationSettings:
    """Return which items are answered, and how."""
    from ipmerge_core.evaluation.evaluate import BATCH_SIZE, EvaluationSettings

    return EvaluationSettings(
        limit=options.limit,
        seed=options.seed or 0,
        max_new_tokens=options.max_new_tokens,
        batch_size=BATCH_SIZE if options.batch_size is None else options.batch_size,
        device=options.device,
        resume=getattr(options, "resume", None) is not False,
    )


def read_store(options: argparse.Namespace) -> ReplyStore:
    """Return the store of replies."""
    from ipmerge_core.evaluation.replies import ReplyStore

    return ReplyStore(options.store)
