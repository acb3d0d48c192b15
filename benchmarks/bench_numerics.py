"""Every merge method in the precision of a merge against its definition in fp64.

    python benchmarks/bench_numerics.py [--methods tsv iso_cts] [--quick] [--large] [--device cuda]
    python benchmarks/bench_numerics.py --write docs/numerics.md

Runs the grid of `tests/numeric_cases.py`: stored bf16, fp16 and fp32, two and three models, square,
tall and wide matrices, full and low-rank changes, aligned and random. For each method it prints the
largest relative error of the change, beyond twice what rounding the result to fp32 costs, by stored
dtype, and how well the definition itself is conditioned. `--quick` takes 24 of the cases, `--large`
also those 1024 wide on both sides, `--all` prints each. `--write` makes the page, with what other
implementations said (`numerics_references.json`). The exit code is 1 where a method is further from
its definition than `test_numerics.py` allows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the definitions are

from numeric_cases import (
    DTYPES,
    FEW,
    LARGE,
    MOST_FLIPPED,
    SHAPES,
    Case,
    Finding,
    conditioning,
    grid,
    measure,
    sample,
    tolerance_of,
)
from report import machine, table

from ipmerge_core.methods import METHODS

REFERENCES = Path(__file__).with_name("numerics_references.json")
HEAD = (
    "method", *(f"error, {dtype} stored" for dtype in DTYPES), "decided otherwise", "bar",
    "conditioning: median, largest", "cases", "worst case",
)  # fmt: skip
NARROW = [shape for shape in SHAPES if max(shape) < 1024]
INTRODUCTION = """\
# Numerics

What a merge computes in fp32 on stored bf16, fp16 or fp32, against a plain definition of each
method in fp64 on the same stored numbers (`tests/method_definitions.py`). Made by
`{command}`; do not edit it by hand.

{machine}, torch {torch}; merged on {device}.

## Error and conditioning

Error: ||W - W_def||_F / ||W_def - W_v||_F, the largest of all cases, beyond twice what rounding the
result to fp32 costs; "-" is nothing beyond that. Decided otherwise: the largest share of elements
in which an election, a rank or a threshold went the other way, which the error leaves out: exact
ties of stored numbers, which fp32 and fp64 break differently. Conditioning: relative move of the
definition's change per relative noise in the task vectors, with a noise of one unit in the last
place in one weight of 24 (of DELLA it counts neighbours in rank that change places). Cases in which
a direction is about as weak as the rounding of the files are left out: what exists there is a
matter of opinion.

"""
COMPARED = """
## Compared with other implementations

{about} The cause is given where a difference is more than rounding.

"""


class Measured(NamedTuple):
    """What was found of one method."""

    name: str
    found: dict[Case, Finding]
    conditions: list[float]

    @property
    def worst(self) -> Case:
        """The case furthest from the definition."""
        return max(self.found, key=lambda case: (self.found[case].excess, self.found[case].error))

    @property
    def fails(self) -> bool:
        """Whether a case is further off than the tests allow."""
        bar = tolerance_of(self.name)
        return any(f.excess > bar or f.flipped > MOST_FLIPPED for f in self.found.values())

    def row(self) -> list[str]:
        """Write a line of the table."""
        by_dtype = [
            max((f.excess for c, f in self.found.items() if c.dtype == dtype), default=0.0)
            for dtype in DTYPES
        ]
        known = self.conditions
        return [
            f"`{self.name}`",
            *(f"{error:.1e}" if error else "-" for error in by_dtype),
            f"{max(f.flipped for f in self.found.values()):.1e}",
            f"{tolerance_of(self.name):.0e}",
            f"{statistics.median(known):.2g}, {max(known):.2g}" if known else "",
            str(len(self.found)),
            str(self.worst),
        ]


def main() -> None:
    """Print the table, and write the page where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--quick", action="store_true", help="24 cases of the grid")
    parser.add_argument("--large", action="store_true", help="also 1024 wide on both sides")
    parser.add_argument("--device", default="cpu", help="where the merges run")
    parser.add_argument("--seed", type=int, default=0, help="of the cases of --quick")
    parser.add_argument("--all", action="store_true", help="print every case")
    parser.add_argument("--write", type=Path, help="write the page here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = list(grid(SHAPES + LARGE * options.large))
    if options.quick:
        cases = sample(24, NARROW, options.seed)
    print(f"{machine()}; merged on {options.device}\n", flush=True)
    measured = []
    for name in options.methods:
        started = perf_counter()
        measured.append(measured_on(name, cases[:: 8 if name in FEW else 1], options.device))
        if options.all:
            print(*(f"{name} {case} {f}" for case, f in measured[-1].found.items()), sep="\n")
        seconds = perf_counter() - started
        print(f"{seconds:.0f} s", *measured[-1].row(), file=sys.stderr, flush=True)
    errors = table(HEAD, [method.row() for method in measured])
    print(errors)
    if options.write:
        options.write.write_text(page(errors, options), encoding="utf-8")
    sys.exit(any(method.fails for method in measured))


def measured_on(name: str, cases: list[Case], device: str) -> Measured:
    """Measure a method on every case that it takes, and its conditioning on a few of them."""
    tried = {case: measure(name, case, device) for case in cases}
    found = {case: finding for case, finding in tried.items() if finding is not None}
    few = list(found)[:: max(1, len(found) // 12)]
    conditions = [conditioning(name, case) for case in few]
    return Measured(name, found, [value for value in conditions if value is not None])


def page(errors: str, options: argparse.Namespace) -> str:
    """Make the whole page."""
    words = ["python benchmarks/bench_numerics.py"]
    words += [f"--{word}" for word in ("quick", "large") if getattr(options, word)]
    command = " ".join([*words, "--write", options.write.as_posix()])
    introduction = INTRODUCTION.format(
        command=command, machine=machine(), torch=torch.__version__, device=options.device
    )
    return introduction + errors + "\n" + references()


def references() -> str:
    """The table of comparisons with code of others, as they are recorded."""
    record = json.loads(REFERENCES.read_text(encoding="utf-8"))
    rows = [
        (
            f"`{one['method']}`",
            one["settings"],
            one["reference"],
            f"{one['difference']:.0e}",
            one["cause"],
        )
        for one in record["comparisons"]
    ]
    head = ("method", "settings", "compared with", "largest difference", "cause")
    return COMPARED.format(about=record["about"]) + table(head, rows) + "\n"


if __name__ == "__main__":
    main()
