"""Make the control of an IP-Merging plan: gamma permuted over the directions, at equal size.

In: a plan, its models, and the tensors that it changes. Out: the same tensors, each matrix changed
by as much as in the plan, but with the weights of the directions in another order. If alignment did
not matter, the control would do what the plan does. No one would merge so; it is only for
comparison.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.evaluation.cuts import place_of
from ipmerge_core.merging.parts import Chosen, on_one_base, rounding_noise, work_of
from ipmerge_core.methods import find_method
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.spectral.similarity import (
    corresponding_angles,
    importance,
    nuclear_ratio,
    projected_update,
)
from ipmerge_core.spectral.spectrum import existing, task_vector


def permuted_tensors(
    plan: MergePlan, pair: ModelPair, merged: Mapping[str, Tensor], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of the control of a plan, by name.

    Math:   W = W_v + c P',  P' = rho dM V_V diag(gamma_pi^2) V_V^T with a random permutation pi,
            c = ||W_plan - W_v||_F / ||P'||_F per matrix. Spectra over the existing directions.

    Args:
        plan: a plan of IP-Merging with one expert and the projection.
        pair: its models.
        merged: the tensors that the plan changes, by stored name.
        seed: of the permutations, which also depend on the name of the matrix.

    Raises: PlanError for a plan without a permutation.
    """
    check_permutable(plan)
    for name, chosen in work_of(plan, pair).items():
        data = merged[name].detach().cpu().clone()
        for each in chosen:
            place = place_of(data, each[0].mllm, pair.mllm)
            place.copy_(_permuted(plan, pair, each, place, seed))
        yield name, data


def check_permutable(plan: MergePlan) -> None:
    """Raise PlanError if a plan has no gamma, several experts, or merges other tensors."""
    projects = plan.method == "ip_merging" and plan.parameters["ablation"] == "none"
    projects = projects and plan.parameters["math_energy"] == 1
    if not projects or plan.parameters["projector"] != "softmax":
        raise PlanError(
            f"Plan {plan.hash} ({find_method(plan.method).label}) has no weights of directions to "
            f"permute; expected IP-Merging with its softmax projection, not truncated."
        )
    if len(plan.sources.math) > 1 or plan.extras:
        raise PlanError(
            f"Plan {plan.hash} has several experts, or merges norms or embeddings. The permuted "
            f"control requires one expert and matrices only."
        )


def _permuted(
    plan: MergePlan, pair: ModelPair, chosen: Chosen, planned: Tensor, seed: int
) -> Tensor:
    """Return one matrix of the control. Shapes: (m, n) like `planned`."""
    matrix, experts = chosen
    weights = pair.read(matrix, experts)
    floors = rounding_noise(weights, plan.anchor)
    base, mllm, others = on_one_base(weights, torch.device("cpu"), plan.anchor)
    change = task_vector(others[0], base)
    vision = existing(task_vector(mllm, base), floors[0], vectors="right")
    expert = existing(change, floors[1], vectors="right")
    norm, temperature = str(plan.parameters["gamma_norm"]), plan.parameters["temperature"]
    assert isinstance(temperature, float), "a temperature is a number"
    gamma = importance(corresponding_angles(vision, expert), temperature, norm)
    gamma = gamma[torch.randperm(len(gamma), generator=_generator(seed, matrix.name))]
    update = projected_update(change, vision, gamma, nuclear_ratio(vision, expert))
    size = torch.linalg.norm((planned.float() - mllm).double())
    own = torch.linalg.norm(update.double())
    scale = float(size / own) if own > 0 else 0.0
    return (mllm + scale * update).to(planned.dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    """Key random numbers by seed and matrix, so that they do not depend on the order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
