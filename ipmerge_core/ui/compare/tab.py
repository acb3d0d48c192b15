"""Build the Compare tab: two plans on one pair, or two pairs by relative depth, in one grid.

In: the session's `ChosenMerge`, and a second pair. Out: nothing; every number is computed in the
browser by the arithmetic that the layer map uses. A is the chosen merge, or the plan in Explore if
the map cannot draw the chosen one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.chosen_merge import ChosenMerge, chosen_line, name_of
from ipmerge_core.ui.errors import QUIET, sentence_of, show_errors
from ipmerge_core.ui.explore import layer_map
from ipmerge_core.ui.explore.tab import after_commits, map_content
from ipmerge_core.ui.pairs import list_packs
from ipmerge_core.ui.runs import Updates
from ipmerge_core.ui.safe_text import as_html
from ipmerge_core.ui.web.component import Component

HERE = Path(__file__).parent
ELEM_ID = "compare-map"


NOT_DRAWN = (
    "The matrices of this merge cannot be previewed from the analysis: A shows the plan in Explore."
)


def compare_tab(pair: gr.Dropdown, chosen: gr.State, tab: gr.Tab, opened: Dependency) -> None:
    """Lay out the tab inside the open `tab`; fill it when the tab or a pair is opened."""
    # layout
    line = gr.HTML("", elem_id="compare-chosen", elem_classes="chosen-line")
    other = gr.Dropdown(others(), value="", label="Pair B", elem_id="compare-pair")
    reason = gr.HTML("", elem_id="compare-reason")
    compared = CompareMap()
    seen = gr.State(False)  # whether the tab was opened; no content is sent before

    # handlers
    def compare(now: ChosenMerge, other_id: str | None) -> Updates:
        content, why = compared_or_reason(now, other_id)
        listed = gr.update(choices=others())
        return {compared: content, reason: why, other: listed, seen: True}

    def compare_again(now: ChosenMerge, other_id: str | None, shown: bool) -> tuple[Any, Any]:
        return compared_or_reason(now, other_id) if shown else (gr.skip(), gr.skip())

    # wiring
    inputs = [chosen, other]
    whole = [compared, reason, other, seen]
    after_commits(tab.select, pair).then(show_errors(compare), inputs, whole, **QUIET).then(
        chosen_line, chosen, line, **QUIET
    )
    other.input(show_errors(compare), inputs, whole, **QUIET)
    opened.success(show_errors(compare_again), [*inputs, seen], [compared, reason], **QUIET)


def others() -> list[tuple[str, str]]:
    """List the pairs that the chosen pair can be compared with."""
    return [("The same pair", ""), *((pack.label, pack.id) for pack in list_packs())]


def compared_or_reason(
    chosen: ChosenMerge, other_id: str | None
) -> tuple[dict[str, Any] | None, str]:
    """Return the content and what it leaves out, or None and the reason."""
    try:
        content = compare_content(chosen, other_id)
    except PlanError as error:
        return None, f'<p class="waiting">{as_html(sentence_of(error))}</p>'
    return content, "" if chosen.map_plan else f'<p class="waiting">{NOT_DRAWN}</p>'


def compare_content(chosen: ChosenMerge, other_id: str | None) -> dict[str, Any]:
    """Return what the component draws; `b` is None for the same pair. Raises: PlanError."""
    pack_id, drawn = chosen.pack_id, chosen.map_plan
    other = map_content(other_id) if other_id and other_id != pack_id else None
    name = name_of(chosen) if drawn else "Plan in Explore"
    label = name[:1].upper() + name[1:]
    return {"a": {**map_content(pack_id, drawn or chosen.plan), "label": label}, "b": other}


class CompareMap(Component):
    """A component that shows two plans in one grid."""

    def __init__(
        self, value: dict[str, Any] | None = None, elem_id: str = ELEM_ID, *, render: bool = True
    ) -> None:
        styles = [layer_map.HERE / "style.css"]
        super().__init__(value, elem_id, HERE / "compare.js", styles=styles, render=render)
