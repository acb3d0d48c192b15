"""Seeded packs of any depth and number of experts, without torch, for tests of the map.

Every matrix is stood for by short random vectors (dV, dM_k, P_k), so that all inner products of a
record belong together as those of real matrices do.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise

import numpy as np

from ipmerge_core.analysis.records import VERSION
from ipmerge_core.analysis.singular_values import LEADING, Overlap, SingularValues, Spectra
from ipmerge_core.spectral.kinds import COMPLEMENTS, ENERGY_SHARES, KEPT_SHARES, TRUNCATIONS

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
PLACES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
VARIANTS = ("sum", "max", "rescale_only", "select_only", "protect", *COMPLEMENTS, *TRUNCATIONS)
BASE_SIMILARITY = {"q": 0.36, "k": 0.4, "v": 0.3, "o": 0.28, "gate": 0.34, "up": 0.3, "down": 0.16}


def shape_of(module: str, hidden: int, feed: int) -> tuple[int, int]:
    """A Llama-like shape with grouped-query attention."""
    if module in ("k", "v"):
        return hidden // 4, hidden
    if module in ("gate", "up"):
        return feed, hidden
    return (hidden, feed) if module == "down" else (hidden, hidden)


def log_spaced(rank: int, points: int = 48) -> list[int]:
    """1-based ranks, dense at the head."""
    return sorted({round(x) for x in np.geomspace(1, rank, points)})


def make_pack(
    layers: int = 28,
    experts: int = 1,
    seed: int = 0,
    hidden: int = 3584,
    feed: int = 18944,
    *,
    spectra: bool = False,
) -> dict[str, object]:
    """Make a pack of `layers` blocks and `experts` math models; with `spectra`, all values."""
    rng = np.random.default_rng(seed)
    records = []
    for layer in range(layers):
        for module in MODULES:
            records += matrix_records(rng, layer, layers, module, experts, hidden, feed)
    for record in records:
        record["spectra"] = asdict(spectra_of(record, seed)) if spectra else None
    decoder = sum(np.prod(r["shape"]) for r in records if r["expert"] == 0)
    source = {"revision": None, "fingerprint": "sha256:" + "0" * 64}
    return {
        "format": "ipmerge-pack",
        "version": VERSION,
        "engine": "0.1.0",
        "created": "2026-11-24T00:00:00Z",
        "name": f"synthetic {layers} layers",
        "sources": {
            "mllm": {"id": "synthetic/mllm", **source},
            "base": {"id": "synthetic/base", **source},
            "base_mllm": None,
            "math": [{"id": f"synthetic/math-{k}", **source} for k in range(experts)],
        },
        "parameters": {"rank": None, "temperature": 32.0},
        "totals": {
            "model_parameters": int(decoder * 1.27),
            "llm_parameters": int(decoder * 1.16),
            "decoder_parameters": int(decoder),
            "decoder_itemsize": 2,
            "model_bytes": int(decoder * 1.27) * 2,
        },
        "records": records,
    }


def matrix_records(
    rng: np.random.Generator,
    layer: int,
    layers: int,
    module: str,
    experts: int,
    hidden: int,
    feed: int,
) -> list[dict[str, object]]:
    """The records of one matrix, one for each expert."""
    rows, columns = shape = shape_of(module, hidden, feed)
    rank = min(shape)
    weight = np.sqrt(rows * columns) * 0.02
    vision = rng.normal(size=6) * weight * 0.0045
    maths = [0.25 * vision + rng.normal(size=6) * weight * 0.003 for _ in range(experts)]
    rhos = [float(1.2 + rng.random()) for _ in range(experts)]
    directions = {
        "sum": [0.12 * rho * (m + 0.4 * vision) for m, rho in zip(maths, rhos, strict=True)],
        "max": [0.45 * rho * m for m, rho in zip(maths, rhos, strict=True)],
        "rescale_only": [rho * m for m, rho in zip(maths, rhos, strict=True)],
        "select_only": maths,
        "protect": [0.8 * m for m in maths],
        **{
            name: [(1 - 0.6 * share) * m for m in maths]
            for name, share in zip(COMPLEMENTS, ENERGY_SHARES, strict=True)
        },
        **{
            name: [share**0.5 * m for m in maths]
            for name, share in zip(TRUNCATIONS, KEPT_SHARES, strict=True)
        },
    }
    index = log_spaced(rank)
    ranks = np.array(index)
    depth = np.sin(np.pi * (layer + 1) / (layers + 1))
    records = []
    for k, math in enumerate(maths):
        first = float(np.clip(BASE_SIMILARITY[module] * (0.5 + depth) + rng.normal() * 0.09, 0, 1))
        best = float(np.clip(first + abs(rng.normal()) * 0.1, first, 1))
        angles = np.clip(first * ranks**-0.6 + rng.normal(size=ranks.size) * 0.02, 0, 1)
        sigma = float(np.linalg.norm(vision)) * 0.5 * ranks**-0.45
        sigma_math = float(np.linalg.norm(math)) * 0.6 * ranks**-0.6
        name = f"model.layers.{layer}.{PLACES[module]}.weight"
        records.append(
            {
                "name": name,
                "mllm_name": f"language_model.{name}",
                "layer": layer,
                "module": module,
                "expert": k,
                "shape": list(shape),
                "similarity": {"first": first, "max": best, "weighted": first * 0.4},
                "best_index": int(rng.integers(1, 6)),
                "gap": float(f"{(sigma[0] - sigma[1]) / sigma[0]:.6g}"),
                "principal": dict.fromkeys(("1", "4", "16", "64"), first * 0.8),
                "rho": rhos[k],
                "weight_norm2": weight**2,
                "base_norm2": weight**2 * 0.999,
                "mllm_norm2": float(vision @ vision),
                "math_norm2": float(math @ math),
                "inner": float(vision @ math),
                "mllm_nuclear": float(sigma.sum()),
                "math_nuclear": float(sigma_math.sum()),
                "updates": {
                    variant: {
                        "norm2": stored(variant, found[k] @ found[k]),
                        "inner": stored(variant, vision @ found[k]),
                        "cross": [stored(variant, found[k] @ found[j]) for j in range(k)],
                    }
                    for variant, found in directions.items()
                },
                "chance": {"first": 0.8 / columns**0.5, "max": 3.2 / columns**0.5},
                "noise_floor": float(f"{sigma[-1] * 1.5:.6g}"),
                "mllm_ranks": {"stable": 8.1, "effective": 210.0},
                "math_ranks": {"stable": 5.2, "effective": 96.0},
                "index": index,
                "mllm_sigma": rounded(sigma),
                "math_sigma": rounded(sigma_math),
                "angles": rounded(angles),
            }
        )
    assert all(a < b for a, b in pairwise(index))
    return records


def stored(variant: str, value: float) -> float:
    """Six digits of the products of a complement or a truncation, as an analysis keeps them."""
    return float(f"{value:.6g}") if variant in (*COMPLEMENTS, *TRUNCATIONS) else float(value)


def rounded(values: np.ndarray) -> list[float]:
    """Six significant digits, as an analysis keeps them."""
    return [float(f"{value:.6g}") for value in values]


def spectra_of(record: dict[str, object], seed: int) -> Spectra:
    """Spectra of realistic shape: strong directions above the bulk of a random matrix.

    The bulk follows the quarter-circle law (or that of Marchenko and Pastur) with values displaced
    by a tenth of their distance, about as much as those of random matrices are.
    """
    rng = np.random.default_rng([seed, record["layer"], *map(ord, record["module"])])
    rows, columns = record["shape"]
    rank = min(rows, columns)
    found = {
        name: spectrum_like(rng, rows, columns, top, strong)
        for name, top, strong in (
            ("mllm", record["mllm_sigma"][0], 0.06),
            ("math", record["math_sigma"][0], 0.03),
            ("base", 60.0, 0.02),
        )
    }
    size = min(LEADING, rank)
    cosines = np.abs(rng.normal(size=(size, size))) / np.sqrt(columns)
    cosines[np.diag_indices(size)] += record["similarity"]["first"] * np.arange(1, size + 1) ** -0.6
    return Spectra(
        **{name: SingularValues.of(values, rank) for name, values in found.items()},
        overlap=Overlap.of(np.clip(cosines, 0, 1).tolist()),
    )


def spectrum_like(
    rng: np.random.Generator, rows: int, columns: int, top: float, strong: float
) -> np.ndarray:
    """Singular values, descending: a power law for a share of `strong`, then a bulk."""
    p, q = sorted((rows, columns))
    low, high = 1 - np.sqrt(p / q), 1 + np.sqrt(p / q)
    grid = np.linspace(low, high, 20 * p + 2)[1:-1]
    density = np.sqrt(np.maximum((grid**2 - low**2) * (high**2 - grid**2), 0)) / grid
    share = np.cumsum(density) / density.sum()
    places = (np.arange(p) + 0.5 + 0.1 * rng.normal(size=p)) / p
    bulk = np.interp(np.clip(places, 0, 1), share, grid)
    ranks = np.arange(1, p + 1)
    head = high * (max(strong * p, 1) / ranks) ** 0.5
    values = np.sort(np.hypot(bulk, np.sort(head * (ranks < 4 * strong * p))))[::-1]
    return values * top / values[0]
