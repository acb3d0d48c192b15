"""Exact selection by magnitude without sorting a matrix.

In: values of any shape. Out: the same values with all but the k largest magnitudes set to zero, or
the rank of every element in its row. Equal magnitudes are ordered by their place in the matrix, so
exactly k survive. The threshold is found by Floyd and Rivest's sampling (1975): a sample brackets
it, one pass counts what lies above, and only the few values inside the bracket are looked at
closely. The answer does not depend on the sample, its speed does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ipmerge_core.methods.blocks import TaskVector, blocks, row_blocks

_SMALL = 1 << 16  # below this a direct selection is as fast
_SAMPLE = 1 << 15
_FIRST_BITS = 16  # of the 31 bits of a magnitude in fp32; the rest is for the second pass


class Trim:
    """Zero all but the `count` largest magnitudes of a tensor that comes by in blocks, in order.

    Of magnitudes equal to the smallest that is kept the first are kept, so exactly `count` remain.
    """

    def __init__(self, source: Tensor | TaskVector, count: int) -> None:
        self.keeps_all = count >= source.numel()
        self.threshold, self.spare = math.inf, 0
        if 0 < count < source.numel():
            self.threshold, above = kth_largest(source, count)
            self.spare = count - above  # of the values equal to the threshold

    def __call__(self, block: Tensor) -> Tensor:
        """Trim the next block into a new tensor."""
        if self.keeps_all:
            return block
        if self.spare <= 0:
            return torch.hardshrink(block, self.threshold)  # zeroes what equals it, too
        trimmed = zero_below(block, self.threshold)
        values, count, places = _searchable(block.abs())
        equal = int(count(values == self.threshold))
        if equal > self.spare:
            trimmed[torch.as_tensor(places(values == self.threshold)[self.spare :])] = 0
        self.spare -= equal
        return trimmed


def keep_largest_(values: Float[Tensor, "*shape"], count: int) -> Float[Tensor, "*shape"]:
    """Zero, in place, all but the `count` largest magnitudes; of equal ones the first are kept.

    >>> keep_largest_(torch.tensor([[0.5, -0.5], [2.0, 0.5]]), 2)
    tensor([[0.5000, 0.0000],
            [2.0000, 0.0000]])
    """
    flat = values.view(-1)
    trim = Trim(flat, count)
    for block in blocks(flat):
        flat[block] = trim(flat[block])
    return values


def zero_below(values: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """Zero the magnitudes strictly below the threshold, in a new tensor."""
    if threshold <= 0:
        return values.clone()
    below = torch.nextafter(torch.tensor(threshold, dtype=values.dtype), torch.tensor(0.0))
    return torch.hardshrink(values, float(below))


def kth_largest(source: Tensor | TaskVector, k: int) -> tuple[float, int]:
    """Find the k-th largest magnitude of a flat tensor, and how many are strictly larger."""
    if source.numel() > _SMALL:
        low, high = _bracket(source, k)
        above, inside = _between(source, low, high)
        if above < k <= above + inside.numel():
            return _direct(inside, k - above, above)
    return _direct(source[:].abs(), k, 0)


def _direct(magnitudes: Tensor, k: int, above: int) -> tuple[float, int]:
    threshold = magnitudes.kthvalue(magnitudes.numel() - k + 1).values
    return float(threshold), above + int((magnitudes > threshold).count_nonzero())


def _bracket(source: Tensor | TaskVector, k: int) -> tuple[float, float]:
    """Two magnitudes that very probably enclose the k-th largest."""
    stride = max(source.numel() // _SAMPLE, 1) | 1  # odd, so as not to walk down one column
    sample = source[::stride].abs().sort(descending=True).values
    share = k / source.numel()
    middle = share * sample.numel()
    margin = 5 * math.sqrt(sample.numel() * share * (1 - share)) + 5
    first, last = int(middle - margin), int(middle + margin)
    high = float(sample[first]) if first >= 0 else math.inf
    low = float(sample[last]) if last < sample.numel() else 0.0
    return low, high


def _between(source: Tensor | TaskVector, low: float, high: float) -> tuple[int, Tensor]:
    """Count the magnitudes above `high` and collect those in [low, high]."""
    above, inside = 0, []
    for block in blocks(source):
        values, count, places = _searchable(source[block].abs())
        above += int(count(values > high))
        inside.append(torch.as_tensor(values[places((values >= low) & (values <= high))]))
    return above, torch.cat(inside)


def _searchable(values: Tensor) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """Values, counter and finder of truths: numpy's on a CPU, where they are ten times faster."""
    if values.device.type == "cpu":
        return values.numpy(), np.count_nonzero, np.flatnonzero
    return values, torch.count_nonzero, lambda mask: mask.nonzero().view(-1)


def ascending_ranks(values: Float[Tensor, "m n"]) -> Int[Tensor, "m n"]:
    """Rank of every magnitude in its row, 0 for the smallest; of equal ones the first is lower.

    >>> ascending_ranks(torch.tensor([[0.5, -0.25, 0.125]]))
    tensor([[2, 1, 0]], dtype=torch.int32)
    """
    ranks = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    for rows in row_blocks(values):  # the keys of a block stay in cache
        ranks[rows] = _ranks_in_rows(values[rows])
    return ranks


def _ranks_in_rows(values: Tensor) -> Tensor:
    magnitude = values.abs()
    if magnitude.dtype == torch.float32:  # magnitude and place in one key: no stable sort needed
        columns = torch.arange(values.shape[1], device=values.device)
        key = (magnitude.view(torch.int32).long() << 32) | columns
        if key.device.type == "cpu":
            key.numpy().sort(axis=1)  # several times faster than torch's here
        else:
            key = key.sort(dim=1).values
        order = key & 0xFFFFFFFF
    else:
        order = magnitude.argsort(dim=1, stable=True)
    ranks = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def magnitude_histogram(values: Float[Tensor, "m n"], prefix: int | None) -> Float[Tensor, " bins"]:
    """Count magnitudes by the upper bits of their fp32 form, or by the lower ones below a prefix.

    Non-negative floats are ordered as their bits are, so two such passes find a quantile over any
    number of matrices exactly. Counts are fp64, to be added up.
    """
    low_bits = 31 - _FIRST_BITS
    bins = 1 << (_FIRST_BITS if prefix is None else low_bits)
    counts = torch.zeros(bins, dtype=torch.float64, device=values.device)
    flat = values.view(-1)
    for block in blocks(flat):
        bits = flat[block].float().abs().view(torch.int32)
        upper = bits >> low_bits
        chosen = upper if prefix is None else bits[upper == prefix] & ((1 << low_bits) - 1)
        counts += torch.bincount(chosen, minlength=bins)
    return counts


def bin_of_kth(counts: Float[Tensor, " bins"], k: int) -> tuple[int, int]:
    """Find the bin that holds the k-th largest value, and how many values lie above that bin."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, float(k)))
    above = int(from_above[place - 1]) if place else 0
    return counts.numel() - 1 - place, above


def magnitude_of(prefix: int, rest: int) -> float:
    """Make the fp32 magnitude whose bits are the given upper and lower ones."""
    bits = torch.tensor((prefix << (31 - _FIRST_BITS)) | rest, dtype=torch.int32)
    return float(bits.view(torch.float32))
