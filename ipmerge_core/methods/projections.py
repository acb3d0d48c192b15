"""The updates of IP-Merging: an expert's task vector on, or off, directions of the MLLM.

In: base, mllm and math matrices of one shape (m, n), and for filters their Gram matrices. Out: the
update P_k of every expert, as factors where it is of low rank, and its gain for a budget. The
method and its parameters are in `ip_merging`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.spectral.kinds import ENERGY
from ipmerge_core.spectral.low_rank import LowRank
from ipmerge_core.spectral.protection import (
    energy_rank,
    held_back,
    input_filter,
    off_inputs,
    output_norm2,
    protection,
)
from ipmerge_core.spectral.similarity import (
    Update,
    corresponding_angles,
    importance,
    nuclear_ratio,
    top_k_importance,
    truncated,
    update_factors,
)
from ipmerge_core.spectral.spectrum import (
    Spectrum,
    as_float,
    existing,
    noise_floor,
    svd,
    task_vector,
)

ON_DIRECTIONS = ("softmax", "top_k")  # their updates are of low rank
BY_INPUTS = ("input_filter", "off_inputs")  # they need calibration data
MOST_BY_OUTPUTS = 2.0  # an output budget changes weights by at most this multiple of it


class Projection(NamedTuple):
    """The parameters of `ip_merging` that determine the updates P_k."""

    temperature: float
    gamma_norm: str
    projector: str
    top_k: int
    energy: float = ENERGY
    beta: float = 1.0
    rank: int | None = None
    ablation: str = "none"
    directions: str = "existing"
    math_energy: float = 1.0

    @property
    def filters(self) -> bool:
        """Whether the updates depend on Gram matrices."""
        return self.ablation == "none" and self.projector in BY_INPUTS

    @property
    def is_low_rank(self) -> bool:
        """Whether the updates are of low rank, and yielded as factors."""
        return self.math_energy < 1 or (self.ablation == "none" and self.projector in ON_DIRECTIONS)


class Models(NamedTuple):
    """One matrix of every model, with what is known of the task vectors' rounding and rank."""

    base: Tensor
    mllm: Tensor
    experts: Sequence[Tensor]
    noise: Sequence[float] | None
    low_rank: Sequence[LowRank | None] | None

    def spectrum(self, place: int, asked: Projection) -> Spectrum:
        """Decompose the task vector of a model, of the MLLM at 0, of an expert at 1, 2, ..."""
        tuned = (self.mllm, *self.experts)[place]
        known = self.low_rank[place] if self.low_rank else None
        if asked.directions == "all":
            return svd(task_vector(tuned, self.base), rank=asked.rank, vectors="right")
        floor = self.noise[place] if self.noise else noise_floor(tuned, self.base)
        if known is not None:
            return known.existing(rank=asked.rank, vectors="right", noise=floor)
        return existing(task_vector(tuned, self.base), floor, rank=asked.rank, vectors="right")


def updates_of(
    models: Models, asked: Projection, grams: Sequence[Tensor] = ()
) -> Iterator[Update | Tensor]:
    """Yield P_k of every expert: as factors where it is of low rank, else as a matrix."""
    plain = asked.ablation == "select_only"
    filters = asked.filters
    vision = None if plain or filters else models.spectrum(0, asked)
    for number, expert in enumerate(models.experts, 1):
        change = task_vector(expert, models.base)
        if asked.math_energy < 1:
            found = models.spectrum(number, asked)
            found = found.leading(energy_rank(found.S, asked.math_energy))
            yield _of_truncated(change, vision, found, asked, grams, number)
            continue
        if plain:
            yield change
            continue
        cut = asked.rank is not None and asked.rank < min(change.shape)
        alone = filters or (asked.projector == "complement" and asked.ablation == "none")
        own = models.spectrum(number, asked) if cut or not alone else None
        kept = truncated(change, own) if cut and own is not None else change
        if vision is None:
            yield _filtered(kept, asked, grams, number)
        elif asked.ablation == "rescale_only" and own is not None:
            yield nuclear_ratio(vision, own) * kept
        else:
            yield _projected(change, kept, vision, own, asked)


def _of_truncated(
    change: Tensor,
    vision: Spectrum | None,
    own: Spectrum,
    asked: Projection,
    grams: Sequence[Tensor],
    number: int,
) -> Update | Tensor:
    """Return the update of dM V_M V_M^T for the kept directions V_M, as factors.

    Math:   whatever P is, it is linear in dM from the right: P(dM V_M V_M^T) = (dM V_M) P(V_M^T).
    """
    basis = own.Vh.to(as_float(change))
    left = as_float(change) @ basis.T
    if asked.ablation == "select_only":
        return Update(left, basis)
    if vision is None:
        return Update(left, _filtered(basis, asked, grams, number))
    if asked.ablation == "rescale_only":
        return Update(left * nuclear_ratio(vision, own), basis)
    if asked.projector in ON_DIRECTIONS:
        return _projected(change, left @ basis, vision, own, asked)
    found = _projected(basis, basis, vision, own, asked)
    assert isinstance(found, Tensor), "it is off the MLLM's directions"
    return Update(left, found)


def _projected(
    change: Tensor, kept: Tensor, vision: Spectrum, own: Spectrum | None, asked: Projection
) -> Update | Tensor:
    """Return P = rho dM V diag(gamma^2) V^T as factors, or dM without directions of the MLLM."""
    if asked.projector == "complement":
        count = energy_rank(vision.S, asked.energy)
        return held_back(kept, vision, torch.ones(count, device=kept.device))
    assert own is not None, "the expert's directions are compared"
    if asked.projector == "protect":
        return held_back(kept, vision, protection(vision, own))
    angles = corresponding_angles(vision, own)
    gamma = (
        top_k_importance(angles, asked.top_k)
        if asked.projector == "top_k"
        else importance(angles, asked.temperature, asked.gamma_norm)
    )
    cut = own if kept is not change else None
    return update_factors(change, vision, gamma, nuclear_ratio(vision, own), math=cut)


def _filtered(change: Tensor, asked: Projection, grams: Sequence[Tensor], number: int) -> Tensor:
    """Return dM reduced on the MLLM's inputs."""
    if asked.projector == "off_inputs":
        return off_inputs(change, grams[0], asked.beta)
    return input_filter(change, grams[0], grams[number], asked.beta)


def matrix_of(update: Update | Tensor, gain: float = 1.0) -> Tensor:
    """Return gain * P as a matrix."""
    return update.scaled(gain).matrix() if isinstance(update, Update) else gain * update


def budget_factor(budget: float, change: Tensor, mllm: Tensor, gram: Tensor | None) -> float:
    """Return budget * ||W_v|| / ||P||, or the same of the outputs with a Gram matrix.

    The latter at most doubles the former: an update that is silent on the measured inputs would
    grow without bound. Raises: PlanError if the MLLM has no outputs on the measured inputs.
    """
    by_weights = _ratio(budget, _norm2(change), _norm2(mllm))
    if gram is None:
        return by_weights
    size2 = output_norm2(mllm, gram)
    if not size2 > 0:
        raise PlanError(
            "The MLLM's outputs on the measured inputs are zero, so that there is nothing to "
            "compare an output_budget with. Calibrate on more samples, or use budget."
        )
    largest = MOST_BY_OUTPUTS * by_weights
    change2 = output_norm2(change, gram)
    return min(largest, _ratio(budget, change2, size2)) if change2 > 0 else largest


def budget_of_factors(budget: float, updates: Sequence[Update], mllm: Tensor) -> float:
    """Return budget * ||W_v|| / ||P|| for an update that is a sum of factors."""
    norm2 = sum(a.inner(b) for a in updates for b in updates)
    return _ratio(budget, norm2, _norm2(mllm))


def _ratio(budget: float, change2: float, weight2: float) -> float:
    """Return budget * sqrt(weight2 / change2); 0 for an update of zero."""
    return budget * (weight2 / change2) ** 0.5 if change2 > 0 else 0.0


def _norm2(matrix: Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))
