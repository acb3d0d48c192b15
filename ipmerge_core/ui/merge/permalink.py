"""Let the permalink speak of the chosen merge: the method and the options beside the map's plan.

In: the query of the page's address when it is opened, and later the chosen merge. Out: the method
in the form of the Merge tab and in the session's `ChosenMerge`; the link's part, which the layer
map writes into the address with its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from ipmerge_core.ui.chosen_merge import (
    METHOD_KEY,
    OPTION_KEY,
    ChosenMerge,
    link_part,
    read_link_part,
)
from ipmerge_core.ui.errors import QUIET
from ipmerge_core.ui.finished_merges import method_label
from ipmerge_core.ui.merge.method_form import EXPLORED_LABEL
from ipmerge_core.ui.method_choice import EXPLORED

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.ui.runs import Updates

_MAP = "document.querySelector('#layer-map .lm')?.parentNode.ipmerge"
# The link is read once the map has read its own part, so that no answer overwrites the other.
_QUERY = f"""async () => {{
  const isRead = (map) => map && map.linkRead && map.isSettled();
  for (let i = 0; i < 250 && !isRead({_MAP}); i++)
    await new Promise((wake) => setTimeout(wake, 40));
  return [window.location.search];
}}"""
_SPEAK = f"(part) => {{ {_MAP}?.speakOf(part); }}"
_COMPLAIN = f"(problems) => {{ if (problems) {_MAP}?.complain(problems); }}"


def wire_permalink(
    app: gr.Blocks, chosen: gr.State, form: list[Any], chose: list[Dependency]
) -> None:
    """Read the address when the page is opened, and write to it after every event of `chose`.

    Args:
        app: the app, whose load event comes with the address.
        chosen: holds the ChosenMerge.
        form: the state and the dropdown of the Merge tab's method.
        chose: the events after which another merge may be chosen, except commits of the map.
    """
    query = gr.Textbox("", visible="hidden", elem_id="link-query")
    part = gr.Textbox("", visible="hidden", elem_id="link-part")
    problems = gr.Textbox("", visible="hidden", elem_id="link-problems")
    method, named = form

    def read(asked: str, now: ChosenMerge) -> Updates:
        if f"{METHOD_KEY}=" not in asked and f"{OPTION_KEY}" not in asked:
            return {problems: ""}
        how, wrong = read_link_part(asked)
        if how == now.method:
            return {problems: "; ".join(wrong)}
        return {
            problems: "; ".join(wrong),
            chosen: now.with_method(how),
            method: how,
            named: _listed(how.name),
        }

    def write(now: ChosenMerge) -> str:
        return link_part(now)

    asked = app.load(None, None, query, js=_QUERY, queue=False, **QUIET)
    found = asked.then(
        read, [query, chosen], [problems, chosen, method, named], queue=False, **QUIET
    )
    found.then(None, problems, None, js=_COMPLAIN, queue=False, **QUIET)
    for event in chose:
        event.then(write, chosen, part, queue=False, **QUIET).then(
            None, part, None, js=_SPEAK, queue=False, **QUIET
        )


def _listed(name: str) -> dict[str, Any]:
    """Return the update of the dropdown, which lists all methods when the tab is opened."""
    rest = [(method_label(name), name)] if name else []
    update: dict[str, Any] = gr.update(choices=[(EXPLORED_LABEL, EXPLORED), *rest], value=name)
    return update
