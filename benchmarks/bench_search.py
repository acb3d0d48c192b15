"""Time searches of coefficients on the demo models.

    python benchmarks/bench_search.py [--evaluations 400] [--limit 130]

A grid of 25 merges by task arithmetic with 200 validation items, in one process; a search by two
workers on one storage against one worker; a search that is killed and run again; the surrogate
study of 7 optimizers, 10 seeds and 3 methods; and racing: items and the loss against all items.
Times are wall-clock seconds. Two workers need two idle cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, table

from ipmerge_core.search.replay import iter_replays, read_tables
from ipmerge_core.search.summary import as_csv

ROOT = Path(__file__).parents[1]
PACK = ROOT / "assets" / "demo" / "pack.json.gz"
RESULTS = ROOT / "docs" / "search.csv"
KILLED_AFTER, RESUMED = 8, 24  # evaluations
FEW = 12  # items per skill of the killed search


def command(folder: Path, optimizer: str, budget: int, limit: int, *more: str) -> list[str]:
    """Return the command of one search on the demo models."""
    return [
        sys.executable, "-m", "ipmerge_core", "search", str(PACK), "--tasks", "demo",
        "--method", "task_arithmetic", "--optimizer", optimizer, "--budget", str(budget),
        "--limit", str(limit), "--store", str(folder / "replies"), "-o", str(folder / "study"),
        "--device", "cpu", "--quiet", *more,
    ]  # fmt: skip


def timed(commands: list[list[str]]) -> float:
    """Run commands at the same time and return the seconds until all have ended."""
    started = time.monotonic()
    running = [subprocess.Popen(each, stdout=subprocess.DEVNULL, cwd=ROOT) for each in commands]
    codes = [process.wait() for process in running]
    assert not any(codes), codes
    return time.monotonic() - started


def evaluations(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a search's evaluations."""
    with (folder / "study" / "evaluations.csv").open() as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=400, help="of the search by two workers")
    parser.add_argument("--limit", type=int, default=130, help="items per skill")
    options = parser.parse_args()
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        names = ("grid", "one", "two", "killed", "race")
        folders = {name: Path(temporary) / name for name in names}
        seconds = timed([command(folders["grid"], "grid", 25, options.limit)])
        items = int(evaluations(folders["grid"])[0]["items"])
        rows.append([f"grid of 25 merges, {items} validation items each", "120 s",
                     f"{seconds:.0f} s"])  # fmt: skip
        one = timed([command(folders["one"], "sobol", options.evaluations, options.limit)])
        two = timed([
            command(folders["two"], "sobol", options.evaluations, options.limit, "--worker", str(n))
            for n in (0, 1)
        ])  # fmt: skip
        rows.append([f"two workers / one, {options.evaluations} evaluations", "0.6",
                     f"{two / one:.2f} ({two:.0f} / {one:.0f} s)"])  # fmt: skip
        rows.append(resumed_row(folders["killed"]))
        timed([command(folders["race"], "grid", 25, options.limit, "--racing")])
        rows += racing_rows(evaluations(folders["grid"]), evaluations(folders["race"]))
        rows.append(replay_row(Path(temporary)))
    print(table(["figure", "target", "measured"], rows))


def resumed_row(folder: Path) -> list[str]:
    """Kill a search, run it again, and count what was evaluated or answered twice."""
    again = command(folder, "sobol", RESUMED, FEW)
    running = subprocess.Popen(again, stdout=subprocess.DEVNULL, cwd=ROOT)
    while running.poll() is None and complete_trials(folder) < KILLED_AFTER:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    known = complete_trials(folder)
    assert KILLED_AFTER <= known < RESUMED, known
    timed([again])
    plans = [row["plan"] for row in evaluations(folder)]
    answers = [
        (journal.name, json.loads(line)["item"])
        for journal in (folder / "replies").rglob("*.jsonl")
        for line in journal.read_text().splitlines()
    ]
    repeated = len(plans) - len(set(plans))
    return [
        f"killed after {known} of {len(plans)} evaluations: evaluations repeated", "0",
        f"{repeated}, and {len(answers) - len(set(answers))} of {len(answers)} answers",
    ]  # fmt: skip


def complete_trials(folder: Path) -> int:
    """Return how many evaluations the storage of a search holds."""
    path = folder / "study" / "study.db"
    if not path.is_file():
        return 0
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as storage:
        try:
            query = "select count(*) from trials where state = 'COMPLETE'"
            return int(storage.execute(query).fetchone()[0])
        except sqlite3.OperationalError:  # its tables are being made
            return 0


def racing_rows(whole: list[dict[str, str]], raced: list[dict[str, str]]) -> list[list[str]]:
    """Compare the items of a grid with and without racing, and the scores of the chosen plans."""
    spent = [sum(int(row["items"]) for row in rows) for rows in (whole, raced)]
    scores = {row["plan"]: float(row["score"]) for row in whole}
    complete = [row for row in raced if row["state"] == "complete"]
    chosen = max(complete, key=lambda row: float(row["score"]))
    loss = max(scores.values()) - scores[chosen["plan"]]
    return [
        ["racing: items / all items", "", f"{spent[1] / spent[0]:.2f}"],
        ["racing: loss of validation score", "", f"{loss:.1f} points"],
    ]


def replay_row(folder: Path) -> list[str]:
    """Time 7 optimizers x 10 seeds x 3 methods on surrogates of stored results."""
    with RESULTS.open() as file:
        stored = list(csv.DictReader(file))
    kept = [row for row in stored if row["task"] == "demo" and row["method"] != "ip_merging"]
    path = folder / "table.csv"
    path.write_text(as_csv(kept))
    started = time.monotonic()
    count = sum(1 for _ in iter_replays(read_tables(path)))
    return [f"surrogate study, {count} runs", "300 s", f"{time.monotonic() - started:.0f} s"]


if __name__ == "__main__":
    main()
