"""A plan survives mergekit's YAML, and what one side cannot say is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from conftest import Trio

import ipmerge_core as ipm
from ipmerge_core.errors import PlanError
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.mergekit import export_recipe
from ipmerge_core.planning.mergekit_import import import_recipe

CHOICES: list[dict[str, Any]] = [
    {"method": "task_arithmetic", "mllm_weight": 0.9, "math_weight": 0.4},
    {"method": "task_arithmetic", "math_weight": 1.0, "layer_gains": (0.0, 0.5, 1.0)},
    {"method": "ties", "mllm_density": 0.9, "math_density": 0.3, "normalize": True, "scale": 0.8},
    {"method": "dare_linear", "mllm_density": 1.0, "math_density": 0.5, "rescale": "l1"},
    {"method": "dare_ties", "mllm_density": 0.6, "math_density": 0.5, "rescale": "none"},
    {"method": "dare_linear", "density": 0.5, "rescale": "l1"},
    {"method": "breadcrumbs", "density": 0.8, "gamma": 0.05},
    {"method": "breadcrumbs", "mllm_density": 1.0, "math_density": 0.8},
    {"method": "della", "density": 0.6, "epsilon": 0.1, "rescale": "l1", "elect": False},
    {"method": "della", "density": 0.6, "rescale": "l1", "normalize": "none"},
    {"method": "dare_ties", "density": 0.6, "rescale": "l1", "normalize": "weights"},
    {"method": "linear", "alpha": 0.75},
    {"method": "slerp", "t": 0.25},
    {
        "method": "breadcrumbs",
        "math_weight": 1.0,
        "mllm_density": 1.0,
        "math_density": 0.8,
        "layer_gains": (0.5, 1.0),
    },
    {"method": "slerp", "t": 1.0, "layer_gains": (0.0, 0.5)},
    {"method": "nuslerp", "t": 0.25},
    {"method": "nuslerp", "t": 0.25, "of": "weights", "per": "column"},
    {"method": "nuslerp", "t": 0.25, "per": "row"},
    {"method": "linear", "mllm_weight": 0.8, "math_weight": 0.4, "normalize": False},
    {"method": "sce", "select_topk": 0.5},
    {"method": "karcher"},
    {"method": "multislerp", "alpha": 0.75},
    {"method": "multislerp", "alpha": 0.5, "of": "weights"},
    {"method": "model_stock"},
    {"method": "model_stock", "per": "row"},
    {"method": "ram", "epsilon": 1e-4},
    {"method": "ram", "boost": 0.1, "boost_cap": 0.2},
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
    assert again.options == plan.options
    shared = "density" in plan.parameters and "mllm_density" in choice
    assert again.parameters == {
        name: pytest.approx(value) if isinstance(value, float) else value
        for name, value in plan.parameters.items()
    } | ({"density": choice["math_density"]} if shared else {})
    assert again.anchor == plan.anchor


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


def test_what_cannot_be_limited_to_matrices_says_so(pair: ModelPair) -> None:
    text = export_recipe(ipm.make_plan(pair, "karcher"))
    assert text.startswith("# This method has no weight")
    assert "#" not in export_recipe(ipm.make_plan(pair, "ties"))


def test_an_injected_sum_is_one_whose_host_keeps_everything(pair: ModelPair) -> None:
    plan = ipm.make_plan(pair, "dare_linear", anchor="inject", density=0.5, rescale="l1")
    recipe = import_recipe(export_recipe(plan))
    assert recipe.arguments["mllm_density"] == 1.0
    assert recipe.arguments["math_density"] == 0.5
    with pytest.raises(PlanError, match="anchor is inject"):
        export_recipe(ipm.make_plan(pair, "ties", anchor="inject"))
    with pytest.raises(PlanError, match="anchor is interp"):
        export_recipe(ipm.make_plan(pair, "task_arithmetic", anchor="interp"))


HOST_AND_MATH = """
base_model: org/base
models:
  - model: org/base
  - model: org/host
    parameters: {{weight: {host}}}
  - model: org/math
    parameters: {{weight: {math}}}
merge_method: {method}
parameters: {{{more}}}
dtype: bfloat16
"""


def imported(method: str, host: Any = 1.0, math: Any = 0.5, more: str = "") -> dict[str, Any]:
    text = HOST_AND_MATH.format(method=method, host=host, math=math, more=more)
    return import_recipe(text).arguments


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
    assert recipe.arguments["normalize"] == "weights"


def test_where_a_recipe_is_silent_mergekits_defaults_hold() -> None:
    ties = imported("ties")
    assert (ties["normalize"], ties["density"], ties["scale"]) == ("weights", 1.0, 1.0)
    della = imported("della")
    assert (della["rescale"], della["epsilon"], della["elect"]) == ("l1", 0.15, True)
    assert imported("dare_linear")["rescale"] == "l1"
    assert imported("dare_ties")["normalize"] == "none"
    assert imported("breadcrumbs")["gamma"] == 0.01
    assert imported("della_linear", more="rescale: false")["elect"] is False


def test_parameters_for_all_models_hold_for_each() -> None:
    found = imported("ties", more="density: 0.4, lambda: 0.8, int8_mask: true")
    assert (found["density"], found["scale"]) == (0.4, 0.8)


def test_lambda_and_division_of_a_sum_go_into_its_weights() -> None:
    found = imported("task_arithmetic", 1.0, 0.5, "lambda: 0.6")
    assert found["mllm_weight"] == pytest.approx(0.6)
    assert found["math_weight"] == pytest.approx(0.3)
    found = imported("task_arithmetic", 1.0, 0.6, "normalize: true")
    assert found["mllm_weight"] == pytest.approx(0.625)
    assert found["math_weight"] == pytest.approx(0.375)
    found = imported("dare_ties", 1.0, 0.5, "lambda: 2")
    assert (found["mllm_weight"], found["math_weight"]) == (2.0, 1.0)


def test_slerp_starts_at_its_base_model_wherever_it_stands() -> None:
    models = "models: [{model: org/math}, {model: org/host}]"
    recipe = import_recipe(
        f"{{merge_method: slerp, base_model: org/host, {models}, parameters: {{t: 0.2}}}}"
    )
    assert (recipe.mllm, recipe.math, recipe.base) == ("org/host", ["org/math"], None)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"method": "wudi"}, "mergekit has no counterpart of"),
        ({"method": "task_arithmetic", "exclude": "mlp"}, "keeps 9 matrices"),
        ({"method": "dare_linear"}, "by 1 / density"),
        ({"method": "ties", "scope": "model"}, "has no scope=model"),
        ({"method": "ties", "normalize": "count"}, "ties has no normalize=count"),
        (
            {"method": "dare_ties", "rescale": "l1", "election": "unweighted"},
            "dare_ties has no election=unweighted. Plan with election=weighted",
        ),
        (
            {"method": "della", "rescale": "l1", "normalize": "count"},
            "della has no normalize=count. Plan with normalize=weights",
        ),
        ({"method": "sce", "math_weight": 0.5}, "has no math_weight=0.5"),
        ({"method": "karcher", "alpha": 0.9}, "Plan with alpha=its default"),
        ({"method": "nuslerp", "layer_gains": (0.0, 1.0)}, "Export a plan without layer gains"),
        ({"method": "ties", "layer_gains": (0.0, 1.0)}, "not the same for TIES"),
        (
            {"method": "dare_linear", "rescale": "l1", "layer_gains": (0.5,)},
            "not the same for DARE",
        ),
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
        ("a: [", "is not valid YAML"),
        ("[1]", "not a mergekit recipe"),
        ("{merge_method: passthrough}", "is not one of"),
        ("{merge_method: ties, slices: []}", "has 'slices'"),
        ("{merge_method: ties, models: [{model: a}]}", "has 1 models"),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: 1}},"
            " {model: b, parameters: {weight: -1}}]}",
            "sum to 0",
        ),
        (
            "{merge_method: task_arithmetic, models: [{model: a, parameters: {weight: "
            "[{filter: mlp, value: 1}]}}, {model: b}]}",
            "restricts a value to 'mlp'",
        ),
        (
            "{merge_method: task_arithmetic, models: [{model: a}, {model: b}, "
            "{model: c, parameters: {weight: 2}}]}",
            "experts of a plan share",
        ),
        (
            "{merge_method: task_arithmetic, models: [{model: a, parameters: {weight: x}}, "
            "{model: b, parameters: {weight: 1}}]}",
            "weight is 'x'; expected a number",
        ),
        ("{merge_method: linear, models: [{model: a}, {model: b}]}", "lacks weight"),
        (
            "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}]}",
            "lacks t",
        ),
        (
            "{merge_method: sce, base_model: z, models: [{model: a}, {model: b}], "
            "parameters: {density: 0.5}}",
            "'density', which a plan cannot express",
        ),
        (
            "{merge_method: ties, base_model: z, parameters: {weight: 1, rescale: true}, "
            "models: [{model: a}, {model: b}]}",
            "ties rescales, which a plan cannot express",
        ),
        (
            "{merge_method: dare_ties, base_model: z, parameters: {weight: 1, normalize: true, "
            "lambda: 2}, models: [{model: a}, {model: b}]}",
            "lambda of 2 has no counterpart",
        ),
        (
            "{merge_method: ties, base_model: z, parameters: {weight: 1, normalize: maybe}, "
            "models: [{model: a}, {model: b}]}",
            "normalize is 'maybe'",
        ),
        (
            "{merge_method: breadcrumbs, base_model: z, parameters: {weight: 1}, models: "
            "[{model: a, parameters: {gamma: 0.1}}, {model: b}]}",
            "gamma differs between the models",
        ),
    ],
)
def test_what_a_plan_cannot_say_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        import_recipe(text)
