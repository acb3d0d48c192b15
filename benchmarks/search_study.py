"""Study searches of coefficients on the demo models, and write docs/search.md.

    python benchmarks/search_study.py [--write] [--limit 130 60] [--seeds 10] [--folder FOLDER]

First the full grid of task arithmetic, DARE, TIES and IP-Merging, every point a merge in memory:
its score on the validation items (20 %) and on as many others. Then every optimizer on surrogates
of these grids, with several seeds. Replies are stored in the folder, so that the study continues
after an interruption and answers nothing twice. With --write the page and its table of results
(CSV) are written to docs/.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, table

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.evaluation.answering import Caches
from ipmerge_core.evaluation.evaluate import EvaluationSettings
from ipmerge_core.evaluation.merged_models import MergedModels
from ipmerge_core.evaluation.points import Point
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.methods import METHODS
from ipmerge_core.search.coefficients import SearchSettings
from ipmerge_core.search.objective import VALIDATION, MergeObjective, scored
from ipmerge_core.search.optimizers import OPTIMIZERS
from ipmerge_core.search.replay import Replay, Table, iter_replays, read_tables
from ipmerge_core.search.space import space_of
from ipmerge_core.search.summary import as_csv, ranking, standings, table_facts
from ipmerge_core.tasks.registry import find_tasks

ROOT = Path(__file__).parents[1]
METHODS_STUDIED = ("task_arithmetic", "dare_linear", "ties", "ip_merging")
UNSEEN = 2 * VALIDATION  # the rank at which the unseen items end
CSV, PAGE = ROOT / "docs" / "search.csv", ROOT / "docs" / "search.md"
# The ranking of the cross-modal study (arXiv 2605.19523) as far as its text states it.
PAPER = "Gaussian process optimisation first, CMA-ES weak in two dimensions"
MARK = "<!-- measured by `python benchmarks/search_study.py --write` -->"
PAGE_TEXT = """

The models are the demo's, of about a million parameters: the numbers compare optimizers, they do
not predict results for large models. {machine}.
Every merge answers items of the demo task: {items}.
The score is the mean of image+math and perception, in percent.

The leave-one-out error is that of the surrogate at interior points of the grid. The last columns
are the best score minus the best one among weights whose sum is one, relative to it.

{facts}

{seeds} seeds; 40 evaluations with two parameters, 60 with three. Mean normalized regret at the end
(0: the surrogate's maximum, 1: its minimum), the median over tables of the ratio to random search,
the mean by method, and the regret of the chosen plan on unseen items.

{ranking}

The order here: {order}.
The cross-modal study's text (arXiv 2605.19523) has {paper};
its grids are of large models and were not available here. Replays took {seconds} s; all results are
in [search.csv](search.csv).
"""


def packs() -> dict[str, Path]:
    """Return the packs of both sets of demo models by name."""
    found = (ROOT / "assets").glob("*/*pack.json.gz")
    return {path.parent.name: path for path in sorted(found)}


class Grids(NamedTuple):
    """A row for every point of every method's grid on one set of models, and the items it has."""

    name: str
    rows: list[dict[str, Any]]
    items: dict[str, int]  # by column of scores


def score_grids(name: str, pack: Path, limit: int, store: ReplyStore) -> Grids:
    """Score every point of every method's grid on both parts of the items."""
    analysis, tasks = Analysis.load(pack), find_tasks(["demo"])
    groups = SearchSettings().groups
    rows, items = [], {}
    with MergedModels(analysis.sources) as models:
        caches = Caches()
        for method in METHODS_STUDIED:
            space, started = space_of(METHODS[method]), time.monotonic()
            objective = MergeObjective(
                analysis, space, tasks, models, {"method": method}, groups,
                settings=EvaluationSettings(limit=limit), store=store, caches=caches,
            )  # fmt: skip
            for point in space.grid():
                parameters = space.at(point)
                plan = objective.plan_at(parameters)
                row = {"method": method, "task": name, "domain": "", **parameters}
                for column, (low, high) in {
                    "score": (0.0, VALIDATION), "test": (VALIDATION, UNSEEN),
                }.items():  # fmt: skip
                    report = objective.evaluated([Point(plan.hash, plan)], low, high)
                    measured = scored(report, plan.hash, groups)
                    row[column], items[column] = round(measured.value, 6), measured.items
                rows.append(row)
            seconds = time.monotonic() - started
            print(f"{name} {method}: {len(space.grid())} merges, {seconds:.0f} s", flush=True)
    return Grids(name, rows, items)


def facts_table(tables: Sequence[Table]) -> str:
    """Return the best point of every grid and the quality of its surrogate."""
    rows = []
    for each in tables:
        facts, test = table_facts(each), each.test
        assert test is not None
        best = int(each.scores.values.argmax())
        at = ", ".join(f"{n.rstrip('_')} {v:g}" for n, v in facts.at.items())
        rows.append([
            METHODS[each.method].label, each.task, str(facts.points), f"{facts.best:.1f}", at,
            f"{test.values[best]:.1f}", f"{test.values.max():.1f}",
            "" if facts.loo is None else f"{facts.loo:.1f}",
            "" if facts.sum_one is None else f"{facts.sum_one:.1f}",
            "" if facts.sum_near is None else f"{facts.sum_near:.1f}",
        ])  # fmt: skip
    head = ["method", "models", "merges", "best validation score", "at", "its unseen score",
            "best unseen score of the grid", "leave-one-out error, % of the range",
            "cost of weights with sum 1, %", "of sum 1 within a step, %"]  # fmt: skip
    return table(head, rows)


def ranking_table(replays: Sequence[Replay]) -> str:
    """Return the mean regret of every optimizer: all, by method, and on unseen scores."""
    found = standings(replays)
    methods = list(dict.fromkeys(each.method for each in found))
    rows = []
    for row in ranking(found):
        own = [each for each in found if each.optimizer == row.optimizer]
        tests = [each.test_regret for each in own if each.test_regret is not None]
        by_method = [
            sum(values) / len(values)
            for method in methods
            for values in [[each.regret for each in own if each.method == method]]
        ]
        ratio = "" if row.over_random is None else f"{row.over_random:.2f}"
        rows.append([
            OPTIMIZERS[row.optimizer].label, f"{row.regret:.4f}", ratio,
            *(f"{value:.4f}" for value in by_method), f"{sum(tests) / max(len(tests), 1):.3f}",
        ])  # fmt: skip
    labels = [METHODS[method].label for method in methods]
    return table(["optimizer", "regret", "over random", *labels, "unseen regret"], rows)


def page(
    grids: Sequence[Grids], tables: Sequence[Table], replays: Sequence[Replay], spent: float
) -> str:
    """Return the measured part of docs/search.md."""
    ranked = [OPTIMIZERS[row.optimizer].label for row in ranking(standings(replays))]
    return PAGE_TEXT.format(
        machine=machine(),
        items="; ".join(
            f"of the {each.name} models {each.items['score']} for the search and "
            f"{each.items['test']} unseen ones"
            for each in grids
        ),
        facts=facts_table(tables),
        seeds=len({replay.seed for replay in replays}),
        ranking=ranking_table(replays),
        order=", ".join(ranked),
        paper=PAPER,
        seconds=f"{spent:.0f}",
    )


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/search.md and search.csv")
    parser.add_argument(
        "--limit", type=int, nargs="+", default=[130, 60],
        help="items per skill of the demo task, for each set of models; the last for all others",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where replies are stored")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        limits = itertools.chain(options.limit, itertools.repeat(options.limit[-1]))
        grids = [
            score_grids(name, pack, limit, ReplyStore(folder))
            for (name, pack), limit in zip(packs().items(), limits, strict=False)
        ]
        rows = [row for each in grids for row in each.rows]
        results = folder / "search.csv"
        results.write_text(as_csv(rows))
        tables = read_tables(results)
        started = time.monotonic()
        replays = [step.replay for step in iter_replays(tables, seeds=options.seeds)]
        text = page(grids, tables, replays, time.monotonic() - started)
        print(text)
        if options.write:
            CSV.write_text(as_csv(rows))
            PAGE.write_text(PAGE.read_text().split(MARK)[0] + MARK + text)


if __name__ == "__main__":
    main()
