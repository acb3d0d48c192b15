"""Implement the commands that search coefficients: replay."""

from __future__ import annotations

import argparse
from pathlib import Path

from ipmerge_core.cli.printing import Progress, print_result
from ipmerge_core.runtime.paths import input_file

OPTIMIZER_NAMES = ("grid", "random", "sobol", "cma-es", "gp-bo", "pattern", "powell")


def replay(options: argparse.Namespace) -> int:
    """Compare optimizers on a table of past results and write a report."""
    from ipmerge_core.plots.replay_report import describe, write_report
    from ipmerge_core.search.replay import iter_replays, read_tables
    from ipmerge_core.search.summary import ranking, standings

    tables = read_tables(input_file(options.table, "table"))
    chosen = tuple(dict.fromkeys(options.optimizer or OPTIMIZER_NAMES))
    with Progress(options) as progress:
        steps = iter_replays(tables, chosen, options.seeds, options.budget)
        replays = []
        for step in steps:
            replays.append(step.replay)
            what = f"{step.replay.optimizer}, {step.replay.table.label}"
            progress.show("comparing", step.done, step.total, what)
    found = standings(replays)
    write_report(Path(options.target), tables, replays)
    content = {
        "ranking": [row._asdict() for row in ranking(found)],
        "standings": [row._asdict() for row in found],
        "seconds": progress.seconds,
    }
    return print_result(options, content, describe(tables, replays, options.output))


def add_replay(parser: argparse.ArgumentParser) -> None:
    """Add the options of `replay`."""
    parser.add_argument("table", help="CSV file: one column per parameter, and a column `score`")
    parser.add_argument(
        "--optimizer",
        action="append",
        choices=OPTIMIZER_NAMES,
        help="compare this one; can be repeated (all by default)",
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each optimizer")
    parser.add_argument(
        "--budget",
        type=int,
        help="evaluations of a run (by default 20, 40 or 60 for 1, 2 or more parameters)",
    )
