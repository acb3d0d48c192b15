"""Columns of a live model: what each of several merges adds to the shared weights.

In: a plan. Out: a `Column`, which is a value: gains on factors, or tensors of its own. The model
that answers them is in `live.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ipmerge_core.adapters.factor_set import FactorSet
from ipmerge_core.errors import PlanError
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.shared_weights import SwappedWeights
from ipmerge_core.models.matrix_kinds import is_expert
from ipmerge_core.planning.plan import MergePlan


@dataclass(frozen=True, eq=False)
class Column:
    """One model on the shared weights.

    Attributes:
        name: what the caller calls it.
        kind: "base" for the unchanged model, "factors" for gains on factors, "tensors" for tensors
            of its own.
        gains: the gain on the factors of each matrix and expert.
        factors: the set that the gains belong to.
        weights: the tensors of its own.
        nbytes: memory in addition to the model and to factors that other columns share.
    """

    name: str
    kind: Literal["base", "factors", "tensors"]
    gains: Mapping[tuple[str, int], float]
    factors: FactorSet | None = None
    weights: SwappedWeights | None = None
    nbytes: int = 0

    def named(self, name: str) -> Column:
        """Return the same column under another name."""
        return replace(self, name=name)

    def scaled(self, gain: float, name: str = "") -> Column:
        """Return the column with all gains multiplied: lambda times `gain`.

        Raises: PlanError for a column of tensors, whose change is not kept apart.
        """
        if self.kind == "tensors":
            raise PlanError(
                f"'{self.name}' is not a column of factors, so that its lambda cannot be scaled. "
                f"Use a plan of IP-Merging with projection."
            )
        gains = {key: gain * value for key, value in self.gains.items()}
        return Column(name or f"{self.name} x {gain:g}", self.kind, gains, self.factors)


class Row(NamedTuple):
    """A conversation to continue with one column; `stops` are events that end this row only."""

    column: Column
    messages: Sequence[Message]
    settings: GenerationSettings = GenerationSettings()
    stops: Sequence[threading.Event] = ()


def why_not_factors(plan: MergePlan) -> str:
    """Explain why a plan cannot be a column of factors; "" if it can."""
    if not plan.has_updates:
        return (
            f"The change of plan {plan.hash} ({plan.method}) has no factors: it has full rank, a "
            f"budget, or an input_share below 1."
        )
    if plan.extras:
        return f"Plan {plan.hash} also merges {', '.join(plan.extras)}, which have no factors."
    experts = [d.name for d in plan.selected if is_expert(d.module)]
    if experts:
        return (
            f"Plan {plan.hash} merges {len(experts)} matrices of experts, which transformers holds "
            f"in stacks without factors."
        )
    return ""
