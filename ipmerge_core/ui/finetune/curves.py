"""Draw the curves of a fine-tuning as HTML with SVG: loss, cos(g, D), and distances.

In: the points of a run. Out: figures whose colours come from the style sheet; every point has its
values as a tooltip, and all values are in a CSV file. Pure.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import quote

from ipmerge_core.finetuning.curves import FIGURES, CurvePoint

WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26
MOST_POINTS = 240  # drawn per curve; more are thinned out evenly


class _Chart(NamedTuple):
    """A figure: its title, and the label and field of each of its curves."""

    title: str
    curves: tuple[tuple[str, str], ...]


CHARTS = (
    _Chart("Loss", (("training", "loss"), ("held-out", "eval_loss"))),
    _Chart(
        "Cosine with the prior D",
        (("of the gradient, cos(g, D)", "cosine"), ("of the change so far", "moved_cosine")),
    ),
    _Chart("Distance to the start, relative", (("to the start", "to_start"),)),
    _Chart("Distance to the expert, relative", (("to the expert", "to_expert"),)),
)


class _Scale(NamedTuple):
    """A linear scale from values to a length."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.first + share * (self.last - self.first), 1)


def curves_html(points: Sequence[CurvePoint], *, growing: bool = False) -> str:
    """Return all figures that have a point; empty without points.

    A link to all values follows, unless the curves still grow: it would be sent every second.
    """
    drawn = [chart for chart in CHARTS if any(_series(points, name) for _, name in chart.curves)]
    if not drawn:
        return ""
    figures = "".join(_figure(chart, points) for chart in drawn)
    if growing:
        return f'<div class="ft-curves">{figures}</div>'
    link = f"data:text/csv;charset=utf-8,{quote(as_csv(points))}"
    return (
        f'<div class="ft-curves">{figures}</div>'
        f'<p><a class="ft-csv" href="{link}" download="curves.csv">Save the values as CSV</a></p>'
    )


def as_csv(points: Sequence[CurvePoint]) -> str:
    r"""Return the points as CSV, an empty cell for what was not measured.

    >>> as_csv([CurvePoint(1, 2, loss=0.5)]).splitlines()[1]
    '1,2,0.5,,,,,,,'
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("step", "total", *FIGURES))
    rows.writerows((point.step, point.total, *point.figures().values()) for point in points)
    return text.getvalue()


def _series(points: Sequence[CurvePoint], name: str) -> list[tuple[int, float]]:
    found = [(p.step, getattr(p, name)) for p in points if getattr(p, name) is not None]
    every = -(-len(found) // MOST_POINTS) or 1
    return [*found[:-1:every], *found[-1:]]


def _figure(chart: _Chart, points: Sequence[CurvePoint]) -> str:
    series = [(label, found) for label, name in chart.curves if (found := _series(points, name))]
    values = [value for _, found in series for _, value in found]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or max(abs(high) * 0.1, 1e-6)
    rise = _Scale(low - margin, high + margin, HEIGHT - _BOTTOM, _TOP)
    last = max(points[-1].total, points[-1].step, 2)
    run = _Scale(1, last, _LEFT, WIDTH - _RIGHT)
    lines = "".join(_curve(n, label, found, run, rise) for n, (label, found) in enumerate(series))
    keys = "".join(
        f'<span class="ft-key ft-{n}"><i></i>{label} <b>{found[-1][1]:.4g}</b></span>'
        for n, (label, found) in enumerate(series)
    )
    summary = "; ".join(f"{label}: {found[-1][1]:.4g}" for label, found in series)
    return (
        f'<figure><figcaption>{chart.title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{chart.title} at step {points[-1].step}. {summary}">'
        f'{_axes(low, high, last, run, rise)}{lines}</svg><p class="ft-keys">{keys}</p></figure>'
    )


def _axes(low: float, high: float, last: int, run: _Scale, rise: _Scale) -> str:
    marks = [low, high] if high > low else [low]
    rows = "".join(
        f'<line class="ft-grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{rise.at(v)}" '
        f'y2="{rise.at(v)}"/><text x="{_LEFT - 6}" y="{rise.at(v) + 4}" text-anchor="end">'
        f"{v:.3g}</text>"
        for v in marks
    )
    steps = "".join(
        f'<text x="{run.at(step)}" y="{HEIGHT - 8}" text-anchor="{anchor}">{text}</text>'
        for step, anchor, text in ((1, "start", "step 1"), (last, "end", str(last)))
    )
    return rows + steps


def _curve(
    number: int, label: str, found: Sequence[tuple[int, float]], run: _Scale, rise: _Scale
) -> str:
    places = [(run.at(step), rise.at(value)) for step, value in found]
    path = " ".join(f"{x},{y}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="3"><title>step {step}, {label} {value:.5g}</title></circle>'
        for (x, y), (step, value) in zip(places, found, strict=True)
    )
    return f'<g class="ft-{number}"><polyline points="{path}"/>{dots}</g>'
