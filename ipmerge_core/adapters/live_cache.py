"""Keep live models, and prepare columns on them once for every plan and finished model.

In: a cache of loaded models, and plans or folders of merges. Out: live models and their columns.
The factors of a pair and variant are prepared at the first question that needs them; every later
plan of that variant is a column at once. Columns of tensors stay until newer ones need their place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from ipmerge_core.adapters.columns import Column, why_not_factors
from ipmerge_core.adapters.factor_set import RESIDUAL, FactorSet, FactorStep, iter_factor_set
from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.analysis.updates import Variant
from ipmerge_core.errors import RunCancelled, RunError
from ipmerge_core.inference.loading import ModelCache
from ipmerge_core.inference.precisions import Precision
from ipmerge_core.merging.in_memory import (
    MergedTensor,
    changed_tensors,
    in_memory_cost,
    iter_merged_tensors,
)
from ipmerge_core.methods.declarations import drained, relayed
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.planning.plan import MergePlan, reopen
from ipmerge_core.runtime.devices import free_memory

MOST_FACTOR_SETS, MOST_TENSOR_COLUMNS = 4, 3  # per model
_HEADROOM = 1.2  # free memory that tensors need, relative to their size
_POLL_SECONDS = 0.1

Progress = Callable[[str], object]
_Stops = Sequence[threading.Event]


class ColumnCost(NamedTuple):
    """What a column takes before it can answer.

    `nbytes` of memory in addition to the loaded model; `is_ready` if nothing has to be computed;
    `kind` as in `Column`; `why` a plan has no factors, "" if it has.
    """

    kind: str
    nbytes: int
    is_ready: bool
    why: str


class _Kept:
    """What is prepared on one live model."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self.factors: OrderedDict[tuple[object, ...], FactorSet] = OrderedDict()
        self.tensors: OrderedDict[str, Column] = OrderedDict()


class LiveCache:
    """Live models of an app, with the factors and the tensors of their columns.

    Safe for several threads; one column is prepared at a time.
    """

    def __init__(
        self, models: ModelCache, updates: Path | None, tolerance: float = RESIDUAL
    ) -> None:
        self._models, self._updates, self._tolerance = models, updates, tolerance
        self._kept: dict[int, _Kept] = {}
        self._lock = threading.Lock()

    def model(
        self,
        folder: str | Path,
        device: str = "cpu",
        stops: _Stops = (),
        *,
        precision: Precision = "auto",
        progress: Progress = lambda words: None,
    ) -> LiveModel:
        """Return the live model of a folder, loading it if necessary. Raises: as `load_model`."""
        loaded = self._models.get(
            folder,
            device,
            stops,
            precision=precision,
            progress=lambda share: progress(f"loading weights: {share:.0%}"),
        )
        with self._alone(stops):
            inside = {id(each) for each in self._models.loaded()}
            self._kept = {key: kept for key, kept in self._kept.items() if key in inside}
            return self._kept.setdefault(id(loaded), _Kept(LiveModel(loaded))).live

    def cost(self, live: LiveModel, plan: MergePlan) -> ColumnCost:
        """Estimate what a plan needs to become a column. Raises: as `reopen`."""
        kept, why = self._of(live), why_not_factors(plan)
        if not why:
            factors = kept.factors.get(self._key(plan))
            return ColumnCost("factors", factors.nbytes if factors else 0, factors is not None, "")
        if plan.digest in kept.tensors:
            return ColumnCost("tensors", kept.tensors[plan.digest].nbytes, True, why)
        return ColumnCost("tensors", in_memory_cost(plan).nbytes, False, why)

    def column(
        self,
        live: LiveModel,
        plan: MergePlan,
        name: str,
        progress: Progress = lambda words: None,
        stops: _Stops = (),
        *,
        device: str = "cpu",
    ) -> Column:
        """Return the column of a plan: of factors where it has them, else of tensors in memory.

        Args:
            live: a model of this cache.
            plan: a plan of that model.
            name: the name of the column.
            progress: takes a few words about what is computed.
            stops: events that cancel.
            device: where factors and tensors are computed.

        Raises:
            PlanError, PairingError, CheckpointError: the plan is of another model, or its sources
                have changed or are refused.
            RunError: there is too little memory. RunCancelled: one of the events was set.
        """
        with self._alone(stops):
            if why_not_factors(plan):
                return self._of_tensors(live, plan, name, progress, stops, device)
            factors = self._factors(live, plan, progress, stops, device)
            return live.plan_column(name, plan, factors)

    def folder_column(
        self,
        live: LiveModel,
        folder: str | Path,
        name: str,
        progress: Progress = lambda words: None,
        stops: _Stops = (),
    ) -> Column:
        """Return the column of a finished merge: the tensors that differ from the model's.

        Raises: CheckpointError for a folder that has other tensors; otherwise as `column`.
        """
        mllm = Checkpoint.open(live.loaded.folder)
        other = Checkpoint.open(folder)
        key = f"{other.id} {other.fingerprint} {other.content}"
        with self._alone(stops):
            kept = self._of(live).tensors
            if key not in kept:
                steps = changed_tensors(folder, mllm)
                kept[key] = self._collect(live, mllm, name, steps, "comparing", progress, stops)
                _evict(kept, MOST_TENSOR_COLUMNS)
            kept.move_to_end(key)
            return kept[key].named(name)

    def _factors(
        self, live: LiveModel, plan: MergePlan, progress: Progress, stops: _Stops, device: str
    ) -> FactorSet:
        kept, key = self._of(live).factors, self._key(plan)
        if key not in kept:
            pair = reopen(plan)
            pair.require_common_base("Merge it with force in the Merge tab instead.")
            steps = iter_factor_set(
                plan,
                pair,
                updates=self._updates,
                tolerance=self._tolerance,
                device=device,
                stops=stops,
            )

            def show(step: FactorStep) -> None:
                progress(f"preparing factors: {step.number} of {step.total} matrices")

            found = drained(relayed(steps, show))
            live.add_factors(found, pair)
            kept[key] = found
            while len(kept) > MOST_FACTOR_SETS:
                live.drop_factors(kept.popitem(last=False)[1])
        kept.move_to_end(key)
        return kept[key]

    def _of_tensors(
        self,
        live: LiveModel,
        plan: MergePlan,
        name: str,
        progress: Progress,
        stops: _Stops,
        device: str,
    ) -> Column:
        kept = self._of(live).tensors
        if plan.digest not in kept:
            pair = reopen(plan)
            _check_memory(live, in_memory_cost(plan, pair).nbytes, plan)
            steps = iter_merged_tensors(plan, device=device, updates=self._updates, stops=stops)
            what = f"merging plan {plan.hash[:4]}"
            column = self._collect(live, pair.mllm, name, steps, what, progress, stops)
            kept[plan.digest] = column
            _evict(kept, MOST_TENSOR_COLUMNS)
        kept.move_to_end(plan.digest)
        return kept[plan.digest].named(name)

    def _collect(
        self,
        live: LiveModel,
        mllm: Checkpoint,
        name: str,
        steps: Iterable[MergedTensor],
        what: str,
        progress: Progress,
        stops: _Stops,
    ) -> Column:
        tensors: dict[str, Tensor] = {}
        for step in steps:
            if any(event.is_set() for event in stops):
                raise RunCancelled("Stopped while the column was being prepared.")
            if step.tensor is not None:
                tensors[step.name] = step.tensor
            progress(f"{what}: {step.number} of {step.total} tensors")
        return live.tensor_column(name, mllm, tensors)

    def _of(self, live: LiveModel) -> _Kept:
        return self._kept.setdefault(id(live.loaded), _Kept(live))

    def _key(self, plan: MergePlan) -> tuple[object, ...]:
        prints = [(source.fingerprint, source.content) for source in plan.sources.all()]
        return (*prints, Variant.of(plan.parameters, plan.anchor), self._tolerance)

    @contextmanager
    def _alone(self, stops: _Stops) -> Iterator[None]:
        while not self._lock.acquire(timeout=_POLL_SECONDS):
            if any(event.is_set() for event in stops):
                raise RunCancelled("Stopped while another column was being prepared.")
        try:
            yield
        finally:
            self._lock.release()


def _evict(kept: OrderedDict[str, Column], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


def _check_memory(live: LiveModel, nbytes: int, plan: MergePlan) -> None:
    """Raise RunError if the tensors of a plan do not fit into free memory."""
    device = torch.device(live.loaded.model.device)
    on_gpu = device.type == "cuda"
    free = free_memory(str(device)) if on_gpu else psutil.virtual_memory().available
    if _HEADROOM * nbytes > free:
        raise RunError(
            f"The merged tensors of plan {plan.hash} take {nbytes / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free on {device}. Merge fewer matrices, use IP-Merging with "
            f"projection, or merge into a folder and ask that model alone."
        )
