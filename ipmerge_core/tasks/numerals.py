"""Read numbers from text: digits with separators, fractions, roots, powers, percent, words.

In: text that `reply_text.plain` has simplified. Out: `Quantity`s with their places. Values are
floats; a percentage is compared both as written and as a share. Expressions are not evaluated,
other than fractions, multiples of a root or of pi, and powers with small exponents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_DIGITS = (
    r"(?:[0-9]{1,3}(?:[, \u00a0\u202f][0-9]{3})+(?![0-9])(?:\.[0-9]+)?"  # 1,234.5
    r"|[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+"  # 1.234,5
    r"|[0-9]+,[0-9]{1,2}(?![0-9])"  # 1,5
    r"|[0-9]*\.[0-9]+|[0-9]+)"
)
_DECIMAL_COMMA = re.compile(r"[0-9]+,[0-9]{1,2}")
_TOKEN = re.compile(
    rf"""(?<![\w.^])(?P<sign>(?<![\w)\]°%])[-+]\s?)?(?:
        (?P<whole>[0-9]{{1,9}})(?:\s|\s?\()(?P<mixed_top>[0-9]{{1,9}})\)?/\(?(?P<mixed_bottom>[0-9]{{1,9}})\)?
      | \(?(?P<top>{_DIGITS})\)?\s?/\s?\(?(?P<bottom>{_DIGITS})\)?(?![\w/])
      | (?P<mantissa>{_DIGITS})\s?[*×x·]\s?10\^(?P<exponent>-?[0-9]{{1,3}})
      | (?P<scientific>[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]{{1,3}})(?![\w])
      | (?P<base>[0-9]{{1,9}})\^(?P<power>-?[0-9]{{1,2}})(?![\w])
      | (?P<root_times>{_DIGITS})?\s?√\s?\(?(?P<root>{_DIGITS})\)?
      | (?P<pi_times>{_DIGITS})?\s?π
      | (?P<plain>{_DIGITS})(?!(?:st|nd|rd|th)\b)
    )\s?(?P<percent>%|percent\b)?""",
    re.VERBOSE,
)
_WORDS = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
} | {
    word: 10 * value
    for value, word in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2
    )
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_SHARES = {"half": 2, "third": 3, "quarter": 4}
_WORD = re.compile(r"[a-z]+")
_CHINESE = re.compile("[零〇一二两三四五六七八九十百千万]+")
_CHINESE_DIGITS = {char: value for value, char in enumerate("零一二三四五六七八九")} | {
    "〇": 0,
    "两": 2,
}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000}


class Quantity(NamedTuple):
    """A number: its value as written, whether it is a percentage, its decimals, and its place."""

    value: float
    is_percent: bool = False
    decimals: int = 0  # digits after the point, of a plain number
    start: int = 0
    stop: int = 0

    @property
    def values(self) -> tuple[float, ...]:
        """The values that it may stand for."""
        return (self.value, self.value / 100) if self.is_percent else (self.value,)


def quantities(text: str) -> list[Quantity]:
    r"""Return the numbers of a text in order; number words and Chinese numerals without digits.

    >>> [q.value for q in quantities("1,234.5 of 2/4, about 50%")]
    [1234.5, 0.5, 50.0]
    >>> quantities("forty-two dots")[0].value
    42.0
    """
    text = simplified(text)
    found = list(_numbers(text))
    if found:
        return found
    return list(_spelled(text.lower())) or list(_chinese(text))


def simplified(text: str) -> str:
    r"""Return LaTeX fractions, roots and signs in a plain form.

    >>> simplified(r"1\frac{1}{2}"), simplified(r"2\sqrt{3}"), simplified(r"\frac34")
    ('1 (1)/(2)', '2√(3)', ' (3)/(4)')
    """
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}", r" (\1)/(\2)", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r" (\1)/(\2)", text)
    text = re.sub(r"\\sqrt\s*\{([^{}]{1,40})\}", r"√(\1)", text)
    text = re.sub(r"\\(?:times|cdot)(?![a-z])", "*", text)
    text = re.sub(r"\\(?:approx|simeq)(?![a-z])", "≈", text)
    text = re.sub(r"\\pi(?![a-z])", "π", text)
    return re.sub(r"\^\{(-?[0-9]{1,3})\}", r"^\1", text)


def equal(found: Quantity, reference: Quantity, precision: int | None = None) -> bool:
    """Whether a number is the reference.

    With a precision, both are compared to that many decimals; otherwise to the decimals of the
    reference if it has any, and exactly up to rounding of floats if not.

    >>> equal(Quantity(3.14159), Quantity(3.14, decimals=2)), equal(Quantity(3.2), Quantity(3.0))
    (True, False)
    """
    decimals = precision if precision is not None else reference.decimals
    return any(
        _close(value, wanted, decimals) for value in found.values for wanted in reference.values
    )


def _close(value: float, wanted: float, decimals: int) -> bool:
    if math.isclose(value, wanted, rel_tol=1e-6, abs_tol=1e-12):
        return True
    return decimals > 0 and abs(value - wanted) <= 0.5 * 10**-decimals * (1 + 1e-9)


def _numbers(text: str) -> Iterator[Quantity]:
    for found in _TOKEN.finditer(text):
        value = _value(found)
        if value is not None and math.isfinite(value):
            negative = (found["sign"] or "").startswith("-")
            plain = found["plain"] or ""
            yield Quantity(
                -value if negative else value,
                found["percent"] is not None,
                _decimals(plain),
                found.start(),
                found.end(),
            )


def _value(found: re.Match[str]) -> float | None:
    try:
        if found["mixed_top"]:
            return float(found["whole"]) + float(found["mixed_top"]) / float(found["mixed_bottom"])
        if found["top"]:
            return _read(found["top"]) / _read(found["bottom"])
        if found["mantissa"]:
            return _read(found["mantissa"]) * 10.0 ** int(found["exponent"])
        if found["base"]:
            return float(found["base"]) ** int(found["power"])
        if found["root"]:
            return _read(found["root_times"] or "1") * math.sqrt(_read(found["root"]))
        if found["scientific"]:
            return float(found["scientific"])
        if found["plain"]:
            return _read(found["plain"])
        return _read(found["pi_times"] or "1") * math.pi
    except (ZeroDivisionError, OverflowError):
        return None


def _read(digits: str) -> float:
    """Return the value of digits with thousands separators or a decimal comma."""
    if re.fullmatch(r"[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+", digits):
        return float(digits.replace(".", "").replace(",", "."))
    if _DECIMAL_COMMA.fullmatch(digits):
        return float(digits.replace(",", "."))
    return float(re.sub(r"[, \u00a0\u202f]", "", digits))


def _decimals(digits: str) -> int:
    """Return the number of digits after the point, or after a decimal comma."""
    if _DECIMAL_COMMA.fullmatch(digits):
        digits = digits.replace(",", ".")
    _, point, after = digits.rpartition(".")
    return len(after) if point and after.isdigit() else 0


def _spelled(text: str) -> Iterator[Quantity]:
    """Yield English number words, such as "minus forty-two" or "one half"."""
    total, group, start, negative, is_open = 0.0, 0.0, 0, False, False
    end, before = 0, ""
    for found in [*_WORD.finditer(text), None]:
        word = found[0] if found else ""
        if found and word in _WORDS:
            if not is_open:
                total, group, start, is_open = 0.0, 0.0, found.start(), True
                negative = before in ("minus", "negative")
            group, end = group + _WORDS[word], found.end()
        elif found and is_open and word in _SCALES:
            if word == "hundred":
                group *= 100
            else:
                total, group = (total + (group or 1)) * _SCALES[word], 0.0
            end = found.end()
        elif is_open and word in _SHARES and found:
            yield Quantity((total + group) / _SHARES[word], start=start, stop=found.end())
            is_open = False
        elif is_open and word != "and":
            value = total + group
            yield Quantity(-value if negative else value, start=start, stop=end)
            is_open = False
        before = word


def _chinese(text: str) -> Iterator[Quantity]:
    """Yield Chinese and Japanese numerals below 100 million."""
    for found in _CHINESE.finditer(text):
        total, section, digit = 0, 0, 0
        for char in found[0]:
            if char in _CHINESE_DIGITS:
                digit = _CHINESE_DIGITS[char]
            elif char == "万":
                total, section, digit = (total + section + digit) * 10_000, 0, 0
            else:
                section, digit = section + (digit or 1) * _CHINESE_SCALES[char], 0
        yield Quantity(float(total + section + digit), start=found.start(), stop=found.end())
