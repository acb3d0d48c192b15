"""IP-Merging: rescale an expert's task vector and project it onto the MLLM's subspace.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. The plan selects matrices by similarity >= S_alpha; this module merges a selected one.
Source: arXiv 2510.14387 and its public snapshot; unspecified choices are documented in the
docstrings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from torch import Tensor

from ipmerge_core.methods.declarations import AffineUpdate, Matrix
from ipmerge_core.methods.registry import Changes, Experts, Gain, Noise, Range, merge_method
from ipmerge_core.spectral.low_rank import LowRank
from ipmerge_core.spectral.similarity import (
    Update,
    corresponding_angles,
    importance,
    nuclear_ratio,
    top_k_importance,
    truncated,
    update_factors,
)
from ipmerge_core.spectral.spectrum import (
    Spectrum,
    as_float,
    existing,
    noise_floor,
    svd,
    task_vector,
)

Ablation = Annotated[
    Literal["none", "rescale_only", "select_only"],
    Range(help="skip the projection, or also the rescaling"),
]
_PROJECTS = ("ablation", ("none",))
_DECOMPOSES = ("ablation", ("none", "rescale_only"))
_WEIGHTS = (("projector", ("softmax",)), _PROJECTS)
GammaNorm = Annotated[
    Literal["sum", "max"],
    Range(help="normalize gamma to sum 1, or to maximum 1", only_with=_WEIGHTS),
]
Projector = Annotated[
    Literal["softmax", "top_k"],
    Range(help="softmax weights, or the first top_k directions unweighted", only_with=(_PROJECTS,)),
]
Temperature = Annotated[
    float,
    Range(low=0, low_open=True, help="softmax temperature over directions", only_with=_WEIGHTS),
]
TopK = Annotated[
    int,
    Range(
        low=1,
        help="number of directions of the top_k projector",
        only_with=(("projector", ("top_k",)), _PROJECTS),
    ),
]
Directions = Annotated[
    Literal["existing", "all"],
    Range(
        help="use only directions above the rounding noise of the stored weights, or all",
        before="all",
        only_with=(_DECOMPOSES,),
    ),
]
Rank = (
    Annotated[
        int,
        Range(
            low=1,
            help="number of singular triplets to keep; none: all",
            only_with=(_DECOMPOSES,),
        ),
    ]
    | None
)


# The analysis options that each of its directions depends on.
_MEASURED_WITH = {
    "sum": ("temperature", "rank", "directions"),
    "max": ("temperature", "rank", "directions"),
    "rescale_only": ("rank", "directions"),
    "select_only": (),
}


def _affine(parameters: Mapping[str, Any]) -> AffineUpdate | None:
    """Return the affine form in a direction of the analysis; None for other parameters."""
    ablated = parameters["ablation"] != "none"
    if not ablated and parameters["projector"] != "softmax":
        return None
    direction = parameters["ablation" if ablated else "gamma_norm"]
    return AffineUpdate(
        0.0, parameters["lambda_"], direction, measured_with=_MEASURED_WITH[direction]
    )


@merge_method(
    label="IP-Merging",
    source="arXiv 2510.14387",
    formula="W = W_v + lambda sum_k rho_k dW_e,k V_v diag(gamma_k^2) V_v^T",
    gains=("lambda_",),
    gain="lambda_",
    several_experts=True,
    affine=_affine,
    from_analysis=("temperature", "rank", "directions"),
    matrixwise=True,
)
def ip_merging(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    lambda_: Gain = 1.0,
    temperature: Temperature = 32.0,
    gamma_norm: GammaNorm = "sum",
    projector: Projector = "softmax",
    top_k: TopK = 64,
    rank: Rank = None,
    ablation: Ablation = "none",
    directions: Directions = "existing",
    noise: Noise = None,
    low_rank: Changes = None,
) -> Matrix:
    """Add every expert's rescaled task vector, projected onto the MLLM's leading directions.

    Math:   dV = W_v - W0 = U_V S_V V_V^T,  dM_k = W_e,k - W0,  s_i = |<v_M,i , v_V,i>|
            rho = sum(S_V) / sum(S_M), each over its existing directions
            gamma = softmax(temperature * s), over directions that exist in both
            P_k = rho dM_k V_V diag(gamma^2) V_V^T
            W   = W_v + lambda sum_k P_k
            A direction exists if its singular value exceeds what rounding of the stored weights can
            cause (`spectrum.existing`); below that level a direction is random.
    Variants: `gamma_norm="max"` divides gamma by its largest value, so that the best-aligned
            direction has weight 1; `projector="top_k"` keeps the first `top_k` directions of the
            MLLM with weight 1 and no others; `rank` keeps that many singular triplets of both task
            vectors (the public snapshot: 1024); `ablation="rescale_only"` adds rho dM_k without
            projection, `"select_only"` dM_k itself; `directions="all"` uses every direction, as in
            the paper and the public snapshot.
    Source: IP-Merging, arXiv 2510.14387. The absolute value is an addition: the sign of a singular
            vector is arbitrary, and the result would depend on it. So is the restriction to
            existing directions, without which rounding determines the update of a low-rank expert.
    """
    experts = [math] if isinstance(math, Tensor) else list(math)
    merged = as_float(mllm)
    if ablation == "select_only":
        for expert in experts:
            merged = merged + lambda_ * task_vector(expert, base)
        return merged
    if ablation == "rescale_only":
        for found in _compared(base, mllm, experts, rank, directions, noise, low_rank):
            M = found.change if found.kept is None else truncated(found.change, found.kept)
            merged = merged + lambda_ * (found.rho * M)
        return merged
    updates = ip_updates(
        base,
        mllm,
        experts,
        lambda_=lambda_,
        temperature=temperature,
        gamma_norm=gamma_norm,
        projector=projector,
        top_k=top_k,
        rank=rank,
        directions=directions,
        noise=noise,
        low_rank=low_rank,
    )
    for update in updates:
        merged = merged + update.matrix()
    return merged


def ip_updates(
    base: Tensor,
    mllm: Tensor,
    experts: Sequence[Tensor],
    *,
    lambda_: float,
    temperature: float,
    gamma_norm: str,
    projector: str,
    top_k: int,
    rank: int | None,
    directions: str,
    noise: Sequence[float] | None = None,
    low_rank: Sequence[LowRank | None] | None = None,
) -> Iterator[Update]:
    """Yield the update lambda P_k of every expert as factors; see `ip_merging`."""
    for found in _compared(base, mllm, experts, rank, directions, noise, low_rank):
        angles = corresponding_angles(found.vision, found.expert)
        gamma = (
            top_k_importance(angles, top_k)
            if projector == "top_k"
            else importance(angles, temperature, gamma_norm)
        )
        update = update_factors(found.change, found.vision, gamma, found.rho, math=found.kept)
        yield update.scaled(lambda_)


class _Compared(NamedTuple):
    """An expert's task vector, both spectra, and their nuclear norm ratio.

    `kept` is the spectrum that the task vector is truncated to; None if it is not truncated.
    """

    change: Tensor
    vision: Spectrum
    expert: Spectrum
    rho: float
    kept: Spectrum | None


def _compared(
    base: Tensor,
    mllm: Tensor,
    experts: Sequence[Tensor],
    rank: int | None,
    directions: str,
    noise: Sequence[float] | None,
    low_rank: Sequence[LowRank | None] | None,
) -> Iterator[_Compared]:
    """Decompose the task vector of the MLLM once, and that of each expert."""
    floors = noise or [noise_floor(model, base) for model in (mllm, *experts)]
    known = low_rank or [None] * (1 + len(experts))

    def decomposed(change: Tensor, floor: float, factors: LowRank | None) -> Spectrum:
        if directions == "all":
            return svd(change, rank=rank, vectors="right")
        if factors is not None:
            return factors.existing(rank=rank, vectors="right", noise=floor)
        return existing(change, floor, rank=rank, vectors="right")

    vision = decomposed(task_vector(mllm, base), floors[0], known[0])
    for expert, floor, factors in zip(experts, floors[1:], known[1:], strict=True):
        change = task_vector(expert, base)
        own = decomposed(change, floor, factors)
        kept = own if rank is not None and rank < min(change.shape) else None
        yield _Compared(change, vision, own, nuclear_ratio(vision, own), kept)
