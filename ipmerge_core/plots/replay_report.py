"""Write the report of a replay: one offline HTML page, and a CSV file for each figure."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ipmerge_core.plots import search as figures
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.search.optimizers import OPTIMIZERS
from ipmerge_core.search.replay import iter_replays
from ipmerge_core.search.summary import (
    as_csv,
    curves,
    ranking,
    standings,
    table_facts,
)

if TYPE_CHECKING:
    from ipmerge_core.search.replay import Replay, ReplayStep, Table

_MOST_LANDSCAPES = 12
SURROGATE = (
    "Optimizers ran on a thin-plate-spline surrogate of past results, not on merges. Regret is "
    "normalized by the surrogate's own extremes: 0 is the best point, 1 the worst. All optimizers "
    "have the same number of evaluations; local ones start again from a uniform point."
)


def iter_replay_report(
    tables: Sequence[Table],
    folder: Path,
    optimizers: Sequence[str],
    seeds: int,
    budget: int | None = None,
) -> Generator[ReplayStep, None, list[Replay]]:
    """Compare optimizers, yielding after each run, and write the report into a folder at the end.

    Raises: as `iter_replays`; RunError if the folder cannot be written.
    """
    replays = []
    for step in iter_replays(tables, optimizers, seeds, budget):
        replays.append(step.replay)
        yield step
    write_report(folder, tables, replays)
    return replays


def write_report(folder: Path, tables: Sequence[Table], replays: Sequence[Replay]) -> None:
    """Write report.html, ranking.csv, standings.csv, curves.csv and tables.csv into a folder.

    Raises: RunError if the folder cannot be written.
    """
    found = standings(replays)
    drawn = [
        *(figures.landscape_of(table) for table in tables[:_MOST_LANDSCAPES]),
        figures.regret_curves(curves(replays)),
        figures.ratio_boxes(found),
        figures.error_table([table_facts(table) for table in tables]),
    ]
    names = {replay.optimizer for replay in replays}
    settings = [f"{o.label}: {o.settings}." for o in OPTIMIZERS.values() if o.name in names]
    date = datetime.now(UTC).date().isoformat()
    texts = [f"{date}. {SURROGATE}", *settings, *describe(tables, replays).splitlines()]
    files = {
        "report.html": figures.page("Optimizers on past results", texts, drawn),
        "ranking.csv": as_csv([row._asdict() for row in ranking(found)]),
        "standings.csv": as_csv([row._asdict() for row in found]),
        "curves.csv": as_csv(list(_curve_rows(replays))),
        "tables.csv": as_csv(list(_table_rows(tables))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(folder / name, text.encode())


def _curve_rows(replays: Sequence[Replay]) -> list[dict[str, object]]:
    return [
        {
            "method": replay.table.method,
            "task": replay.table.task,
            "optimizer": replay.optimizer,
            "seed": replay.seed,
            "evaluation": number,
            "regret": f"{regret:.6g}",
            "test_regret": "" if replay.test is None else f"{replay.test[number - 1]:.6g}",
        }
        for replay in replays
        for number, regret in enumerate(replay.regret, 1)
    ]


def _table_rows(tables: Sequence[Table]) -> list[dict[str, object]]:
    return [{**facts._asdict(), "at": _parameters(facts.at)} for facts in map(table_facts, tables)]


def _parameters(values: dict[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in values.items())


def describe(tables: Sequence[Table], replays: Sequence[Replay], output: str = "") -> str:
    """Summarize a replay in a few lines of text."""
    lines = [
        f"{row.optimizer:>8}: mean normalized regret {row.regret:.4f}"
        + ("" if row.over_random is None else f", {row.over_random:.2f} x random's (median)")
        for row in ranking(standings(replays))
    ]
    for facts in map(table_facts, tables):
        error = "" if facts.loo is None else f", leave-one-out error {facts.loo:.1f} % of the range"
        price = (
            "" if facts.sum_one is None else f"; weights summing to 1 cost {facts.sum_one:.1f} %"
        )
        lines.append(
            f"{facts.method or 'results'} {facts.task}: best {facts.best:.4g} at "
            f"{_parameters(facts.at)}{error}{price}."
        )
    if output:
        lines.append(f"Wrote {output}: report.html and four CSV files.")
    return "\n".join(lines)
