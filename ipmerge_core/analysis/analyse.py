"""Driver of an analysis: decompose every decoder matrix of a pair once and record the results.

In: a `ModelPair`. Out: an `Analysis` with one `LayerRecord` per matrix and expert: similarities,
norms, inner products, sampled spectra; no weights. Plans and plots need nothing else, so no
slider triggers a decomposition. `iter_analysis` yields the records one by
one and can be closed at any time; `iter_pack_of` is the run that leaves a pack, for Python, the
command line and, from names of models, the app (`iter_pack`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from ipmerge_core.analysis.comparison import Options, compare
from ipmerge_core.analysis.partial import SUFFIX, Journal, PendingMatrix, journal_of
from ipmerge_core.analysis.records import VERSION, Analysis, LayerRecord, Source, Sources, Totals
from ipmerge_core.analysis.update_norms import GAMMA_NORMS
from ipmerge_core.analysis.updates import UpdateStore, Variant
from ipmerge_core.errors import PairingError, PlanError, RunError
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint
from ipmerge_core.models.matrix_kinds import MODULES
from ipmerge_core.models.opening import open_model
from ipmerge_core.models.pairing import MatrixMatch, MatrixWeights, ModelPair, open_pair
from ipmerge_core.runtime.atomic import writing
from ipmerge_core.runtime.devices import free_memory, resolve_device, stream, streams, warn_of_cpu
from ipmerge_core.runtime.paths import expand_path, output_file, output_folder
from ipmerge_core.runtime.pipeline import Load, compute_ahead, read_ahead
from ipmerge_core.spectral.kinds import TEMPERATURE
from ipmerge_core.spectral.similarity import Update
from ipmerge_core.version import __version__

_CHEAP = 1_000_000_000  # bytes of an MLLM whose updates are kept without being requested


def analyse(
    pair: ModelPair,
    *,
    device: str = "cpu",
    rank: int | None = None,
    temperature: float = TEMPERATURE,
    quick: bool = False,
    directions: Literal["existing", "all"] = "existing",
    cache_dir: str | Path | None = None,
) -> Analysis:
    """Decompose every matched matrix once and return all records.

    Args:
        pair: the models, opened by `open_pair`.
        device: a torch device name, or "auto".
        rank: keep only the leading singular triplets; None keeps all.
        temperature: softmax temperature over directions, > 0.
        quick: an approximate preview from the leading directions, see `Options`.
        directions: "existing" (above the rounding noise of the stored weights), or "all".
        cache_dir: a folder in which packs of the same weights and options are reused, and an
            interrupted analysis is resumed.

    Raises:
        PairingError: an expert or the MLLM equals its base, so that there is nothing to compare.
        CheckpointError: a matrix contains NaN or infinity.
    """
    options = Options(rank, temperature, quick, directions).check()
    if cache_dir is None:
        return _assemble(pair, tuple(iter_analysis(pair, options, device=device)), options)
    folder = output_folder(cache_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    pack = folder / (_identity(pair, options)[:32] + ".json.gz")
    if not pack.exists():
        for _ in iter_pack_of(pair, pack, options, device=device):
            pass
    return _of_pair(Analysis.load(pack), pair)


def _of_pair(analysis: Analysis, pair: ModelPair) -> Analysis:
    """Return an analysis of the same weights with the names and folders of this pair."""
    sources, totals = describe(pair)
    return replace(analysis, name=pair.name, sources=sources, totals=totals)


def _assemble(pair: ModelPair, records: tuple[LayerRecord, ...], options: Options) -> Analysis:
    """Create an Analysis from the records that `iter_analysis` yielded."""
    _check_not_zero(pair, records)
    return _with_records(pair, options, records)


def _with_records(pair: ModelPair, options: Options, records: tuple[LayerRecord, ...]) -> Analysis:
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
    """Return the sources of a pair's models and the sizes of the MLLM, from headers."""
    sources = Sources(
        mllm=source_of(pair.mllm),
        base=source_of(pair.base),
        base_mllm=None if pair.base_mllm is pair.base else source_of(pair.base_mllm),
        math=tuple(source_of(expert) for expert in pair.math),
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


def source_of(model: Checkpoint) -> Source:
    """Return the location and fingerprint of a model."""
    local = model.files.revision is None
    name = str(expand_path(model.id).absolute()) if local else model.id
    return Source(name, model.files.revision, model.fingerprint, model.content)


def _identity(pair: ModelPair, options: Options) -> str:
    """Return the SHA-256 of everything that determines the records: weights, options, engine."""
    fingerprints = [[model.fingerprint, model.content] for _, model in pair.roles()]
    # Matrices beyond those that packs have always had; without any, the identity is as before.
    more = [matrix.name for matrix in pair.matrices if matrix.module not in MODULES]
    content = json.dumps([VERSION, __version__, options, fingerprints, *([more] if more else [])])
    return hashlib.sha256(content.encode()).hexdigest()


def _check_not_zero(pair: ModelPair, records: tuple[LayerRecord, ...]) -> None:
    if not any(record.mllm_norm2 for record in records):
        raise PairingError(
            f"The decoder of the mllm '{pair.mllm.id}' equals its base '{pair.base_mllm.id}': its "
            f"task vector is zero. Use the base that it was trained from."
        )
    for number, expert in enumerate(pair.math):
        if not any(record.math_norm2 for record in records if record.expert == number):
            raise PairingError(
                f"The math model '{expert.id}' equals the base '{pair.base.id}': its task vector "
                f"is zero. Use a fine-tuned model as math, or its original base as base."
            )


def iter_analysis(
    pair: ModelPair,
    options: Options | None = None,
    *,
    device: str = "cpu",
    journal: str | Path | None = None,
    updates: str | Path | None = None,
) -> Iterator[LayerRecord]:
    """Yield one LayerRecord per matrix and expert, in order; `len(pair.matrices)` x experts.

    Reads the next matrices while others are decomposed. Results are appended to `journal`, a file
    of JSON lines; if it contains records of the same weights and options, they are reused. The
    updates of IP-Merging are kept in the folder `updates`, see `analysis.updates`. Errors as for
    `analyse`; PlanError if updates cannot be kept with these options.
    """
    options, device = (options or Options()).check(), resolve_device(device)
    stores = _stores(updates, pair, options, device)
    done = _open_journal(Path(journal), pair, options) if journal is not None else None
    found = done.records if done else {}
    waiting = [matrix for matrix in pair.matrices if matrix.name not in found]
    with closing(_analyse_each(pair, waiting, device, options, stores)) as fresh:
        for matrix in pair.matrices:
            if matrix.name in found:
                yield from found[matrix.name]
                continue
            records = next(fresh)
            if done:
                done.append(records)
            yield from records


def _stores(
    folder: str | Path | None, pair: ModelPair, options: Options, device: str
) -> dict[str, UpdateStore]:
    """Open the folders of kept updates by `gamma_norm`; none if they are not wanted.

    Raises: PlanError for an analysis of leading directions.
    """
    if folder is None:
        return {}
    if options.triplets is not None:
        raise PlanError(
            "An analysis of leading directions (a rank, or quick) does not compute the updates of "
            "a merge, so that it cannot keep them. Analyse all directions, or do not keep updates."
        )
    where, variants = output_folder(folder), kept_variants(options)
    return {norm: UpdateStore(where, pair, found, device) for norm, found in variants.items()}


def kept_variants(options: Options) -> dict[str, Variant]:
    """Return the variants of IP-Merging whose updates an analysis can keep, by `gamma_norm`."""
    variant = Variant(options.temperature, "sum", "softmax", 64, None, options.directions)
    return {norm: variant._replace(gamma_norm=norm) for norm in GAMMA_NORMS}


def _open_journal(path: Path, pair: ModelPair, options: Options) -> Journal:
    places = [PendingMatrix(m.layer, m.module, comparing_cost(m.shape)) for m in pair.matrices]
    return Journal(
        path, _identity(pair, options), _with_records(pair, options, ()).to_dict(), places
    )


def comparing_cost(shape: tuple[int, int]) -> int:
    """Return the relative cost of analysing one matrix, m n min(m, n), used for progress."""
    return prod(shape) * min(shape)


# --- the analysis as a run: a pack on disk ---


class AnalysisStep(NamedTuple):
    """How far a run of `iter_pack_of` is, in matrices and in cost.

    `cost_before` is the cost finished by an earlier run of the same work.
    """

    number: int
    total: int
    matrix: str
    cost_done: int
    cost_before: int
    cost_total: int


def iter_pack(
    mllm: str,
    math: Sequence[str],
    base: str,
    out: str | Path,
    *,
    base_mllm: str | None = None,
    rank: int | None = None,
    temperature: float = TEMPERATURE,
    quick: bool = False,
    directions: Literal["existing", "all"] = "existing",
    device: str = "cpu",
    hub_only: bool = False,
    updates: str | Path | None = None,
) -> Iterator[AnalysisStep]:
    """Open models by name and analyse them into the new pack `out`, see `iter_pack_of`.

    Updates are kept only where that is cheap: of all directions, and for an MLLM of at most 1 GB.

    Raises:
        PairingError: the sibling check refuses the models, or a task vector is zero.
        CheckpointError: a model cannot be opened, or, with `hub_only`, is not a hub id.
        PlanError: the device is not available.
        RunError: `out` exists, or there is too little memory.
    """
    options, device = Options(rank, temperature, quick, directions).check(), resolve_device(device)
    out = output_file(out, suffix=SUFFIX)  # a fault before any model is opened
    if out.exists():
        raise RunError(f"'{out}' already exists. Choose another name for the pack.")
    opened = partial(open_model, hub_only=hub_only)
    own, root = opened(base_mllm) if base_mllm else None, opened(base)
    experts = [opened(name, base=root) for name in math]
    pair = open_pair(opened(mllm), experts, root, base_mllm=own)
    pair.require_common_base()
    is_cheap = options.triplets is None and pair.mllm.nbytes <= _CHEAP
    kept = updates if is_cheap else None
    yield from iter_pack_of(pair, out, options, device=device, updates=kept)


def iter_pack_of(
    pair: ModelPair,
    out: Path,
    options: Options,
    *,
    device: str = "cpu",
    updates: str | Path | None = None,
) -> Iterator[AnalysisStep]:
    """Analyse a pair into the pack `out`, step by step; resume an interrupted run.

    Records are kept in a journal (see `journal_of`) until the pack is complete. With a folder for
    `updates`, those of IP-Merging are kept there (see `analysis.updates`). Raises: as `analyse`;
    RunError if the pack cannot be written; PairingError if a model's weights are written during the
    run; PlanError if updates cannot be kept with these options.
    """
    device = resolve_device(device)  # a fault before any file
    out = output_file(out, suffix=SUFFIX)
    stamps = pair.stamps()
    costs = [comparing_cost(matrix.shape) for matrix in pair.matrices]
    journal = _open_journal(journal_of(out), pair, options)
    before = sum(costs[: len(journal.records)])
    step = AnalysisStep(len(journal.records), len(costs), "", before, before, sum(costs))
    yield step
    records: list[LayerRecord] = []
    analysed = iter_analysis(pair, options, device=device, journal=journal.path, updates=updates)
    for record in analysed:
        records.append(record)
        number = len(records) // len(pair.math)
        if record.expert == len(pair.math) - 1 and number > step.number:
            done = sum(costs[:number])
            step = step._replace(number=number, matrix=record.name, cost_done=done)
            yield step
    try:
        pair.check_unchanged(stamps)
        _assemble(pair, tuple(records), options).save(out)
    except PairingError:  # the records are of no use
        journal.path.unlink()
        raise
    journal.path.unlink()


# --- the pipeline: read, decompose, in order ---


def _analyse_each(
    pair: ModelPair,
    matrices: Sequence[MatrixMatch],
    device: str,
    options: Options,
    stores: Mapping[str, UpdateStore],
) -> Generator[list[LayerRecord]]:
    """Yield the records of each matrix in order, with concurrent decompositions and reads."""
    workers = _workers(device, max((working_set(pair, m, options) for m in matrices), default=0))
    if workers == 0:
        device, workers = "cpu", 1
    loads = [Load(_stored_bytes(pair, matrix), partial(pair.read, matrix)) for matrix in matrices]
    # One in use and the next one, for each concurrent decomposition.
    ahead = (1 + workers) * max((load.nbytes for load in loads), default=0)

    def compared(read: tuple[MatrixMatch, MatrixWeights]) -> list[LayerRecord]:
        return _analyse_on(device, *read, options, stores)

    with (
        closing(read_ahead(loads, ahead, max(workers, pair.pace.threads))) as weights,
        closing(compute_ahead(compared, zip(matrices, weights, strict=True), workers)) as found,
    ):
        yield from found


def _workers(device: str, working_set: int) -> int:
    """Return how many matrices to decompose concurrently; 0, with a warning, to use the CPU.

    Raises: RunError if no device can hold the largest matrix.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        if workers := streams(device, working_set):
            return workers
        free = free_memory(device)
        warnings.warn(
            f"The largest matrix needs about {working_set / 1e9:.1f} GB and {device} has "
            f"{free / 1e9:.1f} GB free; falling back to the CPU, which is slower.",
            stacklevel=4,
        )
    free = psutil.virtual_memory().available
    if working_set > free:
        raise RunError(
            f"Decomposing the largest matrix needs about {working_set / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free. Use quick (leading directions only), which needs less, "
            f"or a machine with more memory."
        )
    return 0 if on_gpu else 1


def working_set(pair: ModelPair, matrix: MatrixMatch, options: Options) -> int:
    """Return the bytes of one decomposition: weights and factors in fp32, Grams in fp64."""
    m, n = matrix.shape
    gram = 0 if options.quick else 8 * 4 * min(m, n) ** 2
    return 4 * m * n * (4 + 3 * len(pair.math)) + gram


def _stored_bytes(pair: ModelPair, matrix: MatrixMatch) -> int:
    experts = sum(model.read_size(name) for model, name in zip(pair.math, matrix.math, strict=True))
    return 2 * pair.mllm.read_size(matrix.mllm) + experts


def _analyse_on(
    device: str,
    matrix: MatrixMatch,
    weights: MatrixWeights,
    options: Options,
    stores: Mapping[str, UpdateStore],
) -> list[LayerRecord]:
    """Analyse one matrix on the device, or on the CPU if the device runs out of memory.

    Updates are those of the device, so that only those computed on it are kept.
    """

    def leave(updates: Mapping[str, Sequence[Update]]) -> None:
        for gamma_norm, store in stores.items():
            store.write(matrix.name, updates[gamma_norm])

    with torch.inference_mode():
        try:
            with stream(device):
                return list(compare(matrix, weights.to(device), options, leave if stores else None))
        except torch.OutOfMemoryError:
            warn_of_cpu(device, matrix.name, matrix.shape)
        return list(compare(matrix, weights.to("cpu"), options))
