"""Implement `ipmerge search` and `ipmerge replay`: choose coefficients, and compare optimizers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.cli.printing import Progress, print_result
from ipmerge_core.cli.reading import (
    read_evaluation_settings,
    read_method_options,
    read_pack,
    read_plan_options,
    read_store,
    read_tasks,
)
from ipmerge_core.runtime.paths import input_file

if TYPE_CHECKING:
    from ipmerge_core.search.coefficients import SearchResult, SearchSettings, SearchStep

OPTIMIZERS = ("grid", "random", "sobol", "cma-es", "gp-bo", "pattern", "powell")


def search(options: argparse.Namespace) -> int:
    """Search the coefficients of a method, resuming a study, and write its report."""
    from ipmerge_core.plots.search_report import describe, write_search
    from ipmerge_core.search.coefficients import iter_search

    folder = Path(options.target)
    steps = iter_search(
        read_pack(options),
        folder,
        read_tasks(options),
        _settings(options),
        read_evaluation_settings(options),
        read_store(options),
        url=options.storage or "",
        worker=options.worker,
        force=options.force,
    )
    found = _shown(options, steps)
    write_search(folder, found)
    content = {key: value for key, value in found.to_dict().items() if key != "report"}
    return print_result(options, content, describe(found, options.output))


def _settings(options: argparse.Namespace) -> SearchSettings:
    from ipmerge_core.search.coefficients import SearchSettings
    from ipmerge_core.search.optimizers import GP_BO, GRID
    from ipmerge_core.search.study import Budget

    fixed = {**read_method_options(options), "options": read_plan_options(options)}
    limits = options.budget, options.items, options.minutes
    budget = Budget() if limits == (None, None, None) else Budget(*limits)
    groups = tuple(part.strip() for part in options.maximise.split(",") if part.strip())
    return SearchSettings(
        method=fixed.pop("method"),
        optimizer=options.optimizer or (GRID if options.no_labels else GP_BO),
        ranges=tuple(options.range),
        fixed=fixed,
        groups=groups,
        budget=budget,
        seed=options.search_seed,
        validation=options.validation,
        racing=options.racing,
        labels=not options.no_labels,
    )


def _shown(options: argparse.Namespace, steps: Any) -> SearchResult:  # noqa: ANN401
    """Run a search with a progress bar and return its result."""
    from ipmerge_core.methods.declarations import drained, relayed
    from ipmerge_core.runtime.pipeline import keep_freed_memory

    keep_freed_memory()
    with Progress(options) as progress:

        def show(step: SearchStep) -> None:
            found = step.evaluation
            score = "" if found is None or found.value is None else f", score {found.value:.1f}"
            what = f"evaluation {step.done} of {step.total}{score}"
            progress.show("searching", step.done, step.total, what, resumed=found is None)

        result: SearchResult = drained(relayed(steps, show))
    return result


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the options of `search` that other commands do not have."""
    parser.add_argument(
        "--range",
        metavar="NAME=LOW:HIGH",
        action="append",
        default=[],
        help="searched parameter, NAME=LOW:HIGH or NAME=V1,V2,...; can be repeated",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="gp-bo by default")
    parser.add_argument(
        "--no-labels",
        action="store_true",
        help="choose on one parameter where answers agree most with those of its neighbours; "
        "labels are only used to report what they would have chosen",
    )
    parser.add_argument("--budget", type=int, help="evaluations, known ones included (40)")
    parser.add_argument("--items", type=int, help="end after this many answered items")
    parser.add_argument("--minutes", type=float, help="end this run after a time")
    parser.add_argument(
        "--maximise",
        metavar="GROUPS",
        default="math,perception",
        help="groups of items whose mean score counts: math, perception, other",
    )
    parser.add_argument(
        "--validation", type=float, default=0.2, help="share of items that the search sees (0.2)"
    )
    parser.add_argument(
        "--racing", action="store_true", help="give bad points up after a part of their items"
    )
    parser.add_argument("--search-seed", type=int, default=0, help="seed of the optimizer")
    parser.add_argument("--storage", metavar="URL", help="database shared by several machines")
    parser.add_argument("--worker", type=int, help="number of this worker, from 0; unique")


def replay(options: argparse.Namespace) -> int:
    """Compare optimizers on a table of past results and write a report."""
    from ipmerge_core.methods.declarations import drained, relayed
    from ipmerge_core.plots.replay_report import describe, iter_replay_report
    from ipmerge_core.search.replay import ReplayStep, read_tables
    from ipmerge_core.search.summary import ranking, standings

    tables = read_tables(input_file(options.table, "table"))
    chosen = tuple(dict.fromkeys(options.optimizer or OPTIMIZERS))
    steps = iter_replay_report(tables, Path(options.target), chosen, options.seeds, options.budget)
    with Progress(options) as progress:

        def show(step: ReplayStep) -> None:
            what = f"{step.replay.optimizer}, {step.replay.table.label}"
            progress.show("comparing", step.done, step.total, what)

        replays = drained(relayed(steps, show))
    found = standings(replays)
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
        choices=OPTIMIZERS,
        help="compare this one; can be repeated (all by default)",
    )
    parser.add_argument("--seeds", type=int, default=10, help="runs of each optimizer")
    parser.add_argument(
        "--budget",
        type=int,
        help="evaluations of a run (by default 20, 40 or 60 for 1, 2 or more parameters)",
    )
