"""First passes: compute the whole-model statistic that a method needs before merging.

In: a plan and its opened models. Out: a few numbers, and a step per matrix. They are a property of
the plan: a merge stores them in the manifest and reuses them in a resume, and a plan may already
contain them, from its analysis or from `iter_first_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipmerge_core.merging.parts import chosen_matrices, held_by, in_rows, on_one_base
from ipmerge_core.methods import find_method
from ipmerge_core.methods.declarations import Models, relayed
from ipmerge_core.models.pairing import MatrixMatch, ModelPair
from ipmerge_core.planning.plan import MergePlan, reopen
from ipmerge_core.runtime.devices import resolve_device
from ipmerge_core.runtime.pipeline import Load, compute_ahead, read_ahead


class FirstPassStep(NamedTuple):
    """Progress: a matrix, or some of its rows, was measured. Sizes in bytes, over all passes."""

    tensor: str
    number: int
    total: int
    nbytes_done: int
    nbytes_total: int


class _Piece(NamedTuple):
    """Rows of a chosen matrix, with its number and name, and their size in bytes."""

    number: int
    name: str
    rows: MatrixMatch
    experts: tuple[int, ...]
    held: int


def iter_first_pass(
    plan: MergePlan, *, device: str = "cpu"
) -> Generator[FirstPassStep, None, MergePlan]:
    """Run the first pass of a plan, yielding after each matrix; returns the updated plan.

    The returned plan contains the statistic, its preview is exact if only the statistic was
    missing, and its merge skips the first pass. A plan without a first pass is returned unchanged.
    Raises: as `reopen`; PlanError for a device that is not available.
    """
    where = torch.device(resolve_device(device))
    if not is_due(plan):
        return plan
    found = yield from run_first_pass(plan, reopen(plan), where)
    return replace(plan, statistic=found)


def is_due(plan: MergePlan) -> bool:
    """Return whether the plan's method needs a first pass that has not been run yet."""
    method = find_method(plan.method)
    calibrated = method.data_for(plan.parameters) is not None  # then it supplies the statistic
    unknown = plan.statistic is None and not calibrated
    return unknown and bool(plan.selected) and method.needs_statistic(plan.parameters)


def run_first_pass(
    plan: MergePlan, pair: ModelPair, device: torch.device, workers: int = 1
) -> Generator[FirstPassStep, None, tuple[float, ...]]:
    """Measure every merged matrix, yielding after each piece; returns the statistic."""
    statistic = find_method(plan.method).statistic
    assert statistic is not None, "the method has no statistic"
    anchor = "two_base" if statistic.from_own_base else plan.anchor
    chosen = chosen_matrices(plan, pair)
    cut = [
        _Piece(number, matrix.name, piece, experts, held_by(pair, piece, experts))
        for number, (matrix, experts) in enumerate(chosen, 1)
        for piece in in_rows(matrix, pair.mllm.spec(matrix.mllm).nbytes, pair.pace.piece)
    ]
    nbytes = sum(piece.held for piece in cut)

    def matrices() -> Iterator[Models]:
        loads = (
            Load(piece.held, partial(pair.read, piece.rows, piece.experts, check=False))
            for piece in cut
        )
        budget = max(pair.pace.ahead, *(piece.held for piece in cut))
        with closing(read_ahead(loads, budget, pair.pace.threads)) as read:
            for weights in read:
                yield *on_one_base(weights, device, anchor), {}

    index = done = 0

    def progress(_: None) -> FirstPassStep:
        nonlocal index, done
        turn, place = divmod(index, len(cut))
        index, done = index + 1, done + cut[place].held
        number, total = turn * len(chosen) + cut[place].number, statistic.passes * len(chosen)
        return FirstPassStep(cut[place].name, number, total, done, statistic.passes * nbytes)

    def apply(function: Callable[[Models], Tensor], models: Iterable[Models]) -> Iterator[Tensor]:
        for piece, numbers in zip(cut, compute_ahead(function, models, workers), strict=True):
            if not bool(numbers.isfinite().all()):
                pair.refuse_non_finite(piece.rows, piece.experts)
            yield numbers

    with closing(statistic.steps(matrices, plan.parameters, apply=apply)) as steps:
        return (yield from relayed(steps, progress))
