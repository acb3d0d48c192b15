"""Convert command-line options to models, methods and values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import PlanError
from ipmerge_core.planning.options import PlanOptions

if TYPE_CHECKING:
    from ipmerge_core.models.pairing import ModelPair


def open_models(options: argparse.Namespace) -> ModelPair:
    """Open the models given by the options."""
    from ipmerge_core.models.pairing import open_pair

    if not (options.mllm and options.math and options.base):
        raise PlanError("Specify the models: --mllm A --math B --base Z (--math can be repeated).")
    return open_pair(options.mllm, options.math, options.base, base_mllm=options.base_mllm)


def check_target(path: str) -> None:
    """Check that the folder of an output file exists. Raises: PlanError."""
    folder = Path(path).expanduser().absolute().parent
    if not folder.is_dir():
        raise PlanError(f"Cannot write '{path}': the folder '{folder}' does not exist.")


def read_method_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the method and its values, as make_plan takes them."""
    from ipmerge_core.methods import find_method

    kinds = {parameter.name: parameter.kind for parameter in find_method(options.method).parameters}
    chosen: dict[str, Any] = {
        "method": options.method,
        "similarity_threshold": options.similarity_threshold,
        "lambda_": options.lambda_,
        "similarity": options.similarity,
    }
    chosen["calibration"] = options.calibration
    for assignment in options.set:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise PlanError(f"--set {assignment}: expected NAME=VALUE, such as math_weight=0.5.")
        chosen[name] = _parse_value(text, kinds.get(name, "float"))
    return chosen


def _parse_value(text: str, kind: str) -> float | int | bool | str | None:
    if text.lower() in ("true", "false"):  # also for choices that used to be boolean
        return text.lower() == "true"
    if kind == "choice":
        return text
    if text.lower() == "none":
        return None
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return text  # the method's validation reports the parameter and valid values


def read_recipe(options: argparse.Namespace) -> tuple[ModelPair, dict[str, Any]]:
    """Return the models and the arguments of make_plan from a mergekit recipe."""
    from ipmerge_core.models.pairing import open_pair
    from ipmerge_core.planning.mergekit_import import RECIPE, import_recipe

    recipe = import_recipe(RECIPE.read(options.recipe))
    base = recipe.base or options.base
    if not base:
        raise PlanError("The recipe has no base model. Specify it with --base Z.")
    return open_pair(recipe.mllm, recipe.math, base), recipe.arguments


def read_plan_options(options: argparse.Namespace) -> PlanOptions:
    """Return the options of a plan other than its method. Raises: PlanError."""
    rules = {name: rule for rule in ("merge", "keep") for name in vars(options)[f"force_{rule}"]}
    return PlanOptions.read({**vars(options), "overrides": rules})
