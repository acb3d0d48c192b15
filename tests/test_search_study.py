"""A study in a storage: resumed, shared by workers, stopped, failing, or of another search."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ipmerge_core.errors import PlanError, RunCancelled, RunError
from ipmerge_core.search.optimizers import OPTIMIZERS
from ipmerge_core.search.space import Axis, SearchSpace
from ipmerge_core.search.storage import claim_worker, open_study, quiet
from ipmerge_core.search.study import (
    COMPLETE,
    FAILED,
    Budget,
    Evaluation,
    Measured,
    Trials,
    evaluations_of,
    run,
)

SPACE = SearchSpace((
    Axis("a", 0.0, 2.0, (0.0, 0.5, 1.0, 1.5, 2.0)),
    Axis("b", -1.0, 1.0, (-1.0, -0.5, 0.0, 0.5, 1.0)),
))  # fmt: skip
DEFINITION = {"method": "task_arithmetic", "seed": 0}
Report = Callable[[float, int], bool]


class Hill:
    """A smooth objective that counts its calls, and can fail or stop at one of them."""

    def __init__(self, fail_at: int | None = None, stop: threading.Event | None = None) -> None:
        self.calls: list[dict[str, float]] = []
        self.fail_at, self.stop = fail_at, stop

    def __call__(self, parameters: Mapping[str, float], report: Report) -> Measured:
        self.calls.append(dict(parameters))
        if len(self.calls) == self.fail_at:
            if self.stop is not None:
                self.stop.set()
                report(0.0, 1)
            raise PlanError("The merge failed at this point.")
        value = 1 - (parameters["a"] - 1.2) ** 2 - (parameters["b"] - 0.1) ** 2
        return Measured(value, error=0.01, items=10, facts={"seconds": 0.1})


def search(
    folder: Path, name: str, objective: Hill, evaluations: int, **how: object
) -> list[Evaluation]:
    study = open_study(folder, {**DEFINITION, "optimizer": name})
    with quiet():
        run(OPTIMIZERS[name], Trials(study, SPACE, objective, Budget(evaluations), **how), seed=0)
    return evaluations_of(study)


def points(evaluations: list[Evaluation]) -> list[dict[str, float]]:
    return [each.parameters for each in evaluations]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_search_evaluates_no_point_twice_and_ends_at_its_budget(
    name: str, tmp_path: Path
) -> None:
    objective = Hill()
    found = search(tmp_path, name, objective, 12)
    assert len(found) == len(objective.calls) == 12
    assert len({tuple(each.items()) for each in points(found)}) == 12
    assert all(each.state == COMPLETE and each.items == 10 for each in found)
    assert search(tmp_path, name, objective, 12) == found
    assert len(objective.calls) == 12  # a search that has ended evaluates nothing


@pytest.mark.parametrize("name", ["grid", "sobol", "cma-es", "powell"])
def test_a_search_in_two_parts_visits_the_points_of_one(name: str, tmp_path: Path) -> None:
    whole, first, second = tmp_path / "whole", tmp_path / "parts", tmp_path / "parts"
    whole.mkdir()
    first.mkdir()
    expected = points(search(whole, name, Hill(), 14))
    search(first, name, Hill(), 6)
    rest = Hill()
    assert points(search(second, name, rest, 14)) == expected
    assert len(rest.calls) == 8


def test_a_grid_ends_when_all_of_it_is_known(tmp_path: Path) -> None:
    found = search(tmp_path, "grid", Hill(), 100)
    assert len(found) == 25
    best = max(found, key=lambda each: each.value or -1)
    assert best.parameters == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("name", ["random", "pattern", "gp-bo"])
def test_a_point_that_fails_is_kept_with_its_reason_and_the_search_goes_on(
    name: str, tmp_path: Path
) -> None:
    found = search(tmp_path, name, Hill(fail_at=3), 10)
    assert len(found) == 10
    assert [each.number for each in found if each.state == FAILED] == [2]
    failed = found[2]
    assert failed.value is None
    assert failed.reason == "The merge failed at this point."
    objective = Hill()
    search(tmp_path, name, objective, 11)
    assert failed.parameters not in objective.calls  # it is not tried again


def test_stop_keeps_what_is_evaluated_and_frees_the_point(tmp_path: Path) -> None:
    stop = threading.Event()
    objective = Hill(fail_at=4, stop=stop)
    with pytest.raises(RunCancelled, match="its evaluations are kept"):
        search(tmp_path, "random", objective, 10, stop=stop)
    rest = Hill()
    found = search(tmp_path, "random", rest, 10)
    assert len(found) == 10
    assert len(rest.calls) == 7
    assert rest.calls[0] == objective.calls[3]  # the interrupted point is measured first


def test_a_killed_search_repeats_no_evaluation(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_search_study import Hill, search\n"
        "class Dying(Hill):\n"
        "    def __call__(self, parameters, report):\n"
        "        if len(self.calls) == 5:\n"
        "            os._exit(9)\n"
        "        return super().__call__(parameters, report)\n"
        "search(Path(sys.argv[1]), 'sobol', Dying(), 12)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == 9
    objective = Hill()
    found = search(tmp_path, "sobol", objective, 12)
    assert len(found) == 12
    assert len(objective.calls) == 7


@pytest.mark.parametrize("name", ["grid", "random", "pattern", "gp-bo", "cma-es"])
def test_two_workers_on_one_storage_share_the_budget(name: str, tmp_path: Path) -> None:
    objectives = [Hill(), Hill()]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            search(tmp_path, name, objectives[number], 16, worker=number)
        except BaseException as error:  # noqa: BLE001 (reported below)
            errors.append(error)

    search(tmp_path, name, objectives[0], 2)  # creates the tables
    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    calls = [tuple(call.items()) for objective in objectives for call in objective.calls]
    assert 16 <= len(calls) <= 17  # both may begin the last one
    assert objectives[1].calls


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"evaluations": 0}, "budget is 0 evaluations; expected a number of at least 1"),
        ({"evaluations": -3}, "budget is -3 evaluations"),
        ({"evaluations": None, "minutes": 0.0}, "budget is 0 minutes"),
        ({"evaluations": None, "minutes": float("nan")}, "budget is nan minutes"),
        ({"evaluations": None}, "has no budget"),
        ({"items": 0}, "budget is 0 items"),
    ],
)
def test_a_budget_that_is_not_valid_is_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Budget(**limits)


def test_budgets_of_items_and_minutes_end_a_search(tmp_path: Path) -> None:
    assert Budget(None, items=100).is_spent(3, 100, 0.0)
    assert Budget(None, minutes=1.0).is_spent(0, 0, 60.0)
    assert not Budget(None, minutes=1.0).is_spent(10**6, 10**6, 59.0)
    study = open_study(tmp_path, DEFINITION)
    run(OPTIMIZERS["random"], Trials(study, SPACE, Hill(), Budget(None, items=45)), seed=0)
    assert len(evaluations_of(study)) == 5


def test_workers_that_start_together_create_one_storage(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ipmerge_core.search.storage import open_study\n"
        "import optuna\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "open_study(Path(sys.argv[1]), {'seed': 0})\n"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    for worker in workers:
        worker.communicate()


def test_a_storage_of_another_search_is_refused(tmp_path: Path) -> None:
    open_study(tmp_path, DEFINITION)
    with pytest.raises(RunError, match="holds another search: its seed differ"):
        open_study(tmp_path, {**DEFINITION, "seed": 1})
    open_study(tmp_path, DEFINITION)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("no database at all" * 100)
    with pytest.raises(RunError, match="cannot be used .*not a database") as caught:
        open_study(tmp_path, DEFINITION)
    assert "\n" not in str(caught.value)


def test_a_locked_storage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipmerge_core.search.storage._LOCK_SECONDS", 0.1)
    lock = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(RunError, match="Another process holds it locked"):
            open_study(tmp_path, DEFINITION)
    finally:
        lock.rollback()
        lock.close()


def test_a_password_in_a_url_is_not_shown(tmp_path: Path) -> None:
    url = "postgresql://user:secret-word@127.0.0.1:9/none"
    with pytest.raises(RunError, match="cannot be used") as caught:
        open_study(tmp_path, DEFINITION, url)
    assert "secret-word" not in str(caught.value)


def test_a_worker_number_is_claimed_once(tmp_path: Path) -> None:
    first, lock = claim_worker(tmp_path)
    second, other = claim_worker(tmp_path)
    assert (first, second) == (0, 1)
    with pytest.raises(RunError, match="Worker 0 of the search .* is running"):
        claim_worker(tmp_path, 0)
    lock.release()
    third, again = claim_worker(tmp_path)
    assert third == 0
    again.release()
    other.release()
