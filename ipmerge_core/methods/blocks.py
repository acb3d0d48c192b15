"""Whole matrices, one block that fits a CPU's cache at a time.

An elementwise method is a dozen small operations; run on whole matrices each of them would read and
write gigabytes. Run block by block they stay in cache, inputs are widened to fp32 only where they
are used, and the result is the one large allocation. Sums of whole matrices are taken in fp64 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ipmerge_core.spectrum import as_float

_CPU_BLOCK = 1 << 18  # elements: some fp32 temporaries of 1 MiB fit the last-level cache
_DEVICE_BLOCK = 1 << 25


def blocks(tensor: Tensor | TaskVector) -> Iterator[slice]:
    """Slices that cover the flattened tensor in order."""
    step = _block(tensor.device)
    for start in range(0, tensor.numel(), step):
        yield slice(start, min(start + step, tensor.numel()))


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a matrix in order, each about a block of elements."""
    step = max(1, _block(matrix.device) // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))


def _block(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return fp64 if one of the tensors is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def blockwise(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Apply an elementwise function of equally shaped tensors; fp32 out, or fp64 for fp64 in.

    The function gets widened copies of a block of each, which it may overwrite.

    >>> blockwise(lambda a, b: a.add_(b), torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    tensor([2., 2.])
    """
    first = matrices[0]
    dtype = result_dtype(*matrices)
    flat = [matrix.reshape(-1) for matrix in matrices]
    merged = torch.empty(first.numel(), dtype=dtype, device=first.device)
    largest = next(blocks(first), slice(0, 0)).stop
    buffers = [merged.new_empty(largest) for _ in flat]  # one set for all blocks stays in cache
    for block in blocks(first):
        size = block.stop - block.start
        parts = [
            buffer[:size].copy_(part[block]) for buffer, part in zip(buffers, flat, strict=True)
        ]
        merged[block] = function(*parts)
    return merged.view(first.shape)


def task_vector_of(tuned: Tensor, base: Tensor) -> Tensor:
    """Compute dW = W - W0 in fp32 or better without widened copies of its inputs."""
    return blockwise(torch.sub, tuned, base)


class TaskVector:
    """dW = W - W0 of flattened matrices, computed slice by slice where it is used, never stored.

    >>> TaskVector(torch.ones(2, 3), torch.zeros(2, 3))[1:3]
    tensor([1., 1.])
    """

    def __init__(self, tuned: Tensor, base: Tensor) -> None:
        self.tuned, self.base = tuned.reshape(-1), base.reshape(-1)
        self.dtype = result_dtype(tuned, base)
        self.device = tuned.device

    def numel(self) -> int:
        """Count the elements."""
        return self.tuned.numel()

    def __getitem__(self, part: slice) -> Tensor:
        """Compute a slice, in fp32 or better."""
        return as_float(self.tuned[part]).to(self.dtype) - as_float(self.base[part]).to(self.dtype)


def inner(a: Tensor, b: Tensor) -> float:
    """Compute <a, b> over all elements in fp64.

    >>> inner(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]))
    25.0
    """
    left, right = a.reshape(-1), b.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for block in blocks(left):
        total += (left[block].double() * right[block].double()).sum()
    return float(total)
