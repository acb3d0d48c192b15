"""Split stored tensors into parts to merge and pieces to copy, according to a plan.

In: a plan, a pair, and the header entry of a tensor. Out: the parts in byte order, and one matrix
of every model relative to one base. A fused tensor contains several matrices; a large tensor is
copied in pieces, and merged in pieces if the method is elementwise, which bounds memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS, MergeMethod
from ipmerge_core.methods.blocks import blockwise
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.checkpoint import DTYPES, TensorSpec, arranged, part_of
from ipmerge_core.models.pairing import (
    BIAS,
    NORM,
    VOCABULARY,
    MatrixMatch,
    MatrixWeights,
    ModelPair,
)
from ipmerge_core.models.shared_tokens import ROWS, shared_rows, shared_tokens
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.spectral.kinds import Anchor
from ipmerge_core.spectral.low_rank import LowRank
from ipmerge_core.spectral.spectrum import noise_floor

Chosen: TypeAlias = tuple[MatrixMatch, tuple[int, ...]]  # a matrix and its experts
Work: TypeAlias = dict[str, list[Chosen]]  # by the MLLM's stored tensor
EXTRAS = ("norm", "bias", ROWS)  # modules other than decoder matrices


class Part(NamedTuple):
    """Bytes [start, stop) of one tensor's data, and the matrices in them that are merged.

    There are several where columns of one stored matrix are matrices of the decoder.
    """

    spec: TensorSpec
    start: int
    stop: int
    merged: tuple[Chosen, ...] = ()

    @property
    def is_filled(self) -> bool:
        """Whether the merged matrices are all of the bytes."""
        merged = sum(matrix.shape[0] * matrix.shape[1] for matrix, _ in self.merged)
        return merged * DTYPES[self.spec.dtype].itemsize == self.stop - self.start

    def place_in(self, data: Tensor, matrix: MatrixMatch) -> Tensor:
        """View the elements of a merged matrix in those of the part.

        Shapes: data (n,), the elements of the part; the result is that of the matrix, or (n,).
        """
        if len(self.merged) == 1 and self.is_filled and not split_address(matrix.mllm).transposed:
            return data
        spec = part_of(self.spec, matrix.mllm)
        assert spec is not None, "it has been matched"
        return arranged(data, spec)


def on_one_base(
    weights: MatrixWeights, device: torch.device, anchor: Anchor = "two_base"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Move weights to the device and shift them to one base: returns base, mllm, experts.

    Math:   two_base: on B_v, W_e' = (W_e - W0) + B_v;  root: on W0, as they are
            inject:   on W_v, W_e' = (W_e - W0) + W_v;  interp: on W_v, as they are
    On W_v the MLLM's task vector is 0. Methods are independent of the anchor.
    """
    base, root, mllm, experts, _ = weights.to(device)
    if anchor == "interp":
        return mllm, mllm, list(experts)
    if anchor == "inject":
        root = mllm
    elif root is base or anchor == "root":
        return base, mllm, list(experts)
    moved = [blockwise(lambda e, b, r: (e - b) + r, expert, base, root) for expert in experts]
    return root, mllm, moved


def rounding_noise(weights: MatrixWeights, anchor: Anchor = "two_base") -> tuple[float, ...]:
    """Return the rounding noise of the files in each task vector of `on_one_base`.

    Computed from the stored dtypes before weights are shifted, as shifted weights are in fp32.
    """
    base, root, mllm, experts, _ = weights
    known = low_rank_changes(weights, anchor)
    own = {"two_base": root, "root": base}.get(anchor)
    origin = mllm if anchor == "interp" else base
    tuned = ((mllm, own), *((expert, origin) for expert in experts))
    return tuple(
        change.noise if change is not None else _noise_of(model, start)
        for change, (model, start) in zip(known, tuned, strict=True)
    )


def _noise_of(model: Tensor, start: Tensor | None) -> float:
    return 0.0 if start is None else noise_floor(model, start)  # the MLLM's is zero on W_v


def low_rank_changes(
    weights: MatrixWeights, anchor: Anchor = "two_base"
) -> tuple[LowRank | None, ...]:
    """Return the task vectors of `on_one_base` that are known to be of low rank, the MLLM's first.

    A change keeps its factors as long as it is relative to the base that they were trained on.
    """
    vision, *others = weights.factors
    own = anchor == "two_base" or (anchor == "root" and weights.root is weights.base)
    kept = [vision if own else None, *(None if anchor == "interp" else each for each in others)]
    return tuple(None if factors is None else LowRank.of(*factors) for factors in kept)


def chosen(plan: MergePlan, pair: ModelPair) -> list[Chosen]:
    """List the merged matrices of a plan, with the experts of each.

    Raises: PlanError if the shared tokens have changed since the plan was made.
    """
    every = tuple(range(len(pair.math)))
    return [
        *chosen_matrices(plan, pair),
        *((m, every) for m in _extras(plan, pair) if plan.allows(split_address(m.name).name)),
    ]


def chosen_matrices(plan: MergePlan, pair: ModelPair) -> list[Chosen]:
    """List the merged decoder matrices, over which a statistic is computed."""
    by_name = {matrix.name: matrix for matrix in pair.matrices}
    return [(by_name[decision.name], decision.experts) for decision in plan.selected]


def _extras(plan: MergePlan, pair: ModelPair) -> Iterator[MatrixMatch]:
    if plan.options.norms == "merge":
        yield from pair.vectors
    if plan.tokens:
        if shared_tokens(pair) != plan.tokens:
            raise PlanError(
                "The shared tokens of the tokenizers have changed since the plan was made. Make "
                "a new plan."
            )
        yield from shared_rows(pair)


def count_extras(plan: MergePlan, pair: ModelPair) -> tuple[str, ...]:
    """Describe the tensors that the plan merges in addition to decoder matrices, with counts."""
    counts: Counter[str] = Counter()
    for matrix, _ in chosen(plan, pair):
        if matrix.module in EXTRAS:
            counts[matrix.module] += matrix.shape[0]  # a norm is one row
    names = {"norm": "norms", "bias": "biases", ROWS: "rows of embeddings and head (shared tokens)"}
    return tuple(f"{counts[module]} {names[module]}" for module in EXTRAS if counts[module])


def merging_of(
    method: MergeMethod,
    matrix: MatrixMatch,
    models: tuple[Tensor, Tensor, list[Tensor]],
    /,  # a method may have a parameter of these names
    **keywords: Any,  # noqa: ANN401
) -> Tensor:
    """Merge one matrix; rows of a vocabulary are merged one by one.

    Thresholds and directions are then computed per token, independent of the token order. The
    base's row keys the random numbers of a token. If the method does not apply to vectors, norms,
    biases and rows are merged by task arithmetic.
    """
    if matrix.module in EXTRAS and method.vectors is not None:
        own, other = method.vectors(keywords, len(models[2]))
        method, keywords = METHODS["task_arithmetic"], {"mllm_weight": own, "math_weight": other}
    if matrix.module != ROWS:
        return method(*models, tensor_name=matrix.name, **keywords)
    base, mllm, experts = models
    stored, rows = split_address(matrix.name).name, split_address(matrix.name).rows
    assert rows is not None
    return torch.cat(
        [
            method(
                base[i : i + 1],
                mllm[i : i + 1],
                [expert[i : i + 1] for expert in experts],
                tensor_name=f"{stored}[{row}]",
                **keywords,
            )
            for i, row in enumerate(rows)
        ]
    )


def scale_change(merged: Tensor, mllm: Tensor, factor: float) -> Tensor:
    """Compute W_v + factor (W - W_v) in fp32 or fp64; exactly W for 1 and W_v for 0.

    Shapes: all (m, n).
    """
    if factor == 1:
        return merged
    return blockwise(lambda W, W_v: torch.lerp(W_v, W, factor), merged, mllm)


def reason_to_copy(plan: MergePlan, pair: ModelPair, name: str) -> str:
    """Return the reason why a tensor is copied from the MLLM."""
    reason = pair.kept.get(name, "not selected")
    could = (reason in (NORM, BIAS) and plan.options.norms == "merge") or (
        reason == VOCABULARY and plan.tokens is not None
    )
    return "not selected" if could else reason


def work_of(plan: MergePlan, pair: ModelPair) -> Work:
    """Group the merged matrices by the MLLM's stored tensor; a fused one contains several."""
    work: Work = {}
    for matrix, experts in chosen(plan, pair):
        work.setdefault(split_address(matrix.mllm).name, []).append((matrix, experts))
    return work


def parts(spec: TensorSpec, merged: list[Chosen], most: int, *, local: bool = False) -> list[Part]:
    """Split a tensor into merged parts and pieces of at most `most` bytes to copy.

    With a `local` method the matrices are also split into rows of about that size.
    """
    spans: dict[tuple[int, int], list[Chosen]] = {}
    for matrix, experts in merged:
        part = spec if matrix.mllm == spec.name else part_of(spec, matrix.mllm)
        assert part is not None, "it has been matched"
        span = part.start - spec.start, part.stop - spec.start
        spans.setdefault(span, []).append((matrix, experts))
    parts: list[Part] = []
    position = 0
    for (start, stop), members in sorted(spans.items()):
        parts += _copies(spec, position, start, most)
        position = stop
        matrix, experts = members[0]
        if not local or not _has_rows(spec, matrix, stop - start):
            parts.append(Part(spec, start, stop, tuple(members)))
            continue
        row = (stop - start) // matrix.shape[0]
        at = start
        for piece in in_rows(matrix, stop - start, most):
            end = at + piece.shape[0] * row
            parts.append(Part(spec, at, end, ((piece, experts),)))
            at = end
    parts += _copies(spec, position, spec.nbytes, most)
    return parts or [Part(spec, 0, 0)]  # a tensor without elements


def _has_rows(spec: TensorSpec, matrix: MatrixMatch, nbytes: int) -> bool:
    """Return whether the rows of a matrix are stored one after another; a vector has none."""
    if len(spec.shape) < 2 or split_address(matrix.mllm).transposed:
        return False
    return matrix.shape[0] * matrix.shape[1] * DTYPES[spec.dtype].itemsize == nbytes


def in_rows(matrix: MatrixMatch, nbytes: int, most: int) -> Iterator[MatrixMatch]:
    """Split a matrix of `nbytes` into blocks of rows of at most `most` bytes, or one row."""
    count = matrix.shape[0]
    step = max(1, most * count // max(nbytes, 1))
    for first in range(0, count, step):
        last = min(first + step, count)
        yield matrix if last - first == count else rows_of(matrix, first, last)


def rows_of(matrix: MatrixMatch, first: int, last: int) -> MatrixMatch:
    """Return the rows [first, last) of a matrix, which may itself be part of a stored one."""

    def rows(name: str) -> str:
        return str(split_address(name).within(first, last))

    return replace(
        matrix,
        name=rows(matrix.name),
        shape=(last - first, matrix.shape[1]),
        mllm=rows(matrix.mllm),
        base_mllm=rows(matrix.base_mllm),
        math=tuple(rows(name) for name in matrix.math),
    )


def _copies(spec: TensorSpec, start: int, stop: int, most: int) -> list[Part]:
    return [Part(spec, at, min(at + most, stop)) for at in range(start, stop, most)]


def held(pair: ModelPair, part: Part) -> int:
    """Return the bytes that a part needs while it is read."""
    if not part.merged:
        return part.stop - part.start
    return sum(held_by(pair, matrix, experts) for matrix, experts in part.merged)


def held_by(pair: ModelPair, matrix: MatrixMatch, experts: Sequence[int]) -> int:
    """Return the bytes of the inputs of one matrix as they are read."""
    return sum(input_sizes(pair, matrix, experts))


def input_sizes(pair: ModelPair, matrix: MatrixMatch, experts: Sequence[int]) -> list[int]:
    """Return the bytes of one matrix in the MLLM, its own base if different, base, experts."""
    own = 0 if pair.base_mllm is pair.base else pair.base_mllm.read_size(matrix.base_mllm)
    return [
        pair.mllm.read_size(matrix.mllm),
        own,
        pair.base.read_size(matrix.name),
        sum(pair.math[k].read_size(matrix.math[k]) for k in experts),
    ]
