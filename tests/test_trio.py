"""Another trio without a browser: what is read, checked, refused, started, listed and shown."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model, write_trio
from synthetic_pack import make_pack

import ipmerge_core as ipm
from ipmerge_core.analysis.analyse import iter_pack
from ipmerge_core.analysis.partial import journal_of, read_journal
from ipmerge_core.errors import CheckpointError, PlanError, RunError
from ipmerge_core.models.catalogue import load_catalogue
from ipmerge_core.runtime.host import Limits
from ipmerge_core.runtime.jobs import JobStore
from ipmerge_core.ui.analyse import models_form as room
from ipmerge_core.ui.analyse.descriptions import known_html, known_label, needs_html, pair_html
from ipmerge_core.ui.analyse.models_form import (
    Checked,
    check_request,
    discard,
    read_request,
    start_analysis,
)
from ipmerge_core.ui.analyse.panel import iter_check, news_of
from ipmerge_core.ui.app import left_out
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.explore.partial_packs import explored_pack, nobody_runs, pair_choices
from ipmerge_core.ui.explore.tab import grown_since, open_pair
from ipmerge_core.ui.pairs import (
    find_pack,
    find_partial,
    id_of,
    list_packs,
    load_pack,
    packs_folder,
    reserve_name,
    unreadable_packs,
)
from ipmerge_core.ui.runs import RunView, find_run

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SPACE_ID", raising=False)
    (tmp_path / "home" / "packs").mkdir(parents=True)
    return tmp_path / "home"


def named(trio: Trio, **changes: object) -> room.AnalysisRequest:
    asked = room.AnalysisRequest(str(trio.mllm), (str(trio.math),), str(trio.base))
    return asked._replace(**changes)


def checked(asked: room.AnalysisRequest, *, hub_only: bool = False) -> tuple[list[str], Checked]:
    *words, found = check_request(asked, hub_only=hub_only)
    assert isinstance(found, Checked)
    return words, found


def refusals(found: Checked) -> str:
    return " ".join(f"{f.subject} {f.message}" for f in found.findings if f.level == "refusal")


def grow(trio: Trio, name: str, steps: int) -> str:
    """Analyse so many matrices of a pair, then stop; returns its id."""
    out = reserve_name(name)
    run = iter_pack(str(trio.mllm), [str(trio.math)], str(trio.base), out)
    for _ in range(steps + 1):
        next(run)
    run.close()
    return id_of(out)


# --- the form --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("", "", "", "", False, 0), "Missing: vision-language model, math model"),
        (("a/v", " , \n", "b/b", "", False, 0), "Missing: math model"),
        (("a/v", "m\n" * 9, "b/b", "", False, 0), "Got 9 math models; expected at most 8"),
        (("a/v", "b/m", "x" * 301, "", False, 0), "name of the base has 301 characters"),
        (("a/v", "b/m", "b/b", "", False, 1.5), "rank is 1.5"),
    ],
)
def test_an_unfinished_form_is_answered_with_what_is_missing(typed, words):
    with pytest.raises(PlanError, match=words):
        read_request(*typed)


def test_known_pairs_have_names_of_their_own_and_say_what_was_read():
    pairs = load_catalogue().pairs
    assert len({known_label(pair) for pair in pairs}) == len(pairs)
    for pair in pairs:
        text = known_html(pair)
        assert all(name in text for name in (pair.mllm, pair.base, *pair.math))
        assert "licence unknown" in text or "(" in text
    code = (
        "import sys; from ipmerge_core.models.catalogue import load_catalogue; load_catalogue();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the check -------------------------------------------------------------------------------


def test_a_check_says_what_it_reads_finds_siblings_and_names_the_cost(trio):
    words, found = checked(named(trio, math=(str(trio.math), str(trio.math_2))))
    assert words[0] == f"Reading headers, 1 of 4: vision-language model {trio.mllm}"
    assert words[3].startswith("Reading headers, 4 of 4: math model 2")
    assert words[-1] == "Comparing a few rows of each model"
    assert found.ready
    assert not refusals(found)
    text = needs_html(found, hosted=False)
    assert "on one CPU core, estimated" in text
    assert "21 matrices for each of 2 math models, exact" in text
    assert str(packs_folder()) in text
    assert str(packs_folder()) not in needs_html(found, hosted=True)
    quick = checked(named(trio, quick=True, rank=16))[1]
    assert "quick, approximate" in needs_html(quick, hosted=False)
    assert not list(packs_folder().iterdir())


def test_refusals_come_as_findings_and_nothing_is_started(trio, tmp_path):
    assert "equals the base" in refusals(checked(named(trio, math=(str(trio.base),)))[1])
    missing = checked(named(trio, mllm=str(tmp_path / "nowhere")))[1]
    assert "The model folder" in refusals(missing)
    assert not missing.ready
    offline = checked(named(trio, base="org/name"))[1]
    assert "Cannot open 'org/name'" in refusals(offline)
    assert "HF_HUB_OFFLINE" in refusals(offline)
    weights = {k: v for k, v in text_weights().items() if ".layers.2." not in k}
    short = write_model(tmp_path / "short", fine_tuned(weights, 5), TEXT_CONFIG)
    assert "2 decoder layers" in refusals(checked(named(trio, math=(str(short),)))[1])
    assert not Backend().store.all()


def test_a_matrix_that_memory_cannot_hold_is_refused(trio, monkeypatch):
    class Memory:
        available = 10

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    found = checked(named(trio))[1]
    assert "memory The largest matrix needs about" in refusals(found)
    assert not found.ready


def test_weights_that_were_analysed_before_are_recognised(trio):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    analysis.save(packs_folder() / "before.pack.json.gz")
    (packs_folder() / "broken.pack.json.gz").write_text("no pack")
    found = checked(named(trio))[1]
    (known,) = [f for f in found.findings if f.subject == "already analysed"]
    assert "'own: mllm + math'" in known.message
    assert found.ready
    assert not [f for f in checked(named(trio, rank=2))[1].findings if "already" in f.subject]


def test_the_form_s_views_end_with_findings_whatever_happens(trio):
    backend = Backend()
    values = (str(trio.mllm), str(trio.math), str(trio.base), "", "quick", 0, None, "all")
    *early, last = iter_check(backend, *values)
    assert not any(view.ready or view.over for view in early)
    assert last.ready
    assert (last.checked.asked.quick, last.checked.asked.directions) == (True, "all")
    (refusal,) = iter_check(backend, "", "", "", "", "exact", 0, None, "existing")
    assert "Missing: " in refusal.findings
    assert refusal.over
    assert not refusal.ready


def test_a_space_takes_hub_ids_alone_and_never_looks_at_its_folders(trio, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "org/ipmerge")
    backend = Backend()
    for address in (str(trio.mllm), "assets/demo/mllm", "~/x", "file:///x", "a/b/c", "../home"):
        found = checked(named(trio, mllm=address), hub_only=backend.hosted)[1]
        assert "is not a valid hub id; expected 'org/name'" in refusals(found)
    with pytest.raises(CheckpointError, match="is not a valid hub id"):
        start_analysis(backend, named(trio))
    assert not list(packs_folder().iterdir())
    found = checked(named(trio, mllm="assets/demo", base="a/b", math=("c/d",)), hub_only=True)[1]
    assert "Cannot open 'assets/demo'" in refusals(found)  # a folder here, a stranger's id there


def test_the_owner_s_token_is_not_used_on_a_space():
    code = (
        "import os; os.environ['SPACE_ID'] = 'org/ipmerge'; import ipmerge_core.ui;"
        "from huggingface_hub import constants;"
        "assert constants.HF_HUB_DISABLE_IMPLICIT_TOKEN"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the run ---------------------------------------------------------------------------------


def finish(backend: Backend, job: str) -> str:
    deadline = time.monotonic() + 60
    while backend.store.status(job).is_running:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return backend.store.status(job).state


def test_a_run_makes_a_pack_that_everybody_can_choose(trio):
    backend = Backend()
    pinned = checked(named(trio))[1].pinned
    started = start_analysis(backend, pinned)
    again = start_analysis(backend, pinned)
    assert (started.pack, again.pack) == ("packs-mllm-math", "packs-mllm-math-2")
    assert finish(backend, started.id) == finish(backend, again.id) == "finished"
    labels = [pack.label for pack in list_packs()]
    assert labels[:3] == ["demo trio", "demo trio, taught skill", "SmolLM2-135M trio"]
    assert labels[3:] == ["own: mllm + math · mllm-math", "own: mllm + math · mllm-math-2"]
    whole = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    assert [r["name"] for r in load_pack(started.pack)["records"]] == [
        r.name for r in whole.records
    ]
    assert news_of(find_run(backend, started._asdict())) == f"finished:{started.pack}"
    assert not list(packs_folder().glob("*.journal"))


def test_a_run_of_strangers_fails_with_the_finding(trio):
    backend = Backend()
    started = start_analysis(backend, named(trio, math=(str(trio.base),)))
    assert finish(backend, started.id) == "failed"
    assert "equals the base" in backend.store.status(started.id).error
    view = RunView("analysis")
    for key, visible in (("guess", False), (started.key, True)):
        updates = view.updates(find_run(backend, {"id": started.id, "key": key}))
        assert updates[view.column]["visible"]
        assert not updates[view.cancel]["visible"]
        assert updates[view.resume]["visible"] == visible
    with pytest.raises(RunError, match="Only the browser"):
        discard(backend, started.id, "guess")
    discard(backend, started.id, started.key)
    assert not list(packs_folder().iterdir())


def test_a_name_is_given_back_where_no_run_may_start(trio, tmp_path):
    backend = Backend(store=JobStore(tmp_path / "runs", Limits(runs=1)))
    first = start_analysis(backend, named(trio))
    with pytest.raises(RunError, match="limit 1"):
        start_analysis(backend, named(trio))
    assert not list(packs_folder().glob("*-2.*"))
    finish(backend, first.id)


# --- packs -----------------------------------------------------------------------------------


def test_names_of_packs_are_safe_unique_and_keep_their_dots():
    first = reserve_name("Qwen2.5-VL-7B", EVIL, "../../etc")
    assert first.parent == packs_folder()
    assert first.name == "Qwen2.5-VL-7B-img-src-x-onerror-alert-1-etc.pack.json.gz"
    assert reserve_name("Qwen2.5-VL-7B", EVIL, "../../etc").name.endswith("-2.pack.json.gz")
    assert reserve_name("...").name == "pair.pack.json.gz"
    assert len(reserve_name("x" * 500).name) <= 60 + len(".pack.json.gz")
    one, two = (packs_folder() / f"qwen-{v}.pack.json.gz" for v in ("2.0", "2.5"))
    for path in (one, two):
        path.write_bytes(gzip.compress(json.dumps(make_pack(2)).encode()))
    assert {"packs-qwen-2.0", "packs-qwen-2.5"} <= {pack.id for pack in list_packs()}


def test_packs_tell_how_they_were_made_and_a_broken_one_is_only_listed():
    for name, parameters in (("a", {"quick": True}), ("b", {"rank": 8}), ("c", {})):
        pack = {**make_pack(2), "parameters": parameters}
        path = packs_folder() / f"{name}.pack.json.gz"
        path.write_bytes(gzip.compress(json.dumps(pack).encode()))
    (packs_folder() / "d.pack.json.gz").write_text("no pack")
    (packs_folder() / "e.pack.json.gz").symlink_to("nowhere")
    (packs_folder() / "f.pack.json.gz").mkdir()
    labels = [pack.label for pack in list_packs()][3:]
    assert labels == [
        "own: synthetic 2 layers (quick, approximate)",
        "own: synthetic 2 layers (rank 8)",
        "own: synthetic 2 layers",
    ]
    faults = unreadable_packs()
    assert [fault.split("'")[1].rpartition("/")[2][0] for fault in faults] == ["d", "e", "f"]
    with pytest.raises(PlanError, match="is not a pack of this version"):
        load_pack("packs-d")


def test_the_app_starts_and_names_the_files_that_it_leaves_out(caplog):
    packs_folder().mkdir(parents=True, exist_ok=True)
    for name in ("<b>x*y*", "b", "c", "d", "e", "f"):
        (packs_folder() / f"{name}.pack.json.gz").write_bytes(b"[" * 100_000)
    listed = left_out().split("\n")
    assert len([line for line in caplog.messages if "nested too deeply" in line]) == 6
    assert len(listed) == 5
    assert [entry.id for entry in list_packs()] == ["pack", "taught", "smollm2"]
    assert "&#60;b&#62;x&#42;y&#42;" in listed[0]
    assert listed[-1] == "- 2 more, see the log of the app."
    assert "&#60;" not in listed[1]


def test_two_files_with_one_stem_are_two_pairs():
    packs_folder().mkdir(parents=True, exist_ok=True)
    for name, layers in (("pack-a.json.gz", 2), ("pack-a.pack.json.gz", 3)):
        path = packs_folder() / name
        path.write_bytes(gzip.compress(json.dumps(make_pack(layers)).encode()))
    own = [entry for entry in list_packs() if entry.id.startswith("packs-")]
    assert {entry.id for entry in own} == {"packs-pack-a", "packs-pack-a.json.gz"}
    assert [len(load_pack(entry.id)["records"]) for entry in own] == sorted(
        len(load_pack(entry.id)["records"]) for entry in own
    )
    assert find_pack("packs-pack-a").path.name == "pack-a.pack.json.gz"


def test_a_growing_pair_is_shown_in_explore_and_refused_everywhere_else(trio):
    assert find_partial("packs-nothing") is None
    assert id_of(reserve_name("empty")) not in dict(map(reversed, pair_choices()))
    pack_id = grow(trio, "growing", 5)
    with pytest.raises(PlanError, match=r"'mllm \+ math' is only partly analysed, 5 of 21"):
        find_pack(pack_id)
    content, choice = open_pair(pack_id, lambda _: True)
    growing = content["pack"]["growing"]
    assert (growing["total"], growing["running"], len(growing["places"])) == (21, True, 21)
    assert len(content["pack"]["records"]) == 5
    assert 0 < growing["done"] < 1
    assert choice == ipm_choice(content)
    assert pack_id not in dict(map(reversed, pair_choices()))
    assert dict(map(reversed, pair_choices(shown=pack_id)))[pack_id].endswith("(partly analysed)")
    assert pack_id in dict(map(reversed, pair_choices(lambda _: True)))
    for evil in ("packs-../x", "packs-", "packs-.x", "nobody", EVIL, None):
        assert find_partial(evil) is None


def ipm_choice(content):
    from ipmerge_core.ui.plan_choice import read_commit

    return read_commit(content["plan"], content["pack"])


def test_the_map_asks_for_what_is_new_until_the_pack_is_whole(trio):
    pack_id = grow(trio, "growing", 5)
    news = grown_since([pack_id, 3], nobody_runs)
    assert [record["module"] for record in news["records"]] == ["o", "gate"]
    assert (news["again"], news["growing"]["running"]) == (False, False)
    assert "places" not in news["growing"]
    assert len(json.dumps(grown_since([pack_id, 5], nobody_runs))) < 200
    assert grown_since([pack_id, 9], nobody_runs)["again"]
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base))
    analysis.save(packs_folder() / "growing.pack.json.gz")
    journal_of(packs_folder() / "growing.pack.json.gz").unlink()
    last = grown_since([pack_id, 5], nobody_runs)
    assert last["growing"] is None
    assert len(last["records"]) == 2 * (21 - 5)
    assert last["pack"]["created"] == analysis.created
    assert last["presets"]
    for asked in ([pack_id.replace("growing", "gone"), 0], "x", [EVIL, EVIL], [], None):
        assert "no longer exists" in grown_since(asked, nobody_runs)["gone"]


def test_two_experts_of_a_matrix_come_together(trio):
    out = reserve_name("two")
    run = iter_pack(str(trio.mllm), [str(trio.math), str(trio.math_2)], str(trio.base), out)
    for _ in range(4):
        next(run)
    run.close()
    seen = read_journal(journal_of(out), 1)
    assert (seen.n_done, [r["expert"] for r in seen.records]) == (3, [0, 1, 0, 1])


def test_what_a_pair_is_stands_behind_a_line_and_names_stay_names(tmp_path):
    pack = make_pack(2)
    pack["sources"]["mllm"] = {"id": EVIL, "revision": EVIL, "fingerprint": EVIL}
    pack["engine"] = pack["created"] = EVIL
    assert "<img" not in pair_html(pack)
    trio = write_trio(tmp_path / "trio")
    evil = tmp_path / EVIL
    shutil.move(trio.math, evil)
    found = checked(named(trio, math=(str(evil),)))[1]
    assert found.ready
    *_, last = iter_check(Backend(), *typed(found.asked))
    text = last.status + last.findings + last.facts
    assert "<img" not in text.replace(str(evil), "")
    config = {"model_type": "llava", "text_config": {**TEXT_CONFIG, "hidden_act": EVIL}}
    other = write_model(tmp_path / "other", as_mllm(fine_tuned(text_weights(), 1)), config)
    *_, last = iter_check(Backend(), *typed(found.asked._replace(mllm=str(other))))
    assert "activation" in last.findings
    assert "<img" not in last.findings
    growing = pair_html(explored_pack(grow(trio._replace(math=evil), "evil", 2)))
    assert "2 of 21 so far" in growing
    assert "<img" not in growing


def typed(asked: room.AnalysisRequest) -> tuple[object, ...]:
    return (
        asked.mllm,
        "\n".join(asked.math),
        asked.base,
        asked.base_mllm,
        "exact",
        0,
        None,
        "existing",
    )
