"""A plan survives mergekit's YAML, and what one side cannot say is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from conftest import Trio

import ipmerge_core as ipm
from ipmerge_core.errors import PlanError
from ipmerge_core.pairing import ModelPair
from ipmerge_core.recipes import export_recipe, import_recipe

CHOICES: list[dict[str, Any]] = [
    {"method": "task_arithmetic", "mllm_weight": 0.9, "math_weight": 0.4},
    {"method": "task_arithmetic", "math_weight": 1.0, "layer_gains": (0.0, 0.5, 1.0)},
    {"method": "ties", "mllm_density": 0.9, "math_density": 0.3, "normalize": True, "scale": 0.8},
    {"method": "dare_linear", "mllm_density": 1.0, "math_density": 0.5, "rescale": "l1"},
    {"method": "dare_ties", "mllm_density": 0.6, "math_density": 0.5, "rescale": "none"},
    {"method": "breadcrumbs", "density": 0.8, "gamma": 0.05},
    {"method": "della", "density": 0.6, "epsilon": 0.1, "rescale": "l1", "elect": False},
    {"method": "linear", "alpha": 0.75},
    {"method": "slerp", "t": 0.25},
    {"method": "nuslerp", "t": 0.25},
]


@pytest.fixture
def pair(trio: Trio) -> ModelPair:
    return ipm.open_pair(trio.mllm, trio.math, trio.base)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice["method"])
def test_a_plan_that_goes_out_and_in_again_is_the_same(
    choice: dict[str, Any], pair: ModelPair
) -> None:
    plan = ipm.make_plan(pair, **choice)
    recipe = import_recipe(export_recipe(plan))
    assert recipe.mllm == plan.sources.mllm.id
    assert recipe.math == [plan.sources.math[0].id]
    again = ipm.make_plan(pair, **recipe.arguments)
    assert again.layer_gains == plan.layer_gains
    assert (
        again.parameters
        == {
            name: pytest.approx(value) if isinstance(value, float) else value
            for name, value in plan.parameters.items()
        }
        or again.digest == plan.digest
    )


def test_a_recipe_merges_matrices_and_leaves_the_rest_to_the_mllm(pair: ModelPair) -> None:
    plan = ipm.make_plan(pair, "task_arithmetic", math_weight=0.4)
    recipe = yaml.safe_load(export_recipe(plan))
    assert recipe["base_model"] == plan.sources.base.id
    weights = [model["parameters"]["weight"] for model in recipe["models"]]
    assert weights == [
        [{"filter": "_proj.weight", "value": 1.0}, {"value": 1.0}],
        [{"filter": "_proj.weight", "value": 0.4}, {"value": 0.0}],
    ]
    assert recipe["parameters"] == {"normalize": False}


def test_a_recipe_from_mergekits_own_pages_is_understood() -> None:
    recipe = import_recipe(
        """
        merge_method: ties
        base_model: org/base
        models:
          - model: org/base
          - model: org/host
            parameters: {weight: 1.0, density: 0.5}
          - model: org/math
            parameters: {weight: 0.5, density: 0.3}
        parameters: {normalize: true}
        dtype: bfloat16
        """
    )
    assert (recipe.mllm, recipe.math, recipe.base) == ("org/host", ["org/math"], "org/base")
    assert recipe.arguments["math_density"] == 0.3
    assert recipe.arguments["normalize"] is True


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"method": "wudi"}, "mergekit has no counterpart of"),
        ({"method": "task_arithmetic", "exclude": "mlp"}, "keeps 9 matrices"),
        ({"method": "dare_linear"}, "rescales by 1 / density here"),
        ({"method": "ties", "scope": "model"}, "has no scope=model"),
    ],
)
def test_what_mergekit_cannot_say_is_refused(
    choice: dict[str, Any], words: str, pair: ModelPair
) -> None:
    with pytest.raises(PlanError, match=words):
        export_recipe(ipm.make_plan(pair, **choice))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML"),
        ("[1]", "no merge_method"),
        ("{merge_method: passthrough}", "is not one of"),
        ("{merge_method: ties, slices: []}", "has 'slices'"),
        ("{merge_method: ties, models: [{model: a}]}", "names 1 models"),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: 1}},"
            " {model: b, parameters: {weight: -1}}]}",
            "add up to 0",
        ),
        (
            "{merge_method: task_arithmetic, models: [{model: a, parameters: {weight: "
            "[{filter: mlp, value: 1}]}}, {model: b}]}",
            "limits a value to 'mlp'",
        ),
        (
            "{merge_method: task_arithmetic, models: [{model: a}, {model: b}, "
            "{model: c, parameters: {weight: 2}}]}",
            "experts of a plan share",
        ),
    ],
)
def test_what_a_plan_cannot_say_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        import_recipe(text)
