"""Replays of optimizers on tables of past results, and their report."""

from __future__ import annotations

import csv
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from test_search_surrogate import GRID, SCORES

from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError, RunCancelled, RunError
from ipmerge_core.search.consistency import most_consistent
from ipmerge_core.search.replay import iter_replays, read_tables
from ipmerge_core.search.study import COMPLETE, PRUNED, Evaluation
from ipmerge_core.search.summary import (
    as_csv,
    best_of,
    curves,
    pareto_front,
    ranking,
    standings,
    table_facts,
)


def write_table(path: Path, *, test: bool = False, density: bool = False) -> Path:
    """A table of task arithmetic, and one of TIES with three parameters."""
    rows = []
    for i, a in enumerate(GRID):
        for j, b in enumerate(GRID):
            row = {"method": "task_arithmetic", "domain": "math", "mllm_weight": a,
                   "math_weight": b, "score": SCORES[i, j]}  # fmt: skip
            rows.append({**row, "test": SCORES[i, j] + 0.5 * a} if test else row)
            if density:
                rows += [
                    {**row, "method": "ties", "density": d, "score": SCORES[i, j] - d}
                    for d in (0.2, 0.5, 0.8)
                ]
    path.write_text(as_csv(rows))
    return path


def test_a_table_gives_its_space_its_budget_and_its_facts(tmp_path: Path) -> None:
    first, second = read_tables(write_table(tmp_path / "t.csv", density=True))
    assert (first.method, first.space.names, first.budget) == (
        "task_arithmetic", ("mllm_weight", "math_weight"), 40)  # fmt: skip
    assert (second.method, second.space.names, second.budget) == (
        "ties", ("mllm_weight", "math_weight", "density"), 60)  # fmt: skip
    facts = table_facts(first)
    assert facts.best == 48.5612
    assert facts.at == {"mllm_weight": 0.8, "math_weight": 0.6}
    assert facts.loo == pytest.approx(9.7333, abs=1e-4)
    assert facts.sum_one == pytest.approx(8.9246, abs=1e-4)
    assert facts.sum_near == pytest.approx(6.8495, abs=1e-4)
    assert table_facts(second).points == 75


def test_results_of_one_plan_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,score\n0,1\n0,3\n0.5,5\n1,2\n")
    (table,) = read_tables(path)
    np.testing.assert_allclose(table.scores.values, [2, 5, 2])


def test_held_out_regret_is_that_of_the_best_plan_so_far(tmp_path: Path) -> None:
    (table,) = read_tables(write_table(tmp_path / "t.csv", test=True))
    replays = [step.replay for step in iter_replays([table], ["random", "grid"], seeds=2)]
    for replay in replays:
        assert replay.test is not None
        assert len(replay.test) == len(replay.regret)
        assert ((replay.test >= 0) & (replay.test <= 1)).all()
    found = {each.optimizer: each for each in standings(replays)}
    assert found["random"].over_random == 1.0
    assert found["grid"].regret < found["random"].regret
    assert [row.optimizer for row in ranking(list(found.values()))] == ["grid", "random"]
    by_name = {curve.optimizer: curve for curve in curves(replays)}
    assert len(by_name["grid"].regret) == len(by_name["random"].regret) == 40


def test_a_comparison_can_be_stopped(tmp_path: Path) -> None:
    tables = read_tables(write_table(tmp_path / "t.csv"))
    stop = threading.Event()
    steps = iter_replays(tables, ["random"], seeds=5, stop=stop)
    assert next(steps).total == 5
    stop.set()
    with pytest.raises(RunCancelled):
        next(steps)


DAMAGED = {
    "no score": ("x,y\n1,2\n", "has the columns x, y; expected one named 'score'"),
    "empty": ("", "has the columns none"),
    "no rows": ("x,score\n", "has no rows"),
    "no parameter": ("method,score\nties,1\n", "no column of a parameter"),
    "a word": ("x,score\n1,high\n2,3\n", "Row 2 of .* has score = 'high'; expected a finite"),
    "nan": ("x,score\n1,2\n2,nan\n", "Row 3 of .* has score = 'nan'"),
    "infinite": ("x,score\n1,2\ninf,2\n", "has x = 'inf'"),
    "missing": ("x,y,score\n1,2,3\n1,,3\n", "has y = ''"),
    "one point": ("x,score\n1,2\n1,3\n", "have the same parameters"),
    "two points": ("x,score\n1,2\n2,3\n", "has 2 points in 1 dimensions"),
    "binary": ("\x00\x01\x02score", "expected one named 'score'"),
}


@pytest.mark.parametrize(("text", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        read_tables(path)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_valid_are_refused(tmp_path: Path) -> None:
    tables = read_tables(write_table(tmp_path / "t.csv"))
    with pytest.raises(RunError, match="number of seeds is 0"):
        next(iter_replays(tables, seeds=0))
    with pytest.raises(RunError, match="budget is 0 evaluations"):
        next(iter_replays(tables, ["random"], budget=0))
    with pytest.raises(PlanError, match="Unknown optimizer 'best'"):
        next(iter_replays(tables, ["best"]))


def test_the_command_writes_a_report_that_needs_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "t.csv", test=True)
    out = tmp_path / "out"
    chosen = [part for name in ("random", "pattern") for part in ("--optimizer", name)]
    assert main(["replay", str(table), "-o", str(out), "--seeds", "2", *chosen]) == 0
    printed = capsys.readouterr().out
    assert "pattern: mean normalized regret" in printed
    assert "weights summing to 1 cost 8.9 %" in printed
    page = (out / "report.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert page.count('id="figure-') == 4
    assert "leave-one-out error, % of the range" in page
    rows = list(csv.DictReader((out / "curves.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 40
    assert {row["optimizer"] for row in rows} == {"random", "pattern"}
    assert (out / "tables.csv").read_text().startswith("method,task,points,best")


def test_text_in_csv_is_no_formula() -> None:
    assert as_csv([{"a": "=1+1", "b": -1.5}]) == "a,b\n'=1+1,-1.5\n"


# --- choices from results ---


def evaluated(number: int, skill: float, perception: float, state: str = COMPLETE) -> Evaluation:
    scores = {"skill": skill, "perception": perception}
    return Evaluation(number, {"x": 0.0}, state, skill, 0.0, 1, {"scores": scores})


def test_the_front_has_what_no_other_plan_beats() -> None:
    found = [evaluated(0, 0.5, 0.9), evaluated(1, 0.8, 0.8), evaluated(2, 0.7, 0.7),
             evaluated(3, 0.8, 0.8), evaluated(4, 0.9, 0.9, PRUNED)]  # fmt: skip
    assert [e.number for e in pareto_front(found, ("skill", "perception"))] == [1, 0]
    best = best_of(found)
    assert best is not None
    assert best.number == 1  # the first of equal ones, and none that was given up
    assert best_of([]) is None


def test_the_most_consistent_coefficient_is_chosen_without_labels() -> None:
    path = [list("xxx"), list("xyx"), list("xyz"), list("xyz"), list("wyz")]
    found = most_consistent(path)
    assert found.disagreements == {1: 2, 2: 1, 3: 1}
    assert (found.chosen, found.tied) == (2, (2, 3))
    assert most_consistent([["A."], [" a"], ["a"]]).disagreements == {1: 0}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([["a"], ["b"]], "needs at least 3"),
        ([["a"], ["b"], ["c", "d"]], "answered 1, 2 questions"),
        ([[], [], []], "at least one"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(
    answers: list[list[str]], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        most_consistent(answers)
