r"""Find the formulas and code spans of a text, and define the delimiters that the chat renders.

In: text of a model or a user. Out: `Atom`s, the parts of the text that are rendered as a formula or
as code; everything else is prose. One pass over the text with bounded work per candidate, so the
time is linear in the length. A text is a formula only if it is unambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# The chat renders these two; every other notation is rewritten to one of them.
INLINE, DISPLAY = (r"\(", r"\)"), (r"\[", r"\]")
DELIMITERS: list[dict[str, str | bool]] = [
    {"left": INLINE[0], "right": INLINE[1], "display": False},
    {"left": DISPLAY[0], "right": DISPLAY[1], "display": True},
]
LONGEST_FORMULA = 4000  # characters; anything longer is shown as it is written
_LINES = ("align", "align*", "equation", "equation*", "gather", "gather*")
_BLOCKS = ("aligned", "gathered", "cases", "array", "matrix", "pmatrix", "bmatrix", "Bmatrix",
           "vmatrix", "Vmatrix", "smallmatrix")  # fmt: skip
_KNOWN = frozenset((*_LINES, *_BLOCKS))

_TOKEN = re.compile(
    r"\\(?:[\\`$*{}]|[()\[\]]|begin\{[A-Za-z]{1,12}\*?\}|end\{[A-Za-z]{1,12}\*?\}|boxed\{)"
    r"|`+|\$+|[{}]|\n[ \t]*\n"
)
_OPENING = {r"\(": r"\)", r"\[": r"\]", "$": "$", "$$": "$$"}
_DELIMITING = {r"\(", r"\)", r"\[", r"\]"}
_TWO_WORDS = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,} +[A-Za-z]{2,}")
_SURELY_MATH = re.compile(r"[\\^_={}<>]")
_MAYBE_MATH = re.compile(r"[\\^_={}<>+*/-]")
_HALF_DOLLARS = 80  # characters after a dollar that may become a formula in an unfinished text
_LONGEST_COMMAND = 30


class Atom(NamedTuple):
    """A formula or code span of a text; `content` is the part inside its delimiters."""

    start: int
    end: int
    content: str
    delimiters: tuple[str, str] | None  # INLINE or DISPLAY; None for code

    @property
    def is_display(self) -> bool:
        """Whether it is set on its own line."""
        return self.delimiters == DISPLAY


class _Token(NamedTuple):
    start: int
    end: int
    text: str


def find_atoms(text: str) -> list[Atom]:
    r"""Find the formulas and code spans of a text, in order.

    >>> [atom.content for atom in find_atoms(r"It costs $5, so $x$ is \boxed{60} or `a`.")]
    ['x', '\\boxed{60}', 'a']
    """
    return _Scan(text).atoms()


def cut_unfinished(text: str) -> str:
    r"""Remove a formula at the end of an unfinished text that is not closed yet.

    >>> cut_unfinished(r"So \(a\) is \(b = \frac{1}")
    'So \\(a\\) is '
    """
    return text[: _Scan(text).unfinished_from()]


class _Scan:
    """The tokens of a text outside code, with the partner of each that opens something."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _outside_code([_Token(*m.span(), m.group()) for m in _TOKEN.finditer(text)])
        self.partner = _nested_partners(self.tokens) | _flat_partners(self.tokens, _OPENING)
        self._first_open: int | None = None

    def atoms(self) -> list[Atom]:
        found, number = [], 0
        while number < len(self.tokens):
            atom = self._atom_at(number)
            if atom is None:
                number += 1
                continue
            found.append(atom)
            number = self.partner.get(number, number) + 1
        return found

    def unfinished_from(self) -> int:
        """Return the position from which an unfinished text may still become a formula."""
        self._first_open = None
        self.atoms()
        tail = self.text.rfind("\\", max(len(self.text) - _LONGEST_COMMAND, 0))
        after = self.text[tail + 1 :]
        is_command = tail >= 0 and (not after or (after.isascii() and after.isalpha()))
        ends = [len(self.text), tail if is_command else len(self.text)]
        return min([*ends, *([self._first_open] if self._first_open is not None else [])])

    def _atom_at(self, number: int) -> Atom | None:
        token = self.tokens[number]
        if token.text[0] == "`" and token.end - token.start > len(token.text):
            ticks = len(token.text)
            content = self.text[token.start + ticks : token.end - ticks]
            return Atom(token.start, token.end, content, None)
        partner = self.partner.get(number)
        if partner is None:
            self._note_open(token)
            return None
        end = self.tokens[partner]
        inside = self.text[token.end : min(end.start, token.end + LONGEST_FORMULA + 1)]
        if not inside or len(inside) > LONGEST_FORMULA:
            return None
        whole = self.text[token.start : end.end]
        if token.text == r"\boxed{":
            return Atom(token.start, end.end, whole, INLINE)
        if not self._is_sound(number, partner):
            return None
        if token.text.startswith(r"\begin"):
            is_lines = _environment(token.text) in _LINES
            return Atom(token.start, end.end, whole, DISPLAY if is_lines else INLINE)
        if token.text == "$" and not self._is_dollar_math(token, end, inside):
            return None
        display = token.text in ("$$", r"\[")
        return Atom(token.start, end.end, inside, DISPLAY if display else INLINE)

    def _is_sound(self, number: int, partner: int) -> bool:
        """Whether braces are balanced inside and no delimiter is outside of them."""
        depth = 0
        for token in self.tokens[number + 1 : partner]:
            depth += token.text.endswith("{") and token.text != r"\{"
            depth -= token.text == "}"
            if depth < 0 or (depth == 0 and token.text in _DELIMITING):
                return False
        return depth == 0

    def _is_dollar_math(self, token: _Token, end: _Token, inside: str) -> bool:
        """Whether two dollars hold a formula and not the amounts of two prices."""
        if not self._may_open(token) or self.text[end.end : end.end + 1].isalnum():
            return False
        if inside[0].isspace() != inside[-1].isspace():
            return False
        if "\\" not in inside and _TWO_WORDS.search(inside):
            return False
        if inside[0].isspace() or "\n" in inside:
            return bool(_SURELY_MATH.search(inside)) or len(inside.strip()) == 1
        is_amount = inside[0].isdigit() and any(letter.isspace() for letter in inside)
        return not is_amount or bool(_MAYBE_MATH.search(inside))

    def _may_open(self, token: _Token) -> bool:
        before = self.text[token.start - 1 : token.start] if token.start else ""
        return not (before.isalnum() or before in ("\\", "_"))

    def _note_open(self, token: _Token) -> None:
        """Store the first position at which something opens that later text may close."""
        rest = len(self.text) - token.end
        if self._first_open is not None or rest > LONGEST_FORMULA:
            return
        if token.text == "$":
            after = self.text[token.end : token.end + 1]
            likely = after.isalpha() or after in ("\\", "(", "{")
            if rest > _HALF_DOLLARS or not after or not likely or not self._may_open(token):
                return
            if "\n" in self.text[token.end :]:
                return
        elif token.text not in (r"\(", r"\[", "$$") and not _opens(token.text):
            return
        self._first_open = token.start


def _opens(text: str) -> bool:
    return text == r"\boxed{" or (text.startswith(r"\begin") and _environment(text) in _KNOWN)


def _environment(text: str) -> str:
    return text[text.index("{") + 1 : -1]


def _outside_code(tokens: Sequence[_Token]) -> list[_Token]:
    """Remove what is inside code spans; the two ends of each span are joined to one token."""
    ticks = {token.text: token.text for token in tokens if token.text[0] == "`"}
    partner = _flat_partners(tokens, ticks)
    kept: list[_Token] = []
    number = 0
    while number < len(tokens):
        token = tokens[number]
        end = partner.get(number, number) if token.text[0] == "`" else number
        kept.append(token if end == number else token._replace(end=tokens[end].end))
        number = end + 1
    return kept


def _flat_partners(tokens: Sequence[_Token], closing_of: Mapping[str, str]) -> dict[int, int]:
    """Pair tokens that do not nest: each opening with the next closing, if no opening is between.

    Code spans and dollars end with their paragraph.
    """
    partner: dict[int, int] = {}
    following: dict[str, int] = {}
    for number in range(len(tokens) - 1, -1, -1):
        text = tokens[number].text
        if text[0] == "\n":
            following = {key: value for key, value in following.items() if key in _DELIMITING}
            continue
        if text in closing_of:
            closing, again = following.get(closing_of[text]), following.get(text)
            if closing is not None and (again is None or again >= closing):
                partner[number] = closing
        following[text] = number
        if text[0] == "$" and text != "$":
            following.pop("$", None)  # two dollars or more end a formula between single ones
    return partner


def _nested_partners(tokens: Sequence[_Token]) -> dict[int, int]:
    """Pair braces and environments, which nest."""
    partner: dict[int, int] = {}
    braces: list[int] = []
    environments: dict[str, list[int]] = {}
    for number, token in enumerate(tokens):
        if token.text in ("{", r"\boxed{"):
            braces.append(number)
        elif token.text == "}" and braces:
            opening = braces.pop()
            if tokens[opening].text != "{":
                partner[opening] = number
        elif token.text.startswith(r"\begin"):
            environments.setdefault(_environment(token.text), []).append(number)
        elif token.text.startswith(r"\end"):
            name = _environment(token.text)
            if name in _KNOWN and environments.get(name):
                partner[environments[name].pop()] = number
    return partner
