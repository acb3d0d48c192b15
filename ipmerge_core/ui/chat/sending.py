"""Send the prompt: the page clears it at once, and returns it if the question is refused.

In: the components of the tab. Out: the event that sends a question, and what follows its end. No
answer of the server overwrites the prompt, because a visitor may have typed in it since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from ipmerge_core.errors import RunError
from ipmerge_core.ui.chat.layout import EMPTY_PROMPT, Parts
from ipmerge_core.ui.chat.turns import Past, Turn, is_empty, pushed
from ipmerge_core.ui.errors import QUIET, show_errors

if TYPE_CHECKING:
    from gradio.events import Dependency

# In the page, see prompt.js, which takes the text out of the prompt at Enter, unless an earlier
# question is being answered. A value that is undefined changes nothing.
SEND = """(typed) => {
  const detail = { text: null };
  const files = [...(typed?.files ?? [])];
  document.dispatchEvent(new CustomEvent("ipmerge-send", { detail }));
  if (detail.text === null) throw new Error("An earlier question is being answered.");
  return { text: detail.text, files };
}"""
RETURN = """(sent) => {
  const detail = { text: sent.text, isReturned: false };
  document.dispatchEvent(new CustomEvent("ipmerge-refused", { detail }));
  if (!detail.isReturned) return [undefined, undefined];
  return [{ text: "", files: [] }, sent.files.length ? sent : undefined];
}"""
ANSWERED = "() => { document.dispatchEvent(new CustomEvent('ipmerge-answered')); }"


def wire_send(parts: Parts) -> Dependency:
    """Return the event after which `sent` holds the question and the prompt is empty."""

    def refuse() -> None:
        raise RunError(
            "Answers are still arriving. Wait for them or press Stop all, then send the question."
        )

    sent: Dependency = parts.prompt.submit(
        None, parts.prompt, parts.sent, js=SEND, queue=False, **QUIET
    )
    # Queued, because the page shows errors of queued events only.
    sent.failure(show_errors(refuse), None, None, **QUIET)
    return sent


def return_refused(parts: Parts, event: Dependency) -> None:
    """If this event fails, return the question to the prompt if it is empty, else to Undo."""

    def keep(sent: dict[str, Any], past: list[Past], turns: list[Turn]) -> Any:  # noqa: ANN401
        return gr.skip() if is_empty(sent) else pushed(past, sent, turns, EMPTY_PROMPT)

    both = [parts.sent, parts.prompt]
    returned = event.failure(None, parts.sent, both, js=RETURN, queue=False, **QUIET)
    kept = [parts.sent, parts.past, parts.turns]
    returned.success(keep, kept, parts.past, queue=False, **QUIET)


def end_sending(event: Dependency) -> None:
    """Accept the next question after this event."""
    event.success(None, None, None, js=ANSWERED, queue=False, **QUIET)
