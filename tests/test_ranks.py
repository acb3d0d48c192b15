"""Several processes share one merge: same bytes as one, and a dead one is named and replaced."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_trio

import ipmerge_core as ipm
from ipmerge_core.errors import RunError
from ipmerge_core.merging.merge import iter_merge
from ipmerge_core.models.writer import run_folders
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.runtime.processes import Ranks, share_out

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
    "1", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
DYING = """
import os, signal, sys
import ipmerge_core.merging.merge as merging
from ipmerge_core.planning.plan import MergePlan
for number, step in enumerate(merging.iter_merge(MergePlan.load(sys.argv[1]), sys.argv[2])):
    if os.environ["RANK"] == sys.argv[3] and number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""
FAILING = DYING.replace(
    "os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit('this machine has had enough')"
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    trio = write_trio(folder / "trio", dtype=torch.bfloat16, shards=3)
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    ipm.make_plan(pair, method="dare_linear", seed=3).save(folder / "plan.json")
    return folder / "plan.json"


@pytest.fixture(scope="module")
def whole(plan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    ipm.merge(MergePlan.load(plan), out)
    return files_of(out)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.iterdir() if path.name != "ipmerge.json"]
    return {path.name: path.read_bytes() for path in paths}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def launched(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_write_the_bytes_of_one(
    launcher: list[str], plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = launched(*launcher, "-m", "ipmerge_core", "merge", str(plan), "-o", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "ipmerge.json").read_text())["processes"] == 2
    assert files_of(out) == whole
    assert not run_folders(out).run.exists()


@pytest.mark.slow
def test_a_dead_process_is_reported_and_the_run_goes_on_alone(
    plan: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    script, out = tmp_path / "dying.py", tmp_path / "out"
    script.write_text(DYING)
    done = launched(*TORCHRUN, str(script), str(plan), str(out), "1")
    assert done.returncode != 0
    assert "local_rank: 1" in done.stderr
    assert "SIGKILL" in done.stderr
    assert not out.exists()
    steps = list(iter_merge(MergePlan.load(plan), out))
    assert any(step.action == "resumed" for step in steps)
    assert files_of(out) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "loser", "words"),
    [
        (DYING, 1, "Process 1 of 2 (counted from 0) has died"),
        (DYING, 0, "Process 0 of 2 (counted from 0) has died"),
        (FAILING, 1, "Process 1 of 2 (counted from 0) has died"),
    ],
)
def test_without_a_launcher_that_watches_the_survivor_names_the_dead_one(
    script: str, loser: int, words: str, plan: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(plan), str(tmp_path / "out"), str(loser)],
            env=environment(
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [child.communicate()[1] for child in children]
    assert all(child.returncode for child in children)
    assert words in said[1 - loser]
    assert not (tmp_path / "out").exists()


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Ranks() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        assert ranks.device("cuda") == "cuda"
        assert ranks.gather("x") == ["x"]
        assert ranks.led(lambda: 3) == 3
        with pytest.raises(RunError, match="no"):
            ranks.led(lambda: (_ for _ in ()).throw(RunError("no")))


def test_each_process_of_a_machine_gets_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    ranks = Ranks()
    assert ranks.device("cuda") == "cuda:2"
    assert ranks.device("cuda:1") == "cuda:1"
    assert ranks.device("cpu") == "cpu"


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_work_is_shared_out_evenly_and_completely(size: int) -> None:
    costs = [float(7 * n % 100 + 1) for n in range(200)]
    owners = share_out(costs, size)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert sum(loads) == sum(costs)
    assert max(loads) - min(loads) <= max(costs)
    assert owners == share_out(costs, size)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected an integer from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "9" * 40}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'; expected an integer from 0 on"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "Cannot connect the 2 processes"),
    ],
)
def test_a_broken_launcher_is_named_by_its_variable(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message), Ranks():
        pass


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_of_a_launcher_is_not_set(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", empty)
    monkeypatch.setenv("RANK", empty)
    assert (Ranks().size, Ranks().rank) == (1, 0)
