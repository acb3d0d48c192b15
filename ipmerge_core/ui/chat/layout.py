"""Lay out the Try it tab: the prompt, the columns with their models and answers, and the tools.

In: the session's `ChosenMerge`. Out: the components that handlers read or write, and the updates
that show turns in them. Wires nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.ui.chat.blind import BOTH_BAD, LONGEST_REASON, TIE, tally_html
from ipmerge_core.ui.chat.column_choice import Column, ColumnChoice, first_choices
from ipmerge_core.ui.chat.columns import FEWEST_COLUMNS, LETTERS, MOST_COLUMNS
from ipmerge_core.ui.chat.examples import Examples, content_of
from ipmerge_core.ui.chat.messages import View, view
from ipmerge_core.ui.chat.recorded import examples_for
from ipmerge_core.ui.chat.settings import SettingFields, lay_out_settings
from ipmerge_core.ui.chat.strip import Strip
from ipmerge_core.ui.chat.turns import Turn, opening_turns
from ipmerge_core.ui.latex import DELIMITERS
from ipmerge_core.ui.runs import Updates

INTRODUCTION = (
    "Ask several models the same question: the unmerged model, the chosen merge, other plans and "
    "methods, or finished merges."
)
SEND_HINT = "Type a question, add one or more images"
EMPTY_PROMPT: dict[str, Any] = {"text": "", "files": []}
LONGEST_PASTE = 100_000  # characters; longer texts become a file
CHAT_HEIGHT = 440  # pixels


class Tools(NamedTuple):
    """The buttons between the prompt and the answers."""

    stop: gr.Button
    again: gr.Button
    random: gr.Button
    undo: gr.Button
    clear: gr.Button
    exports: tuple[gr.Button, ...]  # in the order of `export.KINDS`


class VoteFields(NamedTuple):
    """The components of a blind vote."""

    box: gr.Column
    letters: tuple[gr.Button, ...]
    tie: gr.Button
    both_bad: gr.Button
    reason: gr.Textbox
    tally: gr.HTML
    csv: gr.Button

    @property
    def buttons(self) -> list[tuple[gr.Button, str]]:
        """The buttons with the vote that each of them gives."""
        letters = zip(self.letters, LETTERS, strict=True)
        return [*letters, (self.tie, TIE), (self.both_bad, BOTH_BAD)]


class Parts(NamedTuple):
    """The components of the tab that handlers read or write."""

    choice: ColumnChoice
    turns: gr.State
    past: gr.State  # what Undo restores: prompts and turns
    given: gr.State  # the reference answer of a question that was filled in
    accepted: gr.State  # whether a running request has accepted the last retry
    prompt: gr.MultimodalTextbox
    sent: gr.MultimodalTextbox  # the question that was sent; the prompt may hold the next one
    settings: SettingFields
    tools: Tools
    examples: Examples
    cost: gr.HTML  # what the columns need before they answer
    agree: gr.Checkbox  # to a large cost
    take: gr.Button  # chooses the plan of the recorded example on show
    source: gr.HTML
    status: gr.HTML
    tabs: gr.HTML
    vote: VoteFields
    sweep: gr.Button  # asks the last question over lambda
    strip: Strip
    compare: gr.Button  # shows the token probabilities at the first difference
    difference: gr.HTML
    outbox: gr.Textbox  # a text that the page copies or saves

    @property
    def outputs(self) -> list[Any]:
        """What `updates` fills."""
        columns = [
            component for column in self.choice.columns for component in (column.model, *column[2:])
        ]
        vote = [self.vote.box, self.vote.tally, self.vote.csv, *self.vote.letters]
        single = [self.turns, self.take, self.source, self.status, self.tabs, self.difference]
        return [*single, *columns, *vote, self.tools.stop, *self.idle_buttons]

    @property
    def idle_buttons(self) -> list[gr.Button]:
        """The buttons that are disabled while answers arrive."""
        tools = self.tools
        return [tools.again, tools.undo, tools.clear, tools.random, self.sweep, self.compare]

    def updates(self, turns: list[Turn], n_columns: int) -> Updates:
        """Return the updates that show turns; while answers arrive, only the stops are enabled."""
        shown, last = view(turns, n_columns), turns[-1] if turns else None
        running = last is not None and not last.is_over
        return {
            self.turns: turns,
            self.source: shown.source,
            self.status: shown.status,
            self.tabs: shown.tabs,
            self.difference: "",
            self.take: gr.update(visible=last is not None and last.choice is not None),
            self.tools.stop: gr.update(interactive=running),
            **{button: gr.update(interactive=not running) for button in self.idle_buttons},
            **self._column_updates(shown, last),
            **self._vote_updates(turns, last),
        }

    def _column_updates(self, shown: View, last: Turn | None) -> Updates:
        found: Updates = {}
        hidden = last is not None and last.is_hidden
        for position, column in enumerate(self.choice.columns[: len(shown.chats)]):
            side = last.at(position) if last else None
            is_live = side is not None and last is not None and not last.recorded
            found |= {
                column.model: gr.update(visible=not hidden),
                column.chat: gr.update(value=shown.chats[position], show_label=hidden),
                column.verdict: shown.verdicts[position],
                column.stop: gr.update(interactive=side is not None and not side.is_over),
                column.retry: gr.update(interactive=is_live and side is not None and side.is_over),
                column.copy: gr.update(interactive=side is not None and bool(side.text)),
            }
        return found

    def _vote_updates(self, turns: list[Turn], last: Turn | None) -> Updates:
        votes = last is not None and last.is_hidden and last.is_over
        tally = tally_html(turns)
        n_answers = len(last.answers) if last else 0
        return {
            self.vote.box: gr.update(visible=votes),
            self.vote.tally: tally,
            self.vote.csv: gr.update(visible=bool(tally)),
            **{
                button: gr.update(visible=number < n_answers)
                for number, button in enumerate(self.vote.letters)
            },
        }


def lay_out(chosen: gr.State, runs: gr.BrowserState, last: gr.BrowserState) -> Parts:
    """Lay out the tab with the first recorded example of the chosen pair."""
    first = opening_turns(chosen.value.pack_id)
    gr.Markdown(INTRODUCTION, elem_classes="lead")
    examples = Examples(content_of(examples_for(chosen.value.pack_id)))
    prompt = _prompt(first[0] if first else None)
    sent = gr.MultimodalTextbox(
        label="Sent question", file_count="multiple", visible="hidden", elem_id="sent"
    )
    tools = _tools()
    settings = lay_out_settings(chosen.value.pack_id)
    line = gr.HTML("", elem_id="try-chosen", elem_classes="chosen-line")
    cost = gr.HTML("", elem_id="chat-cost")
    agree = gr.Checkbox(False, label="Load these columns", visible=False, elem_id="chat-agree")
    shown = view(first, FEWEST_COLUMNS)
    take, source, status = _answers_line(shown)
    tabs = gr.HTML(shown.tabs, elem_id="column-tabs")
    with gr.Row(elem_id="chats"):
        columns = tuple(_column(chosen, number, shown) for number in range(MOST_COLUMNS))
    with gr.Row(elem_id="column-tools"):
        add = gr.Button("Add a column", size="sm", elem_id="add-column")
        remove = gr.Button("Remove column", size="sm", visible=False, elem_id="remove-column")
        sweep = gr.Button("Same question over λ", size="sm", elem_id="ask-strip")
        compare = gr.Button("Token probabilities", size="sm", elem_id="show-difference")
    vote = _vote()
    difference = gr.HTML("", elem_id="difference")
    strip = Strip()
    kept = gr.Textbox("", visible="hidden", elem_id="kept-plans")
    outbox = gr.Textbox("", visible="hidden", elem_id="chat-outbox")
    choice = ColumnChoice(columns, add, remove, gr.State({}), chosen, line, runs, last, kept)
    states = (gr.State(first), gr.State([]), gr.State(None), gr.State(False))
    return Parts(
        choice, *states, prompt, sent, settings, tools, examples, cost, agree, take, source, status,
        tabs, vote, sweep, strip, compare, difference, outbox,
    )  # fmt: skip


def prompt_value(text: str, images: Sequence[str]) -> dict[str, Any]:
    """Return the value of the prompt for a question and the paths of its images."""
    return {"text": text, "files": list(images)}


def _prompt(first: Turn | None) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        value=prompt_value(first.question, first.images) if first else None,
        placeholder=SEND_HINT,
        label="Question",
        show_label=False,
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        max_plain_text_length=LONGEST_PASTE,
        elem_id="prompt",
    )


def _tools() -> Tools:
    with gr.Row(elem_id="chat-tools"):
        stop = gr.Button("Stop all", size="sm", interactive=False, elem_id="stop")
        again = gr.Button("Ask again", size="sm", elem_id="retry")
        random = gr.Button("Random example", size="sm", elem_id="random-example")
        undo = gr.Button("Undo", size="sm", elem_id="undo-chat")
        clear = gr.Button("Clear", size="sm", elem_id="clear")
        exports = tuple(
            gr.Button(f"Export {label}", size="sm", elem_id=f"export-{kind}")
            for label, kind in (("JSON", "json"), ("HTML", "html"), ("Markdown", "md"))
        )
    return Tools(stop, again, random, undo, clear, exports)


def _answers_line(shown: View) -> tuple[gr.Button, gr.HTML, gr.HTML]:
    with gr.Row(elem_id="answers-line"):
        source = gr.HTML(shown.source, elem_id="answers-source", elem_classes="chips")
        is_recorded = bool(shown.chats[0])
        take = gr.Button("Use this plan", size="sm", visible=is_recorded, elem_id="take-record")
        status = gr.HTML(shown.status, elem_id="answers-status")
    return take, source, status


def _column(chosen: gr.State, number: int, shown: View) -> Column:
    letter = LETTERS[number]
    name, is_shown = letter.lower(), number < FEWEST_COLUMNS
    with gr.Column(min_width=280, visible=is_shown, elem_id=f"column-{name}") as box:
        model = gr.Dropdown(
            **first_choices(chosen.value, number), label=f"Model {letter}", elem_id=f"model-{name}"
        )
        chat = lay_out_chat(
            f"Model {letter}", f"chat-{name}", shown.chats[number] if is_shown else []
        )
        verdict = gr.HTML(
            shown.verdicts[number] if is_shown else "",
            elem_id=f"verdict-{name}",
            elem_classes="chips",
        )
        with gr.Row(elem_classes="answer-tools"):
            stop, retry, copy = (
                gr.Button(
                    label, size="sm", interactive=works, min_width=72, elem_id=f"{kind}-{name}"
                )
                for label, kind, works in (
                    ("Stop", "stop", False),
                    ("Retry", "retry", False),
                    ("Copy raw", "copy", is_shown and bool(shown.chats[number])),
                )
            )
    return Column(box, model, chat, verdict, stop, retry, copy)


def lay_out_chat(label: str, elem_id: str, value: list[Any]) -> gr.Chatbot:
    """Lay out a chat whose messages are HTML made by `safe_text`; it must not render Markdown."""
    return gr.Chatbot(
        value,
        label=label,
        show_label=False,
        elem_id=elem_id,
        height=CHAT_HEIGHT,
        autoscroll=False,  # scrolling.js follows the answers
        render_markdown=False,
        latex_delimiters=DELIMITERS,
        sanitize_html=True,
        allow_tags=False,
        buttons=["copy", "copy_all"],
        feedback_options=None,
        placeholder="The answer appears here.",
    )


def _vote() -> VoteFields:
    with gr.Column(visible=False, elem_id="vote") as box:
        reason = gr.Textbox(
            "", label="Reason", placeholder="Optional: why", max_length=LONGEST_REASON,
            elem_id="vote-reason",
        )  # fmt: skip
        with gr.Row(elem_id="vote-buttons"):
            letters = tuple(
                gr.Button(f"{letter} is better", size="sm", elem_id=f"vote-{letter.lower()}")
                for letter in LETTERS
            )
            tie = gr.Button("Tie", size="sm", elem_id="vote-tie")
            both_bad = gr.Button("Both bad", size="sm", elem_id="vote-bad")
    with gr.Row(elem_id="tally-line"):
        tally = gr.HTML("", elem_id="tally")
        csv = gr.Button("Votes as CSV", size="sm", visible=False, elem_id="export-votes")
    return VoteFields(box, letters, tie, both_bad, reason, tally, csv)
