"""The factors of IP-Merging's update of every matrix of a pair, for lambda = 1.

In: a pair and a variant of the method. Out: thin factors of each matrix and expert, with their rank
and residual. They are computed once: the threshold, lambda, overrides and layer gains of a plan
only select and scale them. The exact updates are kept on disk (`analysis.updates`), where an
analysis may have left them.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ipmerge_core.adapters.factors import LowRank, reduce_rank, unit_updates
from ipmerge_core.analysis.updates import UpdateStore, Variant
from ipmerge_core.errors import PlanError, RunCancelled
from ipmerge_core.merging.parts import held_by
from ipmerge_core.models.matrix_kinds import is_expert
from ipmerge_core.models.pairing import MatrixMatch, ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.runtime.devices import resolve_device
from ipmerge_core.runtime.pipeline import Load, read_ahead
from ipmerge_core.spectral.similarity import Update

RESIDUAL = 1e-3  # Frobenius norm of what is left out, relative to the update's
EXACT = 0.0  # keep every direction of the update
MAX_RANK = 256


class FactorStep(NamedTuple):
    """Progress: the factors of one matrix are ready. Costs are relative, for the time left.

    `action` is "kept" if its update was found on disk, else "decomposed".
    """

    matrix: str
    number: int
    total: int
    cost_done: int
    cost_total: int
    action: str


@dataclass(frozen=True)
class FactorSet:
    """Factors of all matrices of a pair, by matrix and expert, on the CPU in fp32.

    `over_max_rank` lists the matrices that need more directions than `max_rank` and were reduced
    to it, with a residual above the tolerance.
    """

    variant: Variant
    tolerance: float
    max_rank: int
    fingerprint: str  # of the models and the variant
    factors: Mapping[tuple[str, int], LowRank]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors in fp32."""
        return sum(4 * (low.A.numel() + low.B.numel()) for low in self.factors.values())

    @property
    def largest_residual(self) -> float:
        """The largest relative Frobenius residual of any matrix."""
        return max((low.residual for low in self.factors.values()), default=0.0)

    @property
    def over_max_rank(self) -> tuple[str, ...]:
        """The matrices that were reduced to `max_rank`."""
        cut = {name for (name, _), low in self.factors.items() if low.needed > low.rank}
        return tuple(sorted(cut))


def iter_factor_set(
    plan: MergePlan,
    pair: ModelPair,
    *,
    updates: str | Path | None = None,
    tolerance: float = RESIDUAL,
    max_rank: int = MAX_RANK,
    device: str = "cpu",
    stops: Sequence[threading.Event] = (),
) -> Generator[FactorStep, None, FactorSet]:
    """Compute the factors of every matrix of a pair, yielding after each; returns them.

    Experts of mixtures are left out: no linear layer of the model holds them.

    Args:
        plan: a plan of IP-Merging with projection; only its variant counts.
        pair: its opened models.
        updates: a folder in which exact updates are kept and found again, which makes this
            resumable; None keeps none.
        tolerance: relative Frobenius residual that determines the rank of a matrix; `EXACT` keeps
            every direction.
        max_rank: maximum rank of a matrix.
        device: a torch device name, or "auto".
        stops: events that cancel before the next matrix; finished matrices are kept.

    Raises:
        PlanError: the method's change is not of low rank, or a value is out of range.
        CheckpointError, RunError: a source cannot be read, or the folder not be written.
        RunCancelled: one of the events was set.
    """
    _check(plan, tolerance, max_rank)
    where = torch.device(resolve_device(device))
    variant = Variant.of(plan.parameters, plan.anchor)
    store = UpdateStore(Path(updates or ""), pair, variant, where)
    matrices = [matrix for matrix in pair.matrices if not is_expert(matrix.module)]
    costs = [m.shape[0] * m.shape[1] * min(m.shape) for m in matrices]
    found: dict[tuple[str, int], LowRank] = {}
    done = 0
    with closing(_updates(plan, pair, matrices, store if updates else None, where)) as each:
        for number, (matrix, (exact, action)) in enumerate(zip(matrices, each, strict=True), 1):
            if any(event.is_set() for event in stops):
                raise RunCancelled("Stopped while the factors were being computed.")
            for expert, update in enumerate(exact):
                found[matrix.name, expert] = reduced(update, tolerance, max_rank)
            done += costs[number - 1]
            yield FactorStep(matrix.name, number, len(matrices), done, sum(costs), action)
    return FactorSet(variant, tolerance, max_rank, store.identity, found)


def reduced(update: Update, tolerance: float, max_rank: int) -> LowRank:
    """Reduce an update to few directions on the CPU; a tolerance of `EXACT` keeps all."""
    on_cpu = replace(update, left=update.left.cpu(), right=update.right.cpu())
    return reduce_rank(on_cpu, tolerance, max_rank)


def _updates(
    plan: MergePlan,
    pair: ModelPair,
    matrices: Sequence[MatrixMatch],
    store: UpdateStore | None,
    device: torch.device,
) -> Generator[tuple[Sequence[Update], str]]:
    """Yield the exact updates of each matrix in order, found on disk or computed."""
    experts = tuple(range(len(pair.math)))
    kept = [store is not None and store.holds(m.name) for m in matrices]
    missing = [m for m, found in zip(matrices, kept, strict=True) if not found]
    loads = [Load(held_by(pair, m, experts), partial(pair.read, m, experts)) for m in missing]
    budget = max([pair.pace.ahead, *(load.nbytes for load in loads)])
    with closing(read_ahead(loads, budget, pair.pace.threads)) as read:
        for matrix, is_kept in zip(matrices, kept, strict=True):
            if store is not None and is_kept:
                found = store.read(matrix.name, experts)
                if found is not None:
                    yield found, "kept"
                    continue
            weights = pair.read(matrix, experts) if is_kept else next(read)
            new = unit_updates(plan, weights, device)
            if store is not None and not is_kept:
                store.write(matrix.name, new)
            yield new, "decomposed"


def _check(plan: MergePlan, tolerance: float, max_rank: int) -> None:
    if not plan.has_updates:
        raise PlanError(
            f"The change of plan {plan.hash} ({plan.method}) has no factors of its own. Only "
            f"IP-Merging with projection has them, without a budget and with input_share=1."
        )
    if not 0 <= tolerance < 1:
        raise PlanError(f"The tolerance is {tolerance}; expected 0 (exact) or a number below 1.")
    if max_rank < 1:
        raise PlanError(f"max_rank is {max_rank}; expected an integer >= 1.")
