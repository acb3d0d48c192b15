"""Extract the answer of a reply by rules: a choice, a number, yes or no, a list.

In: a decoded reply, and the choices of the question. Out: the answer, or None if the reply states
none or several. The last statement of a reply counts ("The answer is 5. No, the answer is 6").
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ipmerge_core.tasks.numerals import Quantity, quantities, simplified
from ipmerge_core.tasks.reply_text import boxed, plain, stated, visible

_LETTER = r"\(?\[?(?P<letter>[A-Z])\]?\)?"
_ALONE = re.compile(r"[\"'(\[]*\s*([A-Za-z])\s*[\"')\].:,]*")
_LEADING = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\((?P<a>[A-Za-z])\)|\[(?P<b>[A-Za-z])\]|(?P<c>[A-Z])(?![A-Za-z0-9_']))"
)
_NAMED = re.compile(
    r"(?i:\b(?:so|hence|thus|therefore|option|choice|choose|pick|select|is|it's|be|go with|"
    r"conclude)),?\s+"
    rf"{_LETTER}(?![A-Za-z0-9_'])"
)
_CORRECT = re.compile(
    rf"{_LETTER}\s+(?:is|seems|must be)\s+(?:the\s+)?(?:correct|right|true|best)\b"
)
_WRONG = re.compile(
    r"\b[A-Z]\)?\s+(?:is|are|cannot be)\s+(?:not|wrong|incorrect|false|too)\b|\bnot\s+\(?[A-Z]\b"
)
_HEDGE = re.compile(r"\(?\b([A-Z])\b\)?\s*(?:,|/|&|\bor\b|\band\b)\s*\(?\b([A-Z])\b")
_SINGLE = re.compile(r"(?<![A-Za-z0-9_'])([A-Z])(?![A-Za-z0-9_'])")
_ARTICLE = re.compile(r"(?:A|I)\s+[a-z]")
_REASONS = ("because", "since", "as", "is", "and", "or", "for", "due")
_OPERATOR_BEFORE = re.compile(r"(?:[*×·+^]|/(?=\s*$)|[0-9)]\s*-)\s*$")
_OPERATOR_AFTER = re.compile(r"\s*(?:[*×·+]\s*[\w(√]|-\s*[0-9(])")
_EITHER = re.compile(r"\s*(?:or|oder|ou|或|または)\s*")
_BETWEEN = re.compile(r"\b(?:between|from)\s", re.IGNORECASE)
_YES = ("yes", "true", "yeah", "yep", "correct", "sí", "oui", "ja", "да", "sim")
_NO = ("no", "false", "nope", "incorrect", "non", "nein", "нет", "não")
_CJK_YES_NO = (
    ("不是", False), ("不对", False), ("否", False), ("错", False), ("いいえ", False),
    ("是", True), ("对", True), ("はい", True),
)  # fmt: skip
_BRACKETS = re.compile(r"\[([^\[\]]*)\]|\(([^()]*)\)")
_SEPARATOR = re.compile(r"\s*[,;、]\s*(?:and\s+)?|\s+and\s+")


def statement(reply: str) -> tuple[str, bool]:
    """Return the text that states the answer, and whether it is marked as such."""
    text = visible(reply)
    inner = boxed(text)
    if inner is not None:
        return plain(inner), True
    text = plain(text)
    found = stated(text)
    return (text, False) if found is None else (found, True)


# --- choices ---------------------------------------------------------------------------------


def find_choice(reply: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a reply selects, by its letter or its text.

    >>> find_choice("The answer is (B).", ["red", "blue"]), find_choice("Blue.", ["red", "blue"])
    ('B', 'B')
    >>> find_choice("A or B", ["red", "blue"]) is None
    True
    """
    text, is_marked = statement(reply)
    text = text if is_marked else _without_echo(text, choices)
    letters = [chr(ord("A") + index) for index in range(len(choices) or 26)]
    alone = _ALONE.fullmatch(text)
    if alone:
        letter = alone[1].upper()
        return letter if letter in letters else None
    index = _same_text(text, choices)
    if index is not None:
        return letters[index]
    if any(set(found.groups()) <= set(letters) for found in _HEDGE.finditer(text)):
        return None
    text_without_wrong = _WRONG.sub(" ", text)
    letter = _by_letter(text_without_wrong, letters)
    if letter:
        return letter
    index = _by_text(text, choices)
    return None if index is None else letters[index]


def _without_echo(text: str, choices: Sequence[str]) -> str:
    """Remove lines that repeat a choice with its letter, if several do."""
    echoes = {_key(f"{chr(ord('A') + index)} {choice}") for index, choice in enumerate(choices)}
    lines = text.split("\n")
    kept = [line for line in lines if _key(line) not in echoes]
    return "\n".join(kept).strip() if len(lines) - len(kept) > 1 else text


def _key(text: str) -> str:
    """Return the word characters only, for comparing texts."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _same_text(text: str, choices: Sequence[str]) -> int | None:
    """Return the choice whose text is the whole text, with or without its letter."""
    wanted = _key(re.sub(r"^(?:the|a|an)\s+", "", text.strip(), flags=re.IGNORECASE))
    for index, choice in enumerate(choices):
        letter = chr(ord("a") + index)
        if wanted and wanted in (_key(plain(choice)), _key(f"{letter} {plain(choice)}")):
            return index
    return None


def _by_letter(text: str, letters: Sequence[str]) -> str | None:
    """Return the letter that a text names: at its start, by a phrase, or as its only one."""
    lead = _LEADING.match(text)
    if lead and not _is_article(text, lead):
        letter = (lead["a"] or lead["b"] or lead["c"]).upper()
        return letter if letter in letters else None
    for pattern in (_CORRECT, _NAMED):
        named: list[str] = [
            found["letter"]
            for found in pattern.finditer(text)
            if not _ARTICLE.match(text, found.start("letter"))
        ]
        if named and named[-1] in letters:
            return named[-1]
    bracketed: set[str] = {found.upper() for found in re.findall(r"\(([A-Za-z])\)", text)} & set(
        letters
    )
    if len(bracketed) == 1:
        return bracketed.pop()
    single: set[str] = {
        found[1]
        for found in _SINGLE.finditer(text)
        if found[1] in letters and not _ARTICLE.match(text, found.start())
    }
    return single.pop() if len(single) == 1 else None


def _is_article(text: str, lead: re.Match[str]) -> bool:
    """Whether a leading letter is a word: "A car", "I see"."""
    if lead["c"] is None or not _ARTICLE.match(text, lead.start("c")):
        return False
    following = text[lead.end("c") :].split(None, 1)
    return not following or following[0].strip(",.") not in _REASONS


def _by_text(text: str, choices: Sequence[str]) -> int | None:
    """Return the choice whose text, or whose number, a text mentions last."""
    words = f" {_key(text)} "
    places: list[tuple[int, int, int]] = []  # where it ends, its length, index
    for index, choice in enumerate(choices):
        wanted = _key(plain(choice))
        place = words.rfind(f" {wanted} ") if wanted else -1
        negated = place >= 0 and re.search(r" (?:not|no)(?: an?| the)?$", words[:place])
        if place >= 0 and not negated:
            places.append((place + len(wanted), len(wanted), index))
    spans = [(stop - length, stop) for stop, length, _ in places]
    whole = [
        each
        for each, (start, stop) in zip(places, spans, strict=True)
        if not any(a <= start and stop <= b and (a, b) != (start, stop) for a, b in spans)
    ]
    if whole:
        is_hedged = len(whole) > 1 and re.search(r"\b(?:or|either)\b", words)
        return None if is_hedged else max(whole)[2]
    return _by_number(text, choices)


def _by_number(text: str, choices: Sequence[str]) -> int | None:
    """Return the only choice with the number that a text states."""
    found = _number_in(text, is_marked=False)
    if found is None:
        return None
    values = [quantities(plain(choice)) for choice in choices]
    same = [
        index
        for index, each in enumerate(values)
        if len(each) == 1 and abs(each[0].value - found.value) <= 1e-6 * abs(found.value)
    ]
    return same[0] if len(same) == 1 else None


# --- numbers ---------------------------------------------------------------------------------


def find_number(reply: str) -> Quantity | None:
    r"""Return the number that a reply states: the marked one, after the last "=", or the last one.

    An expression that is not evaluated states none.

    >>> find_number("6*7=42.").value, find_number(r"\boxed{\frac{1}{2}}").value, find_number("6*7")
    (42.0, 0.5, None)
    """
    text, is_marked = statement(reply)
    return _number_in(text, is_marked=is_marked)


def _number_in(text: str, *, is_marked: bool) -> Quantity | None:
    text = simplified(text)
    before, equals, after = text.rpartition("=")
    if equals:
        text = after
    found = quantities(text)
    if not found:
        return None
    chosen = found[0] if is_marked and not equals else found[-1]
    if equals and len(found) > 1:
        chosen = found[0] if before and "\n" not in after else chosen
    return None if _is_unclear(text, chosen, found) else chosen


def _is_unclear(text: str, chosen: Quantity, found: Sequence[Quantity]) -> bool:
    """Whether a number is part of an expression or of a range, or one of alternatives."""
    before, after = text[: chosen.start], text[chosen.stop :]
    if _OPERATOR_BEFORE.search(before[-20:]) or _OPERATOR_AFTER.match(after):
        return True
    if _BETWEEN.search(text) and len(found) == 2:
        return True
    gaps = [text[a.stop : b.start] for a, b in itertools.pairwise(found)]
    return any(_EITHER.fullmatch(gap) for gap in gaps)


# --- yes or no, and lists --------------------------------------------------------------------


def find_yes_no(reply: str) -> bool | None:
    """Return whether a reply affirms; None if it states neither or both.

    >>> find_yes_no("Yes, they are."), find_yes_no("no"), find_yes_no("Yes and no")
    (True, False, None)
    """
    text, _ = statement(reply)
    for start, value in _CJK_YES_NO:
        if text.startswith(start):
            return value
    words = re.findall(r"\w+", text.lower())
    if len(words) > 2 and words[1] in ("and", "or") and {words[0], words[2]} & set(_NO):
        return None
    if words and words[0] in _YES + _NO:
        return words[0] in _YES
    found = {word in _YES for word in words if word in _YES + _NO}
    return found.pop() if len(found) == 1 else None


def find_list(reply: str) -> list[str] | None:
    """Return the elements of the list that a reply states; None for fewer than two.

    >>> find_list("The answer is [1, 2, 3]."), find_list("red and blue")
    (['1', '2', '3'], ['red', 'blue'])
    """
    text, is_marked = statement(reply)
    brackets = [a or b for a, b in _BRACKETS.findall(text)]
    inside = brackets[-1] if brackets else text if is_marked or "\n" not in text else ""
    return split_list(inside)


def split_list(text: str) -> list[str] | None:
    """Return the elements of a list without brackets; None for fewer than two."""
    parts = [part.strip(" \"'[]().") for part in _SEPARATOR.split(text.strip())]
    return parts if len(parts) > 1 and all(parts) else None
