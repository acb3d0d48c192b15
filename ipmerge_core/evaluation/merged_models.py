"""Models with exchanged weights as models to evaluate, in memory: no folder is written.

In: the models of a pair and the points of a sweep, or a model folder; and cuts. Out: a `Subject`
each. The model is loaded once; for every subject the tensors that a plan or a cut changes take the
place of its own, for the time of an evaluation. A subject's key follows from the content of the
model, the plan and the cut, so that stored replies are found again whichever evaluation needs them.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ipmerge_core.evaluation.controls import permuted_tensors
from ipmerge_core.evaluation.cuts import (
    Cut,
    CutMatrix,
    cut_tensors,
    matrices_of_model,
    matrices_of_pair,
)
from ipmerge_core.evaluation.points import Point
from ipmerge_core.evaluation.subjects import Subject, content_key
from ipmerge_core.inference.shared_weights import SwappedWeights, swapped, weights_in_memory
from ipmerge_core.merging.in_memory import iter_merged_tensors
from ipmerge_core.merging.provenance import read_provenance
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import local_copy
from ipmerge_core.models.pairing import TO_FORCE
from ipmerge_core.planning.plan import open_sources

if TYPE_CHECKING:
    from torch import Tensor

    from ipmerge_core.analysis.records import Source, Sources
    from ipmerge_core.inference.loading import LoadedModel
    from ipmerge_core.planning.plan import MergePlan

Tensors = Mapping[str, "Tensor"]


class ExchangedModel:
    """A model in memory whose weights are exchanged for the time of an evaluation.

    Closed at the end of its `with` block.

    Args:
        folder: the model, which is loaded when its first subject is evaluated.
        checkpoint: the same model by its headers.
        stops: events that cancel loading.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, stops: Sequence[threading.Event] = ()
    ) -> None:
        self.folder, self.checkpoint, self.stops = folder, checkpoint, stops
        self.key = content_key(checkpoint)
        self._loaded: dict[str, LoadedModel] = {}
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start; nothing is loaded yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the model."""
        self._closing.close()
        self._loaded.clear()

    def keyed(self, *marks: str) -> str:
        """Return the key of the model with other weights; its own without marks."""
        if not marks:
            return self.key
        return hashlib.sha256("|".join([self.key, *marks]).encode()).hexdigest()

    @contextlib.contextmanager
    def exchanged(self, device: str, tensors: Tensors) -> Iterator[LoadedModel]:
        """Put stored tensors in the place of the model's own inside the block."""
        loaded = self._model(device)
        if not tensors:
            yield loaded
            return
        weights = SwappedWeights(loaded, weights_in_memory(self.checkpoint, tensors))
        with swapped(loaded, weights, self.stops):
            yield loaded

    def _model(self, device: str) -> LoadedModel:
        from ipmerge_core.inference.loading import load_model

        if device not in self._loaded:
            self._loaded[device] = load_model(self.folder, device, self.stops)
            self._closing.callback(self._loaded[device].processor.close)
        return self._loaded[device]


class StoredModel(ExchangedModel):
    """A model folder whose modules are knocked out.

    If the folder is a merge, weights can be replaced by those of the models that it was made from.

    Args:
        folder: the model.
        stops: events that cancel loading.

    Raises: CheckpointError, PairingError if it is not a model with a decoder.
    """

    def __init__(self, folder: Path, stops: Sequence[threading.Event] = ()) -> None:
        super().__init__(folder, Checkpoint.open(folder), stops)
        made = read_provenance(folder)
        self.pair = open_sources(made.sources) if made else None
        self.matrices = (
            matrices_of_pair(self.pair) if self.pair else matrices_of_model(self.checkpoint)
        )

    def subject(self, cut: Cut | None = None) -> Subject:
        """Return the model, with a module knocked out if there is a cut, to evaluate."""
        marks = [cut.key] if cut else []
        details = {"model": str(self.folder)}
        name = named_cut(self.folder.name, cut)
        return Subject(name, self.keyed(*marks), partial(self._state, cut), details)

    @contextlib.contextmanager
    def _state(self, cut: Cut | None, device: str) -> Iterator[LoadedModel]:
        found = cut_tensors(cut, self.matrices, self.checkpoint, pair=self.pair) if cut else ()
        with self.exchanged(device, dict(found)) as loaded:
            yield loaded


class MergedModels(ExchangedModel):
    """The MLLM of a pair, with the weights of merges in its place.

    Args:
        sources: the models of the pair.
        force: evaluate merges even if the sibling check refuses the models.
        updates: a folder of kept updates of IP-Merging, see `merge`.
        kept: how many of the last merges stay in memory, so that what evaluates one of them again
            (another cut, or another draw of items) does not merge again.
        stops: events that cancel merging and loading.

    Raises: CheckpointError, PairingError if the models cannot be opened or do not match.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        force: bool = False,
        updates: str | Path | None = None,
        kept: int = 1,
        stops: Sequence[threading.Event] = (),
    ) -> None:
        self.pair = open_sources(sources)
        self.pair.require_common_base(TO_FORCE, force=force)
        super().__init__(model_folder(sources.mllm), self.pair.mllm, stops)
        self.force, self.updates = force, updates
        self.matrices: tuple[CutMatrix, ...] = matrices_of_pair(self.pair)
        self._most_kept, self._kept = max(1, kept), OrderedDict[str, Tensors]()

    def subject(self, point: Point, cut: Cut | None = None) -> Subject:
        """Return a point as a model to evaluate, with a module knocked out if there is a cut.

        A plan that changes no tensor has the key of the unmerged model.
        """
        plan = point.plan
        if plan is not None and not (plan.selected or plan.extras):
            point = Point(point.label)
        marks = [mark for mark in (point.key, cut.key if cut else "") if mark]
        details: dict[str, Any] = {"model": str(self.pair.mllm.id)}
        if plan is not None:
            details |= {"plan": plan.hash, "method": plan.method}
        loaded = partial(self._state, point, cut)
        return Subject(named_cut(point.label, cut), self.keyed(*marks), loaded, details)

    @contextlib.contextmanager
    def _state(self, point: Point, cut: Cut | None, device: str) -> Iterator[LoadedModel]:
        tensors = dict(self.tensors(point, device))
        if cut is not None:
            mllm = self.pair.mllm
            found = cut_tensors(cut, self.matrices, mllm, pair=self.pair, merged=tensors)
            tensors |= dict(found)
        with self.exchanged(device, tensors) as loaded:
            yield loaded

    def tensors(self, point: Point, device: str = "cpu") -> Tensors:
        """Return the tensors of a point that differ from the MLLM's, by stored name."""
        if point.plan is None:
            return {}
        if point.key not in self._kept:
            while len(self._kept) >= self._most_kept:
                self._kept.popitem(last=False)  # before the next one, for the sake of memory
            merged = self._merged(point.plan, device)
            if point.permuted is not None:
                merged = dict(permuted_tensors(point.plan, self.pair, merged, point.permuted))
            self._kept[point.key] = merged
        self._kept.move_to_end(point.key)
        return self._kept[point.key]

    def _merged(self, plan: MergePlan, device: str) -> Tensors:
        steps = iter_merged_tensors(
            plan, device=device, force=self.force, updates=self.updates, stops=self.stops
        )
        return {step.name: step.tensor for step in steps if step.tensor is not None}


def named_cut(name: str, cut: Cut | None) -> str:
    """Return the name of a model with a module knocked out.

    >>> named_cut("merged", Cut(2, "mlp"))
    'merged, without mlp of layer 2'
    """
    return f"{name}, without {cut.module} of layer {cut.layer}" if cut else name


def model_folder(source: Source) -> Path:
    """Return the folder of a model, or of the local copy of its pinned commit.

    Raises: CheckpointError if the copy is not on this machine.
    """
    if source.revision is None:
        return Path(source.id)
    return local_copy(source.id, source.revision)
