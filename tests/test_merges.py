"""Which finished merges may answer in the chat, whose they are, and what a side then says."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from quick_runs import fail, write_manifest

from ipmerge_core import make_plan
from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import IPMergeError, PlanError, RunError
from ipmerge_core.inference.generation import GenerationSettings, answer
from ipmerge_core.merging.provenance import read_provenance
from ipmerge_core.runtime.jobs import JobStatus, Started
from ipmerge_core.ui.api import _answers
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import Question, Side, answer_question
from ipmerge_core.ui.chat.column_choice import MOST_RUNS, Held, choices_of, keys_of, with_run
from ipmerge_core.ui.chat.columns import (
    BASE,
    FORM,
    PLAN,
    RECORD,
    UNMERGED,
    Selection,
    merge_of,
    method_choices,
    selected,
    with_column,
)
from ipmerge_core.ui.chat.recorded import recorded_examples
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.finished_merges import describe_lost, find_merge, merges_of_pair
from ipmerge_core.ui.method_choice import MethodChoice
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of

PACK = "pack"
OTHER = "packs-other"
CHOSEN = ChosenMerge(PACK, by="explore")
QUESTION = recorded_examples()[0]

MakeRun = Callable[..., Started]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what tests make out of the user's own folder; beside the demo pair there is another."""
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    (tmp_path / "home" / "packs").mkdir(parents=True)
    other = replace(analysis_of(PACK), name="another pair", sources=other_sources())
    other.save(tmp_path / "home" / "packs" / "other.pack.json.gz")
    return tmp_path / "home"


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def make_run(backend: Backend) -> MakeRun:
    """Make runs that end at once: `make_run("by-ties", "ties", sources)`."""

    def make(name: str, method: str = "ties", sources: Sources | None = None, **more: object):
        out = backend.output_folder(name)
        manifest = {
            "format": "ipmerge-manifest",
            "plan": {"hash": f"{len(name):08x}", "method": method},
            "sources": asdict(sources or analysis_of(PACK).sources),
        }
        target = more.get("target", write_manifest)
        arguments = {"out": str(out), "manifest": manifest}
        started = backend.store.start(target, arguments, title=f"Merge into {name}")
        wait_for(backend, started)
        return started

    return make


def other_sources() -> Sources:
    """Return the demo pair's sources with another math model."""
    sources = analysis_of(PACK).sources
    return replace(sources, math=(replace(sources.math[0], id="org/other", fingerprint="f" * 64),))


def wait_for(backend: Backend, started: Started) -> JobStatus:
    while (status := backend.store.status(started.id)).is_running:
        time.sleep(0.02)
    return status


def choices(
    backend: Backend, chosen: ChosenMerge, columns: tuple[str, ...] = (), kept: str = ""
) -> list[tuple[str, str]]:
    """The choices of a column without the other methods; some columns may be selected."""
    selections = {chosen.pack_id: Selection(columns, chosen)} if columns else {}
    return choices_of(backend, Held(chosen, selections, kept=kept), methods=False)


def values(found: list[tuple[str, str]]) -> list[str]:
    return [value for _, value in found]


def ended(sides: Iterator[tuple[Side, ...]]) -> tuple[Side, ...]:
    *_, last = sides
    return last


# --- which merges there are ----------------------------------------------------------------


def test_the_merges_of_a_pair_are_listed_and_named_the_newest_first(backend, make_run):
    older, newer = make_run("by-ties"), make_run("by-wudi-2", "wudi")
    make_run("elsewhere", sources=other_sources())
    found = merges_of_pair(backend, PACK, {})
    assert [merge.run for merge in found] == [newer.id, older.id]
    assert [merge.label for merge in found] == [
        "by-wudi-2 · WUDI-Merging · plan 00000009",
        "by-ties · TIES · plan 00000007",
    ]
    assert [merge.folder.name for merge in merges_of_pair(backend, OTHER, {})] == ["elsewhere"]


def test_a_merge_belongs_to_every_pack_of_the_same_models(backend, make_run, home):
    analysis_of(PACK).save(home / "packs" / "again.pack.json.gz")
    run = make_run("by-ties")
    assert find_merge(backend, "packs-again", run.id, {}).run == run.id


def test_a_merge_is_found_by_its_run_and_by_its_folder_s_name(backend, make_run):
    run = make_run("by-ties")
    assert find_merge(backend, PACK, run.id, {}) == find_merge(backend, PACK, "by-ties", {})
    for wanted in ("by-tie", "", "../by-ties", "0" * 32, str(backend.output_folder("by-ties"))):
        with pytest.raises(RunError, match="There is no merge"):
            find_merge(backend, PACK, wanted, {})


def test_a_folder_that_is_gone_is_said_and_no_longer_listed(backend, make_run):
    run = make_run("by-ties")
    shutil.rmtree(backend.output_folder("by-ties"))
    assert merges_of_pair(backend, PACK, {}) == []
    with pytest.raises(RunError, match="'by-ties' no longer exists: its folder was deleted"):
        find_merge(backend, PACK, run.id, {})
    assert describe_lost(backend, run.id, {}) == "by-ties · no longer available"
    assert describe_lost(backend, "0" * 32, {}) == "This merge · no longer available"


def test_a_later_merge_in_the_same_folder_takes_its_place(backend, make_run):
    first = make_run("by-ties")
    shutil.rmtree(backend.output_folder("by-ties"))
    second = make_run("by-ties", "wudi")
    assert [merge.run for merge in merges_of_pair(backend, PACK, {})] == [second.id]
    assert find_merge(backend, PACK, "by-ties", {}).run == second.id
    with pytest.raises(RunError, match="later merge replaced the model in 'by-ties'"):
        find_merge(backend, PACK, first.id, {})


def test_a_merge_of_another_pair_is_refused_with_its_models(backend, make_run):
    run = make_run("elsewhere", sources=other_sources())
    with pytest.raises(RunError, match="other models .*org/other.* than the pair 'demo trio'"):
        find_merge(backend, PACK, run.id, {})
    assert find_merge(backend, OTHER, run.id, {}).run == run.id


def test_a_run_that_did_not_finish_is_refused_with_its_state(backend, make_run):
    run = make_run("by-ties", target=fail)
    assert merges_of_pair(backend, PACK, {}) == []
    with pytest.raises(
        RunError, match="'Merge into by-ties' is failed; only the model of a finished"
    ):
        find_merge(backend, PACK, run.id, {})


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "[" * 100_000, '{"plan": 1}', '{"plan": {"hash": "1"}, "sources": {}}'],
    ids=["empty", "cut", "list", "null", "deep", "number", "half"],
)
def test_a_damaged_manifest_is_no_merge(backend, make_run, content):
    run = make_run("by-ties")
    manifest = backend.output_folder("by-ties") / "ipmerge.json"
    manifest.write_text(content)
    assert read_provenance(manifest.parent) is None
    assert merges_of_pair(backend, PACK, {}) == []
    with pytest.raises(RunError, match="no longer exists"):
        find_merge(backend, PACK, run.id, {})


def test_a_method_of_another_version_keeps_its_name(backend, make_run):
    make_run("by-newer", "a_later_method")
    assert "by-newer · a_later_method" in merges_of_pair(backend, PACK, {})[0].label


# --- whose they are ------------------------------------------------------------------------


def test_on_a_space_a_merge_answers_only_to_the_browser_that_holds_its_key(make_run):
    mine, theirs = make_run("mine"), make_run("theirs")
    space = Backend(hosted=True)
    assert merges_of_pair(space, PACK, {}) == []
    keys = {mine.id: mine.key, theirs.id: mine.key, "../x": "y", "": ""}
    assert [merge.run for merge in merges_of_pair(space, PACK, keys)] == [mine.id]
    assert find_merge(space, PACK, mine.id, keys).folder.name == "mine"
    said = set()
    for wanted in (theirs.id, "0" * 32, "theirs"):  # what is there must not be told apart
        with pytest.raises(RunError, match="that this browser may use") as caught:
            find_merge(space, PACK, wanted, keys)
        said.add(str(caught.value).replace(wanted, ""))
    assert len(said) == 1
    assert describe_lost(space, theirs.id, keys) == "This merge · no longer available"


def test_the_endpoint_keeps_to_the_same_rules(make_run):
    mine, theirs = make_run("mine"), make_run("theirs")
    answer_pair, answer = _answers(Backend(hosted=True))
    for column in (
        {"model": theirs.id},
        {"model": theirs.id, "key": mine.key},
        {"model": "theirs", "key": theirs.key},
        {"model": "no-such-model"},
    ):
        with pytest.raises(RunError, match="that this browser may use"):
            next(answer(PACK, "What is this?", [{"model": BASE}, column]))
    for sides in (
        {"right": theirs.id},
        {"left": theirs.id, "left_key": mine.key},
        {"right": "theirs", "right_key": theirs.key},
        {"right": "no-such-model"},
    ):
        with pytest.raises(RunError, match="that this browser may use"):
            next(answer_pair(PACK, "What is this?", **sides))
    with pytest.raises(IPMergeError, match="other models"):
        next(answer_pair(OTHER, "What is this?", right=mine.id, right_key=mine.key))


# --- the choice ----------------------------------------------------------------------------


def test_until_something_is_chosen_the_base_stands_against_the_plan(backend, make_run):
    run = make_run("by-ties")
    assert selected(CHOSEN, {}) == (BASE, PLAN)
    found = choices(backend, CHOSEN)
    assert values(found) == [BASE, PLAN, RECORD, run.id]
    assert found[:3] == [
        (UNMERGED, BASE),
        ("Plan in Explore · IP-Merging, Sα 0.4, λ 1", PLAN),
        ("Plan of the recorded answers · IP-Merging, Sα 0, λ 4, γ max", RECORD),
    ]


def test_before_anything_is_chosen_the_recorded_plan_keeps_the_promise_of_the_record():
    assert selected(ChosenMerge(PACK), {}) == (BASE, RECORD)
    assert selected(ChosenMerge(OTHER), {}) == (BASE, PLAN)
    recorded = QUESTION.choice
    assert make_plan(analysis_of(PACK), **recorded.arguments).hash in QUESTION.plan


def test_a_merge_that_is_chosen_later_is_asked_by_some_column(backend, make_run):
    run = make_run("by-ties")
    merged = CHOSEN.with_merge(find_merge(backend, PACK, run.id, {}))
    for columns, after in {
        (BASE, PLAN): (BASE, PLAN),
        (PLAN, BASE, RECORD): (PLAN, BASE, RECORD),
        (BASE, RECORD): (BASE, PLAN),
        (BASE, RECORD, run.id): (BASE, PLAN, run.id),
        (BASE, run.id): (BASE, PLAN),
    }.items():
        held = {PACK: Selection(columns, CHOSEN)}
        assert selected(CHOSEN, held) == columns
        assert selected(merged, held) == after
    found = dict(reversed(pair) for pair in choices(backend, merged))
    assert found[PLAN] == f"Chosen merge · {merged.merge.label}"
    assert found[FORM] == "Plan in Explore · IP-Merging, Sα 0.4, λ 1"


def test_columns_are_added_up_to_four_and_each_is_another_model_first():
    assert with_column(CHOSEN, (BASE, PLAN)) == (BASE, PLAN, RECORD)
    assert with_column(CHOSEN, (BASE, RECORD)) == (BASE, RECORD, PLAN)
    four = with_column(CHOSEN, (BASE, PLAN, RECORD))
    assert four == (BASE, PLAN, RECORD, PLAN)
    assert with_column(CHOSEN, four) == four


def test_plans_kept_in_explore_are_choices_and_anything_else_is_skipped(backend):
    kept = PlanChoice(0.25, 2.0, overrides={})
    texts = [json.dumps([kept.to_browser(), {"s": 7}, None]), "[", "{}", "null", "[" * 100_000, ""]
    for text, n_kept in zip(texts, (1, 0, 0, 0, 0, 0), strict=True):
        found = [c for c in choices(backend, CHOSEN, kept=text) if c[1].startswith("kept:")]
        assert len(found) == n_kept, text[:20]
    label, who = choices(backend, CHOSEN, kept=texts[0])[3]
    assert label == "Plan kept in Explore · IP-Merging, Sα 0.25, λ 2 · number 1"
    assert merge_of(CHOSEN, who).plan == kept
    assert (label.rpartition(" · ")[0], who) in choices(backend, CHOSEN, (BASE, who))
    with pytest.raises(PlanError, match="expected a number from 0 to 1"):
        merge_of(CHOSEN, 'kept:{"s": 7}')


def test_other_methods_are_choices_unless_they_need_a_calibration():
    offered = {who.removeprefix("method:") for _, who in method_choices()}
    assert {"ties", "task_arithmetic", "dare_ties"} <= offered
    assert not {"ip_merging", "fisher", "regmean"} & offered
    assert merge_of(CHOSEN, "method:ties").make_plan().method == "ties"
    for who in ("method:fisher", "method:x"):
        with pytest.raises(PlanError, match="runs without calibration"):
            merge_of(CHOSEN, who)


def test_a_choice_is_kept_for_its_pair_and_used_for_no_other(backend, make_run):
    run = make_run("by-ties")
    selections = {PACK: Selection((run.id, BASE), CHOSEN)}
    assert selected(CHOSEN, selections) == (run.id, BASE)
    assert selected(ChosenMerge(OTHER), selections) == (BASE, PLAN)
    assert values(choices(backend, ChosenMerge(OTHER))) == [BASE, PLAN]


def test_a_chosen_merge_that_is_gone_stays_chosen_and_says_so(backend, make_run):
    run = make_run("by-ties")
    shutil.rmtree(backend.output_folder("by-ties"))
    for columns in ((BASE, run.id), (run.id, run.id)):
        found = choices(backend, CHOSEN, columns)
        assert found[3:] == [("by-ties · no longer available", run.id)]


def test_a_pair_that_is_still_being_analysed_offers_no_merge(backend, make_run):
    make_run("by-ties")
    assert values(choices(backend, ChosenMerge("packs-nobody"))) == [BASE, PLAN]


@pytest.mark.parametrize("odd", [None, {}, "x", 3, [[]], [{"id": 1}], {"id": "a"}])
def test_whatever_a_browser_remembers_is_read_as_runs_or_left_out(odd):
    assert keys_of(odd, None) == {}
    assert keys_of([], odd) == {}
    assert keys_of(odd, {"id": "a", "key": "b"}) == {"a": "b"}


def test_a_browser_remembers_its_latest_runs_each_once():
    runs: list[dict[str, str]] = []
    for number in range(MOST_RUNS + 5):
        runs = with_run(runs, {"id": f"run{number}", "key": "k"})
    assert with_run(runs, runs[-1]) == runs
    assert [run["id"] for run in runs] == [f"run{n}" for n in range(5, MOST_RUNS + 5)]


# --- the answers ---------------------------------------------------------------------------


def ask(backend: Backend, *columns: str) -> tuple[Side, ...]:
    from ipmerge_core.inference.images import open_image

    text, pictures = QUESTION.reference.question, (open_image(QUESTION.image),)
    settings = GenerationSettings(max_new_tokens=24)
    return ended(answer_question(backend, Question(CHOSEN, text, pictures, settings, columns)))


def test_the_recorded_plan_gives_the_recorded_answer(backend):
    left, right = ask(backend, BASE, RECORD)
    assert (left.text.strip(), right.text.strip()) == (QUESTION.base, QUESTION.merged)
    plan = make_plan(analysis_of(PACK), **QUESTION.choice.arguments)
    named = f"IP-Merging, Sα 0, λ 4, γ max · plan {plan.hash}"
    assert right.source == f"plan of the recorded answers · {named}"


def test_a_method_of_the_merge_tab_answers_as_the_chosen_merge(backend):
    how = MethodChoice("task_arithmetic", {"math_weight": 1.0}, {"exclude": "layers.0."})
    chosen = CHOSEN.with_method(how)
    text, settings = QUESTION.reference.question, GenerationSettings(max_new_tokens=24)
    _, right = ended(answer_question(backend, Question(chosen, text, (), settings)))
    plan = make_plan(analysis_of(PACK), "task_arithmetic", math_weight=1.0, exclude="layers.0.")
    assert right.source == (
        f"method in Merge · Task arithmetic, math_weight 1, exclude layers.0. · plan {plan.hash}"
    )
    folder = backend.merged_folder(plan, lambda _: None)
    assert right.text.strip() == answer(folder, text, None, max_new_tokens=24)


def test_both_sides_answer_with_the_models_they_were_given_and_name_them(backend):
    plan = make_plan(analysis_of(PACK), "ties", math_weight=1.0)
    run = backend.start_merge(plan, "by-ties")
    assert wait_for(backend, run).state == "finished"
    folder = backend.output_folder("by-ties")
    expected = answer(folder, QUESTION.reference.question, QUESTION.image, max_new_tokens=24)

    left, right = ask(backend, BASE, run.id)
    assert (left.name, right.name) == ("Base", "Merged")
    assert (left.source, right.source) == ("mllm, unmerged", f"by-ties · TIES · plan {plan.hash}")
    assert right.text.strip() == expected != left.text.strip()

    left, right = ask(backend, "by-ties", PLAN)
    assert (left.name, right.name) == ("Model A", "Model B")
    explored = make_plan(analysis_of(PACK))
    assert left.text.strip() == expected != right.text.strip()
    assert right.source == (f"plan in Explore · IP-Merging, Sα 0.4, λ 1 · plan {explored.hash}")

    left, right = ask(backend, run.id, run.id)  # one model, asked twice
    assert left.text.strip() == right.text.strip() == expected

    shutil.rmtree(folder)
    left, right = ask(backend, BASE, run.id)
    assert (left.state, right.state) == ("finished", "failed")
    assert "'by-ties' no longer exists" in right.note
