"""Controls of equal size for the variants study, and the overlaps that should explain it.

In: a plan of one case and the tensors that it changes. Out: the same tensors changed by as much in
other directions; or numbers of a case: how much the directions of the MLLM's change, of the inputs
on pictures and of the expert's change have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.calibration.store import Measurements
from ipmerge_core.models.pairing import MatrixMatch, ModelPair
from ipmerge_core.planning.plan import MergePlan, make_plan
from ipmerge_core.spectral.protection import energy_rank
from ipmerge_core.spectral.similarity import chance_level
from ipmerge_core.spectral.spectrum import Spectrum, existing, noise_floor, task_vector

DIRECTIONS = 32  # of which overlaps are measured
THRESHOLD = 0.4  # the default of `make_plan`


def random_subspace(
    plan: MergePlan, pair: ModelPair, merged: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Leave out as many random directions as a complement leaves out, at its size per matrix.

    Math:   P' = c dM (I - Q Q^T), Q uniform among the subspaces of that dimension,
            c = ||W - W_v|| / ||dM (I - Q Q^T)||.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for match in _merged(plan, pair):
        mllm, change = pair.mllm.read_matrix(match.mllm).float(), _change(pair, match)
        count = energy_rank(_directions(pair, match).S, float(plan.parameters["energy"] or 0))
        Q = torch.linalg.qr(torch.randn(change.shape[1], count, generator=generator)).Q
        update = change - (change @ Q) @ Q.T
        planned = merged[match.mllm]
        size = float((planned.float() - mllm).norm()) / (float(update.norm()) or 1.0)
        found[match.mllm] = (mllm + size * update).to(planned.dtype)
    return found


def random_matrices(analysis: Analysis, plan: MergePlan, seed: int) -> MergePlan:
    """Add the expert's change in as many random matrices as a plan of the upper half, at its size.

    Math:   the weight w' = w sqrt(sum_S ||dM||^2 / sum_S' ||dM||^2) for the sets S and S'.
    """
    norms = {record.name: record.math_norm2 for record in analysis.records}
    names = sorted(norms)
    own = {d.name for d in plan.decisions if plan.change_scale(d.layer)}
    drawn = np.random.default_rng(seed).permutation(names)[: len(own)].tolist()
    ratio = math.sqrt(sum(norms[n] for n in own) / sum(norms[n] for n in drawn))
    weight = float(plan.parameters["math_weight"] or 0) * ratio
    kept = {name: "keep" for name in names if name not in drawn}
    overrides: Any = kept
    return make_plan(analysis, "task_arithmetic", overrides=overrides, math_weight=weight)


def relative_size(pair: ModelPair, merged: Mapping[str, Tensor]) -> float:
    """Return the norm of the change of the decoder matrices, relative to the first expert's own."""
    change = own = 0.0
    for match in pair.matrices:
        own += float(_change(pair, match).double().square().sum())
        if match.mllm in merged:
            mllm = pair.mllm.read_matrix(match.mllm).double()
            change += float((merged[match.mllm].double() - mllm).square().sum())
    return math.sqrt(change / own) if own > 0 else 0.0


def overlaps(pair: ModelPair, grams: Measurements, count: int = DIRECTIONS) -> dict[str, float]:
    """Measure what should explain the results, as means over the matrices.

    Math:   with V_k the leading k existing right directions of dV, k at most `count`, and E_k the
            leading k eigenvectors of the MLLM's Gram matrix: ||V_k^T E_k||^2 / k, which is k / n
            for random subspaces, and the shares ||dM V_k||^2 / ||dM||^2 and
            ||dM E_k||^2 / ||dM||^2.
    """
    sums = dict.fromkeys(("inputs", "chance", "inside", "on_inputs"), 0.0)
    for match in pair.matrices:
        change = _change(pair, match).double()
        V = _directions(pair, match).Vh[:count].double()
        gram = grams.inputs(match.name, [0])["mllm_gram"].double()
        E = torch.linalg.eigh(gram).eigenvectors[:, len(gram) - len(V) :].T
        whole = float(change.square().sum()) or 1.0
        sums["inputs"] += float((V @ E.T).square().sum()) / max(1, len(V))
        sums["chance"] += len(V) / change.shape[1]
        sums["inside"] += float((change @ V.T).square().sum()) / whole
        sums["on_inputs"] += float((change @ E.T).square().sum()) / whole
    return {name: value / len(pair.matrices) for name, value in sums.items()}


def scale(analysis: Analysis) -> dict[str, float]:
    """Return what could change with the size of a model, as means over the matrices.

    Of the first expert: its relative change, the share of dM's energy in its first direction, the
    effective rank of dM relative to the number of its directions, the similarity of the first
    directions of dV and dM with that of unrelated bases, and the share of matrices whose similarity
    reaches the default threshold. Principal angles are those of matrices with 16 directions above
    the rounding of their dtype.
    """
    records = [record for record in analysis.records if record.expert == 0]
    means = {
        "change": [math.sqrt(r.math_norm2 / r.base_norm2) for r in records],
        "first": [r.math_sigma[0] ** 2 / (r.math_norm2 or 1.0) for r in records],
        "rank": [r.math_ranks["effective"] / min(r.shape) for r in records],
        "similarity": [r.similarity["first"] for r in records],
        "chance": [chance_level(r.shape[1], "first") for r in records],
        "selected": [float(r.similarity["first"] >= THRESHOLD) for r in records],
        "principal": [r.principal["16"] for r in records if "16" in r.principal],
    }
    sizes = {
        "parameters": float(analysis.totals.llm_parameters),
        "layers": float(len({record.layer for record in records})),
        "width": float(min(records[0].shape)),
    }
    return {**sizes, **{name: float(np.mean(found)) for name, found in means.items()}}


def _merged(plan: MergePlan, pair: ModelPair) -> list[MatrixMatch]:
    chosen = {decision.name for decision in plan.selected}
    return [match for match in pair.matrices if match.name in chosen]


def _directions(pair: ModelPair, match: MatrixMatch) -> Spectrum:
    """Decompose the MLLM's task vector into the directions that a merge uses, the existing ones."""
    mllm, base = pair.mllm.read_matrix(match.mllm), pair.base.read_matrix(match.name)
    return existing(task_vector(mllm, base), noise_floor(mllm, base), vectors="right")


def _change(pair: ModelPair, match: MatrixMatch) -> Tensor:
    expert = pair.math[0].read_matrix(match.math[0])
    return task_vector(expert, pair.base.read_matrix(match.name))
