"""WUDI-Merging: minimise the interference of the merged change with each task vector.

In: base, mllm and math matrices of one shape (m, n). Out: the merged matrix in fp32, or fp64 for
fp64 inputs. The gradient is formulated so that its cost does not grow with the number of models.
Like the authors' code it uses Adam with its defaults, so that the result depends on the scale of
the task vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, hypot
from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.methods.blocks import result_dtype
from ipmerge_core.methods.declarations import Matrix
from ipmerge_core.methods.elementwise import add_to_base
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import (
    Coefficient,
    Experts,
    Gain,
    Noise,
    Report,
    as_list,
    merge_method,
)
from ipmerge_core.methods.subspace import Change, changes_of, mean_of_changes
from ipmerge_core.spectral.spectrum import as_float, existing

_ITERATES = (("closed_form", (False,)),)
Steps: TypeAlias = Annotated[
    int, Range(low=0, high=10_000, help="number of Adam steps", only_with=_ITERATES)
]
Rate: TypeAlias = Annotated[
    float, Range(low=0, low_open=True, help="learning rate of Adam", only_with=_ITERATES)
]
Closed: TypeAlias = Annotated[bool, Range(help="compute the exact minimum instead of Adam steps")]
_SOLVES = ("closed_form", (True,))
Filter: TypeAlias = Annotated[
    Literal["none", "swudi", "aswudi"],
    Range(
        help="filter the exact minimum: swudi by strength and a fixed number of directions, aswudi "
        "by their effective number",
        before="none",
        only_with=(_SOLVES,),
    ),
]
Kept: TypeAlias = Annotated[
    float,
    Range(
        low=0,
        high=1,
        low_open=True,
        help="share of the directions that swudi solves for",
        before=0.65,
        only_with=(("spectral_filter", ("swudi",)), _SOLVES),
    ),
]
Start: TypeAlias = Annotated[
    Literal["sum", "mean"],
    Range(
        help="the sum or the mean of the task vectors, which the filter keeps elsewhere",
        before="sum",
        only_with=(("spectral_filter", ("swudi", "aswudi")), _SOLVES),
    ),
]
_SLACK = 1e-9  # rounding of a number of directions that is whole
_SHARPNESS = 300.0  # of swudi's filter, as in the authors' code


@merge_method(
    label="WUDI-Merging",
    source="arXiv 2503.08099",
    formula="W = W0 + s argmin_X sum_i |(X - dW_i) dW_i^T|^2 / |dW_i|^2, from X = sum_i dW_i",
    several_experts=True,
    unknown="it is the result of an iteration",
    vectors=mean_of_changes,
    matrixwise=True,
)
def wudi(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    mllm_weight: Coefficient = 1.0,
    math_weight: Coefficient = 1.0,
    iterations: Steps = 300,
    learning_rate: Rate = 1e-5,
    closed_form: Closed = False,
    spectral_filter: Filter = "none",
    kept: Kept = 0.65,
    start: Start = "sum",
    scale: Gain = 1.0,
    noise: Noise = None,
    report: Report = None,
) -> Matrix:
    """Optimise the sum of the task vectors for minimal interference with each of them.

    Math:   with tau_i = a_i dW_i: L(X) = sum_i ||(X - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2, from
            X = sum_i tau_i by `iterations` of Adam; W = W0 + s X. With
            G = sum_i tau_i^T tau_i / ||tau_i||^2, C = sum_i tau_i tau_i^T tau_i / ||tau_i||^2 the
            gradient is 2 (X G - C).
            closed_form: the exact minimum X = C G^+ (RegMean with the Gram matrices tau^T tau),
            over the existing directions of the stacked task vectors (`spectrum.existing`).
            spectral_filter, with G = V diag(e) V^T and X0 the sum or the mean of the tau_i:
            X = X0 + (C V diag(1 / e) - X0 V) diag(f) V^T,
            swudi: f_j = 1 - exp(-300 e_j) for the first ceil(kept n) directions, else 0;
            aswudi: f_j = 1 for the first ceil((sum_j sqrt e_j)^2 / sum_j e_j), else 0.
    Shapes: all (m, n). Zero task vectors are ignored; a single one is used unchanged.
    Source: WUDI-Merging, arXiv 2503.08099, where a_i = 1. An Adam step moves an element by at most
            about the learning rate, so that task vectors larger than iterations * rate do not
            converge; this is the authors' method, and the closed form is an alternative. The
            filters are SWUDI and ASWUDI of the code of OptMerge, arXiv 2505.19892, where swudi
            keeps 0.65 of the directions, or 0.85 for language models.
    """
    experts = as_list(math)
    dtype = result_dtype(base, mllm, *experts)
    W0, W_v = as_float(base).to(dtype), as_float(mllm).to(dtype)
    weights = [mllm_weight] + [math_weight] * len(experts)
    changes = changes_of(base, mllm, experts, weights, noise)
    vectors = [change.vector for change in changes]
    if len(vectors) < 2:
        return add_to_base(W0, W_v, vectors[0] if vectors else torch.zeros_like(W0), scale)
    units = [vector / torch.linalg.vector_norm(vector, dtype=torch.float64) for vector in vectors]
    units = [unit.to(dtype) for unit in units]
    whole = torch.stack(vectors).sum(0)
    if closed_form:
        first = whole if start == "sum" else whole / len(vectors)
        X = _minimum(changes, units, spectral_filter, kept, first)
        return add_to_base(W0, W_v, X, scale)
    gradient_of = _gradient_of(vectors, units)
    X = _adam(whole, gradient_of, iterations, learning_rate, report or (lambda _: None))
    return add_to_base(W0, W_v, X, scale)


def _gradient_of(vectors: Sequence[Tensor], units: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the gradient X -> 2 (X G - C), with G formed or applied as a product if cheaper."""
    C = torch.zeros_like(vectors[0])
    for vector, unit in zip(vectors, units, strict=True):
        C.addmm_(vector @ unit.T, unit)
    rows = torch.cat(list(units))  # G = rows^T rows
    if 2 * rows.shape[0] < rows.shape[1]:
        return lambda X: ((X @ rows.T) @ rows).sub_(C).mul_(2)
    G = rows.T @ rows
    return lambda X: (X @ G).sub_(C).mul_(2)


def _adam(
    X: Tensor,
    gradient_of: Callable[[Tensor], Tensor],
    iterations: int,
    learning_rate: float,
    report: Callable[[float], object],
) -> Tensor:
    """Take Adam's steps from X, at a constant rate and in place; no graph is recorded."""
    adam = torch.optim.Adam([X], lr=learning_rate, fused=True)  # without temporary matrices
    for step in range(1, iterations + 1):
        adam.zero_grad()  # frees the last gradient before the next is computed
        X.grad = gradient_of(X)
        adam.step()
        report(step / iterations)
    X.grad = None
    return X


def _minimum(
    changes: Sequence[Change], units: Sequence[Tensor], filtered: str, kept: float, start: Tensor
) -> Tensor:
    """Compute C G^+ = D (R^T)^+ with stacked unit task vectors R and D = [tau_i u_i^T ..].

    With a filter, X0 + (C G^+ - X0) V diag(f) V^T.
    """
    rows = torch.cat(list(units)).double()
    pairs = zip(changes, units, strict=True)
    D = torch.cat([change.vector.double() @ u.double().T for change, u in pairs], dim=1)
    noise = hypot(*(c.noise / float(torch.linalg.matrix_norm(c.vector)) for c in changes))
    found = existing(rows, noise)
    assert found.U is not None, "svd without U"
    solved = (D @ found.U) / found.S  # C G^+ V
    if filtered == "none":
        return (solved @ found.Vh).to(changes[0].vector)
    X0, strengths = start.double(), _filter(found.S.square(), filtered, kept, rows.shape[1])
    change = (solved - X0 @ found.Vh.T) * strengths @ found.Vh
    return (X0 + change).to(changes[0].vector)


def _filter(energies: Tensor, name: str, kept: float, n: int) -> Tensor:
    """Return the weights f of directions with these eigenvalues, strongest first, of n in all."""
    place = torch.arange(len(energies), device=energies.device)
    if name == "swudi":
        return -torch.expm1(-_SHARPNESS * energies) * (place < ceil(kept * n))
    effective = float(energies.sqrt().sum().square() / energies.sum())
    return (place < ceil(effective - _SLACK)).to(energies)
