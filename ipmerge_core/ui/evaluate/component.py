"""Define the component that shows the result of an evaluation, and its report as one HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ipmerge_core.ui.explore import layer_map
from ipmerge_core.ui.pairs import pair_name
from ipmerge_core.ui.safe_text import as_html
from ipmerge_core.ui.web.component import Component, component_script

HERE = Path(__file__).parent
ELEM_ID = "evaluation"
MODULE = HERE / "evaluate.js"
STYLES = (layer_map.HERE / "style.css", HERE / "style.css")


class EvaluationView(Component):
    """A component that draws a result: plots, tables and lists of items.

    Args:
        value: the content, see `ipmerge_core.ui.evaluate.content`.
        elem_id: the id of the component's element.
        server_functions: `result_file([id, pack, kind])` and `result_items([id, pack, point])`.
        render: see `Component`.
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
            value,
            elem_id,
            MODULE,
            styles=STYLES[:1],
            server_functions=server_functions,
            render=render,
        )


def report(content: Mapping[str, Any]) -> str:
    """Return a result as one HTML file that needs no server and no other file."""
    facts = [("Pair", pair_name(content["pack"])), *content["facts"]]
    cells = "".join(f"<dt>{as_html(name)}</dt><dd>{as_html(text)}</dd>" for name, text in facts)
    sheets = "\n".join(sheet.read_text(encoding="utf-8") for sheet in STYLES)
    parts = {
        "TITLE": as_html(f"IPMerge: {content['title']}"),
        "STYLE": f"#ipmerge {{{sheets}}}",
        "TEMPLATE": (HERE / "template.html").read_text(encoding="utf-8"),
        "FACTS": f'<dl class="facts">{cells}</dl>',
        "CONTENT": json.dumps({**content, "facts": []}, allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": component_script(MODULE),
    }
    page = (layer_map.HERE / "report.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], page)
