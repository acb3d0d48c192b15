"""Describe the result of a search as plain values for the browser.

In: a `SearchResult` and the id of its pair. Out: the content of the component: the best plan with
its error, scores on unseen items, and a row per evaluation whose plan can be taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ipmerge_core.ui.evaluate.content import Json, label_of, map_choice, recipe_of_point

if TYPE_CHECKING:
    from ipmerge_core.evaluation.sweeps import SweptPoint
    from ipmerge_core.search.coefficients import SearchResult
    from ipmerge_core.search.study import Evaluation

MOST_LISTED = 500  # evaluations on the page; the files have all


def listed_evaluations(found: SearchResult) -> list[Evaluation]:
    """Return the evaluations on the page, by number; the best ones if there are too many."""
    ranked = sorted(found.evaluations, key=lambda e: (e.value is None, -(e.value or 0.0)))
    return sorted(ranked[:MOST_LISTED], key=lambda each: each.number)


def search_points(found: SearchResult) -> list[SweptPoint]:
    """Return the plans of the listed evaluations, as points that can be chosen."""
    from ipmerge_core.evaluation.sweeps import SweptPoint

    return [
        SweptPoint(
            label=f"evaluation {each.number}",
            values=dict(each.parameters),
            plan=str(each.facts.get("plan", "")),
            method=found.method,
            arguments={} if each.value is None else found.arguments_at(each),
        )
        for each in listed_evaluations(found)
    ]


def search_content(result: str, pack_id: str, found: SearchResult) -> Json:
    """Return the content of a search."""
    from ipmerge_core.methods import find_method

    report = found.report
    return {
        "id": result,
        "pack": pack_id,
        "kind": "search",
        "title": f"Search: {find_method(found.method).label}",
        "created": report.created if report else "",
        "facts": [list(fact) for fact in _facts(found)],
        "notes": list(_notes(found)),
        "axes": [],
        "tasks": [],
        "points": [_point(point) for point in search_points(found)],
        "layers": [],
        "modules": [],
        "flips": [],
        "flipped": 0,
        "cuts": [],
        "searched": {
            "parameters": [label_of(axis.name) for axis in found.axes],
            "rows": [_row(found, each) for each in listed_evaluations(found)],
            "unseen": list(_unseen(found)),
        },
    }


def _facts(found: SearchResult) -> Iterator[tuple[str, str]]:
    from ipmerge_core.search.optimizers import find_optimizer

    if found.report:
        yield "evaluated", f"{found.report.created} UTC"
    yield "optimizer", find_optimizer(found.optimizer).label
    scores = "mean of " + ", ".join(found.groups)
    yield ("maximised", scores) if found.path is None else ("scores of the labels", scores)
    yield "validation share", f"{found.validation:g}"


def _notes(found: SearchResult) -> Iterator[str]:
    """Describe the best plan, and what limits its meaning."""
    from ipmerge_core.search.consistency import describe_path

    best = found.best_evaluation
    if best is None:
        reasons = [each.reason for each in found.evaluations if each.reason]
        yield f"No evaluation is complete. {reasons[0] if reasons else ''}".strip()
        return
    values = ", ".join(f"{label_of(name)} {v:.4g}" for name, v in best.parameters.items())
    if found.path is not None:
        yield describe_path(found.path, found.evaluations)
    verb = "Best" if found.path is None else "Chosen"
    yield (
        f"{verb}: evaluation {best.number} with {values}: {best.value:.1f} on {best.items} "
        f"validation items, standard error {best.error:.1f}."
    )
    near = [e for e in found.evaluations if _is_near(e, best)]
    if near:
        more = f"{len(near)} other evaluations are" if len(near) > 1 else "1 other evaluation is"
        yield f"{more} within one standard error of it."
    if len(found.evaluations) > MOST_LISTED:
        yield (
            f"The {MOST_LISTED} best of {len(found.evaluations)} evaluations are listed; the CSV "
            f"file has all."
        )


def _is_near(each: Evaluation, best: Evaluation) -> bool:
    """Whether a complete evaluation is within one standard error of the best."""
    if each.number == best.number or each.state != "complete":
        return False
    return (each.value or 0.0) >= (best.value or 0.0) - best.error


def _point(point: SweptPoint) -> Json:
    recipe = recipe_of_point(point)
    return {
        "label": point.label,
        "plan": point.plan,
        "values": list(point.values.values()),
        "choice": map_choice(recipe),
        "takes": recipe is not None,
        "matrices": 0,
        "change": None,
        "mask": "",
        "scores": {},
        "skills": {},
    }


def _row(found: SearchResult, each: Evaluation) -> Json:
    return {
        "number": each.number,
        "values": list(each.parameters.values()),
        "state": {"pruned": "given up early"}.get(each.state, each.state),
        "score": each.value,
        "error": each.error,
        "items": each.items,
        "scores": dict(each.facts.get("scores", {})),
        "disagreement": None if found.path is None else found.path.disagreement(each.number),
        "reason": each.reason,
        "best": each.number == found.best,
        "front": each.number in found.front,
    }


def _unseen(found: SearchResult) -> Iterator[dict[str, Any]]:
    """Yield the scores on unseen items: a row per model, task and group of items."""
    labels = {facts.name: facts.label for facts in found.report.tasks} if found.report else {}
    for result in found.report.results if found.report else ():
        groups = [part for part in result.parts if part.kind == "group"]
        for part in groups or result.parts[:1]:
            yield {
                "model": result.subject,
                "task": labels[result.task],
                "part": part.part,
                "right": part.right,
                "n": part.n,
                "low": part.low,
                "high": part.high,
            }
