"""Show the figures of a search under its table: landscape, Pareto front, importance.

In: the result in view, and whether the page is dark or narrow. Out: Plotly figures in `gr.Plot`;
those that the evaluations do not determine are hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.evaluate.component import EvaluationView
from ipmerge_core.ui.evaluate.results import read_result
from ipmerge_core.ui.runs import Updates

LABELS = {
    "landscape": "Validation score (surrogate through the evaluations)",
    "path": "Agreement with neighbouring values, and scores of the labels",
    "front": "Pareto front on validation items",
    "importance": "Parameter importance (fANOVA)",
}


class SearchFigures:
    """The figures; the constructor lays them out in the open block."""

    def __init__(self) -> None:
        self.plots = {
            name: gr.Plot(label=label, visible=False, elem_id=f"search-{name}")
            for name, label in LABELS.items()
        }

    def wire(self, view: EvaluationView, tabs: gr.Tabs) -> None:
        """Draw the figures of every result that comes into view; open the plan of a point."""

        def draw(event: gr.EventData) -> Updates:
            return self.updates(event._data)

        def edit(event: gr.EventData) -> gr.Tabs:
            is_explored = isinstance(event._data, dict) and event._data.get("tab") == "explore"
            return gr.Tabs(selected="explore" if is_explored else "merge")

        view.drawn(show_errors(draw), None, list(self.plots.values()), **QUIET)
        view.edited(edit, None, tabs, queue=False, **QUIET)

    def updates(self, data: object) -> Updates:
        """Return the updates for a result, named by `id` and `pack`. Raises: RunError."""
        asked: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
        drawn = {}
        if str(asked.get("id")).startswith("search-"):
            drawn = self._drawn(asked)
        return {
            plot: gr.update(value=drawn.get(name), visible=name in drawn)
            for name, plot in self.plots.items()
        }

    @staticmethod
    def _drawn(asked: Mapping[str, Any]) -> dict[str, Any]:
        from ipmerge_core.plots.search import on_page
        from ipmerge_core.plots.search_report import search_figures

        found = read_result(str(asked.get("id")), str(asked.get("pack")))
        assert found.search is not None, "the id names a search"
        dark, narrow = (asked.get(key) is True for key in ("dark", "narrow"))
        return {
            name: on_page(figure, dark=dark, narrow=narrow)
            for name, figure in search_figures(found.search).items()
        }
