"""Time analysing and merging: the demo models, and a synthetic pair with realistic layer shapes.

    python benchmarks/bench_analysis.py [--width 1024]

The synthetic pair has two decoder layers with the proportions of Qwen2.5 (MLP 5.3 x the width, two
key/value heads) and task vectors of a few strong directions in noise. Naive means two full fp32
`torch.linalg.svd` per matrix, no more: what a direct reading of the method costs before any norm.
The last table is the part of the CPU time that the singular values of the base and the storage of
all values take.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import count
from math import prod
from pathlib import Path
from time import process_time

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, seconds, table

import ipmerge_core as ipm
from ipmerge_core.analysis.analyse import comparing_cost
from ipmerge_core.analysis.comparison import Options, compare
from ipmerge_core.analysis.singular_values import SingularValues
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.spectral.weight_values import weight_values

DEMO = Path(__file__).parents[1] / "assets" / "demo"
LAYERS = 2


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    width = parser.parse_args().width
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        print(table(["figure", "seconds", "bar"], demo(Path(folder))), end="\n\n")
        heads = ["route", "seconds", "x naive", "m n min(m, n) / s", "elements / s"]
        pair = write_pair(Path(folder), width)
        print(table(heads, synthetic(pair, width)), end="\n\n")
        heads = ["matrix", "shape", "analysis, CPU s", "base and storing, CPU s", "share"]
        print(table(heads, spectra(pair)))


def demo(folder: Path) -> list[list[str]]:
    """Time the demo models: analysis, cached analysis, and a merge of all matrices."""
    pair = ipm.open_pair(DEMO / "mllm", DEMO / "math", DEMO / "base")
    analysis = ipm.analyse(pair, cache_dir=folder / "cache")
    plan = ipm.make_plan(analysis, similarity_threshold=0.0)
    out = count()
    return [
        ["analyse, demo models", f"{seconds(lambda: ipm.analyse(pair)):.2f}", "5"],
        [
            "analyse, from the cache",
            f"{seconds(lambda: ipm.analyse(pair, cache_dir=folder / 'cache')):.2f}",
            "",
        ],
        [
            "merge, demo models, all 28 matrices",
            f"{seconds(lambda: ipm.merge(plan, folder / f'out-{next(out)}')):.2f}",
            "5",
        ],
    ]


def synthetic(pair: ModelPair, width: int) -> list[list[str]]:
    """Time the routes side by side on one pair."""
    naive = seconds(lambda: decompose_naively(pair), repeats=1)
    routes = {
        "exact analysis: every record complete": lambda: ipm.analyse(pair),
        "quick analysis: leading 64 directions": lambda: ipm.analyse(pair, quick=True),
    }
    rows = [[f"naive, {len(pair.matrices)} matrices at width {width}", f"{naive:.2f}", "1", "", ""]]
    shapes = [matrix.shape for matrix in pair.matrices for _ in ("mllm", "math")]
    elements, work = sum(map(prod, shapes)), sum(map(comparing_cost, shapes))
    for name, run in routes.items():
        spent = seconds(run, repeats=1)
        rates = [f"{work / spent:.2g}", f"{elements / spent:.2g}"]
        rows.append([name, f"{spent:.2f}", f"{spent / naive:.3f}", *rates])
    return rows


def spectra(pair: ModelPair) -> list[list[str]]:
    """Measure what the base's singular values and storing all values cost, by CPU time."""
    options, rows, totals = Options(), [], [0.0, 0.0]
    for matrix in pair.matrices[: len(pair.matrices) // LAYERS]:
        weights = pair.read(matrix)
        start = process_time()
        (record,) = compare(matrix, weights, options)
        whole = process_time() - start
        assert record.spectra is not None
        start = process_time()
        SingularValues.of(weight_values(weights.base).numpy(), 0)
        for stored in (record.spectra.mllm, record.spectra.math):
            SingularValues.of(stored.values(), 0)
        extra = process_time() - start
        totals = [totals[0] + whole, totals[1] + extra]
        rows.append([matrix.module, str(matrix.shape), *_shares(whole, extra)])
    return [*rows, ["all", "", *_shares(*totals)]]


def _shares(whole: float, extra: float) -> list[str]:
    return [f"{whole:.2f}", f"{extra:.2f}", f"{extra / whole:.1%}"]


def decompose_naively(pair: ModelPair) -> None:
    """Two full decompositions per matrix."""
    for matrix in pair.matrices:
        base = pair.base.read(matrix.name).float()
        for tuned in (pair.mllm.read(matrix.mllm), pair.math[0].read(matrix.math[0])):
            torch.linalg.svd(tuned.float() - base, full_matrices=False)


def write_pair(folder: Path, width: int) -> ModelPair:
    """Write a base and two fine-tunes of it, in bf16."""
    generator = torch.Generator().manual_seed(0)
    feed, narrow = int(5.3 * width), width // 4
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (feed, width),
        "mlp.up_proj": (feed, width),
        "mlp.down_proj": (width, feed),
    }
    models: dict[str, dict[str, torch.Tensor]] = {"base": {}, "mllm": {}, "math": {}}
    for layer in range(LAYERS):
        for module, (m, n) in shapes.items():
            name = f"model.layers.{layer}.{module}.weight"
            base = torch.randn(m, n, generator=generator) * 0.02
            models["base"][name] = base
            for role in ("mllm", "math"):
                left = torch.randn(m, 16, generator=generator)
                right = torch.randn(16, n, generator=generator)
                noise = torch.randn(m, n, generator=generator)
                models[role][name] = base + 2e-4 * (left @ right / 4 + noise)
    for role, weights in models.items():
        (folder / role).mkdir()
        (folder / role / "config.json").write_text(json.dumps({"model_type": "llama"}))
        stored = {name: weight.bfloat16() for name, weight in weights.items()}
        save_file(stored, folder / role / "model.safetensors")
    return ipm.open_pair(folder / "mllm", folder / "math", folder / "base")


if __name__ == "__main__":
    main()
