"""What the layer map's events say is checked like a stranger's words; its files fit together."""

from __future__ import annotations

import json
import math
import re

import pytest
from synthetic_pack import make_pack

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.explore.layer_map import HERE, MODULE, LayerMap
from ipmerge_core.ui.plan_choice import PlanChoice, read_cell, read_cells, read_commit
from ipmerge_core.ui.web.component import component_script

PACK = make_pack(layers=2, experts=2)
NAME = "model.layers.0.self_attn.q_proj.weight"
GOOD = {"s": 0.3, "lambda": 2, "similarity": "max", "variant": "sum", "overrides": {NAME: "merge"}}
GOOD["budget"] = 0.02


def test_a_commit_becomes_a_plan_choice():
    choice = read_commit(GOOD, PACK)
    assert choice == PlanChoice(0.3, 2.0, "max", "sum", {NAME: "merge"}, 0.02)
    assert choice.to_browser() == GOOD


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.4", None, True, [], 10**40])
def test_a_threshold_outside_zero_to_one_is_refused_with_the_range(value):
    with pytest.raises(PlanError, match=r"threshold is .* expected a number from 0 to 1\."):
        read_commit({**GOOD, "s": value}, PACK)


@pytest.mark.parametrize("value", [-1, 33, math.nan, "<script>", None, False])
def test_a_lambda_outside_the_slider_is_refused_with_the_range(value):
    with pytest.raises(PlanError, match=r"lambda is .* expected a number from 0 to 32\."):
        read_commit({**GOOD, "lambda": value}, PACK)


@pytest.mark.parametrize(
    "overrides",
    [{"model.embed_tokens.weight": "merge"}, {NAME: "delete"}, ["x"], "x", {NAME: ["merge"]}],
)
def test_an_override_of_nothing_or_to_nothing_is_refused(overrides):
    with pytest.raises(PlanError, match=r"override"):
        read_commit({**GOOD, "overrides": overrides}, PACK)


@pytest.mark.parametrize("key", ["similarity", "variant"])
@pytest.mark.parametrize("value", ["", "best", None, [], {}])
def test_an_unknown_similarity_or_update_is_refused_with_the_choices(key, value):
    with pytest.raises(PlanError, match=r"Available: "):
        read_commit({**GOOD, key: value}, PACK)


@pytest.mark.parametrize("values", [None, [], "plan", 3])
def test_a_commit_that_is_no_mapping_is_refused(values):
    with pytest.raises(PlanError, match="expected a mapping"):
        read_commit(values, PACK)


def test_a_chosen_cell_finds_its_record():
    record = read_cell({"name": NAME, "expert": 1}, PACK)
    assert (record["name"], record["expert"]) == (NAME, 1)


@pytest.mark.parametrize(
    "values", [{}, None, {"name": NAME, "expert": 2}, {"name": ["x"], "expert": 0}, "x"]
)
def test_a_cell_that_is_not_in_the_pack_is_refused(values):
    with pytest.raises(PlanError, match="not in the current analysis"):
        read_cell(values, PACK)


def test_a_pinned_cell_comes_with_the_chosen_one_and_is_checked_like_it():
    other = {"name": NAME.replace("q_proj", "k_proj"), "expert": 0}
    found = read_cells({"name": NAME, "expert": 1, "pinned": other}, PACK)
    assert [(r["module"], r["expert"]) for r in found] == [("q", 1), ("k", 0)]
    assert len(read_cells({"name": NAME, "expert": 1, "pinned": None}, PACK)) == 1
    with pytest.raises(PlanError, match="not in the current analysis"):
        read_cells({"name": NAME, "expert": 1, "pinned": "<script>"}, PACK)
    with pytest.raises(PlanError, match="not in the current analysis"):
        read_cells("x", PACK)


def test_the_component_sends_one_string_of_json():
    content = {"pack": PACK, "plan": PlanChoice().to_browser()}
    sent = LayerMap(content).value
    assert isinstance(sent, str)
    assert json.loads(sent) == json.loads(json.dumps(content))
    assert LayerMap().value is None


def test_nothing_is_fetched_from_elsewhere():
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", component_script(MODULE)))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_the_template_is_fixed_so_that_gradio_never_redraws_it():
    for name in ("template.html", "style.css"):
        text = (HERE / name).read_text(encoding="utf-8")
        assert "${" not in text
        assert "{{" not in text
        assert "`" not in text
        assert "\\" not in text


@pytest.mark.parametrize("event", ["commit", "cellselect"])
def test_the_component_offers_the_event(event):
    assert callable(getattr(LayerMap(), event))
