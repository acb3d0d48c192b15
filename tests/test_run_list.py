"""The list of runs: whose runs are in it, what a row says and offers, and what deleting deletes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from event_loops import in_loop
from quick_runs import fail, idle, write_manifest

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.host import Limits
from ipmerge_core.runtime.job_lists import delete_job, describe_job, keys_of_owner
from ipmerge_core.runtime.jobs import JobStore, Started
from ipmerge_core.ui.app import build_app
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.pairs import path_of
from ipmerge_core.ui.run_list import rows
from ipmerge_core.ui.run_list.deletion import delete_run
from ipmerge_core.ui.run_list.wiring import Asked
from ipmerge_core.ui.runs import ANALYSIS, CALIBRATION, MERGE, kind_of, own_running

OWNER, STRANGER = "o" * 40, "s" * 40
PLAN = "0123abcd"


def source(role: str) -> dict[str, str | None]:
    return {"id": role, "revision": None, "fingerprint": role}


MANIFEST = {
    "format": "ipmerge-manifest",
    "plan": {"hash": PLAN, "method": "ties"},
    "sources": {
        "base_mllm": None,
        "math": [source("math")],
        "mllm": source("mllm"),
        "base": source("base"),
    },
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what tests make out of the user's own folder."""
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    return tmp_path / "home"


@pytest.fixture
def backend(home: Path) -> Iterator[Backend]:
    backend = Backend(store=JobStore(home / "runs", Limits(runs=9)))
    yield backend
    for status in backend.store.all():
        (backend.store.folder / status.id / "cancel").touch()


@pytest.fixture
def run(backend: Backend) -> Callable[..., Started]:
    """Start a run and, unless it is idle, wait for its end: `run(out, kind, target, owner)`."""

    def make(
        out: Path, kind: str = MERGE, target: Any = write_manifest, owner: str = OWNER
    ) -> Started:
        about = {"kind": kind, "pair": "a pair", "method": "TIES", "plan": PLAN}
        arguments = {"out": str(out), "manifest": MANIFEST}
        started = backend.store.start(target, arguments, title="x", owner=owner, about=about)
        while target is not idle and backend.store.status(started.id).is_running:
            time.sleep(0.02)
        return started

    return make


def listed(backend: Backend, owner: str = OWNER, **remembered: str) -> list[dict[str, Any]]:
    return rows.describe_runs(backend, rows.keys_held(backend, owner, remembered))["runs"]


def row_of(backend: Backend, started: Started, owner: str = OWNER) -> dict[str, Any]:
    return next(row for row in listed(backend, owner) if row["id"] == started.id)


# --- whose runs ---


def test_runs_in_progress_stand_first_then_the_newest(backend, run, home):
    done = [run(home / "models" / name) for name in ("a", "b")]
    going = run(home / "models" / "c", target=idle)
    last = run(home / "models" / "d")
    assert [row["id"] for row in listed(backend)] == [going.id, last.id, done[1].id, done[0].id]


def test_on_a_space_a_visitor_sees_the_runs_whose_keys_they_hold(backend, run, home):
    mine, other = run(home / "models" / "a"), run(home / "models" / "b", owner=STRANGER)
    program = run(home / "models" / "c", owner="")
    assert {row["id"] for row in listed(backend)} == {mine.id, other.id, program.id}
    backend.hosted = True
    assert [row["id"] for row in listed(backend)] == [mine.id]
    assert {row["id"] for row in listed(backend, "", **{program.id: program.key})} == {program.id}
    for guess in ({program.id: "guess"}, {program.id: ""}, {"../x": "y"}, {"0" * 32: "z"}):
        assert listed(backend, "", **guess) == []


def test_a_key_is_needed_for_everything_but_looking(backend, run, home):
    done, going = run(home / "models" / "a"), run(home / "models" / "b", target=idle)
    for started, mine, theirs in (
        (done, ["show", "try", "delete"], ["show", "try"]),
        (going, ["show", "cancel"], ["show"]),
    ):
        assert row_of(backend, started)["actions"] == mine
        row = row_of(backend, started, STRANGER)
        assert row["actions"] == theirs
        assert row["download"] == ""
        assert ["Started by", "another browser or program"] in row["facts"]
    assert row_of(backend, done)["download"].endswith(f"{done.id}?key={done.key}")


def test_a_secret_that_is_too_short_opens_nothing(backend, run, home):
    run(home / "models" / "a", owner="")
    assert keys_of_owner(backend.store, "") == {}
    assert keys_of_owner(backend.store, "x" * 31) == {}
    assert keys_of_owner(JobStore(home / "none"), OWNER) == {}


# --- what a row says ---


def test_a_row_says_method_plan_folder_and_how_it_ended(backend, run, home):
    good, bad = run(home / "models" / "good"), run(home / "models" / "bad", target=fail)
    row = row_of(backend, good)
    facts = dict(row["facts"])
    assert (facts["Pair"], facts["Method"], facts["Plan"]) == ("a pair", "TIES", PLAN)
    assert facts["Folder"] == str(home / "models" / "good")
    assert (row["kind"], row["name"], row["state"]) == ("Merge", "good", "finished")
    failed = row_of(backend, bad)
    assert failed["state"] == "failed"
    assert "No room for" in failed["error"]
    assert failed["actions"] == ["show", "resume", "delete"]
    backend.hosted = True
    assert dict(row_of(backend, good)["facts"])["Folder"] == "good"


def test_only_the_last_merge_of_a_folder_can_be_asked_and_downloaded(backend, run, home):
    first = run(home / "models" / "same")
    assert "try" in row_of(backend, first)["actions"]
    second = run(home / "models" / "same")
    row = row_of(backend, first)
    assert row["label"] == "finished; replaced by a later run"
    assert row["actions"] == ["show", "delete"]
    assert row["download"] == ""
    assert "try" in row_of(backend, second)["actions"]


def test_a_model_that_was_moved_away_is_not_offered(backend, run, home):
    started = run(home / "models" / "gone")
    (home / "models" / "gone").rename(home / "elsewhere")
    assert row_of(backend, started)["actions"] == ["delete"]
    assert row_of(backend, started)["download"] == ""


def test_the_list_is_bounded_and_says_how_many_are_left_out(backend, home):
    for number in range(rows.MOST_LISTED + 3):
        folder = home / "runs" / f"{number:032x}"
        folder.mkdir(parents=True)
        status = {"id": folder.name, "title": "x", "state": "finished", "started": number}
        (folder / "status.json").write_text(json.dumps(status))
        job = {"target": "a.b:iter_pack", "title": "x", "arguments": {}, "files": {}, "key": "k"}
        (folder / "job.json").write_text(json.dumps(job))
    found = rows.describe_runs(backend, {})
    assert (len(found["runs"]), found["more"]) == (rows.MOST_LISTED, 3)
    assert {row["kind"] for row in found["runs"]} == {"Analysis"}, "known by its target"


def test_a_visitor_is_busy_while_a_merge_of_theirs_goes_on(backend, run, home):
    run(home / "models" / "done")
    run(path_of("packs-x"), kind=ANALYSIS, target=idle)
    assert list(own_running(backend, OWNER, MERGE)) == []
    going = run(home / "models" / "going", target=idle)
    assert [state.status.id for state in own_running(backend, OWNER, MERGE)] == [going.id]
    assert list(own_running(backend, STRANGER, MERGE)) == []


# --- deleting ---


def test_what_the_app_wrote_into_its_own_folders_is_deleted(backend, run, home):
    places = {
        MERGE: home / "models" / "m",
        CALIBRATION: home / "calibrations" / "c",
        ANALYSIS: path_of("packs-p"),
    }
    for kind, out in places.items():
        started = run(out, kind)
        assert f"'{out.name}'? This cannot be undone." in row_of(backend, started)["deletes"]
        delete_run(backend, started.id, started.key)
        assert not out.exists()
        assert not list((home / "runs").glob(f"*{started.id}*"))
    assert listed(backend) == []


def test_a_users_own_folder_is_kept(backend, run, home, tmp_path):
    (home / "models").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (home / "models" / "link").symlink_to(tmp_path / "target")
    for out in (tmp_path / "mine", home / "models" / "link", home / "models" / "x" / ".." / ".."):
        started = run(out)
        assert row_of(backend, started)["deletes"] == f"Delete this entry? '{out.name}' is kept."
        delete_run(backend, started.id, started.key)
        assert (out / "ipmerge.json").is_file()


def test_a_model_that_is_another_ones_by_now_is_kept(backend, run, home):
    first, out = run(home / "models" / "a"), home / "models" / "a"
    second = run(out)
    delete_run(backend, first.id, first.key)
    assert (out / "ipmerge.json").is_file(), "the second run wrote it"
    (out / "ipmerge.json").write_text(json.dumps({**MANIFEST, "plan": {"hash": "other"}}))
    delete_run(backend, second.id, second.key)
    assert (out / "ipmerge.json").is_file(), "somebody replaced it by another model"


def test_unfinished_work_is_deleted_unless_another_run_would_continue_it(backend, run, home):
    partial = home / "models" / "half.partial"
    partial.mkdir(parents=True)
    runs = [run(home / "models" / "half", target=fail) for _ in range(2)]
    delete_run(backend, runs[0].id, runs[0].key)
    assert partial.is_dir()
    assert "the unfinished work of the model 'half'" in row_of(backend, runs[1])["deletes"]
    delete_run(backend, runs[1].id, runs[1].key)
    assert not partial.exists()


def test_a_run_in_progress_or_of_somebody_else_is_not_deleted(backend, run, home):
    done, going = run(home / "models" / "a"), run(home / "models" / "b", target=idle)
    for started, key, words in (
        (going, going.key, "is in progress. Cancel it"),
        (done, "guess", "Only the browser that started this run"),
        (done, going.key, "Only the browser"),
        (Started("0" * 32, "x"), "x", "There is no run"),
        (Started("../../x", "x"), "x", "There is no run"),
    ):
        with pytest.raises(RunError, match=words):
            delete_run(backend, started.id, key)
    assert (home / "models" / "a" / "ipmerge.json").is_file()
    assert len(listed(backend)) == 2


def test_a_deletion_at_the_same_moment_happens_once(backend, run, home):
    started, failures = run(home / "models" / "a"), []

    def delete() -> None:
        try:
            delete_job(backend.store, started.id, started.key)
        except RunError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=delete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 3
    assert all("There is no run" in words for words in failures)


# --- what a browser sends ---


@pytest.mark.parametrize(
    "data", [None, "x", [], {}, {"n": "1", "run": ["x"]}, {"visitor": None, "action": {"a": 1}}]
)
def test_whatever_a_browser_sends_is_read_as_texts(data):
    asked = Asked.read(SimpleNamespace(_data=data))
    assert (asked.n, asked.is_first) == (0, False)
    assert all(isinstance(text, str) for text in asked[2:])
    assert len(Asked.read(SimpleNamespace(_data={"visitor": "x" * 10**6})).visitor) == 200


def test_a_run_keeps_what_it_was_started_with(backend, run, home):
    started = run(home / "models" / "a")
    request = describe_job(backend.store, started.id)
    assert (request.target, request.about["plan"]) == ("write_manifest", PLAN)
    assert kind_of(request) == MERGE
    assert kind_of(request._replace(target="iter_calibration_of", about={})) == CALIBRATION


# --- one answer for the list and for the tabs ---


@pytest.mark.parametrize("reads_before_the_end", [0, 1, 2, 3, 4, 6, 8])
def test_a_page_that_stops_asking_shows_no_run_in_progress(
    backend, run, home, monkeypatch, reads_before_the_end
):
    app = in_loop(lambda: build_app(backend))
    tick = next(f.fn for f in app.fns.values() if getattr(f.fn, "__name__", "") == "tick")
    going = run(home / "models" / "a", target=idle)
    read, seen = backend.store.status, []

    def ends_after_some_reads(job: str):
        if len(seen) == reads_before_the_end:
            (backend.store.folder / going.id / "cancel").touch()
            while read(going.id).is_running:
                time.sleep(0.02)
        seen.append(job)
        return replace(read(job), step={})  # idle's steps are not those of a merge

    event = SimpleNamespace(_data={"n": 1, "first": False, "visitor": OWNER})
    asked = [{"id": going.id, "key": going.key}] * 11
    monkeypatch.setattr(backend.store, "status", ends_after_some_reads)
    found = {getattr(part, "elem_id", ""): value for part, value in tick(event, *asked).items()}
    stops_asking = not any(row["running"] for row in found["run-list"]["runs"])
    cancel = found["cancel-merge"]
    assert len(seen) > 8
    assert not (stops_asking and cancel["visible"])
