"""Sweeps and knock-outs on the demo models: as from folders, resumable, and nothing is repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.evaluation import merged_models
from ipmerge_core.evaluation.cuts import Cut, cut_tensors, matrices_of_model
from ipmerge_core.evaluation.evaluate import EvaluationSettings, iter_evaluation
from ipmerge_core.evaluation.knockout import (
    CutChoice,
    Knockout,
    iter_knockout,
    iter_knockout_to,
    iter_model_knockout,
    read_choice,
)
from ipmerge_core.evaluation.merged_models import MergedModels
from ipmerge_core.evaluation.points import UNMERGED, Axis, Point
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.subjects import subject_of_folder
from ipmerge_core.evaluation.sweeps import Sweep, iter_ablation, iter_sweep, iter_sweep_to
from ipmerge_core.methods.declarations import drained
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.tasks.registry import find_tasks

DEMO = Path(__file__).parents[1] / "assets" / "demo"
PACK = DEMO / "pack.json.gz"
TWO = EvaluationSettings(limit=2, batch_size=9)  # of each of nine skills
GAINS = Axis("lambda_", (1.0, 8.0))


@pytest.fixture(scope="module")
def analysis():
    return ipm.Analysis.load(PACK)


@pytest.fixture(scope="module")
def tasks():
    return find_tasks(["demo"])


@pytest.fixture(scope="module")
def swept(analysis, tasks, tmp_path_factory):
    """A finished sweep, and the store with its replies."""
    store = ReplyStore(tmp_path_factory.mktemp("store"))
    return drained(
        iter_sweep(analysis, [GAINS], tasks, TWO, store, similarity_threshold=0.1)
    ), store


def texts(report, subject):
    return [judged.text for judged in report.replies[subject]["demo"]]


def stored_lines(store):
    return sorted(
        line for path in store.folder.rglob("*.jsonl") for line in path.read_text().splitlines()
    )


# --- sweeps ---


def test_a_point_answers_as_the_model_that_a_merge_writes(analysis, tasks, swept, tmp_path):
    found, _ = swept
    plan = ipm.make_plan(analysis, similarity_threshold=0.1, lambda_=8.0)
    ipm.merge(plan, tmp_path / "merged")
    subjects = [subject_of_folder(DEMO / "mllm"), subject_of_folder(tmp_path / "merged")]
    report = drained(iter_evaluation(subjects, tasks, TWO, ReplyStore(tmp_path / "store")))
    assert texts(found.report, "lambda 8") == texts(report, "merged")
    assert texts(found.report, UNMERGED) == texts(report, "mllm")
    assert texts(report, "merged") != texts(report, "mllm")


def test_a_sweep_describes_its_points_and_compares_them_with_the_unmerged_model(analysis, swept):
    found, _ = swept
    assert found.kind == "sweep"
    assert [point.label for point in found.points] == [UNMERGED, "lambda 1", "lambda 8"]
    assert list(found.report.subjects) == [point.label for point in found.points]
    assert len(found.points[2].selected) == 13
    assert found.points[2].relative_change == pytest.approx(8 * found.points[1].relative_change)
    assert {each.first for each in found.report.comparisons} == {UNMERGED}
    again = ipm.make_plan(analysis, **found.points[2].arguments)
    assert again.digest == found.points[2].digest


def test_a_finished_sweep_answers_nothing_again_and_loads_no_model(
    analysis, tasks, swept, monkeypatch
):
    found, store = swept
    monkeypatch.setattr(MergedModels, "_model", lambda *_: pytest.fail("a model was loaded"))
    steps = iter_sweep(analysis, [GAINS], tasks, TWO, store, similarity_threshold=0.1)
    again = drained(steps)
    assert again.report.replies == found.report.replies


@pytest.mark.parametrize("batches", [1, 3])
def test_a_stopped_sweep_repeats_no_item(analysis, tasks, swept, tmp_path, batches):
    """The generator is closed after some batches, as by a cancelled run."""
    found, _ = swept
    store = ReplyStore(tmp_path)
    steps = iter_sweep(analysis, [GAINS], tasks, TWO, store, similarity_threshold=0.1)
    for step in steps:
        if step.action == "answered" and step.done == 9 * batches:
            steps.close()
    before = stored_lines(store)
    assert len(before) == 9 * batches
    rest = iter_sweep(analysis, [GAINS], tasks, TWO, store, similarity_threshold=0.1)
    counts = []
    while True:
        try:
            counts.append(next(rest))
        except StopIteration as end:
            again = end.value
            break
    after = stored_lines(store)
    assert set(before) <= set(after)
    assert len(after) == 3 * 18
    assert sum(step.action == "answered" for step in counts) == 6 - batches
    for name in found.report.subjects:
        assert texts(again.report, name) == texts(found.report, name)


def test_plans_with_the_same_decisions_are_answered_once(analysis, tasks, tmp_path):
    """Thresholds between two similarities select the same matrices."""
    axis = Axis("similarity_threshold", (0.21, 0.2100001, 1.0))
    found = drained(iter_sweep(analysis, [axis], tasks, TWO, ReplyStore(tmp_path), lambda_=8.0))
    first, second, nothing = found.points[1:]
    assert first.digest == second.digest
    assert not nothing.selected
    assert len(stored_lines(ReplyStore(tmp_path))) == 2 * 18
    assert texts(found.report, nothing.label) == texts(found.report, UNMERGED)


def test_the_model_has_its_own_weights_again_after_every_point(analysis):
    import torch

    plan = ipm.make_plan(analysis, method="task_arithmetic", math_weight=2.0)
    with MergedModels(analysis.sources) as models:
        loaded = models._model("cpu")
        before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        for cut in (None, Cut(1, "mlp", "zero")):
            with models.subject(Point("merged", plan), cut).loaded("cpu") as merged:
                inside = merged.model.state_dict()
                assert any(not torch.equal(inside[name], before[name]) for name in before)
        after = loaded.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("kept", "merged"), [(1, 4), (2, 2)])
def test_the_last_merges_are_kept_and_no_more(analysis, kept, merged, monkeypatch):
    made, iterate = [], merged_models.iter_merged_tensors

    def counted(plan, **more):
        made.append(plan)
        return iterate(plan, **more)

    monkeypatch.setattr(merged_models, "iter_merged_tensors", counted)
    points = [
        Point(f"{weight}", ipm.make_plan(analysis, method="task_arithmetic", math_weight=weight))
        for weight in (0.5, 1.0)
    ]
    with MergedModels(analysis.sources, kept=kept) as models:
        for point in (*points, *points, points[-1]):
            assert set(models.tensors(point)) == {record.mllm_name for record in analysis.records}
    assert len(made) == merged


def test_a_result_is_read_as_it_was_written_and_damaged_ones_are_refused(swept, tmp_path):
    found, _ = swept
    path = tmp_path / "sweep.json"
    found.save(path)
    assert Sweep.load(path) == found
    content = json.loads(path.read_text())
    for change in ({"format": "other"}, {"version": 99}, {"points": 3}, {"report": {}}):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(RunError):
            Sweep.load(path)
    with pytest.raises(RunError):
        Knockout.load(path)


def test_an_ablation_has_every_part_and_control(analysis, tasks, tmp_path):
    how = {"similarity_threshold": 0.1, "lambda_": 8.0, "seeds": (0, 1)}
    found = drained(iter_ablation(analysis, tasks, TWO, ReplyStore(tmp_path), **how))
    assert found.kind == "ablation"
    assert found.axes == ()
    assert [point.permuted for point in found.points] == [None] * 7 + [0, 1]
    full = next(point for point in found.points if point.label == "full")
    sizes = {point.label: point.relative_change for point in found.points}
    assert sizes["gamma permuted, seed 0"] == full.relative_change
    assert texts(found.report, "gamma permuted, seed 0") != texts(found.report, "full")


def test_a_run_of_the_app_writes_its_result_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    axes = [{"parameter": "lambda_", "values": [4.0]}]
    out = tmp_path / "sweep.json"
    steps = iter_sweep_to(str(PACK), str(out), ["demo:math"], axes, limit=1)
    assert not out.exists()
    last = list(steps)[-1]
    assert (last.done, last.total) == (18, 18)  # math and its perception guard
    assert [facts.name for facts in Sweep.load(out).report.tasks] == [
        "demo:math",
        "demo:perception",
    ]
    for neither in ({}, {"ablation": True, "axes": axes}):
        with pytest.raises(RunError, match="one of the two"):
            next(iter_sweep_to(str(PACK), str(out), ["demo"], **neither))


# --- knock-out ---


def test_a_cut_answers_as_a_model_that_was_written_with_it(analysis, tasks, tmp_path):
    model = Checkpoint.open(DEMO / "mllm")
    written = shutil.copytree(DEMO / "mllm", tmp_path / "cut")
    weights = load_file(written / "model.safetensors")
    weights |= dict(cut_tensors(Cut(1, "mlp"), matrices_of_model(model), model))
    save_file(weights, written / "model.safetensors", metadata={"format": "pt"})
    subjects = [subject_of_folder(DEMO / "mllm"), subject_of_folder(written)]
    report = drained(iter_evaluation(subjects, tasks, TWO, ReplyStore(tmp_path / "a")))
    choice = CutChoice(modules=("mlp",), layers=(1,))
    plan = ipm.make_plan(analysis, similarity_threshold=0.1, lambda_=8.0)
    alone = drained(
        iter_model_knockout(DEMO / "mllm", tasks, choice, TWO, ReplyStore(tmp_path / "b"))
    )
    both = drained(iter_knockout(plan, tasks, choice, TWO, ReplyStore(tmp_path / "c")))
    name = "without mlp of layer 1"
    assert texts(alone.reports["mllm"], f"mllm, {name}") == texts(report, "cut")
    assert texts(both.reports[UNMERGED], f"{UNMERGED}, {name}") == texts(report, "cut")
    assert list(both.reports) == [UNMERGED, "merged"]


def test_without_layer_0_the_demo_reads_nothing_before_and_after_merging(analysis, tasks, tmp_path):
    plan = ipm.make_plan(analysis, method="task_arithmetic", math_weight=1.0)
    choice, settings = CutChoice(layers=(0,)), EvaluationSettings(limit=5)
    found = drained(iter_knockout(plan, tasks, choice, settings, ReplyStore(tmp_path)))
    rows = [row for row in found.rows() if row["part"] == "perception"]
    assert len(rows) == 2 * 2
    for row in rows:
        assert row["uncut_right"] >= 15
        assert row["right"] <= 5
        assert row["accuracy_change"] == pytest.approx((row["right"] - row["uncut_right"]) / 20)
    lines = found.to_csv().splitlines()
    assert len(lines) == 1 + len(list(found.rows()))
    assert lines[0].startswith("model,layer,module,replaced_by,task,part,right,n")
    path = tmp_path / "knockout.json"
    found.save(path)
    assert Knockout.load(path) == found


def test_removing_the_update_of_every_layer_alone_is_done_for_the_merge_only(
    analysis, tasks, tmp_path
):
    plan = ipm.make_plan(analysis, method="task_arithmetic", math_weight=1.0)
    choice = read_choice({"value": "update", "modules": ["mlp"], "stride": 3})
    found = drained(iter_knockout(plan, tasks, choice, TWO, ReplyStore(tmp_path)))
    assert list(found.reports) == ["merged"]
    assert [(cut.layer, cut.value) for cut in found.cuts] == [(0, "update"), (3, "update")]


def test_a_merged_folder_knows_the_models_of_its_merge(analysis, tasks, tmp_path):
    plan = ipm.make_plan(analysis, method="task_arithmetic", math_weight=1.0)
    ipm.merge(plan, tmp_path / "merged")
    choice = CutChoice("update", ("mlp",), (1,))
    store = ReplyStore(tmp_path / "store")
    folder = drained(iter_model_knockout(tmp_path / "merged", tasks, choice, TWO, store))
    memory = drained(iter_knockout(plan, tasks, choice, TWO, store))
    first, second = (list(found.reports["merged"].replies.values()) for found in (folder, memory))
    assert [r["demo"] for r in first] == [r["demo"] for r in second]
    with pytest.raises(PlanError, match="models of a merge"):
        drained(iter_model_knockout(DEMO / "mllm", tasks, choice, TWO, ReplyStore(tmp_path / "x")))


@pytest.mark.parametrize(
    "values", [{"value": "ones"}, {"stride": "x"}, {"layers": ["a"]}, {"colour": 1}]
)
def test_a_choice_that_is_not_valid_is_refused(values):
    with pytest.raises(PlanError, match="not valid"):
        read_choice(values)


def test_a_knock_out_of_the_app_writes_its_result(analysis, tmp_path, monkeypatch):
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    plan = ipm.make_plan(analysis, similarity_threshold=0.1, lambda_=8.0)
    choice = {"modules": ["attention"], "layers": [2]}
    out = tmp_path / "knockout.json"
    steps = list(iter_knockout_to(plan, str(out), ["demo"], choice=choice, limit=1))
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total == 2 * 2 * 9
    assert Knockout.load(out).plan == plan.hash


# --- the command line ---


def run(capsys, *arguments):
    code = main([*map(str, arguments), "--quiet"])
    return code, capsys.readouterr()


def test_the_commands_write_results_and_print_intervals_and_tests(tmp_path, capsys):
    common = ["--tasks", "demo:math", "--limit", 1, "--store", tmp_path / "store"]
    code, shown = run(
        capsys, "sweep", PACK, "--parameter", "lambda", "--values", "1,8", "--parameter2",
        "similarity-threshold", "--values2", "0,0.2", *common, "-o", tmp_path / "sweep.json",
    )  # fmt: skip
    assert code == 0, shown.err
    assert "lambda 8, similarity threshold 0.2" in shown.out
    assert "Demo, perception" in shown.out  # the guard
    assert "Small sample" in shown.out
    assert len(Sweep.load(tmp_path / "sweep.json").points) == 5
    plan = tmp_path / "plan.json"
    assert run(capsys, "plan", PACK, "--similarity-threshold", 0.1, "-o", plan)[0] == 0
    code, shown = run(
        capsys, "knockout", plan, "--modules", "q", "--stride", 2, "--replace-by", "zero", *common,
        "--csv", tmp_path / "rows.csv", "-o", tmp_path / "knockout.json",
    )  # fmt: skip
    assert code == 0, shown.err
    assert "layer 2 q (zero)" in shown.out
    assert "layer 1 q" not in shown.out
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    assert rows[1].startswith("unmerged,0,q,zero,demo:math,all,")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", PACK], "Specify what to vary"),
        (["sweep", PACK, "--parameter", "lambda"], "belong together"),
        (["sweep", PACK, "--parameter", "lambda", "--values", "x"], "lambda"),
        (["sweep", PACK, "--parameter", "lambda", "--values", "1", "--ablation"], "no effect"),
        (["sweep", PACK, "--ablation", "--controls", "-1"], "--controls is -1"),
        (["sweep", PACK, "--parameter", "lambda", "--values", "1", "--controls", "1"], "no effect"),
        (["knockout", DEMO / "mllm", "--layers", "a"], "--layers is 'a'"),
        (["knockout", DEMO / "mllm", "--layers", "9"], "no layer 9"),
        (["knockout", DEMO / "mllm", "--base", "x"], "no effect with a model folder"),
        (["knockout", DEMO / "nothing"], "nothing"),
        (["knockout", DEMO / "mllm", "--stride", "0"], "stride is 0"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(tmp_path, capsys, arguments, message):
    out = tmp_path / "out.json"
    code, shown = run(capsys, *arguments, "--tasks", "demo", "--limit", 1, "-o", out)
    assert code == 2
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert not out.exists()
