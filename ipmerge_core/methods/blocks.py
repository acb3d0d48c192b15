"""Apply elementwise functions to matrices in blocks that fit the CPU cache.

An elementwise method consists of a dozen small operations, each of which would read and write
gigabytes on whole matrices. Block by block the data stays in cache, inputs are converted to fp32
only where they are used, and the result is the only large allocation. A block consists of whole
rows, and blocks are processed in order. Sums over whole matrices are accumulated in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.spectral.spectrum import as_float

_CPU_BLOCK = 1 << 18  # elements: several fp32 temporaries of 1 MiB fit the last-level cache
_DEVICE_BLOCK = 1 << 25


def blocks(tensor: Tensor) -> Iterator[slice]:
    """Yield slices that cover the flattened tensor in order."""
    return _slices(tensor.numel(), _block(tensor.device))


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices that cover the rows of a matrix in order, each about one block of elements."""
    return _slices(len(matrix), max(1, _block(matrix.device) // max(matrix.shape[1], 1)))


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _block(device: torch.device) -> int:
    return _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return fp64 if any of the tensors is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def blockwise(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Apply a function to matrices of equal shape block by block; fp32 out, or fp64 for fp64 in.

    The function receives a converted copy of a block of each, which it may overwrite.

    >>> blockwise(lambda a, b: a.add_(b), torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    tensor([2., 2.])
    """
    first = matrices[0]
    merged = torch.empty(first.shape, dtype=result_dtype(*matrices), device=first.device)
    rows = _as_rows(merged)
    for block, parts in _widened(matrices):
        rows[block] = function(*parts)
    return merged


def blockwise_sum(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """Sum the results of a function over all blocks in fp64; arguments as in `blockwise`.

    >>> blockwise_sum(inner_products, torch.ones(3), torch.full((3,), 2.0))
    tensor([[ 3.,  6.],
            [ 6., 12.]], dtype=torch.float64)
    """
    total = torch.zeros((), dtype=torch.float64, device=matrices[0].device)
    for _, parts in _widened(matrices):
        total = total + function(*parts)
    return total


def _widened(matrices: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield converted copies of the same rows of all matrices, reusing one set of buffers."""
    rows = [_as_rows(matrix) for matrix in matrices]
    slices = list(row_blocks(rows[0]))
    shape = (slices[0].stop if slices else 0, rows[0].shape[1])
    dtype = result_dtype(*matrices)
    buffers = [torch.empty(shape, dtype=dtype, device=matrix.device) for matrix in rows]
    for block in slices:
        size = block.stop - block.start
        yield block, [b[:size].copy_(r[block]) for b, r in zip(buffers, rows, strict=True)]


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def inner_products(*vectors: Tensor) -> Float[Tensor, "k k"]:
    """Compute <x_i, x_j> over all elements of blocks in fp64.

    >>> inner_products(torch.tensor([3.0, 4.0]))
    tensor([[25.]], dtype=torch.float64)
    """
    wide = vectors[0].new_empty(len(vectors), vectors[0].numel(), dtype=torch.float64)
    for row, vector in zip(wide, vectors, strict=True):
        row.copy_(vector.reshape(-1))
    return wide @ wide.T


def squares(*vectors: Tensor) -> Float[Tensor, " k"]:
    """Compute <x_i, x_i> over all elements of blocks in fp64.

    >>> squares(torch.tensor([3.0, 4.0]), torch.ones(2))
    tensor([25.,  2.], dtype=torch.float64)
    """
    wide = (vector.reshape(-1).double() for vector in vectors)
    return torch.stack([vector.dot(vector) for vector in wide])


def task_vector_of(tuned: Tensor, base: Tensor) -> Tensor:
    """Compute dW = W - W0 in fp32 or fp64 without converted copies of the whole inputs."""
    return blockwise(torch.Tensor.sub_, tuned, base)


class TaskVectors:
    """Task vectors dW_i = W_i - W0, computed block by block on use and never stored.

    Without a base, the vectors are the matrices themselves.

    >>> vectors = TaskVectors([torch.ones(2, 2), torch.eye(2)], torch.ones(2, 2))
    >>> [[change.tolist() for change in block] for block in vectors.blocks()]
    [[[[0.0, 0.0], [0.0, 0.0]], [[0.0, -1.0], [-1.0, 0.0]]]]
    """

    def __init__(self, tuned: Sequence[Tensor], base: Tensor | None = None) -> None:
        self.tuned, self.base = tuned, base
        self.size = tuned[0].numel()

    def blocks(self) -> Iterator[list[Tensor]]:
        """Yield blocks of whole rows of each in fp32 or fp64, valid until the next iteration."""
        if self.base is None:
            yield from (parts for _, parts in _widened(self.tuned))
            return
        for _, (base, *tuned) in _widened([self.base, *self.tuned]):
            yield [matrix.sub_(base) for matrix in tuned]

    def sample(self, stride: int) -> list[Tensor]:
        """Return every `stride`-th element of each in fp32 or fp64."""
        tuned = [matrix.reshape(-1)[::stride] for matrix in self.tuned]
        if self.base is None:
            return [as_float(part) for part in tuned]
        base = self.base.reshape(-1)[::stride]
        return [task_vector_of(part, base) for part in tuned]
