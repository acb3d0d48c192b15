"""Format the turns of a conversation as messages for the chats of all columns.

In: turns. Out: messages (HTML), verdicts, the status line and the tabs of the columns. Pure
functions: no components and no models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.columns import LETTERS
from ipmerge_core.ui.chat.turns import Turn, Turns, divider
from ipmerge_core.ui.chat.verdicts import difference_marks, judged, status, verdict
from ipmerge_core.ui.safe_text import as_html, show_text

Message = dict[str, Any]
_BADGES = {"waiting": "…", "answering": "…", "finished": "", "stopped": "■", "failed": "!"}


class View(NamedTuple):
    """The contents of the Try it tab; the first two have one entry per column."""

    chats: list[list[Message]]
    verdicts: list[str]
    status: str
    source: str
    tabs: str


def view(turns: Turns, n_columns: int) -> View:
    """Format all turns for a number of columns."""
    last = turns[-1] if turns else None
    places = range(n_columns)
    return View(
        chats=[messages(turns, position) for position in places],
        verdicts=[verdict(last, position) if last else "" for position in places],
        status=status(last) if last else "",
        source=_source(last) if last else "",
        tabs=_tabs(last, n_columns),
    )


def messages(turns: Turns, position: int) -> list[Message]:
    """Format the messages of the chat at a position."""
    found: list[Message] = []
    before: Turn | None = None
    for turn in turns:
        side = turn.at(position)
        if side is None:  # the column did not exist yet
            continue
        if words := divider(before, turn, position):
            found.append({"role": "assistant", "content": [_divider(words)]})
        found.append({"role": "user", "content": _asked(turn)})
        marks = difference_marks(turn) if turn.is_over else {}
        answer = _html(_answer(side, marks.get(turn.column_at(position))))
        found.append({"role": "assistant", "content": [*_caption(turn, side), answer]})
        before = turn
    return found


def _asked(turn: Turn) -> list[Any]:
    images = [path for path in turn.images if Path(path).is_file()]
    named = [
        f"Image {n} of the question" if len(images) > 1 else "Image of the question"
        for n, _ in enumerate(images, 1)
    ]
    shown: list[Any] = [
        {"path": path, "alt_text": name} for path, name in zip(images, named, strict=True)
    ]
    return [*shown, _html(show_text(turn.question))]


def _caption(turn: Turn, side: Side) -> list[dict[str, str]]:
    """Format the line above an answer: the model, the pair, and the date of a recording."""
    if turn.is_hidden or not side.source:
        return []
    words = [side.source, turn.pair, *([f"recorded {turn.recorded}"] if turn.recorded else [])]
    return [_html(_note(" · ".join(words)))]


def _divider(words: str) -> dict[str, str]:
    return _html(f'<p class="divider">{as_html(words)}</p>')


def _html(html: str) -> dict[str, str]:
    """Return a part of a message; Gradio would change tabs and indents of a plain string."""
    return {"type": "text", "text": html}


def _answer(side: Side, mark: int | None = None) -> str:
    folded = _thinking(side)
    text = show_text(side.text, finished=side.is_over, mark=mark) if side.text.strip() else ""
    if side.state == "failed":
        return f"{folded}{text}<p><strong>No answer.</strong> {as_html(side.note)}</p>"
    if side.state == "stopped":
        words = f"(stopped: {side.note})" if side.note else "(stopped)"
        return f"{folded}{text}{_note(words)}"
    if not text:
        waits = "(empty answer)" if side.is_over else f"{side.note or 'waiting'} …"
        return f"{folded}{_note(waits)}"
    return f"{folded}{text}"


def _thinking(side: Side) -> str:
    """Fold away what a model wrote before its answer."""
    if not side.thinking.strip():
        return ""
    state = "Thinking …" if not side.text.strip() and not side.is_over else "Thinking"
    body = show_text(side.thinking, finished=bool(side.text.strip()) or side.is_over)
    length = len(side.thinking.split())
    words = f"{state} · {length} word{'s' if length != 1 else ''}"
    return f'<details class="thinking"><summary>{words}</summary>{body}</details>'


def _note(words: str) -> str:
    """Format a text of the app, as opposed to one of a model."""
    return f'<p class="note">{as_html(words)}</p>'


def _source(turn: Turn) -> str:
    if turn.recorded:
        live = "No model was run; Send asks the models selected below."
        chip = f'<span class="chip recorded">Recorded {as_html(turn.recorded)}</span>'
        return f"{chip} <span>{_named(turn)} {live}</span>"
    words = "Names hidden, answers shuffled." if turn.is_hidden else _named(turn)
    if resized := {side.image_processor for side in turn.answers} - {""}:
        words += f" Image processor: {as_html(', '.join(sorted(resized)))}."
    if any(side.tokens for side in turn.answers):
        words += " All columns share one copy of the weights; no merged model was written."
    return f'<span class="chip live">Live</span> <span>{words}</span>'


def _named(turn: Turn) -> str:
    columns = "".join(
        f"{LETTERS[n]}: {as_html(side.source or side.name)}. "
        for n, side in enumerate(turn.answers)
    )
    return f"{columns}Pair: {as_html(turn.pair)}."


def _tabs(turn: Turn | None, n_columns: int) -> str:
    """Format the tabs that show one column at a time on a narrow page; the page selects one."""
    shown = "".join(_tab(turn, position) for position in range(n_columns))
    return f'<div class="column-tabs" role="tablist" aria-label="Columns">{shown}</div>'


def _tab(turn: Turn | None, position: int) -> str:
    side = turn.at(position) if turn else None
    name = f"{LETTERS[position]} · {turn.name_at(position)}" if turn and side else LETTERS[position]
    badge, state = "", ""
    if turn and side:
        sign, word = judged(turn, side) or (_BADGES[side.state], side.state)
        badge = f'<span class="badge">{sign}</span>' if sign else ""
        state = f' title="{word}"'
    return (
        f'<button type="button" role="tab" data-column="{position}" aria-selected="false"{state}>'
        f"{as_html(name)}{badge}</button>"
    )
