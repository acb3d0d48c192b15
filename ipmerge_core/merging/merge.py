"""Driver of a merge: read, merge and write one tensor at a time.

In: a `MergePlan`. Out: a folder with the MLLM's files, names, order, shapes and dtypes, in which
the selected matrices are replaced and all other bytes are identical to the MLLM's, plus a manifest
`ipmerge.json` and a model card. Reads and writes overlap with computing within a memory budget;
with `torchrun` or `accelerate launch` the tensors are distributed over processes. `iter_merge` is a
generator that yields a step per tensor: closing it stops the run and keeps finished tensors for a
resume.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ipmerge_core.errors import IPMergeError, PairingError, RunError
from ipmerge_core.merging.computing import PartMerger, find_updates
from ipmerge_core.merging.estimates import Estimate, check_space, estimate_merge, merging_cost
from ipmerge_core.merging.manifest import attempt_of, manifest_of
from ipmerge_core.merging.model_card import write_card
from ipmerge_core.merging.parts import (
    Part,
    Work,
    parts,
    work_of,
)
from ipmerge_core.merging.provenance import is_finished, read_manifest
from ipmerge_core.merging.steps import (
    Action,
    MergeStep,
    StepCount,
    measured_step,
    steps_of_finished,
)
from ipmerge_core.merging.whole_model import is_due, run_first_pass
from ipmerge_core.methods.declarations import relayed
from ipmerge_core.models.checkpoint import TensorSpec
from ipmerge_core.models.files import FROM_DISK
from ipmerge_core.models.pairing import TO_FORCE, Finding, ModelPair
from ipmerge_core.models.writer import (
    MANIFEST,
    CheckpointWriter,
    check_output,
    in_file_order,
    tidy_finished,
)
from ipmerge_core.planning.plan import MergePlan, reopen, require_common_base
from ipmerge_core.runtime.devices import resolve_device
from ipmerge_core.runtime.input_files import Number, Schema
from ipmerge_core.runtime.pipeline import (
    WriteBehind,
    with_reports,
)
from ipmerge_core.runtime.processes import Ranks, share_out

_AUDITORS = 4  # threads that read the result back; more are limited by memory bandwidth

Documents: TypeAlias = Callable[[], dict[str, str]]


__all__ = [
    "MANIFEST",
    "Estimate",
    "MergeStep",
    "estimate_merge",
    "iter_merge",
    "merge",
    "reopen",
    "require_common_base",
]


def merge(
    plan: MergePlan,
    out: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    force: bool = False,
    updates: str | Path | None = None,
) -> dict[str, Any]:
    """Execute a plan and return the manifest; see `iter_merge`."""
    for _ in iter_merge(plan, out, device=device, resume=resume, force=force, updates=updates):
        pass
    return read_manifest(out)


def iter_merge(
    plan: MergePlan,
    out: str | Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    force: bool = False,
    updates: str | Path | None = None,
) -> Iterator[MergeStep]:
    """Write the merged model of `plan` to the new folder `out`, yielding after each tensor.

    Selected matrices are read in their stored dtype, merged in fp32 (fp64 if stored as fp64) and
    cast once, rounding to nearest even. Everything else is copied as bytes. Two runs of one plan
    produce identical bytes on one device type, for any number of processes. With `torchrun` or
    `accelerate launch`, each process merges its share and yields the steps of that share.

    Args:
        plan: the plan; its sources are opened again and compared by fingerprint.
        out: a folder that does not exist, is empty, or contains the finished model of this plan. It
            appears when the model is complete; a mount point is filled, its config.json last.
        device: a torch device name, or "auto".
        resume: continue an unfinished run of the same plan; a finished one is not repeated.
        force: merge even if the sibling check refuses the models; the manifest lists its findings.
        updates: a folder of kept updates of IP-Merging (see `analysis.updates`). Those of the same
            models, variant and device type are used instead of decomposing again; the merged bytes
            are the same. Ignored by other methods.

    Raises:
        CheckpointError: `out` is not empty, or a source cannot be used.
        PairingError: a source differs from the plan's, or is written during the run, or the
            sibling check refuses the models.
        PlanError: the plan's calibration has changed, or the device is not available.
        RunError: the output cannot be written, another run is writing to it, a source cannot be
            read completely, or another process of this run failed.
    """
    device = resolve_device(device)
    measurements = plan.calibration.open() if plan.calibration else None
    if resume and is_finished(plan, out):
        tidy_finished(out)
        yield from steps_of_finished(out)
        return
    out = check_output(out)
    pair = reopen(plan)
    before = pair.stamps()
    findings = pair.require_common_base(TO_FORCE, force=force)
    check_space(pair, out)
    started = time.perf_counter()
    with Ranks() as ranks, ExitStack() as stack:
        writer = CheckpointWriter(pair.mllm, out, plan.digest, resume=resume, rank=ranks.rank)
        writer.done = ranks.led(lambda: stack.enter_context(writer).done)
        if ranks.rank:
            stack.enter_context(writer)
        target = torch.device(ranks.device(device))
        kept = find_updates(plan, pair, updates, target)
        merger = PartMerger(plan, pair, target, measurements, ranks.cores, kept)
        run = _Run(plan, pair, merger, writer, ranks)
        if not ranks.rank:
            run.note_attempt()
        failure: IPMergeError | None = None
        try:
            yield from run.steps()
        except IPMergeError as error:
            failure = error
        run.conclude(
            failure,
            lambda: _documents(run, findings, time.perf_counter() - started),
            lambda: pair.check_unchanged(before),
        )


@dataclass
class _Run:
    """The share of one process in a merge, between an entered writer and the finished folder."""

    plan: MergePlan
    pair: ModelPair
    merger: PartMerger
    writer: CheckpointWriter
    ranks: Ranks
    attempts: list[dict[str, Any]] = field(default_factory=list)  # of this run, the newest last

    def steps(self) -> Iterator[MergeStep]:
        """Merge and write the tensors of this process, yielding after each, and read them back."""
        work = work_of(self.plan, self.pair)
        specs = self._mine(in_file_order(self.pair.mllm), work)
        count = StepCount(len(specs), sum(spec.nbytes for spec in specs))
        todo = [spec for spec in specs if spec.name not in self.writer.done]
        pace = self.pair.pace
        cut = [
            part
            for spec in todo
            for part in parts(spec, work.get(spec.name, []), pace.piece, local=self.merger.is_local)
        ]
        yield from self._first_pass(idle=not any(part.merged for part in cut))
        for spec in specs:
            if spec.name in self.writer.done:
                yield count.step(spec, "resumed")
        with (
            WriteBehind[MergeStep | None](FROM_DISK.ahead) as behind,
            closing(self.merger.results(cut)) as results,
        ):
            for part, result in results:
                if isinstance(result, bytearray):
                    data = result
                else:
                    yield from filter(None, behind.drain())  # so that progress is monotonic
                    data = yield from relayed(with_reports(result), partial(count.within, part))
                action: Action = "merged" if part.spec.name in work else "copied"
                job = partial(self._write, part, data, count, action)
                yield from filter(None, behind.submit(len(data), job))
                del data, result, job
            yield from filter(None, behind.drain())
        self.writer.audit([spec.name for spec in specs], min(_AUDITORS, self.ranks.cores))

    def note_attempt(self) -> None:
        """Add this process to the notes of the run, so that a resume elsewhere leaves a trace."""
        attempt = attempt_of(str(self.merger.device), self.ranks.size, len(self.writer.done))
        self.attempts = [*(self.writer.noted("attempts", _ATTEMPTS) or []), attempt]
        self.writer.note("attempts", self.attempts)

    def conclude(
        self, failure: IPMergeError | None, documents: Documents, check: Callable[[], object]
    ) -> None:
        """Finish the folder if all processes succeeded; otherwise raise the error.

        `check` raises if a source has changed since the start. Errors of the output or of a
        source's disk can be resumed; if a source itself is invalid, the partial folder is removed.
        """
        error = None if failure is None else (str(failure), isinstance(failure, RunError))
        reports = self.ranks.gather((error, self.writer.done, self.writer.hashes))

        def finish() -> None:
            for rank, (trouble, done, hashes) in enumerate(reports):
                self.writer.done |= done
                self.writer.hashes |= hashes
                if trouble is not None and not trouble[1]:
                    self.writer.discard()
                if trouble is not None:
                    raise failure or RunError(f"Process {rank}: {trouble[0]}")
            try:
                self.writer.finish(documents, check)
            except PairingError:
                self.writer.discard()
                raise

        self.ranks.led(finish)
        if failure is not None:
            raise failure

    def _mine(self, specs: list[TensorSpec], work: Work) -> list[TensorSpec]:
        """Select the tensors of this process; merged and copied ones are balanced separately."""
        mine: list[TensorSpec] = []
        for merged in (True, False):
            group = [spec for spec in specs if (spec.name in work) == merged]
            costs = [merging_cost(spec.shape) if merged else spec.nbytes for spec in group]
            owners = share_out(costs, self.ranks.size)
            mine += [s for s, owner in zip(group, owners, strict=True) if owner == self.ranks.rank]
        return sorted(mine, key=lambda spec: (spec.shard, spec.start, spec.stop))

    def _write(
        self, part: Part, data: bytearray, count: StepCount, action: Action
    ) -> MergeStep | None:
        self.writer.write_piece(part.spec.name, part.start, data)
        return count.step(part.spec, action) if part.stop == part.spec.nbytes else None

    def _first_pass(self, *, idle: bool) -> Iterator[MergeStep]:
        """Get the method's statistic from the plan or the run's notes, or compute it.

        Every process computes it, except those that have nothing to merge.
        """
        self.merger.statistic = self.merger.known_statistic()
        if not is_due(self.plan):
            return
        leads = self.ranks.rank == 0  # rank 0 writes the manifest
        noted = self.ranks.led(lambda: self.writer.noted("statistic", _STATISTIC))
        if noted is not None:
            self.merger.statistic = noted
        elif leads or not idle:
            steps = run_first_pass(self.plan, self.pair, self.merger.device, self.merger.workers)
            self.merger.statistic = yield from relayed(steps, measured_step)
            if leads:
                self.writer.note("statistic", self.merger.statistic)


_STATISTIC = Schema[tuple[Number, ...]](tuple[Number, ...])
_ATTEMPTS = Schema[list[dict[str, Any]]](list[dict[str, Any]])


def _documents(run: _Run, findings: Sequence[Finding], seconds: float) -> dict[str, str]:
    manifest = manifest_of(
        run.plan,
        run.pair,
        run.writer.hashes,
        files=run.writer.copied,
        findings=findings,
        measurements=run.merger.measurements,
        attempts=run.attempts,
        statistic=run.merger.statistic,
        seconds=seconds,
    )
    card = write_card(run.plan, run.pair, findings)
    return {MANIFEST: json.dumps(manifest, indent=1) + "\n", "README.md": card}
