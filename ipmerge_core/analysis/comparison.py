"""Compare one matrix of every model and reduce the result to a small record.

In: the weights of one matrix in the MLLM, its base, the experts' base and every expert. Out: one
`LayerRecord` per expert with all numbers that plans and plots need. No IO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ipmerge_core.analysis.records import LayerRecord, UpdateNorms
from ipmerge_core.analysis.singular_values import LEADING, Overlap, SingularValues, Spectra
from ipmerge_core.analysis.update_norms import (
    GAMMA_NORMS,
    Expert,
    Side,
    dot,
    expert_of,
    update_norms,
)
from ipmerge_core.errors import PlanError
from ipmerge_core.models.low_rank import Factors
from ipmerge_core.models.matrix_kinds import is_expert
from ipmerge_core.models.pairing import MatrixMatch, MatrixWeights
from ipmerge_core.spectral import similarity as sim
from ipmerge_core.spectral import spectrum
from ipmerge_core.spectral.kinds import ENERGY_SHARES, KEPT_SHARES, TEMPERATURE
from ipmerge_core.spectral.low_rank import LowRank
from ipmerge_core.spectral.protection import energy_rank
from ipmerge_core.spectral.similarity import Update
from ipmerge_core.spectral.weight_values import weight_values

_QUICK_RANK = 64  # leading directions of a quick analysis
_QUICK_TOLERANCE = 0.1  # residual relative to S_1^2: leading values to five percent
_PRINCIPAL = (1, 4, 16, 64)  # sizes of the compared leading subspaces
_SAMPLES = 48  # stored points per spectrum: enough for a plot at any width


class Options(NamedTuple):
    """Options of an analysis; equal options of one pair give equal records.

    Attributes:
        rank: keep only the leading singular triplets; None keeps all.
        temperature: softmax temperature over directions.
        quick: compute only the leading 64 directions with a randomized algorithm, in a fraction of
            the time: similarities of leading directions are accurate, nuclear norms and ranks are
            those of the leading part. Such packs are marked as approximate.
        directions: "existing" excludes directions that rounding of the stored weights may have
            caused; "all" uses every direction, as in the paper.
    """

    rank: int | None = None
    temperature: float = TEMPERATURE
    quick: bool = False
    directions: Literal["existing", "all"] = "existing"

    def check(self) -> Options:
        """Return the options after validation. Raises: PlanError for an invalid value."""
        if self.rank is not None and self.rank < 1:
            raise PlanError(f"The rank is {self.rank}; expected an integer >= 1, or none.")
        if not 0 < self.temperature < inf:
            raise PlanError(f"The temperature is {self.temperature}; expected a number > 0.")
        if self.directions not in ("existing", "all"):
            raise PlanError(f"directions is {self.directions!r}; expected existing or all.")
        return self

    @property
    def triplets(self) -> int | None:
        """How many leading triplets are computed; None for all."""
        return self.rank or (_QUICK_RANK if self.quick else None)

    def decompose(self, change: Tensor, name: str, floor: float) -> spectrum.Spectrum:
        """Decompose one task vector accurately enough to decide which directions exceed `floor`.

        `name` keys the random numbers of the randomized algorithm.
        """
        return spectrum.svd(
            change,
            method="randomized" if self.quick else "auto",
            rank=self.triplets,
            vectors="right",
            key=(0, name),
            tolerance=_QUICK_TOLERANCE if self.quick else None,
            floor=floor,
        )


def _side(
    tuned: Tensor,
    base: Tensor,
    base_spacing: tuple[Tensor, Tensor],
    factors: Factors | None,
    options: Options,
    name: str,
) -> Side:
    if factors is not None and options.directions == "existing":
        return _side_of_factors(LowRank.of(*factors), options)
    change = spectrum.task_vector(tuned, base)
    noise = spectrum.noise_floor_of(spectrum.spacing_sums(tuned), base_spacing)
    found = options.decompose(change, name, spectrum.EXISTS * noise)
    return _measured(change, found, noise, options)


def _side_of_factors(known: LowRank, options: Options) -> Side:
    """Decompose a task vector of known rank; the values beyond its rank are exactly zero."""
    change = known.matrix()
    found = known.spectrum(rank=options.triplets, vectors="right")
    side = _measured(change, found, known.noise, options)
    count = min(options.triplets or min(change.shape), *change.shape)
    return side._replace(sigma=torch.nn.functional.pad(found.S, (0, count - len(found.S))))


def _measured(change: Tensor, found: spectrum.Spectrum, noise: float, options: Options) -> Side:
    existing = found.above(spectrum.EXISTS * noise)
    decomposed = existing if options.directions == "existing" else found
    return Side(
        task_vector=change,
        spectrum=decomposed,
        sigma=found.S,
        noise=noise,
        existing=len(existing.S),
        norm2=dot(change, change),
        ranks={
            "stable": float(spectrum.stable_rank(decomposed)),
            "effective": float(spectrum.effective_rank(decomposed)),
            "energy": float(energy_rank(decomposed.S, 0.9)),
        },
        nuclear=float(decomposed.S.double().sum()),
    )


def compare(
    matrix: MatrixMatch,
    weights: MatrixWeights,
    options: Options,
    leave: Callable[[dict[str, list[Update]]], object] | None = None,
) -> Iterator[LayerRecord]:
    """Yield the record of each expert for one matrix; `LayerRecord` documents every number.

    `leave` takes the updates of all experts by `gamma_norm`, where they are those that a merge
    computes (see `_as_merged`).
    """
    in_mixture = is_expert(matrix.module)  # a pack has tens of thousands: no spectra
    # First, so that its memory is free again.
    base = None if in_mixture else _base_values(matrix, weights, options)
    spacing = spectrum.spacing_sums(weights.base)  # of a base that the models usually share
    own = spacing if weights.root is weights.base else spectrum.spacing_sums(weights.root)
    known, *others = weights.factors
    mllm = _side(weights.mllm, weights.root, own, known, options, f"{matrix.name}|mllm")
    norms2 = (_norm2(weights.mllm), _norm2(weights.base))
    left_out = () if in_mixture else _energy_ranks(mllm, options, ENERGY_SHARES)
    earlier: list[Expert] = []
    updates: dict[str, list[Update]] = {norm: [] for norm in GAMMA_NORMS}
    leaves = leave is not None and _as_merged(weights, options)
    for expert, (tuned, factors) in enumerate(zip(weights.math, others, strict=True)):
        key = f"{matrix.name}|math {expert}"
        math = _side(tuned, weights.base, spacing, factors, options, key)
        kept = () if in_mixture else _energy_ranks(math, options, KEPT_SHARES)
        found = expert_of(mllm, math, options.temperature, left_out, kept)
        norms = update_norms(mllm, found, earlier, several=len(weights.math) > 1)
        earlier.append(found)
        for norm in GAMMA_NORMS if leaves else ():
            updates[norm].append(_update(mllm, math, options, norm))
        record = _record(matrix, expert, mllm, math, norms, norms2, left_out, kept)
        yield record if in_mixture else replace(record, spectra=_spectra(mllm, math, base))
    if leave is not None and leaves:
        leave(updates)


def _as_merged(weights: MatrixWeights, options: Options) -> bool:
    """Return whether a merge computes exactly the same updates.

    Not with an own base of the MLLM, to which a merge moves the experts; not for adapters, whose
    change is known as factors here; and not from leading directions, found with other random
    numbers.
    """
    own_base = weights.root is not weights.base
    return not own_base and not any(weights.factors) and options.triplets is None


def _update(mllm: Side, math: Side, options: Options, gamma_norm: str) -> Update:
    angles = sim.corresponding_angles(mllm.spectrum, math.spectrum)
    gamma = sim.importance(angles, options.temperature, gamma_norm)
    rho = sim.nuclear_ratio(mllm.spectrum, math.spectrum)
    return sim.update_factors(math.task_vector, mllm.spectrum, gamma, rho)


def _energy_ranks(side: Side, options: Options, shares: Sequence[float]) -> tuple[int, ...]:
    """Count the leading directions of a task vector that hold each share of its energy.

    Shares are of the decomposed directions; of the whole task vector in a quick analysis, which
    stands for a merge that decomposes all of it.
    """
    total = side.norm2 if options.quick and options.rank is None else None
    return tuple(energy_rank(side.spectrum.S, share, total) for share in shares)


def _norm2(weight: Tensor) -> float:
    as_float = spectrum.as_float(weight)
    return dot(as_float, as_float)


def _record(
    matrix: MatrixMatch,
    expert: int,
    mllm: Side,
    math: Side,
    updates: Mapping[str, UpdateNorms],
    norms2: tuple[float, float],
    left_out: tuple[int, ...],
    kept: tuple[int, ...],
) -> LayerRecord:
    angles = sim.corresponding_angles(mllm.spectrum, math.spectrum)
    index = _sample(min(len(mllm.sigma), len(math.sigma)))
    picked = [i - 1 for i in index]
    drawn = torch.nn.functional.pad(angles, (0, index[-1] - len(angles)))  # 0 where none exists
    return LayerRecord(
        name=matrix.name,
        mllm_name=matrix.mllm,
        layer=matrix.layer,
        module=matrix.module,
        expert=expert,
        shape=matrix.shape,
        similarity=sim.similarities(angles, mllm.spectrum, math.spectrum),
        best_index=int(drawn.argmax()) + 1,
        gap=_six_digits(spectrum.spectral_gap(mllm.spectrum)),
        principal=_principal(mllm.spectrum, math.spectrum),
        rho=float(sim.nuclear_ratio(mllm.spectrum, math.spectrum)),
        weight_norm2=norms2[0],
        base_norm2=norms2[1],
        mllm_norm2=mllm.norm2,
        math_norm2=math.norm2,
        inner=updates["select_only"].inner,
        mllm_nuclear=mllm.nuclear,
        math_nuclear=math.nuclear,
        updates=updates,
        chance={
            kind: sim.chance_level(matrix.shape[1], kind, len(angles)) for kind in ("first", "max")
        },
        noise_floor=_six_digits(mllm.noise),
        mllm_ranks=mllm.ranks,
        math_ranks=math.ranks,
        index=index,
        mllm_sigma=_rounded(mllm.sigma, picked),
        math_sigma=_rounded(math.sigma, picked),
        angles=_rounded(drawn, picked),
        math_noise_floor=_six_digits(math.noise),
        mllm_directions=mllm.existing,
        math_directions=math.existing,
        left_out=left_out,
        kept_directions=kept,
    )


def _base_values(
    matrix: MatrixMatch, weights: MatrixWeights, options: Options
) -> SingularValues | None:
    """Compute the singular values of the base, unless only leading directions are analysed."""
    if options.quick or options.rank is not None:
        return None
    found = weight_values(weights.base, key=(0, f"{matrix.name}|base"))
    return SingularValues.of(found.cpu().numpy(), rank=int((found > 0).sum()))


def _spectra(mllm: Side, math: Side, base: SingularValues | None) -> Spectra:
    cosines = (mllm.spectrum.Vh[:LEADING] @ math.spectrum.Vh[:LEADING].T).abs().clamp(max=1)
    return Spectra(
        mllm=SingularValues.of(mllm.sigma.double().cpu().numpy(), mllm.existing),
        math=SingularValues.of(math.sigma.double().cpu().numpy(), math.existing),
        base=base,
        overlap=Overlap.of(cosines.tolist()),
    )


def _principal(a: spectrum.Spectrum, b: spectrum.Spectrum) -> dict[str, float]:
    """Compute the mean principal cosine of leading subspaces, for each size that fits."""
    sizes = [k for k in _PRINCIPAL if k <= min(len(a.S), len(b.S))]
    return {str(k): float(sim.principal_cosines(a, b, k).double().mean()) for k in sizes}


def _sample(n: int) -> tuple[int, ...]:
    """Return at most 48 indices from 1 to n, dense at the start, then logarithmically spaced."""
    steps = torch.logspace(0, float(torch.log10(torch.tensor(float(n)))), _SAMPLES)
    return tuple(sorted({min(n, max(1, round(float(step)))) for step in steps}))


def _rounded(values: Tensor, picked: list[int]) -> tuple[float, ...]:
    return tuple(_six_digits(values[i]) for i in picked)


def _six_digits(value: float | Tensor) -> float:
    """Round to six significant digits, which suffices for plots."""
    return float(f"{float(value):.6g}")
