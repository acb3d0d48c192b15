"""Experiments: from hub ids to a report, refused before any work, and continued after a kill."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_copies import write_mathvista, write_mmmu
from loopback_hub import COMMIT, Hub, loopback_hub

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.errors import IPMergeError, PairingError, PlanError
from ipmerge_core.evaluation.evaluate import EvaluationSettings
from ipmerge_core.evaluation.experiment import (
    STAGES,
    Experiment,
    ExperimentStep,
    Models,
    iter_experiment,
)
from ipmerge_core.evaluation.report import Report
from ipmerge_core.evaluation.sweeps import Sweep
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.methods.declarations import drained
from ipmerge_core.tasks.registry import find_tasks

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "assets" / "demo"
ROLES = ("mllm", "math", "base")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Copies of the demo models."""
    return {role: shutil.copytree(DEMO / role, tmp_path / "models" / role) for role in ROLES}


def experiment_of(places: dict[str, Path], /, **more: Any) -> Experiment:
    values = {
        "models": Models(str(places["mllm"]), (str(places["math"]),), str(places["base"])),
        "tasks": find_tasks(["demo:math"]),
        "plan": {"method": "ip_merging", "similarity_threshold": 0.1, "lambda_": 4.0},
        "evaluation": EvaluationSettings(limit=1, batch_size=4),
        "lengths": GenerationSettings(max_new_tokens=12),
    }
    return Experiment(**{**values, **more})


def contents(folder: Path) -> dict[str, bytes]:
    """The files whose bytes a second run must not change."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    whole = {
        name: p
        for name, p in found.items()
        if "journal" not in name and "model." not in name.partition("/")[0]
    }
    return {name: p.read_bytes() for name, p in whole.items() if p.name not in CHANGING}


CHANGING = {"report.json", "comparison.json", "report.html", "summary.json"}  # have a date


def test_closed_after_any_stage_it_continues_and_repeats_nothing(
    models: dict[str, Path], tmp_path: Path
) -> None:
    experiment, out = experiment_of(models), tmp_path / "out"
    done: dict[str, bytes] = {}
    for stage in STAGES[1:]:  # closed where this stage begins
        steps = iter_experiment(experiment, out)
        for step in steps:
            if step.stage == stage:
                break
        steps.close()
        now = contents(out)
        assert {name: now.get(name) for name in done} == done, stage
        done = {name: data for name, data in now.items() if not name.startswith("replies")}
    steps = iter_experiment(experiment, out)
    shown: list[ExperimentStep] = []
    summary = drained(_kept(steps, shown))
    assert [name for name in STAGES if any(s.stage == name for s in shown)] == list(STAGES)
    repeated = [s for s in shown if s.stage in STAGES[2:6] and not s.resumed]
    assert not repeated
    assert contents(out).items() >= done.items()
    assert {score["model"] for score in summary["scores"]} == {"unmerged", "merged"}
    assert sum(summary["records"].values()) == 9


def _kept(steps: Any, shown: list[ExperimentStep]) -> Any:
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        shown.append(step)
        yield step


def test_what_it_writes_is_what_the_single_commands_write(
    models: dict[str, Path], tmp_path: Path
) -> None:
    summary = drained(iter_experiment(experiment_of(models), tmp_path / "out"))
    analysis = ipm.Analysis.load(tmp_path / "out" / "pair.pack.json.gz")
    plan = ipm.make_plan(analysis, similarity_threshold=0.1, lambda_=4.0)
    ipm.merge(plan, tmp_path / "merged")
    weights = "model.safetensors"
    assert (tmp_path / "out" / "model" / weights).read_bytes() == (
        tmp_path / "merged" / weights
    ).read_bytes()
    report = Report.load(tmp_path / "out" / "report.json")
    assert summary["plan"]["hash"] == plan.hash
    assert list(report.subjects) == ["unmerged", "merged"]
    assert [task.name for task in report.tasks] == ["demo:math", "demo:perception"]
    found = Sweep.load(tmp_path / "out" / "comparison.json")
    assert len(found.points[1].selected) == len(plan.selected)
    records = json.loads((tmp_path / "out" / "pair.records.json").read_text())
    assert records["plan_hash"] == plan.hash
    assert records["max_new_tokens"] == 12
    assert all((tmp_path / "out" / each["image"]).is_file() for each in records["examples"])


def test_a_folder_with_another_experiment_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    experiment, out = experiment_of(models), tmp_path / "out"
    for step in iter_experiment(experiment, out):
        if step.stage == "records":
            break
    before = contents(out)
    other = replace(experiment.models, base=str(models["math"]))
    with pytest.raises(PlanError, match="Stage check: .*other models .base "):
        drained(iter_experiment(replace(experiment, models=other), out))
    plan = {**experiment.plan, "lambda_": 2.0}
    with pytest.raises(PlanError, match=r"Stage plan: .* is the merge of plan \w+, not of"):
        drained(iter_experiment(replace(experiment, plan=plan), out))
    assert contents(out) == before


def test_a_fault_names_its_stage_and_comes_before_any_analysis(
    models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    gone = replace(experiment_of(models).models, mllm=str(tmp_path / "none"))
    with pytest.raises(IPMergeError, match=r"^Stage check: .*none' does not exist"):
        drained(iter_experiment(experiment_of(models, models=gone), out))
    same = replace(experiment_of(models).models, math=(str(models["base"]),))
    with pytest.raises(PairingError, match="^Stage check: "):
        drained(iter_experiment(experiment_of(models, models=same), out))
    tasks = find_tasks([f"mmmu@{tmp_path / 'nothing'}"])
    with pytest.raises(IPMergeError, match="^Stage download: Cannot read the dataset"):
        drained(iter_experiment(experiment_of(models, tasks=tasks), out))
    assert not (out / "pair.pack.json.gz").exists()


# --- the command, with models by hub id ------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub({f"demo/{role}": DEMO / role for role in ROLES}) as found:
        yield found


def command(folder: Path, out: Path, *more: str) -> list[str]:
    data = f"mathvista@{folder / 'mathvista'},mmmu@{folder / 'mmmu'}"
    models = [f"--{role}=demo/{role}" for role in ROLES]
    plan = ["--similarity-threshold", "0.1", "--lambda", "4", "--device", "cpu"]
    limits = ["--max-reply-tokens", "8", "--max-new-tokens", "8", "--json", "--quiet"]
    start = [sys.executable, "-m", "ipmerge_core", "experiment", *models, "--tasks", data]
    return [*start, *plan, *limits, "-o", str(out), *more]


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "IPMERGE_HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
    }
    return {**os.environ, **own}


def test_hub_ids_go_in_and_a_report_comes_out_after_a_kill(hub: Hub, tmp_path: Path) -> None:
    write_mathvista(tmp_path / "mathvista")
    write_mmmu(tmp_path / "mmmu")
    out, env = tmp_path / "out", environment(hub, tmp_path)
    how: dict[str, Any] = {"env": env, "capture_output": True, "text": True}
    dry = subprocess.run(command(tmp_path, out, "--dry-run"), check=False, **how)
    assert dry.returncode == 0, dry.stderr
    need = json.loads(dry.stdout)
    assert need["nbytes_models"] > 0
    assert need["nbytes_analysis"] > 0
    assert not out.exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # read, not stored

    killed = subprocess.Popen(command(tmp_path, out), env=env, stderr=subprocess.PIPE)
    while not (out / "model").exists() and killed.poll() is None:  # killed after the merge
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors.decode()
    assert not (out / "summary.json").exists()
    names = ("pair.pack.json.gz", "plan.json", "model/model.safetensors")
    stamps = {name: (out / name).stat().st_mtime_ns for name in names}

    found = subprocess.run(command(tmp_path, out), check=False, **how)
    assert found.returncode == 0, found.stderr
    summary = json.loads(found.stdout)
    assert {name: (out / name).stat().st_mtime_ns for name in names} == stamps
    assert {model["revision"] for model in summary["models"]} == {COMMIT}
    assert [model["id"] for model in summary["models"]] == ["demo/mllm", "demo/base", "demo/math"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert len({score["task"] for score in summary["scores"]}) == 2
    page = (out / "report.html").read_text()
    assert "Comparison of models" in page
    assert "MathVista" in page
    assert "http://127.0.0.1" not in page
    assert all((out / name).exists() for name in summary["files"].values())


WEIGHTS = "model.safetensors"


STAGEWISE = """
import json, sys
from ipmerge_core.evaluation.evaluate import EvaluationSettings
from ipmerge_core.evaluation.experiment import Experiment, Models, iter_experiment
from ipmerge_core.tasks.registry import find_tasks

models = Models("demo/mllm", ("demo/math",), "demo/base")
settings = EvaluationSettings(limit=1)
what = Experiment(models, find_tasks(["demo:math"]), json.loads(sys.argv[1]), evaluation=settings)
stage = ""
for step in iter_experiment(what, sys.argv[2]):
    if step.stage != stage:
        stage = step.stage
        print(stage, flush=True)
        sys.stdin.readline()
    if stage == "records":
        break
"""


def sent_by_stage(hub: Hub, folder: Path, plan: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Run an experiment up to its records; return the bytes of weights by stage and role."""
    totals: dict[str, dict[str, int]] = {}
    with subprocess.Popen(
        [sys.executable, "-c", STAGEWISE, json.dumps(plan), str(folder / "out")],
        env=environment(hub, folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stdin is not None
        for stage in run.stdout:
            totals[stage.strip()] = {role: hub.sent[f"demo/{role}/{WEIGHTS}"] for role in ROLES}
            run.stdin.write("go\n")
            run.stdin.flush()
    assert run.returncode == 0
    stages = list(totals)
    return {
        stage: {role: totals[after][role] - totals[stage][role] for role in ROLES}
        for stage, after in itertools.pairwise(stages)
    }


@pytest.mark.parametrize(
    ("plan", "is_stored"),
    [
        ({"method": "ip_merging", "similarity_threshold": 0.0, "lambda_": 4.0}, False),
        ({"method": "ip_merging", "similarity_threshold": 0.0, "temperature": 16.0}, True),
        ({"method": "task_arithmetic", "math_weight": 0.5}, True),
    ],
)
def test_the_weights_of_hub_models_are_read_once(
    hub: Hub, tmp_path: Path, plan: dict[str, Any], is_stored: bool
) -> None:
    sent = sent_by_stage(hub, tmp_path, plan)
    sizes = {role: (DEMO / role / WEIGHTS).stat().st_size for role in ROLES}
    downloaded = ROLES if is_stored else ("mllm",)
    assert sent["download"] == {role: sizes[role] * (role in downloaded) for role in ROLES}
    for role in ROLES:
        assert (sent["analysis"][role] > 0.5 * sizes[role]) == (role not in downloaded)
        assert sent["analysis"][role] <= sizes[role] * (role not in downloaded)
        rows = 0 if role in downloaded else sent["check"][role]  # the merge checks the pair again
        assert sent["merge"][role] <= rows + 20_000, role  # and reads headers
    pair = ipm.open_pair(*(str(DEMO / role) for role in ROLES))
    ipm.merge(ipm.make_plan(ipm.analyse(pair), **plan), tmp_path / "merged")
    made = (tmp_path / "out" / "model" / WEIGHTS).read_bytes()
    assert made == (tmp_path / "merged" / WEIGHTS).read_bytes()


def test_the_command_needs_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "-o", str(tmp_path / "out")]) == 2
    assert "Specify the models" in capsys.readouterr().err
