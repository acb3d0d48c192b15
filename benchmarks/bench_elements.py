"""Time per element of each elementwise method on one core, in nanoseconds.

    python benchmarks/bench_elements.py [--shape 5504 2048]

A base and two fine-tunes of one matrix, bf16, in memory: no file is read or written. Below the
methods are the costs of parts that some of them require: a 64-bit random number (DARE draws one for
each model), the order of a row (DELLA), the threshold of one task vector (TIES).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, seconds, table

from ipmerge_core import METHODS
from ipmerge_core.methods.blocks import TaskVectors, blocks, row_blocks, task_vector_of
from ipmerge_core.methods.dropout import generator_for
from ipmerge_core.methods.selection import ascending_order, kth_largest
from ipmerge_core.runtime.pipeline import keep_freed_memory

NAME = "model.layers.7.mlp.up_proj.weight"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=[5504, 2048])
    shape = parser.parse_args().shape
    print(f"{machine()}\n\nOne matrix of {shape[0]} x {shape[1]}, bf16, one thread.\n")
    torch.set_num_threads(1)
    keep_freed_memory()  # as a merge does
    base, mllm, math = trio(*shape)
    elementwise = [n for n, m in METHODS.items() if not m.matrixwise and m.data is None]
    costs = {
        name: nanoseconds(lambda m=METHODS[name]: merge(m, base, mllm, math), base)
        for name in elementwise
    }
    least = costs["task_arithmetic"]
    rows = [[n, f"{cost:.1f}", f"{cost / least:.1f}"] for n, cost in sorted_by_cost(costs)]
    print(table(["method", "ns per element", "x task arithmetic"], rows), "\n")
    rows = [[n, f"{nanoseconds(run, base):.1f}"] for n, run in parts(base, mllm).items()]
    print(table(["part", "ns per element"], rows))


def trio(rows: int, columns: int) -> list[Tensor]:
    """A base and two fine-tunes that change it by a twentieth."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(rows, columns, generator=generator)
    changes = 0.001 * torch.randn(2, rows, columns, generator=generator)
    return [matrix.bfloat16() for matrix in (base, *(base + changes))]


def merge(method: Callable[..., Tensor], base: Tensor, mllm: Tensor, math: Tensor) -> Tensor:
    """Merge with the method's defaults."""
    return method(base, mllm, math, tensor_name=NAME)


def parts(base: Tensor, mllm: Tensor) -> dict[str, Callable[[], object]]:
    """What some methods are made of, for one task vector."""
    change = task_vector_of(mllm, base)
    generator = generator_for(0, NAME, "vlm").bit_generator
    half = [[base.numel() // 2]]
    return {
        "a 64-bit random number": lambda: [
            generator.random_raw(block.stop - block.start) for block in blocks(change.view(-1))
        ],
        "its place in the order of its row": lambda: [
            ascending_order(change[rows]) for rows in row_blocks(change)
        ],
        "the threshold of the largest half": lambda: kth_largest(TaskVectors([mllm], base), half),
    }


def nanoseconds(run: Callable[[], object], matrix: Tensor) -> float:
    """Least time of a call, per element."""
    return 1e9 * seconds(run) / matrix.numel()


def sorted_by_cost(costs: dict[str, float]) -> list[tuple[str, float]]:
    """Cheapest first."""
    return sorted(costs.items(), key=lambda item: item[1])


if __name__ == "__main__":
    main()
