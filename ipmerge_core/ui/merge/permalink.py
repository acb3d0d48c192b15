"""Add the chosen merge to the permalink: the method and the options, after the map's plan.

In: the query of the page's address when it is opened, and later the chosen merge. Out: the
session's `ChosenMerge` with the method of the link; the link's part, which the layer map writes
into the address with its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from ipmerge_core.ui.chosen_merge import (
    METHOD_KEY,
    OPTION_KEY,
    VALUE_KEY,
    ChosenMerge,
    link_part,
    read_link_part,
)
from ipmerge_core.ui.errors import QUIET

if TYPE_CHECKING:
    from gradio.events import Dependency


_MAP = "document.querySelector('#layer-map .lm')?.parentNode.ipmerge"
# The link is read once the map has read its own part, so that no answer overwrites the other.
_QUERY = f"""async () => {{
  const isRead = (map) => map && map.linkRead && map.isSettled();
  for (let i = 0; i < 250 && !isRead({_MAP}); i++)
    await new Promise((wake) => setTimeout(wake, 40));
  return [window.location.search];
}}"""
_KEYS = (f"{METHOD_KEY}=", f"&{VALUE_KEY}", f"&{OPTION_KEY}")
_SPEAK = f"(part) => {{ {_MAP}?.speakOf(part); }}"
_COMPLAIN = f"(problems) => {{ if (problems) {_MAP}?.complain(problems); }}"


class Permalink:
    """The hidden fields between the page's address and the chosen merge.

    Args:
        chosen: holds the ChosenMerge.
    """

    def __init__(self, chosen: gr.State) -> None:
        self._chosen = chosen
        self._query = _hidden("link-query")
        self._part = _hidden("link-part")
        self._problems = _hidden("link-problems")

    def write_after(self, event: Dependency) -> None:
        """Write to the address after an event that may have chosen another merge.

        Commits of the map need none: the map drops the method from the address by itself.
        """
        event.then(link_part, self._chosen, self._part, queue=False, **QUIET).then(
            None, self._part, None, js=_SPEAK, queue=False, **QUIET
        )

    def read(self, app: gr.Blocks) -> None:
        """Choose the merge of the address when the page is opened.

        The form of the Merge tab shows it when it is opened. `app` has the load event.
        """

        def read(asked: str, now: ChosenMerge) -> tuple[str, ChosenMerge]:
            if not any(key in asked for key in _KEYS):
                return "", now
            how, wrong = read_link_part(asked)
            return "; ".join(wrong), now.with_method(how)

        asked = app.load(None, None, self._query, js=_QUERY, queue=False, **QUIET)
        found = asked.then(
            read,
            [self._query, self._chosen],
            [self._problems, self._chosen],
            queue=False,
            **QUIET,
        )
        found.then(None, self._problems, None, js=_COMPLAIN, queue=False, **QUIET)


def _hidden(elem_id: str) -> gr.Textbox:
    return gr.Textbox("", visible="hidden", elem_id=elem_id)
