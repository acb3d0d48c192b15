"""All singular values of a matrix in about two bits each, for packs.

In: singular values, descending. Out: `SingularValues`, with exact sums, and text that `values`
decodes. Neighbouring values of a spectrum are close, so a pack stores how many steps of a
logarithmic grid lie between them. No torch; `ui/web/spectrum.js` decodes the same text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ipmerge_core.runtime.input_files import CLOSED, Magnitude, Schema

PRECISION = 1e-3  # ratio of neighbouring grid values minus 1, so that errors are below half of it
_STEP = math.log1p(PRECISION)
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_MORE = 32  # flag of a digit that more digits follow
_LAST_DIGIT = re.compile("[A-Za-f]")
_ENCODED = re.compile("(?:[g-z0-9_-]{0,3}[A-Za-f])*")  # below 32^4 steps: values of any fp32 weight
Length = Annotated[int, Field(ge=0, lt=1_000_000)]  # of a spectrum
COSINE_STEP = 0.005  # grid of stored cosines
LEADING = 32  # directions of each model whose cosines a pack stores


@dataclass(frozen=True)
class SingularValues:
    """The computed singular values of one matrix.

    Attributes:
        count: number of values, zeros included; min(m, n), or fewer if only leading ones were
            computed.
        rank: number of values above the rounding noise of the stored weights.
        total: exact sum of the values.
        squares: exact sum of their squares.
        steps: the nonzero values, rounded to a grid of ratio 1 + `PRECISION`, see `encode`.
    """

    __pydantic_config__ = CLOSED

    count: Length
    rank: Length
    total: Magnitude
    squares: Magnitude
    steps: str

    def __post_init__(self) -> None:
        """Check the text. Raises: ValueError if it is damaged."""
        if not 0 <= _count_numbers(self.steps) <= self.count or self.rank > self.count:
            raise ValueError(f"its text or rank is not that of a spectrum of {self.count} values")

    @classmethod
    def of(cls, values: npt.ArrayLike, rank: int) -> SingularValues:
        """Store values in descending order.

        >>> [round(value, 2) for value in SingularValues.of([2.0, 1.0, 0.0], rank=2).values()]
        [2.0, 1.0, 0.0]
        """
        exact = np.asarray(values, dtype=np.float64)
        grid = np.rint(np.log(exact[exact > 0]) / _STEP).astype(int).tolist()
        start = [_zigzag(grid[0])] if grid else []
        falls = [before - after for before, after in pairwise(grid)]
        return cls(
            count=len(exact),
            rank=rank,
            total=float(exact.sum()),
            squares=float(np.square(exact).sum()),
            steps=encode([*start, *falls]),
        )

    def values(self) -> list[float]:
        """Return all values, descending; nonzero ones with a relative error below 0.05 %."""
        start, *falls = decode(self.steps) or [0]
        levels = np.cumsum([_unzigzag(start), *(-fall for fall in falls)], dtype=np.float64)
        found: list[float] = np.exp(_STEP * levels).tolist() if self.steps else []
        return found + [0.0] * (self.count - len(found))


@dataclass(frozen=True)
class Overlap:
    """|V_v^T V_e| for the leading right singular vectors of both task vectors.

    `rows` and `columns` count the directions of the MLLM and of the expert; `cosines` holds one
    number per pair, row by row, in steps of `COSINE_STEP`.
    """

    __pydantic_config__ = CLOSED

    rows: Length
    columns: Length
    cosines: str

    def __post_init__(self) -> None:
        """Check the text. Raises: ValueError if it is damaged."""
        if _count_numbers(self.cosines) != self.rows * self.columns:
            raise ValueError(f"its text is not that of {self.rows} x {self.columns} cosines")

    @classmethod
    def of(cls, cosines: Sequence[Sequence[float]]) -> Overlap:
        """Store a matrix of absolute cosines.

        >>> Overlap.of([[1.0, 0.0], [0.25, 0.5]]).matrix()
        [[1.0, 0.0], [0.25, 0.5]]
        """
        columns = len(cosines[0]) if cosines else 0
        flat = [round(cosine / COSINE_STEP) for row in cosines for cosine in row]
        return cls(len(cosines), columns, encode(flat))

    def matrix(self) -> list[list[float]]:
        """Return the absolute cosines, each within half a step."""
        flat = [COSINE_STEP * step for step in decode(self.cosines)]
        return [flat[i * self.columns : (i + 1) * self.columns] for i in range(self.rows)]


@dataclass(frozen=True)
class Spectra:
    """The spectra of one matrix and one expert. `base` is None if it was not decomposed."""

    __pydantic_config__ = CLOSED

    mllm: SingularValues
    math: SingularValues
    base: SingularValues | None
    overlap: Overlap

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Spectra:
        """Rebuild from JSON content. Raises: InvalidContentError."""
        return _SPECTRA.validate(content)


_SPECTRA = Schema[Spectra](Spectra)


def encode(numbers: Iterable[int]) -> str:
    """Write integers >= 0 in base 32, least digit first, as characters of base64url.

    A digit that others follow is 32 larger (variable-length quantities, as in source maps).

    >>> encode([0, 31, 32]), decode("AfgB")
    ('AfgB', [0, 31, 32])
    """
    return "".join(_digits(numbers))


def _digits(numbers: Iterable[int]) -> Iterator[str]:
    for number in numbers:
        rest = number
        while rest >= _MORE:
            yield _DIGITS[_MORE + rest % _MORE]
            rest //= _MORE
        yield _DIGITS[rest]


def decode(text: str) -> list[int]:
    """Read what `encode` wrote. Raises: ValueError for other text."""
    found: list[int] = []
    number, scale = 0, 1
    for letter in text:
        digit = _DIGITS.index(letter)
        number += scale * (digit % _MORE)
        scale *= _MORE
        if digit < _MORE:
            found.append(number)
            number, scale = 0, 1
    if scale != 1:
        raise ValueError("the last number is incomplete")
    return found


def _count_numbers(text: str) -> int:
    """Count the numbers of an encoded text without decoding it; -1 if it is not one."""
    return len(_LAST_DIGIT.findall(text)) if _ENCODED.fullmatch(text) else -1


def _zigzag(number: int) -> int:
    """Map integers to those >= 0: 0, -1, 1, -2, 2 to 0, 1, 2, 3, 4."""
    return 2 * number if number >= 0 else -2 * number - 1


def _unzigzag(number: int) -> int:
    return -(number + 1) // 2 if number % 2 else number // 2
