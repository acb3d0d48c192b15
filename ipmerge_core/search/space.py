"""The box of merging coefficients that a search covers, and its map to the unit cube.

In: a merge method and ranges such as `math_weight=0:1` or `density=0.2,0.4,0.8`. Out: a
`SearchSpace` that optimizers see as a unit cube. A listed set of values is also the grid; it is
searched as the interval between its ends by all other optimizers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ipmerge_core.errors import PlanError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ipmerge_core.methods import MergeMethod

    Point: TypeAlias = NDArray[np.float64]

THRESHOLD = "similarity_threshold"  # of a plan, not of a method
DIGITS = 6  # two points that agree in so many decimals of the unit cube are one
MOST_AXES = 8
MOST_VALUES = 100  # of one axis
MOST_GRID = 10_000
_COEFFICIENTS = (0.2, 0.4, 0.6, 0.8, 1.0)
_DENSITIES = (0.2, 0.4, 0.6, 0.8)
# The axes of a search without ranges, for parameters that a method has: ours, not a paper's, except
# that the cross-modal study (arXiv 2605.19523) searches 5 x 5 coefficients and 4 densities.
USUAL = {
    "mllm_weight": _COEFFICIENTS,
    "math_weight": _COEFFICIENTS,
    "density": _DENSITIES,
    "lambda_": (0.5, 1.0, 2.0, 4.0, 8.0),
    THRESHOLD: (0.1, 0.3, 0.5, 0.7, 0.9),
    "temperature": (1.0, 8.0, 32.0),
    "budget": (0.01, 0.02, 0.05, 0.1),
}
_USED = {"ip_merging": ("lambda_", THRESHOLD)}  # of a method with more of the above


@dataclass(frozen=True)
class Axis:
    """One parameter with its range; `values` are its points on a grid, in increasing order."""

    name: str
    low: float
    high: float
    values: tuple[float, ...] = ()
    whole: bool = False  # takes integers

    def at(self, share: float) -> float:
        """Return the value at a share of the range, rounded for integers.

        >>> Axis("density", 0.2, 0.8).at(0.5)
        0.5
        """
        value = self.low + min(max(share, 0.0), 1.0) * (self.high - self.low)
        return float(round(value)) if self.whole else float(f"{value:.12g}")

    def share_of(self, value: float) -> float:
        """Return the share of the range at which a value lies."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class SearchSpace:
    """A box of parameters: optimizers work in the unit cube [0, 1]^d."""

    axes: tuple[Axis, ...]

    @property
    def dimension(self) -> int:
        """The number of axes."""
        return len(self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(axis.name for axis in self.axes)

    def at(self, point: Iterable[float]) -> dict[str, float]:
        """Return the parameters at a point of the unit cube."""
        return {axis.name: axis.at(share) for axis, share in zip(self.axes, point, strict=True)}

    def point_of(self, parameters: Mapping[str, float]) -> Point:
        """Return the point of the unit cube at which parameters lie."""
        return np.array([axis.share_of(parameters[axis.name]) for axis in self.axes])

    def grid(self) -> Point:
        """Return all combinations of the axes' values, shape (n, d), in the unit cube.

        Raises: PlanError if an axis has no values, or there are too many combinations.
        """
        bare = [axis.name for axis in self.axes if not axis.values]
        if bare:
            raise PlanError(
                f"A grid needs values for '{bare[0]}', such as {bare[0]}=0.2,0.4,0.6; got a range."
            )
        count = math.prod(len(axis.values) for axis in self.axes)
        if count > MOST_GRID:
            raise PlanError(f"The grid has {count} points; the maximum is {MOST_GRID}.")
        shares = ([axis.share_of(value) for value in axis.values] for axis in self.axes)
        return np.array(list(itertools.product(*shares)))

    def to_dict(self) -> list[dict[str, Any]]:
        """Return JSON values that identify the space."""
        return [
            {"name": axis.name, "low": axis.low, "high": axis.high, "values": list(axis.values)}
            for axis in self.axes
        ]


def key_of(point: Iterable[float]) -> tuple[float, ...]:
    """Return the rounded coordinates that identify a point.

    >>> key_of([0.3000000001, 1]) == key_of([0.3, 1.0])
    True
    """
    return tuple(round(float(share), DIGITS) + 0.0 for share in point)


def space_of(method: MergeMethod, ranges: Sequence[str] = ()) -> SearchSpace:
    """Read the search space of a method from ranges, or return its usual one.

    Args:
        method: the method whose parameters are searched.
        ranges: texts `name=low:high` or `name=value,value,...`; none selects the usual axes.

    Raises: PlanError for a parameter that the method lacks, or a range that is not valid.
    """
    axes = [_read(method, text) for text in ranges] if ranges else _usual(method)
    names = [axis.name for axis in axes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PlanError(f"The range of '{twice[0]}' is given twice. Give one range per parameter.")
    if len(axes) > MOST_AXES:
        raise PlanError(f"{len(axes)} parameters are searched; the maximum is {MOST_AXES}.")
    return SearchSpace(tuple(axes))


def _usual(method: MergeMethod) -> list[Axis]:
    known = [name for name in USUAL if _has(method, name)]
    names = _USED.get(method.name, [name for name in known if name != THRESHOLD])
    if not names:
        raise PlanError(
            f"{method.label} has no usual search space. Give ranges such as NAME=0:1; its "
            f"parameters are {', '.join(p.name for p in method.parameters) or 'none'}."
        )
    return [_axis(method, name, USUAL[name]) for name in names]


def _has(method: MergeMethod, name: str) -> bool:
    if name == THRESHOLD:
        return method.needs_analysis
    return any(parameter.name == name for parameter in method.parameters)


def _read(method: MergeMethod, text: str) -> Axis:
    name, equals, given = text.partition("=")
    name = name.strip().replace("-", "_")
    name = "lambda_" if name == "lambda" else name
    if not equals or len(text) > 2000:
        raise PlanError(f"'{text[:80]}' is not a range; expected NAME=LOW:HIGH or NAME=V1,V2,...")
    if not _has(method, name):
        known = [p.name for p in method.parameters if p.kind in ("float", "int")]
        known += [THRESHOLD] if method.needs_analysis else []
        raise PlanError(
            f"{method.label} has no parameter '{name[:80]}'. Its numbers are "
            f"{', '.join(known) or 'none'}."
        )
    parts = given.split(":") if ":" in given else given.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise PlanError(
            f"The range '{given[:80]}' of '{name}' is not made of numbers; expected "
            f"{name}=LOW:HIGH or {name}=V1,V2,..."
        ) from None
    if ":" not in given:
        return _axis(method, name, values)
    if len(values) != 2:
        raise PlanError(f"The range '{given[:80]}' of '{name}' has {len(values)} ends; expected 2.")
    return _axis(method, name, values, listed=False)


def _axis(method: MergeMethod, name: str, values: Sequence[float], *, listed: bool = True) -> Axis:
    """Return an axis after checking its values. Raises: PlanError."""
    if not all(map(math.isfinite, values)) or len(values) > MOST_VALUES:
        raise PlanError(f"'{name}' needs up to {MOST_VALUES} finite values; got {values[:4]}.")
    if any(first >= second for first, second in itertools.pairwise(values)) or len(values) < 2:
        raise PlanError(
            f"The values of '{name}' are {', '.join(f'{v:g}' for v in values[:8])}; expected at "
            f"least two, in increasing order. Write the lower one first."
        )
    whole = False
    if name == THRESHOLD:
        if not 0 <= values[0] <= values[-1] <= 1:
            raise PlanError(
                f"{THRESHOLD} is searched from {values[0]:g} to {values[-1]:g}; expected values in "
                f"[0, 1]."
            )
    else:
        parameter = next(p for p in method.parameters if p.name == name)
        if parameter.kind not in ("float", "int"):
            raise PlanError(f"'{name}' is not a number and cannot be searched. Set it instead.")
        whole = parameter.kind == "int"
        for value in values:
            parameter.check(int(value) if whole and value == int(value) else value)
    return Axis(name, values[0], values[-1], tuple(values) if listed else (), whole)
