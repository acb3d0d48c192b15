"""Merge the matrices of one part of a tensor, and cast them once to their stored dtype.

In: a plan, its opened models and a part. Out: the bytes that the merged model has there. Used by
the merge that writes a folder (`merge.py`) and by the one that keeps its tensors in memory
(`in_memory.py`), so that both give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.analysis.analyse import working_set
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.analysis.updates import UpdateStore, Variant
from ipmerge_core.calibration.store import Measurements
from ipmerge_core.errors import CheckpointError
from ipmerge_core.merging.parts import (
    EXTRAS,
    Chosen,
    Part,
    chosen_matrices,
    held,
    low_rank_changes,
    merging_of,
    on_one_base,
    rounding_noise,
    scale_change,
)
from ipmerge_core.methods import MergeMethod, find_method
from ipmerge_core.methods.blocks import blocks
from ipmerge_core.models.checkpoint import as_tensor, count_non_finite
from ipmerge_core.models.pairing import MatrixWeights, ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.planning.scope import method_anchor
from ipmerge_core.runtime.devices import stream, streams, warn_of_cpu
from ipmerge_core.runtime.paths import resolve_path
from ipmerge_core.runtime.pipeline import Load, compute_ahead, read_ahead
from ipmerge_core.spectral.protection import activation_informed
from ipmerge_core.spectral.similarity import Update
from ipmerge_core.spectral.spectrum import as_float

_MOST_WORKERS = 8  # more are limited by the reading thread

Report: TypeAlias = Callable[[float], object]
Reporting: TypeAlias = Callable[[Report], bytearray]  # merges a matrix that takes long


class Piece(NamedTuple):
    """A part that was read: bytes to copy, and the inputs of the matrices to merge in them.

    `updates` are the kept updates of each matrix, which need no other inputs.
    """

    part: Part
    stored: bytearray
    weights: tuple[MatrixWeights | Tensor, ...] = ()
    updates: tuple[tuple[Update, ...] | None, ...] = ()


def find_updates(
    plan: MergePlan, pair: ModelPair, folder: str | Path | None, device: torch.device
) -> UpdateStore | None:
    """Open the kept updates that a plan can use; None for a method that has none."""
    if folder is None or not plan.has_updates:
        return None
    return UpdateStore(resolve_path(folder), pair, Variant.of(plan.parameters, plan.anchor), device)


@dataclass
class PartMerger:
    """Reads and merges parts of tensors on one device.

    `statistic` is that of the method's first pass, set before the first part is merged. `updates`
    are kept updates of IP-Merging, which are used where they exist instead of decomposing again.
    """

    plan: MergePlan
    pair: ModelPair
    device: torch.device
    measurements: Measurements | None = None
    cores: int = 1
    updates: UpdateStore | None = None
    statistic: tuple[float, ...] | None = None
    method: MergeMethod = field(init=False)

    def __post_init__(self) -> None:
        """Find the method of the plan."""
        self.method = find_method(self.plan.method)

    @property
    def is_local(self) -> bool:
        """Whether a matrix can be merged in blocks of rows."""
        return self.method.is_local(self.plan.parameters)

    def known_statistic(self) -> tuple[float, ...] | None:
        """Return the method's statistic from the calibration or the plan; None if unknown."""
        measured = self.measurements is not None and self._uses_data
        if measured and self.method.needs_statistic(self.plan.parameters):
            assert self.method.statistic is not None, "the method has no statistic"
            numbers = self.method.statistic.calibrated(self.plan.parameters)
            assert self.measurements is not None, "it was measured"
            return self.measurements.statistic(numbers)
        return self.plan.statistic

    @property
    def _uses_data(self) -> bool:
        """Whether the method takes the measurements; AIM uses them after any method."""
        return self.method.data_for(self.plan.parameters) is not None

    def budget(self, cut: list[Part]) -> int:
        """Return how many bytes may be read ahead of merging."""
        pace = self.pair.pace
        at_once = 1 if self.device.type == "cpu" else self.workers  # a GPU waits for the disk
        return at_once * max([pace.ahead, *(held(self.pair, part) for part in cut)])

    def results(self, cut: list[Part]) -> Generator[tuple[Part, bytearray | Reporting]]:
        """Yield the merged bytes of every part in order; reads ahead.

        A method that reports progress gives a function instead, to be called with a report.
        """
        at_once = 1 if self.device.type == "cpu" else self.workers
        readers = max(self.pair.pace.threads, at_once)
        loads = (Load(held(self.pair, part), partial(self._read, part)) for part in cut)
        with (
            closing(read_ahead(loads, self.budget(cut), readers)) as pieces,
            closing(compute_ahead(self._merged, pieces, self.workers)) as results,
        ):
            yield from results

    @cached_property
    def workers(self) -> int:
        """Number of matrices to merge concurrently, by default the number of cores.

        One if matrices are decomposed, which needs memory and is multithreaded, or if a method is
        so cheap that reading and writing use the other cores. On a GPU limited by its memory, and
        one for a method that reports progress.
        """
        if self.device.type == "cpu":
            one = self.method.matrixwise or self.is_local
            return 1 if one else min(_MOST_WORKERS, self.cores)
        if self._reports:
            return 1
        sizes = [
            working_set(self.pair, m, Options()) for m, _ in chosen_matrices(self.plan, self.pair)
        ]
        return max(1, streams(self.device, max(sizes, default=0)))

    @property
    def _reports(self) -> bool:
        return "report" in self.method.inputs

    def _read(self, part: Part) -> Piece:
        check = not self.method.propagates_non_finite  # otherwise detected in the result
        kept = tuple(self._kept(chosen) for chosen in part.merged)
        weights = tuple(
            self.pair.read(matrix, experts, check=check)
            if updates is None
            else self.pair.mllm.read_matrix(matrix.mllm)
            for (matrix, experts), updates in zip(part.merged, kept, strict=True)
        )
        if part.is_filled and weights:
            return Piece(part, bytearray(part.stop - part.start), weights, kept)
        # Not checked: buffers such as attention masks contain infinities.
        data = self.pair.mllm.read_bytes(part.spec.name, part.start, part.stop)
        return Piece(part, data, weights, kept)

    def _kept(self, chosen: Chosen) -> tuple[Update, ...] | None:
        matrix, experts = chosen
        if self.updates is None or matrix.module in EXTRAS:
            return None
        return self.updates.read(matrix.name, experts)

    def _merged(self, piece: Piece) -> tuple[Part, bytearray | Reporting]:
        if not piece.weights:
            return piece.part, piece.stored
        if self._reports:
            return piece.part, partial(self._stored, piece)
        with stream(self.device):
            return piece.part, self._stored(piece)

    def _stored(self, piece: Piece, report: Report | None = None) -> bytearray:
        """Merge matrices and cast them once to their stored dtype; raise an error on overflow."""
        part, data = piece.part, piece.stored
        target = as_tensor(data, part.spec.dtype)
        for chosen, weights, kept in zip(part.merged, piece.weights, piece.updates, strict=True):
            if isinstance(weights, Tensor):
                assert kept is not None, "it was read for the kept updates"
                merged = self._with_updates(chosen, weights, kept)
            else:
                merged = self._merging(chosen, weights, report).detach()
            place = part.place_in(target, chosen[0])
            values = merged.reshape(place.shape)
            if values.device.type == "cpu" and place.ndim == 1:
                for block in blocks(values):
                    place[block] = values[block]
            else:  # cast on the device, so that fewer bytes are copied
                place.copy_(values.to(place.dtype))
        if count_non_finite(target):
            for matrix, experts in part.merged:
                self.pair.refuse_non_finite(matrix, experts)
            raise CheckpointError(
                f"The merged '{part.spec.name}' of '{self.pair.mllm.id}' has infinite or NaN "
                f"values in {part.spec.dtype}. Use smaller gains."
            )
        return data

    def _with_updates(self, chosen: Chosen, mllm: Tensor, kept: tuple[Update, ...]) -> Tensor:
        """Add kept updates, scaled by the gain of their layer, as `ip_merging` adds new ones."""
        gain = self.plan.parameters_for(chosen[0].layer)["lambda_"]
        assert isinstance(gain, float), "a gain is a number"
        merged = as_float(mllm.to(self.device))
        for update in kept:
            moved = Update(update.left.to(self.device), update.right.to(self.device), update.gain)
            merged = merged + moved.scaled(gain).matrix()
        return merged

    def _merging(self, chosen: Chosen, weights: MatrixWeights, report: Report | None) -> Tensor:
        """Merge a matrix on the device, or on the CPU if the device runs out of memory."""
        try:
            return self._merging_on(self.device, chosen, weights, report)
        except torch.OutOfMemoryError:
            warn_of_cpu(self.device, chosen[0].name, chosen[0].shape)
        return self._merging_on(torch.device("cpu"), chosen, weights, report)

    def _merging_on(
        self, device: torch.device, chosen: Chosen, weights: MatrixWeights, report: Report | None
    ) -> Tensor:
        """Call the method on one matrix with its statistic, noise and measurements; then AIM."""
        matrix, experts = chosen
        supplied: dict[str, Any] = {}
        if self.statistic is not None:
            supplied["statistic"] = self.statistic
        measured: dict[str, Any] = {}
        if self.measurements is not None and matrix.module not in EXTRAS:
            measured = self.measurements.inputs(matrix.name, experts, device)
        if self._uses_data:
            supplied |= measured
        anchor, weights = method_anchor(self.method, self.plan.anchor), weights.to(device)
        if "noise" in self.method.inputs and matrix.module not in EXTRAS:
            supplied["noise"] = rounding_noise(weights, anchor)
        if "low_rank" in self.method.inputs and matrix.module not in EXTRAS:
            supplied["low_rank"] = low_rank_changes(weights, anchor)
        if report is not None and matrix.module not in EXTRAS:
            supplied["report"] = report
        models = on_one_base(weights, device, anchor)
        parameters = self.plan.parameters_for(matrix.layer)
        merged = merging_of(self.method, matrix, models, **parameters, **supplied)
        share = self.plan.options.input_share
        if share < 1 and matrix.module not in EXTRAS:
            merged = activation_informed(merged, models[1], measured["mllm_gram"], share)
        return scale_change(merged, models[1], self.plan.change_scale(matrix.layer))
