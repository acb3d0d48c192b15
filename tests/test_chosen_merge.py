"""The merge that all tabs speak of: the last choice, its name, its recipe and its link."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipmerge_core import METHODS, make_plan
from ipmerge_core.errors import PlanError
from ipmerge_core.planning.description import facts_of
from ipmerge_core.planning.map_variants import VARIANTS
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.ui.chosen_merge import (
    ChosenMerge,
    chosen_line,
    describe,
    digest_of,
    link_part,
    name_of,
    read_link_part,
    recipe_of,
)
from ipmerge_core.ui.compare.tab import NOT_DRAWN, compared_or_reason
from ipmerge_core.ui.finished_merges import FinishedMerge
from ipmerge_core.ui.merge.method_form import with_method
from ipmerge_core.ui.method_choice import MethodChoice
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of, describe_choice

PACK = "pack"
TIES = MethodChoice("ties", {"density": 0.3}, {"norms": "merge"})
# Methods of the Merge tab whose plan needs no calibration.
NAMES = [m.name for m in METHODS.values() if not m.needs_analysis and m.data is None]
FRACTIONS = st.floats(0, 1)


def finished(plan: MergePlan) -> FinishedMerge:
    """The finished merge of a plan, with the manifest that is written for it."""
    from ipmerge_core.merging.provenance import Provenance

    read = json.loads(json.dumps(facts_of(plan)))
    made = Provenance(plan.hash, plan.method, plan.sources, plan.digest, content=read)
    return FinishedMerge("run", Path("/x/mine"), made)


# --- the last choice counts ------------------------------------------------------------------


def test_the_last_choice_is_the_chosen_one():
    start = ChosenMerge(PACK)
    explored = start.with_plan(PlanChoice(0.5))
    method = explored.with_method(TIES)
    merged = method.with_merge(finished(make_plan(analysis_of(PACK), "linear")))
    again = merged.with_plan(PlanChoice(0.6))
    assert [m.by for m in (start, explored, method, merged, again)] == [
        "start", "explore", "merge", "folder", "explore",
    ]  # fmt: skip
    assert merged.recipe.method.name == "linear"
    assert merged.method == TIES  # the form keeps what it shows
    assert merged.without_merge() == method
    assert again.recipe == (PlanChoice(0.6), MethodChoice(options=TIES.options))
    assert method.with_method(TIES) is method


def test_a_recorded_plan_is_exactly_that_and_a_pair_keeps_the_method():
    method = ChosenMerge(PACK).with_method(MethodChoice("regmean", calibration="/x"))
    assert method.with_record(PlanChoice(0.0)).recipe == (PlanChoice(0.0), MethodChoice())
    opened = method.opened("packs-b", PlanChoice(0.2))
    assert (opened.pack_id, opened.by) == ("packs-b", "merge")
    assert opened.method == MethodChoice("regmean")  # a calibration is of one pair's models
    assert ChosenMerge(PACK).with_plan(PlanChoice(0.5)).opened("b", PlanChoice()).by == "start"


def test_a_link_gives_its_plan_and_keeps_its_method():
    linked = ChosenMerge(PACK).with_method(TIES).with_link(PlanChoice(0.7))
    assert (linked.plan, linked.method, linked.by) == (PlanChoice(0.7), TIES, "merge")
    assert ChosenMerge(PACK).with_link(PlanChoice(0.7)).by == "explore"


@pytest.mark.parametrize("name", [None, ""])
def test_a_method_that_is_cleared_is_the_plan_from_explore(name):
    assert with_method(TIES, name) == MethodChoice(options=TIES.options)


# --- names -----------------------------------------------------------------------------------


def test_every_choice_has_a_name_with_its_digest():
    plan = ChosenMerge(PACK, PlanChoice(0.41234567, 1.2345))
    method = ChosenMerge(PACK).with_method(TIES)
    merged = method.with_merge(finished(make_plan(analysis_of(PACK), "linear")))
    names = [name_of(each, digest_of(each)) for each in (plan, method, merged)]
    assert names[0].startswith("plan in Explore · IP-Merging, Sα 0.41234567, λ 1.2345 · plan ")
    assert names[1].startswith("method in Merge · TIES, density 0.3, norms merge · plan ")
    assert names[2].startswith("mine · ")
    for chosen, name in zip((plan, method, merged), names, strict=True):
        assert name.endswith(f"plan {chosen.make_plan().hash}")
        assert digest_of(chosen) in chosen_line(chosen)


@given(FRACTIONS, st.floats(0, 32), FRACTIONS)
def test_different_plans_have_different_names(s, lambda_, other):
    names = {describe_choice(PlanChoice(value, lambda_)) for value in {s, other}}
    assert len(names) == len({s, other})


def test_a_plan_that_cannot_be_made_is_named_with_its_reason():
    line = chosen_line(ChosenMerge(PACK).with_method(MethodChoice("ties", {"density": 7.0})))
    assert "TIES, density 7" in line
    assert "density is 7.0; expected" in line
    assert "needs a calibration" in chosen_line(
        ChosenMerge(PACK).with_method(MethodChoice("regmean"))
    )


def test_the_full_description_has_scope_anchor_gains_and_parameters():
    options = {"include": "mlp", "layer_gains": "0 1"}
    found = describe(ChosenMerge(PACK, PlanChoice(0.0, 2.0), MethodChoice(options=options)))
    assert list(found) == [
        "Pair", "Chosen", "Method", "Parameters", "Scope", "Anchor", "Layer gains", "Calibration",
    ]  # fmt: skip
    assert "lambda 2" in found["Parameters"]
    assert "similarity threshold 0" in found["Parameters"]
    assert found["Scope"] == "12 of 28 decoder matrices, include 'mlp'"
    assert found["Anchor"].endswith("(two_base)")
    assert (found["Layer gains"], found["Calibration"]) == ("0 1", "none")


# --- recipes of finished merges ---------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_plan_of_the_map_is_drawn_again(variant):
    names = [record.name for record in analysis_of(PACK).records]
    choice = PlanChoice(0.3, 1.2345678, "max", variant, {names[3]: "merge"})
    plan = ChosenMerge(PACK, choice, MethodChoice(options={"exclude": "down"})).make_plan()
    merged = ChosenMerge(PACK).with_merge(finished(plan))
    assert merged.map_plan == choice
    assert merged.make_plan().digest == plan.digest


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_of_a_finished_merge_gives_its_plan(name):
    method = METHODS[name]
    values = {p.name: 0.3 for p in method.parameters if p.kind == "float" and 0.3 in p.bounds}
    try:
        plan = make_plan(analysis_of(PACK), name, exclude="down", **values)
    except PlanError:  # values that exclude each other
        plan = make_plan(analysis_of(PACK), name, exclude="down")
    merged = ChosenMerge(PACK).with_merge(finished(plan))
    assert merged.make_plan().digest == plan.digest
    assert (merged.map_plan is None) == (name != "ip_merging")


def test_parameters_that_explore_does_not_set_are_values_of_its_plan():
    plan = make_plan(analysis_of(PACK), similarity_threshold=0.25, projector="top_k", top_k=3)
    values = {"projector": "top_k", "top_k": 3}
    choice, method = recipe_of(finished(plan).made.content)
    assert (choice, method.name, method.values) == (PlanChoice(0.25), "", values)
    merged = ChosenMerge(PACK).with_merge(finished(plan))
    assert merged.make_plan().digest == plan.digest
    assert merged.map_plan is None  # the map draws another update
    assert "projector top_k, top_k 3" in name_of(ChosenMerge(PACK, *merged.recipe))


def test_what_explore_cannot_set_is_a_method_with_its_threshold():
    names = [record.name for record in analysis_of(PACK).records]
    rules = {"overrides": {names[0]: "keep"}}
    over = make_plan(analysis_of(PACK), lambda_=40.0, similarity_threshold=0.25, **rules)
    for plan in (over, make_plan(analysis_of(PACK), "ties", **rules)):
        merged = ChosenMerge(PACK).with_merge(finished(plan))
        assert merged.recipe.method.name == plan.method
        assert merged.make_plan().digest == plan.digest


def test_the_parameters_of_the_form_stay_with_the_plan_of_the_map():
    values = {"temperature": 0.5, "rank": 8}
    formed = ChosenMerge(PACK).with_method(MethodChoice(values=values))
    moved = formed.with_plan(PlanChoice(0.6))
    assert (moved.plan, moved.method.values) == (PlanChoice(0.6), values)
    assert dict(moved.make_plan().parameters).items() >= values.items()
    assert read_link_part(f"?v=1&s=0.6&{link_part(moved)}") == (moved.method, [])
    assert not formed.with_method(TIES).with_plan(PlanChoice()).method.values
    assert formed.with_record(PlanChoice()).method == MethodChoice()


# --- the link --------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from(NAMES), FRACTIONS, st.sampled_from(["", "mlp", "a&b=c #%+ü"]))
def test_a_link_gives_back_method_values_and_options(name, number, pattern):
    values = {
        p.name: number for p in METHODS[name].parameters if p.kind == "float" and number in p.bounds
    }
    if METHODS[name].needs_analysis:
        return
    how = MethodChoice(name, values, {"include": pattern} if pattern else {})
    assert read_link_part(f"?v=1&s=0.4&{link_part(ChosenMerge(method=how))}") == (how, [])


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("method=nobody", "method 'nobody' is not one of the Merge tab"),
        ("method=ip_merging", "is not one of the Merge tab"),
        ("method=ties&p.densty=1", "p.densty: the method has no parameter 'densty'"),
        ("p.density=1", "p.density: the method has no parameter"),
        ("method=ties&p.density=x", "p.density: 'x' is not a value"),
        ("method=ties&p.density=7", "p.density: density is 7; expected"),
        ("method=ties&p.density=[1]", "p.density: density is [1]; expected"),
        ("method=ties&p.density=%7B%7D", "p.density: density is {}; expected"),
        ("o.norms=perhaps", "o.norms: norms is 'perhaps'; expected"),
        ("o.include=(", "o.include: The include pattern '('"),
        ("o.overrides=x", "o.overrides: there is no such option"),
        ("o.layer_gains=a", "o.layer_gains: The layer gains is 'a'"),
        (f"o.include={'a' * 300}", "o.include: there is no such option, or its value is too long"),
        ("method=ties&p.density=" + "[" * 5000, "is not a value"),
    ],
)
def test_what_a_link_says_wrongly_is_named_and_left_out(query, problem):
    how, problems = read_link_part(query)
    assert len(problems) == 1
    assert problem in problems[0]
    assert how in (MethodChoice(), MethodChoice("ties"))


# --- comparing -------------------------------------------------------------------------------


def test_compare_shows_the_chosen_merge_or_says_why_not():
    chosen = ChosenMerge(PACK, PlanChoice(0.5), by="explore")
    content, words = compared_or_reason(chosen, None)
    assert (content["a"]["plan"]["s"], words) == (0.5, "")
    assert content["a"]["label"] == "Plan in Explore · IP-Merging, Sα 0.5, λ 1"
    content, words = compared_or_reason(chosen.with_method(TIES), "")
    assert NOT_DRAWN in words
    assert content["a"]["label"] == "Plan in Explore"
    plan = make_plan(analysis_of(PACK), similarity_threshold=0.7)
    content, words = compared_or_reason(chosen.with_merge(finished(plan)), "")
    assert (content["a"]["plan"]["s"], words) == (0.7, "")
    assert content["a"]["label"].startswith("Mine · ")


def test_a_chosen_merge_is_made_of_plain_values():
    chosen = ChosenMerge(PACK).with_merge(finished(make_plan(analysis_of(PACK), "linear")))
    assert asdict(chosen)["pack_id"] == PACK
