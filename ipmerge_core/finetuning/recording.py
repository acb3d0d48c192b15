"""Run a fine-tuning as a job: JSON arguments, curves in a file, steps with totals per phase.

In: the arguments of `DriftRequest` as JSON values, and the file of the curves. Out: the steps of
`iter_drift` as mappings, to which each phase adds its own total: the time left is then measured
from the first step of the phase.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ipmerge_core.finetuning.curves import CurvePoint, add_point
from ipmerge_core.finetuning.settings import DriftSettings
from ipmerge_core.finetuning.train import DriftRequest, iter_drift

_CURVES = ("trained", "evaluated")


def iter_recorded_drift(
    mllm: str,
    math: str,
    data: str,
    out: str,
    settings: Mapping[str, Any],
    curves: str,
    *,
    math_base: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    force: bool = False,
) -> Generator[dict[str, Any]]:
    """Fine-tune, and append the points of the curves to a file; a run of the app.

    The first arguments are those of `DriftRequest`; `settings` is the result of
    `DriftSettings.as_json`, `curves` the file of the curves. The others are those of `iter_drift`.

    Raises: as `iter_drift`; RunError if the curves cannot be written.
    """
    made = DriftSettings.from_json(settings)
    request = DriftRequest(mllm, math, data, out, made, math_base, limit)
    with closing(iter_drift(request, device=device, force=force)) as steps:
        for step in steps:
            if step.action in _CURVES:
                point = CurvePoint(step.done, step.total, **step.figures())
                add_point(Path(curves), point)
            phase = "trained" if step.action in _CURVES else step.action
            yield {**asdict(step), f"{phase}_total": step.total}
