"""Add factors to the outputs of a loaded model's linear layers, with gains for each row of a batch.

In: a model in memory, and factor sets. Out: forward hooks, y + B diag(gains) A x, which do nothing
until additions are installed. One operation serves every column of a set, since they differ only in
their gains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipmerge_core.adapters.columns import Column
from ipmerge_core.adapters.factor_set import FactorSet
from ipmerge_core.errors import ModelLoadError, PlanError
from ipmerge_core.inference.module_names import module_names
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.pairing import ModelPair


class _Entry(NamedTuple):
    """Where the factors of one matrix and expert are among the directions of a module."""

    key: tuple[str, int]
    start: int
    stop: int


@dataclass
class _Stack:
    """The factors of a set on one module, next to each other: dW = B diag(gains) A.

    Shapes: A (q, n), B (m, q); q is the sum of the ranks of all its matrices and experts.
    """

    A: Tensor
    B: Tensor
    entries: list[_Entry]

    def gains(self, rows: Sequence[Mapping[tuple[str, int], float]]) -> Tensor | None:
        """Return the gain of every row on every direction, (rows, q); None if all are zero."""
        found = self.A.new_zeros(len(rows), len(self.A))
        for row, gains in enumerate(rows):
            for key, start, stop in self.entries:
                found[row, start:stop] = gains.get(key, 0.0)
        return found if bool(found.any()) else None


class _Active(NamedTuple):
    """What a hook adds to the output of its module: dy = ((x A^T) gains) B^T."""

    stack: _Stack
    gains: Tensor


def stack_on(
    device: torch.device, dtype: torch.dtype, A: Tensor, B: Tensor, gains: Sequence[float]
) -> _Active:
    """Put factors on a device, with one gain per row of a batch on all of their directions."""
    stack = _Stack(A.to(device, dtype), B.to(device, dtype), [])
    return _Active(
        stack, torch.tensor(gains, device=device, dtype=dtype)[:, None].expand(-1, len(A))
    )


class Additions(NamedTuple):
    """What the hooks of a batch add, by module, and the modules that have run since."""

    modules: Mapping[str, list[_Active]] = {}
    used: set[str] = set()  # noqa: RUF012 (the empty one is never written)


class FactorHooks:
    """The factor sets next to a model, and the hooks that add them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stacks: dict[tuple[str, float, int], dict[str, _Stack]] = {}
        self._handles: dict[str, Any] = {}
        self.installed = Additions()

    def holds(self, factors: FactorSet) -> bool:
        """Return whether the factors are on the device already."""
        return _key(factors) in self._stacks

    def add(self, factors: FactorSet, pair: ModelPair) -> int:
        """Put factors on the device; returns the bytes they take there.

        Raises: as `module_names`.
        """
        if not self.holds(factors):
            stacks = self._stacks_of(factors, pair)
            for module in stacks:
                self.watch(module)
            self._stacks[_key(factors)] = stacks
        return sum(s.A.nbytes + s.B.nbytes for s in self._stacks[_key(factors)].values())

    def drop(self, factors: FactorSet) -> None:
        """Release the memory of a set of factors."""
        self._stacks.pop(_key(factors), None)

    def additions(self, columns: Sequence[Column]) -> Additions:
        """Return what the hooks add for a batch with these columns.

        Raises: PlanError for a column whose factors were dropped.
        """
        active: dict[str, list[_Active]] = {}
        for factors in {id(c.factors): c.factors for c in columns if c.factors}.values():
            if not self.holds(factors):
                raise PlanError("The factors of a column were released. Prepare the plan again.")
            own = [c.gains if c.factors is factors else {} for c in columns]
            for module, stack in self._stacks[_key(factors)].items():
                gains = stack.gains(own)
                if gains is not None:
                    active.setdefault(module, []).append(_Active(stack, gains))
        return Additions(active, set())

    def _stacks_of(self, factors: FactorSet, pair: ModelPair) -> dict[str, _Stack]:
        stored: dict[str, list[tuple[tuple[str, int], range | None]]] = {}
        for matrix in pair.matrices:
            address = split_address(matrix.mllm)
            for expert in range(len(pair.math)):
                if (matrix.name, expert) in factors.factors:
                    key = (matrix.name, expert)
                    stored.setdefault(address.name, []).append((key, address.rows))
        modules = module_names(pair.mllm, stored)
        return {
            modules[name]: self._stack(factors, pair.mllm.spec(name).shape[0], members, name)
            for name, members in stored.items()
        }

    def _stack(
        self,
        factors: FactorSet,
        height: int,
        members: Sequence[tuple[tuple[str, int], range | None]],
        name: str,
    ) -> _Stack:
        like = next(p for p in self._model.parameters() if p.is_floating_point())
        As, Bs, entries, start = [], [], [], 0
        for key, rows in members:
            low = factors.factors[key]
            B = low.B.new_zeros(height, low.rank)
            where = rows or range(height)
            if B[where.start : where.stop].shape != low.B.shape:
                raise PlanError(
                    f"The factors of '{key[0]}' do not fit '{name}'. Prepare them again."
                )
            B[where.start : where.stop] = low.B
            As.append(low.A)
            Bs.append(B)
            entries.append(_Entry(key, start, start + low.rank))
            start += low.rank
        A, B = torch.cat(As), torch.cat(Bs, dim=1)
        return _Stack(A.to(like.device, like.dtype), B.to(like.device, like.dtype), entries)

    def watch(self, name: str) -> None:
        """Register the hook of a linear layer, once."""
        if name not in self._handles:
            module = self._model.get_submodule(name)
            self._handles[name] = module.register_forward_hook(self._adding(name))

    def _adding(self, name: str) -> Callable[..., Tensor | None]:
        def add(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            active = self.installed.modules.get(name)
            if not active:
                return None
            self.installed.used.add(name)
            (x,) = inputs
            for stack, gains in active:
                A, B, own = (each.to(x.device) for each in (stack.A, stack.B, gains))
                through = (x.to(A.dtype) @ A.T) * _per_token(own, x)
                output = output + (through @ B.T).to(output.dtype)
            return output

        return add


def _per_token(gains: Tensor, x: Tensor) -> Tensor:
    """Return the gains in the shape of x A^T: one row of the batch has one line of gains."""
    rows, width = gains.shape
    if x.ndim > 2 and x.shape[0] == rows:
        return gains.view(rows, *(1 for _ in x.shape[1:-1]), width)
    if x.ndim == 2 and x.shape[0] % rows == 0:  # tokens of all rows, one row after another
        return gains.repeat_interleave(x.shape[0] // rows, dim=0)
    if rows == 1:
        return gains[0]
    raise ModelLoadError(
        f"This model mixes the rows of a batch (an input of shape {tuple(x.shape)} for {rows} "
        f"rows), so that they cannot have different gains."
    )


def _key(factors: FactorSet) -> tuple[str, float, int]:
    return factors.fingerprint, factors.tolerance, factors.max_rank
