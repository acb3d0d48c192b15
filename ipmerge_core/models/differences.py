"""Where a model differs from its base, and by how much: a few rows first, everything if need be.

In: the tensors of two decoders that correspond. Out: `Differences`. Experts are often tuned in part
(LoRA on q and v, one layer, norms alone), so every kind of matrix is sampled, and where the sample
shows nothing the search goes on: all layers, then every value, piece by piece until the first that
differs. Memory is bounded by the pieces. Over a network the search ends with the first rows of all
tensors, unless the hub says that the files are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf, isfinite, prod, sqrt
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.models.checkpoint import Checkpoint, count_non_finite, split_address
from ipmerge_core.models.files import FROM_DISK, OVER_NETWORK

_SAMPLE_BYTES = 1 << 19  # of each sampled matrix: some ten megabytes in all, also from the hub
_PIECE = 1 << 20  # elements to compare at once


class Part(NamedTuple):
    """A tensor of a model and its counterpart in the base. `kind` names a module or a group."""

    kind: str
    layer: int
    name: str
    root: str


class Measured(NamedTuple):
    """Rows of a part that were compared, and where they differ the squared norms of both.

    `bad` counts the NaN and infinite values of the model and of its base, where there are any.
    """

    part: Part
    changed: bool
    change2: float = 0.0
    base2: float = 0.0
    bad: tuple[int, int] = (0, 0)


class Differences(NamedTuple):
    """What was found.

    Attributes:
        compared: the matrices whose rows were measured, changed or not.
        beside: the kinds of other tensors that differ, looked at where no matrix does.
        sampled: whether `compared` are rows of many matrices. If not, it is the first piece that
            differs in a model whose sampled rows all equal the base's.
        unread: what was not compared although nothing differs, in words.
    """

    compared: tuple[Measured, ...]
    beside: tuple[str, ...] = ()
    sampled: bool = True
    unread: str = ""

    @property
    def changed(self) -> tuple[Measured, ...]:
        """The matrices that differ."""
        return tuple(found for found in self.compared if found.changed)

    @property
    def largest(self) -> tuple[str, float]:
        """The kind of matrix that differs most, with its distance.

        The distance of a kind is ||W - W0||_F / ||W0||_F over its matrices that differ: neither do
        the parts that were not trained hide it, nor does one small matrix decide it.
        """
        kinds = dict.fromkeys(found.part.kind for found in self.changed)
        distances = [(kind, _distance(self.changed, kind)) for kind in kinds]
        return max(distances, key=lambda found: found[1], default=("", 0.0))

    @property
    def damaged(self) -> Measured | None:
        """The first matrix that holds values which are no finite numbers."""
        return next((found for found in self.compared if any(found.bad)), None)


Cut: TypeAlias = Callable[[Checkpoint, Checkpoint, Part], Iterable[range]]


def sample_differences(
    model: Checkpoint, root: Checkpoint, matrices: Sequence[Part]
) -> Differences:
    """Compare a few rows of each kind of matrix in the first, the middle and the last layer."""
    last = max(part.layer for part in matrices)
    outer = [part for part in matrices if part.layer in {0, last // 2, last}]
    return Differences(tuple(_sampled(model, root, outer)))


def find_differences(
    model: Checkpoint, root: Checkpoint, matrices: Sequence[Part], beside: Sequence[Part]
) -> Differences:
    """Compare a model's decoder with its base's, as far as it takes to find a difference.

    Args:
        model: the fine-tuned model.
        root: its base.
        matrices: the parts that merge.
        beside: other parts of the language model, looked at last.
    """
    found = sample_differences(model, root, matrices)
    if not found.changed:
        found = Differences(tuple(_sampled(model, root, matrices)))
    if found.changed or _are_same_files(model, root):
        return found
    if model.files.remote or root.files.remote:
        kinds = _changed_kinds(model, root, beside, _first_rows)
        return Differences(found.compared, kinds, unread="the other rows, which are on the hub")
    for part in matrices:
        first = _first_difference(model, root, part, _pieces)
        if first is not None:
            return Differences((first,), sampled=False)
    return Differences(found.compared, _changed_kinds(model, root, beside, _pieces))


def _sampled(model: Checkpoint, root: Checkpoint, parts: Iterable[Part]) -> Iterator[Measured]:
    """Measure the first rows of each part, several at once where each is a request."""

    def measure(part: Part) -> Measured:
        (rows,) = _first_rows(model, root, part)
        return _measure(model, root, part, rows)

    remote = model.files.remote or root.files.remote
    with ThreadPoolExecutor((OVER_NETWORK if remote else FROM_DISK).threads) as pool:
        yield from pool.map(measure, parts)


def _measure(model: Checkpoint, root: Checkpoint, part: Part, rows: range) -> Measured:
    """Compare rows of a part in the model's own dtype, and measure their change in fp64."""
    tuned = model.read(_address(part.name, rows))
    base = root.read(_address(part.root, rows))
    if _are_equal(tuned, base):
        return Measured(part, changed=False)
    change2 = _norm2(tuned.to(torch.float64) - base.to(torch.float64))
    bad = (0, 0) if isfinite(change2) else (count_non_finite(tuned), count_non_finite(base))
    return Measured(part, changed=True, change2=change2, base2=_norm2(base), bad=bad)


def _are_equal(tuned: Tensor, base: Tensor) -> bool:
    """Whether all values are equal in the dtype of the first; bytes first, which is much faster."""
    if tuned.dtype == base.dtype and torch.equal(_words(tuned), _words(base)):
        return True
    return torch.equal(tuned, base.to(tuned.dtype))


def _words(values: Tensor) -> Tensor:
    """Look at freshly read values as integers, the widest that fit."""
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
    """List the kinds of which some part differs; each is read until its first difference."""
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
    """Rows that both have: a vocabulary may have grown."""
    return min(model.spec(part.name).shape[0], root.spec(part.root).shape[0])


def _address(name: str, rows: range) -> str:
    """Name some rows of a tensor, or of the rows that `name` itself stands for."""
    stored, within = split_address(name)
    start = within.start if within else 0
    return f"{stored}[{start + rows.start}:{start + rows.stop}]"


def _are_same_files(model: Checkpoint, root: Checkpoint) -> bool:
    """Whether the weights are known to be the same without reading them."""
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
