"""Export a conversation as JSON, Markdown, or one HTML file that needs no server.

In: turns. Out: text. Exports name models and plans, and hold no path of this machine; names that
blind mode hides stay hidden. Images are part of the JSON and of the HTML file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from ipmerge_core.errors import RunError
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.columns import LETTERS
from ipmerge_core.ui.chat.turns import Turn, Turns
from ipmerge_core.ui.chat.verdicts import compare, difference_marks, facts, verdict
from ipmerge_core.ui.safe_text import as_html, as_markdown, clean_text, show_text
from ipmerge_core.version import __version__

Kind = Literal["json", "html", "md"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT, VERSION = "ipmerge-chat", 1
MOST_IMAGE_BYTES = 40_000_000  # of all images of an export
STYLE = Path(__file__).with_name("export.css")
_MEDIA = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


def export(turns: Turns, kind: Kind) -> tuple[str, str]:
    """Return the file name and the text of an export.

    Raises: RunError for an empty conversation, or images that are too large together.
    """
    if not turns:
        raise RunError("The conversation is empty. Ask a question or select an example first.")
    now = datetime.now(UTC)
    write = {"json": as_json, "html": as_page, "md": as_text}[kind]
    return f"ipmerge-chat-{now:%Y-%m-%d-%H%M}.{kind}", write(turns, f"{now:%Y-%m-%d %H:%M} UTC")


def as_json(turns: Turns, saved: str) -> str:
    """Return the conversation as JSON with every answer as it was written."""
    images = _images(turns)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "ipmerge": __version__,
        "saved": saved,
        "turns": [_turn_json(turn, images) for turn in turns],
    }
    return json.dumps(content, ensure_ascii=False, indent=1)


def _turn_json(turn: Turn, images: dict[str, str]) -> dict[str, Any]:
    return {
        "asked": turn.asked,
        "recorded": turn.recorded,
        "pair": turn.pair,
        "system_prompt": turn.system,
        "question": turn.question,
        "images": [
            {"name": Path(path).name, "data": images[path]}
            for path in turn.images
            if path in images
        ],
        "settings": asdict(turn.settings) if turn.settings else None,
        "reference": turn.reference._asdict() if turn.reference else None,
        "blind_seed": turn.blind_seed,
        "vote": turn.vote._asdict() if turn.vote else None,
        "answers": [_answer_json(turn, position) for position in range(len(turn.answers))],
    }


def _answer_json(turn: Turn, position: int) -> dict[str, Any]:
    side = turn.at(position)
    assert side is not None, "positions are those of the answers"
    shown = {"model": side.source, "plan": side.plan}
    hidden = dict.fromkeys(shown, "hidden until the vote")
    measured = {name: getattr(side, name) for name in ("tokens", "cut_off", "image_processor")}
    return {
        "position": LETTERS[position],
        "name": turn.name_at(position),
        **(hidden if turn.is_hidden else shown),
        "state": side.state,
        "thinking": side.thinking,
        "text": side.text,
        "note": side.note,
        "seconds": round(side.seconds, 3),
        **measured,
    }


def as_text(turns: Turns, saved: str) -> str:
    """Return the conversation as Markdown; answers are quoted unchanged in fences."""
    lines = ["# IPMerge conversation", "", f"Saved {saved} with IPMerge {__version__}.", ""]
    for number, turn in enumerate(turns, 1):
        lines += [f"## {number}. {as_markdown(turn.pair)}", ""]
        lines += [f"Recorded {as_markdown(turn.recorded)}.", ""] if turn.recorded else []
        lines += ["**System prompt**", "", *_fenced(turn.system), ""] if turn.system else []
        lines += ["**Question**", "", *_fenced(turn.question), ""]
        names = ", ".join(as_markdown(Path(path).name) for path in turn.images)
        lines += [f"Images: {names}", ""] if names else []
        if turn.reference:
            lines += [f"Reference answer: {as_markdown(turn.reference.answer)}", ""]
        for position in range(len(turn.answers)):
            lines += _answer_lines(turn, position)
        lines += [f"Vote: {as_markdown(turn.vote.choice)}", ""] if turn.vote else []
    return "\n".join(lines)


def _answer_lines(turn: Turn, position: int) -> list[str]:
    side = turn.at(position)
    assert side is not None, "positions are those of the answers"
    head = f"### {turn.name_at(position)}"
    words = [] if turn.is_hidden else [as_markdown(side.source)]
    words += [side.state, *facts(side)]
    thinking = ["**Thinking**", "", *_fenced(side.thinking), ""] if side.thinking else []
    reason = [as_markdown(side.note), ""] if side.state == "failed" else []
    return [
        head,
        "",
        ", ".join(filter(None, words)),
        "",
        *thinking,
        *_fenced(side.text),
        "",
        *reason,
    ]


def _fenced(text: str) -> list[str]:
    """Quote a text in a fence that is longer than any of its own."""
    longest = max((len(run) for run in _backticks(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", clean_text(text), fence]


def _backticks(text: str) -> Sequence[str]:
    return "".join(sign if sign == "`" else " " for sign in text).split()


def as_page(turns: Turns, saved: str) -> str:
    """Return the conversation as one HTML file that loads nothing."""
    images = _images(turns)
    body = "".join(_turn_html(number, turn, images) for number, turn in enumerate(turns, 1))
    style = STYLE.read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>IPMerge conversation</title><style>{style}</style></head><body>"
        f"<h1>IPMerge conversation</h1><p>Saved {saved} with IPMerge {as_html(__version__)}.</p>"
        f"{body}</body></html>\n"
    )


def _turn_html(number: int, turn: Turn, images: dict[str, str]) -> str:
    pictures = "".join(
        f'<img src="{images[path]}" alt="Image {n} of question {number}">'
        for n, path in enumerate(turn.images, 1)
        if path in images
    )
    system = f"<p>System prompt</p>{show_text(turn.system)}" if turn.system else ""
    recorded = f" · recorded {as_html(turn.recorded)}" if turn.recorded else ""
    vote = f"<p>Vote: {as_html(turn.vote.choice)}</p>" if turn.vote else ""
    marks = difference_marks(turn)
    answers = "".join(
        _answer_html(turn, position, marks.get(turn.column_at(position)))
        for position in range(len(turn.answers))
    )
    return (
        f"<section><h2>{number}. {as_html(turn.pair)}{recorded}</h2>{system}{pictures}"
        f'<div class="question">{show_text(turn.question)}</div>'
        f'<div class="answers">{answers}</div><p class="status">{as_html(compare(turn))}</p>{vote}'
        "</section>"
    )


def _answer_html(turn: Turn, position: int, mark: int | None) -> str:
    side = turn.at(position)
    assert side is not None, "positions are those of the answers"
    return (
        f"<article><h3>{as_html(turn.name_at(position))}</h3>"
        f'<p class="note">{as_html("" if turn.is_hidden else side.source)}</p>'
        f'{_text_html(side, mark)}<p class="chips">{verdict(turn, position)}</p></article>'
    )


def _text_html(side: Side, mark: int | None) -> str:
    thinking = ""
    if side.thinking:
        thinking = f"<details><summary>Thinking</summary>{show_text(side.thinking)}</details>"
    failed = f"<p><strong>No answer.</strong> {as_html(side.note)}</p>" if side.note else ""
    return f"{thinking}{show_text(side.text, mark=mark)}{failed}"


def _images(turns: Turns) -> dict[str, str]:
    """Read the images of a conversation as data addresses, by path; missing ones are left out.

    Raises: RunError if they are too large together.
    """
    paths = dict.fromkeys(Path(path) for turn in turns for path in turn.images)
    found = [path for path in paths if path.is_file()]
    size = sum(path.stat().st_size for path in found)
    if size > MOST_IMAGE_BYTES:
        raise RunError(
            f"The images of this conversation have {size / 1e6:.0f} MB; an export can hold "
            f"{MOST_IMAGE_BYTES / 1e6:.0f} MB. Export it as Markdown, which only names them."
        )
    return {str(path): _data_address(path.read_bytes()) for path in found}


def _data_address(content: bytes) -> str:
    kind = next((kind for start, kind in _MEDIA.items() if content.startswith(start)), "image/png")
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
