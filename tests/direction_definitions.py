"""Definitions of the merge methods that look at singular directions; see `method_definitions`.

Every decomposition is `torch.linalg.svd` of the whole matrix in fp64. `noise` says which directions
exist: those whose singular value is larger. Without it they are those above the first clean gap of
the spectrum, or all where there is none.
"""

from __future__ import annotations

import math

import torch
from elementwise_definitions import densities, elected, trimmed, weights_of
from torch import Tensor

_CLEAN = 1e3  # a ratio of neighbouring singular values that nothing but rounding leaves


class Noise:
    """A floor of singular values that remembers whether all it was asked about was clear of it.

    Not clear is what lies where another estimate of the same noise might put the floor.
    """

    def __init__(self, floor: float, whole: Noise | None = None) -> None:
        self.floor, self.clear, self.whole = floor, True, whole or self

    def __lt__(self, S: Tensor) -> Tensor:
        near = (0.45 * self.floor < S) & (1.8 * self.floor > S)
        self.whole.clear = self.whole.clear and not bool(near.any())
        return self.floor < S

    def of_sum(self, count: int) -> Noise:
        """The floor of a sum of so many task vectors; half of the noise of each is the base's."""
        return Noise(self.floor * math.sqrt(count * (count + 1) / 2), self.whole)


def of_sum(noise, count):
    """The same, where a floor is given."""
    return noise.of_sum(count) if isinstance(noise, Noise) else noise


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


def ip_merging(
    base, tuned, *, lambda_, temperature, gamma_norm, projector, top_k, energy, beta, budget,
    output_budget, rank, ablation, math_energy=1.0, directions="existing", noise=None,
    mllm_gram=None, math_gram=None,
):  # fmt: skip
    noise = 0.0 if directions == "all" else noise
    dV, *changes = (W - base for W in tuned)
    _, S_V, Vh_V = torch.linalg.svd(dV, full_matrices=False)
    updates = []
    for number, dM in enumerate(changes):
        U_M, S_M, Vh_M = torch.linalg.svd(dM, full_matrices=False)
        q = len(S_M) if rank is None else min(rank, len(S_M))
        own, other = exist(S_V, noise)[:q], exist(S_M, noise)[:q]
        if math_energy < 1:
            held = S_M[:q][other].square().cumsum(0) / S_M[:q][other].square().sum()
            count = int((held < math_energy - 1e-6).sum()) + 1
            other = other & (torch.arange(len(other), device=other.device) < count)
        total = float(S_M[:q][other].sum())
        rho = float(S_V[:q][own].sum()) / total if total else 0.0
        cut = dM if rank is None else (U_M[:, :q] * S_M[:q]) @ Vh_M[:q]
        if math_energy < 1:
            r = int(other.sum())
            cut = (U_M[:, :r] * S_M[:r]) @ Vh_M[:r]
        both = own & other
        s = (Vh_V[:q] * Vh_M[:q]).sum(1).abs()[both]
        gamma = torch.softmax(temperature * s, dim=0)
        if gamma_norm == "max" and len(gamma):
            gamma = gamma / gamma.max()
        if projector == "top_k":
            gamma = (torch.arange(len(s), device=s.device) < top_k).double()
        V = Vh_V[:q][both].T
        P = rho * cut @ V @ torch.diag(gamma.square()) @ V.T
        if projector == "complement":
            shares = S_V[:q][own].square().cumsum(0) / S_V[:q][own].square().sum()
            k = next((i + 1 for i, share in enumerate(shares) if share >= energy - 1e-6), 0)
            V = Vh_V[:q][own][: k if 0 < energy < 1 else int(energy) * len(shares)].T
            P = cut - cut @ V @ V.T
        if projector == "protect":
            held = S_M[:q][other].square().cumsum(0) / S_M[:q][other].square().sum()
            V_K = Vh_M[:q][other][: int((held < 0.9).sum()) + 1].T
            V = Vh_V[:q][own].T
            agreement = (V_K.T @ V).square().sum(0)
            P = cut - cut @ V @ torch.diag(S_V[:q][own] / S_V[0] * (1 - agreement)) @ V.T
        if projector in ("complement", "protect") and P.norm() <= 1e-4 * cut.norm():
            P = torch.zeros_like(P)
        if projector in ("off_inputs", "input_filter") and ablation == "none":
            G_v, G_e = (g / g.diagonal().mean() for g in (mllm_gram, math_gram[number]))
            A = torch.eye(len(G_v), dtype=dM.dtype, device=dM.device)
            A = A if projector == "off_inputs" else G_e + 1e-3 * A
            P = cut @ A @ torch.linalg.inv(A + beta * G_v)
        updates.append(
            {"none": P, "rescale_only": rho * cut, "select_only": dM if math_energy == 1 else cut}[
                ablation
            ]
        )
    change, W = sum(updates), tuned[0]
    if (limit := budget or output_budget) and change.any():
        factor = limit * W.norm() / change.norm()
        if output_budget:
            sizes = [torch.trace(X @ mllm_gram @ X.T).sqrt() for X in (W, change)]
            factor = torch.minimum(2 * factor, limit * sizes[0] / sizes[1])
        change = factor * change
    return W + lambda_ * change


def tsv(base, tuned, *, mllm_weight, math_weight, scale, noise=None):
    taus = living(base, tuned, mllm_weight, math_weight)
    k = min(base.shape) // max(len(taus), 1)
    if len(taus) < 2 or k == 0:
        return base + scale * sum(taus) / max(1, len(taus))
    found = [decomposed(tau, noise, k) for tau in taus]
    U, S, V = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return base + scale * (polar(U) * S) @ polar(V).T


def iso_c(base, tuned, *, mllm_weight, math_weight, scale, noise=None):
    taus = living(base, tuned, mllm_weight, math_weight)
    if not taus:
        return base
    U, S, V = decomposed(sum(taus), of_sum(noise, len(taus)))
    return base + scale * S.mean() * U @ V.T


def iso_cts(base, tuned, *, common_fraction, mllm_weight, math_weight, scale, noise=None):
    taus = living(base, tuned, mllm_weight, math_weight)
    if not taus:
        return base
    r = min(base.shape)
    own = round((r - int(r * common_fraction)) / len(taus))
    common = U_c, _, _ = decomposed(sum(taus), of_sum(noise, len(taus)), r - own * len(taus))
    rests = [tau - U_c @ (U_c.T @ tau) for tau in taus]
    least = [1e-12 * float(tau.norm()) if noise is None else noise for tau in taus]
    parts = [decomposed(rest, floor, own) for rest, floor in zip(rests, least, strict=True)]
    U, S, V = (torch.cat(one, dim=-1) for one in zip(*parts, common, strict=True))
    return base + scale * S.mean() * polar(U) @ polar(V).T


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


def wudi(
    base, tuned, *, mllm_weight, math_weight, iterations, learning_rate, closed_form,
    spectral_filter, kept, start, scale,
):  # fmt: skip
    taus = living(base, tuned, mllm_weight, math_weight)
    if len(taus) < 2:
        return base + scale * sum(taus)
    grams = [tau.T @ tau / tau.square().sum() for tau in taus]
    if closed_form and spectral_filter != "none":
        C = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
        e, V = (found.flip(-1) for found in torch.linalg.eigh(sum(grams)))
        there = e > 1e-12 * e[0]
        f = -torch.expm1(-300 * e) * (torch.arange(len(e)).to(e) < math.ceil(kept * len(e)))
        if spectral_filter == "aswudi":
            count = float(e[there].sqrt().sum() ** 2 / e[there].sum())
            f = (torch.arange(len(e)).to(e) < math.ceil(count - 1e-9)).to(e)
        X0 = sum(taus) if start == "sum" else sum(taus) / len(taus)
        solved = C @ V / torch.where(there, e, 1.0)
        return base + scale * (X0 + ((solved - X0 @ V) * f * there) @ V.T)
    if closed_form:
        C = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
        return base + scale * C @ torch.linalg.pinv(sum(grams), rtol=1e-12, hermitian=True)
    X = sum(taus)
    adam = torch.optim.Adam([X], lr=learning_rate)
    for _ in range(iterations):
        X.grad = 2 * sum((X - tau) @ gram for tau, gram in zip(taus, grams, strict=True))
        adam.step()
    return base + scale * X


def star(base, tuned, *, mllm_weight, math_weight, eta, combine, noise=None):
    parts = []
    for tau in living(base, tuned, mllm_weight, math_weight):
        if eta == 1:
            parts.append(tau)
            continue
        U, S, V = decomposed(tau, noise)
        count, held = 0, 0.0
        while held < (eta - 1e-6) * float(S.sum()):
            held += float(S[count])
            count += 1
        parts.append(U[:, :count] @ torch.diag(S[:count] * S.sum() / held) @ V[:, :count].T)
    if not parts:
        return base
    return base + sum(parts) / (len(parts) if combine == "mean" else 1)


DIRECTIONS = {f.__name__: f for f in (ip_merging, tsv, iso_c, iso_cts, knots_ties, star, wudi)}
