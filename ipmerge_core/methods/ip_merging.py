"""IP-Merging: rescale an expert's task vector and project it onto the MLLM's subspace.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. The plan selects matrices by similarity >= S_alpha; this module merges a selected one.
Source: arXiv 2510.14387 and its public snapshot; unspecified choices are documented in the
docstrings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.methods.declarations import AffineUpdate, Matrix
from ipmerge_core.methods.measurements import GramInput, GramInputs, checked
from ipmerge_core.methods.projections import (
    BY_INPUTS,
    Models,
    Projection,
    budget_factor,
    budget_of_factors,
    matrix_of,
    updates_of,
)
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import Changes, Experts, Gain, Noise, as_list, merge_method
from ipmerge_core.spectral.kinds import (
    ENERGY,
    ENERGY_SHARES,
    KEPT_SHARES,
    complement_at,
    truncation_at,
)
from ipmerge_core.spectral.low_rank import LowRank
from ipmerge_core.spectral.similarity import Update
from ipmerge_core.spectral.spectrum import as_float

Ablation = Annotated[
    Literal["none", "rescale_only", "select_only"],
    Range(help="skip the projection, or also the rescaling"),
]
_PROJECTS = ("ablation", ("none",))
_DECOMPOSES = ("ablation", ("none", "rescale_only"))
_TRUNCATES = ("math_energy", 1.0)  # if it is not 1
_WEIGHTS = (("projector", ("softmax",)), _PROJECTS)
GammaNorm = Annotated[
    Literal["sum", "max"],
    Range(help="normalize gamma to sum 1, or to maximum 1", only_with=_WEIGHTS),
]
Projector = Annotated[
    Literal["softmax", "top_k", "complement", "protect", "input_filter", "off_inputs"],
    Range(
        help="on the MLLM's directions: softmax weights, or the first top_k unweighted; off them: "
        "complement, or protect (soft); off the MLLM's inputs, by calibration: input_filter, which "
        "follows the expert's inputs, or off_inputs",
        only_with=(_PROJECTS,),
    ),
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
Energy = Annotated[
    float,
    Range(
        low=0,
        high=1,
        help="share of the energy of the MLLM's task vector whose directions are left out; "
        "previews are exact at 0.05, 0.1, ..., 1",
        before=ENERGY,
        only_with=(("projector", ("complement",)), _PROJECTS),
    ),
]
MathEnergy = Annotated[
    float,
    Range(
        low=0,
        high=1,
        low_open=True,
        help="share of the energy of the expert's task vector whose directions are kept; 1: all. "
        "Below 1 the update is of low rank; with ablation=select_only previews are exact at "
        "0.05, 0.1, ..., 0.95",
        before=1.0,
    ),
]
Beta = Annotated[
    float,
    Range(
        low=0,
        help="weight of the MLLM's inputs against the expert's change; 0 adds all of it",
        usual=(0.0, 10.0),
        before=1.0,
        only_with=(("projector", ("input_filter", "off_inputs")), _PROJECTS),
    ),
]
Budget = Annotated[
    float,
    Range(
        low=0,
        high=1,
        help="relative change of every merged matrix at lambda 1, whatever the size of the update; "
        "0: the update's own size",
        usual=(0.0, 0.1),
        before=0.0,
    ),
]
OutputBudget = Annotated[
    float,
    Range(
        low=0,
        high=1,
        help="the same for the outputs on the MLLM's inputs, which needs a calibration; no weights "
        "change by more than twice as much",
        usual=(0.0, 0.1),
        before=0.0,
    ),
]
Directions = Annotated[
    Literal["existing", "all"],
    Range(
        help="use only directions above the rounding noise of the stored weights, or all",
        before="all",
        only_with=(_DECOMPOSES,),
        also_unless=(_TRUNCATES,),
    ),
]
Rank = (
    Annotated[
        int,
        Range(
            low=1,
            help="number of singular triplets to keep; none: all",
            only_with=(_DECOMPOSES,),
            also_unless=(_TRUNCATES,),
        ),
    ]
    | None
)


_SAME_SHARE = 1e-9
_DECOMPOSED_WITH = ("rank", "directions")  # analysis options that the directions depend on


def _direction(parameters: Mapping[str, Any]) -> str:
    """Return the name of the update in a record; for some parameters none has that name."""
    ablation, projector = parameters["ablation"], parameters["projector"]
    if parameters["math_energy"] < 1:
        named = _named_share(parameters["math_energy"], KEPT_SHARES)
        return truncation_at(parameters["math_energy"]) if named else "truncated between"
    if ablation != "none":
        return str(ablation)
    if projector == "softmax":
        return str(parameters["gamma_norm"])
    if projector != "complement":
        return str(projector)
    share = parameters["energy"]
    named = _named_share(share, ENERGY_SHARES)
    return complement_at(share) if named else f"complement of {share:g}"


def _named_share(share: float, shares: Sequence[float]) -> bool:
    """Return whether an analysis measured the update at a share."""
    return any(abs(share - each) < _SAME_SHARE for each in shares)


def _affine(parameters: Mapping[str, Any]) -> AffineUpdate | None:
    """Return the affine form in a direction of the analysis; None for other parameters."""
    if _unknown(parameters):
        return None
    direction = _direction(parameters)
    options = _DECOMPOSED_WITH if direction != "select_only" else ()
    if direction in ("sum", "max"):
        options = ("temperature", *options)
    return AffineUpdate(
        0.0,
        parameters["lambda_"],
        direction,
        measured_with=options,
        budget=parameters["budget"],
    )


def _unknown(parameters: Mapping[str, Any]) -> str:
    """Return why a preview cannot be exact; empty if it can."""
    if parameters["output_budget"]:
        return "the budget of the outputs depends on the calibration"
    direction, kept = _direction(parameters), parameters["math_energy"]
    if kept < 1 and parameters["ablation"] != "select_only":
        return (
            f"the analysis measured truncations of the expert's task vector alone, and the plan "
            f"projects or rescales one of math_energy {kept:g}"
        )
    if direction == "truncated between":
        return (
            f"the analysis measured truncations at the energies 0.05, 0.1, ..., 0.95, and the plan "
            f"has math_energy {kept:g}"
        )
    if direction in BY_INPUTS:
        return "the filter depends on the calibration"
    if direction == "top_k":
        return "its change is not a multiple of a direction that the analysis measured"
    if direction.startswith("complement of"):
        return (
            f"the analysis measured the complements at the energies 0.05, 0.1, ..., 1, and the "
            f"plan has energy {parameters['energy']:g}"
        )
    return ""


def _needed_data(parameters: Mapping[str, Any]) -> Literal["gram"] | None:
    """Return the calibration that the parameters need."""
    filters = parameters["ablation"] == "none" and parameters["projector"] in BY_INPUTS
    return "gram" if filters or parameters["output_budget"] else None


def _check(parameters: Mapping[str, Any]) -> None:
    """Refuse two budgets. Raises: PlanError."""
    if parameters["budget"] and parameters["output_budget"]:
        raise PlanError(
            f"budget is {parameters['budget']:g} and output_budget "
            f"{parameters['output_budget']:g}; a matrix is rescaled to one of them. Set the other "
            f"to 0."
        )


@merge_method(
    label="IP-Merging",
    source="arXiv 2510.14387",
    formula="W = W_v + lambda sum_k rho_k dW_e,k V_v diag(gamma_k^2) V_v^T",
    gains=("lambda_",),
    gain="lambda_",
    several_experts=True,
    affine=_affine,
    unknown=_unknown,
    needed_data=_needed_data,
    decides_data=("projector", "ablation", "output_budget"),
    check=_check,
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
    energy: Energy = ENERGY,
    math_energy: MathEnergy = 1.0,
    beta: Beta = 1.0,
    budget: Budget = 0.0,
    output_budget: OutputBudget = 0.0,
    rank: Rank = None,
    ablation: Ablation = "none",
    directions: Directions = "existing",
    noise: Noise = None,
    low_rank: Changes = None,
    mllm_gram: GramInput = None,
    math_gram: GramInputs = None,
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
            The other projectors are additions, without rho (docs/variants.md). They leave out what
            the paper keeps: `"complement"` P = dM (I - V_k V_k^T), with k the least number of the
            MLLM's directions that hold the share `energy` of the energy of those that are used:
            the existing ones, at most `rank`; `"protect"` P = dM (I - V
            diag(w) V^T), w_i = (S_V,i / S_V,1) (1 - agreement_i) (`protection`); `"off_inputs"` and
            `"input_filter"` reduce dM on the MLLM's inputs, weighted by `beta` (`protection`).
            `math_energy` < 1 first truncates every dM_k to the least number of its directions that
            hold this share of its energy, as if the expert had no others: the update of any variant
            is then of low rank.
            `budget` > 0 rescales the sum of the P_k so that it changes the matrix by
            lambda * budget * ||W_v||; `output_budget` so that it changes the outputs on the MLLM's
            inputs X by lambda * output_budget * ||W_v X||, but the weights by no more than twice
            what `budget` would: an update that is silent on X would grow without bound.
            Where dV is zero, complement and protect leave out nothing; so do the filters where the
            MLLM's Gram matrix is zero. An update of zero stays zero with a budget.
    Raises: PlanError for a filter, or a budget of outputs, without Gram matrices, or with one that
            is not a Gram matrix; for a budget of outputs where the MLLM has none.
    Source: IP-Merging, arXiv 2510.14387. The absolute value is an addition: the sign of a singular
            vector is arbitrary, and the result would depend on it. So is the restriction to
            existing directions, without which rounding determines the update of a low-rank expert.
    """
    models = Models(base, mllm, as_list(math), noise, low_rank)
    asked = Projection(
        temperature, gamma_norm, projector, top_k, energy, beta, rank, ablation, directions,
        math_energy,
    )  # fmt: skip
    by_outputs = output_budget > 0
    grams: list[Tensor] = []
    if asked.filters or by_outputs:
        label = f"IP-Merging with {projector if asked.filters else 'an output_budget'}"
        shapes = [(mllm.shape[1],) * 2, (mllm.shape[1],)]
        count = len(models.experts)
        grams = checked(label, "Gram matrix", shapes, mllm_gram, math_gram, count)
    merged, updates, gain = as_float(mllm), updates_of(models, asked, grams), lambda_
    if limit := budget or output_budget:
        known = [matrix_of(update) for update in updates]
        change = torch.stack(known).sum(0)
        gain *= budget_factor(limit, change, merged, grams[0] if by_outputs else None)
        updates = iter(known)
    for update in updates:
        merged = merged + matrix_of(update, gain)
    return merged


def ip_updates(
    base: Tensor,
    mllm: Tensor,
    experts: Sequence[Tensor],
    *,
    lambda_: float,
    budget: float = 0.0,
    output_budget: float = 0.0,
    noise: Sequence[float] | None = None,
    low_rank: Sequence[LowRank | None] | None = None,
    **projection: Any,  # noqa: ANN401
) -> Iterator[Update]:
    """Yield the update lambda P_k of every expert as factors; see `ip_merging`.

    Raises: PlanError for a projector that leaves directions out, or a budget of outputs.
    """
    asked = Projection(**projection)
    if not asked.is_low_rank:
        what = asked.projector if asked.ablation == "none" else asked.ablation
        raise PlanError(
            f"The update of IP-Merging with {what} has full rank: it is the expert's task vector, "
            f"or most of it. Write the merged model instead of an adapter, use projector softmax "
            f"or top_k, or truncate it with math_energy below 1."
        )
    if output_budget or asked.filters:
        raise PlanError(
            "An adapter cannot be computed with an output_budget or a filter, which need "
            "calibration data. Use a budget, or write the merged model instead."
        )
    models = Models(base, mllm, experts, noise, low_rank)
    found = (update for update in updates_of(models, asked) if isinstance(update, Update))
    known, gain = list(found) if budget else [], lambda_
    if budget:
        gain *= budget_of_factors(budget, known, as_float(mllm))
    for update in known or found:
        yield update.scaled(gain)
