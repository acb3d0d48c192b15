"""Judge and measure answers: correct or not, how long, how fast, and where two of them differ.

In: a turn. Out: small pieces of HTML and sentences for the line below each answer and the status
line. Pure functions: no components and no models.
"""

from __future__ import annotations

import itertools

from ipmerge_core.tasks.answers import differ, is_right, stated_result
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.turns import Turn
from ipmerge_core.ui.safe_text import as_html

LONGEST_SHOWN = 40  # characters of an extracted answer
_STATE_LABELS = {
    "waiting": "is loading",
    "answering": "is answering",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
}


def verdict(turn: Turn, position: int) -> str:
    """Format whether an answer is correct, with a sign and a word, and its length and speed."""
    side = turn.at(position)
    if side is None:
        return ""
    return "".join([*_judgement(turn, side), *(f"<span>{words}</span>" for words in facts(side))])


def judged(turn: Turn, side: Side) -> tuple[str, str] | None:
    """Return the sign and the word for a finished answer; None if its correct one is unknown."""
    if side.state != "finished" or turn.reference is None:
        return None
    return ("✓", "correct") if is_right(turn.reference, side.text) else ("✕", "wrong")


def _judgement(turn: Turn, side: Side) -> list[str]:
    if side.state != "finished":
        return []
    reference = turn.reference
    extracted = stated_result(side.text) if reference is None or reference.is_math else None
    words = [f"<span>answer {as_html(extracted[:LONGEST_SHOWN])}</span>"] if extracted else []
    found = judged(turn, side)
    if reference is None or found is None:
        return words
    kind = "right" if found[1] == "correct" else "wrong"
    expected = f"<span>expected {as_html(reference.answer)}</span>"
    return [f'<span class="chip {kind}">{" ".join(found)}</span>', *words, expected]


def facts(side: Side) -> list[str]:
    """Return the length, the speed and the duration of an answer, as far as they are known.

    >>> facts(Side("Base", tokens=30, seconds=2.0, speed=15.0, cut_off=True))
    ['30 tokens', '15 tokens/s', '2.0 s', 'cut off at the limit']
    """
    found = [f"{side.tokens} token{'s' if side.tokens != 1 else ''}"] if side.tokens else []
    if side.speed:
        found.append(f"{side.speed:.3g} tokens/s")
    if side.seconds:
        found.append(f"{side.seconds:.1f} s")
    return [*found, *(["cut off at the limit"] if side.cut_off else [])]


def status(turn: Turn) -> str:
    """Return one sentence per answer, and whether the answers differ."""
    if turn.recorded:
        return compare(turn)
    shown = [(turn.name_at(n), turn.at(n)) for n in range(len(turn.answers))]
    words = [f"{name} {_STATE_LABELS[side.state]}." for name, side in shown if side]
    hidden = ["Vote to see the names."] if turn.is_hidden and turn.is_over else []
    return " ".join([*words, compare(turn), *hidden]).strip()


def compare(turn: Turn) -> str:
    """Return whether the finished answers differ, with their results; empty before that."""
    sides = [turn.at(n) for n in range(len(turn.answers))]
    texts = [side.text for side in sides if side and side.state == "finished"]
    if len(texts) < len(sides) or len(texts) < 2:
        return ""
    if not any(differ(first, second) for first, second in itertools.pairwise(texts)):
        return "Both answers are the same." if len(texts) == 2 else "All answers are the same."
    results = [stated_result(text) for text in texts]
    if turn.reference is None and all(results):
        return f"The answers differ: {', '.join(str(each)[:LONGEST_SHOWN] for each in results)}."
    return "The answers differ."


def difference_marks(turn: Turn) -> dict[int, int]:
    """Return by column where its text first differs from that of the first column.

    Only of complete answers; the first column is compared with the first one that differs.
    """
    texts = [side.text if side.state == "finished" else None for side in turn.answers]
    first = texts[0] if texts else None
    marks: dict[int, int] = {}
    for column, text in enumerate(texts[1:], 1):
        found = first_difference(first, text) if first is not None and text is not None else None
        if found is not None:
            marks.setdefault(0, found)
            marks[column] = found
    return marks


def first_difference(first: str, second: str) -> int | None:
    """Return where two texts first differ, at the start of a word or number; None if equal.

    >>> first_difference("it is 12", "it is 15"), first_difference("8*5.", "8*5=40.")
    (6, 3)
    """
    if first == second:
        return None
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    at = next((n for n, (one, other) in enumerate(pairs) if one != other), shorter)
    is_inside = any(text[at : at + 1].isalnum() for text in (first, second))
    while is_inside and at > 0 and first[at - 1].isalnum():
        at -= 1
    return at
