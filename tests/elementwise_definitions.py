"""Definitions of the merge methods that decide element by element; see `method_definitions`.

Whole matrices and full sorts. What a threshold, a rank or an election decides is a matrix of
coefficients A_i with W = W0 + sum_i A_i dW_i, so that a test can tell an element that was decided
otherwise from one that is off.
"""

from __future__ import annotations

import inspect

import torch

from ipmerge_core.methods.dropout import generator_for, roles


def linear(base, tuned, *, alpha, mllm_weight, math_weight, normalize):
    W_v, W_e = tuned
    if mllm_weight is None:
        return alpha * W_v + (1 - alpha) * W_e
    total = mllm_weight + math_weight if normalize else 1.0
    return (mllm_weight * W_v + math_weight * W_e) / total


def task_arithmetic(base, tuned, *, mllm_weight, math_weight):
    tau_v, *taus = (W - base for W in tuned)
    return base + mllm_weight * tau_v + math_weight * sum(taus)


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


ELEMENTWISE = {
    **{f.__name__: f for f in (linear, task_arithmetic, layer_swap, dare_linear)},
    **{name: _by_coefficients(name) for name in CHOOSERS},
}
