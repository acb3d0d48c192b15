"""Calibration data that a driver supplies to a method: Gram matrices or Fisher information.

In: one measurement per model, from a calibration. Out: the same, checked for completeness and
shape, the MLLM's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from jaxtyping import Float
from torch import Tensor

from ipmerge_core.errors import PlanError, ShapeError
from ipmerge_core.methods.elementwise import as_list
from ipmerge_core.methods.registry import Supplied

Measured: TypeAlias = Float[Tensor, "..."]  # shapes are checked in `checked`
MeasuredList: TypeAlias = Measured | Sequence[Measured]
FisherInput: TypeAlias = Annotated[Measured | None, Supplied("diagonal of the Fisher information")]
FisherInputs: TypeAlias = Annotated[MeasuredList | None, Supplied("the same, of every expert")]
GramInput: TypeAlias = Annotated[Measured | None, Supplied("X^T X / tokens of the inputs")]
GramInputs: TypeAlias = Annotated[MeasuredList | None, Supplied("the same, of every expert")]


def checked(
    label: str,
    what: str,
    shapes: Sequence[tuple[int, ...]],
    mllm: Tensor | None,
    math: Tensor | Sequence[Tensor] | None,
    experts: int,
) -> list[Tensor]:
    """Return one measurement per model, checked for completeness and shape."""
    if mllm is None or math is None:
        missing = "the MLLM" if mllm is None else "the math model"
        raise PlanError(
            f"{label} requires the {what} of every model and got none for {missing}. Run a "
            f"calibration first, or choose a method that needs no calibration data, such as "
            f"task_arithmetic."
        )
    found = [mllm, *as_list(math)]
    if len(found) != 1 + experts:
        raise PlanError(
            f"{label} got the {what} of {len(found) - 1} math models; expected {experts}, one per "
            f"model."
        )
    for matrix in found:
        if matrix.shape not in shapes:
            raise ShapeError(
                f"{label} got the {what} of shape {tuple(matrix.shape)}; expected "
                f"{shapes[0]}. "
                f"Calibrate the models to be merged."
            )
    return found
