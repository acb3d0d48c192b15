"""The Merge tab's form: from values to a plan, which methods it offers, what it says of them."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from ipmerge_core.calibration.calibrate import CalibrationCost
from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.merging.merge import estimate_merge
from ipmerge_core.methods import METHODS
from ipmerge_core.planning.description import describe_change
from ipmerge_core.planning.options import ANCHORS, PlanOptions
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.runtime.patterns import compile_pattern
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.format import progress_html
from ipmerge_core.ui.formula import formula_html
from ipmerge_core.ui.merge import calibration_form
from ipmerge_core.ui.merge.method_form import (
    _field,
    _option_field,
    list_methods,
    with_method,
    with_option,
    with_value,
)
from ipmerge_core.ui.merge.tab import readiness
from ipmerge_core.ui.method_choice import FIELDS, MethodChoice, chosen_plan
from ipmerge_core.ui.plan_choice import PlanChoice
from ipmerge_core.ui.runs import RunView, find_run

DEMO = "pack"  # the id of the demo trio's


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what tests make out of the user's own folder."""
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize("name", METHODS)
def test_a_formula_is_set_with_indices_and_powers_and_keeps_its_text(name):
    formula = METHODS[name].formula
    shown = unescape(re.sub(r"</?(?:i|sub|sup)>", "", formula_html(formula)))
    assert not set(shown) & set("_^<>~")
    plain = {"lambda": "λ", "rho": "ρ", "gamma": "γ", "sum_": "∑_", "d(?=W)": "Δ", "'": "′"}
    plain |= {r"\^T": "⊤", " - ": " − ", r"\^-": "−", "~": "∼", "[_^]": ""}
    for sign, set_as in plain.items():
        formula = re.sub(sign, set_as, formula)
    assert shown == formula


def test_every_method_is_offered() -> None:
    names = {name for _, name in list_methods()["choices"]}
    assert names == set(METHODS) - {"ip_merging"} | {""}


def test_every_parameter_of_every_method_has_a_field_with_its_default_and_help() -> None:
    for method in METHODS.values():
        for parameter in method.parameters:
            field = _field(parameter, {})
            assert field.value == parameter.default
            assert parameter.bounds.help in field.info


@pytest.mark.parametrize(
    ("method", "parameter", "kind"),
    [
        ("ties", "density", gr.Slider),
        ("ties", "mllm_weight", gr.Slider),
        ("ties", "math_density", gr.Textbox),
        ("ties", "normalize", gr.Dropdown),
        ("ties", "election", gr.Dropdown),
        ("wudi", "iterations", gr.Number),
        ("wudi", "learning_rate", gr.Number),
        ("slerp", "t", gr.Slider),
    ],
)
def test_a_field_fits_its_parameter(method: str, parameter: str, kind: type) -> None:
    (found,) = [p for p in METHODS[method].parameters if p.name == parameter]
    field = _field(found, {})
    assert isinstance(field, kind)
    if isinstance(field, gr.Slider):
        assert field.minimum <= found.default <= field.maximum


def test_the_default_is_the_plan_from_explore() -> None:
    choice = PlanChoice(0.3, 2.0)
    plan = chosen_plan(DEMO, choice, MethodChoice())
    assert (plan.method, plan.similarity_threshold) == ("ip_merging", 0.3)


def test_values_become_the_plans_parameters_and_defaults_fill_the_rest() -> None:
    chosen = MethodChoice("ties")
    values = (("density", 0.4), ("normalize", "count"), ("math_weight", 1), ("math_density", "0.5"))
    for name, value in values:
        chosen = with_value(name, "ties", chosen, value)
    plan = chosen_plan(DEMO, PlanChoice(), chosen)
    assert plan.method == "ties"
    assert dict(plan.parameters) == METHODS["ties"].complete(
        {"density": 0.4, "normalize": "count", "math_weight": 1.0, "math_density": 0.5}
    )
    assert len(plan.selected) == len(plan.decisions)


def test_a_late_value_of_another_methods_field_changes_nothing() -> None:
    chosen = MethodChoice("slerp", {"t": 0.2})
    assert with_value("density", "ties", chosen, 0.4) == chosen


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("density", 0.0, "density is"),
        ("density", 2, "density is"),
        ("math_density", "much", "math_density is 'much'"),
    ],
)
def test_a_value_out_of_range_is_refused_in_words_and_nothing_may_start(
    name: str, value: Any, words: str
) -> None:
    chosen = with_value(name, "breadcrumbs", MethodChoice("breadcrumbs"), value)
    with pytest.raises(PlanError, match=words):
        chosen_plan(DEMO, PlanChoice(), chosen)
    found = readiness(Backend(), DEMO, PlanChoice(), chosen)
    assert not found.ready
    assert "density is" in found.findings[0].message + found.findings[0].remedy


def test_the_confirmation_previews_what_is_affine_and_says_why_not_otherwise() -> None:
    affine = chosen_plan(DEMO, PlanChoice(), MethodChoice("task_arithmetic"))
    assert "% (relative Frobenius norm)" in describe_change(affine)
    other = chosen_plan(DEMO, PlanChoice(), MethodChoice("ties"))
    assert "not previewable" in describe_change(other)
    near = chosen_plan(DEMO, PlanChoice(), MethodChoice("dare_linear"))
    assert "approximate: expected over the random drops" in describe_change(near)
    found = readiness(Backend(), DEMO, PlanChoice(), MethodChoice("ties"))
    assert found.ready
    assert "28 of 28 decoder matrices" in found.confirmation
    assert "not previewable" in found.confirmation
    assert "two_base" in found.confirmation


# --- what a plan is told beside its method ---


def test_every_option_has_a_field_and_every_field_an_option() -> None:
    for option in FIELDS:
        field = _option_field(option)
        assert field.info == option.help
        if option.choices:
            offered_values = {value for _, value in field.choices}
            assert offered_values >= set(option.choices)
    assert set(ANCHORS) == {"inject", "two_base", "root", "interp"}


def test_options_reach_the_plan_of_any_method_and_stay_when_another_is_chosen() -> None:
    chosen = MethodChoice("task_arithmetic")
    for name, text in (
        ("include", "mlp"),
        ("exclude", r"layers\.0\."),
        ("layer_gains", "0, 1"),
        ("norms", "merge"),
        ("anchor", "interp"),
    ):
        chosen = with_option(name, chosen, text)
    plan = chosen_plan(DEMO, PlanChoice(), chosen)
    assert len(plan.selected) == 9
    assert (plan.options.norms, plan.anchor, plan.options.layer_gains) == (
        "merge",
        "interp",
        (0.0, 1.0),
    )
    other = with_method(chosen, "ties")
    assert other.values == {}
    assert chosen_plan(DEMO, PlanChoice(), other).options.include == "mlp"
    explored = with_option("norms", with_method(chosen, ""), "")
    explored = with_option("anchor", explored, "")
    plan = chosen_plan(DEMO, PlanChoice(0.0), explored)
    assert (plan.method, len(plan.selected)) == ("ip_merging", 9)


def test_norms_that_merge_are_not_said_to_stay() -> None:
    chosen = with_option("norms", MethodChoice("task_arithmetic"), "merge")
    found = readiness(Backend(), DEMO, PlanChoice(), chosen)
    assert ", 9 norms;" in found.confirmation
    assert "norm: only matrices" not in found.confirmation


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("layer_gains", "up", "expected numbers such as 0 0.5 1"),
        ("layer_gains", "1 -1", "A layer gain is -1.0"),
        ("include", "(", "not a valid regular expression"),
        ("norms", "burn", "norms is 'burn'"),
    ],
)
def test_an_option_that_is_none_is_refused_in_words(option: str, text: str, words: str) -> None:
    chosen = with_option(option, MethodChoice("task_arithmetic"), text)
    with pytest.raises(PlanError, match=words.replace("(", r"\(")):
        chosen_plan(DEMO, PlanChoice(), chosen)


@pytest.mark.parametrize("pattern", [r"(\w+\.)+mlp", r"([a-z]+)*.up", r"mlp|layers\.0\."])
def test_any_pattern_of_a_stranger_ends(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setenv("SPACE_ID", "org/space")
    chosen = with_option("include", MethodChoice("ties"), pattern)
    assert chosen_plan(DEMO, PlanChoice(), chosen).selected


def test_a_pattern_is_linear_in_the_length_of_a_name_and_bounded() -> None:
    name = "a" * 200_000 + "!"  # a backtracking engine takes 2^200000 steps for one of these
    for pattern in ("(a+)+$", "(a|aa)+$", "(a|a?)+!!", "(.*a){20}$", "^(([a-z])+.)+[A-Z]$"):
        assert compile_pattern(pattern).search(name) is None
    with pytest.raises(PlanError, match="has 1001 characters; the maximum is 1000"):
        PlanOptions(include="a" * 1001)
    for pattern in ("(?=a)", r"(a)\1", "a{1001}", "(((a{100}){100}){100})", "\udcff"):
        with pytest.raises(PlanError, match="is not a valid regular expression"):
            PlanOptions(exclude=pattern)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (MethodChoice("layer_swap"), "With these parameters, the merged model would be identical"),
        (MethodChoice("ties", options={"include": "nothing"}), "No matrix is in the plan's scope"),
    ],
)
def test_a_plan_that_changes_nothing_says_so(chosen: MethodChoice, words: str) -> None:
    found = readiness(Backend(), DEMO, PlanChoice(), chosen)
    assert found.ready
    assert any(words in finding.message for finding in found.findings)


# --- calibrations ---


def wait_for(backend: Backend, job: str) -> JobStatus:
    while (status := backend.store.status(job)).is_running:
        time.sleep(0.1)
    return status


def test_a_method_that_needs_samples_asks_for_them() -> None:
    found = readiness(Backend(), DEMO, PlanChoice(), MethodChoice("regmean"))
    assert not found.ready
    assert "press Calibrate" in found.findings[0].message + found.findings[0].remedy
    view = calibration_form.calibration_view(Backend(), DEMO, MethodChoice("regmean"), {}, "")
    assert "the Gram matrices of the layer inputs" in view.intro
    assert "MB of statistics" in view.intro
    assert (view.folders["choices"], view.choice.calibration) == ([], "")
    assert calibration_form.calibration_view(Backend(), DEMO, MethodChoice("ties"), {}, "") is None


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_calibration_is_made_found_and_merged_with(method: str, home: Path) -> None:
    backend = Backend()
    started = backend.start_calibration(DEMO, str(METHODS[method].data), "demo", "demo", 2)
    view = RunView("calibration")
    running = find_run(backend, started._asdict())
    assert "Calibrate mllm-" in view.updates(running)[view.progress]
    assert calibration_form.made_by(running) == ""
    status = wait_for(backend, started.id)
    assert status.state == "finished", status.error
    run = find_run(backend, started._asdict())
    updates, made = view.updates(run), calibration_form.made_by(run)
    assert "4 of 4 passes" in updates[view.progress]
    assert Path(made).parent == home / "calibrations"
    shown = calibration_form.calibration_view(backend, DEMO, MethodChoice(method), {}, made)
    chosen = shown.choice
    assert shown.folders["value"] == chosen.calibration == made
    found = readiness(backend, DEMO, PlanChoice(), chosen)
    assert found.ready, found.findings
    warned = any("fewer tokens" in finding.message for finding in found.findings)
    assert warned == (method == "regmean")
    run = backend.start_merge(chosen_plan(DEMO, PlanChoice(), chosen), "merged")
    assert wait_for(backend, run.id).state == "finished"
    manifest = json.loads((home / "models" / "merged" / "ipmerge.json").read_text())
    assert manifest["plan"]["method"] == method
    assert "2 + 2 samples · demo" in shown.folders["choices"][0][0]
    other = MethodChoice("fisher" if method == "regmean" else "regmean")
    shown = calibration_form.calibration_view(backend, DEMO, other, {}, made)
    assert shown.choice.calibration == ""


def test_the_chosen_calibration_is_of_its_pair_and_stays_chosen(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one is selected once; a later choice stays, also in the next visit."""
    backend, method = Backend(), MethodChoice("regmean")
    first, second, other = (str(home / "calibrations" / name) for name in ("a", "b", "o"))
    finished = {"one": [first, second], "two": [other]}
    monkeypatch.setattr(
        Backend, "finished_calibrations", lambda _, pack, __: map(Path, finished[pack])
    )
    monkeypatch.setattr(Backend, "calibration_cost", lambda *_: CalibrationCost(1, 1, 1, 1, 1))
    monkeypatch.setattr(calibration_form, "_label", lambda folder: folder)
    memory: dict[str, str] = {}

    def open_form(pack: str, made: str = "") -> str:
        view = calibration_form.calibration_view(backend, pack, method, memory, made)
        memory.update(view.memory)
        assert view.folders["value"] == (view.choice.calibration or None)
        return view.choice.calibration

    assert open_form("one") == second, "the newest"
    assert open_form("one", made=first) == first, "the one that has just been made"
    memory["gram of one"] = second  # the visitor chooses
    assert open_form("one", made=first) == second
    assert open_form("two", made=first) == other, "never that of another pair"
    assert open_form("one", made=first) == second
    memory["gram of two"] = str(home / "own")  # a path that was typed
    assert open_form("two") == str(home / "own")
    assert open_form("one") == second
    backend.hosted = True
    assert open_form("two") == other, "on a Space only what is listed"
    del finished["one"][1]
    assert open_form("one") == first


def test_a_stranger_cannot_use_other_files_or_see_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(hosted=True)
    with pytest.raises(RunError, match="demo samples"):
        backend.start_calibration(DEMO, "gram", "/etc/passwd", "demo", 2)
    with pytest.raises(RunError, match="demo samples"):
        backend.start_calibration(DEMO, "gram", "demo:perception", "demonstration.jsonl", 2)
    for seen in ("demo", "demo:perception"):
        with pytest.raises(RunError, match="limit of 0 .*; expected 1 to 5000"):
            backend.start_calibration(DEMO, "gram", seen, "demo", 0)
    assert find_run(backend, {}).status is None


# --- words about runs ---


def status_with(step: dict[str, Any]) -> JobStatus:
    return JobStatus("0", "A run", "running", step, {}, 0.0, 10.0)


def test_a_first_pass_is_told_from_the_merge() -> None:
    step = {
        "tensor": "model.layers.0.mlp.up_proj.weight",
        "index": 3,
        "total": 28,
        "nbytes_done": 5_000_000,
        "nbytes_total": 10_000_000,
    }
    words = progress_html(status_with({**step, "action": "measured"}))
    assert "3 of 28 matrices measured (first pass)" in words
    assert "3 of 28 tensors" in progress_html(status_with({**step, "action": "merged"}))


def test_a_calibration_counts_passes() -> None:
    step = {"role": "math", "group": 0, "groups": 2, "done": 5, "total": 20, "action": "measured"}
    words = progress_html(status_with(step))
    assert "5 of 20 passes" in words
    assert "math model, part 1 of 2" in words
    assert "left" not in words  # nothing is known of its speed after one step
    first = replace(status_with(step), first={**step, "done": 2}, since=8.0)
    words = progress_html(first)
    assert "about 10 seconds left" in words
    assert "MB/s" not in words


@pytest.mark.parametrize("resumed", [0, 90_000_000])
def test_speed_and_time_left_count_only_what_this_run_did(resumed: int) -> None:
    step = {"tensor": "a", "index": 1, "total": 9, "action": "merged", "nbytes_total": 200_000_000}
    step["nbytes_done"] = resumed + 50_000_000
    status = status_with(step)
    words = progress_html(replace(status, first={**step, "nbytes_done": resumed}, since=5.0))
    assert "10 MB/s" in words
    assert f"about {(150_000_000 - resumed) // 10_000_000} seconds left" in words


def test_a_run_says_what_it_does_before_its_first_step_and_after_the_last() -> None:
    words = {
        "starting": "starting a process",
        "importing": "importing libraries",
        "opening": "opening the models",
    }
    for phase, expected in words.items():
        shown = progress_html(replace(status_with({}), phase=phase))
        assert expected in shown
        assert "left" not in shown
    step = {"tensor": "a", "index": 9, "total": 9, "nbytes_done": 5, "nbytes_total": 5}
    assert "verifying and finishing" in progress_html(status_with(step))


def test_steps_of_wudi_are_part_of_the_time(tmp_path: Path) -> None:
    few, many = (
        estimate_merge(
            chosen_plan(DEMO, PlanChoice(), MethodChoice("wudi", {"iterations": n})), tmp_path
        ).seconds
        for n in (1, 3000)
    )
    assert many > 10 * few
