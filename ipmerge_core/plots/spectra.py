"""Build Plotly figures from analysis records.

In: records of a pack, as plain mappings. Out: first a NamedTuple with every number that is drawn
(tested by equality), then a figure. No gradio, no torch, no arithmetic. Uses the Okabe-Ito colours,
each combined with a line style, so that figures are readable without colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ipmerge_core.analysis.singular_values import Spectra

# Okabe-Ito colours, lighter on a dark page; the layer map uses the same ones.
MLLM = {False: "#0072b2", True: "#4aa8e0"}
MATH = {False: "#d55e00", True: "#f08a3c"}
ANGLE = {False: "#009e73", True: "#2fc79b"}
INK = {False: "#1b2330", True: "#e8eaf0"}
RULE = {False: "rgba(27,35,48,0.14)", True: "rgba(232,234,240,0.18)"}


class SpectraInfo(NamedTuple):
    """Singular values of both task vectors and their corresponding angles, by rank.

    `sigma_ranks` are all ranks if the pack contains all singular values, and otherwise samples, as
    `angle_ranks` always are; `held` states how many of the `possible` values there are.
    """

    title: str
    held: int
    possible: int
    sigma_ranks: tuple[int, ...]
    angle_ranks: tuple[int, ...]
    mllm_sigma: tuple[float, ...]
    math_sigma: tuple[float, ...]
    angles: tuple[float, ...]
    noise_floor: float | None
    chance_first: float
    chance_max: float
    best_index: int
    best_angle: float
    principal: tuple[tuple[int, float], ...]  # (k, mean cosine of the leading k directions)


def spectra_info(record: Mapping[str, Any]) -> SpectraInfo:
    """Collect the numbers that the spectra figure of one matrix and expert shows."""
    ranks, mllm_sigma, math_sigma = _singular_values(record)
    return SpectraInfo(
        title=f"Layer {record['layer']}, {record['module']}",
        held=len(mllm_sigma),
        possible=min(record["shape"]),
        sigma_ranks=ranks,
        angle_ranks=tuple(record["index"]),
        mllm_sigma=mllm_sigma,
        math_sigma=math_sigma,
        angles=tuple(record["angles"]),
        noise_floor=record["noise_floor"],
        chance_first=record["chance"]["first"],
        chance_max=record["chance"]["max"],
        best_index=record["best_index"],
        best_angle=record["similarity"]["max"],
        principal=tuple(sorted((int(k), value) for k, value in record["principal"].items())),
    )


def _singular_values(
    record: Mapping[str, Any],
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """Return ranks and singular values: all that were computed, or an older pack's samples."""
    if not record.get("spectra"):
        return tuple(record["index"]), tuple(record["mllm_sigma"]), tuple(record["math_sigma"])
    spectra = Spectra.from_dict(record["spectra"])
    found = tuple(spectra.mllm.values())
    return tuple(range(1, len(found) + 1)), found, tuple(spectra.math.values())


def spectra_figure(
    info: SpectraInfo,
    pinned: SpectraInfo | None = None,
    *,
    dark: bool = False,
    narrow: bool = False,
) -> go.Figure:
    """Plot singular values (logarithmic or linear, by button) and corresponding angles.

    Args:
        info: result of `spectra_info`.
        pinned: a second matrix, drawn in thin lines.
        dark: use light colours for a dark page.
        narrow: stack the panels vertically, for a phone.
    """
    values = f"{info.held} of {info.possible} singular values"
    angles = f"{len(info.angles)} corresponding angles sᵢ = |⟨vᵢ, vᵢ′⟩|"
    titles = (f"{info.title}: {values}", angles)
    rows, columns = (2, 1) if narrow else (1, 2)
    figure = make_subplots(
        rows, columns, horizontal_spacing=0.08, vertical_spacing=0.16, subplot_titles=titles
    )
    figure.add_traces(_sigma_traces(info, dark), rows=1, cols=1)
    figure.add_traces(_angle_traces(info, dark), rows=rows, cols=columns)
    if pinned:
        figure.add_traces([_thin(line, pinned) for line in _sigma_lines(pinned, dark)], 1, 1)
        figure.add_trace(_thin(_angle_line(pinned, dark), pinned), rows, columns)
    figure.update_xaxes(type="log", title={"text": "rank i", "standoff": 4}, gridcolor=RULE[dark])
    figure.update_xaxes(tickvals=[1, 10, 100, 1000, 10_000], showline=True, linecolor=RULE[dark])
    figure.update_yaxes(gridcolor=RULE[dark], zerolinecolor=RULE[dark])
    figure.update_yaxes(type="log", dtick=1, exponentformat="power", row=1, col=1)
    figure.update_yaxes(range=[0, 1.02], row=rows, col=columns)
    figure.update_annotations(font_size=14)
    figure.update_layout(updatemenus=[_scale_buttons(dark, narrow)], **_frame(dark, narrow))
    return figure


def _sigma_traces(info: SpectraInfo, dark: bool) -> list[go.Scatter]:
    lines = _sigma_lines(info, dark)
    least = min(value for value in (*info.mllm_sigma, *info.math_sigma, math.inf) if value > 0)
    if info.noise_floor is None or info.noise_floor < least / 10:  # far below the plotted range
        return lines
    return [*lines, _level(info, info.noise_floor, "rounding of the stored weights", dark)]


def _sigma_lines(info: SpectraInfo, dark: bool) -> list[go.Scatter]:
    return [
        go.Scatter(
            x=info.sigma_ranks,
            y=values,
            name=f"{name} task vector",
            line={"color": color, "dash": dash, "width": 2},
            hovertemplate="σ at rank %{x}: %{y:.4g}",
        )
        for name, values, color, dash in (
            ("MLLM", info.mllm_sigma, MLLM[dark], "solid"),
            ("math", info.math_sigma, MATH[dark], "dash"),
        )
    ]


def _angle_line(info: SpectraInfo, dark: bool) -> go.Scatter:
    return go.Scatter(
        x=info.angle_ranks,
        y=info.angles,
        name="angles",
        mode="lines+markers",
        line={"color": ANGLE[dark], "width": 1.5},
        marker={"size": 4},
        hovertemplate="s at rank %{x}: %{y:.3f}",
    )


def _thin(line: go.Scatter, info: SpectraInfo) -> go.Scatter:
    """Return the same line for the pinned matrix, with an adapted name."""
    return line.update(line_width=0.9, opacity=0.7, name=f"{info.title} (pinned), {line.name}")


def _angle_traces(info: SpectraInfo, dark: bool) -> list[go.Scatter]:
    best = go.Scatter(
        x=[info.best_index],
        y=[info.best_angle],
        name="best angle",
        mode="markers",
        marker={"symbol": "diamond-open", "size": 11, "color": ANGLE[dark], "line_width": 2},
        hovertemplate="best: s at rank %{x}: %{y:.3f}",
    )
    principal = go.Scatter(
        x=[k for k, _ in info.principal],
        y=[value for _, value in info.principal],
        name="first k directions, principal",
        mode="markers",
        marker={"symbol": "diamond", "size": 8, "color": INK[dark]},
        hovertemplate="mean principal cosine of the first %{x}: %{y:.3f}",
    )
    return [
        _angle_line(info, dark),
        best,
        principal,
        _level(info, info.chance_max, "chance level of the best", dark),
    ]


def _level(info: SpectraInfo, value: float, name: str, dark: bool) -> go.Scatter:
    """Return a horizontal line as a trace, which stays correct when the axis becomes linear."""
    return go.Scatter(
        x=[info.sigma_ranks[0], info.sigma_ranks[-1]],
        y=[value, value],
        name=name,
        mode="lines",
        line={"color": INK[dark], "dash": "dot", "width": 1.2},
        hovertemplate=name + ": %{y:.4g}",
    )


def _scale_buttons(dark: bool, narrow: bool) -> dict[str, Any]:
    buttons = [
        {"label": f"σ {kind}", "method": "relayout", "args": [{"yaxis.type": kind}]}
        for kind in ("log", "linear")
    ]
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "x": 1 if narrow else 0.455,  # where singular values are already small
        "xanchor": "right",
        "y": 1,
        "yanchor": "top",
        "showactive": False,
        "bgcolor": "rgba(0,0,0,0)",
        "bordercolor": RULE[dark],
        "font": {"color": INK[dark], "size": 12},
    }


def _frame(dark: bool, narrow: bool) -> dict[str, Any]:
    """Return the common layout: transparent, no title (gr.Plot adds 100 px of margin for one)."""
    return {
        "template": None,
        "height": 760 if narrow else 340,
        "margin": {"l": 52, "r": 12, "t": 36, "b": 230 if narrow else 84},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "color": INK[dark],
            "size": 12.5,
            "family": "IBM Plex Sans, system-ui, sans-serif",
        },
        "legend": {
            "orientation": "h",
            "x": 0 if narrow else 1,
            "xanchor": "left" if narrow else "right",
            "y": -0.19 if narrow else -0.2,
            "yanchor": "top",
        },
        "hovermode": "closest",
    }
