"""Find the part of a reply that states its answer.

In: a decoded reply of any model. Out: the reply without thinking parts and markup, and the text
that it marks as its answer: in a box, after "the answer is", or the like in other languages. All
searches take linear time. Interprets neither choices nor numbers.
"""

from __future__ import annotations

import re
import unicodedata

_THINKING = (  # opening and closing markers of thinking parts
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
)
_ANSWER_TAGS = (("<answer>", "</answer>"), ("<|begin_of_solution|>", "<|end_of_solution|>"))
_FRACTIONS = "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POWER = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|mbox) ?\{|[{}]")
_SPACING = re.compile(
    r"\\[,;:! ]|\\(?:left|right|quad|qquad|displaystyle)(?![a-zA-Z])|\\[()\[\]]|\$"
)
_MARKUP = re.compile(r"\*\*|__|`|^ ?#+ ?", re.MULTILINE)
_MARKER = re.compile(
    r"""(?:
        (?:final|correct|right|best)\s+(?:answer|option|choice)\s*(?:is\b|are\b|[:=]|\n)
      | \b(?:answer|option|choice|solution)\s*(?:is\b|are\b|would\ be\b|[:=]|\n)
      | (?:正确)?答案(?:应该)?(?:应)?[是为:]?\s*:?
      | 故?选择?\s*:?
      | (?:正解|答え)(?:は|:)
      | \bantwort\s*(?:ist\b|lautet\b|:)
      | \brespuesta(?:\s+correcta)?\s*(?:es\b(?:\s+la\b|\s+el\b)?|:)
      | \bréponse(?:\s+correcte)?\s*(?:est\b(?:\s+la\b|\s+le\b)?|:)
      | \bresposta(?:\s+correta)?\s*(?:é\b|:)
      | \bответ\s*(?::|-)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？](?=\s|$)|[。！？]|\n")
_REFUSAL = re.compile(
    r"\b(?:i (?:do not|don't|cannot|can't|could not|couldn't|am unable|am not able|am not sure)"
    r"|cannot (?:be )?(?:determined?|see)|unable to|not (?:sure|enough information)|maybe)\b",
    re.IGNORECASE,
)


def visible(reply: str) -> str:
    r"""Return what a reply states: without thinking parts, and only the content of answer tags.

    A thinking part that does not end is removed to the end of the reply.

    >>> visible("<think>5? 6?</think>7"), visible("It is 5</think>7"), visible("<think>5")
    ('7', '7', '')
    """
    for start, end in _THINKING:
        _, found, after = reply.rpartition(end)
        reply = after if found else reply
        reply, _, _ = reply.partition(start)
    for start, end in _ANSWER_TAGS:
        _, found, after = reply.rpartition(start)
        if found:
            reply = after.partition(end)[0]
    return reply.strip()


def plain(text: str) -> str:
    r"""Return text in compatible characters, without Markdown emphasis and LaTeX wrappers.

    Digits of all scripts become those of ASCII, exponents are written with `^`.

    >>> plain(r"**$42\text{ cm}²$**"), plain("٤٢")
    ('42 cm^2', '42')
    """
    text = re.sub(r"[^\S\n]+", " ", text)  # so that later patterns meet no long runs
    text = re.sub(r"(?:\n ?){2,}", "\n\n", text)
    text = _POWER.sub(lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
    for sign in _FRACTIONS:
        if sign in text:
            text = text.replace(sign, " " + unicodedata.normalize("NFKC", sign))
    text = unicodedata.normalize("NFKC", text).replace("\N{FRACTION SLASH}", "/")
    text = text.replace("−", "-").replace("–", "-")
    text = "".join(
        str(unicodedata.decimal(char)) if not char.isascii() and char.isdecimal() else char
        for char in text
    )
    text = _MARKUP.sub("", text)
    text = _unwrapped(_SPACING.sub(" ", text))
    return text.replace(r"\%", "%").replace(r"^\circ", "°").replace(r"^{\circ}", "°").strip()


def _unwrapped(text: str) -> str:
    r"""Replace commands such as `\text{...}` by their content, in one pass."""
    kept: list[str] = []
    groups: list[bool] = []  # for every open brace, whether it is one of these commands
    start = 0
    for found in _WRAPPERS.finditer(text):
        part = found[0]
        is_command = part not in "{}"
        if part == "}":
            is_command = groups.pop() if groups else False
        else:
            groups.append(is_command)
        if is_command:
            kept.append(text[start : found.start()])
            start = found.end()
    return "".join([*kept, text[start:]])


def _closing(text: str, start: int) -> int:
    """Return the place of the brace that closes a group that starts at `start`, or the end."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    return len(text)


def boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`; None without one.

    >>> boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    place = text.rfind("\\boxed")
    if place < 0:
        return None
    rest = text[place + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        return rest.split(None, 1)[0] if rest else None
    return rest[1 : _closing(rest, 1)].strip()


def stated(text: str) -> str | None:
    """Return the sentence after the last phrase that marks an answer; None without one.

    >>> stated("It looks red. The answer is B. Done."), stated("red")
    ('B', None)
    """
    last = max((found.end() for found in _MARKER.finditer(text)), default=None)
    if last is None:
        return None
    rest = text[last:].lstrip(" \t\n:=")
    end = _SENTENCE_END.search(rest)
    return (rest[: end.start()] if end else rest).strip()


def is_refusal(text: str) -> bool:
    """Whether a reply declines to answer.

    >>> is_refusal("I don't know."), is_refusal("B")
    (True, False)
    """
    return _REFUSAL.search(text) is not None
