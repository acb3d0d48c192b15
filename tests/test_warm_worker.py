"""The worker that runs the next job: handed over, replaced, ended, and never a job's bad luck."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_jobs import (
    break_down,
    count,
    events,
    let_go,
    start_held,
    wait_for,
    wait_until_over,
)

from ipmerge_core.runtime.jobs import JobStore
from ipmerge_core.runtime.warm_worker import WarmWorker

WAIT = 60
Lines = list[str]


@pytest.fixture
def lines() -> Lines:
    """What the worker reports."""
    return []


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "runs")


@pytest.fixture
def worker(store: JobStore, lines: Lines) -> Iterator[WarmWorker]:
    """A worker that waits for the jobs of the store."""
    worker = WarmWorker(["decimal"], report=lines.append)
    store.launcher = worker
    wake(worker)
    yield worker
    worker.close()


def wake(worker: WarmWorker) -> None:
    worker.wake()
    until(lambda: worker.status().state == "ready")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def started_in(store: JobStore, job: str) -> dict[str, object]:
    line = (store.folder / job / "journal.jsonl").read_text().splitlines()[0]
    found: dict[str, object] = json.loads(line)
    return found


def test_a_job_runs_in_the_process_that_waited(store, worker, folder, lines):
    waiting = worker.status()
    assert waiting.state == "ready"
    assert 1e6 < waiting.nbytes_memory < 1e9
    assert lines == [f"Worker ready: {waiting.nbytes_memory / 1e6:.0f} MB."]
    started = store.start(count, {"folder": str(folder), "total": 3}, title="count")
    status = wait_until_over(store, started.id)
    assert (status.state, status.step) == ("finished", {"index": 3, "total": 3})
    entry = started_in(store, started.id)
    assert (entry["process"], entry["warm"]) == (waiting.process, True)
    assert status.nbytes_memory >= entry["nbytes_memory"] > 1e6


def test_every_job_has_a_process_of_its_own(store, worker, folder):
    jobs = [store.start(break_down, {}, title="break")]
    assert wait_until_over(store, jobs[0].id).state == "failed"
    assert "Traceback" in (store.folder / jobs[0].id / "log.txt").read_text()
    until(lambda: worker.status().state != "none")
    jobs.append(store.start(count, {"folder": str(folder), "total": 1}, title="count"))
    assert wait_until_over(store, jobs[1].id).state == "finished"
    processes = [started_in(store, job.id)["process"] for job in jobs]
    assert len(set(processes)) == 2


def test_a_job_takes_the_environment_and_the_paths_of_the_app_today(
    store,
    worker,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("IPMERGE_TEST_WORD", "today")
    (tmp_path / "late_target.py").write_text(
        "import os\n"
        "def tell(out):\n"
        "    open(out, 'w').write(os.environ['IPMERGE_TEST_WORD'])\n"
        "    yield {'index': 1}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    late_target = importlib.import_module("late_target")
    out = tmp_path / "out"
    started = store.start(late_target.tell, {"out": str(out)}, title="tell")
    assert wait_until_over(store, started.id).state == "finished"
    assert out.read_text() == "today"


def test_a_dead_worker_costs_a_job_nothing(store, worker, folder):
    os.kill(worker.status().process, signal.SIGKILL)
    started = store.start(count, {"folder": str(folder), "total": 2}, title="count")
    status = wait_until_over(store, started.id)
    if status.state == "interrupted":  # it died after it had been given the job
        store.resume(started.id, started.key)
        status = wait_until_over(store, started.id)
    assert status.state == "finished"


def test_a_handed_over_job_is_cancelled_and_resumed_like_any(store, worker, folder):
    started = start_held(store, folder)
    assert started_in(store, started.id)["warm"]
    store.cancel(started.id, started.key)
    assert wait_until_over(store, started.id).state == "cancelled"
    let_go(folder)
    store.resume(started.id, started.key)
    assert wait_until_over(store, started.id).state == "finished"
    wait_for(store, started.id, lambda _: len(events(store, started.id)) == 4)


def test_a_job_cancelled_while_the_worker_imports_ends_at_once(store, tmp_path):
    (tmp_path / "slow_library.py").write_text("import time\ntime.sleep(600)\n")
    sys.path.insert(0, str(tmp_path))
    worker = store.launcher = WarmWorker(["slow_library"])
    try:
        worker.wake()
        assert worker.status().state == "importing"
        started = store.start(count, {"folder": str(tmp_path), "total": 1}, title="count")
        wait_for(store, started.id, lambda status: status.phase == "importing")
        store.cancel(started.id, started.key)
        assert wait_until_over(store, started.id).state == "cancelled"
    finally:
        sys.path.remove(str(tmp_path))
        worker.close()


def test_a_worker_that_nobody_uses_ends(lines):
    worker = WarmWorker(["decimal"], idle_seconds=0.5, report=lines.append)
    wake(worker)
    process = worker.status().process
    until(lambda: worker.status().state == "none")
    until(lambda: not is_alive(process))
    assert lines[-1] == "Worker ended."
    wake(worker)
    assert worker.status().process != process
    worker.close()
    until(lambda: worker.status().state == "none")
    worker.wake()
    assert worker.status().state == "none"


def test_a_worker_that_cannot_import_is_not_started_again_and_again(lines):
    worker = WarmWorker(["no_such_module_of_ours"], report=lines.append)
    worker.wake()
    until(lambda: worker.status().state == "none")
    worker.wake()
    assert worker.status().state == "none"
    assert lines == ["Worker ended."]


APP = """
import sys, time
from ipmerge_core.runtime.jobs import JobStore
from ipmerge_core.runtime.warm_worker import WarmWorker
from pathlib import Path
from test_jobs import count
worker = WarmWorker(["decimal"])
worker.wake()
while worker.status().state != "ready":
    time.sleep(0.02)
if len(sys.argv) > 2:
    arguments = {"folder": sys.argv[2], "total": 40, "gate": sys.argv[2] + ".gate"}
    store = JobStore(Path(sys.argv[1]), launcher=worker)
    print(store.start(count, arguments, title="x").id, flush=True)
else:
    print(worker.status().process, flush=True)
time.sleep(600)
"""


def run_app(*arguments: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", APP, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
    )


def test_a_waiting_worker_ends_with_a_killed_app_and_a_running_job_does_not(store, folder):
    with run_app(str(store.folder)) as app:
        waiting = int(app.stdout.readline())
        app.kill()
    until(lambda: not is_alive(waiting))
    with run_app(str(store.folder), str(folder)) as app:
        job = app.stdout.readline().decode().strip()
        wait_for(store, job, lambda status: bool(status.step))
        app.kill()
    assert store.status(job).state == "running"
    Path(f"{folder}.gate").touch()
    assert wait_until_over(store, job).state == "finished"


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
