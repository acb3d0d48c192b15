"""Searches whose evaluations are merges of the demo models, in memory."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

import ipmerge_core as ipm
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError, RunCancelled, RunError
from ipmerge_core.evaluation.evaluate import EvaluationSettings, iter_evaluation
from ipmerge_core.evaluation.merged_models import MergedModels
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.subjects import subject_of_folder
from ipmerge_core.methods.declarations import drained
from ipmerge_core.search.coefficients import SearchResult, SearchSettings, iter_search
from ipmerge_core.search.objective import RUNGS, MergeObjective, part_of, scored
from ipmerge_core.search.study import COMPLETE, FAILED, PRUNED, Budget
from ipmerge_core.tasks.items import Draw
from ipmerge_core.tasks.registry import find_task, find_tasks

PACK = Path(__file__).parents[1] / "assets" / "demo" / "pack.json.gz"
FEW = EvaluationSettings(limit=12)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return Analysis.load(PACK)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ReplyStore:
    return ReplyStore(tmp_path_factory.mktemp("replies"))


def searched(analysis: Analysis, folder: Path, store: ReplyStore, **how: object) -> SearchResult:
    settings = SearchSettings(**{"optimizer": "grid", "validation": 0.5, **how})
    return drained(iter_search(analysis, folder, find_tasks(["demo"]), settings, FEW, store))


def test_validation_and_unseen_items_are_disjoint_and_complete() -> None:
    task = find_task("demo")
    every = {item.id for item in task.load(Draw(100)).items}
    seen, unseen = ({i.id for i in part_of(task, *ends).load(Draw(100)).items}
                    for ends in ((0.0, 0.2), (0.2, 1.0)))  # fmt: skip
    assert seen.isdisjoint(unseen)
    assert seen | unseen == every
    assert 0.15 < len(seen) / len(every) < 0.25
    math = {item.id for item in part_of(find_task("demo:math"), 0.0, 0.2).load(Draw(100)).items}
    assert math < seen  # a part of a task is split as the whole


@pytest.mark.parametrize("method", ["task_arithmetic", "ip_merging", "dare_linear"])
def test_a_point_has_the_score_of_the_merged_folder(
    method: str, analysis: Analysis, store: ReplyStore, tmp_path: Path
) -> None:
    how = SearchSettings(method=method)
    parameters = {axis.name: axis.high for axis in how.space.axes}
    tasks = find_tasks(["demo"])
    with MergedModels(analysis.sources) as models:
        objective = MergeObjective(
            analysis, how.space, tasks, models, {"method": method}, how.groups, 0.5,
            settings=FEW, store=store,
        )  # fmt: skip
        found = objective(parameters, lambda *_: False)
        plan = objective.plan_at(parameters)
    ipm.merge(plan, tmp_path / "merged")
    subject = subject_of_folder(tmp_path / "merged")
    report = drained(
        iter_evaluation([subject], [part_of(task, 0, 0.5) for task in tasks], FEW,
                        ReplyStore(tmp_path / "own"))
    )  # fmt: skip
    again = scored(report, subject.name, how.groups)
    assert (found.value, found.error, found.items) == (again.value, again.error, again.items)
    assert found.facts["scores"] == again.facts["scores"]
    assert found.facts["plan"] == plan.hash


def test_a_search_reports_its_best_plan_on_unseen_items(
    analysis: Analysis, store: ReplyStore, tmp_path: Path
) -> None:
    result = searched(analysis, tmp_path, store, budget=Budget(4))
    assert len(result.evaluations) == 4
    best = result.best_evaluation
    assert best is not None
    assert best.value == max(each.value for each in result.evaluations)
    assert result.best == best.number
    assert best.number in {*result.front, result.best}
    plan = ipm.make_plan(analysis, **result.arguments)
    assert plan.hash == best.facts["plan"]
    assert result.report is not None
    assert list(result.report.subjects)[:2] == ["unmerged", f"evaluation {best.number}"]
    seen = sum(best.facts["n"].values())
    unseen = sum(part.n for r in result.report.results if r.subject == "unmerged"
                 for part in r.parts if part.kind == "group")  # fmt: skip
    assert seen + unseen == 9 * 12
    result.save(tmp_path / "search.json")
    assert SearchResult.load(tmp_path / "search.json") == result


def test_a_search_that_is_run_again_merges_nothing_that_it_knows(
    analysis: Analysis, store: ReplyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = searched(analysis, tmp_path, store, budget=Budget(2), optimizer="random")
    merged: list[str] = []
    score = MergeObjective.__call__

    def counted(self: MergeObjective, parameters: dict[str, float], report: object) -> object:
        merged.append(str(parameters))
        return score(self, parameters, report)

    monkeypatch.setattr(MergeObjective, "__call__", counted)
    second = searched(analysis, tmp_path, store, budget=Budget(3), optimizer="random")
    assert len(merged) == 1
    assert second.evaluations[:2] == first.evaluations


def test_racing_gives_points_up_with_fewer_items(
    analysis: Analysis, store: ReplyStore, tmp_path: Path
) -> None:
    result = searched(analysis, tmp_path, store, budget=Budget(6), racing=True)
    states = [each.state for each in result.evaluations]
    assert set(states) == {COMPLETE, PRUNED}
    whole = max(each.items for each in result.evaluations)
    for each in result.evaluations:
        assert (each.items < whole) == (each.state == PRUNED)
    assert result.best_evaluation is not None
    assert result.best_evaluation.state == COMPLETE
    assert RUNGS[-1] == 1.0


def test_a_point_whose_plan_fails_is_kept_with_its_reason(
    analysis: Analysis, store: ReplyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = MergeObjective.plan_at

    def failing(self: MergeObjective, parameters: dict[str, float]) -> object:
        if parameters["math_weight"] == 0.2:
            raise PlanError("This weight is refused.")
        return make(self, parameters)

    monkeypatch.setattr(MergeObjective, "plan_at", failing)
    ranges = ("mllm_weight=0.5,1", "math_weight=0.2,0.4")
    result = searched(analysis, tmp_path, store, ranges=ranges, budget=Budget(4))
    failed = [each for each in result.evaluations if each.state == FAILED]
    assert [each.reason for each in failed] == ["This weight is refused."] * 2
    assert len(result.evaluations) == 4


def test_a_stopped_search_goes_on_where_it_was(
    analysis: Analysis, store: ReplyStore, tmp_path: Path
) -> None:
    stop, how = threading.Event(), SearchSettings(optimizer="sobol", budget=Budget(4))
    steps = iter_search(analysis, tmp_path, find_tasks(["demo"]), how, FEW, store, stops=[stop])
    assert next(steps).done == 0
    assert next(steps).done == 1
    stop.set()
    with pytest.raises(RunCancelled):
        list(steps)
    rest = list(iter_search(analysis, tmp_path, find_tasks(["demo"]), how, FEW, store))
    assert rest[0].done >= 1
    assert rest[-1].done == 4


def test_closing_a_search_ends_it(analysis: Analysis, store: ReplyStore, tmp_path: Path) -> None:
    how = SearchSettings(optimizer="sobol", budget=Budget(40))
    steps = iter_search(analysis, tmp_path, find_tasks(["demo"]), how, FEW, store)
    next(steps)
    next(steps)
    steps.close()
    alive = [t.name for t in threading.enumerate() if t.name.startswith("with-reports")]
    assert not alive


REFUSED = {
    "an unknown group": ({"groups": ("reasoning",)}, RunError, "Unknown group of items reasoning"),
    "no group": ({"groups": ()}, RunError, "Unknown group of items none"),
    "no items": ({"validation": 0.0}, RunError, "validation share is 0"),
    "all items": ({"validation": 1.0}, RunError, "validation share is 1"),
    "a parameter of another method": (
        {"ranges": ("density=0.1:1",)}, PlanError, "has no parameter 'density'"),
    "searched and fixed": (
        {"ranges": ("math_weight=0:1",), "fixed": {"math_weight": 0.3}, "optimizer": "random"},
        RunError, "'math_weight' is searched, and has a fixed value too"),
    "a grid of a range": ({"ranges": ("math_weight=0:1",)}, PlanError, "needs values"),
    "an optimizer": ({"optimizer": "best"}, PlanError, "Unknown optimizer"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_a_search_that_is_not_valid_is_refused_before_any_merge(
    how: dict[str, object],
    kind: type[Exception],
    message: str,
    analysis: Analysis,
    store: ReplyStore,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=message):
        searched(analysis, tmp_path, store, **how)


def test_a_group_without_items_is_named(
    analysis: Analysis, store: ReplyStore, tmp_path: Path
) -> None:
    result = searched(analysis, tmp_path, store, groups=("other",), budget=Budget(1))
    assert result.best is None
    assert result.evaluations[0].reason.startswith("No validation item measures other")


def test_the_command_searches_resumes_and_writes_its_report(
    tmp_path: Path, store: ReplyStore, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(*more: str) -> int:
        return main([
            "search", str(PACK), "--tasks", "demo:math", "--limit", "12", "--optimizer", "random",
            "--validation", "0.5", "--store", str(store.folder), "-o", str(tmp_path / "study"),
            "--quiet", *more,
        ])  # fmt: skip

    assert search("--budget", "2", "--method", "ip_merging") == 0
    printed = capsys.readouterr().out
    assert "2 evaluations of ip_merging." in printed
    assert "Unseen items, demo:perception, unmerged" in printed  # the guard
    assert {path.name for path in (tmp_path / "study").iterdir()} >= {
        "study.db", "search.json", "report.html", "evaluations.csv", "importance.csv",
        "unseen.csv"}  # fmt: skip
    assert search("--budget", "2", "--method", "ip_merging", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["evaluations"]) == 2
    assert search("--budget", "2", "--method", "ties") == 2
    assert "holds another search" in capsys.readouterr().err
    assert search("--budget", "0", "--method", "ip_merging") == 2
    assert "budget is 0 evaluations" in capsys.readouterr().err
