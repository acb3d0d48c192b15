"""Describe results of evaluations as plain values for the browser.

In: a `Sweep` or a `Knockout` and the pack of its pair. Out: the content of the component: tasks
with their perception part next to the math part, points with scores, paired tests and masks, notes
on what limits their meaning, and the items that a merge fixes or breaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import PlanError
from ipmerge_core.models.matrix_kinds import module_order
from ipmerge_core.ui.chosen_merge import Recipe, recipe_of

if TYPE_CHECKING:
    from ipmerge_core.evaluation.knockout import Knockout
    from ipmerge_core.evaluation.report import Comparison, Judged, PartScore, Report
    from ipmerge_core.evaluation.sweeps import Sweep, SweptPoint

Json = dict[str, Any]
MOST_FLIPS = 60
LONGEST_TEXT = 400  # characters of a question or reply in the list of items
TITLES = {
    "models": "Comparison of models",
    "sweep": "Sweep over {axes}",
    "ablation": "Ablation",
    "knockout": "Layer knock-out",
}
LABELS = {"lambda_": "λ", "similarity_threshold": "Sα"}


class TaskPart(NamedTuple):
    """What is shown as a task: a whole task, or its math or perception items."""

    name: str
    task: str
    part: str
    label: str
    group: str
    n: int


def parts_of(report: Report) -> list[TaskPart]:
    """List what is shown as tasks; a task with math and perception items is shown as two."""
    found = []
    for facts in report.tasks:
        whole = next(each for each in report.results if each.task == facts.name)
        groups = [part for part in whole.parts if part.kind == "group"]
        if len(groups) < 2:
            only = whole.parts[0]
            found.append(
                TaskPart(facts.name, facts.name, only.part, facts.label, facts.group, only.n)
            )
            continue
        found += [
            TaskPart(
                f"{facts.name}/{part.part}", facts.name, part.part, f"{facts.label}, {part.part}",
                part.part, part.n,
            )
            for part in groups
        ]  # fmt: skip
    return found


def sweep_content(result: str, pack_id: str, found: Sweep, pack: Mapping[str, Any]) -> Json:
    """Return the content of a sweep, an ablation or a comparison of models."""
    report, parts = found.report, parts_of(found.report)
    layers, modules, places = _grid(pack)
    axes = [
        {
            "parameter": axis.parameter,
            "label": label_of(axis.parameter),
            "values": list(axis.values),
        }
        for axis in found.axes
    ]
    points = [_point(point, report, parts, places, layers, modules) for point in found.points]
    names = " and ".join(label_of(axis.parameter) for axis in found.axes)
    return {
        **_common(result, pack_id, report, parts),
        "kind": found.kind,
        "title": TITLES[found.kind].format(axes=names),
        "axes": axes,
        "points": points,
        "layers": layers,
        "modules": modules,
    }


def knockout_content(result: str, pack_id: str, found: Knockout) -> Json:
    """Return the content of a knock-out."""
    first = next(iter(found.reports.values()))
    parts = parts_of(first)
    cuts = []
    for model, report in found.reports.items():
        for cut, name in zip(found.cuts, list(report.subjects)[1:], strict=True):
            scores = {p.name: _score(report, name, p.task, p.part) for p in parts}
            cuts.append(
                {"model": model, "layer": cut.layer, "module": cut.module, "scores": scores}
            )
    content = _common(result, pack_id, first, parts)
    replaced = next((cut.value for cut in found.cuts), "")
    return {
        **content,
        "kind": "knockout",
        "title": TITLES["knockout"],
        "notes": [f"One module of one layer at a time is replaced: {replaced}.", *content["notes"]],
        "facts": [*content["facts"], ["plan", found.plan or "none"]],
        "cuts": cuts,
    }


def label_of(parameter: str) -> str:
    """Return the label of a parameter.

    >>> label_of("lambda_"), label_of("math_weight")
    ('λ', 'math weight')
    """
    return LABELS.get(parameter, parameter.replace("_", " ").strip())


def recipe_of_point(point: SweptPoint) -> Recipe | None:
    """Return what the app chooses for a point; None if it cannot be chosen."""
    if not point.arguments:
        return None
    try:
        recipe = recipe_of({**point.arguments, "parameters": point.arguments})
        usual = _usual_anchor(point)
    except PlanError:
        return None
    options = dict(recipe.method.options)
    if options.get("anchor") == usual:  # a plan names its anchor even if none was chosen
        del options["anchor"]
    return Recipe(recipe.plan, recipe.method._replace(options=options))


def map_choice(recipe: Recipe | None) -> Json | None:
    """Return the plan of a recipe as the map sets it; None if it cannot be set there."""
    if recipe is None or recipe.method.name or recipe.method.values or recipe.method.options:
        return None
    return recipe.plan.to_browser()


def _usual_anchor(point: SweptPoint) -> str:
    """Return the anchor of a point's method if none is chosen. Raises: PlanError."""
    from ipmerge_core.methods import find_method
    from ipmerge_core.planning.scope import choose_anchor

    method = find_method(point.method)
    usual = {parameter.name: parameter.default for parameter in method.parameters}
    return choose_anchor(method, None, {**usual, **point.arguments})


# --- parts of the content --------------------------------------------------------------------


def _common(result: str, pack_id: str, report: Report, parts: Sequence[TaskPart]) -> Json:
    return {
        "id": result,
        "pack": pack_id,
        "created": report.created,
        "facts": [list(fact) for fact in _facts(report)],
        "notes": list(_notes(report, parts)),
        "axes": [],
        "tasks": [{"name": p.name, "label": p.label, "group": p.group, "n": p.n} for p in parts],
        "points": [],
        "layers": [],
        "modules": [],
        "flips": [],
        "flipped": 0,
        "cuts": [],
    }


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "evaluated", f"{report.created} UTC"
    yield "seed", str(report.settings.get("seed", 0))
    limits = sorted({facts.max_new_tokens for facts in report.tasks})
    yield "token limit", ", ".join(map(str, limits))
    yield "device", str(report.settings.get("device", ""))
    yield "versions", ", ".join(f"{name} {text}" for name, text in report.versions.items())


def _notes(report: Report, parts: Sequence[TaskPart]) -> Iterator[str]:
    """Yield what limits the meaning of the scores."""
    from ipmerge_core.evaluation.comparisons import SMALL_SAMPLE

    small = [part.label for part in parts if part.n < SMALL_SAMPLE]
    if small:
        yield f"Small sample (fewer than {SMALL_SAMPLE} items): {'; '.join(small)}."
    needed = [c.test.needed for c in report.comparisons if c.kind == "all" and c.test.needed]
    if needed:
        counts = f"{min(needed)} to {max(needed)}" if min(needed) < max(needed) else f"{needed[0]}"
        yield (
            f"A difference of 2 points between two models here would need about {counts} items "
            f"(power 80 %, level 5 %)."
        )
    for facts in report.tasks:
        if facts.unofficial:
            yield f"{facts.label} is not an official number: {facts.unofficial}"
    missing = sum(r.parts[0].missing + r.parts[0].unjudged for r in report.results)
    if missing:
        yield f"{missing} replies are missing or could not be judged, and are not counted."
    yield from report.notes


def _grid(pack: Mapping[str, Any]) -> tuple[list[int], list[str], dict[str, tuple[int, str]]]:
    """Return the layers and modules of a pair, and the place of each matrix."""
    places = {record["name"]: (record["layer"], record["module"]) for record in pack["records"]}
    layers = sorted({layer for layer, _ in places.values()})
    modules = sorted({module for _, module in places.values()}, key=module_order)
    return layers, modules, places


def _point(
    point: SweptPoint,
    report: Report,
    parts: Sequence[TaskPart],
    places: Mapping[str, tuple[int, str]],
    layers: Sequence[int],
    modules: Sequence[str],
) -> Json:
    recipe = recipe_of_point(point)
    merged = {places[name] for name in point.selected if name in places}
    marks = ("1" if (layer, module) in merged else "0" for layer in layers for module in modules)
    skills = {
        f"{result.task}/{part.part}": _score(report, point.label, result.task, part.part)
        for result in report.results
        if result.subject == point.label
        for part in result.parts
        if part.kind == "skill"
    }
    return {
        "label": point.label,
        "plan": point.plan,
        "values": list(point.values.values()),
        "choice": map_choice(recipe),
        "takes": recipe is not None,
        "matrices": len(point.selected),
        "change": point.relative_change,
        "mask": "".join(marks),
        "scores": {p.name: _score(report, point.label, p.task, p.part) for p in parts},
        "skills": skills,
    }


def _score(report: Report, subject: str, task: str, name: str) -> Json:
    result = report.result(subject, task)
    part, length = result.part(name), result.length
    if part is None:
        return {
            "right": 0,
            "n": 0,
            "low": 0.0,
            "high": 1.0,
            **_no_test(),
            "length": None,
            "cut": None,
        }
    found = _comparison(report, subject, task, name)
    tested = (
        {"fixed": found.test.fixed, "broken": found.test.broken, "p": found.p_holm}
        if found
        else _no_test()
    )
    return {
        **_counted(part),
        **tested,
        "length": length.mean_tokens,
        "cut": length.cut / length.replies if length.replies else 0.0,
    }


def _counted(part: PartScore) -> Json:
    return {"right": part.right, "n": part.n, "low": part.low, "high": part.high}


def _no_test() -> Json:
    return {"fixed": None, "broken": None, "p": None}


def _comparison(report: Report, subject: str, task: str, part: str) -> Comparison | None:
    wanted = subject, task, part
    return next((c for c in report.comparisons if (c.second, c.task, c.part) == wanted), None)


# --- items that differ -----------------------------------------------------------------------


class Changed(NamedTuple):
    """An item that a model fixes or breaks: its facts, its task and both replies."""

    task: str
    item: Mapping[str, Any]
    first: Judged
    second: Judged

    @property
    def outcome(self) -> str:
        """Whether it is fixed or broken."""
        return "broken" if self.first.is_right else "fixed"


def changed_items(report: Report, subject: str) -> list[Changed]:
    """List the items that a model fixes or breaks, broken ones first."""
    rows = [
        Changed(facts.name, item, first, second)
        for facts in report.tasks
        for item, first, second in report.changed(subject, facts.name)
    ]
    return sorted(rows, key=lambda row: row.outcome)


def flip_of(row: Changed, image: str) -> Json:
    """Return a row of the list of items; `image` is a data URI, or empty."""
    return {
        "item": str(row.item["id"]),
        "task": row.task,
        "skill": str(row.item.get("skill", "")),
        "outcome": row.outcome,
        "question": _short(row.item["question"]),
        "answer": _short(", ".join(map(str, row.item["references"]))),
        "first": _short(row.first.text),
        "second": _short(row.second.text),
        "image": image,
    }


def _short(text: object) -> str:
    plain = str(text)
    return plain if len(plain) <= LONGEST_TEXT else f"{plain[:LONGEST_TEXT]} …"
