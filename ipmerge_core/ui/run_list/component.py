"""Define the list of runs: a `gr.HTML` component with its own JavaScript in the frame of the tabs.

In: `{"n": ..., "run": ..., "failed": ..., "runs": [...], "more": ...}`, see `rows`. Out: browser
events. `tick` requests the state of all runs: once when the page is opened, repeatedly while a run
is in progress, and when the page is looked at again. `act` cancels, resumes or deletes a run,
`open` shows it in its tab or asks its model. Every event carries the visitor's secret, which stays
in this browser; Python checks it against the runs.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from ipmerge_core.ui.web.modules import join_modules

HERE = Path(__file__).parent
MOUNT = "mount({ element, trigger, props, server, watch })"  # what Gradio gives to a component
ELEM_ID = "run-list"


@cache
def script() -> str:
    """Return the component's JavaScript as one script."""
    return join_modules(HERE / "run_list.js", MOUNT)


class RunList(gr.HTML):
    """A component that lists the runs of a visitor."""

    def __init__(
        self, value: dict[str, Any] | None = None, elem_id: str = ELEM_ID, *, render: bool = True
    ) -> None:
        super().__init__(
            value=value,
            html_template=(HERE / "template.html").read_text(encoding="utf-8"),
            css_template=(HERE / "style.css").read_text(encoding="utf-8"),
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
