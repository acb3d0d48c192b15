r"""Escape untrusted text of models and users for HTML and Markdown, and render it in chats.

In: a question, a model's answer, a name, an error message. Out: HTML, or Markdown for
`gr.Markdown`, that shows the same characters. Chats render a closed list and show everything else
unchanged: formulas (see `latex`), code spans and fences, pipe tables, and bold and italics made
with asterisks around text. Control and bidirectional characters are removed. The time is linear in
the length of the text.
"""

from __future__ import annotations

import re
import string
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import NamedTuple

from ipmerge_core.ui.latex import Atom, cut_unfinished, find_atoms

# Controls but tab and line feed, and what reorders or overrides the direction of what follows.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufff9-\ufffb]"
)
_LINE_ENDS = re.compile("\r\n?|[\u2028\u2029\x0b\x0c\x85]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_ENTITIES = str.maketrans({sign: f"&#{ord(sign)};" for sign in string.punctuation})
_OPENS_FORMULA = re.compile(r"\\(?=[(\[])")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^\n]*)\n?\Z")
_LONGEST_FENCE = 8  # signs; more count as so many
_STARS = re.compile(r"\*+")
_LETTER = re.compile(r"[^\W\d_]")
_TABLE_RULE = re.compile(r":?-+:?")
_PRIVATE_USE = range(0xE000, 0xE100)
_MARKABLE = re.compile(r"[\w.,:%+=*/()^-]+")
_ALIGN = {(True, True): "center", (False, True): "right", (True, False): "left"}


def clean_text(text: str) -> str:
    r"""Remove control and bidirectional characters; every line end becomes a line feed.

    >>> clean_text("a\u202eb\r\nc\x1b[0m")
    'ab\nc[0m'
    """
    return _SURROGATES.sub("\ufffd", _UNSEEN.sub("", _LINE_ENDS.sub("\n", text)))


def as_html(text: str) -> str:
    """Escape a text for HTML, between tags or in an attribute.

    >>> as_html('<b>"a"</b>')
    '&lt;b&gt;&quot;a&quot;&lt;/b&gt;'
    """
    return escape(clean_text(text))


def as_markdown(text: str) -> str:
    """Escape a text for Markdown on one line: ASCII punctuation becomes entities.

    >>> as_markdown("20. a_b")
    '20&#46; a&#95;b'
    """
    line = " ".join(clean_text(text).split())
    return line.translate(_ENTITIES)


def show_text(text: str, *, finished: bool = True, mark: int | None = None) -> str:
    r"""Return the HTML of a message in a chat that does not render Markdown itself.

    In an unfinished text, a formula that is not closed yet is left out. A hidden field holds the
    text for the page's copy buttons. With `mark`, the word at that position of a finished text is
    marked; a formula or code there is preceded by an empty mark.

    >>> show_text("5*6 <b>")
    '<div class="written"><input type="hidden" value="5*6 &lt;b&gt;">5*6 &lt;b&gt;</div>'
    """
    return _show_finished(text, mark) if finished else _show(text, finished=False)


@lru_cache(maxsize=256)  # a chat is rendered ten times a second while an answer is streamed
def _show_finished(text: str, mark: int | None) -> str:
    return _show(text, finished=True, mark=mark)


def _show(text: str, *, finished: bool, mark: int | None = None) -> str:
    head = "" if mark is None else clean_text(text[:mark])
    text = clean_text(text)
    plain = "".join(_blocks(text, finished=finished))
    body = plain if mark is None else _marked(text, len(head), plain)
    return f'<div class="written"><input type="hidden" value="{escape(text)}">{body}</div>'


# --- the mark of a difference ----------------------------------------------------------------


def _marked(text: str, place: int, plain: str) -> str:
    """Render a finished text with a mark at a position, which changes nothing else of `plain`.

    The place is found by a character that the text does not have. Where that character changes the
    rendering, or ends up in an attribute, there is no mark.
    """
    sign = next((sign for sign in map(chr, _PRIVATE_USE) if sign not in text), None)
    if sign is None:
        return plain
    place = _outside_of_syntax(text, place)
    html = "".join(_blocks(text[:place] + sign + text[place:], finished=True))
    before, _, after = html.partition(sign)
    if before + after != plain or before.rfind("<") > before.rfind(">"):
        return plain
    word = _MARKABLE.match(after)
    inside = word[0] if word else ""
    return f'{before}<mark class="difference">{inside}</mark>{after[len(inside) :]}'


def _outside_of_syntax(text: str, place: int) -> int:
    """Move a position out of formulas and code, and before a line of a fence or a table's rule."""
    for atom in find_atoms(text):
        if atom.start < place < atom.end:
            place = atom.start
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    line = text[start : len(text) if end < 0 else end]
    return max(start - 1, 0) if _fence(line) or _alignments(line) else place


# --- blocks ----------------------------------------------------------------------------------


class _Fence(NamedTuple):
    sign: str
    length: int
    info: str


def _blocks(text: str, *, finished: bool) -> list[str]:
    """Split the text into fences and the parts between them."""
    lines = text.splitlines(keepends=True)
    fences = [_fence(line) for line in lines]
    closing = _closing_fences(fences)
    shown: list[str] = []
    begin = number = 0
    while number < len(lines):
        fence, end = fences[number], closing[number]
        if fence is None or (end is None and finished) or not _may_open(fence):
            number += 1
            continue
        code = "".join(lines[number + 1 : end])
        shown += _prose_blocks(_without_last_end(lines[begin:number]), finished=True)
        shown.append(f"<pre><code>{escape(code.removesuffix(chr(10)))}</code></pre>")
        begin = number = len(lines) if end is None else end + 1
    return [*shown, *_prose_blocks(lines[begin:], finished=finished)]


def _without_last_end(lines: Sequence[str]) -> list[str]:
    """Drop the line feed before a block, which begins a line by itself."""
    return [*lines[:-1], lines[-1].removesuffix("\n")] if lines else []


def _fence(line: str) -> _Fence | None:
    found = _FENCE.match(line)
    if found is None:
        return None
    return _Fence(found[1][0], min(len(found[1]), _LONGEST_FENCE), found[2].strip())


def _may_open(fence: _Fence) -> bool:
    return fence.sign == "~" or "`" not in fence.info


def _closing_fences(fences: Sequence[_Fence | None]) -> list[int | None]:
    """Return for each line the number of the line that closes a fence opened there."""
    closing: list[int | None] = [None] * len(fences)
    nearest: dict[tuple[str, int], int] = {}
    for number in range(len(fences) - 1, -1, -1):
        fence = fences[number]
        if fence is None:
            continue
        closing[number] = nearest.get((fence.sign, fence.length))
        if not fence.info:
            nearest |= {(fence.sign, length): number for length in range(3, fence.length + 1)}
    return closing


def _prose_blocks(lines: Sequence[str], *, finished: bool) -> list[str]:
    """Split lines outside of fences into tables and the parts between them."""
    shown: list[str] = []
    begin = number = 0
    while number + 1 < len(lines):
        table = _table_at(lines, number)
        if table is None:
            number += 1
            continue
        html, end = table
        shown += [_inline("".join(_without_last_end(lines[begin:number]))), html]
        begin = number = end
    rest = "".join(lines[begin:])
    return [*shown, _inline(rest if finished else cut_unfinished(rest))]


def _table_at(lines: Sequence[str], number: int) -> tuple[str, int] | None:
    """Return the HTML of the table that begins on a line and the number of the line after it."""
    aligned = _alignments(lines[number + 1]) if "|" in lines[number] else None
    if aligned is None or len(head := _cells(lines[number])) != len(aligned):
        return None
    rows: list[list[str]] = []
    end = number + 2
    while end < len(lines) and "|" in lines[end]:
        cells = _cells(lines[end])
        if len(cells) > len(head):  # a table would hide what is too many
            break
        rows.append([*cells, *[""] * (len(head) - len(cells))])
        end += 1
    top = _row("th", head, aligned)
    body = "".join(_row("td", row, aligned) for row in rows)
    return f"<table><thead>{top}</thead><tbody>{body}</tbody></table>", end


def _alignments(line: str) -> list[str] | None:
    """Read the rule under a table's head: the alignment of each column."""
    line = line.strip()
    if "|" not in line or set(line) - set("|-: \t"):
        return None
    cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
    if not all(_TABLE_RULE.fullmatch(cell) for cell in cells):
        return None
    return [_ALIGN.get((cell.startswith(":"), cell.endswith(":")), "") for cell in cells]


def _cells(line: str) -> list[str]:
    """Split a row at the pipes outside of code and formulas."""
    line = line.strip()
    covered = _Covered(find_atoms(line))
    pipes = (found.start() for found in re.finditer(r"(?<!\\)\|", line))
    cuts = [position for position in pipes if position not in covered]
    starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(line)]
    cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    first = 1 if line.startswith("|") else 0
    last = len(cells) - 1 if len(cells) > 1 and cuts[-1] == len(line) - 1 else len(cells)
    return cells[first:last]


def _row(tag: str, cells: Sequence[str], aligned: Sequence[str]) -> str:
    shown = []
    for cell, align in zip(cells, aligned, strict=True):
        style = f' style="text-align:{align}"' if align else ""
        shown.append(f"<{tag}{style}>{_inline(cell)}</{tag}>")
    return f"<tr>{''.join(shown)}</tr>"


# --- inside a block --------------------------------------------------------------------------


def _inline(text: str) -> str:
    """Render the formulas, code and emphasis of a text without blocks."""
    atoms = find_atoms(text)
    tags = _emphasis(text, atoms)
    pieces: list[str] = []
    position = 0
    for start, end, html in sorted([*tags, *((a.start, a.end, _atom(a, text)) for a in atoms)]):
        pieces += [_plain(text[position:start]), html]
        position = end
        if html.endswith(_DISPLAY_END) and text.startswith("\n", end):
            position += 1  # a formula on a line of its own ends that line
    return "".join([*pieces, _plain(text[position:])])


_DISPLAY_END = r"\]</span>"


def _atom(atom: Atom, text: str) -> str:
    if atom.delimiters is None:
        return f"<code>{escape(_code(atom.content))}</code>"
    left, right = atom.delimiters
    source = escape(text[atom.start : atom.end])
    return f'<span class="formula" title="{source}">{left}{escape(atom.content)}{right}</span>'


def _code(content: str) -> str:
    """Drop the one space that lets a code span begin or end with a backtick."""
    if content.startswith(" ") and content.endswith(" ") and content.strip():
        return content[1:-1]
    return content


def _plain(text: str) -> str:
    """Escape prose; an empty element keeps the page from taking a stray delimiter for a formula."""
    return _OPENS_FORMULA.sub(r"\\<span></span>", escape(text, quote=False))


class _Covered:
    """The positions inside of atoms."""

    def __init__(self, atoms: Sequence[Atom]) -> None:
        self._starts = [atom.start for atom in atoms]
        self._ends = [atom.end for atom in atoms]

    def __contains__(self, position: int) -> bool:
        number = bisect_right(self._starts, position) - 1
        return number >= 0 and position < self._ends[number]


def _emphasis(text: str, atoms: Sequence[Atom]) -> list[tuple[int, int, str]]:
    """Pair single and double asterisks around text; each becomes a tag (start, end, HTML)."""
    tags: list[tuple[int, int, str]] = []
    opened: dict[int, int] = {}  # position of the star or stars that wait for their partner
    covered = _Covered(atoms)
    line_end = -1
    for run in _STARS.finditer(text):
        start, end = run.span()
        if start in covered:
            continue
        if start > line_end:  # emphasis ends with its line
            opened.clear()
            line_end = text.find("\n", start)
            line_end = len(text) if line_end < 0 else line_end
        length = end - start
        begin = opened.pop(length, None)
        if begin is not None and _is_emphasis(text, begin + length, start, length):
            tag = "em" if length == 1 else "strong"
            tags += [(begin, begin + length, f"<{tag}>"), (start, end, f"</{tag}>")]
            opened = {key: value for key, value in opened.items() if value < begin}
        elif length <= 2 and _opens_emphasis(text, start, end):
            opened[length] = start
    return tags


def _opens_emphasis(text: str, start: int, end: int) -> bool:
    before = text[start - 1 : start] if start else ""
    return not (before.isalnum() or before in ("_", ")", "]", "}", "\\")) and (
        text[end : end + 1].isalnum()
    )


def _is_emphasis(text: str, begin: int, end: int, length: int) -> bool:
    """Whether asterisks enclose text: single ones at least a word, double ones a character."""
    last, after = text[end - 1 : end], text[end + length : end + length + 1]
    if last.isspace() or last == "\\" or after.isalnum() or after in ("_", "(", "["):
        return False
    if length == 2:
        return _LETTER.search(text, begin, end) is not None
    return end - begin > 1 and all(_LETTER.match(sign) for sign in (text[begin], text[begin + 1]))
