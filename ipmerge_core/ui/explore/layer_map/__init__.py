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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ipmerge_core.ui.pairs import describe_depth
from ipmerge_core.ui.safe_text import as_html
from ipmerge_core.ui.web.component import Component, component_script

HERE = Path(__file__).parent
ELEM_ID = "layer-map"
MODULE = HERE / "layer_map.js"


def report(content: Mapping[str, Any]) -> str:
    """Return the component and its content as one HTML file that needs no server.

    It names the models, their revisions or fingerprints and the dates, and holds no path of this
    machine.
    """
    content = {**content, "pack": _without_paths(content["pack"])}
    parts = {
        "TITLE": as_html(f"IPMerge: {content['pack']['name']}"),
        "STYLE": "#ipmerge {" + (HERE / "style.css").read_text(encoding="utf-8") + "}",
        "TEMPLATE": (HERE / "template.html").read_text(encoding="utf-8"),
        "FACTS": _facts_html(content["pack"]),
        "CONTENT": json.dumps(content, allow_nan=False).replace("<", "\\u003c"),
        "SCRIPT": component_script(MODULE),
    }
    page = (HERE / "report.html").read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], page)


def _without_paths(pack: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pack whose models are named as they may be shown, see `shown_path`."""

    def named(source: Any) -> Any:  # noqa: ANN401 (one source, several, or none)
        if isinstance(source, list):
            return [named(each) for each in source]
        if not source:
            return source
        path = Path(source["id"])
        return {**source, "id": path.name if path.is_absolute() else str(path)}

    return {**pack, "sources": {role: named(one) for role, one in pack["sources"].items()}}


def _facts_html(pack: Mapping[str, Any]) -> str:
    """Describe a pack's models and dates."""
    sources = pack["sources"]
    named = [("Vision-language model", sources["mllm"]), ("Base", sources["base"])]
    named += [("Its own base", found)] if (found := sources.get("base_mllm")) else []
    named += [("Math model", expert) for expert in sources["math"]]
    rows = [(role, _source_words(source)) for role, source in named]
    made = f"Analysed {pack['created'][:10]} with IPMerge {pack['engine']}"
    saved = datetime.now(UTC).strftime("Saved %Y-%m-%d %H:%M UTC")
    rows.append(("Dates", f"{made}{describe_depth(pack['parameters'])}. {saved}."))
    cells = "".join(f"<dt>{role}</dt><dd>{as_html(words)}</dd>" for role, words in rows)
    return f'<dl class="facts">{cells}</dl>'


def _source_words(source: Mapping[str, Any]) -> str:
    revision, fingerprint = source.get("revision"), source.get("fingerprint")
    words = [str(source["id"]), f"revision {revision[:12]}" if revision else ""]
    return ", ".join(
        filter(None, [*words, f"fingerprint {fingerprint[:12]}" if fingerprint else ""])
    )


class LayerMap(Component):
    """A component that shows a pack as a map, with sliders, previews and details.

    Args:
        value: the content, see `ipmerge_core.ui.explore.tab.map_content`.
        elem_id: the id of the component's element.
        server_functions: `report_file(pack_id, plan)` for the HTML report, and
            `grown(pack_id, n_known)` for the records of unfinished pairs.
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
        super().__init__(value, elem_id, MODULE, server_functions=server_functions, render=render)
