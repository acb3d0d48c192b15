"""The valid values of a parameter, and the values of others with which it has an effect.

In: bounds and conditions, as a method declares them with a parameter. Out: `Range`s, from which
forms, tables and messages are made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ipmerge_core.methods.declarations import ParameterValue


@dataclass(frozen=True)
class Range:
    """Bounds, both included unless `low_open`, and one line of help for a parameter.

    `usual` is the range of a slider, if not the whole range. Choices have only help; `former` maps
    true and false to choices for parameters that used to be boolean. `before` is the value that
    applies to plans created before the parameter was added. `only_with` lists the values of other
    parameters with which this one has an effect; it also has one where a parameter of
    `also_unless` has another value than the one listed there.
    """

    low: float = -math.inf
    high: float = math.inf
    help: str = ""
    low_open: bool = False
    usual: tuple[float, float] | None = None
    former: tuple[tuple[bool, str], ...] = ()
    before: str | float | None = None
    only_with: tuple[tuple[str, tuple[ParameterValue, ...]], ...] = ()
    also_unless: tuple[tuple[str, ParameterValue], ...] = ()

    def __contains__(self, value: object) -> bool:
        """Return whether a finite number is inside the bounds."""
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (self.low < value if self.low_open else self.low <= value) and value <= self.high

    @property
    def slides(self) -> tuple[float, float] | None:
        """Range of a slider: the usual range, or the whole one if it is bounded."""
        if self.usual is not None:
            return self.usual
        return (self.low, self.high) if math.isfinite(self.high - self.low) else None

    def __str__(self) -> str:
        """Format the interval: `(0, 1]`, `[0, inf)`."""
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"

    def unmet(self, values: Mapping[str, ParameterValue]) -> Iterator[str]:
        """Yield the conditions without which the parameter has no effect with these values."""
        if any(values[other] != usual for other, usual in self.also_unless):
            return
        also = "".join(f", or {other} not {usual}" for other, usual in self.also_unless)
        for other, wanted in self.only_with:
            if values[other] not in wanted:
                yield f"{other}={_listed(wanted)}{also}"


def _listed(values: Sequence[ParameterValue]) -> str:
    return " or ".join(str(value).lower() for value in values)
