"""The reasoning prior D of every matched parameter, computed once and kept where it is chosen.

In: a `PriorMatch`. Out: D = expert - MLLM (direct) or expert - its base (hierarchical), one tensor
at a time: resident on the device, kept in CPU memory, or computed from the model files again for
every step. There is at most one copy of it in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ipmerge_core.errors import PairingError
from ipmerge_core.finetuning.matching import PriorEntry, PriorMatch

Placement: TypeAlias = Literal["cpu", "device", "files"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
UNRELATED = 1.2  # ||D|| / ||W||; about 1.4 for models that share no base


class PriorStep(NamedTuple):
    """One parameter whose prior was computed."""

    name: str
    number: int
    total: int


class ReasoningPrior:
    """Priors by entry, in the order of the match.

    Args:
        match: the matched models.
        placement: "cpu" keeps it in CPU memory, "device" on the device of the model, "files"
            nowhere: it is read from the models whenever it is used.
        device: the device of the model.
        normalize: scale each D to the norm of its parameter in the MLLM. Only the absolute rule
            depends on it, and then adds a step of the weight's own norm each time, with which the
            paper's ablation collapses.
    """

    def __init__(
        self,
        match: PriorMatch,
        placement: Placement = "cpu",
        device: str | torch.device = "cpu",
        *,
        normalize: bool = False,
    ) -> None:
        self.match, self.placement, self.normalize = match, placement, normalize
        self.device = torch.device(device)
        self.norms: list[float] = []  # ||D||, after scaling
        self._exact_norms: list[float] = []  # ||D||, before it
        self.weight_norms: list[float] = []  # of the parameter in the MLLM
        self._scales: list[float] = []
        self._held: list[Tensor] = []

    def iter_compute(self) -> Iterator[PriorStep]:
        """Compute every D, in the stored dtype of the MLLM.

        Raises: PairingError if the expert does not differ from the MLLM, or shares no base with it;
            CheckpointError for NaN or infinity.
        """
        yield from self._iter_differences()
        self._refuse_nothing()

    def _iter_differences(self) -> Iterator[PriorStep]:
        for number, entry in enumerate(self.match.entries):
            exact = self._difference(entry)
            weight = self.match.mllm.read_matrix(entry.mllm)
            norm, own = _norm(exact), _norm(weight)
            scale = own / norm if self.normalize and norm > 0 else 1.0
            self._scales.append(scale)
            self._exact_norms.append(norm)
            self.norms.append(scale * norm)
            self.weight_norms.append(own)
            if self.placement != "files":
                where = self.device if self.placement == "device" else torch.device("cpu")
                held = (scale * exact).to(weight.dtype).to(where)
                pinned = self.placement == "cpu" and self.device.type == "cuda"
                self._held.append(held.pin_memory() if pinned else held)
            yield PriorStep(entry.name, number + 1, len(self.match.entries))

    def compute(self) -> ReasoningPrior:
        """Compute every D and return this prior. Raises: as `iter_compute`."""
        self.measure()._refuse_nothing()
        return self

    def measure(self) -> ReasoningPrior:
        """Compute every D and return this prior, also if all are zero. Raises: CheckpointError."""
        for _ in self._iter_differences():
            pass
        return self

    def get(self, number: int) -> Tensor:
        """Return D of an entry on the device of the model."""
        if self.placement == "files":
            found = self._scales[number] * self._difference(self.match.entries[number])
        else:
            found = self._held[number]
        return found.to(self.device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Memory that the prior occupies, on whichever device."""
        return sum(held.nbytes for held in self._held)

    @property
    def relative_norm(self) -> float:
        """||D|| / ||W|| over all entries, before scaling to the parameters."""
        total = math.sqrt(sum(own * own for own in self.weight_norms))
        return math.sqrt(sum(n * n for n in self._exact_norms)) / total if total else 0.0

    def refuse_unrelated(self) -> None:
        """Raise PairingError for an expert that shares no base with the MLLM."""
        if self.relative_norm > UNRELATED and self.match.expert_base is None:
            raise PairingError(
                f"The expert '{self.match.expert.id}' differs from the MLLM by "
                f"{self.relative_norm:.2f} of its norm (unrelated models: about 1.4): they do not "
                f"seem to share one base. Use an expert of the MLLM's base, or --force."
            )

    def _difference(self, entry: PriorEntry) -> Tensor:
        """Read one D in fp32 (fp64 for fp64 models), unscaled."""
        expert = self.match.expert.read_matrix(entry.expert)
        origin = self.match.origin.read_matrix(entry.origin)
        wide = torch.float64 if expert.dtype == torch.float64 else torch.float32
        return expert.to(wide) - origin.to(wide)

    def _refuse_nothing(self) -> None:
        if not any(self._exact_norms):
            raise PairingError(
                f"The expert '{self.match.expert.id}' equals '{self.match.origin.id}' in all "
                f"{len(self.norms)} selected parameters: there is no direction to follow. Choose "
                f"another expert or other modules."
            )


def _norm(values: Tensor) -> float:
    """Return the Frobenius norm, summed in fp64."""
    return float(torch.linalg.vector_norm(values.flatten(), dtype=torch.float64))
