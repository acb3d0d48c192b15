"""The Evaluate tab without a browser: what is started, shown, taken and opened."""

from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from event_loops import in_loop
from PIL import Image

from ipmerge_core.errors import IPMergeError, PlanError, RunError
from ipmerge_core.evaluation.evaluate import EvaluationSettings
from ipmerge_core.evaluation.knockout import CutChoice, iter_knockout
from ipmerge_core.evaluation.points import UNMERGED, Axis
from ipmerge_core.evaluation.sweeps import iter_models_to, iter_sweep
from ipmerge_core.methods.declarations import drained
from ipmerge_core.tasks.registry import find_tasks
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.evaluate.content import recipe_of_point
from ipmerge_core.ui.evaluate.form import lay_out_form, listed_tasks
from ipmerge_core.ui.evaluate.results import read_result
from ipmerge_core.ui.evaluate.start import Asked, Varied, start_evaluation
from ipmerge_core.ui.evaluate.tab import result_file, result_items, taken, turn_of_item
from ipmerge_core.ui.explore.tab import content_of
from ipmerge_core.ui.knockout_files import read_knockout
from ipmerge_core.ui.method_choice import MethodChoice
from ipmerge_core.ui.pairs import load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of
from ipmerge_core.ui.runs import results_folder

PAIR = "pack"
PLAN = PlanChoice(0.1, 8.0)
SWEEP, ARITHMETIC, KNOCKOUT = (
    f"{kind}-{digit * 16}" for kind, digit in (("sweep", "1"), ("sweep", "2"), ("knockout", "3"))
)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A home folder with three finished results."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPMERGE_HOME", str(folder))
        analysis, tasks = analysis_of(PAIR), find_tasks(["demo"])
        how = EvaluationSettings(limit=2)
        swept = iter_sweep(
            analysis, [Axis("lambda_", (4.0, 8.0))], tasks, how, similarity_threshold=0.1
        )
        drained(swept).save(_made(SWEEP))
        other = iter_sweep(
            analysis, [Axis("math_weight", (1.0,))], tasks, how, method="task_arithmetic"
        )
        drained(other).save(_made(ARITHMETIC))
        plan = ChosenMerge(PAIR, PLAN).make_plan()
        cut = iter_knockout(plan, tasks, CutChoice(layers=(0,), modules=("mlp",)), how)
        drained(cut).save(_made(KNOCKOUT))
        yield folder


def _made(result):
    results_folder().mkdir(parents=True, exist_ok=True)
    return results_folder() / f"{result}.json"


# --- content ---


def test_a_sweep_is_shown_with_math_and_perception_tests_masks_and_limits():
    content = read_result(SWEEP, PAIR).content
    assert [task["group"] for task in content["tasks"]] == ["math", "perception"]
    assert content["axes"] == [{"parameter": "lambda_", "label": "λ", "values": [4.0, 8.0]}]
    first, _, last = content["points"]
    assert first["label"] == UNMERGED
    assert not first["takes"]
    assert last["choice"] == PLAN.to_browser()
    assert last["takes"]
    assert last["mask"].count("1") == last["matrices"] == 13
    assert len(last["mask"]) == len(content["layers"]) * len(content["modules"]) == 28
    score = last["scores"]["demo/math"]
    assert score["n"] == 10
    assert score["fixed"] - score["broken"] == score["right"] - 0
    assert 0 <= score["low"] <= score["right"] / 10 <= score["high"] <= 1
    notes = " ".join(content["notes"])
    assert "Small sample" in notes
    assert "difference of 2 points" in notes
    assert "not an official number" in notes
    json.dumps(content, allow_nan=False)


def test_a_knock_out_is_shown_for_both_models_and_for_the_map():
    content = read_result(KNOCKOUT, PAIR).content
    assert {cut["model"] for cut in content["cuts"]} == {"unmerged", "merged"}
    for cut in content["cuts"]:
        score = cut["scores"]["demo/perception"]
        assert (score["broken"] - score["fixed"]) / score["n"] > 0.5  # layer 0 reads
    changes = read_result(KNOCKOUT, PAIR).knockout.summary().changes
    assert changes["unmerged perception"]["0.mlp"] < -0.5


def test_a_report_is_one_file_that_names_no_path_and_runs_no_text(home):
    page = result_file([SWEEP, PAIR, "html"])
    assert "<script src" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert str(home) not in page
    assert "data:image/jpeg;base64," in page  # the items that differ
    stored = json.loads(result_file([SWEEP, PAIR, "json"]))
    assert stored["format"] == "ipmerge-sweep"
    assert "knock-out" in result_file([KNOCKOUT, PAIR, "html"])


@pytest.mark.parametrize(
    "asked",
    [None, [], [SWEEP, PAIR], ["../../etc/passwd", PAIR, "json"], ["sweep-0", PAIR, "json"],
     [f"sweep-{'9' * 16}", PAIR, "json"]],
)  # fmt: skip
def test_what_is_no_result_is_refused(asked):
    with pytest.raises(RunError):
        result_file(asked)


# --- items and plans ---


def test_items_that_differ_are_listed_with_small_images():
    found = result_items([SWEEP, PAIR, 2])
    content = read_result(SWEEP, PAIR).content["points"][2]["scores"]
    expected = sum(score["fixed"] + score["broken"] for score in content.values())
    assert found["flipped"] == len(found["flips"]) == expected > 0
    flip = found["flips"][0]
    data = flip["image"].removeprefix("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (112, 112)
    assert flip["outcome"] in ("fixed", "broken")
    assert "Select a merged model" in result_items([SWEEP, PAIR, 0])["reason"]
    assert result_items([SWEEP, PAIR, "x"])["reason"]
    assert result_items([KNOCKOUT, PAIR, 1])["reason"]


def test_an_item_opens_as_a_turn_with_both_answers(tmp_path):
    flip = result_items([SWEEP, PAIR, 2])["flips"][0]
    data = {"id": SWEEP, "pack": PAIR, "point": 2, "flip": flip["item"]}
    turn = turn_of_item(data, str(tmp_path))
    assert [side.text for side in turn.answers] == [flip["first"], flip["second"]]
    assert turn.question == flip["question"]
    assert turn.reference.answer == flip["answer"]
    with Image.open(turn.images[0]) as shown:
        assert shown.size == (128, 128)
    assert turn.recorded
    with pytest.raises(RunError, match="not in the result"):
        turn_of_item({**data, "flip": "other"}, str(tmp_path))


def test_a_point_of_the_map_and_of_another_method_can_be_taken():
    now = ChosenMerge(PAIR)
    found = taken(now, {"id": SWEEP, "pack": PAIR, "point": 2})
    assert found.map_plan == PLAN
    other = taken(now, {"id": ARITHMETIC, "pack": PAIR, "point": 1})
    assert other.method.name == "task_arithmetic"
    points = read_result(ARITHMETIC, PAIR).sweep.points
    assert other.make_plan().digest == points[1].digest
    for data in ({"point": 0}, {"point": 9}, {"point": None}, {"point": 1, "id": KNOCKOUT}):
        with pytest.raises(IPMergeError):
            taken(now, {"id": SWEEP, "pack": PAIR, **data})
    with pytest.raises(PlanError, match="Select that pair first"):
        taken(ChosenMerge("other"), {"id": SWEEP, "pack": PAIR, "point": 2})


def test_every_plan_of_a_result_is_made_again_by_what_is_chosen():
    for result in (SWEEP, ARITHMETIC):
        for point in read_result(result, PAIR).sweep.points[1:]:
            recipe = recipe_of_point(point)
            made = ChosenMerge(PAIR, recipe.plan, recipe.method, "explore").make_plan()
            assert made.digest == point.digest


# --- starting ---


class Store:
    """Records what would be started."""

    def start(self, target, arguments, **how):
        self.started = target.__name__, dict(arguments), how
        return


@pytest.fixture
def backend(monkeypatch):
    made = Backend()
    monkeypatch.setattr(made, "store", Store())
    return made


def started(backend, asked, chosen=None):
    start_evaluation(backend, chosen or ChosenMerge(PAIR, PLAN), asked)
    return backend.store.started


@pytest.mark.parametrize("kind", ["models", "sweep", "ablation", "knockout"])
def test_every_kind_starts_its_driver_with_the_chosen_plan(backend, kind):
    varied = (Varied("λ", "1; 2, 4"), Varied())
    asked = Asked(kind, ("demo:math",), 5, 7, varied, replace_by="zero", modules=("q",), stride=2)
    target, arguments, how = started(backend, asked)
    assert arguments["tasks"] == ["demo:math", "demo:perception"]
    assert (arguments["limit"], arguments["seed"]) == (5, 7)
    assert Path(arguments["out"]).name.startswith(f"{kind}-")
    assert how["about"]["kind"] == "evaluation"
    plan = ChosenMerge(PAIR, PLAN).make_plan()
    if kind == "models":
        assert target == "iter_models_to"
        assert arguments["plan"].digest == plan.digest
    elif kind == "knockout":
        assert target == "iter_knockout_to"
        assert arguments["choice"] == {"value": "zero", "modules": ["q"], "stride": 2}
    else:
        assert target == "iter_sweep_to"
        assert arguments["fixed"]["similarity_threshold"] == 0.1
    if kind == "sweep":
        assert arguments["axes"] == [{"parameter": "lambda_", "values": [1.0, 2.0, 4.0]}]
        assert "lambda_" not in arguments["fixed"]
    if kind == "ablation":
        assert arguments["fixed"]["lambda_"] == 8.0


def test_a_sweep_varies_the_parameters_of_the_chosen_method(backend):
    chosen = ChosenMerge(PAIR, method=MethodChoice("ties", {"density": 0.5}), by="merge")
    asked = Asked("sweep", varied=(Varied("density", "0.1, 0.2"), Varied("normalize", "sum")))
    with pytest.raises(PlanError):
        started(backend, asked, chosen)  # normalize has no such value
    asked = Asked("sweep", varied=(Varied("density", "0.1, 0.2"),), limit=1)
    assert started(backend, asked, chosen)[1]["axes"][0]["values"] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked("other"), "Unknown kind"),
        (Asked(tasks=()), "No task"),
        (Asked(tasks=("nothing",)), "Unknown task"),
        (Asked(limit=0), "limit is 0"),
        (Asked("sweep"), "one or two parameters"),
        (Asked("sweep", varied=(Varied("lambda", ""),)), "has no values"),
        (Asked("sweep", varied=(Varied("lambda", "a"),)), "lambda"),
        (Asked("sweep", varied=(Varied("lambda", "1," * 300),)), "characters"),
        (Asked("knockout", replace_by="ones"), "not valid"),
        (Asked(merges=("unknown",)), "unknown"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_run(backend, asked, message):
    if asked.merges:
        backend = Backend()
    with pytest.raises(IPMergeError, match=message):
        start_evaluation(backend, ChosenMerge(PAIR, PLAN), asked)


def laid_out():
    with gr.Blocks():
        return lay_out_form(hosted=False)


@pytest.mark.parametrize(
    ("expert", "tasks"),
    [
        ("elyza/Llama-3-ELYZA-JP-8B", ["mmmu", "mathvista:general"]),
        ("/models/unknown", ["mathvista:math", "mathvista:general", "mathverse", "mmmu"]),
    ],
)
def test_tasks_are_proposed_for_the_skill_of_the_experts(monkeypatch, expert, tasks):
    analysis = analysis_of(PAIR)
    sources = replace(analysis.sources, math=(replace(analysis.sources.math[0], id=expert),))
    monkeypatch.setattr(
        "ipmerge_core.ui.evaluate.form.analysis_of", lambda _: replace(analysis, sources=sources)
    )
    form = in_loop(laid_out)
    found = listed_tasks(form, ChosenMerge(PAIR, PLAN), hosted=False)[form.tasks]
    assert found["choices"][3:] == tasks
    assert find_tasks(tasks)
    assert listed_tasks(form, ChosenMerge(PAIR, PLAN), hosted=True) == {}


def test_a_space_evaluates_the_demo_task_with_few_items(backend, monkeypatch, tmp_path):
    backend.hosted = True
    items = tmp_path / "items.jsonl"
    items.write_text('{"question": "1 + 1", "answer": "2"}\n')
    started(backend, Asked(limit=10))
    for asked in (Asked(limit=5000), Asked(limit=None)):
        with pytest.raises(RunError, match="at most"):
            started(backend, asked)
    with pytest.raises(IPMergeError):
        started(backend, Asked(tasks=(f"jsonl:{items}",), limit=1))


def test_a_run_of_models_writes_a_comparison(tmp_path):
    out = _made(f"models-{'4' * 16}")
    pack = Path(__file__).parents[1] / "assets" / "demo" / "pack.json.gz"
    plan = ChosenMerge(PAIR, PLAN).make_plan()
    steps = iter_models_to(
        str(pack), str(out), ["demo"], plan=plan, plan_name="chosen", limit=1,
        folders={"a copy": str(pack.parent / "mllm")},
    )  # fmt: skip
    assert [step.subject for step in steps if step.action == "resumed"] == [
        UNMERGED, "chosen", "a copy",
    ]  # fmt: skip
    content = read_result(out.stem, PAIR).content
    assert [point["takes"] for point in content["points"]] == [False, True, False]
    assert content["kind"] == "models"


# --- the side file of a knock-out ---


def test_the_map_gets_the_knock_out_next_to_its_pack(home):
    packs = home / "packs"
    packs.mkdir(exist_ok=True)
    pack = Path(__file__).parents[1] / "assets" / "demo" / "pack.json.gz"
    shutil.copy(pack, packs / "own.pack.json.gz")
    assert read_knockout("packs-own") is None
    side = packs / "own.knockout.json"
    read_result(KNOCKOUT, PAIR).knockout.summary().save(side)
    changes = read_knockout("packs-own")
    assert changes["merged math"]["0.mlp"] <= 0
    assert content_of("packs-own", load_pack("packs-own"))["knockout"] == changes
    for damaged in ("{", '{"format": "other"}', '{"changes": 3}'):
        side.write_text(damaged)
        assert read_knockout("packs-own") is None
