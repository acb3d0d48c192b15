"""The driver that compares: every decoder matrix of a pair is decomposed once, small records stay.

In: a `ModelPair`. Out: an `Analysis` with one `LayerRecord` per matrix and expert: similarities,
norms, inner products, sampled spectra; no weights. Everything that a plan or a plot needs later is
there, so that no slider ever asks for a decomposition. `iter_analysis` yields the records one by
one and can be closed at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ipmerge_core import similarity as sim
from ipmerge_core import spectrum
from ipmerge_core.checkpoint import DTYPES, Checkpoint
from ipmerge_core.errors import PairingError, PlanError
from ipmerge_core.pairing import MatrixMatch, ModelPair
from ipmerge_core.records import (
    VERSION,
    Analysis,
    LayerRecord,
    Source,
    Sources,
    Totals,
    UpdateNorms,
)
from ipmerge_core.version import __version__

_SAMPLES = 48  # points kept of a spectrum: enough for a plot at any width
GAMMA_NORMS: tuple[Literal["sum"], Literal["max"]] = ("sum", "max")


def analyse(
    pair: ModelPair,
    *,
    device: str = "cpu",
    rank: int | None = None,
    temperature: float = sim.TEMPERATURE,
    cache_dir: str | Path | None = None,
) -> Analysis:
    """Decompose every matched matrix once and keep what all later questions need.

    Args:
        pair: the models, opened by `open_pair`.
        device: where the decompositions run, as torch names it.
        rank: keep only the leading singular triplets; None keeps all.
        temperature: of the softmax over directions, > 0.
        cache_dir: a folder in which the pack is found again for the same weights and parameters.

    Raises:
        PairingError: an expert or the MLLM equals its base, so that there is nothing to compare.
        CheckpointError: a matrix holds NaN or infinity.
    """
    cached = None if cache_dir is None else Path(cache_dir) / _cache_name(pair, rank, temperature)
    if cached is not None and cached.exists():
        return Analysis.load(cached)
    records = tuple(iter_analysis(pair, device=device, rank=rank, temperature=temperature))
    analysis = assemble(pair, records, rank=rank, temperature=temperature)
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        analysis.save(cached)
    return analysis


def assemble(
    pair: ModelPair,
    records: tuple[LayerRecord, ...],
    *,
    rank: int | None = None,
    temperature: float = sim.TEMPERATURE,
) -> Analysis:
    """Make an Analysis of the records that `iter_analysis` yielded."""
    _check_not_zero(pair, records)
    sources, totals = describe(pair)
    return Analysis(
        name=pair.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=__version__,
        sources=sources,
        parameters={"rank": rank, "temperature": temperature},
        totals=totals,
        records=records,
    )


def describe(pair: ModelPair) -> tuple[Sources, Totals]:
    """Return where a pair's models come from and how large the MLLM is, from headers."""
    sources = Sources(
        mllm=_source(pair.mllm),
        base=_source(pair.base),
        base_mllm=None if pair.base_mllm is pair.base else _source(pair.base_mllm),
        math=tuple(_source(expert) for expert in pair.math),
    )
    decoder = [pair.mllm.spec(matrix.mllm) for matrix in pair.matrices]
    outside = sum(
        pair.mllm.spec(name).numel
        for name, reason in pair.kept.items()
        if reason.startswith("outside")
    )
    totals = Totals(
        model_parameters=pair.mllm.numel,
        llm_parameters=pair.mllm.numel - outside,
        decoder_parameters=sum(spec.numel for spec in decoder),
        decoder_itemsize=DTYPES[decoder[0].dtype].itemsize,
        model_bytes=pair.mllm.nbytes,
    )
    return sources, totals


def _source(model: Checkpoint) -> Source:
    local = model.files.revision is None
    name = str(Path(model.id).expanduser().absolute()) if local else model.id
    return Source(name, model.files.revision, model.fingerprint)


def _cache_name(pair: ModelPair, rank: int | None, temperature: float) -> str:
    fingerprints = [model.fingerprint for _, model in pair.roles()]
    content = json.dumps([VERSION, __version__, rank, temperature, fingerprints])
    return hashlib.sha256(content.encode()).hexdigest()[:32] + ".json.gz"


def _check_not_zero(pair: ModelPair, records: tuple[LayerRecord, ...]) -> None:
    if not any(record.mllm_norm2 for record in records):
        raise PairingError(
            f"The decoder of the mllm '{pair.mllm.id}' equals its base '{pair.base_mllm.id}': "
            f"there is no task vector to compare with. Give the base that it was trained from."
        )
    for number, expert in enumerate(pair.math):
        if not any(record.math_norm2 for record in records if record.expert == number):
            raise PairingError(
                f"The math model '{expert.id}' equals the base '{pair.base.id}': its task vector "
                f"is zero. Give a fine-tuned model as math, or its true parent as base."
            )


# --- one matrix ---


def iter_analysis(
    pair: ModelPair,
    *,
    device: str = "cpu",
    rank: int | None = None,
    temperature: float = sim.TEMPERATURE,
) -> Iterator[LayerRecord]:
    """Yield one LayerRecord per matrix and expert, in order; `len(pair.matrices)` x experts.

    Arguments and errors as for `analyse`.
    """
    if rank is not None and rank < 1:
        raise PlanError(f"The rank is {rank}; expected a whole number >= 1, or none for all.")
    if not temperature > 0:
        raise PlanError(f"The temperature is {temperature}; expected a number > 0, such as 32.")
    with torch.inference_mode():
        for matrix in pair.matrices:
            yield from _analyse_matrix(pair, matrix, torch.device(device), rank, temperature)


class _Side(NamedTuple):
    """One task vector with its spectrum and the numbers that every record repeats."""

    task_vector: Tensor
    spectrum: spectrum.Spectrum
    norm2: float
    ranks: dict[str, float]
    nuclear: float
    truncated: bool  # the spectrum holds fewer triplets than the matrix has


def _side(tuned: Tensor, base: Tensor, rank: int | None) -> _Side:
    change = spectrum.task_vector(tuned, base)
    decomposed = spectrum.svd(change, rank=rank)
    return _Side(
        task_vector=change,
        spectrum=decomposed,
        norm2=_dot(change, change),
        ranks={
            "stable": float(spectrum.stable_rank(decomposed)),
            "effective": float(spectrum.effective_rank(decomposed)),
        },
        nuclear=float(decomposed.S.double().sum()),
        truncated=rank is not None and rank < min(change.shape),
    )


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two matrices, accumulated in fp64."""
    return float(torch.dot(a.flatten().double(), b.flatten().double()))


def _analyse_matrix(
    pair: ModelPair,
    matrix: MatrixMatch,
    device: torch.device,
    rank: int | None,
    temperature: float,
) -> Iterator[LayerRecord]:
    stored = pair.mllm.read_matrix(matrix.mllm).to(device)
    base = pair.base.read_matrix(matrix.name).to(device)
    root = base
    if pair.base_mllm is not pair.base:
        root = pair.base_mllm.read_matrix(matrix.base_mllm).to(device)
    mllm = _side(stored, root, rank)
    weights = (_norm2(stored), _norm2(base))
    floor = spectrum.noise_floor(stored, root)
    earlier: list[dict[str, Tensor]] = []
    for expert, model in enumerate(pair.math):
        tuned = model.read_matrix(matrix.math[expert]).to(device)
        math = _side(tuned, base, rank)
        updates = _updates(mllm, math, temperature)
        norms = {
            name: UpdateNorms(
                norm2=_dot(update, update),
                inner=_dot(mllm.task_vector, update),
                cross=tuple(_dot(update, other[name]) for other in earlier),
            )
            for name, update in updates.items()
        }
        earlier.append(updates)
        yield _record(matrix, expert, mllm, math, norms, weights, floor)


def _norm2(weight: Tensor) -> float:
    as_float = spectrum.as_float(weight)
    return _dot(as_float, as_float)


def _updates(mllm: _Side, math: _Side, temperature: float) -> dict[str, Tensor]:
    """The expert's update per unit gain, as a matrix, under each name that a plan may ask for."""
    rho = sim.nuclear_ratio(mllm.spectrum, math.spectrum)
    angles = sim.corresponding_angles(mllm.spectrum, math.spectrum)
    kept = math.spectrum if math.truncated else None
    projected: dict[str, Tensor] = {
        norm: sim.projected_update(
            math.task_vector,
            mllm.spectrum,
            sim.importance(angles, temperature, norm),
            rho,
            math=kept,
        )
        for norm in GAMMA_NORMS
    }
    rescaled = rho * math.task_vector
    if kept is not None:  # a projection on its own directions is a truncation
        rescaled = sim.projected_update(math.task_vector, kept, torch.ones_like(kept.S), rho)
    return {**projected, "rescale_only": rescaled, "select_only": math.task_vector}


def _record(
    matrix: MatrixMatch,
    expert: int,
    mllm: _Side,
    math: _Side,
    updates: Mapping[str, UpdateNorms],
    weights: tuple[float, float],
    floor: float | None,
) -> LayerRecord:
    angles = sim.corresponding_angles(mllm.spectrum, math.spectrum)
    index = _sample(len(angles))
    picked = [i - 1 for i in index]
    return LayerRecord(
        name=matrix.name,
        mllm_name=matrix.mllm,
        layer=matrix.layer,
        module=matrix.module,
        expert=expert,
        shape=matrix.shape,
        similarity=sim.similarities(angles, mllm.spectrum, math.spectrum),
        best_index=int(angles.argmax()) + 1,
        gap=float(spectrum.spectral_gap(mllm.spectrum)),
        rho=float(sim.nuclear_ratio(mllm.spectrum, math.spectrum)),
        weight_norm2=weights[0],
        base_norm2=weights[1],
        mllm_norm2=mllm.norm2,
        math_norm2=math.norm2,
        inner=_dot(mllm.task_vector, math.task_vector),
        mllm_nuclear=mllm.nuclear,
        math_nuclear=math.nuclear,
        updates=updates,
        chance={
            kind: sim.chance_level(matrix.shape[1], kind, len(angles)) for kind in ("first", "max")
        },
        noise_floor=floor,
        mllm_ranks=mllm.ranks,
        math_ranks=math.ranks,
        index=index,
        mllm_sigma=_rounded(mllm.spectrum.S, picked),
        math_sigma=_rounded(math.spectrum.S, picked),
        angles=_rounded(angles, picked),
    )


def _sample(n: int) -> tuple[int, ...]:
    """At most 48 indices from 1 to n, every one at the start, then evenly spaced in log."""
    steps = torch.logspace(0, float(torch.log10(torch.tensor(float(n)))), _SAMPLES)
    return tuple(sorted({min(n, max(1, round(float(step)))) for step in steps}))


def _rounded(values: Tensor, picked: list[int]) -> tuple[float, ...]:
    """Six significant digits: all that a plot shows, in half the bytes."""
    return tuple(float(f"{float(values[i]):.6g}") for i in picked)
