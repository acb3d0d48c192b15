"""Find where and by how much a model differs from its base: a few rows first, then all values.

In: corresponding tensors of two decoders. Out: `Differences`. Experts are often fine-tuned only in
part (LoRA on q and v, one layer, norms only), so every kind of matrix is sampled; if the sample
shows no difference, the search continues over all layers and then over all values, in pieces, up to
the first difference. Memory is bounded by the piece size. Over a network the search ends with the
first rows of all tensors, unless the hub reports identical files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf, isfinite, prod, sqrt
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.checkpoint import Checkpoint, count_non_finite
from ipmerge_core.models.files import FROM_DISK, OVER_NETWORK
from ipmerge_core.models.task_vectors import NOTHING, TaskVectorProducts

_SAMPLE_BYTES = 1 << 19  # per sampled matrix: about ten megabytes in total
_PIECE = 1 << 20  # elements compared at once


class Part(NamedTuple):
    """A tensor of a model and its counterpart in the base. `kind` names a module or a group."""

    kind: str
    layer: int
    name: str
    root: str


class Measured(NamedTuple):
    """Result for compared rows of a part, with squared norms if they differ.

    `bad` counts the NaN and infinite values of the model and of its base.
    """

    part: Part
    changed: bool
    change2: float = 0.0
    base2: float = 0.0
    bad: tuple[int, int] = (0, 0)


class Differences(NamedTuple):
    """Result of a comparison of two decoders.

    Attributes:
        compared: the matrices that were compared, changed or not.
        extras: the kinds of other tensors that differ; compared only if no matrix differs.
        sampled: True if `compared` are the first rows of many matrices; False if it is the first
            differing piece of a model whose sampled rows all equal the base's.
        unread: description of what was not compared although no difference was found.
    """

    compared: tuple[Measured, ...]
    extras: tuple[str, ...] = ()
    sampled: bool = True
    unread: str = ""

    @property
    def changed(self) -> tuple[Measured, ...]:
        """The matrices that differ."""
        return tuple(found for found in self.compared if found.changed)

    @property
    def largest(self) -> tuple[str, float]:
        """The kind of matrix with the largest distance, and that distance.

        The distance of a kind is ||W - W0||_F / ||W0||_F over its matrices that differ: untrained
        parts do not reduce it, and a single small matrix does not dominate it.
        """
        kinds = dict.fromkeys(found.part.kind for found in self.changed)
        distances = [(kind, _distance(self.changed, kind)) for kind in kinds]
        return max(distances, key=lambda found: found[1], default=("", 0.0))

    @property
    def damaged(self) -> Measured | None:
        """The first matrix with NaN or infinite values."""
        return next((found for found in self.compared if any(found.bad)), None)


Cut: TypeAlias = Callable[[Checkpoint, Checkpoint, Part], Iterable[range]]


def sample_differences(
    model: Checkpoint, root: Checkpoint, matrices: Sequence[Part]
) -> Differences:
    """Compare a few rows of each kind of matrix in its first, its middle and its last layer."""
    outer = _outer(matrices)
    return Differences(tuple(_sampled(model, root, [part for part in matrices if part in outer])))


def find_differences(
    model: Checkpoint, root: Checkpoint, matrices: Sequence[Part], extras: Sequence[Part]
) -> Differences:
    """Compare a model's decoder with its base's until a difference is found.

    Args:
        model: the fine-tuned model.
        root: its base.
        matrices: the mergeable parts.
        extras: other parts of the language model, compared last.
    """
    found = sample_differences(model, root, matrices)
    if not found.changed:
        found = Differences(tuple(_sampled(model, root, matrices)))
    if found.changed or _are_same_files(model, root):
        return found
    if model.files.remote or root.files.remote:
        kinds = _changed_kinds(model, root, extras, _first_rows)
        return Differences(found.compared, kinds, unread="the remaining rows, which are on the hub")
    for part in matrices:
        first = _first_difference(model, root, part, _pieces)
        if first is not None:
            return Differences((first,), sampled=False)
    return Differences(found.compared, _changed_kinds(model, root, extras, _pieces))


def task_vector_products(
    pairs: Sequence[tuple[Checkpoint, Checkpoint, Sequence[Part]]], *, exact: bool
) -> TaskVectorProducts:
    """Compare the task vectors of two models, streamed row block by row block.

    Args:
        pairs: the MLLM and the expert, each with its base and its matrices in the same order.
        exact: use all weights; otherwise the first rows of the matrices in the first, the middle
            and the last layer.

    Differences and sums are in fp64, so that the result is exact for the stored weights up to fp64
    rounding. Memory is bounded by the block size.
    """
    (mllm, root, ours), (math, base, theirs) = pairs
    outer = _outer(ours)
    cut: Cut = _pieces if exact else _first_rows

    def measure(places: tuple[Part, Part]) -> TaskVectorProducts:
        own, other = places
        found = NOTHING
        for rows in cut(mllm, root, own):
            vision = _change(mllm, root, own, rows)
            expert = _change(math, base, other, rows)
            products = TaskVectorProducts(
                mllm2=_norm2(vision), math2=_norm2(expert), inner=float((vision * expert).sum())
            )
            found = found.plus(products)
        return found

    chosen = [
        (own, other) for own, other in zip(ours, theirs, strict=True) if exact or own in outer
    ]
    remote = any(model.files.remote for model in (mllm, root, math, base))
    total = NOTHING
    with ThreadPoolExecutor((OVER_NETWORK if remote else FROM_DISK).threads) as pool:
        for found in pool.map(measure, chosen):
            total = total.plus(found)
    return total


def _outer(matrices: Sequence[Part]) -> set[Part]:
    """Return the matrices of each kind in its first, middle and last layer.

    Of a mixture, the first and the middle of the experts.
    """
    kinds: dict[str, dict[int, list[Part]]] = {}
    for part in matrices:
        kinds.setdefault(part.kind, {}).setdefault(part.layer, []).append(part)
    chosen: set[Part] = set()
    for layers in kinds.values():
        numbers = sorted(layers)
        for number in (numbers[0], numbers[(len(numbers) - 1) // 2], numbers[-1]):
            parts = layers[number]
            chosen |= {parts[0], parts[len(parts) // 2]}
    return chosen


def _change(model: Checkpoint, root: Checkpoint, part: Part, rows: range) -> Tensor:
    tuned = model.read(_address(part.name, rows)).to(torch.float64)
    return tuned - root.read(_address(part.root, rows)).to(torch.float64)


def _sampled(model: Checkpoint, root: Checkpoint, parts: Iterable[Part]) -> Iterator[Measured]:
    """Compare the first rows of each part, concurrently over a network."""

    def measure(part: Part) -> Measured:
        (rows,) = _first_rows(model, root, part)
        return _measure(model, root, part, rows)

    remote = model.files.remote or root.files.remote
    with ThreadPoolExecutor((OVER_NETWORK if remote else FROM_DISK).threads) as pool:
        yield from pool.map(measure, parts)


def _measure(model: Checkpoint, root: Checkpoint, part: Part, rows: range) -> Measured:
    """Compare rows of a part in the model's dtype and compute their change in fp64."""
    tuned = model.read(_address(part.name, rows))
    base = root.read(_address(part.root, rows))
    if _are_equal(tuned, base):
        return Measured(part, changed=False)
    change2 = _norm2(tuned.to(torch.float64) - base.to(torch.float64))
    bad = (0, 0) if isfinite(change2) else (count_non_finite(tuned), count_non_finite(base))
    return Measured(part, changed=True, change2=change2, base2=_norm2(base), bad=bad)


def _are_equal(tuned: Tensor, base: Tensor) -> bool:
    """Return whether all values are equal in the dtype of the first; compares bytes if possible."""
    if tuned.dtype == base.dtype and torch.equal(_as_integers(tuned), _as_integers(base)):
        return True
    return torch.equal(tuned, base.to(tuned.dtype))


def _as_integers(values: Tensor) -> Tensor:
    """View values as the widest integers whose size divides theirs."""
    stored = values.reshape(-1).view(torch.uint8)
    return stored if stored.numel() % 8 else stored.view(torch.int64)


def _first_difference(model: Checkpoint, root: Checkpoint, part: Part, cut: Cut) -> Measured | None:
    for rows in cut(model, root, part):
        found = _measure(model, root, part, rows)
        if found.changed:
            return found
    return None


def _changed_kinds(
    model: Checkpoint, root: Checkpoint, parts: Sequence[Part], cut: Cut
) -> tuple[str, ...]:
    """List the kinds with a part that differs; each is read up to its first difference."""
    changed: dict[str, None] = {}
    for part in parts:
        if part.kind not in changed and _first_difference(model, root, part, cut) is not None:
            changed[part.kind] = None
    return tuple(changed)


def _first_rows(model: Checkpoint, root: Checkpoint, part: Part) -> list[range]:
    row = root.spec(part.root).nbytes // root.spec(part.root).shape[0]
    return [range(min(_common_rows(model, root, part), max(1, _SAMPLE_BYTES // max(1, row))))]


def _pieces(model: Checkpoint, root: Checkpoint, part: Part) -> Iterator[range]:
    rows, width = _common_rows(model, root, part), prod(root.spec(part.root).shape[1:])
    step = max(1, _PIECE // max(1, width))
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def _common_rows(model: Checkpoint, root: Checkpoint, part: Part) -> int:
    """Return the number of rows that both have: a vocabulary may have been extended."""
    return min(model.spec(part.name).shape[0], root.spec(part.root).shape[0])


def _address(name: str, rows: range) -> str:
    """Return the address of some rows of a tensor, or of rows of an address."""
    return str(split_address(name).within(rows.start, rows.stop))


def _are_same_files(model: Checkpoint, root: Checkpoint) -> bool:
    """Return whether the weights are known to be identical without reading them."""
    if (model.files.id, model.files.revision) == (root.files.id, root.files.revision):
        return True
    ours = [model.files.content_id(shard) for shard in model.shards]
    return None not in ours and ours == [root.files.content_id(shard) for shard in root.shards]


def _distance(changed: Iterable[Measured], kind: str) -> float:
    of_kind = [found for found in changed if found.part.kind == kind]
    base2 = sum(found.base2 for found in of_kind)
    return sqrt(sum(found.change2 for found in of_kind) / base2) if base2 else inf


def _norm2(values: Tensor) -> float:
    return float(values.to(torch.float64).square().sum())
