"""The Merge tab's form of methods: from its values to a plan, and which methods it offers."""

from __future__ import annotations

import pytest

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.layer_map import PlanChoice
from ipmerge_core.ui.merge_tab import readiness
from ipmerge_core.ui.merge_words import change_words
from ipmerge_core.ui.method_form import MethodChoice, _field, chosen_plan, offered, with_value

DEMO = "pack"  # the id of the demo trio's


def test_every_method_without_calibration_is_offered_and_the_others_are_named() -> None:
    update = offered()
    names = {name for _, name in update["choices"]}
    data = {name for name, method in METHODS.items() if method.data is not None}
    assert names == set(METHODS) - data - {"ip_merging"} | {""}
    assert all(METHODS[name].label in update["info"] for name in data)


def test_every_parameter_of_every_method_has_a_field_with_its_default() -> None:
    for method in METHODS.values():
        for parameter in method.parameters:
            field = _field(parameter)
            assert field.value == parameter.default
            assert parameter.expectation in field.info


def test_the_default_is_the_plan_from_explore() -> None:
    choice = PlanChoice(0.3, 2.0)
    plan = chosen_plan(DEMO, choice, MethodChoice())
    assert (plan.method, plan.similarity_threshold) == ("ip_merging", 0.3)


def test_values_become_the_plans_parameters_and_defaults_fill_the_rest() -> None:
    chosen = MethodChoice("ties")
    for name, value in (("density", 0.4), ("normalize", True), ("math_weight", 1)):
        chosen = with_value(name, "ties", chosen, value)
    plan = chosen_plan(DEMO, PlanChoice(), chosen)
    assert plan.method == "ties"
    assert dict(plan.parameters) == METHODS["ties"].complete(
        {"density": 0.4, "normalize": True, "math_weight": 1.0}
    )
    assert len(plan.selected) == len(plan.decisions)


def test_a_late_value_of_another_methods_field_changes_nothing() -> None:
    chosen = MethodChoice("slerp", {"t": 0.2})
    assert with_value("density", "ties", chosen, 0.4) == chosen


@pytest.mark.parametrize(("name", "value"), [("density", 0.0), ("density", None), ("density", 2)])
def test_a_value_out_of_range_is_refused_in_words_and_nothing_may_start(
    name: str, value: float | None
) -> None:
    chosen = MethodChoice("breadcrumbs", {name: value})
    with pytest.raises(PlanError, match="density is"):
        chosen_plan(DEMO, PlanChoice(), chosen)
    found = readiness(Backend(), DEMO, PlanChoice(), chosen)
    assert not found.ready
    assert "density is" in found.findings[0].message + found.findings[0].remedy


def test_the_confirmation_previews_what_is_affine_and_says_why_not_otherwise() -> None:
    affine = chosen_plan(DEMO, PlanChoice(), MethodChoice("task_arithmetic"))
    assert "% of its norm" in change_words(affine)
    other = chosen_plan(DEMO, PlanChoice(), MethodChoice("ties"))
    assert "no exact preview" in change_words(other)
    found = readiness(Backend(), DEMO, PlanChoice(), MethodChoice("ties"))
    assert found.ready
    assert "28 of 28 decoder matrices" in found.confirmation
    assert "no exact preview" in found.confirmation
