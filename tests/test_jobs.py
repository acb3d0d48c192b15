"""Jobs: a run in a process of its own, watched, cancelled, resumed, and found again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import pytest
from platformdirs import user_data_path

from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.runtime.host import Limits, home_folder
from ipmerge_core.runtime.job_process import run_job
from ipmerge_core.runtime.jobs import JobStatus, JobStore, Started

WAIT = 60  # seconds that a process may take to do what a test waits for
PATIENCE = 8  # less than a resume waits for the lock of a run that does not end


class Step(NamedTuple):
    """What the drivers below yield."""

    index: int
    total: int


def count(folder: str, total: int, gate: str = "") -> Iterator[Step]:
    """Make one file per step, skipping those of an earlier run; a closed gate lets one through."""
    for index in range(1, total + 1):
        path = Path(folder) / str(index)
        if path.exists():
            continue
        path.touch()
        yield Step(index, total)
        while gate and not Path(gate).exists():
            time.sleep(0.02)
            yield Step(index, total)


def refuse(reason: str) -> Iterator[Step]:
    """Fail as a driver does when the input is at fault."""
    yield Step(1, 2)
    raise PlanError(reason)


def break_down() -> Iterator[Step]:
    """Fail as a program does when it has a bug."""
    yield Step(1, 2)
    raise ZeroDivisionError("by design")


class Recipe:
    """An argument that travels as a file."""

    def __init__(self, words: str) -> None:
        self.words = words

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.words)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls(Path(path).read_text())


def cook(recipe: Recipe, out: str) -> Iterator[Step]:
    """Write down what arrived."""
    Path(out).write_text(recipe.words)
    yield Step(1, 1)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "runs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


def wait_for(store: JobStore, job: str, reached: Callable[[JobStatus], bool]) -> JobStatus:
    deadline = time.monotonic() + WAIT
    while not reached(store.status(job)):
        assert time.monotonic() < deadline, store.status(job)
        time.sleep(0.02)
    return store.status(job)


def wait_until_over(store: JobStore, job: str) -> JobStatus:
    return wait_for(store, job, lambda status: not status.is_running)


def start_held(store: JobStore, folder: Path) -> Started:
    """Start a run that stays at its first new step until `let_go`, and wait until it is there."""
    arguments = {"folder": str(folder), "total": 40, "gate": str(folder.with_name("gate"))}
    started = store.start(count, arguments, title="held")
    wait_for(store, started.id, lambda status: bool(status.step))
    return started


def let_go(folder: Path) -> None:
    folder.with_name("gate").touch()


def test_a_job_runs_to_its_end_and_tells_its_last_step(store, folder):
    started = store.start(count, {"folder": str(folder), "total": 5}, title="count to five")
    status = wait_until_over(store, started.id)
    assert (status.state, status.title) == ("finished", "count to five")
    assert status.step == {"index": 5, "total": 5}
    assert len(list(folder.iterdir())) == 5


def test_start_returns_before_the_work_is_done(store, folder):
    started = start_held(store, folder)
    assert store.status(started.id).state == "running"
    store.cancel(started.id, started.key)
    wait_until_over(store, started.id)


def test_ids_and_keys_cannot_be_guessed(store, folder):
    jobs = [store.start(count, {"folder": str(folder), "total": 1}, title="x") for _ in range(2)]
    assert all(len(job.id) == 32 and len(job.key) >= 32 for job in jobs)
    assert jobs[0].id != jobs[1].id
    stored = (store.folder / jobs[0].id / "job.json").read_text()
    assert jobs[0].key not in stored
    for job in jobs:
        wait_until_over(store, job.id)


def test_cancel_stops_after_a_step_and_keeps_what_is_finished(store, folder):
    started = start_held(store, folder)
    assert store.cancel(started.id, started.key).state in ("cancelling", "cancelled")
    status = wait_until_over(store, started.id)
    assert status.state == "cancelled"
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_resume_goes_on_where_cancel_stopped(store, folder):
    started = start_held(store, folder)
    store.cancel(started.id, started.key)
    wait_until_over(store, started.id)
    let_go(folder)
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert store.resume(started.id, started.key).is_running
    assert wait_until_over(store, started.id).state == "finished"
    assert len(list(folder.iterdir())) == 40
    assert all((folder / name).stat().st_mtime_ns == when for name, when in made.items())


def test_a_run_can_be_resumed_the_moment_it_says_that_it_stopped(store, folder):
    started = start_held(store, folder)
    for _ in range(2):
        store.cancel(started.id, started.key)
        wait_until_over(store, started.id)
        begun = time.monotonic()
        assert store.resume(started.id, started.key).is_running
        assert time.monotonic() - begun < PATIENCE
    let_go(folder)
    assert wait_until_over(store, started.id).state == "finished"


def test_only_the_key_cancels_and_resumes(store, folder):
    started = start_held(store, folder)
    with pytest.raises(RunError, match="Only the browser that started this run"):
        store.cancel(started.id, "guess")
    assert store.status(started.id).state == "running"
    store.cancel(started.id, started.key)
    wait_until_over(store, started.id)
    with pytest.raises(RunError, match="Only the browser"):
        store.resume(started.id, "guess")
    assert not store.holds_key(started.id, "")


def wait_long(folder: str, before: str) -> Iterator[Step]:
    """Do nothing before or after the first step, until `let_go`."""
    if before == "after":
        yield Step(1, 2)
    while not Path(folder).with_name("gate").exists():
        time.sleep(0.02)
    yield Step(2, 2)


@pytest.mark.parametrize("phase", ["importing", "opening"])
def test_a_job_is_cancelled_before_its_first_step(store, folder, phase, tmp_path, monkeypatch):
    if phase == "importing":
        source = "import time\ntime.sleep(600)\n"
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        source = ""
    (tmp_path / "slow_import.py").write_text(source)
    target = late(f"slow_import:{phase}") if phase == "importing" else wait_long
    arguments = {"folder": str(folder), "before": "before"}
    started = store.start(target, arguments, title="slow")
    wait_for(store, started.id, lambda status: status.phase == phase)
    store.cancel(started.id, started.key)
    status = wait_until_over(store, started.id)
    assert (status.state, status.step, status.can_resume) == ("cancelled", {}, True)


def late(name: str) -> Callable[..., Iterator[Step]]:
    """Stand for a function of a module that this process has not imported."""

    def target(**_: object) -> Iterator[Step]:
        yield Step(1, 1)

    target.__module__, target.__qualname__ = name.split(":")
    return target


@pytest.mark.parametrize("before", ["before", "after"])
def test_a_run_ends_at_its_time_limit_and_can_be_resumed(tmp_path, folder, before):
    store = JobStore(tmp_path / "runs", Limits(run_minutes=1 / 120))
    started = store.start(wait_long, {"folder": str(folder), "before": before}, title="long")
    if before == "after":  # the current step may return first
        wait_for(store, started.id, lambda status: time.time() > status.started + 2)
        let_go(folder)
    status = wait_until_over(store, started.id)
    assert status.state == "failed"
    assert "time limit of 0.00833333 minutes" in status.error
    assert status.can_resume


def test_sigterm_is_a_request_to_cancel(store, folder):
    started = start_held(store, folder)
    journal = (store.folder / started.id / "journal.jsonl").read_text().splitlines()
    os.kill(json.loads(journal[0])["process"], signal.SIGTERM)
    assert wait_until_over(store, started.id).state == "cancelled"


def test_runs_are_shared_between_visitors(tmp_path, folder):
    store = JobStore(tmp_path / "runs", Limits(runs=2, runs_per_visitor=1))
    arguments = {"folder": str(folder), "before": "before"}
    first = store.start(wait_long, arguments, title="a", visitor="1.1.1.1")
    with pytest.raises(RunError, match="1 run is already in progress from your address .limit 1"):
        store.start(wait_long, arguments, title="b", visitor="1.1.1.1")
    second = store.start(wait_long, arguments, title="c", visitor="2.2.2.2")
    with pytest.raises(RunError, match="2 runs are already in progress .limit 2"):
        store.start(wait_long, arguments, title="d", visitor="3.3.3.3")
    assert "1.1.1.1" not in (store.folder / first.id / "job.json").read_text()
    let_go(folder)
    for job in (first, second):
        assert wait_until_over(store, job.id).state == "finished"


def resumed_then_new(gate: str) -> Iterator[dict[str, object]]:
    """Repeat old work, then do some of its own."""
    yield {"nbytes_done": 80, "nbytes_total": 100, "action": "resumed"}
    for done in (90, 100):
        yield {"nbytes_done": done, "nbytes_total": 100, "action": "merged"}
    while not Path(gate).exists():
        time.sleep(0.02)
        yield {"nbytes_done": 100, "nbytes_total": 100, "action": "merged"}


def test_speed_is_measured_without_resumed_work(store, tmp_path):
    gate = tmp_path / "gate"
    started = store.start(resumed_then_new, {"gate": str(gate)}, title="again")
    status = wait_for(store, started.id, lambda status: status.step.get("nbytes_done") == 100)
    assert status.first["nbytes_done"] == 80
    assert status.started <= status.since <= status.updated
    gate.touch()
    assert wait_until_over(store, started.id).state == "finished"


def test_another_store_on_the_same_folder_sees_the_job(store, folder):
    started = start_held(store, folder)
    other = JobStore(store.folder)
    assert other.status(started.id).state == "running"
    assert [status.id for status in other.all()] == [started.id]
    other.cancel(started.id, started.key)
    assert wait_until_over(other, started.id).state == "cancelled"


def test_a_killed_process_is_noticed_and_can_be_resumed(store, folder):
    started = start_held(store, folder)
    journal = (store.folder / started.id / "journal.jsonl").read_text().splitlines()
    os.kill(json.loads(journal[0])["process"], signal.SIGKILL)
    status = wait_until_over(store, started.id)
    assert (status.state, status.can_resume) == ("interrupted", True)
    let_go(folder)
    store.resume(started.id, started.key)
    assert wait_until_over(store, started.id).state == "finished"


def test_an_error_of_the_package_is_told_in_its_own_words(store):
    started = store.start(refuse, {"reason": "The plan is empty."}, title="refuse")
    status = wait_until_over(store, started.id)
    assert (status.state, status.error) == ("failed", "The plan is empty.")


def test_a_bug_is_reported_and_its_traceback_is_in_the_log(store):
    started = store.start(break_down, {}, title="break")
    status = wait_until_over(store, started.id)
    assert status.state == "failed"
    assert "Unexpected ZeroDivisionError" in status.error
    assert "Traceback" in (store.folder / started.id / "log.txt").read_text()


def test_objects_with_save_and_load_travel_as_files(store, tmp_path):
    out = tmp_path / "out.txt"
    started = store.start(cook, {"recipe": Recipe("salt"), "out": str(out)}, title="cook")
    assert wait_until_over(store, started.id).state == "finished"
    assert out.read_text() == "salt"
    assert store.status(started.id).arguments == {"out": str(out)}


def test_the_journal_tells_what_happened_in_order(store, folder):
    started = start_held(store, folder)
    store.cancel(started.id, started.key)
    wait_until_over(store, started.id)
    let_go(folder)
    store.resume(started.id, started.key)
    wait_until_over(store, started.id)
    expected = ["started", "cancelled", "started", "finished"]
    wait_for(store, started.id, lambda _: len(events(store, started.id)) == len(expected))
    assert events(store, started.id) == expected


def events(store: JobStore, job: str) -> list[str]:
    """What the journal tells but for steps; the last line comes after the last status."""
    lines = (store.folder / job / "journal.jsonl").read_text().splitlines()
    found = [json.loads(line)["event"] for line in lines]
    return [event for event in found if event != "step"]


def test_too_many_runs_are_refused(tmp_path, folder):
    store = JobStore(tmp_path / "runs", Limits(runs=1))
    started = start_held(store, folder)
    with pytest.raises(RunError, match=r"1 run is already in progress \(limit 1\)"):
        store.start(count, {"folder": str(folder), "total": 1}, title="second")
    store.cancel(started.id, started.key)
    wait_until_over(store, started.id)


@pytest.mark.parametrize("job", ["", "../../etc", "0" * 32, "g" * 32, "0" * 31])
def test_an_unknown_id_is_refused(store, job):
    with pytest.raises(RunError, match="There is no run with the id"):
        store.status(job)


def test_a_finished_job_cannot_be_resumed(store, folder):
    started = store.start(count, {"folder": str(folder), "total": 1}, title="one")
    wait_until_over(store, started.id)
    with pytest.raises(RunError, match="is finished; there is nothing to resume"):
        store.resume(started.id, started.key)
    assert store.cancel(started.id, started.key).state == "finished"


def test_the_home_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "own"))
    assert home_folder() == tmp_path / "own"
    monkeypatch.delenv("IPMERGE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert home_folder() == user_data_path("ipmerge", appauthor=False)
    assert home_folder().is_relative_to(tmp_path / "me")


@pytest.mark.parametrize("cache", ["cache", ""])
def test_a_home_folder_in_the_cache_stays_in_use(monkeypatch, tmp_path, cache):
    monkeypatch.delenv("IPMERGE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache) if cache else "")
    earlier = tmp_path / (cache or ".cache") / "ipmerge"
    assert home_folder() != earlier
    earlier.mkdir(parents=True)
    assert home_folder() == earlier


def job_folder(tmp_path: Path, target: str, arguments: dict[str, object]) -> Path:
    """Lay out a job by hand, to run it in this process."""
    content = {"target": target, "title": "t", "arguments": arguments, "files": {}, "key": ""}
    (tmp_path / "job.json").write_text(json.dumps(content))
    status = {"id": tmp_path.name, "title": "t", "state": "running", "arguments": arguments}
    (tmp_path / "status.json").write_text(json.dumps(status))
    return tmp_path


def test_run_job_tells_success_and_failure_by_its_exit_code(tmp_path, folder, capsys):
    arguments = {"folder": str(folder), "total": 3}
    job = job_folder(tmp_path, f"{__name__}:count", arguments)
    assert run_job(job) == 0
    assert json.loads((job / "status.json").read_text())["state"] == "finished"
    (job / "cancel").touch()
    arguments["total"] = 6
    assert run_job(job_folder(tmp_path, f"{__name__}:count", arguments)) == 0
    assert json.loads((job / "status.json").read_text())["state"] == "cancelled"
    (job / "cancel").unlink()
    assert run_job(job_folder(tmp_path, f"{__name__}:refuse", {"reason": "No."})) == 1
    assert run_job(job_folder(tmp_path, f"{__name__}:break_down", {})) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
