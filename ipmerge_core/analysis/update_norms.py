"""Norms and inner products of an expert's updates, without forming them.

In: the task vectors of an MLLM and its experts for one matrix, with their spectra. Out: the
`UpdateNorms` of every update by name: the four of IP-Merging, and those that leave out the MLLM's
directions. All are sums over the MLLM's right directions. No IO.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ipmerge_core.analysis.records import UpdateNorms
from ipmerge_core.spectral import similarity as sim
from ipmerge_core.spectral.kinds import COMPLEMENTS, TRUNCATIONS
from ipmerge_core.spectral.protection import NOTHING, protection
from ipmerge_core.spectral.spectrum import Spectrum

GAMMA_NORMS = ("sum", "max")
_CANCELS = 0.05  # share of ||dM||^2 below which a difference of sums has too few digits
_DIGITS = 6  # of the products of complements and truncations: a record holds 39 of them
_DIGITS_OF_SEVERAL = 12  # of several experts, whose updates may cancel in a sum


class Side(NamedTuple):
    """One task vector with its spectrum and the numbers shared by all records of a matrix.

    `spectrum` contains the participating directions, `sigma` all computed singular values, `noise`
    is the level of the rounding noise, and `existing` the number of directions above it.
    """

    task_vector: Tensor
    spectrum: Spectrum
    sigma: Tensor
    noise: float
    existing: int
    norm2: float
    ranks: dict[str, float]
    nuclear: float

    @property
    def kept(self) -> Tensor:
        """The task vector, projected onto the kept directions if the spectrum is truncated."""
        if len(self.sigma) == min(self.task_vector.shape):
            return self.task_vector
        return sim.truncated(self.task_vector, self.spectrum)


def dot(a: Tensor, b: Tensor) -> float:
    """Compute the inner product of two matrices in fp64."""
    return float((a * b).sum(dtype=torch.float64))


class Weights(NamedTuple):
    """An update P = T diag(each) V^T + rest R, see `Expert`.

    Shapes: each (r,) in fp64, one weight per direction of the MLLM.
    """

    each: Tensor
    rest: float


class Truncated(NamedTuple):
    """An expert's task vector in its own right directions, dM_k = sum_{i<=k} t_i v_i^T.

    `counts` are the numbers k of directions by `KEPT_SHARES`; empty for none.

    Shapes: columns (m, r) of t_i = dM v_i, Vh (r, n).
    """

    columns: Tensor
    Vh: Tensor
    counts: tuple[int, ...]


class Expert(NamedTuple):
    """Intermediate results for inner products of an expert's updates, without forming them.

    Math:   dM = T V^T + R with T = dM V (m, r), V the MLLM's r right directions and R V = 0, so
            that products of updates are sums over columns of T, and over R. `rest` is ||R||^2.

    `weights` are those of each projected update; `unprojected` updates are whole matrices.
    """

    kept: Tensor
    through: Tensor
    rest: float
    weights: dict[str, Weights]
    unprojected: dict[str, Tensor]
    truncated: Truncated


def expert_of(
    mllm: Side, math: Side, temperature: float, left_out: Sequence[int], kept: Sequence[int]
) -> Expert:
    """Project an expert's task vector on the MLLM's directions, and weight them for each update.

    `left_out` are the numbers of directions that each complement leaves out, `kept` those that each
    truncation keeps; empty for none.
    """
    rho = sim.nuclear_ratio(mllm.spectrum, math.spectrum)
    angles = sim.corresponding_angles(mllm.spectrum, math.spectrum)
    dM, V = math.kept, mllm.spectrum.Vh
    through, missing = dM @ V.T, len(V) - len(angles)
    weights = {
        norm: Weights(rho * torch.nn.functional.pad(strength, (0, missing)), 0.0)
        for norm in GAMMA_NORMS
        for gamma in [sim.importance(angles, temperature, norm)]
        for strength in [sim.strengths(gamma.double(), mllm.spectrum)]
    }
    rest = _rest_norm2(dM, through, V)
    own = _Products(_column_products(through, through), rest)
    place = torch.arange(len(V), device=dM.device)
    held_back = {"protect": 1 - protection(mllm.spectrum, math.spectrum)}
    for name, count in zip(COMPLEMENTS, left_out, strict=False):
        held_back[name] = (place >= count).double()
    least = NOTHING**2 * dot(dM, dM)
    for name, each in held_back.items():
        found = Weights(each, 1.0)
        is_left = own.weighted(found, found) > least
        weights[name] = found if is_left else Weights(torch.zeros_like(each), 0.0)
    return Expert(
        kept=dM,
        through=through,
        rest=rest,
        weights=weights,
        unprojected={"rescale_only": rho * dM, "select_only": math.task_vector},
        truncated=_truncated(math, kept),
    )


def _truncated(math: Side, counts: Sequence[int]) -> Truncated:
    """Take the columns that the largest truncation keeps."""
    Vh = math.spectrum.Vh[: max(counts, default=0)]
    return Truncated(math.task_vector @ Vh.T, Vh, tuple(counts))


def _rest_norm2(dM: Tensor, through: Tensor, Vh: Tensor) -> float:
    """Compute ||dM - T V^T||^2: from a difference of norms if that has enough digits."""
    if len(Vh) == dM.shape[1]:
        return 0.0
    whole = dot(dM, dM)
    rest = whole - dot(through, through)
    if rest > _CANCELS * whole:
        return rest
    R = dM - through @ Vh
    return dot(R, R)


def update_norms(
    mllm: Side, expert: Expert, earlier: Sequence[Expert], *, several: bool = False
) -> dict[str, UpdateNorms]:
    """Compute inner products of every update with itself, dV, and earlier experts' updates.

    `several`: whether the pair has more than one expert.
    """
    digits = _DIGITS_OF_SEVERAL if several else _DIGITS
    plain = {
        name: UpdateNorms(
            norm2=dot(update, update),
            inner=dot(mllm.task_vector, update),
            cross=tuple(dot(update, other.unprojected[name]) for other in earlier),
        )
        for name, update in expert.unprojected.items()
    }
    truncations = dict(_truncations(mllm, expert, earlier, digits))
    return {**dict(_projected(mllm, expert, earlier, digits)), **truncations, **plain}


def _truncations(
    mllm: Side, expert: Expert, earlier: Sequence[Expert], digits: int
) -> Iterator[tuple[str, UpdateNorms]]:
    """Yield the products of every truncation.

    Math:   <dM_k, dM'_l> = sum_{i<=k, j<=l} <t_i, t'_j> <v_i, v'_j>, which is a corner of a table
            of cumulative sums; ||dM_k||^2 = sum_{i<=k} ||t_i||^2.
    """
    own = expert.truncated
    if not own.counts:
        return
    norms2 = _column_products(own.columns, own.columns)
    inner = _column_products(mllm.task_vector @ own.Vh.T, own.columns)
    tables = [_corners(own, other.truncated) for other in earlier]
    for place, (name, count) in enumerate(zip(TRUNCATIONS, own.counts, strict=True)):
        yield (
            name,
            _rounded(
                UpdateNorms(
                    norm2=float(norms2[:count].sum()),
                    inner=float(inner[:count].sum()),
                    cross=tuple(
                        float(table[count, other.truncated.counts[place]])
                        for other, table in zip(earlier, tables, strict=True)
                    ),
                ),
                digits,
            ),
        )


def _corners(a: Truncated, b: Truncated) -> Tensor:
    """Return the products of all truncations of two experts. Shapes: (r + 1, r' + 1), fp64."""
    lefts = (a.columns.T @ b.columns).double()
    table = (lefts * (a.Vh @ b.Vh.T).double()).cumsum(0).cumsum(1)
    return torch.nn.functional.pad(table, (1, 0, 1, 0))


class _Products(NamedTuple):
    """Products of two task vectors in each of the MLLM's directions, and outside of all."""

    each: Tensor
    rest: float

    def weighted(self, a: Weights, b: Weights) -> float:
        """Return the product of the updates with these weights."""
        return float((a.each * b.each) @ self.each) + a.rest * b.rest * self.rest


def _projected(
    mllm: Side, expert: Expert, earlier: Sequence[Expert], digits: int
) -> Iterator[tuple[str, UpdateNorms]]:
    V = mllm.spectrum.Vh
    vision = mllm.task_vector @ V.T  # dV V
    own = _Products(_column_products(expert.through, expert.through), expert.rest)
    with_mllm = _products(mllm.task_vector, expert.kept, vision, expert.through)
    crossed = [
        _products(expert.kept, other.kept, expert.through, other.through) for other in earlier
    ]
    whole = Weights(torch.ones(len(V), dtype=torch.float64, device=V.device), 1.0)  # dV itself
    for name, weights in expert.weights.items():
        norms = UpdateNorms(
            norm2=own.weighted(weights, weights),
            inner=with_mllm.weighted(weights, whole),
            cross=tuple(
                products.weighted(weights, other.weights[name])
                for other, products in zip(earlier, crossed, strict=True)
            ),
        )
        yield name, _rounded(norms, digits) if name in COMPLEMENTS else norms


def _products(a: Tensor, b: Tensor, a_through: Tensor, b_through: Tensor) -> _Products:
    each = _column_products(a_through, b_through)
    return _Products(each, dot(a, b) - float(each.sum()))


def _column_products(a: Tensor, b: Tensor) -> Tensor:
    """Compute <a_i, b_i> for each column i in fp64."""
    return (a * b).sum(0, dtype=torch.float64)


def _rounded(norms: UpdateNorms, digits: int) -> UpdateNorms:
    def rounded(value: float) -> float:
        return float(f"{value:.{digits}g}")

    cross = tuple(map(rounded, norms.cross))
    return UpdateNorms(rounded(norms.norm2), rounded(norms.inner), cross)
