"""Keep the curves of a run in a file that grows while it trains.

In: the steps of a run. Out: one JSON line per point. A run that is resumed goes back to its last
checkpoint and repeats the steps after it: of two points of one step, the later line counts. A line
that a killed process left incomplete is skipped. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.atomic import writing
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    InvalidContentError,
    parse_json,
    read_bounded,
)

_LARGEST = 256 * MEGABYTE
_LONGEST_LINE = 4096


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """The figures of one optimizer step; None for those that were not measured at it.

    `cosine` is the mean of cos(g, D) over the parameters since the last point. Distances are
    relative to the norm of the start; `moved_cosine` is the cosine of the change and D.
    """

    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    cosine: float | None = None
    to_start: float | None = None
    to_expert: float | None = None
    moved_cosine: float | None = None

    def figures(self) -> dict[str, float | None]:
        """Return all figures by name."""
        return {name: getattr(self, name) for name in FIGURES}


FIGURES = tuple(part.name for part in fields(StepFigures))


@dataclass(frozen=True)
class CurvePoint(StepFigures):
    """The figures of one step; `total` is the number of steps of the run."""

    step: int
    total: int


def add_point(path: Path, point: CurvePoint) -> None:
    """Append a point, on a line of its own even after an incomplete one.

    Raises: RunError if the disk is full or the file cannot be written.
    """
    values = {"step": point.step, "total": point.total, **point.figures()}
    figures = {name: value for name, value in values.items() if value is not None}
    with writing(path), path.open("ab") as file:
        file.write(b"\n" + json.dumps(figures, separators=(",", ":")).encode())


def read_points(path: Path) -> list[CurvePoint]:
    """Return the points by step, figures of one step joined; empty if there is no file yet.

    Raises: RunError if the file cannot be read.
    """
    try:
        content = read_bounded(path, _LARGEST)
    except FileNotFoundError:
        return []
    except (OSError, InvalidContentError) as error:
        raise RunError(f"Cannot read the curves of the run, '{path}' ({error}).") from error
    found: dict[int, dict[str, Any]] = {}
    newest = -1
    for line in content.splitlines():
        point = _point(line)
        if point is None:
            continue
        step = point["step"]
        if step < newest:  # resumed: what came after the checkpoint is trained again
            found = {known: value for known, value in found.items() if known < step}
        newest = step
        found[step] = found.get(step, {}) | point
    return [CurvePoint(**found[step]) for step in sorted(found)]


def _point(line: bytes) -> dict[str, Any] | None:
    """Return the valid values of a line; None for a line that is not a point."""
    try:
        content = parse_json(line, _LONGEST_LINE)
    except InvalidContentError:
        return None
    if not isinstance(content, Mapping):
        return None
    step, total = content.get("step"), content.get("total")
    if not (_is_count(step) and _is_count(total)):
        return None
    figures = {name: content[name] for name in FIGURES if _is_number(content.get(name))}
    return {"step": step, "total": total, **figures}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 10_000_000


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
