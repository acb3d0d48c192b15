"""Every merge method as its formula says, in fp64: slow truth beside fast code.

Written from the formulas with `torch.linalg.svd`, whole matrices and full sorts: no block, no
engine, no selection of ours. A definition takes the base, all tuned matrices (the MLLM first) and
every parameter of its method; `test_numerics.py` fails for a method without one.

Where a method looks at singular directions, `noise` is the singular value above which one exists
(`direction_definitions`); elections and thresholds are in `elementwise_definitions`. The numbers
that DARE and DELLA draw are the product's: its keyed generator is their definition.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from direction_definitions import DIRECTIONS, Noise
from elementwise_definitions import CHOOSERS, ELEMENTWISE, densities
from torch import Tensor

from ipmerge_core.methods import METHODS

__all__ = ["CHOOSERS", "DEFINITIONS", "Noise", "coefficients", "defined", "whole_model"]

Definition = Callable[..., Tensor]
DEFINITIONS: dict[str, Definition] = {**ELEMENTWISE, **DIRECTIONS}


def definition(function: Definition) -> Definition:
    """Enter a definition under its method's name."""
    DEFINITIONS[function.__name__] = function
    return function


def defined(
    name: str, base: Tensor, mllm: Tensor, experts: Sequence[Tensor], **given: Any
) -> Tensor:
    """What the method should make of these stored matrices, in fp64.

    `given` holds parameters and inputs; what is not given has the method's default. Inputs that a
    definition does not know (a tensor name, a noise floor) are left out, parameters never.
    """
    return _called(name, DEFINITIONS[name], base, [mllm, *experts], given)


def coefficients(
    name: str, base: Tensor, mllm: Tensor, experts: Sequence[Tensor], **given: Any
) -> list[Tensor]:
    """Matrices A_i with W = W0 + sum_i A_i dW_i, elementwise, of a method in `CHOOSERS`."""
    return _called(name, CHOOSERS[name], base, [mllm, *experts], given)


def _called(
    name: str, function: Definition, base: Tensor, tuned: Sequence[Tensor], given: dict[str, Any]
) -> Any:
    parameters = {p.name: given.pop(p.name, p.default) for p in METHODS[name].parameters}
    known = inspect.signature(function).parameters
    inputs = {key: _wide(value) for key, value in given.items() if key in known}
    return function(base.double(), [W.double() for W in tuned], **parameters, **inputs)


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide(entry) for entry in value]
    return value.double() if isinstance(value, Tensor) else value


# --- weights from norms and from data ---


@definition
def metagpt(base, tuned, *, scope, statistic=None):
    taus = [W - base for W in tuned]
    squares = [float(tau.square().sum()) for tau in taus]
    total = sum(squares)
    weights = [s / total for s in squares] if total else [1 / len(taus)] * len(taus)
    if statistic is not None and scope == "model":
        weights = statistic
    return base + sum(w * tau for w, tau in zip(weights, taus, strict=True))


@definition
def nan(base, tuned, *, norm_of, scope, global_scale, statistic=None):
    taus = [W - base for W in tuned]
    norms = [float(x.norm()) for x in (taus if norm_of == "tau" else tuned)]
    inverse = [1 / norm for norm in norms] if all(norms) else [float(norm == 0) for norm in norms]
    factor = len(tuned) / 2 if global_scale == "T/2" else 1.0
    weights = [factor * share / sum(inverse) for share in inverse]
    if statistic is not None and scope == "model":
        weights = statistic
    return base + sum(w * tau for w, tau in zip(weights, taus, strict=True))


@definition
def fisher(base, tuned, *, alpha, floor, floor_is, scope, mllm_fisher, math_fisher, statistic=None):
    information = [mllm_fisher, *math_fisher]
    shares = [alpha] + [(1 - alpha) / (len(tuned) - 1)] * (len(tuned) - 1)
    norms = [float(F.norm()) for F in information]
    means = [float(F.mean()) for F in information]
    if statistic is not None and scope == "model":
        norms, means = statistic[: len(tuned)], statistic[len(tuned) :]
    floors = [floor] * len(tuned)
    if floor_is == "relative" and floor:
        floors = [floor * mean for mean in means]
    scales = [1.0 if scope == "none" else n + e for n, e in zip(norms, floors, strict=True)]
    weights = [
        c * (F + e) / scale if scale else c * torch.ones_like(F)
        for c, F, e, scale in zip(shares, information, floors, scales, strict=True)
    ]
    return sum(w * W for w, W in zip(weights, tuned, strict=True)) / sum(weights)


@definition
def regmean(base, tuned, *, off_diagonal, alpha, mllm_gram, math_gram):
    shares = [alpha] + [(1 - alpha) / (len(tuned) - 1)] * (len(tuned) - 1)
    left, right = 0, 0
    for c, G, W in zip(shares, [mllm_gram, *math_gram], tuned, strict=True):
        whole = torch.diag(G) if G.ndim == 1 else G
        shrunk = off_diagonal * whole + (1 - off_diagonal) * torch.diag(whole.diagonal())
        left, right = left + c * shrunk, right + c * shrunk @ W.T
    return torch.linalg.solve(left, right).T


# --- arcs ---


def on_arc(x, y, t, straight):
    """The point at t between two vectors; on the chord where `straight` says so of the cosine."""
    norms = float(x.norm() * y.norm())
    cosine = max(-1.0, min(1.0, float((x * y).sum()) / norms)) if norms else 1.0
    if straight(cosine):
        return (1 - t) * x + t * y
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


@definition
def slerp(base, tuned, *, t):
    return on_arc(*tuned, t, lambda cosine: abs(cosine) > 0.9995)


@definition
def nuslerp(base, tuned, *, t, of, per):
    start = torch.zeros_like(base) if of == "weights" else base
    x, y = (W - start for W in tuned)
    if per == "column":
        x, y = x.T, y.T
    pairs = [(x, y)] if per == "tensor" else zip(x.split(1), y.split(1), strict=True)
    moved = torch.cat([on_arc(*pair, t, lambda c: math.sin(math.acos(c)) < 1e-4) for pair in pairs])
    return start + (moved.T if per == "column" else moved)


@definition
def karcher(base, tuned, *, alpha):
    count = len(tuned)
    own = 1 / count if alpha is None else alpha
    shares = [own] + [(1 - own) / (count - 1)] * (count - 1)
    units = [W / W.norm() for W in tuned]
    u = sum(a * unit for a, unit in zip(shares, units, strict=True))
    u = u / u.norm()
    for _ in range(10):
        tangent = torch.zeros_like(u)
        for a, unit in zip(shares, units, strict=True):
            cosine = float((u * unit).sum().clamp(-1, 1))
            angle = math.acos(cosine)
            pull = angle / math.sin(angle) if angle > 1e-12 else 1.0
            tangent += a * pull * (unit - cosine * u)
        size = float(tangent.norm())
        if size < 1e-5:
            break
        u = math.cos(size) * u + math.sin(size) / size * tangent
        u = u / u.norm()
    return sum(a * float(W.norm()) for a, W in zip(shares, tuned, strict=True)) * u


@definition
def multislerp(base, tuned, *, alpha, of):
    count = len(tuned)
    own = 1 / count if alpha is None else alpha
    shares = [own] + [(1 - own) / (count - 1)] * (count - 1)
    origin = torch.zeros_like(base) if of == "weights" else base
    vectors = [W - origin for W in tuned]
    norms = [float(x.norm()) for x in vectors]
    pairs = zip(shares, vectors, norms, strict=True)
    mean = sum(a * x / norm if norm else 0 * x for a, x, norm in pairs)
    if float(mean.norm()) < 1e-8:
        return origin + sum(a * x for a, x in zip(shares, vectors, strict=True))
    length = sum(a * norm for a, norm in zip(shares, norms, strict=True))
    return origin + length * mean / mean.norm()


@definition
def model_stock(base, tuned, *, models, per):
    taus = [W - base for W in tuned][0 if models == "all" else 1 :]
    rows = [tau if per == "row" else tau.reshape(1, -1) for tau in taus]
    N, cosines = len(rows), []
    for i, x in enumerate(rows):
        for y in rows[i + 1 :]:
            norms = x.norm(dim=1) * y.norm(dim=1)
            cosines.append(torch.where(norms > 0, (x * y).sum(1) / norms.clamp(min=1e-300), 0.0))
    c = torch.stack(cosines).mean(0) if cosines else torch.ones(len(rows[0])).to(base)
    t = (N * c / (1 + (N - 1) * c))[:, None]
    moved = (t * sum(rows) / N).reshape(base.shape)
    return (base if models == "all" else tuned[0]) + moved


@definition
def ram(base, tuned, *, epsilon, boost, boost_cap):
    taus = [W - base for W in tuned]
    changed = [tau.abs() > epsilon for tau in taus]
    count = sum(mask.double() for mask in changed)
    moved = torch.zeros_like(base)
    for tau, mask in zip(taus, changed, strict=True):
        alone, shared = mask & (count == 1), mask & (count > 1)
        ratio = float(shared.sum()) / max(float(alone.sum()), 1.0)
        moved[alone] += tau[alone] * (1 + boost * min(ratio, boost_cap))
        moved[shared] += tau[shared] / count[shared]
    return base + moved


# --- numbers of the whole model ---


def whole_model(
    name: str, matrices: Sequence[Sequence[Tensor]], parameters: Mapping[str, Any]
) -> tuple[float, ...] | None:
    """The `statistic` of a method over all matrices, each (base, mllm, experts ..); or None.

    For Fisher merging the matrices are the information itself, without a base.
    """
    if parameters.get("scope") != "model":
        return None
    wide = [[W.double() for W in matrix] for matrix in matrices]
    if name == "fisher":
        columns = list(zip(*wide, strict=True))
        sizes = [sum(F.numel() for F in column) for column in columns]
        means = [sum(float(F.sum()) for F in c) / n for c, n in zip(columns, sizes, strict=True)]
        return (*(_norm(column) for column in columns), *means)
    models = list(zip(*([W - base for W in tuned] for base, *tuned in wide), strict=True))
    if name == "ties":
        shares = densities(
            *(parameters[f"{p}density"] for p in ("", "mllm_", "math_")), len(models)
        )
        found = []
        for share, taus in zip(shares, models, strict=True):
            values = torch.cat([tau.abs().flatten() for tau in taus]).sort().values
            count = max(1, int(share * len(values))) + (parameters["trim"] == "official")
            found.append(float(values[-min(count, len(values))]))
        return tuple(found)
    squares = [_norm(taus) ** 2 for taus in models]
    if name == "metagpt":
        return tuple(square / sum(squares) for square in squares)
    if parameters["norm_of"] == "weights":
        squares = [_norm(column) ** 2 for column in list(zip(*wide, strict=True))[1:]]
    inverse = [square**-0.5 for square in squares]
    factor = len(squares) / 2 if parameters["global_scale"] == "T/2" else 1.0
    return tuple(factor * share / sum(inverse) for share in inverse)


def _norm(matrices: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(matrix.square().sum()) for matrix in matrices))
