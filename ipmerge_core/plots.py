"""Figures: records -> an info tuple with every number that is drawn -> a Plotly figure.

In: records of a pack, as plain mappings. Out: first a NamedTuple (tested by equality), then a short
drawing of it. No gradio, no torch, no arithmetic of its own. Colours are the Okabe-Ito ones, with a
line style beside each, so that no figure needs colour to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

MLLM, MATH, ANGLE = "#0072B2", "#D55E00", "#009E73"
INK = {False: "#1b2330", True: "#e8eaf0"}
RULE = {False: "rgba(27,35,48,0.14)", True: "rgba(232,234,240,0.18)"}


class SpectraInfo(NamedTuple):
    """Both task vectors' singular values and their corresponding angles, at sampled ranks."""

    title: str
    ranks: tuple[int, ...]
    mllm_sigma: tuple[float, ...]
    math_sigma: tuple[float, ...]
    angles: tuple[float, ...]
    noise_floor: float | None
    chance_first: float
    chance_max: float
    best_index: int
    best_angle: float


def spectra_info(record: Mapping[str, Any]) -> SpectraInfo:
    """Collect what the spectra figure of one matrix and expert shows."""
    return SpectraInfo(
        title=f"Layer {record['layer']}, {record['module']}",
        ranks=tuple(record["index"]),
        mllm_sigma=tuple(record["mllm_sigma"]),
        math_sigma=tuple(record["math_sigma"]),
        angles=tuple(record["angles"]),
        noise_floor=record["noise_floor"],
        chance_first=record["chance"]["first"],
        chance_max=record["chance"]["max"],
        best_index=record["best_index"],
        best_angle=record["similarity"]["max"],
    )


def spectra_figure(info: SpectraInfo, *, dark: bool = False) -> go.Figure:
    """Draw singular values (logarithmic or linear, by button) and corresponding angles."""
    figure = make_subplots(
        cols=2,
        horizontal_spacing=0.09,
        subplot_titles=(
            f"{info.title}: singular values of the task vectors",
            "corresponding angles sᵢ = |⟨vᵢ, vᵢ′⟩|",
        ),
    )
    figure.add_traces(_sigma_traces(info) + _angle_traces(info), rows=1, cols=[1, 1, 2, 2])
    if info.noise_floor:
        figure.add_hline(
            info.noise_floor,
            col=1,
            line={"dash": "dot", "width": 1, "color": INK[dark]},
            annotation={"text": "rounding of the stored dtype", "font_size": 11},
        )
    figure.add_hline(
        info.chance_max,
        col=2,
        line={"dash": "dot", "width": 1, "color": INK[dark]},
        annotation={"text": "chance level of the best", "font_size": 11},
    )
    figure.update_xaxes(type="log", title_text="rank i", dtick=1, gridcolor=RULE[dark])
    figure.update_yaxes(gridcolor=RULE[dark], zerolinecolor=RULE[dark])
    figure.update_yaxes(type="log", exponentformat="power", col=1)
    figure.update_yaxes(range=[0, 1], col=2)
    figure.update_layout(updatemenus=[_scale_buttons(dark)], **_frame(dark))
    return figure


def _sigma_traces(info: SpectraInfo) -> list[go.Scatter]:
    styles = {"MLLM": (MLLM, "solid"), "math": (MATH, "dash")}
    values = {"MLLM": info.mllm_sigma, "math": info.math_sigma}
    return [
        go.Scatter(
            x=info.ranks,
            y=values[name],
            name=f"{name} task vector",
            line={"color": color, "dash": dash, "width": 2},
            hovertemplate="σ at rank %{x}: %{y:.4g}",
        )
        for name, (color, dash) in styles.items()
    ]


def _angle_traces(info: SpectraInfo) -> list[go.Scatter]:
    curve = go.Scatter(
        x=info.ranks,
        y=info.angles,
        name="angle",
        mode="lines+markers",
        line={"color": ANGLE, "width": 1.5},
        marker={"size": 4},
        hovertemplate="s at rank %{x}: %{y:.3f}",
    )
    best = go.Scatter(
        x=[info.best_index],
        y=[info.best_angle],
        name="best angle",
        mode="markers",
        marker={"symbol": "diamond-open", "size": 11, "color": ANGLE, "line_width": 2},
        hovertemplate="best: s at rank %{x}: %{y:.3f}",
    )
    return [curve, best]


def _scale_buttons(dark: bool) -> dict[str, Any]:
    buttons = [
        {"label": f"σ {kind}", "method": "relayout", "args": [{"yaxis.type": kind}]}
        for kind in ("log", "linear")
    ]
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": -0.2,
        "yanchor": "top",
        "showactive": False,
        "bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK[dark], "size": 12},
    }


def _frame(dark: bool) -> dict[str, Any]:
    """The common look: transparent, no layout title (gr.Plot gives one 100 px of margin)."""
    return {
        "template": None,
        "height": 340,
        "margin": {"l": 56, "r": 16, "t": 36, "b": 76},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK[dark], "size": 13},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": -0.2, "yanchor": "top"},
        "hovermode": "x",
    }
