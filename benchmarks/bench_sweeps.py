"""Measure a sweep and a layer knock-out of the demo models: seconds, and that no item is repeated.

    python benchmarks/bench_sweeps.py [--limit 100]

A sweep of 10 plans and the unmerged model, and a knock-out of 4 layers, 2 modules and 2 models,
each with `--limit` items of nine skills (900 by default). Wall time, processor seconds of the
evaluation, and items per processor second; then the sweep again, stopped in its middle and resumed.
Models are merged and cut in memory; the stored replies are in a folder that is removed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

import torch
from report import machine, table

import ipmerge_core as ipm
from ipmerge_core.evaluation.evaluate import EvaluationSettings, EvaluationStep
from ipmerge_core.evaluation.knockout import iter_knockout
from ipmerge_core.evaluation.points import Axis
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.sweeps import iter_sweep
from ipmerge_core.runtime.pipeline import keep_freed_memory
from ipmerge_core.tasks.registry import find_tasks

DEMO = Path(__file__).parents[1] / "assets" / "demo"
GAINS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
Steps = Generator[EvaluationStep, None, Any]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=100, help="items per skill")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command line does
    print(f"{machine()}, torch {torch.__version__}, one thread\n")
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    tasks, how = find_tasks(["demo"]), EvaluationSettings(limit=options.limit)

    def sweep(store: Path) -> Steps:
        axes = [Axis("lambda_", GAINS)]
        return iter_sweep(analysis, axes, tasks, how, ReplyStore(store), similarity_threshold=0.1)

    plan = ipm.make_plan(analysis, method="task_arithmetic", math_weight=1.0)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            ["sweep, 10 plans and the unmerged model", *timed(sweep(Path(folder) / "a"))],
            ["the same with all replies stored", *timed(sweep(Path(folder) / "a"))],
            stopped(sweep, Path(folder) / "b"),
            [
                "knock-out, 4 layers x 2 modules x 2 models",
                *timed(iter_knockout(plan, tasks, None, how, ReplyStore(Path(folder) / "c"))),
            ],
        ]
    head = ["run", "items answered", "wall, s", "processor, s", "items / processor s"]
    print(table(head, rows))


def timed(steps: Steps) -> list[str]:
    """Run all steps; return the cells of a row."""
    wall, used, answered, known = time.perf_counter(), time.process_time(), 0, 0
    for step in steps:
        if step.action == "answered":
            answered += step.done - known
        known = step.done
    wall, used = time.perf_counter() - wall, time.process_time() - used
    rate = f"{answered / used:.0f}" if answered else "-"
    return [str(answered), f"{wall:.1f}", f"{used:.1f}", rate]


def stopped(sweep: Any, store: Path) -> list[str]:  # noqa: ANN401 (a function of a folder)
    """Stop a sweep after half of its items and resume it; count the lines of the store."""
    first = sweep(store)
    for step in first:
        if step.done * 2 >= step.total:
            first.close()
    before = lines_of(store)
    cells = timed(sweep(store))
    repeated = before + int(cells[0]) - lines_of(store)
    return [f"stopped after {before} items and resumed, {repeated} repeated", *cells]


def lines_of(store: Path) -> int:
    """Count the stored replies, each of which is one line."""
    return sum(len(path.read_bytes().splitlines()) for path in store.rglob("*.jsonl"))


if __name__ == "__main__":
    main()
