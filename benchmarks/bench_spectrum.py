"""Compare the SVD algorithms with direct SVDs: time, accuracy and scaling.

    python benchmarks/bench_spectrum.py [--widths 1024 2048]

Matrices have decoder shapes (square, 2.7:1 as in LLaMA, 5:1 about as in Qwen2.5) and are strong
shared directions in noise. Naive means two full fp32 `torch.linalg.svd` per matrix. Times are
processor seconds of one thread, the least of some repeats, so that other work on the machine counts
little; where a GPU works they are wall seconds. The truth of the accuracy table is the fp64 SVD.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, table

from ipmerge_core.spectral import similarity as sim
from ipmerge_core.spectral.kinds import SIMILARITIES
from ipmerge_core.spectral.spectrum import Spectrum, singular_values, svd

LEADING = 8  # directions looked at to select a matrix
SNAPSHOT_RANK = 1024  # of the public snapshot's svd_lowrank
SHARE = 1 / 3  # of the matrices that are selected


class Pair(NamedTuple):
    """Task vectors of an MLLM and a math model for one matrix."""

    mllm: Tensor
    math: Tensor


class Times(NamedTuple):
    """Seconds for both task vectors of one matrix."""

    naive: float
    selection: float
    values: float
    bases: float

    @property
    def exact(self) -> float:
        """Select, then all values of every matrix, bases and update where selected."""
        return self.selection + (1 - SHARE) * self.values + SHARE * self.bases


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    widths = parser.parse_args().widths
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, one thread\n")
    with torch.inference_mode():
        speed_and_accuracy(widths)
        against_snapshot(max(widths))
        growth()
        batching()


# --- the matrices ---


def shapes(width: int) -> list[tuple[int, int]]:
    """Decoder shapes of one width."""
    wide, wider = round(2.7 * width), 5 * width
    square_and_mlp = [(width, width), (wide, width), (width, wide)]
    return square_and_mlp + ([(wider, width), (width, wider)] if width <= 1024 else [])


def synthetic(m: int, n: int, device: str = "cpu") -> Pair:
    """16 directions from 8 x down to 1.3 x the edge of the noise; the math model shares half."""
    generator = torch.Generator().manual_seed(m + n)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def planted(right: Tensor) -> Tensor:
        left = torch.linalg.qr(normal(m, 16)).Q
        strength = 1e-3 * (math.sqrt(m) + math.sqrt(n)) * torch.linspace(8, 1.3, 16)
        return (left * strength) @ torch.linalg.qr(right).Q.T + 1e-3 * normal(m, n)

    right = normal(n, 16)
    other = 0.7 * right + 0.7 * normal(n, 16)
    return Pair(planted(right).to(device), planted(other).to(device))


# --- what is timed ---


def naive(pair: Pair) -> None:
    """Two full decompositions."""
    for change in pair:
        torch.linalg.svd(change, full_matrices=False)


def leading(pair: Pair) -> float:
    """Similarity of the first direction, from leading directions only."""
    a, b = (svd(x, method="randomized", rank=LEADING, vectors="right") for x in pair)
    return sim.similarity_of(sim.corresponding_angles(a, b), a, b, "first")


def values(pair: Pair) -> list[float]:
    """Nuclear norms, from all singular values."""
    return [float(singular_values(change).sum()) for change in pair]


def bases(pair: Pair) -> tuple[Spectrum, Spectrum, sim.Update]:
    """All values, both right bases, and IP-Merging's update as factors."""
    a, b = (svd(change, vectors="right") for change in pair)
    gamma = sim.importance(sim.corresponding_angles(a, b))
    return a, b, sim.update_factors(pair.math, a, gamma, sim.nuclear_ratio(a, b))


def least_seconds(run: Callable[[], object], repeats: int = 2) -> float:
    """Least processor seconds of some repeats; wall seconds where a GPU does the work."""
    on_device = torch.cuda.is_available()
    clock = time.perf_counter if on_device else time.process_time
    spent = []
    for _ in range(repeats):
        started = clock()
        run()
        if on_device:
            torch.cuda.synchronize()
        spent.append(clock() - started)
    return min(spent)


def timed(pair: Pair, naive_repeats: int = 1) -> Times:
    """Time every route on one matrix."""
    return Times(
        least_seconds(lambda: naive(pair), naive_repeats),
        least_seconds(lambda: leading(pair), 3),
        least_seconds(lambda: values(pair)),
        least_seconds(lambda: bases(pair)),
    )


# --- tables ---


def speed_and_accuracy(widths: list[int]) -> None:
    """Times relative to naive, each row as it comes, and errors against fp64."""
    print(
        "Seconds for the two task vectors of a matrix; bars: selection 0.05, exact 0.35 x naive\n"
    )
    head = ["matrix", "naive", "selection", "x", "all values", "values, bases, P", "exact*", "x"]
    print(table(head, []), flush=True)
    accuracy, totals = [], []
    for m, n in (shape for width in widths for shape in shapes(width)):
        pair = synthetic(m, n)
        totals.append(timed(pair))
        print(speed_row(f"{m} x {n}", totals[-1]), flush=True)
        if m * n * min(m, n) < 1e10:  # the truth itself takes minutes above
            accuracy.append([f"{m} x {n}", *(f"{error:.1e}" for error in errors(pair))])
    print(speed_row("total", Times(*(sum(column) for column in zip(*totals, strict=True)))))
    print("\n* selection, all values of every matrix, bases and P for the selected third\n")
    print("Largest errors against the SVD in fp64; bars: similarity 1e-4, nuclear 1e-4, P 1e-3\n")
    head = ["matrix", "similarity, leading only", "first, max, weighted", "nuclear", "P"]
    print(table(head, accuracy), end="\n\n", flush=True)


def speed_row(name: str, times: Times) -> str:
    """One row of the table of times."""
    cells = [
        name,
        f"{times.naive:.2f}",
        f"{times.selection:.3f}",
        f"**{times.selection / times.naive:.3f}**",
        f"{times.values:.2f}",
        f"{times.bases:.2f}",
        f"{times.exact:.2f}",
        f"**{times.exact / times.naive:.2f}**",
    ]
    return "| " + " | ".join(cells) + " |"


def errors(pair: Pair) -> tuple[float, float, float, float]:
    """Similarity from leading directions, all similarities, nuclear norms, and the update."""
    V, M = (svd(change.double(), method="exact") for change in pair)
    truth = sim.corresponding_angles(V, M)
    similar = sim.similarities(truth, V, M)
    gamma, rho = sim.importance(truth), sim.nuclear_ratio(V, M)
    P = sim.projected_update(pair.math.double(), V, gamma, rho)
    a, b, update = bases(pair)
    found = sim.similarities(sim.corresponding_angles(a, b), a, b)
    nuclear = [float(x.S.sum()) for x in (V, M)]
    relative = [abs(x / y - 1) for x, y in zip(values(pair), nuclear, strict=True)]
    return (
        abs(leading(pair) - similar["first"]),
        max(abs(found[kind] - similar[kind]) for kind in SIMILARITIES),
        max(relative),
        float((update.matrix() - P).norm() / P.norm()),
    )


def against_snapshot(width: int) -> None:
    """Time and accuracy of the public snapshot's decomposition at its own rank."""
    change = synthetic(width, width).mllm
    rank = min(SNAPSHOT_RANK, width // 2)
    truth = torch.linalg.svdvals(change.double())[:rank]
    torch.manual_seed(0)
    routes = {
        f"torch.svd_lowrank(q={rank})": lambda: torch.svd_lowrank(change, q=rank)[1],
        f"svd(rank={rank})": lambda: svd(change, rank=rank, vectors="right").S,
    }
    rows = []
    for name, run in routes.items():
        S = run().double()
        rows.append(
            [
                name,
                f"{least_seconds(run):.2f}",
                f"{float(((S - truth).abs() / truth).max()):.1e}",
                f"{abs(float(S.sum() / truth.sum()) - 1):.1e}",
            ]
        )
    print(f"Settings of the public snapshot, {width} x {width}, rank {rank}\n")
    print(table(["route", "seconds", "worst S, relative", "sum S, relative"], rows), end="\n\n")


def growth() -> None:
    """Print the scaling exponent of time with width, measured and derived from the flops."""
    widths = [768, 1024, 1536]
    times = [timed(synthetic(width, width)) for width in widths]
    span = math.log(widths[-1] / widths[0])
    derived = {"naive": "3", "selection": "2", "values": "3", "bases": "3"}
    rows = [
        [name, f"{math.log(getattr(times[-1], name) / getattr(times[0], name)) / span:.2f}", power]
        for name, power in derived.items()
    ]
    print(f"Scaling of time with the width, {widths[0]} to {widths[-1]}, square matrices\n")
    print(table(["algorithm", "measured exponent", "derived"], rows), end="\n\n")


def batching() -> None:
    """Eigendecompositions of four Gram matrices of one shape, one by one and as one batch."""
    rows = []
    for width in (256, 1024):
        weights = torch.randn(4, width, width, dtype=torch.float64)
        grams = weights @ weights.mT
        one_by_one = least_seconds(lambda grams=grams: [torch.linalg.eigh(gram) for gram in grams])
        batch = least_seconds(lambda grams=grams: torch.linalg.eigh(grams))
        rows.append([f"4 of {width} x {width}", f"{one_by_one:.3f}", f"{batch / one_by_one:.2f}"])
    print("Batches of one shape: one call for four matrices\n")
    print(table(["matrices", "seconds without batching", "x as a batch"], rows), end="\n\n")


if __name__ == "__main__":
    main()
