"""Decide for each matrix of a pair which experts are merged.

In: the records of an analysis, or the matrices of a pair, and the scope of a plan. Out: a
`Decision` per matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.models.pairing import MatrixMatch
from ipmerge_core.planning.preview import Decision
from ipmerge_core.planning.scope import Scope


def decide(
    analysis: Analysis, similarity: str, threshold: float | None, scope: Scope
) -> list[Decision]:
    """Select experts with similarity >= S_alpha for each matrix inside the scope."""
    decisions: dict[str, Decision] = {}
    for record in analysis.records:
        reaches = threshold is None or record.similarity[similarity] >= threshold
        wanted = reaches and scope.covers(record.module)
        before = decisions.get(record.name)
        experts = before.experts if before else ()
        decisions[record.name] = Decision(
            name=record.name,
            layer=record.layer,
            module=record.module,
            numel=math.prod(record.shape),
            experts=(*experts, record.expert) if scope.allows(record.name, wanted) else experts,
        )
    return list(decisions.values())


def take_all(matrices: Iterable[MatrixMatch], n_experts: int, scope: Scope) -> list[Decision]:
    """Select all experts for each matrix inside the scope."""
    return [
        Decision(
            name=matrix.name,
            layer=matrix.layer,
            module=matrix.module,
            numel=math.prod(matrix.shape),
            experts=tuple(range(n_experts)) if _merges(matrix, scope) else (),
        )
        for matrix in matrices
    ]


def _merges(matrix: MatrixMatch, scope: Scope) -> bool:
    return scope.allows(matrix.name, scope.covers(matrix.module))
