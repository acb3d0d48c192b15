"""The figure of the variants study: skill against perception, one panel per group of cases.

In: a mark per row and group. Out: an SVG file's text. The area of a disc is the size of the change,
relative to the math model's; hovering over one names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from study_rows import BASELINE

PANEL, GAP, COLUMNS, MARGIN = 240, 58, 3, 46
LOWEST = 0.6  # perception at the left edge; chosen gains keep it
LARGEST = 3.0  # times the math model's change; larger changes have the same disc
_UNIT = 9.0  # radius of a change as large as the math model's
_COLOURS = (
    (lambda label: label == BASELINE, "#111827", BASELINE),
    (lambda label: label.startswith(("complement", "protect", "off ", "input ")),
     "#047857", "off the MLLM's directions or inputs"),
    (lambda label: label.startswith(("IP-Merging", "gamma", "top ", "rescale")),
     "#b45309", "on the MLLM's directions"),
    (lambda label: label.startswith((BASELINE, "truncated", "budget")),
     "#1d4ed8", "the math change by layer, rank or size"),
    (lambda label: True, "#9ca3af", "other methods"),
)  # fmt: skip


class Mark(NamedTuple):
    """One disc: shares in [0, 1], and the size of the change."""

    group: str
    label: str
    perception: float
    math: float
    size: float


def figure(marks: Sequence[Mark]) -> str:
    """Return the figure as SVG."""
    groups = list(dict.fromkeys(mark.group for mark in marks))
    rows = math.ceil(len(groups) / COLUMNS)
    width = MARGIN + COLUMNS * (PANEL + GAP)
    height = MARGIN + rows * (PANEL + GAP) + 24 * len(_COLOURS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, group in enumerate(groups):
        left = MARGIN + number % COLUMNS * (PANEL + GAP)
        top = MARGIN + number // COLUMNS * (PANEL + GAP)
        own = [mark for mark in marks if mark.group == group]
        parts += _panel(left, top, group, own)
    below = MARGIN + rows * (PANEL + GAP)
    for number, (_, colour, words) in enumerate(_COLOURS):
        y = below + 24 * number
        parts.append(f'<circle cx="{MARGIN}" cy="{y}" r="6" fill="{colour}" fill-opacity="0.6"/>')
        parts.append(f'<text x="{MARGIN + 14}" y="{y + 4}" fill="#111827">{escape(words)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, top: int, group: str, marks: Sequence[Mark]) -> Iterator[str]:
    yield f'<text x="{left}" y="{top - 8}" fill="#111827">{escape(group)}</text>'
    box = f'x="{left}" y="{top}" width="{PANEL}" height="{PANEL}"'
    yield f'<rect {box} fill="none" stroke="#6b7280"/>'
    for tick in range(0, 101, 25):
        y = top + PANEL * (1 - tick / 100)
        yield f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{tick}</text>'
    for tick in range(round(100 * LOWEST), 101, 10):
        x = left + PANEL * _across(tick / 100)
        yield f'<text x="{x:.0f}" y="{top + PANEL + 15}" text-anchor="middle">{tick}</text>'
    middle = left + PANEL / 2
    yield f'<text x="{middle}" y="{top + PANEL + 30}" text-anchor="middle">perception, %</text>'
    yield (
        f'<text transform="translate({left - 34},{top + PANEL / 2}) rotate(-90)" '
        f'text-anchor="middle">image+math, %</text>'
    )
    # Small discs stay visible, and so does the baseline.
    for mark in sorted(marks, key=lambda mark: (mark.label == BASELINE, -mark.size)):
        yield _disc(left, top, mark)


def _across(perception: float) -> float:
    """Return the place of a share of perception in a panel, in [0, 1]."""
    return max(0.0, (perception - LOWEST) / (1 - LOWEST))


def _disc(left: int, top: int, mark: Mark) -> str:
    colour = next(colour for applies, colour, _ in _COLOURS if applies(mark.label))
    radius = max(2.5, _UNIT * math.sqrt(min(mark.size, LARGEST)))
    words = f"{mark.label}: {100 * mark.math:.1f} / {100 * mark.perception:.1f}, {mark.size:.2f} dM"
    return (
        f'<circle cx="{left + PANEL * _across(mark.perception):.1f}" '
        f'cy="{top + PANEL * (1 - mark.math):.1f}" r="{radius:.1f}" fill="{colour}" '
        f'fill-opacity="0.45" stroke="{colour}"><title>{escape(words)}</title></circle>'
    )
