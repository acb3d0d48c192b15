"""Exact selection of the largest magnitudes without sorting a matrix.

In: values of any shape. Out: the same values with all but the k largest magnitudes set to zero, or
the order of the elements of every row. Equal magnitudes are ordered by position, so that exactly k
remain. The threshold is found with Floyd and Rivest's sampling (1975): a sample brackets it, one
pass counts the values above, and only the few values inside the bracket are examined. The result
does not depend on the sample, only the speed does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ipmerge_core.methods.blocks import TaskVectors, blocks

_SMALL = 1 << 16  # below this size a direct selection is as fast
_SAMPLE = 1 << 17
_FIRST_BITS = 16  # upper bits of the 31 of an fp32 magnitude; the second pass uses the others
_INFINITE = 0x7F800000  # bits of infinity in fp32; those of NaN are larger


class Trim:
    """Zero the magnitudes below a threshold in a tensor that is passed in blocks, in order.

    Of the elements equal to the threshold the first `spare` are kept. A negative threshold keeps
    all elements.
    """

    def __init__(self, threshold: float, spare: int) -> None:
        self.threshold, self.spare = threshold, spare

    def __call__(self, block: Tensor) -> Tensor:
        """Trim the next block into a new tensor, or return it if all of it is kept."""
        if self.threshold < 0:
            return block
        if self.spare == 0:
            return torch.hardshrink(block, self.threshold)  # also zeroes elements equal to it
        values, count, places = _searchable(block.abs())
        equal = values == self.threshold
        found = int(count(equal))
        if found <= self.spare:
            self.spare -= found
            return zero_below(block, self.threshold)
        trimmed = torch.hardshrink(block, self.threshold)
        first = torch.as_tensor(places(equal)[: self.spare])
        trimmed.view(-1)[first] = block.view(-1)[first]
        self.spare = 0
        return trimmed


def trims(vectors: TaskVectors, wanted: Sequence[Sequence[int]]) -> list[list[Trim]]:
    """Return trims that keep exactly the requested numbers of elements of each vector."""
    size = vectors.size
    inside = [[count for count in counts if 0 < count < size] for counts in wanted]
    found = [
        dict(zip(counts, thresholds, strict=True))
        for counts, thresholds in zip(inside, kth_largest(vectors, inside), strict=True)
    ]
    return [
        [_trim(count, size, known) for count in counts]
        for counts, known in zip(wanted, found, strict=True)
    ]


def _trim(count: int, size: int, known: Mapping[int, tuple[float, int]]) -> Trim:
    if count not in known:
        return Trim(-1.0 if count >= size else math.inf, 0)  # keep all, or none
    threshold, above = known[count]
    return Trim(threshold, count - above)


def keep_largest_(values: Float[Tensor, "*shape"], count: int) -> Float[Tensor, "*shape"]:
    """Zero, in place, all but the `count` largest magnitudes; the first of equal ones are kept.

    >>> keep_largest_(torch.tensor([[0.5, -0.5], [2.0, 0.5]]), 2)
    tensor([[0.5000, 0.0000],
            [2.0000, 0.0000]])
    """
    flat = values.view(-1)
    ((trim,),) = trims(TaskVectors([flat]), [[count]])
    for block in blocks(flat):
        flat[block] = trim(flat[block])
    return values


def zero_below(values: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """Zero the magnitudes strictly below the threshold in a new tensor."""
    if threshold <= 0:
        return values.clone()
    below = torch.nextafter(torch.tensor(threshold, dtype=values.dtype), torch.tensor(0.0))
    return torch.hardshrink(values, float(below))


def kth_largest(
    vectors: TaskVectors, wanted: Sequence[Sequence[int]]
) -> list[list[tuple[float, int]]]:
    """Find the k-th largest magnitude, and the number of larger ones, for each k of each vector.

    >>> kth_largest(TaskVectors([torch.tensor([0.5, -2.0, 0.5])]), [[1, 2]])
    [[(2.0, 0), (0.5, 1)]]
    """
    if not any(wanted):
        return [[] for _ in wanted]
    if vectors.size <= _SMALL:
        return [_direct(x, counts) for x, counts in zip(vectors.sample(1), wanted, strict=True)]
    stride = max(vectors.size // _SAMPLE, 16) | 1  # odd, to avoid sampling a single column
    brackets = [
        _brackets(sample, vectors.size, counts)
        for sample, counts in zip(vectors.sample(stride), wanted, strict=True)
    ]
    tallies = _tally(vectors, brackets)
    return [
        [_kth_of(vectors, number, k, tally) for k, tally in zip(counts, row, strict=True)]
        for number, (counts, row) in enumerate(zip(wanted, tallies, strict=True))
    ]


@dataclass
class _Tally:
    """Counts above and values within a bracket [low, high]; a single value is only counted."""

    low: float
    high: float
    above: int = 0
    within: int = 0
    inside: list[Tensor] = field(default_factory=list)

    def add(self, magnitudes: Tensor) -> None:
        values, count, places = _searchable(magnitudes)
        larger = values > self.high
        between = (values >= self.low) ^ larger
        self.above += int(count(larger))
        self.within += int(count(between))
        if self.low < self.high:
            self.inside.append(torch.as_tensor(values.reshape(-1)[places(between)]))


def _tally(
    vectors: TaskVectors, brackets: Sequence[Sequence[tuple[float, float]]]
) -> list[list[_Tally]]:
    tallies = [[_Tally(*bracket) for bracket in row] for row in brackets]
    for block in vectors.blocks():
        for vector, row in zip(block, tallies, strict=True):
            magnitudes = vector.abs_()
            for tally in row:
                tally.add(magnitudes)
    return tallies


def _kth_of(vectors: TaskVectors, number: int, k: int, tally: _Tally) -> tuple[float, int]:
    enclosed = tally.above < k <= tally.above + tally.within
    if enclosed and tally.low == tally.high:
        return tally.low, tally.above
    if enclosed and tally.within < vectors.size:
        inside = TaskVectors([torch.cat(tally.inside)])
        ((threshold, larger),) = kth_largest(inside, [[k - tally.above]])[0]
        return threshold, tally.above + larger
    return _direct(vectors.sample(1)[number], [k])[0]  # the bracket missed the threshold


def _direct(values: Tensor, counts: Sequence[int]) -> list[tuple[float, int]]:
    ordered = np.sort(values.abs().cpu().numpy())
    thresholds = [ordered[-k] for k in counts]
    return [
        (float(threshold), ordered.size - int(np.searchsorted(ordered, threshold, "right")))
        for threshold in thresholds
    ]


def _brackets(sample: Tensor, size: int, counts: Sequence[int]) -> list[tuple[float, float]]:
    """Return two magnitudes for every k that enclose the k-th largest with high probability."""
    ordered = np.sort(sample.abs().cpu().numpy())[::-1]
    found = []
    for k in counts:
        share = k / size
        margin = 5 * math.sqrt(ordered.size * share * (1 - share)) + 5
        first, last = int(share * ordered.size - margin), int(share * ordered.size + margin)
        high = float(ordered[first]) if first >= 0 else math.inf
        low = float(ordered[last]) if last < ordered.size else 0.0
        found.append((low, high))
    return found


def _searchable(values: Tensor) -> tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]:
    """Return values and functions to count and find True; numpy on a CPU, ten times faster."""
    if values.device.type == "cpu":
        return values.numpy(), np.count_nonzero, np.flatnonzero
    return values, torch.count_nonzero, lambda mask: mask.view(-1).nonzero().view(-1)


def ascending_order(values: Float[Tensor, "m n"]) -> Int[Tensor, "m n"]:
    """Return the columns of every row by ascending magnitude, equal ones in order.

    >>> ascending_order(torch.tensor([[0.5, -0.25, 0.125, -0.25]]))
    tensor([[2, 1, 3, 0]])
    """
    magnitude = values.abs()
    if magnitude.dtype != torch.float32:
        return magnitude.argsort(dim=1, stable=True)
    # Magnitude and position in one key, so that no stable sort is needed: the bits of non-negative
    # floats have the order of their values.
    key = magnitude.view(torch.int32).long().bitwise_left_shift_(32)
    key |= torch.arange(values.shape[1], device=values.device)
    if key.device.type == "cpu":
        key.numpy().sort(axis=1)  # several times faster than torch's here
    else:
        key = key.sort(dim=1).values
    return key.bitwise_and_(0xFFFFFFFF)


def by_rank(order: Int[Tensor, "m n"], table: Shaped[Tensor, " n"]) -> Shaped[Tensor, "m n"]:
    """Map every element to the table entry of its rank in its row.

    >>> by_rank(torch.tensor([[2, 1, 0]]), torch.tensor([0.25, 0.5, 0.75]))
    tensor([[0.7500, 0.5000, 0.2500]])
    """
    found = table.new_empty(order.shape)
    return found.scatter_(1, order, table.expand(order.shape))


def magnitude_histogram(values: Float[Tensor, "m n"], prefix: int | None) -> Float[Tensor, " bins"]:
    """Count magnitudes by the upper bits of their fp32 form, or by the lower ones of a prefix.

    Non-negative floats are ordered like their bits, so that two such passes find an exact quantile
    over any number of matrices. Counts are fp64, to be summed; NaN if a value is not finite.
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
    if prefix is None and bool(counts[_INFINITE >> low_bits :].any()):
        counts.fill_(math.nan)
    return counts


def bin_of_kth(counts: Float[Tensor, " bins"], k: int) -> tuple[int, int]:
    """Find the bin that contains the k-th largest value, and the number of values above it."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, float(k)))
    above = int(from_above[place - 1]) if place else 0
    return counts.numel() - 1 - place, above


def magnitude_of(prefix: int, rest: int) -> float:
    """Return the fp32 magnitude with the given upper and lower bits."""
    bits = torch.tensor((prefix << (31 - _FIRST_BITS)) | rest, dtype=torch.int32)
    return float(bits.view(torch.float32))
