"""Enable "Start merge" only for what has been checked and is shown under Confirm.

In: events that change what would be merged. Out: one chain per event: the page disables Start at
once, the check runs, its result is shown if nothing has changed meanwhile, and Start is enabled if
there is no objection. The digest of what is shown is sent with the click and compared again on the
server, so that even a slow page cannot start anything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.ui.errors import QUIET

if TYPE_CHECKING:
    from gradio.events import Dependency

# An event during a pending step of the chain runs after it; by default it would be dropped.
LAST: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
CHECKING = '<p class="waiting">Checking …</p>'
FAILED = '<p class="failure">✕ The check failed. Change the settings or open this tab again.</p>'

# Every change gets a number, from the first visit of the tab on, and disables Start at once.
_FIRST = f"""(asked) =>
  [String(Number(asked) + 1), {{ __type__: "update", interactive: false }}, {CHECKING!r}]"""
_CHANGED = f'(asked) => asked === "" ? [undefined, undefined, undefined] : ({_FIRST})(asked)'

# An answer is shown if it belongs to the newest change. A folder name typed by the user stays;
# suggested names end in a plan's hash.
_SHOW = r"""(asked, answer, typed) => {
  const found = answer ? JSON.parse(answer) : {};
  if (found.asked !== asked) return Array(5).fill(undefined);
  const own = typed && !/-[0-9a-f]{8}(-\d+)?$/.test(typed);
  return [found.findings, found.confirmation, found.digest, found.ready ? asked : "",
    own || !found.folder ? typed : found.folder];
}"""
_MAY_START = """(asked, ready, busy, note) => ({ __type__: "update",
  interactive: asked !== "" && asked === ready && !busy && !note })"""


class Shown(NamedTuple):
    """The components that an answer fills, and the button that waits for it."""

    findings: gr.HTML
    confirmation: gr.HTML
    folder: gr.Textbox
    note: gr.HTML  # why the folder or a run disables Start; may be empty
    start: gr.Button


class Answer(NamedTuple):
    """The result of a check as the page shows it."""

    findings: str
    confirmation: str
    folder: str  # a suggestion; empty if there is no plan
    digest: str  # of what was checked
    ready: bool


class StartGate:
    """The hidden state behind Start and its wiring; create it inside the tab.

    Args:
        shown: the visible components.
        check: computes the Answer for the values of `inputs`.
        inputs: what the check reads.
        describe: computes the note from the folder's name and a run being in progress ("1" or "").
    """

    def __init__(
        self,
        shown: Shown,
        check: Callable[..., Answer],
        inputs: list[Any],
        describe: Callable[[str, str], str],
    ) -> None:
        self._shown, self._check, self._inputs, self._describe = shown, check, inputs, describe
        self._asked = _hidden("asked")  # the number of the newest change; empty before the first
        self._ready = _hidden("ready")  # the number of the change that may start
        self._answer = _hidden("answer")
        self.digest = _hidden("confirmed-digest")
        self.busy = _hidden("merge-busy")  # "1" while a run of this browser is in progress
        may_start = [self._asked, self._ready, self.busy, shown.note]
        self._unlock: dict[str, Any] = {
            "fn": None,
            "inputs": may_start,
            "outputs": shown.start,
            "js": _MAY_START,
            "queue": False,
            **QUIET,
        }
        self._note: dict[str, Any] = {
            "fn": self._note_once_asked,
            "inputs": [self._asked, shown.folder, self.busy],
            "outputs": shown.note,
            "queue": False,
            **LAST,
        }
        typed = shown.folder.change(**self._note)  # an input event comes before its value
        typed.then(**self._unlock)
        self.disable_on(self.busy.change)
        self.check_after(self.busy.change)

    def disable_on(self, listener: Callable[..., Dependency], *, first: bool = False) -> None:
        """Let an event disable Start in the page, before any request is sent.

        Args:
            listener: an event of a component, such as `field.change`.
            first: whether this event starts the checking: the tab is opened.
        """
        off = [self._asked, self._shown.start, self._shown.note]
        js = _FIRST if first else _CHANGED
        listener(None, self._asked, off, js=js, queue=False, trigger_mode="multiple", **QUIET)

    def check_after(self, listener: Callable[..., Dependency]) -> Dependency:
        """Run the check after an event, such as `field.change` or `dependency.then`."""

        def check(asked: str, *values: Any) -> str:  # noqa: ANN401 (the values of `inputs`)
            if not asked:
                return ""  # the tab has not been opened yet
            return json.dumps({"asked": asked, **self._check(*values)._asdict()})

        shown = self._shown
        found = listener(check, [self._asked, *self._inputs], self._answer, **LAST)
        found.failure(None, None, shown.note, js=f"() => {FAILED!r}", queue=False, **QUIET)
        filled = [
            shown.findings, shown.confirmation, self.digest, self._ready, shown.folder
        ]  # fmt: skip
        filled_in = found.then(
            None, [self._asked, self._answer, shown.folder], filled, js=_SHOW, queue=False, **QUIET
        ).then(**self._note)
        then: Dependency = filled_in.then(**self._unlock)
        return then

    def _note_once_asked(self, asked: str, name: str, busy: str) -> str:
        return self._describe(name, busy) if asked else ""


def _hidden(elem_id: str) -> gr.Textbox:
    return gr.Textbox("", visible="hidden", elem_id=elem_id)
