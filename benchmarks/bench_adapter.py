"""Compare a LoRA adapter as an expert with the same weights folded into the base in fp32.

    python benchmarks/bench_adapter.py [--width 4096] [--rank 16] [--modules q k v o]

The matrices are those of one decoder layer with the proportions of Llama 3 8B: k and v have a
quarter of the rows, the MLP 3.5 times the width. The base and the MLLM are stored in bf16, the
MLLM's task vector has full rank, the adapter's factors are fp32. Times are processor seconds of one
thread; both sides of a ratio run once after each other.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, table

from ipmerge_core.analysis.comparison import Options, compare
from ipmerge_core.models.low_rank import Factors
from ipmerge_core.models.pairing import MODULES, MatrixMatch, MatrixWeights
from ipmerge_core.spectral import spectrum
from ipmerge_core.spectral.low_rank import LowRank
from ipmerge_core.spectral.spectrum import Spectrum

_Result = TypeVar("_Result")


class Layer(NamedTuple):
    """One matrix in the base, the MLLM, the adapter and the folded expert."""

    match: MatrixMatch
    base: Tensor
    mllm: Tensor
    factors: Factors
    folded: Tensor

    def weights(self, *, known: bool) -> MatrixWeights:
        """Return the inputs of an analysis, with or without the factors."""
        factors = self.factors if known else None
        return MatrixWeights(self.base, self.base, self.mllm, (self.folded,), (None, factors))


class Figures(NamedTuple):
    """Processor seconds of one matrix, and the largest differences of the results."""

    from_folded: float
    from_factors: float
    analysis_folded: float
    analysis_factors: float
    values: float
    directions: float
    similarity: float
    found: tuple[int, int]


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", nargs="+", default=list(MODULES[:4]), choices=MODULES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), f"width {options.width}, rank {options.rank}", sep="\n", end="\n\n")
    found = {}
    for module in options.modules:
        found[module] = measured(made(module, options.width, options.rank))
        print(f"{module} done", file=sys.stderr, flush=True)
    print_figures(found)


def made(module: str, width: int, rank: int) -> Layer:
    """Create the matrices of one module; the task vectors are about 2 % of the base."""
    shapes = {"q": (1, 1), "k": (0.25, 1), "v": (0.25, 1), "o": (1, 1), "down": (1, 3.5)}
    tall, wide = shapes.get(module, (3.5, 1))
    m, n = int(tall * width), int(wide * width)
    generator = torch.Generator().manual_seed(MODULES.index(module))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = (0.02 * normal(m, n)).to(torch.bfloat16)
    decay = torch.arange(1, 65).pow(-0.5)
    shared = (normal(m, 64) * decay) @ normal(64, n)
    mllm = (base.float() + 2e-4 * normal(m, n) + 4e-5 * shared).to(torch.bfloat16)
    strength = torch.arange(1, rank + 1).pow(-0.5) * n**-0.5
    factors = Factors(normal(m, rank) * strength, 5e-3 * normal(rank, n), 2.0)
    folded = torch.addmm(base.float(), factors.left, factors.right, alpha=factors.scale)
    match = MatrixMatch(module, 0, module, (m, n), module, module, (module,))
    return Layer(match, base, mllm, factors, folded)


def measured(layer: Layer) -> Figures:
    """Decompose the expert and analyse the pair, from factors and from folded weights."""
    options = Options()
    fast, (known, noise) = timed(lambda: from_factors(layer.factors))
    slow, plain = timed(lambda: from_folded(layer, options))
    floor = spectrum.EXISTS * spectrum.noise_floor(layer.folded, layer.base)
    analysis, records = [], []
    for with_factors in (True, False):
        weights = layer.weights(known=with_factors)
        seconds, (record,) = timed(lambda w=weights: list(compare(layer.match, w, options)))
        analysis.append(seconds)
        records.append(record)
    kept = plain.above(floor)
    count = min(len(kept.S), len(known.above(spectrum.EXISTS * noise).S))
    cosines = (kept.Vh[:count] * known.Vh[:count]).double().sum(1).abs()
    sine = (kept.Vh[:count].double() - known.Vh[:count].double()).norm(dim=1)
    assert float(cosines.min()) > 0.5, "directions in another order"
    ours, theirs = (record.similarity for record in records)
    return Figures(
        slow,
        fast,
        analysis[1],
        analysis[0],
        float((kept.S[:count] / known.S[:count] - 1).abs().max()),
        float(sine.max()),
        max(abs(ours[kind] - theirs[kind]) for kind in ours),
        (records[0].math_directions, records[1].math_directions),
    )


def from_factors(factors: Factors) -> tuple[Spectrum, float]:
    """Decompose the task vector as an analysis does where the factors are known."""
    known = LowRank.of(*factors)
    return known.spectrum(vectors="right"), known.noise


def from_folded(layer: Layer, options: Options) -> Spectrum:
    """Decompose the task vector as an analysis does from the weights."""
    change = spectrum.task_vector(layer.folded, layer.base)
    floor = spectrum.EXISTS * spectrum.noise_floor(layer.folded, layer.base)
    return options.decompose(change, layer.match.name, floor)


def timed(run: Callable[[], _Result]) -> tuple[float, _Result]:
    """Return the processor seconds of a call and its result."""
    with torch.inference_mode():
        started = time.process_time()
        result = run()
        return time.process_time() - started, result


def print_figures(found: dict[str, Figures]) -> None:
    """Print a row per matrix, and the figures of the layer beside their targets."""
    rows = [
        [
            module,
            f"{f.from_folded:.2f}",
            f"{f.from_factors:.3f}",
            f"{f.from_folded / f.from_factors:.0f}",
            f"{f.analysis_folded:.1f}",
            f"{f.analysis_factors:.1f}",
            f"{f.analysis_factors / f.analysis_folded:.3f}",
            f"{f.found[0]} / {f.found[1]}",
            f"{f.directions:.1e}",
        ]
        for module, f in found.items()
    ]
    head = [
        "matrix", "folded s", "factors s", "ratio", "analysis, folded s", "factors s", "ratio",
        "directions", "largest difference",
    ]  # fmt: skip
    print(table(head, rows), end="\n\n")
    each = list(found.values())
    faster = sum(f.from_folded for f in each) / sum(f.from_factors for f in each)
    share = sum(f.analysis_factors for f in each) / sum(f.analysis_folded for f in each)
    figures = [
        ["expert's decomposition, folded / factors", "20", f"{faster:.0f}"],
        ["the pair's analysis, factors / folded", "0.55", f"{share:.3f}"],
        ["existing directions, norm of v - v'", "1e-5", f"{max(f.directions for f in each):.1e}"],
        ["their singular values, relative", "1e-5", f"{max(f.values for f in each):.1e}"],
        ["similarities, absolute", "1e-5", f"{max(f.similarity for f in each):.1e}"],
    ]
    print(table(["figure", "target", "measured"], figures))


if __name__ == "__main__":
    main()
