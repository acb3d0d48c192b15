"""What a model writes, made fit for the chat: formulas render, money and code stay as they are.

In: a model's answer, finished or still growing. Out: Markdown in which every formula stands between
delimiters that the chat is set to. The raw text is kept elsewhere; this is for the eye only.
"""

from __future__ import annotations

import re

ENVIRONMENTS = ("align", "align*", "equation", "equation*", "cases", "aligned", "gather")


def _delimiter(left: str, right: str, *, display: bool) -> dict[str, str | bool]:
    return {"left": left, "right": right, "display": display}


DELIMITERS = [
    _delimiter("$$", "$$", display=True),
    _delimiter(r"\[", r"\]", display=True),
    _delimiter(r"\(", r"\)", display=False),
    *(_delimiter(rf"\begin{{{e}}}", rf"\end{{{e}}}", display=True) for e in ENVIRONMENTS),
]

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\\begin\{([a-z]+\*?)\}.+?\\end\{\1\}", re.DOTALL
)
_OPENING = re.compile(r"\$\$|\\\[|\\\(|\\begin\{|\\boxed\{|\\[A-Za-z]*\Z")
# A dollar pair is a formula only if it hugs its content and no digit follows: "$5 and $6" is money.
_DOLLARS = re.compile(r"(?<![\\$\w])\$(?![\s$])([^$\n]*?)(?<![\s\\])\$(?![\d$])")
_HALF_DOLLARS = re.compile(r"(?<![\\$\w])\$[A-Za-z\\({][^$\n]{0,80}\Z")
_ALONE = re.compile(r"\\([()\[\]])")
_STAR = re.compile(r"(?<=[\w)])\*(?=[\w(])")


def show_math(text: str, *, finished: bool = True) -> str:
    r"""Prepare an answer for display.

    Single dollars around a formula and a bare `\boxed{}` get delimiters; stars between factors stay
    stars. Of an unfinished answer, a formula that is not closed yet is held back.

    >>> show_math(r"It costs $5, so $x$ is 3*4*5 = \boxed{60}.")
    'It costs $5, so \\(x\\) is 3\\*4\\*5 = \\(\\boxed{60}\\).'
    >>> show_math(r"So \(a = \frac{1}", finished=False)
    'So '
    """
    pieces, position = [], 0
    for code in _CODE.finditer(text):
        pieces += [_outside_code(text[position : code.start()], finished=True), code.group()]
        position = code.end()
    return "".join([*pieces, _outside_code(text[position:], finished=finished)])


def _outside_code(text: str, *, finished: bool) -> str:
    text = _DOLLARS.sub(lambda found: rf"\({found[1]}\)", text)
    pieces, position = [], 0
    for formula in _FORMULA.finditer(text):
        pieces += [_prose(text[position : formula.start()]), formula.group()]
        position = formula.end()
    rest = text[position:]
    return "".join([*pieces, _prose(rest if finished else _held_back(rest))])


def _held_back(text: str) -> str:
    """Cut a formula that has begun and not ended."""
    for opening in _OPENING.finditer(text):
        boxed = opening.group() == r"\boxed{"
        if not boxed or _closing_brace(text, opening.end()) < 0:
            return text[: opening.start()]
    return _HALF_DOLLARS.sub("", text)


def _prose(text: str) -> str:
    """Wrap bare boxes, keep stars, and do not load pictures that a model names."""
    pieces, position = [], 0
    for box in re.finditer(r"\\boxed\{", text):
        end = _closing_brace(text, box.end())
        if box.start() < position or end < 0:
            continue
        pieces += [_plain(text[position : box.start()]), rf"\({text[box.start() : end]}\)"]
        position = end
    return "".join([*pieces, _plain(text[position:])])


def _plain(text: str) -> str:
    text = _STAR.sub(r"\\*", text.replace("<", "&lt;").replace("![", "! ["))
    return _ALONE.sub(r"&#92;\1", text)  # Markdown would eat the backslash


def _closing_brace(text: str, start: int) -> int:
    """Return the position after the brace that closes the one before `start`, or -1."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return -1
