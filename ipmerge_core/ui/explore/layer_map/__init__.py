"""Define the layer map: a `gr.HTML` component with its own JavaScript that draws a pack.

In: `{"id": ..., "pack": ..., "plan": ..., "presets": [...]}`, plain JSON. Out: browser events:
`commit` when a plan has been chosen (once per drag, never during it), `cellselect` when a matrix is
selected, `packselect` when the page's address or its history names another pair; `report` returns
the same component as one HTML file that needs no server. The browser computes all previews; Python
receives only the final plan as untrusted input, which `read_commit` and `read_cells` check against
the pack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from ipmerge_core.ui.safe_text import as_html
from ipmerge_core.ui.web.modules import join_modules

HERE = Path(__file__).parent
MOUNT = "mount({ element, trigger, props, server, watch })"  # what Gradio gives to a component
ELEM_ID = "layer-map"


@cache
def script() -> str:
    """Return the component's JavaScript as one script."""
    return join_modules(HERE / "layer_map.js", MOUNT)


def report(content: Mapping[str, Any]) -> str:
    """Return the component and its content as one HTML file that needs no server."""
    parts = {
        "TITLE": as_html(f"IPMerge: {content['pack']['name']}"),
        "STYLE": "#ipmerge {" + (HERE / "style.css").read_text(encoding="utf-8") + "}",
        "TEMPLATE": (HERE / "template.html").read_text(encoding="utf-8"),
        "CONTENT": json.dumps(content, allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": script(),
    }
    page = (HERE / "report.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], page)


class LayerMap(gr.HTML):
    """A component that shows a pack as a map, with sliders, previews and details.

    Args:
        value: the content, see `ipmerge_core.ui.explore.tab.map_content`.
        elem_id: the id of the component's element.
        server_functions: `report_file(pack_id, plan)` for the HTML report, and
            `grown(pack_id, n_known)` for the records of unfinished pairs.
        render: whether to add the component to the page; Gradio needs it for `gr.skip()`.
    """

    def __init__(
        self,
        value: Mapping[str, Any] | None = None,
        elem_id: str = ELEM_ID,
        server_functions: list[Callable[..., Any]] | None = None,
        *,
        render: bool = True,
    ) -> None:
        super().__init__(
            value=value,
            html_template=(HERE / "template.html").read_text(encoding="utf-8"),
            css_template=(HERE / "style.css").read_text(encoding="utf-8"),
            js_on_load=script(),
            apply_default_css=False,
            elem_id=elem_id,
            server_functions=server_functions,
            render=render,
        )

    def postprocess(self, value: object) -> str | None:
        """Send the content as one JSON string, so that the page creates no proxies of its parts."""
        if value is None or isinstance(value, str):
            return value
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    def api_info(self) -> dict[str, Any]:
        """Return the type of the content: a JSON string."""
        return {"type": "string"}
