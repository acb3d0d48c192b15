"""Judge replies by rules: right, wrong, or not decidable by rules.

In: an `Item` and a decoded reply. Out: a `Verdict`. A reply in which the rules find no answer is
wrong; a free text that they cannot compare with the reference is unjudged, which is neither right
nor wrong.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

from ipmerge_core.tasks.answers import is_right, normalized, stated_result
from ipmerge_core.tasks.extraction import (
    find_choice,
    find_list,
    find_number,
    find_yes_no,
    split_list,
    statement,
)
from ipmerge_core.tasks.items import Item
from ipmerge_core.tasks.numerals import Quantity, equal, quantities
from ipmerge_core.tasks.reply_text import is_refusal, plain, visible

Outcome: TypeAlias = Literal["right", "wrong", "unjudged"]
NO_ANSWER = "no answer found"
_LONG_REFERENCE = 4  # words; another wording of a longer one may mean the same
_LONG_REPLY = 12  # words; one that is not marked may mention the reference in passing
_ARTICLES = re.compile(r"^(?:(?:it|this|that)(?: is|'s)\s+)?(?:(?:an?|the)\s+)?", re.IGNORECASE)
_UNSURE = re.compile(r"\b(?:not|isn't|or|either|neither|nor)\b", re.IGNORECASE)


class Verdict(NamedTuple):
    """The outcome for one reply, the answer found in it (None if there is none), and the reason."""

    outcome: Outcome
    found: str | None = None
    reason: str = ""


def judge(item: Item, reply: str) -> Verdict:
    """Compare a reply with the references of an item; one that matches is enough.

    >>> judge(Item("1", "6 * 7?", ("42",), "number"), "The answer is 42.")
    Verdict(outcome='right', found='42', reason='')
    """
    if item.kind in ("stated", "whole"):
        found = stated_result(reply) if item.kind == "stated" else normalized(reply)
        return _verdict(found or None, is_right(item, reply))
    verdicts = [_RULES[item.kind](item, reference, reply) for reference in item.answers]
    for outcome in ("right", "unjudged"):
        for verdict in verdicts:
            if verdict.outcome == outcome:
                return verdict
    return verdicts[0]


def _verdict(found: str | None, is_equal: bool) -> Verdict:
    if found is None:
        return Verdict("wrong", None, NO_ANSWER)
    return Verdict("right" if is_equal else "wrong", found)


def _choice(item: Item, reference: str, reply: str) -> Verdict:
    found = find_choice(reply, item.choices)
    return _verdict(found, found == reference.strip().upper())


def _number(item: Item, reference: str, reply: str) -> Verdict:
    wanted = _reference_number(reference)
    found = find_number(reply)
    if wanted is None:
        return _text(item, reference, reply)
    if found is None:
        return Verdict("wrong", None, NO_ANSWER)
    shown = f"{found.value:.10g}{'%' if found.is_percent else ''}"
    return _verdict(shown, equal(found, wanted, item.precision))


def _reference_number(reference: str) -> Quantity | None:
    found = quantities(plain(reference))
    return found[0] if len(found) == 1 else None


def _yes_no(_: Item, reference: str, reply: str) -> Verdict:
    found = find_yes_no(reply)
    if found is None:
        return Verdict("wrong", None, NO_ANSWER)
    return _verdict("yes" if found else "no", found == find_yes_no(reference))


def _list(_: Item, reference: str, reply: str) -> Verdict:
    wanted = split_list(plain(reference)) or [plain(reference).strip("[]() ")]
    found = find_list(reply)
    if found is None:
        return Verdict("wrong", None, NO_ANSWER)
    same = len(found) == len(wanted) and all(map(_same_element, found, wanted))
    return _verdict(", ".join(found), same)


def _same_element(found: str, wanted: str) -> bool:
    numbers = quantities(found), quantities(wanted)
    if all(len(each) == 1 for each in numbers):
        return equal(numbers[0][0], numbers[1][0])
    return found.lower() == wanted.lower()


def _text(_: Item, reference: str, reply: str) -> Verdict:
    text, is_marked = statement(reply)
    wanted, found = _comparable(plain(reference)), _comparable(text)
    if not visible(reply) or not found or (is_refusal(text) and wanted not in found):
        return Verdict("wrong", None, NO_ANSWER)
    if found == wanted:
        return Verdict("right", text)
    words = len(found.split())
    if _mentions(found, wanted):
        if _UNSURE.search(text) or (words > _LONG_REPLY and not is_marked):
            return Verdict("unjudged", text, "the reply mentions the reference among other things")
        return Verdict("right", text)
    if len(wanted.split()) > _LONG_REFERENCE:
        return Verdict(
            "unjudged", text, "free texts differ, and rules cannot compare their meaning"
        )
    return Verdict("wrong", text)


def _comparable(text: str) -> str:
    """Return a text in lower case without articles, quotes and spaces around operators."""
    text = _ARTICLES.sub("", text.strip().strip("\"'“”「」").strip())
    text = re.sub(r"\s*([-+*/^=<>()])\s*", r"\1", text)
    text = text.rstrip(" .。!").strip("\"'“”「」 ")
    return re.sub(r"\s+", " ", text).casefold()


def _mentions(text: str, wanted: str) -> bool:
    """Whether a text contains another as whole words, or at all in scripts without spaces."""
    if not wanted.isascii() and not " ".join(re.findall(r"[^\W\d_]+", wanted)).isascii():
        return wanted in text
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text) is not None


_RULES = {
    "choice": _choice,
    "number": _number,
    "yes_no": _yes_no,
    "list": _list,
    "text": _text,
}
