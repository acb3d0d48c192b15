"""Every merge method in the precision of a merge against its definition in fp64.

    python benchmarks/bench_numerics.py [--methods tsv iso_cts] [--quick] [--large] [--device cuda]

Runs the grid of `tests/numeric_cases.py`: stored bf16, fp16 and fp32, two and three models, square,
tall and wide matrices, full and low-rank changes, aligned and random. For each method it prints the
largest relative error of the change, beyond what rounding the result to fp32 costs, and where it
was found. `--quick` takes 24 of the cases, `--large` also those 1024 wide on both sides. The exit
code is 1 where a method is further from its definition than `test_numerics.py` allows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the definitions are

from numeric_cases import LARGE, SHAPES, Case, Finding, grid, measure, sample, tolerance_of
from report import machine, table

from ipmerge_core.methods import METHODS

HEAD = ("method", "error", "of it rounding of the result", "flipped", "bar", "worst case", "s")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quick", action="store_true", help="24 cases of the grid")
    parser.add_argument("--large", action="store_true", help="also 1024 wide on both sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="print every case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = SHAPES + LARGE * options.large
    cases = sample(24, SHAPES[:7], options.seed) if options.quick else list(grid(shapes))
    print(f"{machine()}; {len(cases)} cases, merged on {options.device}\n", flush=True)
    rows, failed = [], False
    for name in options.methods:
        started = perf_counter()
        found = errors(name, cases, options.device)
        if options.all:
            print(*(f"{name} {case} {finding}" for case, finding in found.items()), sep="\n")
        rows.append(row(name, found, perf_counter() - started))
        failed |= any(f.excess > tolerance_of(name) for f in found.values())
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(HEAD, rows))
    sys.exit(failed)


def errors(name: str, cases: list[Case], device: str) -> dict[Case, Finding]:
    """Measure a method on every case that it takes."""
    found = {case: measure(name, case, device) for case in cases}
    return {case: finding for case, finding in found.items() if finding is not None}


def row(name: str, found: dict[Case, Finding], seconds: float) -> list[str]:
    """Summarise a method's cases."""
    worst = max(found, key=lambda case: (found[case].excess, found[case].error))
    flipped = max(finding.flipped for finding in found.values())
    return [
        f"`{name}`",
        f"{found[worst].error:.1e}",
        f"{found[worst].stored:.1e}",
        f"{flipped:.1e}",
        f"{tolerance_of(name):.0e}",
        str(worst),
        f"{seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
