"""Define the base of the app's own components: a template, a style and a script, fed with JSON.

In: a folder with `template.html` and `style.css`, and the first of the script's modules. Out: a
`gr.HTML` whose value reaches the page as one JSON string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from ipmerge_core.ui.web.modules import join_modules

MOUNT = "mount({ element, trigger, props, server, watch })"  # what Gradio gives to a component


@cache
def component_script(module: Path) -> str:
    """Return the JavaScript of a component whose first module is `module`, as one script."""
    return join_modules(module, MOUNT)


class Component(gr.HTML):
    """A component with a template, a style and a script of its own.

    Args:
        value: the content, as JSON values.
        elem_id: the id of the component's element.
        module: the first module of its script, in the folder of its template and style.
        styles: further style sheets, before its own.
        server_functions: functions that the script can call.
        render: whether to add the component to the page; Gradio needs it for `gr.skip()`.
    """

    def __init__(
        self,
        value: Mapping[str, Any] | None,
        elem_id: str,
        module: Path,
        *,
        styles: Sequence[Path] = (),
        server_functions: list[Callable[..., Any]] | None = None,
        render: bool = True,
    ) -> None:
        sheets = [*styles, module.parent / "style.css"]
        super().__init__(
            value=value,
            html_template=(module.parent / "template.html").read_text(encoding="utf-8"),
            css_template="\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets),
            js_on_load=component_script(module),
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
