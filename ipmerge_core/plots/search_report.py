"""Write the report of a search: one offline HTML page, CSV files, and the best plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ipmerge_core.errors import RunError
from ipmerge_core.plots import search as figures
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.search.coefficients import SearchResult
from ipmerge_core.search.consistency import describe_path
from ipmerge_core.search.optimizers import OPTIMIZERS
from ipmerge_core.search.space import SearchSpace
from ipmerge_core.search.study import FAILED, PRUNED, Evaluation
from ipmerge_core.search.summary import as_csv
from ipmerge_core.search.surrogate import Surrogate

RESULT, REPORT = "search.json", "report.html"
EVALUATIONS, IMPORTANCE, UNSEEN = "evaluations.csv", "importance.csv", "unseen.csv"


def write_search(folder: Path, result: SearchResult) -> None:
    """Write search.json, report.html and the CSV files of a search into a folder.

    Raises: RunError if the folder cannot be written.
    """
    files = {
        REPORT: report_page(result),
        EVALUATIONS: evaluations_csv(result),
        IMPORTANCE: as_csv([{"parameter": n, "share": s} for n, s in result.importance.items()]),
        UNSEEN: as_csv(list(_unseen_rows(result))),
    }
    for name, text in files.items():
        write_whole(folder / name, text.encode())
    result.save(folder / RESULT)


def report_page(result: SearchResult) -> str:
    """Return the report as one HTML page, which needs no network."""
    date = datetime.now(UTC).date().isoformat()
    optimizer = OPTIMIZERS[result.optimizer]
    texts = [f"{date}. {optimizer.label}: {optimizer.settings}.", *describe(result).splitlines()]
    drawn = list(search_figures(result).values())
    return figures.page(f"Search of {result.method} on {result.name}", texts, drawn)


def evaluations_csv(result: SearchResult) -> str:
    """Return all evaluations as CSV."""
    return as_csv([_row(each, result) for each in result.evaluations])


def search_figures(result: SearchResult) -> dict[str, Any]:
    """Return the figures that the evaluations determine: landscape, path, front, importance."""
    objectives = _objectives(result)
    front = [each for each in result.evaluations if each.number in result.front]
    drawn = dict(zip(["landscape"], _landscapes(result), strict=False))  # if it is determined
    if result.path is not None:
        drawn["path"] = figures.answer_path(result.path, result.evaluations, result.axes[0].name)
    if len(objectives) > 1:
        drawn["front"] = figures.pareto(result.evaluations, front, objectives)
    if result.importance:
        drawn["importance"] = figures.importance_bars(result.importance)
    return drawn


def _objectives(result: SearchResult) -> tuple[str, ...]:
    known = {name for each in result.evaluations for name in each.facts.get("scores", {})}
    return tuple(name for name in ("math", "perception", "other") if name in known)


def _landscapes(result: SearchResult) -> Iterator[Any]:
    """Draw a surrogate through the evaluations, where they determine one."""
    space = SearchSpace(result.axes)
    known = [e for e in result.evaluations if e.value is not None and e.state != PRUNED]
    if not known:
        return
    with contextlib.suppress(RunError):
        points = np.array([space.point_of(each.parameters) for each in known])
        surrogate = Surrogate(points, np.array([each.value for each in known], dtype=float))
        ranges = [(axis.low, axis.high) for axis in result.axes]
        title = "Validation score (surrogate through the evaluations)"
        yield figures.landscape(surrogate, space.names, ranges, title, known)


def _row(evaluation: Evaluation, result: SearchResult) -> dict[str, object]:
    scores = evaluation.facts.get("scores", {})
    path = result.path
    disagreement = path.disagreement(evaluation.number) if path else None
    return {
        "number": evaluation.number,
        **evaluation.parameters,
        "state": evaluation.state,
        "score": "" if evaluation.value is None else f"{evaluation.value:.6g}",
        "error": f"{evaluation.error:.4g}",
        "items": evaluation.items,
        **{f"score_{name}": f"{value:.6g}" for name, value in scores.items()},
        "front": int(evaluation.number in result.front),
        **({} if path is None else {"disagreement": "" if disagreement is None else disagreement}),
        "plan": evaluation.facts.get("plan", ""),
        "reason": evaluation.reason,
    }


def _unseen_rows(result: SearchResult) -> Iterator[dict[str, object]]:
    for each in result.report.results if result.report else ():
        for part in each.parts:
            if part.kind != "skill":
                yield {
                    "model": each.subject,
                    "task": each.task,
                    "part": part.part,
                    "share": f"{part.share:.6g}",
                    "low": f"{part.low:.6g}",
                    "high": f"{part.high:.6g}",
                    "n": part.n,
                }


def describe(result: SearchResult, output: str = "") -> str:
    """Summarize a search in a few lines: the best plan, its error, and its unseen scores."""
    counts = {
        state: sum(e.state == state for e in result.evaluations) for state in (PRUNED, FAILED)
    }
    line = f"{len(result.evaluations)} evaluations of {result.method}"
    line += f", {counts[PRUNED]} given up early" if counts[PRUNED] else ""
    line += f", {counts[FAILED]} failed" if counts[FAILED] else ""
    lines = [f"{line}."]
    best = result.best_evaluation
    if best is None:
        reasons = [each.reason for each in result.evaluations if each.reason]
        return "\n".join([*lines, f"No evaluation is complete. {reasons[0] if reasons else ''}"])
    if result.path is not None:
        lines.append(describe_path(result.path, result.evaluations))
    values = " ".join(f"{name}={value:.4g}" for name, value in best.parameters.items())
    verb = "Best" if result.path is None else "Chosen"
    lines.append(
        f"{verb}: evaluation {best.number} with {values}: {best.value:.1f} on {best.items} "
        f"validation items (standard error {best.error:.1f})."
    )
    lines += _unseen_lines(result)
    if result.importance:
        shares = ", ".join(f"{n} {share:.0%}" for n, share in result.importance.items())
        lines.append(f"Importance (fANOVA): {shares}.")
    if output:
        lines.append(f"Wrote {output}: {RESULT}, {REPORT}, {EVALUATIONS}, {IMPORTANCE}, {UNSEEN}.")
    return "\n".join(lines)


def _unseen_lines(result: SearchResult) -> Sequence[str]:
    """Format the scores of the unmerged model, the best plan and the front on unseen items."""
    lines = []
    for each in result.report.results if result.report else ():
        parts = [part for part in each.parts if part.kind == "group"] or list(each.parts[:1])
        scores = ", ".join(
            f"{part.part} {100 * part.share:.1f} ({100 * part.low:.1f}-{100 * part.high:.1f}, "
            f"n {part.n})"
            for part in parts
        )
        lines.append(f"Unseen items, {each.task}, {each.subject}: {scores}.")
    return lines
