"""Plotly figures of searches and replays.

In: the rows of `summary` and the evaluations of a study. Out: figures, and one offline HTML page of
them. Every optimizer has its own line style and marker, so that colour is not needed to read one.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ipmerge_core.plots.spectra import INK
from ipmerge_core.search.optimizers import OPTIMIZERS
from ipmerge_core.search.study import COMPLETE, FAILED, Evaluation

if TYPE_CHECKING:
    from ipmerge_core.search.consistency import AnswerPath
    from ipmerge_core.search.replay import Table
    from ipmerge_core.search.summary import Curve, Standing, TableFacts
    from ipmerge_core.search.surrogate import Surrogate

# Okabe-Ito colours with a dash and a marker each, in the order of `OPTIMIZERS`.
_LOOKS = tuple(zip(
    ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"),
    ("solid", "dot", "dash", "longdash", "solid", "dashdot", "longdashdot"),
    ("circle", "x", "square", "diamond", "triangle-up", "cross", "star"),
    strict=True,
))  # fmt: skip
_LOOK = dict(zip(OPTIMIZERS, _LOOKS, strict=True))
_CELLS = 61  # of a landscape, per axis
_HEIGHT = 420
_LAYOUT = {
    "template": "plotly_white",
    "height": _HEIGHT,
    "margin": {"l": 60, "r": 20, "t": 60, "b": 50},
}


def landscape(
    surrogate: Surrogate,
    names: Sequence[str],
    ranges: Sequence[tuple[float, float]],
    title: str,
    evaluations: Sequence[Evaluation] = (),
) -> go.Figure:
    """Draw the surrogate over the first two parameters, with evaluated points and the line s = 1.

    Further parameters have the values of the surrogate's best point.
    """
    at = np.array(surrogate.extremes.at)
    steps = np.linspace(0, 1, _CELLS)
    if len(names) == 1:
        return _slice(surrogate, names[0], ranges[0], title, evaluations)
    grid = np.tile(at, (_CELLS * _CELLS, 1))
    grid[:, 0], grid[:, 1] = np.repeat(steps, _CELLS), np.tile(steps, _CELLS)
    (low_x, high_x), (low_y, high_y) = ranges[:2]
    x, y = low_x + steps * (high_x - low_x), low_y + steps * (high_y - low_y)
    z = surrogate.at(grid).reshape(_CELLS, _CELLS).T
    figure = go.Figure(
        go.Heatmap(x=x, y=y, z=z, colorscale="Cividis", colorbar={"title": {"text": "score"}})
    )
    points = [each.parameters for each in evaluations if each.state != FAILED]
    if points:
        figure.add_scatter(
            x=[each[names[0]] for each in points],
            y=[each[names[1]] for each in points],
            mode="markers",
            name="evaluated",
            marker={"color": "#ffffff", "size": 9, "line": {"color": "#000000", "width": 2}},
            cliponaxis=False,
            customdata=[[e.number, e.value] for e in evaluations if e.state != FAILED],
            hovertemplate="evaluation %{customdata[0]}: %{customdata[1]:.4g}<extra></extra>",
        )
    if {"mllm_weight", "math_weight"} == set(names[:2]):
        figure.add_scatter(
            x=x, y=1 - x, mode="lines", name="weights sum to 1",
            line={"color": "#d55e00", "dash": "dash", "width": 3},  # seen on every cell and page
        )  # fmt: skip
    fixed = ", ".join(
        f"{_title(name)} {low + share * (high - low):.3g}"
        for name, share, (low, high) in zip(names[2:], at[2:], ranges[2:], strict=True)
    )
    figure.update_layout(
        title=f"{title}, {fixed}" if fixed else title,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},  # clear of the scale
        **_LAYOUT,
    )
    figure.update_xaxes(title=_title(names[0]), range=[low_x, high_x])
    figure.update_yaxes(title=_title(names[1]), range=[low_y, high_y])
    return figure


def _title(parameter: str) -> str:
    """Return the name of a parameter as axes show it.

    >>> _title("lambda_"), _title("math_weight")
    ('lambda', 'math weight')
    """
    return parameter.strip("_").replace("_", " ")


def _slice(
    surrogate: Surrogate,
    name: str,
    ends: tuple[float, float],
    title: str,
    evaluations: Sequence[Evaluation],
) -> go.Figure:
    """Draw a surrogate of one parameter with the evaluated points."""
    steps = np.linspace(0, 1, _CELLS)
    x = ends[0] + steps * (ends[1] - ends[0])
    figure = go.Figure(go.Scatter(x=x, y=surrogate.at(steps[:, None]), name="surrogate"))
    known = [each for each in evaluations if each.state != FAILED]
    figure.add_scatter(
        x=[each.parameters[name] for each in known], y=[each.value for each in known],
        customdata=[[each.number] for each in known], mode="markers", name="evaluated",
        hovertemplate="evaluation %{customdata[0]}: %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(title=title, **_LAYOUT)
    figure.update_xaxes(title=_title(name))
    figure.update_yaxes(title="score")
    return figure


def landscape_of(table: Table) -> go.Figure:
    """Draw the landscape of a table of past results."""
    points = [
        Evaluation(number, table.space.at(point), COMPLETE, float(value), 0.0, 0, {})
        for number, (point, value) in enumerate(
            zip(table.scores.points, table.scores.values, strict=True)
        )
    ]
    ranges = [(axis.low, axis.high) for axis in table.space.axes]
    return landscape(table.scores, table.space.names, ranges, table.label, points)


def regret_curves(found: Sequence[Curve]) -> go.Figure:
    """Draw the mean normalized regret after each evaluation; held-out regret next to it."""
    from plotly.subplots import make_subplots

    has_test = any(curve.test is not None for curve in found)
    titles = ["optimised scores", "held-out scores"][: 1 + has_test]
    figure = make_subplots(1, 1 + has_test, subplot_titles=titles, shared_yaxes=True)
    for curve in found:
        colour, dash, _ = _LOOK[curve.optimizer]
        for column, values in enumerate([curve.regret, curve.test][: 1 + has_test], 1):
            if values is not None:
                figure.add_scatter(
                    x=np.arange(1, len(values) + 1), y=values, mode="lines",
                    name=OPTIMIZERS[curve.optimizer].label, legendgroup=curve.optimizer,
                    showlegend=column == 1, line={"color": colour, "dash": dash, "width": 2},
                    row=1, col=column,
                )  # fmt: skip
    figure.update_layout(title="Mean normalized regret", **_LAYOUT)
    figure.update_xaxes(title="evaluations")
    figure.update_yaxes(title="regret", col=1)
    figure.update_yaxes(type="log")  # both: they share the ticks
    return figure


def ratio_boxes(found: Sequence[Standing]) -> go.Figure:
    """Draw the regret over random of every table, as one box per optimizer and domain."""
    figure = go.Figure()
    names = [name for name in OPTIMIZERS if name != "random"]
    domains = sorted({each.domain for each in found})
    for domain in domains:
        own = [e for e in found if e.domain == domain and e.over_random is not None]
        rows = [each for each in own if each.optimizer in names]
        figure.add_box(
            x=[OPTIMIZERS[each.optimizer].label for each in rows],
            y=[each.over_random for each in rows],
            name=domain or "all", boxpoints="all",
        )  # fmt: skip
    figure.add_hline(y=1, line_dash="dash", annotation_text="random")
    by = "optimizer and domain" if len(domains) > 1 else "optimizer"
    figure.update_layout(title=f"Regret over random, by {by}", boxmode="group", **_LAYOUT)
    figure.update_yaxes(title="ratio of mean regrets")
    return figure


def error_table(found: Sequence[TableFacts]) -> go.Figure:
    """Draw a table of the surrogates' leave-one-out errors and of the price of sum one."""
    head = {
        "table": [" ".join(filter(None, (each.method, each.task))) or "results" for each in found],
        "points": [each.points for each in found],
        "best score": [f"{each.best:.4g}" for each in found],
        "leave-one-out error, % of the range": [_percent(each.loo) for each in found],
        "the same, 20 draws": [_percent(each.loo_of_draws) for each in found],
        "cost of weights with sum 1, %": [_percent(each.sum_one) for each in found],
        "of sum 1 within a step, %": [_percent(each.sum_near) for each in found],
    }
    figure = go.Figure(go.Table(header={"values": [*head]}, cells={"values": [*head.values()]}))
    figure.update_layout(title="Quality of the surrogates", **_LAYOUT)
    return figure


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def pareto(
    evaluations: Sequence[Evaluation], front: Sequence[Evaluation], objectives: Sequence[str]
) -> go.Figure:
    """Draw two objectives of all evaluations, and the front of those that no other one beats."""
    first, second = objectives[:2]
    figure = go.Figure()
    for name, rows, mode in (
        ("evaluated", evaluations, "markers"),
        ("front", front, "lines+markers"),
    ):
        known = [each for each in rows if "scores" in each.facts]
        figure.add_scatter(
            x=[each.facts["scores"][second] for each in known],
            y=[each.facts["scores"][first] for each in known],
            customdata=[[each.number] for each in known],
            hovertemplate="evaluation %{customdata[0]}: %{x:.3g}, %{y:.3g}<extra></extra>",
            mode=mode, name=name, line={"shape": "hv"},
        )  # fmt: skip
    figure.update_layout(title="Pareto front", **_LAYOUT)
    figure.update_xaxes(title=second)
    figure.update_yaxes(title=first)
    return figure


def answer_path(path: AnswerPath, evaluations: Sequence[Evaluation], name: str) -> go.Figure:
    """Draw disagreements with neighbours along a path, above the scores of the labels."""
    from plotly.subplots import make_subplots

    numbered = {each.number: each for each in evaluations}
    ordered = [numbered[number] for number in path.numbers]
    x = [each.parameters[name] for each in ordered]
    figure = make_subplots(2, 1, shared_xaxes=True)
    for row, (label, values) in enumerate(
        (
            ("disagreements", path.disagreements),
            ("score by labels", [each.value for each in ordered]),
        ),
        1,
    ):
        chosen = path.chosen if row == 1 else path.by_labels
        figure.add_scatter(
            x=x, y=values, mode="lines+markers", name=label, customdata=[[n] for n in path.numbers],
            marker={"size": [13 if number == chosen else 7 for number in path.numbers]},
            hovertemplate="evaluation %{customdata[0]}: %{y:.4g}<extra></extra>", row=row, col=1,
        )  # fmt: skip
        figure.update_yaxes(title=label, row=row, col=1)
    figure.update_layout(title="Agreement with neighbouring values", **_LAYOUT)
    figure.update_xaxes(title=_title(name), row=2, col=1)
    return figure


def importance_bars(shares: dict[str, float]) -> go.Figure:
    """Draw the share of variance that every parameter explains."""
    names = sorted(shares, key=lambda name: shares[name])
    titles = [_title(name) for name in names]
    figure = go.Figure(go.Bar(x=[shares[name] for name in names], y=titles, orientation="h"))
    figure.update_layout(title="Parameter importance (fANOVA)", **_LAYOUT)
    figure.update_xaxes(title="share of variance")
    return figure


def on_page(figure: go.Figure, *, dark: bool, narrow: bool) -> go.Figure:
    """Return a figure for the app: transparent, in the colours of the page, without a title."""
    figure.update_layout(
        template="plotly_dark" if dark else "plotly_white",
        title=None,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK[dark], "family": "IBM Plex Sans, system-ui, sans-serif"},
        margin={"l": 56, "r": 12, "t": 16, "b": 96 if narrow else 72},
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
    )
    return figure


def page(title: str, paragraphs: Sequence[str], figures: Sequence[go.Figure]) -> str:
    """Return one HTML page with all figures, which needs no network."""
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=number == 0, div_id=f"figure-{number}")
        for number, figure in enumerate(figures)
    ]
    text = "".join(f"<p>{html.escape(words)}</p>" for words in paragraphs)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}"
        f"</title></head><body style='font-family: system-ui; max-width: 1100px; margin: 2rem "
        f"auto; padding: 0 1rem'><h1>{html.escape(title)}</h1>{text}{''.join(parts)}</body></html>"
    )
