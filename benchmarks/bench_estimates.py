"""Measure what `merging/estimates.py` estimates with: every method's rate, then whole merges.

    python benchmarks/bench_estimates.py [--folder bench-estimates] [--skip rates demo larger]

Prints the table RATES for one CPU core, measured on matrices of two sizes, and for merges of the
demo models and of a larger synthetic one the processor seconds and the estimate. Processor
seconds, least of some repeats, change little on a busy machine. Everything written is removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import process_time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

import torch
from bench_merge import written
from report import machine, table

import ipmerge_core as ipm
from ipmerge_core.calibration.calibrate import calibrate
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.samples import load_samples
from ipmerge_core.merging.estimates import Rate, step_cost
from ipmerge_core.merging.merge import estimate_merge
from ipmerge_core.methods import METHODS, MergeMethod
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan

DEMO = Path(__file__).parents[1] / "assets" / "demo"
SMALL, LARGE = (128, 256), (1024, 1536)
STEPS = 10  # of an iterated method, when its rate is measured or matrices are large


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="bench-estimates", help="scratch space, 0.3 GB")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--skip", nargs="*", default=[], help="rates, demo, larger")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, one thread\n")
    if "rates" not in options.skip:
        print_rates(options.methods)
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True)
    try:
        if "demo" not in options.skip:
            pair = ipm.open_pair(*(DEMO / role for role in ("mllm", "math", "base")))
            print_merges("the demo models", plans(pair, options.methods, folder), folder)
        if "larger" not in options.skip:
            trio = written(folder / "trio", 1, hidden=1024, feed=2752, vocabulary=32000)
            pair = ipm.open_pair(*(trio / role for role in ("mllm", "math", "base")))
            able = [name for name in options.methods if METHODS[name].data is None]
            made = plans(pair, able, folder, {"wudi": {"iterations": STEPS}})
            print_merges("one layer of width 1024", made, folder)
    finally:
        shutil.rmtree(folder)


# --- rates ---


def print_rates(names: list[str]) -> None:
    """Print RATES and STEPS as `estimates.py` has them."""
    for name in names:
        print(f'    "{name}": {shown(rate_of(METHODS[name]))},', flush=True)
    if "wudi" in names:
        print(f"STEP_RATE = {shown(rate_of_steps(METHODS['wudi']))}")


def rate_of(method: MergeMethod) -> Rate:
    """Fit seconds per matrix and work per second to a small and a large matrix of two models."""
    choice = {"closed_form": True} if method.name == "wudi" else {}
    work = [m * n * (min(m, n) if method.matrixwise else 1) for m, n in (SMALL, LARGE)]
    return fitted(method, choice, [2 * each for each in work])


def rate_of_steps(method: MergeMethod) -> Rate:
    """Fit the same to a single step of an iterated method."""
    found = fitted(method, {"iterations": STEPS}, [STEPS * step_cost(s, 2) for s in (SMALL, LARGE)])
    return Rate(found.per_matrix / STEPS, found.work)


def fitted(method: MergeMethod, choice: Mapping[str, Any], work: list[float]) -> Rate:
    """Solve seconds = per_matrix + work / rate for both sizes."""
    small, large = (seconds_of(method, choice, shape) for shape in (SMALL, LARGE))
    rate = (work[1] - work[0]) / max(large - small, 1e-9)
    return Rate(max(small - work[0] / rate, 0.0), rate)


def seconds_of(method: MergeMethod, choice: Mapping[str, Any], shape: tuple[int, int]) -> float:
    """Processor seconds of one matrix in bf16 with two task vectors."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(shape, generator=generator)
    noise = 0.001 * torch.randn(2, *shape, generator=generator)
    models = [matrix.to(torch.bfloat16) for matrix in (base, base + noise[0], base + noise[1])]
    data = data_for(method, shape, generator)

    def run() -> None:
        method(*models, tensor_name="model.layers.0.mlp.up_proj.weight", **choice, **data)

    return least(run, 5 if shape == SMALL else 3)


def data_for(
    method: MergeMethod, shape: tuple[int, int], generator: torch.Generator
) -> dict[str, Any]:
    """Make up what a calibration would supply."""
    if method.data == "fisher":
        found = torch.rand(2, *shape, generator=generator)
    elif method.data == "gram":
        inputs = torch.randn(2, 2 * shape[1], shape[1], generator=generator)
        found = inputs.mT @ inputs / (2 * shape[1])
    else:
        return {}
    return {f"mllm_{method.data}": found[0], f"math_{method.data}": [found[1]]}


def least(run: Callable[[], object], repeats: int) -> float:
    """Least processor seconds of some repeats."""
    times = []
    for _ in range(repeats):
        started = process_time()
        run()
        times.append(process_time() - started)
    return min(times)


def shown(rate: Rate) -> str:
    """Write a rate as source, to two digits."""
    return f"Rate({rate.per_matrix:.1e}, {rate.work:.1e})"


# --- whole merges ---


def print_merges(title: str, made: Iterator[MergePlan], folder: Path) -> None:
    """Carry out plans and print estimate and processor seconds side by side."""
    print(f"\nMerges of {title}, all matrices.\n")
    rows = []
    for plan in made:
        out = folder / "out"
        expected = estimate_merge(plan, out).seconds

        def run(plan: MergePlan = plan, out: Path = out) -> None:
            ipm.merge(plan, out)
            shutil.rmtree(out)

        took = least(run, 1 if expected > 5 else 3)
        rows.append([plan.method, f"{expected:.2f}", f"{took:.2f}", f"{expected / took:.2f}"])
        print(f"{plan.method} {rows[-1][1:]}", file=sys.stderr, flush=True)
    print(table(["method", "estimate s", "processor s", "ratio"], rows))
    ratios = [float(row[-1]) for row in rows]
    print(f"\nRatios from {min(ratios):.2f} to {max(ratios):.2f}.")


def plans(
    pair: ModelPair,
    names: list[str],
    folder: Path,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[MergePlan]:
    """Make a plan per method that takes every matrix, with its defaults but for `settings`."""
    for name in names:
        method, own = METHODS[name], (settings or {}).get(name, {})
        if method.needs_analysis:
            yield ipm.make_plan(ipm.analyse(pair), name, similarity_threshold=0.0, **own)
        elif method.data is not None:
            samples = [load_samples("demo", 4, takes_images=sees) for sees in (True, False)]
            how = CalibrationSettings(method.data)
            found = calibrate(pair, folder / method.data, how, *samples)
            yield ipm.make_plan(pair, name, calibration=found.folder)
        else:
            yield ipm.make_plan(pair, name, **own)


if __name__ == "__main__":
    main()
