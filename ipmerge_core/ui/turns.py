"""One question with its two answers, and how a list of them is shown in two chats.

In: plain values in gr.State. Out: messages, chips and sentences for the components of the Try it
tab. Pure: no components here and no models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ipmerge_core.ui.latex import show_math
from ipmerge_core.ui.recorded import Example, Reference, differ, is_right
from ipmerge_core.ui.sides import Side

Message = dict[str, Any]
# Everywhere; at the edge of a word; at the start of a line.
_SIGNS = re.compile(r"[\\`*~$<>&\[\]]|(?<!\w)_|_(?!\w)|^[\W\d]")


@dataclass(frozen=True)
class Turn:
    """A question, its picture, and both answers as far as they have come."""

    question: str
    image: str | None
    pair: str  # what the pair of models is called
    left: Side = field(default_factory=lambda: Side("Base"))
    right: Side = field(default_factory=lambda: Side("Merged"))
    reference: Reference | None = None
    recorded: str = ""  # the date, if nothing was run now

    @property
    def is_over(self) -> bool:
        """Whether both answers are."""
        return self.left.is_over and self.right.is_over


class View(NamedTuple):
    """What the Try it tab shows of its turns."""

    chat_left: list[Message]
    chat_right: list[Message]
    verdict_left: str
    verdict_right: str
    status: str
    source: str


def turn_of_example(example: Example) -> Turn:
    """Show a recorded example as a finished turn."""
    return Turn(
        question=example.reference.question,
        image=str(example.image),
        pair=example.pair,
        left=Side("Base", example.base_model, "finished", example.base),
        right=Side("Merged", example.plan, "finished", example.merged),
        reference=example.reference,
        recorded=example.recorded,
    )


def view(turns: Sequence[Turn]) -> View:
    """Lay out all turns."""
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
        content: list[Any] = [show_math(turn.question)]
        if turn.image and Path(turn.image).is_file():
            content.insert(0, {"path": turn.image, "alt_text": "The picture asked about"})
        messages.append({"role": "user", "content": content})
        side = turn.left if name == "left" else turn.right
        answer = [*([_caption(turn, side)] if side.source else []), _answer(side)]
        messages.append({"role": "assistant", "content": answer})
    return messages


def _caption(turn: Turn, side: Side) -> str:
    """Say above an answer what gave it: the model, the pair, and when, if not just now."""
    words = [side.source, turn.pair, *([f"recorded {turn.recorded}"] if turn.recorded else [])]
    return _as_it_is_written(" · ".join(words))


def _as_it_is_written(text: str) -> str:
    r"""Write what Markdown or LaTeX would read as a sign as the number of its character.

    >>> _as_it_is_written("my_model (plan 1a), *x* $y$")
    'my_model (plan 1a), &#42;x&#42; &#36;y&#36;'
    >>> _as_it_is_written("1. _model_")
    '&#49;. &#95;model&#95;'
    """
    return _SIGNS.sub(lambda sign: f"&#{ord(sign[0])};", " ".join(text.split()))


def _answer(side: Side) -> str:
    text = show_math(side.text, finished=side.is_over)
    if side.state == "failed":
        return f"{text}\n\n**No answer.** {show_math(side.note)}".strip()
    if side.state == "stopped":
        return f"{text} *(stopped)*".strip()
    if not text:
        return "*(an empty answer)*" if side.is_over else f"*{side.note or 'waiting'} …*"
    return text


def _verdict(turn: Turn, side: Side) -> str:
    """A chip with a sign and a word, so that nothing depends on colour; then speed and length."""
    parts = []
    if turn.reference and side.state == "finished":
        right = is_right(turn.reference, side.text)
        sign, word, kind = ("✓", "right", "right") if right else ("✕", "wrong", "wrong")
        parts.append(f'<span class="chip {kind}">{sign} {word}</span>')
        parts.append(f"<span>expected {escape(turn.reference.answer)}</span>")
    if side.seconds:
        parts.append(f"<span>{side.seconds:.1f} s</span>")
    return "".join(parts)


_WORDS = {
    "waiting": "is getting ready",
    "answering": "is answering",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
}


def _status(turn: Turn) -> str:
    if turn.recorded:
        return _compare(turn)
    words = [f"{side.name} {_WORDS[side.state]}." for side in (turn.left, turn.right)]
    return " ".join([*words, _compare(turn)]).strip()


def _compare(turn: Turn) -> str:
    if turn.left.state != "finished" or turn.right.state != "finished":
        return ""
    if not differ(turn.left.text, turn.right.text):
        return "Both give the same answer."
    return "Answers differ."


def _source(turn: Turn) -> str:
    left, right = (escape(side.source or side.name) for side in (turn.left, turn.right))
    asked = f"Left: {left}. Right: {right}. Pair: {escape(turn.pair)}."
    if turn.recorded:
        return (
            f'<span class="chip recorded">Recorded {escape(turn.recorded)}</span> '
            f"<span>{asked} Nothing was run just now; Send asks the models chosen above.</span>"
        )
    return f'<span class="chip live">Live</span> <span>{asked}</span>'
