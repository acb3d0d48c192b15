"""Build the Compare tab: two plans on one pair, or two pairs by relative depth, in one grid.

In: the chosen pair, the session's `PlanChoice`, and a second pair. Out: nothing; every number is
computed in the browser by the arithmetic that the layer map uses.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.events import Dependency

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.errors import QUIET, sentence_of, show_errors
from ipmerge_core.ui.explore import layer_map
from ipmerge_core.ui.explore.tab import after_commits, map_content
from ipmerge_core.ui.pairs import list_packs
from ipmerge_core.ui.plan_choice import PlanChoice
from ipmerge_core.ui.runs import Updates
from ipmerge_core.ui.safe_text import as_html
from ipmerge_core.ui.web.modules import join_modules

HERE = Path(__file__).parent
ELEM_ID = "compare-map"


def compare_tab(pair: gr.Dropdown, choice: gr.State, tab: gr.Tab, opened: Dependency) -> None:
    """Lay out the tab inside the open `tab`; fill it when the tab or a pair is opened."""
    # layout
    other = gr.Dropdown(others(), value="", label="Pair B", elem_id="compare-pair")
    reason = gr.HTML("", elem_id="compare-reason")
    compared = CompareMap()
    seen = gr.State(False)  # whether the tab was opened; no content is sent before

    # handlers
    def compare(pack_id: str, plan: PlanChoice, other_id: str) -> Updates:
        content, why = compared_or_reason(pack_id, plan, other_id)
        listed = gr.update(choices=others())
        return {compared: content, reason: why, other: listed, seen: True}

    def compare_again(
        pack_id: str, plan: PlanChoice, other_id: str, shown: bool
    ) -> tuple[Any, Any]:
        return compared_or_reason(pack_id, plan, other_id) if shown else (gr.skip(), gr.skip())

    # wiring
    inputs = [pair, choice, other]
    whole = [compared, reason, other, seen]
    after_commits(tab.select).then(show_errors(compare), inputs, whole, **QUIET)
    other.input(show_errors(compare), inputs, whole, **QUIET)
    opened.success(show_errors(compare_again), [*inputs, seen], [compared, reason], **QUIET)


def others() -> list[tuple[str, str]]:
    """List the pairs that the chosen pair can be compared with."""
    return [("The same pair", ""), *((pack.label, pack.id) for pack in list_packs())]


def compared_or_reason(
    pack_id: str, choice: PlanChoice, other_id: str
) -> tuple[dict[str, Any] | None, str]:
    """Return the content, or None and the reason, such as an unfinished analysis."""
    try:
        return compare_content(pack_id, choice, other_id), ""
    except PlanError as error:
        return None, f'<p class="waiting">{as_html(sentence_of(error))}</p>'


def compare_content(pack_id: str, choice: PlanChoice, other_id: str) -> dict[str, Any]:
    """Return what the component draws; `b` is None for the same pair. Raises: PlanError."""
    other = map_content(other_id) if other_id and other_id != pack_id else None
    return {"a": map_content(pack_id, choice), "b": other}


@cache
def script() -> str:
    """Return the component's JavaScript as one script."""
    return join_modules(HERE / "compare.js", layer_map.MOUNT)


class CompareMap(gr.HTML):
    """A component that shows two plans in one grid."""

    def __init__(
        self, value: dict[str, Any] | None = None, elem_id: str = ELEM_ID, *, render: bool = True
    ) -> None:
        styles = [layer_map.HERE / "style.css", HERE / "style.css"]
        super().__init__(
            value=value,
            html_template=(HERE / "template.html").read_text(encoding="utf-8"),
            css_template="\n".join(path.read_text(encoding="utf-8") for path in styles),
            js_on_load=script(),
            apply_default_css=False,
            elem_id=elem_id,
            render=render,  # Gradio needs it for `gr.skip()`
        )

    def postprocess(self, value: object) -> str | None:
        """Send the content as one JSON string, so that the page creates no proxies of its parts."""
        if value is None or isinstance(value, str):
            return value
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    def api_info(self) -> dict[str, Any]:
        """Return the type of the content: a JSON string."""
        return {"type": "string"}
