"""Format questions and their two answers as messages for the two chats.

In: plain values in gr.State. Out: messages (HTML), labels and sentences for the components of the
Try it tab. Pure functions: no components and no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ipmerge_core.tasks.answers import differ, is_right
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.recorded import Example, Reference
from ipmerge_core.ui.plan_choice import PlanChoice
from ipmerge_core.ui.safe_text import as_html, show_text

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A question, its image, and both answers so far."""

    question: str
    image: str | None
    pair: str  # name of the pair of models
    left: Side = field(default_factory=lambda: Side("Base"))
    right: Side = field(default_factory=lambda: Side("Merged"))
    reference: Reference | None = None
    recorded: str = ""  # the date of a recorded example
    choice: PlanChoice | None = None  # the plan of a recorded example
    pack_id: str = ""

    @property
    def is_over(self) -> bool:
        """Whether both answers are over."""
        return self.left.is_over and self.right.is_over


class View(NamedTuple):
    """The contents of the Try it tab."""

    chat_left: list[Message]
    chat_right: list[Message]
    verdict_left: str
    verdict_right: str
    status: str
    source: str


def turn_of_example(example: Example) -> Turn:
    """Return a recorded example as a finished turn."""
    return Turn(
        question=example.reference.question,
        image=str(example.image),
        pair=example.pair,
        pack_id=example.pack_id,
        left=Side("Base", example.base_model, "finished", example.base),
        right=Side("Merged", example.plan, "finished", example.merged),
        reference=example.reference,
        recorded=example.recorded,
        choice=example.choice,
    )


def without_records(turns: Sequence[Turn], pack_id: str) -> list[Turn]:
    """Return the turns without recorded examples of another pair than this one."""
    return [turn for turn in turns if not turn.recorded or turn.pack_id == pack_id]


def view(turns: Sequence[Turn]) -> View:
    """Format all turns."""
    if not turns:
        return View([], [], "", "", "", "")
    last = turns[-1]
    return View(
        chat_left=_messages(turns, "left"),
        chat_right=_messages(turns, "right"),
        verdict_left=_verdict(last, last.left),
        verdict_right=_verdict(last, last.right),
        status=_status(last),
        source=_source(last),
    )


def _messages(turns: Sequence[Turn], name: Literal["left", "right"]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        content: list[Any] = [_html(show_text(turn.question))]
        if turn.image and Path(turn.image).is_file():
            content.insert(0, {"path": turn.image, "alt_text": "Image of the question"})
        messages.append({"role": "user", "content": content})
        side = turn.left if name == "left" else turn.right
        answer = [*([_caption(turn, side)] if side.source else []), _html(_answer(side))]
        messages.append({"role": "assistant", "content": answer})
    return messages


def _caption(turn: Turn, side: Side) -> dict[str, str]:
    """Format the line above an answer: the model, the pair, and the date of a recording."""
    words = [side.source, turn.pair, *([f"recorded {turn.recorded}"] if turn.recorded else [])]
    return _html(_note(" · ".join(words)))


def _html(html: str) -> dict[str, str]:
    """Return a part of a message; Gradio would change tabs and indents of a plain string."""
    return {"type": "text", "text": html}


def _answer(side: Side) -> str:
    text = show_text(side.text, finished=side.is_over) if side.text.strip() else ""
    if side.state == "failed":
        return f"{text}<p><strong>No answer.</strong> {as_html(side.note)}</p>"
    if side.state == "stopped":
        return f"{text}{_note('(stopped)')}"
    if not text:
        return _note("(empty answer)" if side.is_over else f"{side.note or 'waiting'} …")
    return text


def _note(words: str) -> str:
    """Format a text of the app, as opposed to one of a model."""
    return f'<p class="note">{as_html(words)}</p>'


def _verdict(turn: Turn, side: Side) -> str:
    """Format whether an answer is correct, with a sign and a word, and how long it took."""
    parts = []
    if turn.reference and side.state == "finished":
        right = is_right(turn.reference, side.text)
        sign, word, kind = ("✓", "correct", "right") if right else ("✕", "wrong", "wrong")
        parts.append(f'<span class="chip {kind}">{sign} {word}</span>')
        parts.append(f"<span>expected {as_html(turn.reference.answer)}</span>")
    if side.seconds:
        parts.append(f"<span>{side.seconds:.1f} s</span>")
    return "".join(parts)


_STATE_LABELS = {
    "waiting": "is loading",
    "answering": "is answering",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
}


def _status(turn: Turn) -> str:
    if turn.recorded:
        return _compare(turn)
    words = [f"{side.name} {_STATE_LABELS[side.state]}." for side in (turn.left, turn.right)]
    return " ".join([*words, _compare(turn)]).strip()


def _compare(turn: Turn) -> str:
    if turn.left.state != "finished" or turn.right.state != "finished":
        return ""
    if not differ(turn.left.text, turn.right.text):
        return "Both answers are the same."
    return "The answers differ."


def _source(turn: Turn) -> str:
    left, right = (as_html(side.source or side.name) for side in (turn.left, turn.right))
    asked = f"Left: {left}. Right: {right}. Pair: {as_html(turn.pair)}."
    if turn.recorded:
        return (
            f'<span class="chip recorded">Recorded {as_html(turn.recorded)}</span> '
            f"<span>{asked} No model was run; Send asks the models selected above.</span>"
        )
    resized = {side.image_processor for side in (turn.left, turn.right)} - {""}
    if resized:
        asked += f" Image processor: {as_html(', '.join(sorted(resized)))}."
    return f'<span class="chip live">Live</span> <span>{asked}</span>'
