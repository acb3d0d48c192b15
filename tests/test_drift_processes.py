"""Two processes train as one does with doubled accumulation, and a killed run can be resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipmerge_core import cli

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "assets" / "demo"
COMMAND = [
    "drift", "--mllm", str(DEMO / "mllm"), "--math", str(DEMO / "math"), "--data", "demo",
    "--limit", "16", "--max-steps", "2", "--learning-rate", "1e-4", "--device", "cpu", "--quiet",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
KILLED = """
import os, signal, sys
from ipmerge_core.finetuning import train
from ipmerge_core import cli
real = train.iter_drift
def dying(*arguments, **options):
    for step in real(*arguments, **options):
        yield step
        if step.action == "trained" and step.done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
train.iter_drift = dying
cli.main(sys.argv[1:])
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


def launched(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


def moved(folder: Path) -> dict[str, torch.Tensor]:
    start, end = (load_file(f / "model.safetensors") for f in (DEMO / "mllm", folder))
    return {
        name: end[name] - start[name] for name in end if not torch.equal(end[name], start[name])
    }


def difference(first: Path, second: Path) -> float:
    """The largest relative difference of the changes of a tensor."""
    ours, theirs = moved(first), moved(second)
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / ours[n].norm()) for n in ours)


@pytest.mark.parametrize(
    "mode",
    [["--rule", "adaptive"], ["--rule", "absolute"], ["--rule", "adaptive", "--per-micro-batch"]],
    ids=["adaptive", "absolute", "per micro-batch"],
)
def test_two_processes_equal_one_with_doubled_accumulation(mode, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*COMMAND, *mode, "--accumulation", "4", "-o", str(one)]) == 0
    done = launched(
        *TORCHRUN, "-m", "ipmerge_core", *COMMAND, *mode, "--accumulation", "2", "-o", str(two)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    assert difference(one, two) < 1e-3
    manifest = json.loads((two / "ipmerge.json").read_text())
    assert manifest["processes"] == 2


def test_the_absolute_rule_per_micro_batch_depends_on_their_number(tmp_path):
    """It adds the whole prior each time, so that two processes cannot equal more accumulation."""
    folders = [tmp_path / "one", tmp_path / "two"]
    mode = ["--rule", "absolute", "--per-micro-batch", "--max-grad-norm", "0"]
    for folder, parts in zip(folders, ("1", "4"), strict=True):
        size = str(4 // int(parts))
        words = [*COMMAND, *mode, "--batch-size", size, "--accumulation", parts, "-o", str(folder)]
        assert cli.main(words) == 0
    assert difference(*folders) > 1e-2


def test_a_killed_run_resumes_from_its_newest_checkpoint(tmp_path):
    words = [*COMMAND, "--max-steps", "4", "--save-every", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main([*words, "-o", str(whole)]) == 0
    assert launched("-c", KILLED, *words, "-o", str(killed)).returncode == -9
    assert not killed.exists()
    assert cli.main([*words, "-o", str(killed)]) == 0
    assert difference(whole, killed) < 1e-5
    curves = [json.loads((f / "ipmerge.json").read_text())["history"] for f in (whole, killed)]
    losses = [[entry["loss"] for entry in curve if "loss" in entry] for curve in curves]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_command_checks_a_run_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*COMMAND, "-o", str(out), "--dry-run", "--show-examples", "1"]) == 0
    text = capsys.readouterr().out
    assert "acts on 28 parameters: 12 of mlp, 16 of attn" in text
    assert "without activations" in text
    assert text.count("tokens: <s>USER: <image> x 16") == 1
    assert not list(tmp_path.iterdir())
    assert cli.main([*COMMAND, "-o", str(out), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 28


def test_the_baselines_of_the_paper_are_written_next_to_the_result(tmp_path, capsys):
    words = [*COMMAND, "--max-steps", "1", "--base", str(DEMO / "base"), "--json"]
    words += ["--baseline", "ties", "--baseline", "layer-swap", "-o", str(tmp_path / "out")]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)["baselines"]
    assert found == {n: str(tmp_path / f"out-{n}") for n in ("layer-swap", "ties")}
    plan = json.loads((tmp_path / "out-ties" / "ipmerge.json").read_text())["plan"]
    assert plan["parameters"]["mllm_weight"] == 1.6
    assert plan["parameters"]["normalize"] == "count"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "none", "--strength", "2"], "--strength has no effect with --rule none"),
        (["--normalize-prior"], "--normalize-prior has no effect with --rule adaptive"),
        (["--show-examples", "1"], "--show-examples has no effect without --dry-run"),
        (["--resume", "--dry-run"], "--resume has no effect with --dry-run"),
        (["--baseline", "ties"], "--baseline needs --base"),
        (["--base", "x"], "--base has no effect without --baseline"),
        (["--baseline", "tis"], "Unknown baseline 'tis'"),
        (["--module-strength", "mlp"], "expected PATTERN=STRENGTH"),
        (["--modules", "attention"], "Unknown modules"),
        (["--data", "nowhere.jsonl"], "Expected a jsonl file"),
    ],
)
def test_what_does_not_go_together_is_named(words, message, tmp_path, capsys):
    assert cli.main([*COMMAND, "-o", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
