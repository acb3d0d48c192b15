"""Searches without labels: a path of one parameter, chosen by the agreement of its answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.cli import main
from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.evaluate import EvaluationSettings
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.report import Judged, Report
from ipmerge_core.methods.declarations import drained
from ipmerge_core.plots.search_report import describe, evaluations_csv, search_figures
from ipmerge_core.search.coefficients import SearchResult, SearchSettings, SearchStep, iter_search
from ipmerge_core.search.consistency import describe_path, path_of, path_order
from ipmerge_core.search.space import Axis, SearchSpace
from ipmerge_core.search.study import COMPLETE, FAILED, Budget, Evaluation
from ipmerge_core.tasks.registry import find_tasks
from ipmerge_core.ui.evaluate.search_content import search_content

PACK = Path(__file__).parents[1] / "assets" / "demo" / "pack.json.gz"
VALUES = (0.2, 0.6, 0.8, 1.0)
RANGE = f"math_weight={','.join(map(str, VALUES))}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ReplyStore:
    return ReplyStore(tmp_path_factory.mktemp("replies"))


@pytest.fixture(scope="module")
def steps(store: ReplyStore, tmp_path_factory: pytest.TempPathFactory) -> list[SearchStep]:
    return list(searching(store, tmp_path_factory.mktemp("study")))


def searching(store: ReplyStore, folder: Path, **how: object):
    settings = SearchSettings(**{
        "optimizer": "grid", "ranges": (RANGE,), "validation": 0.5, "labels": False, **how
    })  # fmt: skip
    items = EvaluationSettings(limit=6)
    return iter_search(Analysis.load(PACK), folder, find_tasks(["demo"]), settings, items, store)


@pytest.fixture(scope="module")
def result(
    steps: list[SearchStep], store: ReplyStore, tmp_path_factory: pytest.TempPathFactory
) -> SearchResult:
    assert steps
    return drained(searching(store, tmp_path_factory.mktemp("again")))


def test_all_values_are_evaluated_and_counted(steps: list[SearchStep]) -> None:
    assert [step.done for step in steps] == [0, 1, 2, 3, 4]
    assert {step.total for step in steps} == {len(VALUES)}  # and not the budget of 40


def test_the_choice_is_where_the_stored_replies_agree_most(
    result: SearchResult, store: ReplyStore
) -> None:
    path = result.path
    assert path is not None
    numbered = {each.number: each for each in result.evaluations}
    ordered = [numbered[number] for number in path.numbers]
    assert tuple(each.parameters["math_weight"] for each in ordered) == VALUES
    assert path.disagreements[0] is None
    assert path.disagreements[-1] is None
    inner = [count for count in path.disagreements if count is not None]
    assert len(inner) == 2
    assert path.disagreement(path.chosen) == min(inner)
    assert result.best == path.chosen
    assert path.questions == ordered[0].items
    assert path.by_labels == max(ordered, key=lambda each: each.value or 0).number
    assert result.report is not None
    assert {f"evaluation {n}" for n in (path.chosen, path.by_labels)} <= set(result.report.subjects)


def test_a_path_starts_at_the_vision_language_model() -> None:
    def order(name: str) -> list[float]:
        space = SearchSpace((Axis(name, 0.0, 1.0, (0.0, 0.5, 1.0)),))
        found = [
            Evaluation(n, {name: v}, COMPLETE, 1.0, 0.0, 1, {})
            for n, v in enumerate((0.5, 0.0, 1.0))
        ]
        failed = Evaluation(3, {name: 0.7}, FAILED, None, 0.0, 0, {}, "No.")
        return [each.parameters[name] for each in path_order(space, [*found, failed])]

    assert order("math_weight") == order("lambda_") == [0.0, 0.5, 1.0]
    assert (
        order("alpha") == order("mllm_weight") == order("similarity_threshold") == [1.0, 0.5, 0.0]
    )


def answers(*texts: str) -> Report:
    """A report of models that answer one task; every letter is one reply."""
    replies = {
        str(n): {"task": [Judged("wrong", text=letter) for letter in text]}
        for n, text in enumerate(texts)
    }
    return Report("", {}, {}, {name: {} for name in replies}, (), (), (), replies)


def test_verdicts_do_not_change_the_choice() -> None:
    found = [Evaluation(n, {"t": n}, COMPLETE, 1.0, 0.0, 3, {}) for n in range(4)]
    names = [str(n) for n in range(4)]
    report = answers("xxx", "xyx", "xyz", "xyz")
    right = {
        name: {
            task: [replace(reply, outcome="right") for reply in rows] for task, rows in own.items()
        }
        for name, own in report.replies.items()
    }
    path = path_of(found, names, report)
    assert path.disagreements == (None, 2, 1, None)
    assert path_of(found, names, replace(report, replies=right)) == path


def test_ties_and_the_choice_of_the_labels_are_described() -> None:
    scores = (50.0, 40.0, 60.0, 55.0, 10.0)
    found = [Evaluation(n + 5, {"t": n}, COMPLETE, s, 0.0, 3, {}) for n, s in enumerate(scores)]
    report = answers("xxx", "xyx", "xyz", "xyz", "wyz")
    path = path_of(found, [str(n) for n in range(5)], report)
    assert path.tied == (7, 8)
    assert path.by_labels == 7
    words = describe_path(path, found)
    assert "evaluation 7, whose answers to 1 of 3 validation items differ" in words
    assert "(1 more with as few; the closest to the unmerged model)" in words
    assert words.endswith("The labels choose the same.")
    other = describe_path(replace(path, by_labels=9, tied=(7,)), found)
    assert other.endswith(
        "The labels would choose evaluation 9: 10.0 instead of 60.0 on these items."
    )


def test_the_result_is_saved_and_shown_with_its_disagreements(
    result: SearchResult, tmp_path: Path
) -> None:
    result.save(tmp_path / "search.json")
    assert SearchResult.load(tmp_path / "search.json") == result
    assert "Chosen without labels: evaluation" in describe(result)
    assert "Best:" not in describe(result)
    assert evaluations_csv(result).splitlines()[0].split(",")[-3] == "disagreement"
    assert "path" in search_figures(result)
    content = search_content(f"search-{'1' * 16}", "pack", result)
    assert "Chosen without labels" in content["notes"][0]
    rows = content["searched"]["rows"]
    assert sum(row["disagreement"] is not None for row in rows) == len(VALUES) - 2


REFUSED = {
    "two parameters": (
        {"ranges": (RANGE, "mllm_weight=0.5,1")}, r"varies one parameter; got 2 \(math_weight, "),
    "two values": ({"ranges": ("math_weight=0.5,1",)}, "needs at least 3"),
    "a range": ({"ranges": ("math_weight=0:1",)}, "needs at least 3"),
    "another optimizer": ({"optimizer": "gp-bo"}, "got the optimizer 'gp-bo'"),
    "racing": ({"racing": True}, "got racing"),
    "a small budget": ({"budget": Budget(3)}, "path has 4 values, and the budget is 3"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_path_is_refused(
    how: dict[str, object], message: str, store: ReplyStore, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=message):
        next(searching(store, tmp_path, **how))


def test_the_command_chooses_without_labels(
    result: SearchResult, store: ReplyStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "search", str(PACK), "--tasks", "demo", "--limit", "6", "--validation", "0.5", "--range",
        RANGE, "--no-labels", "--store", str(store.folder), "-o", str(tmp_path), "--method",
        "task_arithmetic", "--quiet", "--json",
    ]  # fmt: skip
    assert main(command) == 0
    content = json.loads(capsys.readouterr().out)
    assert result.path is not None
    assert content["path"]["disagreements"] == list(result.path.disagreements)
    assert content["best"] == content["path"]["tied"][0] == result.best
    assert main([*command, "--optimizer", "random"]) == 2
    assert "got the optimizer 'random'" in capsys.readouterr().err
