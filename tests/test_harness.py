"""Harnesses, with a stand-in for lmms-eval; `make harness` runs the real one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Trio
from peft_adapters import make_adapter
from safetensors.torch import load_file

from ipmerge_core.cli import main
from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.harness import (
    HarnessRun,
    judged_tasks,
    kit_config,
    read_results,
    run_lmms_eval,
    score_lines,
)
from ipmerge_core.models.folding import fold
from ipmerge_core.models.opening import open_model

STAND_IN = """#!{python}
import json, sys
from pathlib import Path
arguments = sys.argv[1:]
assert arguments[:2] == ["-m", "lmms_eval"], arguments
values = dict(zip(arguments[2::2], arguments[3::2]))
folder = Path(values["--output_path"]) / "model"
folder.mkdir(parents=True, exist_ok=True)
(folder / "arguments.json").write_text(json.dumps(arguments))
{action}
"""
WRITES = """
results = {"results": {"mmmu_val": {"alias": "mmmu_val", "mmmu_acc,none": 0.25,
           "mmmu_acc_stderr,none": "N/A", "f1,none": 0.5, "f1_stderr,none": 0.125}}}
(folder / "2026_results.json").write_text(json.dumps(results))
(folder / "2026_samples_mmmu_val.jsonl").write_text('{"doc_id": 0}\\n{"doc_id": 1}\\n')
"""


def stand_in(folder: Path, action: str = WRITES) -> str:
    path = folder / "python"
    path.write_text(STAND_IN.replace("{python}", sys.executable).replace("{action}", action))
    path.chmod(0o755)
    return str(path)


def run_of(trio: Trio, folder: Path, action: str = WRITES, **more: Any) -> HarnessRun:
    values = {"tasks": ("mmmu_val",), "environment": {}, **more}
    return HarnessRun(
        model=values.pop("model", trio.mllm),
        python=stand_in(folder, action),
        output=folder / "out",
        **values,
    )


def test_the_harness_gets_the_model_the_tasks_and_the_limits(trio: Trio, tmp_path: Path) -> None:
    run = run_of(trio, tmp_path, limit=5, batch_size=3, include="tasks", device="cuda:1")
    (score,) = run_lmms_eval(run)
    assert {metric.name: (metric.value, metric.error) for metric in score.metrics} == {
        "mmmu_acc": (0.25, None),
        "f1": (0.5, 0.125),
    }
    assert (score.task, score.n, score.missing) == ("mmmu_val", 2, 0)
    arguments = json.loads((tmp_path / "out" / "model" / "arguments.json").read_text())
    assert arguments == [
        "-m", "lmms_eval", "--model", "llava_hf",
        "--model_args", f"pretrained={trio.mllm},device_map=cuda:1",
        "--tasks", "mmmu_val", "--batch_size", "3", "--device", "cuda:1",
        "--output_path", str(tmp_path / "out"), "--log_samples", "--limit", "5",
        "--include_path", "tasks",
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["mathvista_testmini_cot", "mia_bench", "wildvision_0617"])
def test_a_missing_key_of_the_judge_is_reported_before_the_run(
    task: str, trio: Trio, tmp_path: Path
) -> None:
    assert judged_tasks(["mmmu_val", task]) == [task]
    run = run_of(trio, tmp_path, tasks=("mmmu_val", task))
    with pytest.raises(RunError, match=f"judges {task}, and none of OPENAI_API_KEY"):
        run_lmms_eval(run)
    assert not (tmp_path / "out").exists()
    run_of(trio, tmp_path, tasks=(task,), environment={"OPENAI_API_KEY": "x"}).check()


def test_answers_that_the_judge_did_not_give_are_counted(tmp_path: Path) -> None:
    results = {"results": {"mia_bench": {"gpt_eval_score,none": 0.4, "alias": "mia_bench"}}}
    (tmp_path / "x_results.json").write_text(json.dumps(results))
    samples = [
        {"doc_id": 0, "gpt_eval_score": {"gpt_eval": "8/10"}},
        {"doc_id": 1, "gpt_eval_score": {"gpt_eval": ""}},
        {"doc_id": 2, "gpt_eval_score": {"gpt_eval": None}},
        {"doc_id": 3, "other": ""},
    ]
    lines = "\n".join(map(json.dumps, samples)) + "\nnot json\n"
    (tmp_path / "x_samples_mia_bench.jsonl").write_text(lines)
    (score,) = read_results(tmp_path)
    assert (score.n, score.missing) == (4, 2)
    assert "no answer for 2 of 4 samples" in "\n".join(score_lines([score]))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("print('first'); sys.exit('no such task: x')", "exit code 1: no such task: x"),
        ("pass", "wrote no results"),
        ("print('Error during evaluation: no decord')", "wrote no results.+no decord"),
        ("(folder / 'a_results.json').write_text('[')", "is not a result of lmms-eval"),
        ("(folder / 'a_results.json').write_text('[]')", "it has no results"),
    ],
)
def test_a_harness_that_fails_is_named(
    action: str, message: str, trio: Trio, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        run_lmms_eval(run_of(trio, tmp_path, action))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "is not the name of a task"),
        ({"tasks": ("a; rm -rf b",)}, "'a; rm -rf b' is not the name of a task"),
        ({"python": "/nowhere/python"}, "'/nowhere/python', does not exist"),
    ],
)
def test_what_cannot_run_is_refused(
    change: dict[str, Any], message: str, trio: Trio, tmp_path: Path
) -> None:
    values = {"model": trio.mllm, "tasks": ("mmmu_val",), "python": sys.executable}
    with pytest.raises(RunError, match=message):
        run_lmms_eval(HarnessRun(**{**values, "output": tmp_path, **change}))


def test_a_type_without_a_known_class_needs_its_name(trio: Trio, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"type 'llama'\. Specify its name with --harness-model"):
        run_lmms_eval(run_of(trio, tmp_path, model=trio.math))
    assert run_lmms_eval(run_of(trio, tmp_path, model=trio.math, name="my_model"))


def test_a_path_with_a_comma_is_refused(trio: Trio, tmp_path: Path) -> None:
    run = run_of(trio, tmp_path, model=tmp_path / "a,b")
    with pytest.raises(RunError, match="contains a comma"):
        run.command("llava")


def test_an_adapter_is_folded_into_its_base(trio: Trio, tmp_path: Path) -> None:
    adapter = make_adapter(trio.base, tmp_path / "adapter").folder
    model = open_model(adapter, base=trio.base)
    folder = fold(model, tmp_path / "folded")
    (shard,) = model.shards
    folded, base = load_file(folder / shard), load_file(trio.base / shard)
    assert list(folded) == list(base) or set(folded) == set(base)
    changed = {name for name in base if not folded[name].equal(base[name])}
    assert changed == set(model.changed)
    assert all(folded[name].equal(model.read(name)) for name in folded)
    assert (folder / "config.json").read_bytes() == (trio.base / "config.json").read_bytes()
    assert fold(model, folder) == folder
    run_lmms_eval(run_of(trio, tmp_path, model=adapter, base=str(trio.base), name="my_model"))
    arguments = json.loads((tmp_path / "out" / "model" / "arguments.json").read_text())
    assert "folded-" in arguments[arguments.index("--model_args") + 1]


# --- VLMEvalKit --------------------------------------------------------------------------------


def test_the_configuration_of_vlmevalkit_has_models_and_data(tmp_path: Path) -> None:
    found = kit_config([("merged", tmp_path, "qwen2_5_vl")], ["MathVista_MINI", "MMStar"])
    assert found == {
        "model": {"merged": {"class": "Qwen2VLChat", "model_path": str(tmp_path)}},
        "data": {
            "MathVista_MINI": {"class": "MathVista", "dataset": "MathVista_MINI"},
            "MMStar": {"class": "ImageMCQDataset", "dataset": "MMStar"},
        },
    }
    with pytest.raises(RunError, match="data set 'Cooking'"):
        kit_config([("merged", tmp_path, "qwen2_5_vl")], ["Cooking"])
    with pytest.raises(RunError, match=r"type 'llava' of 'm'\. Specify it with --harness-model"):
        kit_config([("m", tmp_path, "llava")], ["MMStar"])
    named = kit_config([("m", tmp_path, "llava")], ["MMStar"], "LLaVA")
    assert named["model"]["m"]["class"] == "LLaVA"


def test_a_token_that_the_harness_adds_twice_is_reported(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "assets" / "demo" / "mllm"
    plain = Path(shutil.copytree(demo, tmp_path / "plain"))
    template = (demo / "chat_template.jinja").read_text()
    (plain / "chat_template.jinja").write_text(template.replace("{{- bos_token }}", "", 1))
    notes = {}
    for model in (demo, plain):
        values = {"tasks": ("mmmu_val",), "environment": {}}
        run = HarnessRun(
            model=model, python=stand_in(tmp_path), output=tmp_path / model.name / "out", **values
        )
        scores = run_lmms_eval(run)
        notes[model.name] = scores[0].note
        assert (notes[model.name] in list(score_lines(scores))) == bool(notes[model.name])
    assert notes["plain"] == ""
    assert notes["mllm"].startswith("The chat template of 'mllm' writes the BOS token")


def test_the_command_runs_and_writes(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["evaluate", str(trio.mllm), "--tasks", "MMStar", "--harness"]
    config = tmp_path / "config.json"
    words = ["--harness-model", "LLaVA", "-o", str(config)]
    assert main([*common, "vlmevalkit", *words]) == 0
    assert "run.py --config" in capsys.readouterr().out
    assert json.loads(config.read_text())["data"]["MMStar"]["class"] == "ImageMCQDataset"
    assert main([*common, "vlmevalkit", *words[:2]]) == 2
    assert "Specify the configuration file with -o" in capsys.readouterr().err
    assert main([*common, "lmms-eval"]) == 2
    assert "--harness-python" in capsys.readouterr().err
    harness = ["--harness-python", stand_in(tmp_path), "--store", str(tmp_path / "store")]
    result = tmp_path / "r.json"
    assert main([*common, "lmms-eval", *harness, "--limit", "3", "-o", str(result)]) == 0
    assert "mmmu_val  mmmu_acc  0.25" in capsys.readouterr().out
    assert json.loads(result.read_text())[str(trio.mllm)][0]["n"] == 2
