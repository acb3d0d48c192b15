"""Every merge method as its formula says, in fp64: slow truth beside fast code.

Written from the formulas with `torch.linalg.svd`, whole matrices and full sorts: no block, no
engine, no selection of ours. A definition takes the base, all tuned matrices (the MLLM first) and
every parameter of its method; `test_numerics.py` fails for a method without one.

Where a method looks at singular directions, `noise` says which exist: those whose singular value is
larger. Without it they are those above the first clean gap of the spectrum, or all where there is
none. The numbers that DARE and DELLA draw are the product's: its keyed generator is their
definition.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ipmerge_core.methods import METHODS
from ipmerge_core.methods.dropout import generator_for, roles

Definition = Callable[..., Tensor]
DEFINITIONS: dict[str, Definition] = {}
_CLEAN = 1e3  # a ratio of neighbouring singular values that nothing but rounding leaves


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


# --- element by element ---


@definition
def linear(base, tuned, *, alpha, mllm_weight, math_weight, normalize):
    W_v, W_e = tuned
    if mllm_weight is None:
        return alpha * W_v + (1 - alpha) * W_e
    total = mllm_weight + math_weight if normalize else 1.0
    return (mllm_weight * W_v + math_weight * W_e) / total


@definition
def task_arithmetic(base, tuned, *, mllm_weight, math_weight):
    tau_v, *taus = (W - base for W in tuned)
    return base + mllm_weight * tau_v + math_weight * sum(taus)


@definition
def layer_swap(base, tuned, *, alpha, last_kept_layer, tensor_name):
    W_v, W_e = tuned
    layer = int(tensor_name.split("layers.")[1].split(".")[0]) if "layers." in tensor_name else -1
    return W_v if layer <= last_kept_layer else alpha * W_v + (1 - alpha) * W_e


def largest(values, count):
    """1 for that many largest magnitudes, of equal ones the first in the matrix; 0 for the rest."""
    order = values.abs().flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros(values.numel(), dtype=torch.float64, device=values.device)
    kept[order[:count]] = 1
    return kept.view(values.shape)


def densities(density, mllm_density, math_density, models):
    own = [mllm_density] + [math_density] * (models - 1)
    return [density if share is None else share for share in own]


def elected(vectors, weights, *, normalize="none", election="weighted"):
    """What each model contributes to every element: 0, or its weight, divided as `normalize` says.

    Weighted elections count a zero sum as positive, unweighted ones too; with "majority" it gets
    the majority sign of the matrix.
    """
    scaled = [w * vector for w, vector in zip(weights, vectors, strict=True)]
    if election == "weighted":
        sign = torch.where(sum(scaled) >= 0, 1.0, -1.0).double()
        agrees = [vector.sign() == sign for vector in scaled]
    else:
        sign = sum(vectors).sign()
        tied = sign.sum().sign() if election == "majority" else torch.ones_like(sign[0, 0])
        sign = torch.where(sign == 0, tied, sign)
        agrees = [(vector.sign() == sign) & (vector != 0) for vector in vectors]
    parts = [w * a.double() for w, a in zip(weights, agrees, strict=True)]
    kind = {False: "none", True: "weights"}.get(normalize, normalize)
    if kind == "none":
        return parts
    total = sum(parts) if kind == "weights" else sum(a.double() for a in agrees)
    total = torch.where(total == 0, 1.0, total)
    return [part / total for part in parts]


def trimmed(vectors, shares, *, official=False, thresholds=None):
    """1 where a task vector is kept, of each."""
    if thresholds is not None:
        return [(v.abs() >= t).double() for v, t in zip(vectors, thresholds, strict=True)]
    size = vectors[0].numel()
    counts = [min(max(1, int(share * size)) + official, size) for share in shares]
    if official:
        last = [v.abs().flatten().sort().values[-k] for v, k in zip(vectors, counts, strict=True)]
        return [(v.abs() >= t).double() for v, t in zip(vectors, last, strict=True)]
    return [largest(vector, k) for vector, k in zip(vectors, counts, strict=True)]


def weights_of(mllm_weight, math_weight, tuned):
    return [mllm_weight] + [math_weight] * (len(tuned) - 1)


def _ties(
    base, tuned, *, mllm_weight, math_weight, density, mllm_density, math_density, normalize,
    election, trim, scope, scale, statistic=None,
):  # fmt: skip
    taus = [W - base for W in tuned]
    kept = trimmed(
        taus,
        densities(density, mllm_density, math_density, len(tuned)),
        official=trim == "official",
        thresholds=statistic if scope == "model" else None,
    )
    parts = elected(
        [k * tau for k, tau in zip(kept, taus, strict=True)],
        weights_of(mllm_weight, math_weight, tuned),
        normalize=normalize,
        election=election,
    )
    return [scale * k * part for k, part in zip(kept, parts, strict=True)]


def _sce(base, tuned, *, select_topk, mllm_weight, math_weight):
    taus = [W - base for W in tuned]
    variance = torch.stack(taus).var(0, correction=0)
    count = int(select_topk * int(variance.count_nonzero()))
    kept = largest(variance, count) if select_topk < 1 else torch.ones_like(variance)
    energies = [float((kept * tau).square().mean()) for tau in taus]
    total = sum(energies)
    shares = [energy / total if total else 1 / len(taus) for energy in energies]
    gains = weights_of(mllm_weight, math_weight, tuned)
    chosen = [kept * tau for tau in taus]
    weights = [gain * share for gain, share in zip(gains, shares, strict=True)]
    sign = torch.where(sum(chosen) >= 0, 1.0, -1.0).double()
    parts = [w * (tau.sign() == sign).double() for w, tau in zip(weights, chosen, strict=True)]
    return [kept * part / sum(parts).clamp(min=1e-6) for part in parts]


def ascending_ranks(tau):
    """Rank of every magnitude in its row, 0 for the smallest; of equal ones the first is lower."""
    return tau.abs().sort(dim=1, stable=True).indices.argsort(dim=1)


def chances(tau, density, window):
    """Chance of every element to be kept: the density, or more for a higher rank in its row."""
    if density == 1 or window == 0 or tau.shape[1] == 1:
        return torch.full_like(tau, density)
    return (density - window) + 2 * window * ascending_ranks(tau).double() / (tau.shape[1] - 1)


def drops(taus, shares, rescale, seed, tensor_name, window=0.0):
    """Factor on every element: 0 where it is dropped, what makes up for that where it is kept."""
    factors = []
    for tau, density, role in zip(taus, shares, roles(len(taus) - 1), strict=True):
        q = chances(tau, density, window)
        drawn = generator_for(seed, tensor_name, role).random(tau.numel())
        kept = (torch.from_numpy(drawn).view(tau.shape).to(tau.device) < q).double()
        if density == 1:
            kept = torch.ones_like(tau)
        elif rescale == "inverse_density":
            kept = kept / q
        elif rescale == "l1":
            whole, left = float(tau.abs().sum()), float((kept * tau).abs().sum())
            kept = kept * (whole / left if min(whole, left) >= 1e-7 else 1.0)
        factors.append(kept)
    return factors


def _dropped(base, tuned, weights, shares, key, elect, window=0.0, scale=1.0):
    taus = [W - base for W in tuned]
    kept = drops(taus, shares, *key, window)
    left = [k * tau for k, tau in zip(kept, taus, strict=True)]
    return [scale * k * part for k, part in zip(kept, elect(left, weights), strict=True)]


@definition
def dare_linear(
    base, tuned, *, mllm_weight, math_weight, density, mllm_density, math_density, rescale, seed,
    tensor_name="",
):  # fmt: skip
    taus = [W - base for W in tuned]
    shares = densities(density, mllm_density, math_density, len(tuned))
    kept = drops(taus, shares, rescale, seed, tensor_name)
    weights = weights_of(mllm_weight, math_weight, tuned)
    return base + sum(w * k * tau for w, k, tau in zip(weights, kept, taus, strict=True))


def _dare_ties(
    base, tuned, *, mllm_weight, math_weight, density, mllm_density, math_density, rescale,
    normalize, election, seed, tensor_name="",
):  # fmt: skip
    return _dropped(
        base,
        tuned,
        weights_of(mllm_weight, math_weight, tuned),
        densities(density, mllm_density, math_density, len(tuned)),
        (rescale, seed, tensor_name),
        lambda left, weights: elected(left, weights, normalize=normalize, election=election),
    )


def _della(
    base, tuned, *, mllm_weight, math_weight, density, mllm_density, math_density, epsilon,
    rescale, elect, normalize, election, scale, seed, tensor_name="",
):  # fmt: skip
    def chosen(left, weights):
        if not elect:
            return weights
        return elected(left, weights, normalize=normalize, election=election)

    return _dropped(
        base,
        tuned,
        weights_of(mllm_weight, math_weight, tuned),
        densities(density, mllm_density, math_density, len(tuned)),
        (rescale, seed, tensor_name),
        chosen,
        epsilon,
        scale,
    )


def _breadcrumbs(
    base, tuned, *, mllm_weight, math_weight, density, mllm_density, math_density, gamma, per
):
    taus = [W - base for W in tuned]
    weights = weights_of(mllm_weight, math_weight, tuned)
    shares = densities(density, mllm_density, math_density, len(tuned))
    found = []
    for weight, share, tau in zip(weights, shares, taus, strict=True):
        size = tau.numel() if per == "tensor" else tau.shape[1]
        kept = int(share * size)
        first = max(0, size - kept - int(gamma * size))
        if per == "tensor":
            inside = largest(tau, size - first) - largest(tau, size - first - kept)
        else:
            rank = ascending_ranks(tau)
            inside = ((first <= rank) & (rank < first + kept)).double()
        found.append(weight * inside)
    return found


CHOOSERS = {  # they decide, element by element, which models take part
    "ties": _ties,
    "sce": _sce,
    "dare_ties": _dare_ties,
    "della": _della,
    "breadcrumbs": _breadcrumbs,
}


def _by_coefficients(name):
    def merged(base, tuned, **parameters):
        found = CHOOSERS[name](base, tuned, **parameters)
        return base + sum(A * (W - base) for A, W in zip(found, tuned, strict=True))

    merged.__signature__ = inspect.signature(CHOOSERS[name])
    return merged


DEFINITIONS |= {name: _by_coefficients(name) for name in CHOOSERS}


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


# --- singular directions ---


class Noise:
    """A floor of singular values that remembers whether all it was asked about was clear of it.

    Not clear is what lies where another estimate of the same noise might put the floor.
    """

    def __init__(self, floor: float) -> None:
        self.floor, self.clear = floor, True

    def __lt__(self, S: Tensor) -> Tensor:
        near = (0.45 * self.floor < S) & (1.5 * self.floor > S)
        self.clear = self.clear and not bool(near.any())
        return self.floor < S


def exist(S, noise):
    """Which singular values stand for a direction."""
    if noise is not None:
        return noise < S
    ratios = S[:-1] / S[1:].clamp(min=1e-300)
    clean = (ratios > _CLEAN).nonzero()
    count = int(clean[0]) + 1 if len(clean) else len(S)
    return (torch.arange(len(S), device=S.device) < count) & (S > 0)


def decomposed(matrix, noise, count=None):
    """U, S, V of the directions that exist, of the strongest `count`."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    U, S, Vh = U[:, :count], S[:count], Vh[:count]
    kept = exist(S, noise)
    return U[:, kept], S[kept], Vh[kept].T


def polar(stacked):
    """Nearest matrix with orthonormal columns; where columns are shared, the least of them."""
    U, S, Vh = torch.linalg.svd(stacked, full_matrices=False)
    kept = S > 1e-7
    return U[:, kept] @ Vh[kept]


def living(base, tuned, mllm_weight, math_weight):
    """Weighted task vectors of the models that change something."""
    weights = weights_of(mllm_weight, math_weight, tuned)
    taus = [w * (W - base) for w, W in zip(weights, tuned, strict=True)]
    return [tau for tau in taus if bool(tau.any())]


@definition
def ip_merging(
    base, tuned, *, lambda_, temperature, gamma_norm, projector, top_k, rank, ablation,
    directions="existing", noise=None,
):  # fmt: skip
    noise = 0.0 if directions == "all" else noise
    dV, *changes = (W - base for W in tuned)
    _, S_V, Vh_V = torch.linalg.svd(dV, full_matrices=False)
    merged = tuned[0]
    for dM in changes:
        U_M, S_M, Vh_M = torch.linalg.svd(dM, full_matrices=False)
        q = len(S_M) if rank is None else min(rank, len(S_M))
        own, other = exist(S_V, noise)[:q], exist(S_M, noise)[:q]
        total = float(S_M[:q][other].sum())
        rho = float(S_V[:q][own].sum()) / total if total else 0.0
        cut = dM if rank is None else (U_M[:, :q] * S_M[:q]) @ Vh_M[:q]
        both = own & other
        s = (Vh_V[:q] * Vh_M[:q]).sum(1).abs()[both]
        gamma = torch.softmax(temperature * s, dim=0)
        if gamma_norm == "max" and len(gamma):
            gamma = gamma / gamma.max()
        if projector == "top_k":
            gamma = (torch.arange(len(s), device=s.device) < top_k).double()
        V = Vh_V[:q][both].T
        P = rho * cut @ V @ torch.diag(gamma.square()) @ V.T
        P = {"none": P, "rescale_only": rho * cut, "select_only": dM}[ablation]
        merged = merged + lambda_ * P
    return merged


@definition
def tsv(base, tuned, *, mllm_weight, math_weight, scale, noise=None):
    taus = living(base, tuned, mllm_weight, math_weight)
    k = min(base.shape) // max(len(taus), 1)
    if len(taus) < 2 or k == 0:
        return base + scale * sum(taus) / max(1, len(taus))
    found = [decomposed(tau, noise, k) for tau in taus]
    U, S, V = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return base + scale * (polar(U) * S) @ polar(V).T


@definition
def iso_c(base, tuned, *, mllm_weight, math_weight, scale, noise=None):
    taus = living(base, tuned, mllm_weight, math_weight)
    if not taus:
        return base
    U, S, V = decomposed(sum(taus), noise)
    return base + scale * S.mean() * U @ V.T


@definition
def iso_cts(base, tuned, *, common_fraction, mllm_weight, math_weight, scale, noise=None):
    taus = living(base, tuned, mllm_weight, math_weight)
    if not taus:
        return base
    r = min(base.shape)
    own = round((r - int(r * common_fraction)) / len(taus))
    common = U_c, _, _ = decomposed(sum(taus), noise, r - own * len(taus))
    rests = [tau - U_c @ (U_c.T @ tau) for tau in taus]
    least = [1e-12 * float(tau.norm()) if noise is None else noise for tau in taus]
    parts = [decomposed(rest, floor, own) for rest, floor in zip(rests, least, strict=True)]
    U, S, V = (torch.cat(one, dim=-1) for one in zip(*parts, common, strict=True))
    return base + scale * S.mean() * polar(U) @ polar(V).T


@definition
def knots_ties(
    base, tuned, *, mllm_weight, math_weight, density, mllm_density, math_density, normalize,
    trim, cutoff, scale,
):  # fmt: skip
    taus = [W - base for W in tuned]
    U, S, Vh = torch.linalg.svd(torch.cat(taus, dim=1), full_matrices=False)
    kept = cutoff * S[0] < S
    parts = list((S[kept, None] * Vh[kept]).split(base.shape[1], dim=1))
    shares = densities(density, mllm_density, math_density, len(tuned))
    kept_parts = trimmed(parts, shares, official=trim == "official")
    parts = [k * P for k, P in zip(kept_parts, parts, strict=True)]
    weights = weights_of(mllm_weight, math_weight, tuned)
    factors = elected(parts, weights, normalize=normalize, election="majority")
    merged = sum(A * P for A, P in zip(factors, parts, strict=True))
    return base + scale * U[:, kept] @ merged


@definition
def wudi(base, tuned, *, mllm_weight, math_weight, iterations, learning_rate, closed_form, scale):
    taus = living(base, tuned, mllm_weight, math_weight)
    if len(taus) < 2:
        return base + scale * sum(taus)
    grams = [tau.T @ tau / tau.square().sum() for tau in taus]
    if closed_form:
        C = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
        return base + scale * C @ torch.linalg.pinv(sum(grams), rtol=1e-12, hermitian=True)
    X = sum(taus)
    adam = torch.optim.Adam([X], lr=learning_rate)
    for _ in range(iterations):
        X.grad = 2 * sum((X - tau) @ gram for tau, gram in zip(taus, grams, strict=True))
        adam.step()
    return base + scale * X


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
