"""Merge in memory: the tensors that a merge would change, without a folder.

In: a plan. Out: one tensor at a time, with exactly the bytes that `merge` writes for it. Everything
else of the merged model is the MLLM's, so that a loaded MLLM becomes the merged model when these
tensors are put in its place (`inference.shared_weights`).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ipmerge_core.errors import CheckpointError, RunCancelled
from ipmerge_core.merging.computing import PartMerger, find_updates
from ipmerge_core.merging.parts import Part, parts, work_of
from ipmerge_core.merging.whole_model import FirstPassStep, is_due, run_first_pass
from ipmerge_core.methods.declarations import relayed
from ipmerge_core.models.checkpoint import Checkpoint, TensorSpec, as_tensor
from ipmerge_core.models.pairing import TO_FORCE, ModelPair
from ipmerge_core.models.writer import in_file_order
from ipmerge_core.planning.plan import MergePlan, reopen
from ipmerge_core.runtime.devices import resolve_device
from ipmerge_core.runtime.pipeline import with_reports


class MergedTensor(NamedTuple):
    """A merged tensor by the name it has in the MLLM's files, and how far the merge is.

    `tensor` has the stored dtype and shape, on the CPU. It is None for a step of the first pass
    ("measuring") or within a tensor that takes long ("merging").
    """

    name: str
    tensor: Tensor | None
    number: int
    total: int
    nbytes_done: int
    nbytes_total: int
    action: str = "merged"


class InMemoryCost(NamedTuple):
    """What a merge in memory needs: its tensors, their bytes, and those of the whole model."""

    tensors: int
    nbytes: int
    model_nbytes: int


def in_memory_cost(plan: MergePlan, pair: ModelPair | None = None) -> InMemoryCost:
    """Return the size of the merged tensors, from headers.

    Raises: as `reopen`.
    """
    pair = pair or reopen(plan)
    touched = work_of(plan, pair)
    nbytes = sum(pair.mllm.spec(name).nbytes for name in touched)
    return InMemoryCost(len(touched), nbytes, pair.mllm.nbytes)


def iter_merged_tensors(
    plan: MergePlan,
    *,
    device: str = "cpu",
    force: bool = False,
    updates: str | Path | None = None,
    stops: Sequence[threading.Event] = (),
) -> Iterator[MergedTensor]:
    """Yield every tensor that a merge changes, in file order, as `merge` would write it.

    Nothing is written. Only one tensor is held at a time, if the caller does not keep them.

    Args:
        plan: the plan; its sources are opened again and compared by fingerprint.
        device: a torch device name, or "auto".
        force: merge even if the sibling check refuses the models.
        updates: a folder of kept updates of IP-Merging, see `merge`.
        stops: events that cancel the merge before its next tensor.

    Raises:
        PairingError, CheckpointError, PlanError, RunError: as `iter_merge`.
        RunCancelled: one of the events was set.
    """
    where = torch.device(resolve_device(device))
    measurements = plan.calibration.open() if plan.calibration else None
    pair = reopen(plan)
    before = pair.stamps()
    pair.require_common_base(TO_FORCE, force=force)
    kept = find_updates(plan, pair, updates, where)
    merger = PartMerger(plan, pair, where, measurements, updates=kept)
    merger.statistic = merger.known_statistic()
    if is_due(plan):
        merger.statistic = yield from _first_pass(merger, stops)
    for step in _merged(merger, stops):
        _check(stops)
        yield step
    pair.check_unchanged(before)


def _first_pass(
    merger: PartMerger, stops: Sequence[threading.Event]
) -> Generator[MergedTensor, None, tuple[float, ...]]:
    def step(found: FirstPassStep) -> MergedTensor:
        _check(stops)
        return MergedTensor(found.tensor, None, *found[1:], action="measuring")

    steps = run_first_pass(merger.plan, merger.pair, merger.device, merger.workers)
    return (yield from relayed(steps, step))


def _merged(merger: PartMerger, stops: Sequence[threading.Event]) -> Iterator[MergedTensor]:
    pair = merger.pair
    work = work_of(merger.plan, pair)
    specs = [spec for spec in in_file_order(pair.mllm) if spec.name in work]
    most = pair.pace.piece
    cut = [p for s in specs for p in parts(s, work[s.name], most, local=merger.is_local)]
    done, number, total = 0, 0, sum(spec.nbytes for spec in specs)
    data = bytearray()
    with closing(merger.results(cut)) as results:
        for part, result in results:
            _check(stops)
            if isinstance(result, bytearray):
                piece = result
            else:
                within = partial(_within, part, done, (number, len(specs)), total)
                piece = yield from relayed(with_reports(result), within)
            data += piece
            if part.stop < part.spec.nbytes:
                continue
            number, done = number + 1, done + part.spec.nbytes
            tensor = _as_stored(data, part.spec)
            data = bytearray()
            yield MergedTensor(part.spec.name, tensor, number, len(specs), done, total)


def _within(
    part: Part, done: int, counts: tuple[int, int], total: int, share: float
) -> MergedTensor:
    at = done + part.start + int(share * (part.stop - part.start))
    return MergedTensor(part.spec.name, None, *counts, at, total, action="merging")


def _as_stored(data: bytearray, spec: TensorSpec) -> Tensor:
    return as_tensor(data, spec.dtype).reshape(spec.shape)


def changed_tensors(folder: str | Path, mllm: Checkpoint) -> Iterator[MergedTensor]:
    """Yield the tensors of a finished model folder that differ from those of the MLLM.

    Both must have the same tensors, as a merge writes them. All bytes are compared.

    Raises: CheckpointError for a folder with other tensors.
    """
    other = Checkpoint.open(folder)
    if {n: s.shape for n, s in other.tensors.items()} != {
        n: s.shape for n, s in mllm.tensors.items()
    }:
        raise CheckpointError(
            f"'{other.id}' does not have the tensors of '{mllm.id}', so that they cannot share "
            f"any. Load it as a model of its own."
        )
    specs = in_file_order(mllm)
    total, done = sum(spec.nbytes for spec in specs), 0
    for number, spec in enumerate(specs, 1):
        done += spec.nbytes
        new = other.read(spec.name)
        old = mllm.read(spec.name)
        same = new.dtype == old.dtype and torch.equal(_bits(new), _bits(old))
        yield MergedTensor(spec.name, None if same else new, number, len(specs), done, total)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _check(stops: Sequence[threading.Event]) -> None:
    if any(event.is_set() for event in stops):
        raise RunCancelled("Stopped while the plan was being merged.")
