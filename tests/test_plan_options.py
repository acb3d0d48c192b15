"""Every option of a plan, walked by its field: asked for, checked, kept and hashed everywhere."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import ipmerge_core as ipm
from ipmerge_core.calibration.calibrate import calibrate
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.samples import load_samples
from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError
from ipmerge_core.methods.declarations import Anchor
from ipmerge_core.planning import options
from ipmerge_core.planning.mergekit import export_recipe
from ipmerge_core.planning.options import OPTIONS, Option, PlanOptions
from ipmerge_core.ui.merge.method_form import with_option
from ipmerge_core.ui.method_choice import FIELDS, MethodChoice, chosen_plan
from ipmerge_core.ui.plan_choice import PlanChoice

PACK = Path(__file__).parents[1] / "assets" / "demo" / "pack.json.gz"
MATRIX = "model.layers.0.self_attn.q_proj.weight"
METHOD = "task_arithmetic"
every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=list(OPTIONS))


def value_of(option: Option) -> Any:
    """A value other than the default."""
    return {
        "pattern": "mlp",
        "factors": (0.0, 0.5, 1.0),
        "share": 0.25,
        "choice": list(option.choices)[-1] if option.choices else None,
        "rules": {MATRIX: "keep"},
    }[option.kind]


def text_of(option: Option) -> str:
    value = value_of(option)
    return " ".join(map(str, value)) if option.kind == "factors" else str(value)


def flags_of(option: Option) -> list[str]:
    if option.kind == "rules":
        return ["--force-keep", MATRIX]
    return [f"--{option.name.replace('_', '-')}", *text_of(option).split()]


@pytest.fixture(scope="module")
def analysis() -> ipm.Analysis:
    return ipm.Analysis.load(PACK)


@pytest.fixture(scope="module")
def grams(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration of the demo models on a few samples."""
    pair = ipm.open_pair(*(PACK.parent / role for role in ("mllm", "math", "base")))
    samples = [load_samples("demo", 3, takes_images=images) for images in (True, False)]
    folder = tmp_path_factory.mktemp("grams") / "out"
    calibrate(pair, folder, CalibrationSettings("gram"), *samples)
    return str(folder)


def data_of(option: Option, grams: str) -> dict[str, Any]:
    """What the option needs beside it."""
    return {"calibration": grams} if option.kind == "share" else {}


def test_every_field_says_how_it_is_asked_for():
    assert list(OPTIONS) == [field.name for field in fields(PlanOptions)]
    assert all(option.label and option.help for option in OPTIONS.values())
    values = {**vars(options), "Anchor": Anchor}
    for name, hint in get_type_hints(PlanOptions, values).items():
        legal = {value for part in (hint, *get_args(hint)) for value in get_args(part)}
        texts = {value for value in legal if isinstance(value, str)}
        assert set(OPTIONS[name].choices) == (texts if OPTIONS[name].kind == "choice" else set())


def test_no_method_has_a_parameter_of_an_options_name():
    names = {parameter.name for method in ipm.METHODS.values() for parameter in method.parameters}
    assert not names & set(OPTIONS)


@every_option
def test_the_command_line_python_and_the_form_make_the_same_plan(
    option: Option, analysis: ipm.Analysis, grams: str, tmp_path: Path
):
    data = data_of(option, grams)
    named = ipm.make_plan(analysis, METHOD, **data, **{option.name: value_of(option)})
    file = tmp_path / "plan.json"
    command = ["plan", str(PACK), "--method", METHOD, *flags_of(option), "-o", str(file)]
    more = ["--calibration", grams] if data else []
    assert main([*command, *more, "--quiet"]) == 0
    assert ipm.MergePlan.load(file).to_dict() == named.to_dict()
    one = PlanOptions.read({option.name: value_of(option)})
    assert ipm.make_plan(analysis, METHOD, options=one, **data).to_dict() == named.to_dict()
    if option.kind != "rules":  # those are the map's
        assert option in FIELDS
        before = MethodChoice(METHOD, calibration=grams if data else "")
        chosen = with_option(option.name, before, text_of(option))
        assert chosen_plan("pack", PlanChoice(), chosen).digest == named.digest


def test_the_map_gives_the_rules(analysis: ipm.Analysis):
    explored = PlanChoice(overrides={MATRIX: "keep"})
    made = chosen_plan("pack", explored, MethodChoice())
    assert made.digest == ipm.make_plan(analysis, overrides={MATRIX: "keep"}).digest


@every_option
def test_an_option_is_kept_and_decides_the_digest(
    option: Option, analysis: ipm.Analysis, grams: str, tmp_path: Path
):
    data = data_of(option, grams)
    plan = ipm.make_plan(analysis, METHOD, **data, **{option.name: value_of(option)})
    plan.save(tmp_path / "plan.json")
    again = ipm.MergePlan.load(tmp_path / "plan.json")
    assert getattr(again.options, option.name) == value_of(option)
    assert again == plan
    assert plan.digest != ipm.make_plan(analysis, METHOD).digest
    assert option.name.replace("_", " ") in plan.options.describe()
    assert PlanOptions.read(plan.options.to_dict()) == plan.options


@every_option
def test_a_recipe_says_an_option_or_refuses_the_plan(
    option: Option, analysis: ipm.Analysis, grams: str
):
    data = data_of(option, grams)
    plan = ipm.make_plan(analysis, METHOD, **data, **{option.name: value_of(option)})
    if option.kind == "factors":
        assert export_recipe(plan) != export_recipe(ipm.make_plan(analysis, METHOD))
    else:
        with pytest.raises(PlanError, match="Export a plan"):
            export_recipe(plan)


def test_a_name_wins_over_the_options_it_is_given_with(analysis: ipm.Analysis):
    both = PlanOptions(include="mlp", norms="merge")
    plan = ipm.make_plan(analysis, METHOD, options=both, norms="keep")
    assert (plan.options.include, plan.options.norms) == ("mlp", "keep")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"include": "("}, "not a valid regular expression"),
        ({"exclude": 3}, "not a valid regular expression"),
        ({"layer_gains": "fast"}, "expected numbers such as"),
        ({"layer_gains": (float("inf"),)}, "numbers from 0 to 1000"),
        ({"norms": "burn"}, "norms is 'burn'; expected keep or merge"),
        ({"anchor": ["root"]}, "anchor is"),
        ({"layer_profile": "top"}, "layer_profile is 'top'; expected all or upper_half"),
        ({"input_share": 1.5}, "input_share is 1.5; expected a number from 0 to 1"),
        ({"input_share": "much"}, "input_share is 'much'"),
        ({"overrides": {MATRIX: "burn"}}, "expected merge or keep"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        PlanOptions(**values)
