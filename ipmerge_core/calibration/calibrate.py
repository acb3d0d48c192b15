"""Driver of a calibration: run each model on its samples and store Gram matrices or gradients.

In: a pair, samples for the MLLM and for the experts, and `CalibrationSettings`: "gram" (inputs of
every decoder matrix) or "fisher" (squared gradients). Out: a folder that `store` reads. Layers are
processed in groups that fit the memory budget, and every finished group is written to disk, so that
a run can be resumed. `passes` implements the passes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ipmerge_core.calibration.passes import CalibrationSettings, Passes, find_module
from ipmerge_core.calibration.samples import DEMO, Sample, digest, load_samples
from ipmerge_core.calibration.store import RECORD, Kind, Measured, Measurements
from ipmerge_core.errors import IPMergeError, PairingError, PlanError, RunError
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.models.pairing import MatrixMatch, ModelPair, open_pair
from ipmerge_core.runtime.atomic import atomic_path, is_temporary, write_whole, writing
from ipmerge_core.runtime.devices import AUTO, resolve_device
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    Count,
    FileKind,
    InvalidContentError,
    Magnitude,
    Number,
    Schema,
    parse_json,
)
from ipmerge_core.runtime.paths import existing_parent, output_folder

if TYPE_CHECKING:
    from ipmerge_core.models.checkpoint import Checkpoint

# Matrices of a block with the same input, by the one that names the Gram matrix.
_READS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}


class CalibrationStep(NamedTuple):
    """One sample was processed by one model for one group of layers."""

    role: str
    group: int
    groups: int
    done: int
    total: int
    action: Literal["measured", "resumed"]


class CalibrationCost(NamedTuple):
    """Resources required by a calibration, from headers. Sizes in bytes."""

    nbytes_model: int  # the largest model as stored
    nbytes_held: int  # measurements in memory at once
    nbytes_written: int
    nbytes_free: int
    passes: int  # samples times groups, over all models


class Target(NamedTuple):
    """One measurement: the matrix at which it is measured, and all matrices that share it."""

    matrix: MatrixMatch
    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in fp32."""
        return 4 * prod(self.shape)


def calibrate(
    pair: ModelPair,
    out: str | Path,
    settings: CalibrationSettings,
    mllm_samples: Sequence[Sample],
    math_samples: Sequence[Sample],
    *,
    device: str = "cpu",
) -> Measurements:
    """Calibrate all models and return the measurements; see `iter_calibration`."""
    samples = mllm_samples, math_samples
    for _ in iter_calibration(pair, out, settings, *samples, device=device):
        pass
    return Measurements.open(out)


def iter_calibration(
    pair: ModelPair,
    out: str | Path,
    settings: CalibrationSettings,
    mllm_samples: Sequence[Sample],
    math_samples: Sequence[Sample],
    *,
    device: str = "cpu",
    sources: tuple[str, str] = ("", ""),
) -> Iterator[CalibrationStep]:
    """Calibrate the MLLM on its samples and every expert on the text samples.

    Math:   gram: G = sum over tokens of x x^T / tokens, x the inputs of a matrix, in fp32.
            fisher: F = mean over samples of (d NLL / dW)^2, NLL the mean over the answer's tokens,
            which are sampled from the model ("sampled") or given ("empirical").

    Args:
        pair: the models, as returned by `open_pair`.
        out: a folder for the measurements; a run with the same settings, models and samples is
            resumed.
        settings: what to measure and how.
        mllm_samples: samples for the MLLM, optionally with images.
        math_samples: text samples for every expert.
        device: a torch device name, or "auto".
        sources: where the samples were read from, to be recorded: of the MLLM and of the experts.

    Raises:
        PlanError: there are no samples, an answer required for the Fisher information is missing,
        or
            the device is not available.
        PairingError: the weights of a model are written during the run.
        RunError: the folder contains another calibration, or there is too little disk space.
        ModelLoadError: a model cannot be loaded, or its matrices are not found in it.
    """
    device, out = resolve_device(device, fp64=False), output_folder(out)
    work = _plan_work(pair, settings, mllm_samples, math_samples, sources)
    cost = estimate_calibration(pair, out, settings, len(mllm_samples), len(math_samples))
    with _removed_if_nothing_was_measured(out):
        _claim(out, settings, work, cost)
        yield from _measure_all(pair, out, settings, work, device)


def _measure_all(
    pair: ModelPair,
    out: Path,
    settings: CalibrationSettings,
    work: Sequence[_Share],
    device: str,
) -> Iterator[CalibrationStep]:
    """Measure every model and write the calibration; parts of an earlier run are kept."""
    before = pair.stamps()
    models = []
    total = sum(len(share.groups) * len(share.samples) for share in work)
    done = 0
    for share in work:
        loaded: LoadedModel | None = None
        for number, group in enumerate(share.groups):
            file = out / share.file(number)
            if file.exists():
                done += len(share.samples)
                yield CalibrationStep(share.role, number, len(share.groups), done, total, "resumed")
                continue
            loaded = loaded or load_model(share.checkpoint.files.local_folder(), device)
            layers = [
                find_module(loaded, share.checkpoint, share.names[target.matrix.name])
                for target in group
            ]
            shapes = [target.shape for target in group]
            passes = Passes(loaded, layers, shapes, settings, share.role)
            for index, sample in enumerate(share.samples):
                passes.add(index, sample)
                done += 1
                yield CalibrationStep(
                    share.role, number, len(share.groups), done, total, "measured"
                )
            _save(file, group, passes)
        del loaded
        models.append(_measured(out, share))
    try:
        pair.check_unchanged(before)
    except PairingError:  # the measurements are of no use
        for entry in out.iterdir():
            entry.unlink()
        raise
    created = datetime.now(UTC).isoformat(timespec="seconds")
    Measurements(out, settings.kind, asdict(settings), tuple(models), created).save()
    (out / _CLAIM).unlink()


def iter_calibration_of(
    *,
    mllm: str,
    math: Sequence[str],
    base: str,
    base_mllm: str | None,
    out: str,
    kind: Kind,
    mllm_samples: str = DEMO,
    math_samples: str = DEMO,
    limit: int = 500,
    device: str = AUTO,
) -> Iterator[CalibrationStep]:
    """Open the models, load the samples, and calibrate; takes plain values, for use in jobs.

    Args and Raises: as for `open_pair`, `load_samples` and `iter_calibration`.
    """
    pair = open_pair(mllm, math, base, base_mllm=base_mllm)
    for_mllm = load_samples(mllm_samples, limit, takes_images=True)
    for_math = load_samples(math_samples, limit, takes_images=False)
    settings = CalibrationSettings(kind)
    yield from iter_calibration(
        pair,
        out,
        settings,
        for_mllm,
        for_math,
        device=device,
        sources=(mllm_samples, math_samples),
    )


def estimate_calibration(
    pair: ModelPair, out: str | Path, settings: CalibrationSettings, n_mllm: int, n_math: int
) -> CalibrationCost:
    """Estimate memory, disk space and passes from headers, without loading models."""
    targets = _targets(pair, settings)
    groups = _groups(targets, settings.memory)
    models = [pair.mllm, *pair.math]
    whole = sum(target.nbytes for target in targets)
    return CalibrationCost(
        nbytes_model=max(model.nbytes for model in models),
        nbytes_held=max(sum(target.nbytes for target in group) for group in groups),
        nbytes_written=whole * len(models),
        nbytes_free=shutil.disk_usage(existing_parent(output_folder(out))).free,
        passes=len(groups) * (n_mllm + n_math * len(pair.math)),
    )


# --- measurements and groups ---


@dataclass(frozen=True)
class _Share:
    """The work for one model."""

    role: str
    checkpoint: Checkpoint
    samples: Sequence[Sample]
    groups: list[list[Target]]
    names: dict[str, str] = field(hash=False)  # the pair's name of a matrix -> this model's
    source: str = ""  # where the samples were read from

    @cached_property
    def digest(self) -> str:
        """The content of the samples."""
        return digest(self.samples)

    def file(self, group: int) -> str:
        return f"{self.role.replace(' ', '')}-{group:03}.safetensors"


def _targets(pair: ModelPair, settings: CalibrationSettings) -> list[Target]:
    observed = [matrix for matrix in pair.matrices if matrix.module in _READS]
    if settings.kind == "fisher":
        return [Target(matrix, (matrix.name,), matrix.shape) for matrix in observed]
    shared: dict[tuple[int, str], list[MatrixMatch]] = {}
    for matrix in observed:
        shared.setdefault((matrix.layer, _READS[matrix.module]), []).append(matrix)
    targets = []
    for (_, module), matrices in shared.items():
        n = matrices[0].shape[1]
        diagonal = settings.wide == "diagonal" and module == "down"
        names = tuple(matrix.name for matrix in matrices)
        targets.append(Target(matrices[0], names, (n,) if diagonal else (n, n)))
    return targets


def _groups(targets: Sequence[Target], memory: int) -> list[list[Target]]:
    """Split targets into groups that fit the budget; a larger target is its own group."""
    groups: list[list[Target]] = [[]]
    room = memory
    for target in targets:
        if groups[-1] and target.nbytes > room:
            groups.append([])
            room = memory
        groups[-1].append(target)
        room -= target.nbytes
    return groups


def _plan_work(
    pair: ModelPair,
    settings: CalibrationSettings,
    mllm_samples: Sequence[Sample],
    math_samples: Sequence[Sample],
    sources: tuple[str, str],
) -> list[_Share]:
    for role, samples in (("MLLM", mllm_samples), ("math models", math_samples)):
        if not samples:
            raise PlanError(f"No calibration samples for the {role}; expected at least one.")
        missing = [number for number, sample in enumerate(samples, 1) if not sample.answer]
        if settings.kind == "fisher" and missing:
            raise PlanError(
                f"Sample {missing[0]} for the {role} has no answer, which the Fisher information "
                f"requires. Add an answer to every sample."
            )
    groups = _groups(_targets(pair, settings), settings.memory)
    named = {m.name: m.mllm for m in pair.matrices}
    shares = [_Share("mllm", pair.mllm, mllm_samples, groups, named, sources[0])]
    for k, expert in enumerate(pair.math):
        role = "math" if len(pair.math) == 1 else f"math {k + 1}"
        names = {m.name: m.math[k] for m in pair.matrices}
        shares.append(_Share(role, expert, math_samples, groups, names, sources[1]))
    return shares


# --- the folder ---

_CLAIM = "calibration.partial.json"
_UNFINISHED = FileKind(
    "the record of an unfinished calibration",
    "Delete the folder, or choose another one.",
    RunError,
)


class _Totals(NamedTuple):
    """The sums of a group: squares, tokens, and values (not in older files)."""

    squares: Magnitude
    tokens: Count
    values: Number | None = None


_TOTALS = Schema[_Totals](_Totals)
_CONTENT = Schema[dict[str, Any]](dict[str, Any])


def _claim(
    out: Path, settings: CalibrationSettings, work: Sequence[_Share], cost: CalibrationCost
) -> None:
    """Create the folder, or check that it contains an unfinished run of the same work."""
    wanted = {
        "settings": asdict(settings),
        "models": [[s.role, s.checkpoint.fingerprint, s.digest] for s in work],
        "contents": [s.checkpoint.content for s in work],
    }
    if out.exists() and not all(is_temporary(entry) for entry in out.iterdir()):
        claim = out / _CLAIM
        before = _UNFINISHED.load(_CONTENT, claim) if claim.is_file() else {}
        if not before or {"contents": wanted["contents"], **before} != wanted:
            what = "a finished calibration" if (out / RECORD).exists() else "other files"
            raise RunError(
                f"'{out}' already contains {what}, or a run with other settings, models or "
                f"samples. Choose another folder or delete it."
            )
        return
    if cost.nbytes_written > cost.nbytes_free:
        raise RunError(
            f"The measurements need {cost.nbytes_written / 1e9:.1f} GB at '{out}' and "
            f"{cost.nbytes_free / 1e9:.1f} GB are free. Free some space, choose another folder, or "
            f"keep only the diagonal of wide Gram matrices."
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_whole(out / _CLAIM, json.dumps(wanted))


@contextmanager
def _removed_if_nothing_was_measured(out: Path) -> Iterator[None]:
    """Remove a new folder if the run fails before its first measurement."""
    is_new = not out.exists()
    try:
        yield
    except IPMergeError:
        if is_new and out.is_dir() and [entry.name for entry in out.iterdir()] == [_CLAIM]:
            (out / _CLAIM).unlink()
            out.rmdir()
        raise


def _save(file: Path, group: Sequence[Target], passes: Passes) -> None:
    """Write the means of a group atomically."""
    from safetensors.torch import save_file

    means = passes.means()
    squares = sum(float(mean.double().square().sum()) for mean in means)
    total = sum(float(mean.double().sum()) for mean in means)
    tensors = {target.matrix.name: mean for target, mean in zip(group, means, strict=True)}
    totals = json.dumps(
        [squares, passes.tokens, total]
    )  # one key: the order of several is not defined
    with writing(file, "finished groups of layers are kept"), atomic_path(file) as temporary:
        save_file(tensors, temporary, {"totals": totals})


def _read_totals(path: Path, names: set[str]) -> _Totals:
    """Read the sums of a group's file. Raises: RunError if it is damaged or of other matrices."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as content:
            stored, metadata = set(content.keys()), content.metadata() or {}
        if stored != names:
            raise InvalidContentError(f"it has {len(stored)} matrices; expected {len(names)}")
        return _TOTALS.validate(parse_json(metadata.get("totals", ""), MEGABYTE))
    except (OSError, SafetensorError, InvalidContentError) as error:
        raise RunError(
            f"'{path}' is not a part of this calibration: {error}. Delete it and run again."
        ) from error


def _measured(out: Path, share: _Share) -> Measured:
    places: dict[str, tuple[str, str]] = {}
    squares, tokens, sums = 0.0, 0, list[float]()
    for number, group in enumerate(share.groups):
        file = share.file(number)
        found = _read_totals(out / file, {target.matrix.name for target in group})
        squares, tokens = squares + found.squares, found.tokens
        sums += [] if found.values is None else [found.values]
        for target in group:
            places |= dict.fromkeys(target.names, (file, target.matrix.name))
    size = sum(prod(target.shape) for group in share.groups for target in group)
    return Measured(
        role=share.role,
        id=share.checkpoint.id,
        fingerprint=share.checkpoint.fingerprint,
        content=share.checkpoint.content,
        samples=len(share.samples),
        tokens=tokens,
        norm=squares**0.5,
        places=places,
        mean=sum(sums) / size if len(sums) == len(share.groups) else None,
        source=share.source,
        samples_digest=share.digest,
    )
