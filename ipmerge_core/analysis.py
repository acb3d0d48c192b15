"""The driver that compares: every decoder matrix of a pair is decomposed once, small records stay.

In: a `ModelPair`. Out: an `Analysis` with one `LayerRecord` per matrix and expert: similarities,
norms, inner products, sampled spectra; no weights. Everything that a plan or a plot needs later is
there, so that no slider ever asks for a decomposition. `iter_analysis` yields the records one by
one and can be closed at any time.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from math import inf
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

_QUICK_RANK = 64  # leading directions of a quick analysis
_PRINCIPAL = (1, 4, 16, 64)  # sizes of the leading subspaces that are compared
_SAMPLES = 48  # points kept of a spectrum: enough for a plot at any width
GAMMA_NORMS: tuple[Literal["sum"], Literal["max"]] = ("sum", "max")


class Options(NamedTuple):
    """How to analyse. Two analyses of one pair with equal options give equal records.

    `rank` keeps the leading singular triplets only, None all of them. `temperature` is that of the
    softmax over directions. `quick` looks for the leading 64 directions by a randomized method, in
    a fraction of the time: its similarities of leading directions are good, its nuclear norms and
    ranks are those of the leading part; packs made so say that they are approximate.
    """

    rank: int | None = None
    temperature: float = sim.TEMPERATURE
    quick: bool = False

    def check(self) -> Options:
        """Return the options. Raises: PlanError for a rank or temperature that makes no sense."""
        if self.rank is not None and self.rank < 1:
            raise PlanError(f"The rank is {self.rank}; expected a whole number >= 1, or none.")
        if not 0 < self.temperature < inf:
            raise PlanError(f"The temperature is {self.temperature}; expected a number > 0, as 32.")
        return self

    def decompose(self, change: Tensor, name: str) -> spectrum.Spectrum:
        """Decompose one task vector; `name` keys the randomized method's numbers."""
        if self.quick:
            return spectrum.svd(
                change, method="randomized", rank=self.rank or _QUICK_RANK, key=(0, name)
            )
        return spectrum.svd(change, rank=self.rank)


def analyse(
    pair: ModelPair,
    *,
    device: str = "cpu",
    rank: int | None = None,
    temperature: float = sim.TEMPERATURE,
    quick: bool = False,
    cache_dir: str | Path | None = None,
) -> Analysis:
    """Decompose every matched matrix once and keep what all later questions need.

    Args:
        pair: the models, opened by `open_pair`.
        device: where the decompositions run, as torch names it.
        rank: keep only the leading singular triplets; None keeps all.
        temperature: of the softmax over directions, > 0.
        quick: an approximate preview from the leading directions, see `Options`.
        cache_dir: a folder in which a finished pack is found again for the same weights and
            options, and an interrupted analysis goes on.

    Raises:
        PairingError: an expert or the MLLM equals its base, so that there is nothing to compare.
        CheckpointError: a matrix holds NaN or infinity.
    """
    options = Options(rank, temperature, quick).check()
    if cache_dir is None:
        return assemble(pair, tuple(iter_analysis(pair, options, device=device)), options)
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pack = folder / (_identity(pair, options)[:32] + ".json.gz")
    if pack.exists():
        return Analysis.load(pack)
    journal = pack.with_suffix(".journal")
    records = tuple(iter_analysis(pair, options, device=device, journal=journal))
    analysis = assemble(pair, records, options)
    analysis.save(pack)
    journal.unlink()
    return analysis


def assemble(pair: ModelPair, records: tuple[LayerRecord, ...], options: Options) -> Analysis:
    """Make an Analysis of the records that `iter_analysis` yielded."""
    _check_not_zero(pair, records)
    sources, totals = describe(pair)
    return Analysis(
        name=pair.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=__version__,
        sources=sources,
        parameters=options._asdict(),
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


def _identity(pair: ModelPair, options: Options) -> str:
    """SHA-256 of all that decides the records: weights, options, engine."""
    fingerprints = [model.fingerprint for _, model in pair.roles()]
    content = json.dumps([VERSION, __version__, options, fingerprints])
    return hashlib.sha256(content.encode()).hexdigest()


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


def iter_analysis(
    pair: ModelPair,
    options: Options | None = None,
    *,
    device: str = "cpu",
    journal: str | Path | None = None,
) -> Iterator[LayerRecord]:
    """Yield one LayerRecord per matrix and expert, in order; `len(pair.matrices)` x experts.

    While one matrix is decomposed the next is read. What was found is appended to `journal`, a
    file of JSON lines; given again for the same weights and options, its records come from there.
    Errors as for `analyse`.
    """
    options = (options or Options()).check()
    done = _Journal(journal, _identity(pair, options)) if journal is not None else None
    earlier = done.by_matrix() if done else {}
    with torch.inference_mode(), ThreadPoolExecutor(max_workers=1) as reader:
        open_matrices = [m for m in pair.matrices if len(earlier.get(m.name, ())) < len(pair.math)]
        weights = _read_ahead(pair, open_matrices, reader)
        for matrix in pair.matrices:
            if matrix not in open_matrices:
                yield from earlier[matrix.name]
                continue
            for record in _analyse_on(device, matrix, next(weights), options):
                if done:
                    done.append(record)
                yield record


class _Journal:
    """Records on disk as they are made, one JSON line each, after a line that says for what."""

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path, self.records = Path(path), list[LayerRecord]()
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        if not lines or lines[0] != identity:
            self.path.write_text(identity + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                self.records.append(LayerRecord.from_dict(json.loads(line)))
            except ValueError:  # the line that a kill cut short
                break
        kept = [identity, *(json.dumps(record.to_dict()) for record in self.records)]
        self.path.write_text("\n".join(kept) + "\n", encoding="utf-8")

    def append(self, record: LayerRecord) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_dict()) + "\n")

    def by_matrix(self) -> dict[str, list[LayerRecord]]:
        found: dict[str, list[LayerRecord]] = {}
        for record in self.records:
            found.setdefault(record.name, []).append(record)
        return found


# --- one matrix ---


class _Weights(NamedTuple):
    """One matrix of every model, as stored. `root` is the MLLM's base, often the same tensor."""

    mllm: Tensor
    root: Tensor
    base: Tensor
    math: tuple[Tensor, ...]

    def to(self, device: str) -> _Weights:
        base = self.base.to(device)
        root = base if self.root is self.base else self.root.to(device)
        return _Weights(self.mllm.to(device), root, base, tuple(W.to(device) for W in self.math))


def _read_ahead(
    pair: ModelPair, matrices: Iterable[MatrixMatch], reader: ThreadPoolExecutor
) -> Iterator[_Weights]:
    """Yield the weights of each matrix; the next is read while the caller works on this one."""
    waiting: deque[Future[_Weights]] = deque()
    for matrix in matrices:
        waiting.append(reader.submit(_read, pair, matrix))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(pair: ModelPair, matrix: MatrixMatch) -> _Weights:
    base = pair.base.read_matrix(matrix.name)
    shared = pair.base_mllm is pair.base
    return _Weights(
        mllm=pair.mllm.read_matrix(matrix.mllm),
        root=base if shared else pair.base_mllm.read_matrix(matrix.base_mllm),
        base=base,
        math=tuple(
            model.read_matrix(name) for model, name in zip(pair.math, matrix.math, strict=True)
        ),
    )


def _analyse_on(
    device: str, matrix: MatrixMatch, weights: _Weights, options: Options
) -> list[LayerRecord]:
    """Analyse on the device; where its memory does not suffice, this one matrix on the CPU."""
    try:
        return list(_analyse_matrix(matrix, weights.to(device), options))
    except torch.OutOfMemoryError:
        warnings.warn(
            f"'{matrix.name}' {matrix.shape} does not fit the memory of {device}; it is "
            f"decomposed on the CPU, which takes longer.",
            stacklevel=3,
        )
    return list(_analyse_matrix(matrix, weights.to("cpu"), options))


class _Side(NamedTuple):
    """One task vector with its spectrum and the numbers that every record repeats."""

    task_vector: Tensor
    spectrum: spectrum.Spectrum
    norm2: float
    ranks: dict[str, float]
    nuclear: float
    truncated: bool  # the spectrum holds fewer triplets than the matrix has


def _side(tuned: Tensor, base: Tensor, options: Options, name: str) -> _Side:
    change = spectrum.task_vector(tuned, base)
    decomposed = options.decompose(change, name)
    return _Side(
        task_vector=change,
        spectrum=decomposed,
        norm2=_dot(change, change),
        ranks={
            "stable": float(spectrum.stable_rank(decomposed)),
            "effective": float(spectrum.effective_rank(decomposed)),
            "energy": float(spectrum.energy_rank(decomposed)),
        },
        nuclear=float(decomposed.S.double().sum()),
        truncated=len(decomposed.S) < min(change.shape),
    )


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two matrices, accumulated in fp64."""
    return float(torch.dot(a.flatten().double(), b.flatten().double()))


def _analyse_matrix(
    matrix: MatrixMatch, weights: _Weights, options: Options
) -> Iterator[LayerRecord]:
    mllm = _side(weights.mllm, weights.root, options, f"{matrix.name}|mllm")
    norms2 = (_norm2(weights.mllm), _norm2(weights.base))
    floor = spectrum.noise_floor(weights.mllm, weights.root)
    earlier: list[dict[str, Tensor]] = []
    for expert, tuned in enumerate(weights.math):
        math = _side(tuned, weights.base, options, f"{matrix.name}|math {expert}")
        updates = _updates(mllm, math, options.temperature)
        norms = {
            name: UpdateNorms(
                norm2=_dot(update, update),
                inner=_dot(mllm.task_vector, update),
                cross=tuple(_dot(update, other[name]) for other in earlier),
            )
            for name, update in updates.items()
        }
        earlier.append(updates)
        yield _record(matrix, expert, mllm, math, norms, norms2, floor)


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
    norms2: tuple[float, float],
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
        principal=_principal(mllm.spectrum, math.spectrum),
        rho=float(sim.nuclear_ratio(mllm.spectrum, math.spectrum)),
        weight_norm2=norms2[0],
        base_norm2=norms2[1],
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


def _principal(a: spectrum.Spectrum, b: spectrum.Spectrum) -> dict[str, float]:
    """Mean cosine of the principal angles between leading subspaces, for each size that fits."""
    sizes = [k for k in _PRINCIPAL if k <= min(len(a.S), len(b.S))]
    return {str(k): float(sim.principal_cosines(a, b, k).double().mean()) for k in sizes}


def _sample(n: int) -> tuple[int, ...]:
    """At most 48 indices from 1 to n, every one at the start, then evenly spaced in log."""
    steps = torch.logspace(0, float(torch.log10(torch.tensor(float(n)))), _SAMPLES)
    return tuple(sorted({min(n, max(1, round(float(step)))) for step in steps}))


def _rounded(values: Tensor, picked: list[int]) -> tuple[float, ...]:
    """Six significant digits: all that a plot shows, in half the bytes."""
    return tuple(float(f"{float(values[i]):.6g}") for i in picked)
