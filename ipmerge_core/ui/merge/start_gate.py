"""When "Start merge" may be pressed: only for what the check has answered and Confirm shows.

In: events that change what would be merged. Out: one chain per event: Start goes off in the page at
once, the check runs, its answer is shown if nothing has changed since it was asked, and Start goes
on if nothing speaks against it. The digest of what is on show travels with the press, and the
server compares it again, so that a slow page can never start another merge than Confirm shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.ui.errors import QUIET

if TYPE_CHECKING:
    from gradio.events import Dependency

# What comes while a link of a chain is pending runs after it; by default it would be dropped.
LAST: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
CHECKING = '<p class="waiting">Checking …</p>'
FAILED = (
    '<p class="failure">✕ The check could not be carried out. Choose something else, or open this '
    "tab again.</p>"
)

# Every change has a number, from the first visit of the tab on. Start goes off with it, at once.
_FIRST = f"""(asked) =>
  [String(Number(asked) + 1), {{ __type__: "update", interactive: false }}, {CHECKING!r}]"""
_CHANGED = f'(asked) => asked === "" ? [undefined, undefined, undefined] : ({_FIRST})(asked)'

# An answer is shown if it answers the newest change. A folder's name that a visitor wrote stays;
# suggested ones end in a plan's hash.
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
    """The parts of the tab that an answer fills, and the button that waits for it."""

    findings: gr.HTML
    confirmation: gr.HTML
    folder: gr.Textbox
    note: gr.HTML  # why the folder, or a run, keeps Start off; empty where nothing does
    start: gr.Button


class Answer(NamedTuple):
    """What a check found, as the page shows it."""

    findings: str
    confirmation: str
    folder: str  # a suggestion; empty where nothing could be checked
    digest: str  # of exactly what was checked
    ready: bool


class StartGate:
    """The hidden state behind Start, and the wiring that keeps it true; use inside the tab.

    Args:
        shown: the components on show.
        check: from the values of `inputs` to an Answer; errors are the visitor's to read.
        inputs: what the check reads.
        say: from the folder's name and whether a run is in progress ("1" or "") to the note.
    """

    def __init__(
        self,
        shown: Shown,
        check: Callable[..., Answer],
        inputs: list[Any],
        say: Callable[[str, str], str],
    ) -> None:
        self._shown, self._check, self._inputs, self._say = shown, check, inputs, say
        self._asked = _hidden("asked")  # the number of the newest change; empty before the first
        self._ready = _hidden("ready")  # the number of the change that may start
        self._answer = _hidden("answer")
        self.digest = _hidden("confirmed-digest")
        self.busy = _hidden("merge-busy")  # "1" while a run of this browser goes
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
            "fn": self._say_once_asked,
            "inputs": [self._asked, shown.folder, self.busy],
            "outputs": shown.note,
            "queue": False,
            **LAST,
        }
        typed = shown.folder.change(**self._note)  # an input event comes before its value
        typed.then(**self._unlock)
        self.at_once(self.busy.change)
        self.after(self.busy.change)

    def at_once(self, listener: Callable[..., Dependency], *, first: bool = False) -> None:
        """Let an event turn Start off before anything is asked of the server.

        Args:
            listener: of a component, as `field.change`.
            first: whether this event is where checking begins: the tab is opened.
        """
        off = [self._asked, self._shown.start, self._shown.note]
        js = _FIRST if first else _CHANGED
        listener(None, self._asked, off, js=js, queue=False, trigger_mode="multiple", **QUIET)

    def after(self, listener: Callable[..., Dependency]) -> Dependency:
        """Let the check follow an event, as `field.change` or `dependency.then`."""

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
        said = found.then(
            None, [self._asked, self._answer, shown.folder], filled, js=_SHOW, queue=False, **QUIET
        ).then(**self._note)
        then: Dependency = said.then(**self._unlock)
        return then

    def _say_once_asked(self, asked: str, name: str, busy: str) -> str:
        return self._say(name, busy) if asked else ""


def _hidden(elem_id: str) -> gr.Textbox:
    return gr.Textbox("", visible="hidden", elem_id=elem_id)
