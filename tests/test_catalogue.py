"""The catalogue is consistent, every fact has a source, and a wrong base is answered by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model

import ipmerge_core as ipm
from ipmerge_core.errors import PlanError
from ipmerge_core.models.catalogue import find_model, likely_base, load_catalogue, scenario_of
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.tasks.registry import find_tasks
from ipmerge_core.ui.explore.tab import map_presets
from ipmerge_core.ui.merge.method_form import form_presets, preset_choice, preset_of
from ipmerge_core.ui.plan_choice import PlanChoice

CATALOGUE = load_catalogue()


def ancestors(name: str) -> list[str]:
    found = [name]
    while (parent := CATALOGUE.models[found[-1]].parent) is not None:
        assert parent not in found, "a circle"
        found.append(parent)
    return found


def test_every_fact_names_its_source() -> None:
    for model in CATALOGUE.models.values():
        assert (model.parent is None) == (model.sources["parent"] is None), model.id
        assert (model.licence is None) == (model.sources["licence"] is None), model.id
    assert all(pair.source for pair in CATALOGUE.pairs)
    assert all(preset.source for preset in CATALOGUE.presets)


@pytest.mark.parametrize("pair", CATALOGUE.pairs, ids=lambda p: f"{p.mllm}+{p.math[0]}")
def test_a_pair_is_made_of_known_models_that_share_a_root(pair: object) -> None:
    assert CATALOGUE.models[pair.mllm].role == "mllm"
    assert pair.skill in ("math", "language", "instruction")
    for expert in pair.math:
        assert CATALOGUE.models[expert].role == "expert"
        own = pair.base_mllm or pair.base
        known = set(ancestors(pair.mllm)) & set(ancestors(own))
        assert known, "the MLLM's base is among its ancestors"
        if CATALOGUE.models[expert].note == "":
            assert pair.base in ancestors(expert)


@pytest.mark.parametrize("preset", CATALOGUE.presets, ids=lambda preset: preset.name)
def test_a_preset_makes_a_plan_and_says_whose_it_is(preset: object, trio: Trio) -> None:
    assert preset.origin in ("paper", "public code", "ours", "study")
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    needs_analysis = ipm.METHODS[preset.method].needs_analysis
    known = ipm.analyse(pair) if needs_analysis else pair
    if ipm.METHODS[preset.method].data is not None:
        with pytest.raises(PlanError, match="calibration"):
            ipm.make_plan(known, method=preset.method, **preset.arguments)
        return
    plan = ipm.make_plan(known, method=preset.method, **preset.arguments)
    assert plan.selected or preset.name in ("IP-Merging", "Nothing")


def test_a_preset_is_drawn_by_the_map_or_filled_into_the_form_exactly_once() -> None:
    for preset in CATALOGUE.presets:
        drawn = [p for p in map_presets() if p["label"] == preset.name]
        filled = [p for p in form_presets() if p.name == preset.name]
        assert len(drawn) + len(filled) == 1, preset.name
        if drawn:
            choice = PlanChoice.from_arguments(preset.arguments)
            assert choice.arguments.items() >= preset.arguments.items()
            assert drawn[0]["plan"] == choice.to_browser()
        else:
            assert preset_of(preset_choice(preset)) == preset


def test_models_are_found_by_id_and_by_folder_name() -> None:
    assert find_model("Qwen/Qwen2-VL-7B-Instruct@abc").parent == "Qwen/Qwen2-7B"
    assert find_model("models/MetaMath-7B-V1.0/").parent == "meta-llama/Llama-2-7b-hf"
    assert find_model("nobody/nothing") is None


def test_the_true_base_is_known_by_id_folder_or_config(tmp_path: Path) -> None:
    named = write_model(tmp_path / "Qwen2-Math-7B", text_weights(), TEXT_CONFIG)
    assert likely_base(Checkpoint.open(named)) == "Qwen/Qwen2-7B"
    config = {"text_config": {**TEXT_CONFIG, "_name_or_path": "lmsys/vicuna-7b-v1.5"}}
    mllm = write_model(tmp_path / "m", as_mllm(text_weights()), config)
    assert likely_base(Checkpoint.open(mllm)) == "lmsys/vicuna-7b-v1.5"
    config = {**TEXT_CONFIG, "_name_or_path": "Qwen/Qwen2-Math-7B"}
    own = write_model(tmp_path / "own", text_weights(), config)
    assert likely_base(Checkpoint.open(own)) == "Qwen/Qwen2-7B"
    unknown = write_model(tmp_path / "unknown", text_weights(), TEXT_CONFIG)
    assert likely_base(Checkpoint.open(unknown)) is None


def test_a_wrong_base_is_answered_with_the_likely_true_one(trio: Trio, tmp_path: Path) -> None:
    stranger = write_model(tmp_path / "stranger", text_weights(seed=5), TEXT_CONFIG)
    expert = write_model(
        tmp_path / "WizardMath-7B-V1.0", fine_tuned(text_weights(), 2), TEXT_CONFIG
    )
    found = open_pair(trio.mllm, expert, stranger).check()
    remedy = next(f.remedy for f in found if f.subject == "math: distance to its base")
    assert remedy.endswith(
        "specify the model it was trained from, probably 'meta-llama/Llama-2-7b-hf'."
    )


def test_bases_that_are_strangers_to_each_other_are_refused(trio: Trio, tmp_path: Path) -> None:
    weights = text_weights(seed=5)
    root = write_model(tmp_path / "root", weights, TEXT_CONFIG)
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    mllm = write_model(tmp_path / "m", as_mllm(fine_tuned(weights, 1)), config)
    found = open_pair(mllm, trio.math, trio.base, base_mllm=root).check()
    levels = {finding.subject: finding.level for finding in found}
    assert levels["mllm: distance to its base"] == "ok"
    assert levels["base of the mllm: distance to the base"] == "refusal"


def test_every_skill_has_a_scenario_whose_tasks_exist_and_guard_each_other():
    catalogue = load_catalogue()
    skills = {pair.skill for pair in catalogue.pairs}
    skills |= {model.skill for model in catalogue.models.values() if model.skill}
    assert skills <= set(catalogue.scenarios)
    for scenario in catalogue.scenarios.values():
        tasks = find_tasks(scenario.tasks)
        assert [task.name for task in tasks] == list(scenario.tasks), "a guard is missing"
        assert any(task.group == "perception" for task in tasks)
        assert scenario.harness
        assert scenario.source
    assert scenario_of(None) is scenario_of("math") is scenario_of("cooking")
