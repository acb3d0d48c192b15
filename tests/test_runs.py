"""Runs of the app: on which device, one per folder and within the limit, and only what was checked.

No GPU is needed: torch is told that there is one, and what a run is asked to do is looked at.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trio
from quick_runs import idle

import ipmerge_core as ipm
from ipmerge_core import cli
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.errors import FolderInUseError, PlanError, RunError
from ipmerge_core.merging import estimates as costs
from ipmerge_core.runtime import devices
from ipmerge_core.runtime.host import Limits, home_folder
from ipmerge_core.runtime.jobs import Claim, JobStatus, JobStore, Started
from ipmerge_core.ui.analyse.descriptions import needs_html
from ipmerge_core.ui.analyse.models_form import AnalysisRequest as Named
from ipmerge_core.ui.analyse.models_form import Checked, check_request, start_analysis
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.format import progress_html
from ipmerge_core.ui.merge import tab as merge_tab
from ipmerge_core.ui.merge.summary import result_html
from ipmerge_core.ui.merge.tab import readiness
from ipmerge_core.ui.method_choice import MethodChoice
from ipmerge_core.ui.plan_choice import PlanChoice, choice_digest, plan_of
from ipmerge_core.ui.runs import RunState, RunView, find_run

PACK = "pack"  # the id of the demo trio's
OWNER = "o" * 40


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what tests make out of the user's own folder."""
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    return tmp_path / "home"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let torch see so many devices of each kind: `machine(cuda=2, mps=1)`."""

    def has(**counts: int) -> None:
        seen = {"cpu": 1, "cuda": 0, "xpu": 0, "mps": 0} | counts
        monkeypatch.setattr(devices, "_count", seen.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")

    return has


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every run that is started; none is."""
    runs: list[dict[str, Any]] = []

    def start(_: JobStore, __: object, arguments: dict[str, Any], **___: object) -> Started:
        runs.append(arguments)
        return Started("0" * 32, "key")

    monkeypatch.setattr(JobStore, "start", start)
    return runs


# --- which device ---


@pytest.mark.parametrize(
    ("counts", "best", "best_for_models", "listed"),
    [
        ({}, "cpu", "cpu", ["cpu"]),
        ({"cuda": 1}, "cuda", "cuda", ["cuda", "cpu"]),
        ({"cuda": 2, "xpu": 1}, "cuda", "cuda", ["cuda:0", "cuda:1", "xpu", "cpu"]),
        ({"mps": 1}, "cpu", "mps", ["cpu"]),  # Apple's GPUs have no fp64
    ],
)
def test_auto_is_the_best_device_that_can_do_the_work(
    machine, monkeypatch, counts, best, best_for_models, listed
):
    machine(**counts)
    monkeypatch.setattr(devices, "has_fp64", lambda name: not str(name).startswith("mps"))
    assert devices.resolve_device() == best
    assert devices.resolve_device("auto", fp64=False) == best_for_models
    assert devices.available_devices() == listed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu", "Unknown device 'gpu'. Expected auto or an available device: cuda, cpu."),
        ("cuda:", "Unknown device"),
        ("cuda:-1", "Unknown device"),
        ("CUDA", "Unknown device"),
        ("", "Unknown device"),
        ("x" * 500, "Unknown device 'x{40}'"),
        (3, "Unknown device '3'"),
        (None, "Unknown device"),
        ("cuda:1", "'cuda:1' is not available: torch .* finds 1 cuda device on"),
        ("xpu", "'xpu' is not available: torch .* finds no xpu devices on"),
        ("mps", "'mps' has no 64-bit floating point"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_in_one_sentence(machine, name, words):
    machine(cuda=1, mps=1)
    with pytest.raises(PlanError, match=words):
        devices.resolve_device(name)


def test_a_device_that_is_there_is_taken_as_it_is_named(machine):
    machine(cuda=2, mps=1)
    for name in ("cpu", "cuda", "cuda:1"):
        assert devices.resolve_device(name) == name
    assert devices.resolve_device("mps", fp64=False) == "mps"
    assert devices.resolve_device("cpu:0") == "cpu"
    assert devices.describe_device("cuda:1") == "NVIDIA H200 (cuda:1)"


def test_every_run_of_the_app_is_asked_to_use_the_gpu(machine, asked, monkeypatch, tmp_path):
    machine(cuda=1)
    backend = Backend()
    plan = plan_of(PACK, PlanChoice())
    backend.start_merge(plan, "merged")
    backend.start_merge(plan, "merged", device="cpu")
    start_analysis(backend, Named("a/v", ("a/m",), "a/b"))
    start_analysis(backend, Named("a/v", ("a/m",), "a/b", device="cpu"))
    backend.start_calibration(PACK, "gram", "demo", "demo", 2)
    backend.start_calibration(PACK, "fisher", "demo", "demo", 2, device="cpu")
    devices_asked = ["cuda", "cpu", "cuda", "cpu", "cuda", "cpu"]
    assert [run["device"] for run in asked] == devices_asked
    loaded: list[str] = []
    monkeypatch.setattr(
        type(backend.models), "get", lambda _, folder, device, stops, **_k: loaded.append(device)
    )
    backend.load(tmp_path)
    merges: list[str] = []

    def merge(plan: object, out: object, *, device: str) -> Iterator[None]:
        merges.append(device)
        Path(str(out)).mkdir()
        yield from ()

    monkeypatch.setattr("ipmerge_core.merging.merge.iter_merge", merge)
    backend.merged_folder(plan, lambda _: None)
    assert (loaded, merges) == (["cuda"], ["cuda"])


def test_an_app_is_told_which_device_to_use(machine, asked):
    machine(cuda=2)
    backend = Backend(device="cuda:1")
    plan = plan_of(PACK, PlanChoice())
    backend.start_merge(plan, "merged")
    backend.start_merge(plan, "merged", device="cuda:0")
    assert [run["device"] for run in asked] == ["cuda:1", "cuda:0"]
    with pytest.raises(PlanError, match="'cuda:7' is not available"):
        backend.start_merge(plan, "merged", device="cuda:7")
    assert len(asked) == 2


def test_confirm_names_the_device_and_estimates_for_it(machine, monkeypatch):
    on_cpu = readiness(Backend(), PACK, PlanChoice(), device="cpu")
    assert "on one CPU core, estimated" in on_cpu.confirmation
    assert "<dt>Device</dt><dd>CPU</dd>" in on_cpu.confirmation
    machine(cuda=1)
    on_gpu = readiness(Backend(), PACK, PlanChoice())
    assert "<dt>Device</dt><dd>NVIDIA H200 (cuda)</dd>" in on_gpu.confirmation
    assert "on the GPU (cuda), estimated" in on_gpu.confirmation
    assert "CPU" not in on_gpu.confirmation
    assert (on_gpu.device, on_cpu.device) == ("cuda", "cpu")
    refused = readiness(Backend(), PACK, PlanChoice(), device="cuda:5")
    assert not refused.ready
    assert "'cuda:5' is not available" in refused.findings[0].message


def test_a_choice_of_devices_is_offered_where_there_is_one(machine):
    assert merge_tab.list_devices(Backend())["visible"] is False
    machine(cuda=1)
    list_methods = merge_tab.list_devices(Backend())
    assert list_methods["visible"] is True
    assert list_methods["choices"] == [
        ("auto: NVIDIA H200 (cuda)", "auto"), ("NVIDIA H200 (cuda)", "cuda"), ("CPU", "cpu"),
    ]  # fmt: skip


def test_estimates_for_a_gpu_count_what_a_gpu_does(trio: Trio, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(costs, "DISK_RATE", 1e30)  # so that only computing counts
    monkeypatch.setattr(costs, "TENSOR_SECONDS", 0)
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    for method in ("tsv", "wudi", "ties"):
        plan = ipm.make_plan(pair, method)
        on_cpu, on_gpu = (
            costs.estimate_pair(plan, pair, tmp_path, name) for name in ("cpu", "cuda")
        )
        assert on_gpu.seconds < on_cpu.seconds / 100
        assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda")
    for options in (Options(), Options(quick=True)):
        slow, quick = (costs.estimate_analysis(pair, options, name) for name in ("cpu", "cuda"))
        assert quick.seconds < slow.seconds / 100


def test_an_analysis_is_estimated_for_the_device_that_it_takes(machine, trio: Trio):
    machine(cuda=1)
    named = Named(str(trio.mllm), (str(trio.math),), str(trio.base))
    *_, found = check_request(named, hub_only=False)
    assert isinstance(found, Checked)
    assert "on the GPU (cuda), estimated" in needs_html(found, hosted=False)
    assert "CPU" not in needs_html(found, hosted=False)


def test_a_run_and_its_result_say_where():
    status = JobStatus("0", "Merge", "running", {}, {"device": "cuda:1"})
    assert "on the GPU (cuda:1)" in progress_html(status)
    assert "Merged on the CPU" in result_html("/m", None, show_path=True, device="cpu")


# --- the command line ---

COMPUTING = {
    "analyse": ["--mllm", "a", "--math", "b", "--base", "c", "-o", "{}/p.json.gz"],
    "calibrate": ["--mllm", "a", "--math", "b", "--base", "c", "--kind", "gram", "-o", "{}/c"],
    "plan": ["{}/pack.json.gz", "--measure", "-o", "{}/p.json"],
    "merge": ["{}/p.json", "-o", "{}/out"],
    "adapter": ["{}/p.json", "-o", "{}/out"],
    "chat": ["{}/m", "--prompt", "hello"],
    "app": [],
}


@pytest.mark.parametrize("command", COMPUTING)
@pytest.mark.parametrize(
    ("device", "words"), [("gpu", "Unknown device 'gpu'"), ("cuda", "'cuda' is not available")]
)
def test_a_wrong_device_is_refused_before_any_work(
    command, device, words, machine, tmp_path, capsys
):
    machine()
    rest = [word.format(tmp_path) for word in COMPUTING[command]]
    assert cli.main([command, *rest, "--device", device]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not list(tmp_path.glob("[!h]*"))


def test_commands_take_the_best_device_and_say_so(machine, trio: Trio, tmp_path, capsys):
    machine(mps=1)  # which cannot do this work
    names = ["--mllm", str(trio.mllm), "--math", str(trio.math), "--base", str(trio.base)]
    plan, out = str(tmp_path / "p.json"), str(tmp_path / "out")
    assert cli.main(["plan", *names, "--method", "ties", "-o", plan]) == 0
    assert cli.main(["merge", plan, "-o", out, "--dry-run"]) == 0
    assert "on CPU. Nothing was written." in capsys.readouterr().out
    assert cli.main(["merge", plan, "-o", out, "--json"]) == 0
    said = capsys.readouterr()
    assert "Computing on CPU" in said.err
    assert '"device": "cpu"' in said.out


# --- one run per folder, within the limit ---


def at_once(number: int, work: Callable[[], Any]) -> list[Any]:
    """Call `work` in so many threads at the same moment; return results and RunErrors."""
    barrier, found = threading.Barrier(number), []

    def call() -> None:
        barrier.wait()
        try:
            found.append(work())
        except RunError as error:
            found.append(error)

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(tmp_path / "runs")
    yield store
    for status in store.all():
        (store.folder / status.id / "cancel").touch()


def test_the_limit_holds_for_starts_at_the_same_moment(store):
    found = at_once(8, lambda: store.start(idle, {}, title="x"))
    assert sum(isinstance(one, Started) for one in found) == store.limits.runs
    assert len(store.all()) == store.limits.runs


def test_a_resume_counts_too(store):
    stopped = store.start(idle, {}, title="x")
    store.cancel(stopped.id, stopped.key)
    while store.status(stopped.id).is_running:
        time.sleep(0.05)
    for _ in range(2):
        store.start(idle, {}, title="x")
    with pytest.raises(RunError, match=r"2 runs are already in progress \(limit 2\)"):
        store.resume(stopped.id, stopped.key)


def test_a_folder_has_one_run_however_its_path_is_written(store, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(tmp_path)

    def start() -> Started:
        claim = Claim(str(out), "work")
        return store.start(idle, {"out": str(out)}, title="x", claim=claim)

    found = at_once(4, start)
    first = next(one for one in found if isinstance(one, Started))
    others = [one for one in found if one is not first]
    assert all(isinstance(one, FolderInUseError) and one.job == first.id for one in others)
    for name, work in ((f"{tmp_path}/link/out", "work"), (f"{tmp_path}/x/../out", "other")):
        with pytest.raises(FolderInUseError, match="Another run is writing") as caught:
            store.start(idle, {}, title="x", claim=Claim(name, work))
        assert caught.value.same_work == (work == "work")
    assert store.writer_of(tmp_path / "link" / "out") == first.id
    store.cancel(first.id, first.key)
    while store.status(first.id).is_running:
        time.sleep(0.05)
    assert store.writer_of(out) is None
    again = start()
    with pytest.raises(FolderInUseError):
        store.resume(first.id, first.key)
    assert again.id != first.id


def test_keys_of_one_owner_differ_and_open_their_own_run_only(store):
    runs = [store.start(idle, {}, title="x", owner=OWNER) for _ in range(2)]
    assert runs[0].key != runs[1].key
    assert store.holds_key(runs[0].id, store.key_of(runs[0].id, OWNER))
    assert not store.holds_key(runs[1].id, runs[0].key)
    assert not store.holds_key(runs[0].id, store.key_of(runs[0].id, "p" * 40))
    assert store.key_of(runs[0].id, "short") == ""
    assert not store.holds_key(runs[0].id, "")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let merges take long; they write nothing."""
    monkeypatch.setattr("ipmerge_core.merging.merge.iter_merge", idle)


def stop_all(backend: Backend) -> None:
    for status in backend.store.all():
        (backend.store.folder / status.id / "cancel").touch()


def test_a_browser_that_starts_twice_is_given_its_own_run_again(slow):
    backend = Backend()
    plan, other = plan_of(PACK, PlanChoice()), plan_of(PACK, PlanChoice(0.1))
    found = at_once(4, lambda: merge_tab.started_merge(backend, OWNER, plan, "twice"))
    assert len({(one["id"], one["key"]) for one in found}) == 1
    assert backend.store.holds_key(found[0]["id"], found[0]["key"])
    assert len(backend.store.all()) == 1
    with pytest.raises(FolderInUseError):
        merge_tab.started_merge(backend, OWNER, other, "twice")
    stranger = "s" * 40
    watching = merge_tab.started_merge(backend, stranger, plan, "twice")
    assert (watching["id"], watching["key"]) == (found[0]["id"], "")
    backend.hosted = True
    with pytest.raises(FolderInUseError):
        merge_tab.started_merge(backend, stranger, plan, "twice")
    with pytest.raises(FolderInUseError):
        backend.start_merge(plan, "twice")  # a program, which has no browser
    stop_all(backend)


def test_a_browser_finds_its_run_again_whatever_it_started_since(slow):
    backend = Backend()
    first = merge_tab.started_merge(backend, OWNER, plan_of(PACK, PlanChoice()), "one")
    assert merge_tab.attached(backend, {"id": "0" * 32, "key": "lost"}, OWNER) == first
    assert merge_tab.attached(backend, None, OWNER) == first
    assert merge_tab.attached(backend, first, OWNER) == first
    assert find_run(backend, first).owned
    assert find_run(backend, first).running
    assert find_run(backend, {"id": first["id"]}, OWNER).owned
    assert merge_tab.attached(backend, {}, "s" * 40) == {}
    assert not find_run(backend, {"id": first["id"]}).owned
    assert not find_run(backend, {"id": first["id"]}, "s" * 40).owned
    stop_all(backend)


def test_an_unfinished_merge_of_another_plan_is_refused_before_the_run(home):
    backend, plan = Backend(), plan_of(PACK, PlanChoice())
    steps = ipm.iter_merge(plan_of(PACK, PlanChoice(0.1)), home / "models" / "half")
    next(steps)
    steps.close()
    with pytest.raises(RunError, match="unfinished merge of another plan"):
        backend.start_merge(plan, "half")
    assert not backend.store.all()


def test_two_calibrations_at_once_have_a_folder_each(monkeypatch):
    monkeypatch.setattr("ipmerge_core.calibration.calibrate.iter_calibration_of", idle)
    backend = Backend()
    at_once(2, lambda: backend.start_calibration(PACK, "gram", "demo", "demo", 2))
    folders = [Path(status.arguments["out"]).name for status in backend.store.all()]
    assert sorted(folders) == ["mllm-gram", "mllm-gram-2"]
    stop_all(backend)


def test_a_second_press_attaches_to_the_run_that_does_the_same(monkeypatch):
    monkeypatch.setattr("ipmerge_core.calibration.calibrate.iter_calibration_of", idle)
    monkeypatch.setattr("ipmerge_core.analysis.analyse.iter_pack", idle)
    backend = Backend(store=JobStore(home_folder() / "runs", Limits(runs=9)))
    asked = Named("a/v", ("a/m",), "a/b")

    def calibrate(limit: int = 2, owner: str = OWNER) -> Started:
        return backend.start_calibration(PACK, "gram", "demo", "demo", limit, owner=owner)

    def analyse(owner: str = OWNER, **changes: Any) -> Started:
        return start_analysis(backend, asked._replace(**changes), owner=owner)

    for start, other in ((calibrate, {"limit": 3}), (analyse, {"quick": True})):
        pressed = at_once(3, start)
        assert len(set(pressed)) == 1, "three presses, one run"
        assert backend.store.holds_key(pressed[0].id, pressed[0].key)
        different = [start(**other), start(owner="s" * 40)]
        assert len({run.id for run in [*pressed, *different]}) == 3
    stop_all(backend)


def test_a_stopped_calibration_keeps_its_folder_for_itself(monkeypatch):
    monkeypatch.setattr("ipmerge_core.calibration.calibrate.iter_calibration_of", idle)
    backend = Backend()
    first = backend.start_calibration(PACK, "fisher", "demo", "demo", 2)
    backend.store.cancel(first.id, first.key)  # before it has made its folder
    while backend.store.status(first.id).is_running:
        time.sleep(0.05)
    second = backend.start_calibration(PACK, "fisher", "demo", "demo", 2)
    outs = [Path(backend.store.status(run.id).arguments["out"]).name for run in (first, second)]
    assert outs == ["mllm-fisher", "mllm-fisher-2"]
    stop_all(backend)


# --- how a run is shown ---


@pytest.mark.parametrize(
    ("state", "key", "cancel", "resume"),
    [
        ("running", "key", True, False),
        ("cancelling", "key", True, False),
        ("cancelled", "key", False, True),
        ("failed", "key", False, True),
        ("interrupted", "key", False, True),
        ("finished", "key", False, False),
        ("running", "", False, False),
        ("cancelled", "", False, False),
    ],
)
def test_a_view_has_the_buttons_that_its_run_and_its_user_allow(state, key, cancel, resume):
    view = RunView("merge")
    updates = view.updates(RunState(JobStatus("0" * 32, "Merge", state), key))
    assert updates[view.column]["visible"]
    assert updates[view.cancel]["visible"] == cancel
    assert updates[view.cancel]["interactive"] == (state != "cancelling")
    assert updates[view.resume]["visible"] == resume


@pytest.mark.parametrize("empty", ["", "<p>No run yet.</p>"])
def test_a_view_without_a_run_shows_what_stands_for_none_or_is_hidden(empty):
    view = RunView("merge", empty=empty)
    updates = view.updates(find_run(Backend(), {"id": "../x"}))
    assert updates[view.progress] == empty
    assert updates[view.column]["visible"] == bool(empty)
    assert not any(updates[button]["visible"] for button in (view.cancel, view.resume))


# --- folders ---


def test_a_taken_folder_is_said_with_a_free_name(home):
    backend = Backend()
    (home / "models" / "taken").mkdir(parents=True)
    assert backend.folder_problem("taken") == ""  # empty
    (home / "models" / "taken" / "note.txt").write_text("mine")
    (home / "models" / "taken-2.partial").mkdir()
    assert "exists and is not empty" in backend.folder_problem("taken")
    assert backend.free_name_like("taken") == "taken-3"
    assert backend.free_name_like("taken-2") == "taken-3"
    note = merge_tab.note_html(backend, "taken", busy=False)
    assert "Available name: taken-3" in note
    assert merge_tab.note_html(backend, "free", busy=False) == ""
    assert "A merge is in progress" in merge_tab.note_html(backend, "free", busy=True)
    for name in ("", "../up", "<b>"):
        note = merge_tab.note_html(backend, name, busy=False)
        assert "Available name" not in note
        assert "<b>" not in note


def test_a_folder_that_a_run_is_writing_is_said(slow):
    backend = Backend()
    backend.start_merge(plan_of(PACK, PlanChoice()), "busy")
    assert "Another run is writing" in backend.folder_problem("busy")
    assert backend.free_name_like("busy") == "busy-2"
    stop_all(backend)


# --- only what was checked ---


def test_a_digest_holds_everything_that_decides_a_merge():
    plan = plan_of(PACK, PlanChoice())
    others = [
        (PACK, plan_of(PACK, PlanChoice(0.1)), "cpu"),
        (PACK, plan_of(PACK, PlanChoice(lambda_=2.0)), "cpu"),
        (PACK, plan_of(PACK, PlanChoice(similarity="weighted")), "cpu"),
        (PACK, plan_of(PACK, PlanChoice(), include="mlp|attn"), "cpu"),
        (PACK, plan, "cuda"),
        ("another", plan, "cpu"),
    ]
    digests = {choice_digest(*one) for one in [(PACK, plan, "cpu"), *others]}
    assert len(digests) == 1 + len(others)
    assert choice_digest(PACK, plan_of(PACK, PlanChoice()), "cpu") in digests


def test_what_was_not_checked_is_refused():
    backend = Backend()
    found = readiness(backend, PACK, PlanChoice(), MethodChoice("ties"))
    assert f'data-digest="{found.digest}"' in found.confirmation
    assert "<dt>Method</dt><dd>TIES: " in found.confirmation
    ties = merge_tab.chosen_plan(PACK, PlanChoice(), MethodChoice("ties"))
    merge_tab.check_digest(backend, found.digest, PACK, ties)
    for pack, plan in ((PACK, plan_of(PACK, PlanChoice())), ("another", ties)):
        with pytest.raises(PlanError, match="has changed since the check"):
            merge_tab.check_digest(backend, found.digest, pack, plan)
    with pytest.raises(PlanError, match="has changed since the check"):
        merge_tab.check_digest(backend, "", PACK, ties)
