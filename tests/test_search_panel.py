"""The search in the Evaluate tab without a browser: started, resumed, shown and taken."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
import pytest
from event_loops import in_loop

from ipmerge_core.errors import IPMergeError, PlanError, RunError
from ipmerge_core.runtime.job_lists import JobRequest
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.search.runs import SearchProgress, iter_search_to
from ipmerge_core.search.study import COMPLETE
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.evaluate.form import asked_of
from ipmerge_core.ui.evaluate.results import read_result
from ipmerge_core.ui.evaluate.search_figures import SearchFigures
from ipmerge_core.ui.evaluate.search_form import (
    lay_out_search,
    listed_methods,
    search_asked_of,
    usual_ranges,
)
from ipmerge_core.ui.evaluate.search_start import LONGEST_RANGES, SearchAsked, search_work
from ipmerge_core.ui.evaluate.start import Asked, start_evaluation
from ipmerge_core.ui.evaluate.tab import result_file, result_items, taken
from ipmerge_core.ui.format import progress_html, progress_of
from ipmerge_core.ui.method_choice import MethodChoice
from ipmerge_core.ui.plan_choice import PlanChoice
from ipmerge_core.ui.run_list.deletion import own_output
from ipmerge_core.ui.runs import results_folder, study_folder

T = TypeVar("T")
PAIR = "pack"
CHOSEN = ChosenMerge(PAIR, PlanChoice(0.1, 8.0))
IP, TIES = f"search-{'1' * 16}", f"search-{'2' * 16}"
FEW = 3  # evaluations


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder with a search of IP-Merging and one of TIES."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPMERGE_HOME", str(folder))
        searched(IP, SearchAsked(evaluations=FEW, optimizer="random", validation=0.5))
        asked = SearchAsked("ties", "density=0.2,0.6", "grid", FEW, validation=0.5)
        searched(TIES, asked)
        yield folder


def laid_out(make: Callable[[], T]) -> T:
    """Call a function that lays out components, inside an app."""

    def inside() -> T:
        with gr.Blocks():
            return make()

    return in_loop(inside)


def searched(result: str, asked: SearchAsked) -> list[SearchProgress]:
    """Run a search as the app's job does."""
    results_folder().mkdir(parents=True, exist_ok=True)
    out = results_folder() / f"{result}.json"
    work = search_work(PAIR, CHOSEN.make_plan(), asked, hosted=False)
    plain = json.loads(json.dumps(work))  # as a job stores its arguments
    steps = iter_search_to(
        out=str(out), tasks=["demo"], study=str(study_folder(out)), limit=2, **plain
    )
    return list(steps)


# --- runs ---


def test_a_run_counts_evaluations_and_goes_on_where_it_was() -> None:
    asked = SearchAsked(evaluations=FEW + 1, optimizer="random", validation=0.5)
    before = read_result(IP, PAIR).search
    assert before is not None
    steps = searched(IP, asked)
    assert [step.evaluations_done for step in steps] == [FEW, FEW + 1]
    assert {step.evaluations_total for step in steps} == {FEW + 1}
    assert steps[-1].last.startswith("evaluation 3: lambda ")
    after = read_result(IP, PAIR).search
    assert after is not None
    assert after.evaluations[:FEW] == before.evaluations


def test_a_run_is_shown_with_its_evaluations_and_the_time_left() -> None:
    first, now = ({"evaluations_done": n, "evaluations_total": 40, "last": "<b>"} for n in (1, 11))
    status = JobStatus("a" * 32, "Search", "running", now, {}, 0.0, 20.0, phase="working",
                       first=first, since=10.0)  # fmt: skip
    found = progress_of(status)
    assert found.share == 11 / 40
    assert found.words == ["11 of 40 evaluations", "about 29 seconds left"]
    assert "&lt;b&gt;" in progress_html(status)


class Store:
    """Records what would be started."""

    def start(self, target: Any, arguments: Any, **how: Any) -> None:
        self.started = target, dict(arguments), how


def test_the_form_starts_the_driver_with_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    monkeypatch.setattr(backend, "store", Store())
    fields = ["ip_merging", "sobol", "lambda=1:4\n\n", ["math"], 7, 2.5, 0.3, 5, True, False]
    form = ["search", ["demo:math"], 5, 3, "cpu", [], "", "", "", "", "zero", [], 1, *fields]
    start_evaluation(backend, CHOSEN, asked_of(form))
    target, arguments, how = backend.store.started
    assert target is iter_search_to
    assert arguments["how"] == {
        "method": "ip_merging", "optimizer": "sobol", "ranges": ["lambda=1:4"],
        "fixed": {"similarity_threshold": 0.1, "similarity": "first", "anchor": "two_base"},
        "groups": ["math"],
        "seed": 5, "validation": 0.3, "racing": True, "labels": True,
    }  # fmt: skip
    assert arguments["budget"] == {"evaluations": 7, "minutes": 2.5}
    assert (arguments["limit"], arguments["seed"], arguments["device"]) == (5, 3, "cpu")
    assert arguments["tasks"] == ["demo:math", "demo:perception"]
    assert Path(arguments["study"]) == study_folder(Path(arguments["out"]))
    assert how["about"]["kind"] == "evaluation"
    assert how["about"]["method"] == "search: ip_merging, sobol"


def test_empty_fields_select_the_usual_space_and_another_method_its_defaults() -> None:
    plan = ChosenMerge(PAIR, method=MethodChoice("ties", {"density": 0.5}), by="merge").make_plan()
    own = search_work(PAIR, plan, SearchAsked(ranges="math_weight=0:1"), hosted=False)["how"]
    assert own["method"] == "ties"
    assert own["fixed"]["density"] == 0.5
    assert "math_weight" not in own["fixed"]
    other = search_work(PAIR, plan, SearchAsked("task_arithmetic"), hosted=False)["how"]
    assert other["fixed"] == {}
    assert search_asked_of(["", "", "", (), 5, 0, *[None] * 4]).minutes is None
    assert search_asked_of(["", "", *[None] * 8]).groups == ()
    assert usual_ranges("ip_merging").splitlines() == [
        "lambda_=0.5,1,2,4,8", "similarity_threshold=0.1,0.3,0.5,0.7,0.9",
    ]  # fmt: skip
    assert usual_ranges("slerp") == ""


REFUSED = {
    "budget": ({"evaluations": 0}, "budget is 0 evaluations"),
    "minutes": ({"minutes": -1.0}, "budget is -1 minutes"),
    "no budget": ({"evaluations": None}, "no budget"),
    "reversed": ({"ranges": "lambda=4:1"}, "Write the lower one first"),
    "words": ({"ranges": "lambda"}, "is not a range"),
    "a parameter": ({"ranges": "density=0:1"}, "has no parameter 'density'"),
    "long": ({"ranges": "a" * (LONGEST_RANGES + 1)}, "characters"),
    "method": ({"method": "best"}, "best"),
    "optimizer": ({"optimizer": "best"}, "Unknown optimizer"),
    "groups": ({"groups": ()}, "Unknown group of items none"),
    "validation": ({"validation": 1.0}, "validation share is 1"),
    "a grid of a range": ({"optimizer": "grid", "ranges": "lambda=0:1"}, "needs values"),
    "no data": ({"method": "regmean", "ranges": "alpha=0:1"}, "calibration"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_searched_is_refused_before_a_run(
    values: dict[str, Any], message: str
) -> None:
    asked = Asked("search", search=SearchAsked(**values))
    with pytest.raises(IPMergeError, match=message):
        start_evaluation(Backend(), CHOSEN, asked)


def test_a_space_limits_the_evaluations() -> None:
    plan = CHOSEN.make_plan()
    search_work(PAIR, plan, SearchAsked(), hosted=True)
    for count in (None, 1000):
        with pytest.raises(RunError, match="at most 100 evaluations"):
            search_work(PAIR, plan, SearchAsked(evaluations=count, minutes=1), hosted=True)


def test_the_form_proposes_the_method_of_the_chosen_merge_once() -> None:
    fields = laid_out(lay_out_search)
    ties = ChosenMerge(PAIR, method=MethodChoice("ties", {}), by="merge")
    first = listed_methods(fields, ties, "ip_merging", "")
    assert first[fields.method]["value"] == "ties"
    assert first[fields.ranges] == usual_ranges("ties")
    names = [name for _, name in first[fields.method]["choices"]]
    assert {"ip_merging", "task_arithmetic", "ties", "dare_linear"} <= set(names)
    later = listed_methods(fields, ties, "ip_merging", "lambda=1:2")
    assert "value" not in later[fields.method]


def test_a_deleted_run_takes_its_study_along(home: Path) -> None:
    out = home / "results" / f"search-{'3' * 16}.json"
    study_folder(out).mkdir()
    status = JobStatus("a" * 32, "Search", "cancelled", {}, {"out": str(out)})
    request = JobRequest("iter_search_to", {"kind": "evaluation"})
    assert own_output(Backend(), status, request, []) == [study_folder(out)]
    out.write_text("{}")
    assert own_output(Backend(), status, request, []) == [out, study_folder(out)]


# --- results ---


def test_a_result_shows_the_best_plan_all_evaluations_and_unseen_scores() -> None:
    found = read_result(TIES, PAIR)
    content, result = found.content, found.search
    assert result is not None
    assert content["kind"] == "search"
    best = result.best_evaluation
    assert best is not None
    assert f"Best: evaluation {best.number}" in content["notes"][0]
    assert f"standard error {best.error:.1f}" in content["notes"][0]
    rows = content["searched"]["rows"]
    assert content["searched"]["parameters"] == ["density"]
    assert [row["score"] for row in rows] == [each.value for each in result.evaluations]
    assert [row["number"] for row in rows if row["best"]] == [best.number]
    models = {row["model"] for row in content["searched"]["unseen"]}
    assert {"unmerged", f"evaluation {best.number}"} <= models
    for row in content["searched"]["unseen"]:
        assert 0 <= row["low"] <= row["right"] / row["n"] <= row["high"] <= 1
    json.dumps(content, allow_nan=False)
    assert "no list of items" in result_items([TIES, PAIR, 0])["reason"]


@pytest.mark.parametrize(("name", "by"), [(IP, "explore"), (TIES, "merge")])
def test_every_evaluation_can_be_taken_as_the_plan_that_was_scored(name: str, by: str) -> None:
    found = read_result(name, PAIR).search
    assert found is not None
    for i, each in enumerate(found.evaluations):
        assert each.state == COMPLETE
        now = taken(ChosenMerge(PAIR), {"id": name, "pack": PAIR, "point": i})
        assert now.by == by
        assert now.make_plan().hash == each.facts["plan"]
        point = read_result(name, PAIR).content["points"][i]
        assert point["takes"]
        assert (point["choice"] is not None) == (by == "explore")
    with pytest.raises(PlanError):
        taken(ChosenMerge(PAIR), {"id": name, "pack": PAIR, "point": 99})
    with pytest.raises(RunError):
        taken(ChosenMerge(PAIR), {"id": name, "pack": PAIR, "point": None})


def test_files_have_all_evaluations_and_need_no_network(home: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(result_file([IP, PAIR, "csv"]))))
    found = read_result(IP, PAIR).search
    assert found is not None
    assert [row["plan"] for row in rows] == [each.facts["plan"] for each in found.evaluations]
    assert json.loads(result_file([IP, PAIR, "json"]))["format"] == "ipmerge-search"
    page = result_file([IP, PAIR, "html"])
    assert "<script src" not in page
    assert str(home) not in page


def test_figures_are_drawn_where_the_evaluations_determine_them() -> None:
    figures = laid_out(SearchFigures)
    data = {"id": TIES, "pack": PAIR, "dark": True, "narrow": True}
    updates = {name: figures.updates(data)[plot] for name, plot in figures.plots.items()}
    assert updates["front"]["visible"]
    assert updates["front"]["value"].layout.title.text is None
    assert not updates["importance"]["visible"]  # fewer than ten evaluations
    for other in ({"id": f"sweep-{'1' * 16}", "pack": PAIR}, None):
        assert not any(update["visible"] for update in figures.updates(other).values())
