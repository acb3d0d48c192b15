"""Merge methods that drop elements of the task vectors: DARE, DELLA and Model Breadcrumbs.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. Random numbers come from a counter-based generator keyed by seed, tensor name and role
instead of a global one, so that results do not depend on order, device count or resume, and with
one seed the elements kept at a density are also kept at every higher density.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.methods.blocks import TaskVectors, blockwise_sum, result_dtype
from ipmerge_core.methods.declarations import AffineUpdate, Matrix
from ipmerge_core.methods.elementwise import merge_cut, weighted_sum_
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import (
    Coefficient,
    Density,
    Experts,
    Gain,
    TensorName,
    as_list,
    merge_method,
)
from ipmerge_core.methods.selection import Trim, ascending_order, by_rank, trims
from ipmerge_core.methods.sign_election import (
    UNREAD,
    ElectedElection,
    ElectedNormalize,
    Elections,
    LaterElection,
    Normalize,
    OwnDensity,
    agreeing_sum_,
    densities_of,
    sign_of_ties,
)

Rescale: TypeAlias = Annotated[
    Literal["inverse_density", "l1", "none"],
    Range(help="rescale kept elements by 1 / density, to the original absolute sum, or not"),
]
Seed: TypeAlias = Annotated[int, Range(low=0, high=2**63 - 1, help="seed of the random drops")]
Window: TypeAlias = Annotated[
    float, Range(low=0, high=0.5, help="half-width of the range of densities within a row")
]
Outliers: TypeAlias = Annotated[
    float, Range(low=0, high=1, help="fraction of the largest magnitudes that is dropped")
]
Elect: TypeAlias = Annotated[bool, Range(help="elect a sign per element; otherwise sum")]
Ranked: TypeAlias = Annotated[
    Literal["tensor", "row"], Range(help="rank magnitudes within the matrix or within each row")
]
_SMALLEST_SUM = 1e-7  # smallest absolute sum for an L1 ratio (as in mergekit)


def generator_for(seed: int, tensor_name: str, role: str) -> np.random.Generator:
    """Return the generator of uniform random numbers for one tensor of one model, row by row.

    Math: Philox-4x64 with the first 16 bytes of SHA-256("seed|name|role"), little-endian, as key.

    >>> generator_for(0, "model.layers.0.self_attn.q_proj.weight", "vlm").random(2).round(6)
    array([0.437909, 0.030869])
    """
    digest = hashlib.sha256(f"{seed}|{tensor_name}|{role}".encode()).digest()
    key = int.from_bytes(digest[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def roles(experts: int) -> list[str]:
    """Return the roles that key the models' random numbers, the MLLM first."""
    return ["vlm", "expert", *(f"expert{k}" for k in range(2, experts + 1))]


def bound_of(chance: float | Tensor) -> Tensor:
    """Return the bound on random 64-bit integers that corresponds to a probability.

    Math:   a uniform is k / 2^53 with k the upper 53 bits of the number, so k < ceil(chance 2^53).
            The bits of the bound are those of an unsigned number.
    """
    bound = (torch.as_tensor(chance, dtype=torch.float64) * 2**53).ceil()
    return bound.clamp_(max=2**53 - 1).long().bitwise_left_shift_(11)  # also for 1.0 in fp32


def draw(generator: np.random.Generator, size: int, bound: Tensor) -> npt.NDArray[np.bool_]:
    """Draw which of the next elements are kept, with one bound for all or one per element.

    >>> generator = generator_for(0, "model.layers.0.self_attn.q_proj.weight", "vlm")
    >>> draw(generator, 4, bound_of(0.5))
    array([ True,  True, False,  True])
    """
    bounds = bound.cpu().view(-1).numpy().view(np.uint64)
    return generator.bit_generator.random_raw(size) < bounds


class Drop:
    """Drop elements of a task vector at random, and rescale the rest.

    Math:   M ~ Bernoulli(p); then M tau / p (inverse_density, unbiased),
            M tau * sum|tau| / sum|M tau| (l1, one ratio per matrix), or M tau (none).
            With a window the probability grows with the rank in the row, see `keep_chances`.

    The task vector is passed in blocks of whole rows, in order; `key` keys the random numbers. The
    ratio of l1 requires an additional pass, which draws the same numbers.
    """

    def __init__(
        self,
        base: Tensor,
        tuned: Tensor,
        density: float,
        rescale: Rescale,
        key: tuple[int, str, str],
        window: float = 0.0,
    ) -> None:
        self.density, self.rescale = density, rescale
        columns, dtype = tuned.shape[1], result_dtype(base, tuned)
        self._chance: Tensor | float = density  # one for all, or by rank in the row
        if window and columns > 1:
            self._chance = keep_chances(columns, density, window, dtype).to(tuned.device)
        self._bound = bound_of(self._chance)
        self.ratio = 1.0
        self._key, self._generator = key, generator_for(*key)
        if rescale == "l1" and density < 1:
            self.ratio = self._l1_ratio(base, tuned)
            self._generator = generator_for(*key)

    def __copy__(self) -> Drop:
        """Return a copy that starts again at the first row."""
        fresh = object.__new__(Drop)
        fresh.__dict__.update(self.__dict__, _generator=generator_for(*self._key))
        return fresh

    def __call__(self, block: Tensor) -> Tensor:
        """Drop elements of the next block, in place."""
        if self.density == 1:
            return block
        chance = self._drop_(block)
        if self.rescale == "inverse_density":
            block /= chance
        return block if self.ratio == 1 else block.mul_(self.ratio)

    def _drop_(self, block: Tensor) -> Tensor | float:
        """Zero the elements that are not drawn; return the probability, per element or common."""
        chance, bound = self._chance, self._bound
        if isinstance(chance, Tensor):
            order = ascending_order(block)
            chance, bound = by_rank(order, chance), by_rank(order, bound)
        kept = draw(self._generator, block.numel(), bound).reshape(block.shape)
        if block.device.type == "cpu":  # three times faster than torch
            with np.errstate(invalid="ignore"):  # infinity times 0 is NaN, as intended
                np.multiply(block.numpy(), kept, out=block.numpy())
        else:
            block *= torch.from_numpy(kept).to(block.device)
        return chance

    def _l1_ratio(self, base: Tensor, tuned: Tensor) -> float:
        def sums(W0: Tensor, W: Tensor) -> Tensor:
            block = W.sub_(W0)
            whole = block.abs().sum(dtype=torch.float64)
            self._drop_(block)
            return torch.stack([whole, block.abs().sum(dtype=torch.float64)])

        whole, kept = blockwise_sum(sums, base, tuned).tolist()
        return whole / kept if min(whole, kept) >= _SMALLEST_SUM else 1.0


def keep_chances(size: int, density: float, window: float, dtype: torch.dtype) -> Tensor:
    """Return the keep probability of each element of a row, from smallest to largest magnitude.

    Math: q = (p - eps) + 2 eps r / (n - 1), r = 0 for the smallest magnitude.
    """
    return (density - window) + torch.arange(size).to(dtype) * (2 * window / (size - 1))


def _merge_dropped(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: tuple[float, float],
    densities: tuple[float, float | None, float | None],
    rescale: Rescale,
    key: tuple[int, str],
    vote: tuple[Normalize, Elections] | None = None,
    *,
    window: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """Drop elements of every task vector, then add the rest to the base.

    The weights are the MLLM's and the experts', the densities the shared one and those that
    override it; the random numbers are keyed by (seed, tensor name) and the model's role. A vote is
    the normalization and the kind of election; without one all elements are added.
    """
    experts = len(tuned) - 1
    drops = [
        Drop(base, matrix, density, rescale, (*key, role), window)
        for matrix, density, role in zip(
            tuned, densities_of(*densities, experts), roles(experts), strict=True
        )
    ]
    each = [weights[0]] + [weights[1]] * experts
    add = partial(weighted_sum_, weights=each)
    if vote is not None:
        normalize, election = vote
        tied = sign_of_ties(election, base, tuned, drops)
        add = partial(agreeing_sum_, weights=each, normalize=normalize, default_sign=tied)
    return merge_cut(base, tuned, drops, add, scale)


def _own(parameters: Mapping[str, Any]) -> list[float]:
    """Return the density of the MLLM, and that of every expert."""
    names = ("density", "mllm_density", "math_density")
    shared, mllm, math = (parameters[name] for name in names)
    return densities_of(shared, mllm, math, 1)


def _expected(parameters: Mapping[str, Any]) -> AffineUpdate:
    """Return mean and variance of DARE's change, which the sum over many elements is close to.

    Math:   E[M] = p, Var[M] = p (1 - p); divided by p that is 1 and (1 - p) / p.
    """
    means, noises = [], []
    for role, p in zip(("mllm", "math"), _own(parameters), strict=True):
        weight = parameters[f"{role}_weight"]
        unscaled = parameters["rescale"] == "none"
        means.append(weight * (p if unscaled else 1.0))
        noises.append(weight**2 * (1 - p) * (p if unscaled else 1 / p))
    approximate = "expected over the random drops" if any(noises) else ""
    return AffineUpdate(
        means[0] - 1.0,
        means[1],
        "select_only",
        mllm_noise=noises[0],
        expert_noise=noises[1],
        approximate=approximate,
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
    """Keep random elements of the task vectors, rescale them, and add them to the base.

    Math:   W = W0 + sum_i a_i rescaled(M_i tau_i), M_i ~ Bernoulli(p_i), independent per model.
            rescale: see `Drop`. The variance of a kept element is tau^2 (1 - p) / p.
    Shapes: all (m, n). Per-model densities override the shared one; mllm_density = 1 keeps the
            MLLM's task vector unchanged.
    Source: DARE, arXiv 2311.03099 (inverse_density); "l1" as in mergekit since 0.1.0.
    """
    tuned = [mllm, *as_list(math)]
    weights, densities = (mllm_weight, math_weight), (density, mllm_density, math_density)
    key = (seed, tensor_name)
    return _merge_dropped(base, tuned, weights, densities, rescale, key)


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
    normalize: Normalize = "none",
    election: LaterElection = "weighted",
    seed: Seed = 0,
    tensor_name: TensorName = "",
) -> Matrix:
    """Keep random elements, rescale them, elect a sign per element, and add those that agree.

    Math:   as `dare_linear`, with the sign election of `ties` in place of the sum.
    Shapes: all (m, n).
    Source: DARE, arXiv 2311.03099; the election of TIES without its trim, as in mergekit. PEFT:
            normalize "count", election "unweighted"; the code of BR2V, arXiv 2505.05464, the same
            with rescale "none".
    """
    tuned = [mllm, *as_list(math)]
    weights, densities = (mllm_weight, math_weight), (density, mllm_density, math_density)
    key, vote = (seed, tensor_name), (normalize, election)
    return _merge_dropped(base, tuned, weights, densities, rescale, key, vote)


def _check_window(parameters: Mapping[str, Any]) -> None:
    """Raise PlanError if a keep probability would be outside (0, 1)."""
    epsilon = parameters["epsilon"]
    densities = [parameters[name] for name in ("density", "mllm_density", "math_density")]
    for density in densities:
        inside = density is None or (density - epsilon > 0 and density + epsilon < 1)
        if epsilon and density != 1 and not inside:
            raise PlanError(
                f"DELLA keeps elements with probabilities from density - epsilon = "
                f"{density - epsilon:g} to density + epsilon = {density + epsilon:g}; both must be "
                f"strictly between 0 and 1. Choose a smaller epsilon."
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
    normalize: ElectedNormalize = "weights",
    election: ElectedElection = "weighted",
    scale: Gain = 1.1,
    seed: Seed = 0,
    tensor_name: TensorName = "",
) -> Matrix:
    """Keep larger elements with higher probability, rescale them, elect signs, and add.

    Math:   q_ij = (p - eps) + 2 eps r_ij / (n - 1), r the rank of |tau_ij| in its row;
            M ~ Bernoulli(q); tau~ = M tau / q; then the election of `ties`, or the plain sum
            without `elect`; W = W0 + s delta. eps = 0 is DARE.
    Shapes: all (m, n). p - eps > 0 and p + eps < 1, or p = 1, which keeps all. Per-model densities
            override the shared one.
    Source: DELLA, arXiv 2406.11617; rescale "l1" as in mergekit.
    Raises: PlanError if a probability is outside (0, 1).
    """
    tuned = [mllm, *as_list(math)]
    weights, densities = (mllm_weight, math_weight), (density, mllm_density, math_density)
    key = (seed, tensor_name)
    vote = (normalize, election) if elect else None
    return _merge_dropped(
        base, tuned, weights, densities, rescale, key, vote, window=epsilon, scale=scale
    )


def crumb_counts(size: int, density: float, gamma: float) -> list[int]:
    """Count the magnitudes above the dropped small ones, and the dropped outliers among them.

    Math:   k = int(density N) are kept: in ascending order the places [b, b + k), with
            b = max(0, N - k - int(gamma N)). So (N - b, N - b - k).
    """
    kept = int(density * size)
    first = max(0, size - kept - int(gamma * size))
    return [size - first, size - first - kept]


def _drop_crumbs(block: Tensor, upper: Trim, outliers: Trim) -> Tensor:
    return upper(block) - outliers(block)


def _drop_crumbs_of_rows(block: Tensor, upper: int, outliers: int) -> Tensor:
    size = block.shape[1]
    ranks = torch.arange(size, device=block.device)
    inside = (ranks >= size - upper) & (ranks < size - outliers)
    return block.mul_(by_rank(ascending_order(block), inside.to(block)))


def _affine_crumbs(parameters: Mapping[str, Any]) -> AffineUpdate | None:
    """Return the affine form of task arithmetic if nothing is dropped."""
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
    """Apply task arithmetic to task vectors without their largest and smallest elements.

    Math:   of each tau_i drop the int(gamma N) largest magnitudes and enough of the smallest to
            keep int(density N); then W = W0 + sum_i a_i tau_i. N = m n, or n with per "row".
    Shapes: all (m, n). Per-model densities override the shared one; 1 keeps a task vector
            unchanged, so that density = 1 is task arithmetic.
    Source: Model Breadcrumbs, arXiv 2312.06795, whose code ranks per row; per tensor as in
            mergekit, whose gamma is the paper's beta.
    """
    tuned = [mllm, *as_list(math)]
    densities = densities_of(density, mllm_density, math_density, len(tuned) - 1)
    size = mllm.numel() if per == "tensor" else mllm.shape[1]
    counts = [crumb_counts(size, own, gamma) for own in densities]
    if per == "tensor":
        found = trims(TaskVectors(tuned, base), counts)
        cuts = [partial(_drop_crumbs, upper=a, outliers=b) for a, b in found]
    else:
        cuts = [partial(_drop_crumbs_of_rows, upper=a, outliers=b) for a, b in counts]
    weights = [mllm_weight] + [math_weight] * (len(tuned) - 1)
    return merge_cut(base, tuned, cuts, partial(weighted_sum_, weights=weights))
