"""Count the finished tensors of a merge, and make the steps that it reports.

In: tensors that were finished, or a share of one. Out: `MergeStep`s with the bytes done so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from ipmerge_core.merging.parts import Part
from ipmerge_core.merging.whole_model import FirstPassStep
from ipmerge_core.models.checkpoint import Checkpoint, TensorSpec
from ipmerge_core.models.writer import in_file_order

Action: TypeAlias = Literal["measured", "merging", "merged", "copied", "resumed"]


@dataclass(frozen=True)
class MergeStep:
    """Progress: one tensor was finished, or is being merged ("merging"). Sizes in bytes.

    The steps of a first pass ("measured") precede all others and count the bytes it reads.
    """

    tensor: str
    index: int
    total: int
    nbytes_done: int
    nbytes_total: int
    action: Action


class StepCount:
    """Converts finished tensors to steps."""

    def __init__(self, total: int, nbytes_total: int) -> None:
        self.total, self.nbytes_total = total, nbytes_total
        self.index = self.nbytes_done = 0

    def step(self, spec: TensorSpec, action: Action) -> MergeStep:
        """Count a finished tensor and return its step."""
        self.index += 1
        self.nbytes_done += spec.nbytes
        return self._step(spec, self.nbytes_done, action)

    def within(self, part: Part, share: float) -> MergeStep:
        """Return a step for the finished share of a matrix that is being merged."""
        nbytes = part.start + int(share * (part.stop - part.start))
        return self._step(part.spec, self.nbytes_done + nbytes, "merging")

    def _step(self, spec: TensorSpec, nbytes: int, action: Action) -> MergeStep:
        return MergeStep(spec.name, self.index, self.total, nbytes, self.nbytes_total, action)


def measured_step(step: FirstPassStep) -> MergeStep:
    """Return the step of a merge for one of its first pass."""
    return MergeStep(*step, action="measured")


def steps_of_finished(out: str | Path) -> Iterator[MergeStep]:
    """Yield the steps of a run that was killed after its final rename."""
    specs = in_file_order(Checkpoint.open(out))
    count = StepCount(len(specs), sum(spec.nbytes for spec in specs))
    for spec in specs:
        yield count.step(spec, "resumed")
