"""Merge methods that drop elements of the task vectors: DARE, DELLA and Model Breadcrumbs.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Random numbers come from a counter-based generator keyed by seed, tensor name and role,
never from a global one: results do not depend on order, device count or resume, and with one seed
what is kept at a density is kept at every higher one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.methods.blocks import blocks, blockwise, task_vector_of
from ipmerge_core.methods.election import (
    UNREAD,
    Normalize,
    OwnDensity,
    agreeing_sum_,
    densities_of,
)
from ipmerge_core.methods.elementwise import add_to_base_, as_list
from ipmerge_core.methods.registry import (
    Coefficient,
    Density,
    Experts,
    Gain,
    Range,
    TensorName,
    merge_method,
)
from ipmerge_core.methods.selection import Trim, ascending_ranks
from ipmerge_core.methods.traits import AffineUpdate, Matrix

Rescale: TypeAlias = Annotated[
    Literal["inverse_density", "l1", "none"],
    Range(help="what is kept is divided by its density, scaled to the old absolute sum, or left"),
]
Seed: TypeAlias = Annotated[int, Range(low=0, high=2**63 - 1, help="of the random drops")]
Window: TypeAlias = Annotated[
    float, Range(low=0, high=0.5, help="a row's densities spread this far to both sides")
]
Outliers: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="fraction of largest magnitudes dropped")
]
Elect: TypeAlias = Annotated[bool, Range(help="elect a sign per element, or just add")]
Ranked: TypeAlias = Annotated[
    Literal["tensor", "row"], Range(help="magnitudes are ranked in the matrix or row by row")
]
_SMALLEST_SUM = 1e-7  # below this mass an L1 ratio means nothing (mergekit's bound)


def generator_for(seed: int, tensor_name: str, role: str) -> np.random.Generator:
    """Make the generator of uniforms for one tensor of one model, row by row.

    Math: Philox-4x64 with the first 16 bytes of SHA-256("seed|name|role"), little-endian, as key.

    >>> generator_for(0, "model.layers.0.self_attn.q_proj.weight", "vlm").random(2).round(6)
    array([0.437909, 0.030869])
    """
    digest = hashlib.sha256(f"{seed}|{tensor_name}|{role}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def roles(experts: int) -> list[str]:
    """Names under which the models draw their random numbers: the MLLM first."""
    return ["vlm", "expert", *(f"expert{k}" for k in range(2, experts + 1))]


def draw(
    generator: np.random.Generator, size: int, chance: float | np.ndarray
) -> npt.NDArray[np.bool_]:
    """Draw which of the next elements are kept: where the next uniform is below the chance.

    A uniform is k / 2^53 with k the upper bits of a 64-bit number, so one chance for all is
    compared with the numbers themselves, which saves making floats of them.

    >>> draw(generator_for(0, "model.layers.0.self_attn.q_proj.weight", "vlm"), 4, 0.5)
    array([ True,  True, False,  True])
    """
    if isinstance(chance, float) and chance < 1:
        return generator.bit_generator.random_raw(size) < np.uint64(math.ceil(chance * 2**53) << 11)
    return generator.random(size) < chance


def drop_(
    vector: Tensor, keep: float | Tensor, rescale: Rescale, drawn: Callable[..., npt.NDArray[Any]]
) -> Tensor:
    """Drop elements of a task vector at random, in place, and make up for the loss.

    Math:   M ~ Bernoulli(p), p one number or one per element; then M tau / p (inverse_density,
            unbiased), M tau * sum|tau| / sum|M tau| (l1, one ratio per tensor), or M tau (none).
            `drawn(size, p)` gives M for the next elements, as `draw` does.
    """
    flat = vector.view(-1)
    mass = torch.zeros(2, dtype=torch.float64, device=flat.device)  # sum|tau|, sum|M tau|
    for block in blocks(flat):
        part = flat[block]
        chance = keep.reshape(-1)[block] if isinstance(keep, Tensor) else keep
        bound = chance.cpu().numpy() if isinstance(chance, Tensor) else chance
        if rescale == "l1":
            mass[0] += part.abs().sum(dtype=torch.float64)
        _mask_(part, drawn(part.numel(), bound))
        if rescale == "inverse_density":
            part /= chance
        elif rescale == "l1":
            mass[1] += part.abs().sum(dtype=torch.float64)
    if rescale == "l1" and float(mass.min()) >= _SMALLEST_SUM:
        flat *= float(mass[0] / mass[1])
    return vector


def _mask_(part: Tensor, kept: npt.NDArray[np.bool_]) -> None:
    """Zero what is not kept, in place; by numpy on a CPU, where it takes a third of the time."""
    if part.device.type == "cpu":
        np.multiply(part.numpy(), kept, out=part.numpy())
    else:
        part *= torch.from_numpy(kept).to(part.device)


def _dare_vectors(
    base: Tensor,
    tuned: Sequence[Tensor],
    densities: Sequence[float],
    rescale: Rescale,
    seed: int,
    tensor_name: str,
) -> list[Tensor]:
    vectors = []
    for matrix, density, role in zip(tuned, densities, roles(len(tuned) - 1), strict=True):
        vector = task_vector_of(matrix, base)
        if density < 1:
            drawn = partial(draw, generator_for(seed, tensor_name, role))
            drop_(vector, density, rescale, drawn)
        vectors.append(vector)
    return vectors


def _weighted_sum(
    base: Tensor, mllm: Tensor, vectors: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    def add(W0: Tensor, W_v: Tensor, *parts: Tensor) -> Tensor:
        delta = parts[0].mul_(weights[0])
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            delta.add_(part, alpha=weight)
        return add_to_base_(W0, W_v, delta)

    return blockwise(add, base, mllm, *vectors)


def _elected_sum(
    base: Tensor,
    mllm: Tensor,
    vectors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool,
    scale: float = 1.0,
) -> Tensor:
    def merge(W0: Tensor, W_v: Tensor, *parts: Tensor) -> Tensor:
        return add_to_base_(W0, W_v, agreeing_sum_(parts, weights, normalize=normalize), scale)

    return blockwise(merge, base, mllm, *vectors)


def _own(parameters: Mapping[str, Any]) -> list[float]:
    """Density of the MLLM, and the one that every expert has."""
    names = ("density", "mllm_density", "math_density")
    shared, mllm, math = (parameters[name] for name in names)
    return densities_of(shared, mllm, math, 1)


def _expected(parameters: Mapping[str, Any]) -> AffineUpdate:
    """Mean and spread of DARE's change: of many elements the sum is close to what is expected.

    Math:   E[M] = p, Var[M] = p (1 - p); divided by p that is 1 and (1 - p) / p.
    """
    means, noises = [], []
    for role, p in zip(("mllm", "math"), _own(parameters), strict=True):
        weight = parameters[f"{role}_weight"]
        unscaled = parameters["rescale"] == "none"
        means.append(weight * (p if unscaled else 1.0))
        noises.append(weight**2 * (1 - p) * (p if unscaled else 1 / p))
    words = "expected over the random drops" if any(noises) else ""
    return AffineUpdate(
        means[0] - 1.0,
        means[1],
        "select_only",
        mllm_noise=noises[0],
        expert_noise=noises[1],
        approximate=words,
    )


@merge_method(
    label="DARE",
    source="arXiv 2311.03099",
    formula="W = W0 + a_v M_v dW_v / p + a_e sum_k M_k dW_e,k / p, M ~ Bernoulli(p)",
    several_experts=True,
    affine=_expected,
)
def dare_linear(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 0.3,
    density: Density = 0.5,
    mllm_density: OwnDensity = None,
    math_density: OwnDensity = None,
    rescale: Rescale = "inverse_density",
    seed: Seed = 0,
    tensor_name: TensorName = "",
) -> Matrix:
    """Keep elements of the task vectors at random, rescale, add.

    Math:   W = W0 + sum_i a_i rescaled(M_i tau_i), M_i ~ Bernoulli(p_i), independent per model.
            rescale: see `drop`. The variance of a kept element is tau^2 (1 - p) / p.
    Shapes: all (m, n). A density of its own overrides the shared one; mllm_density = 1 leaves the
            MLLM's task vector whole.
    Source: DARE, arXiv 2311.03099 (inverse_density); "l1" is what mergekit does since 0.1.0.
    """
    tuned = [mllm, *as_list(math)]
    densities = densities_of(density, mllm_density, math_density, len(tuned) - 1)
    vectors = _dare_vectors(base, tuned, densities, rescale, seed, tensor_name)
    weights = [mllm_weight] + [math_weight] * (len(tuned) - 1)
    return _weighted_sum(base, mllm, vectors, weights)


@merge_method(
    label="DARE with sign election",
    source="arXiv 2311.03099; arXiv 2306.01708",
    formula="W = W0 + sum of the a_i M_i dW_i / p that have the elected sign",
    several_experts=True,
    unknown=UNREAD,
)
def dare_ties(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 0.3,
    density: Density = 0.5,
    mllm_density: OwnDensity = None,
    math_density: OwnDensity = None,
    rescale: Rescale = "inverse_density",
    normalize: Normalize = False,
    seed: Seed = 0,
    tensor_name: TensorName = "",
) -> Matrix:
    """Keep elements at random, rescale, elect a sign per element, add what agrees with it.

    Math:   as `dare_linear`, with the weighted sign election of `ties` in place of the sum.
    Shapes: all (m, n).
    Source: DARE, arXiv 2311.03099; the election of TIES without its trim, as in mergekit.
    """
    tuned = [mllm, *as_list(math)]
    densities = densities_of(density, mllm_density, math_density, len(tuned) - 1)
    vectors = _dare_vectors(base, tuned, densities, rescale, seed, tensor_name)
    weights = [mllm_weight] + [math_weight] * (len(tuned) - 1)
    return _elected_sum(base, mllm, vectors, weights, normalize=normalize)


def keep_chances(vector: Tensor, density: float, epsilon: float) -> Tensor:
    """Chance of each element to be kept, growing with its rank in the row.

    Math: q = (p - eps) + 2 eps r / (n - 1), r = 0 for the smallest magnitude; q = p for n = 1.
    """
    n = vector.shape[1]
    if n == 1 or epsilon == 0:
        return torch.full_like(vector, density)
    ranks = ascending_ranks(vector).to(vector.dtype)
    return (density - epsilon) + ranks * (2 * epsilon / (n - 1))


def _check_window(parameters: Mapping[str, Any]) -> None:
    """Raise PlanError where a chance to be kept would leave (0, 1)."""
    epsilon = parameters["epsilon"]
    densities = [parameters[name] for name in ("density", "mllm_density", "math_density")]
    for density in densities:
        inside = density is None or (density - epsilon > 0 and density + epsilon < 1)
        if epsilon and density != 1 and not inside:
            raise PlanError(
                f"DELLA keeps between density - epsilon = {density - epsilon:g} and density + "
                f"epsilon = {density + epsilon:g}; both must lie strictly between 0 and 1. Choose "
                f"a smaller epsilon."
            )


@merge_method(
    label="DELLA",
    source="arXiv 2406.11617",
    formula="W = W0 + s mean of the M_i dW_i / q_i that have the elected sign, q by rank in row",
    several_experts=True,
    unknown=UNREAD,
    check=_check_window,
)
def della(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 0.3,
    density: Density = 0.5,
    mllm_density: OwnDensity = None,
    math_density: OwnDensity = None,
    epsilon: Window = 0.15,
    rescale: Rescale = "inverse_density",
    elect: Elect = True,
    normalize: Normalize = True,
    scale: Gain = 1.1,
    seed: Seed = 0,
    tensor_name: TensorName = "",
) -> Matrix:
    """Keep large elements with a higher chance than small ones, rescale, elect signs, add.

    Math:   q_ij = (p - eps) + 2 eps r_ij / (n - 1), r the rank of |tau_ij| in its row;
            M ~ Bernoulli(q); tau~ = M tau / q; then the election of `ties`, or the plain sum
            without `elect`; W = W0 + s delta. eps = 0 is DARE.
    Shapes: all (m, n). p - eps > 0 and p + eps < 1, or p = 1, which keeps all. A density of its own
            overrides the shared one.
    Source: DELLA, arXiv 2406.11617; rescale "l1" is what mergekit does.
    Raises: PlanError when density and epsilon leave (0, 1).
    """
    tuned = [mllm, *as_list(math)]
    densities = densities_of(density, mllm_density, math_density, len(tuned) - 1)
    vectors = []
    for matrix, own, role in zip(tuned, densities, roles(len(tuned) - 1), strict=True):
        vector = task_vector_of(matrix, base)
        if own < 1:
            drawn = partial(draw, generator_for(seed, tensor_name, role))
            drop_(vector, keep_chances(vector, own, epsilon), rescale, drawn)
        vectors.append(vector)
    weights = [mllm_weight] + [math_weight] * (len(tuned) - 1)
    if elect:
        return _elected_sum(base, mllm, vectors, weights, normalize=normalize, scale=scale)
    return _weighted_sum(base, mllm, vectors, [scale * weight for weight in weights])


def crumbs(vector: Tensor, density: float, gamma: float, per: Literal["tensor", "row"]) -> Tensor:
    """Drop the largest magnitudes and enough of the smallest to keep int(density N) elements.

    Math: ascending order; the kept places are [b, b + k), k = int(density N),
          b = max(0, N - k - int(gamma N)).
    """
    size = vector.numel() if per == "tensor" else vector.shape[1]
    kept = int(density * size)
    first = max(0, size - kept - int(gamma * size))
    if per == "row":
        ranks = ascending_ranks(vector)
        return vector * ((ranks >= first) & (ranks < first + kept))
    outliers, crumbs_and_outliers = (
        Trim(vector.view(-1), size - kept - first),
        Trim(vector.view(-1), size - first),
    )
    return blockwise(lambda block: crumbs_and_outliers(block) - outliers(block), vector)


def _affine_crumbs(parameters: Mapping[str, Any]) -> AffineUpdate | None:
    """Task arithmetic where nothing is dropped."""
    if min(_own(parameters)) < 1:
        return None
    return AffineUpdate(parameters["mllm_weight"] - 1.0, parameters["math_weight"], "select_only")


@merge_method(
    label="Model breadcrumbs",
    source="arXiv 2312.06795",
    formula="W = W0 + sum_i a_i dW_i without its largest and smallest elements",
    several_experts=True,
    affine=_affine_crumbs,
    unknown=UNREAD,
)
def breadcrumbs(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 0.3,
    density: Density = 0.9,
    mllm_density: OwnDensity = None,
    math_density: OwnDensity = None,
    gamma: Outliers = 0.01,
    per: Ranked = "tensor",
) -> Matrix:
    """Task arithmetic without outliers and without small noise.

    Math:   of each tau_i drop the int(gamma N) largest magnitudes and enough of the smallest to
            keep int(density N); then W = W0 + sum_i a_i tau_i. N = m n, or n with per "row".
    Shapes: all (m, n). A density of its own overrides the shared one; 1 keeps a task vector whole,
            so that density = 1 is task arithmetic.
    Source: Model Breadcrumbs, arXiv 2312.06795, whose code ranks per row; per tensor as in
            mergekit, whose gamma is the paper's beta.
    """
    tuned = [mllm, *as_list(math)]
    densities = densities_of(density, mllm_density, math_density, len(tuned) - 1)
    vectors = [
        task_vector_of(matrix, base)
        if own == 1
        else crumbs(task_vector_of(matrix, base), own, gamma, per)
        for matrix, own in zip(tuned, densities, strict=True)
    ]
    weights = [mllm_weight] + [math_weight] * (len(tuned) - 1)
    return _weighted_sum(base, mllm, vectors, weights)
