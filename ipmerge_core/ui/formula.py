"""Set the formula of a merge method as HTML: italic symbols, indices, powers and Greek symbols.

In: a formula in plain ASCII, as the declarations of the methods have it. Out: escaped HTML that
reads the same; a browser's text of it has the signs that the ASCII stands for.
"""

from __future__ import annotations

import re

from ipmerge_core.ui.safe_text import as_html

_SIGNS = {
    "sum": "∑",
    "argmin": "argmin",
    "lambda": "λ",
    "rho": "ρ",
    "gamma": "γ",
}
# A letter, dX or a Greek name with its index and its power; an index has no space in it.
_SYMBOL = re.compile(
    r"(?<![A-Za-z])(dW|sum|argmin|lambda|rho|gamma|[A-Za-z])(0?)('?)"
    r"(?![A-Za-z0-9])(?:_([A-Za-z0-9](?:,[A-Za-z])?)(?![A-Za-z0-9]))?(?:\^(T|-?\d))?"
)
_POWER = re.compile(r"(?<=[)|])\^(T|-?\d)")


def formula_html(formula: str) -> str:
    """Set a formula as HTML.

    >>> formula_html("W = W_v + lambda sum_k dW_e,k V^T")
    '<i>W</i> = <i>W</i><sub>v</sub> + λ ∑<sub>k</sub> Δ<i>W</i><sub>e,k</sub> <i>V</i><sup>⊤</sup>'
    >>> formula_html("a mean of the A_i < 2")
    'a mean of the <i>A</i><sub>i</sub> &lt; 2'
    """
    parts: list[str] = []
    end = 0
    for found in _SYMBOL.finditer(formula):
        parts += [_plain(formula[end : found.start()]), _symbol(found)]
        end = found.end()
    return "".join([*parts, _plain(formula[end:])])


def _symbol(found: re.Match[str]) -> str:
    name, zero, prime, index, power = found.groups()
    if name in ("a", "sum") and not any((zero, prime, index, power)) and _is_word(found):
        return name
    letter = "Δ<i>W</i>" if name == "dW" else _SIGNS.get(name, f"<i>{name}</i>")
    below = f"<sub>{zero or index}</sub>" if zero or index else ""
    above = f"<sup>{_power(power)}</sup>" if power else ""
    return f"{letter}{'′' if prime else ''}{below}{above}"


def _is_word(found: re.Match[str]) -> bool:
    """Whether a lone "a" or "sum" is a word of the sentence: another word follows."""
    return re.match(r" [a-z]{2}", found.string[found.end() :]) is not None


def _plain(text: str) -> str:
    """Set the text between two symbols; a bracket or a bar may have a power."""
    first, *rest = _POWER.split(text)
    powers, others = rest[::2], rest[1::2]
    html = _signs(first)
    for power, other in zip(powers, others, strict=True):
        html += f"<sup>{_power(power)}</sup>{_signs(other)}"
    return html


def _signs(text: str) -> str:
    return as_html(text.replace(" - ", " − ").replace("~", "∼"))


def _power(text: str) -> str:
    return "⊤" if text == "T" else text.replace("-", "−")
