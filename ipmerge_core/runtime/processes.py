"""Coordinate the processes of a distributed run started by `torchrun` or `accelerate launch`.

In: the launcher's environment (RANK, WORLD_SIZE, ...). Out: this process's rank and two collective
operations: broadcast from rank 0, and gather to rank 0. Only small Python objects are sent, over
gloo, on any device. An error names the process that died. Without a launcher there is one process
and torch.distributed is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import psutil

from ipmerge_core.errors import IPMergeError, RunError, first_line

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # a dead process closes its connection; slow ones are waited for


class Ranks(AbstractContextManager["Ranks"]):
    """The process group of a run; use as a context manager."""

    def __init__(self) -> None:
        self.size = _variable("WORLD_SIZE", 1, least=1)
        self.rank = _variable("RANK", 0) if self.size > 1 else 0
        if self.rank >= self.size:
            raise RunError(
                f"RANK is {self.rank} and WORLD_SIZE is {self.size}; a rank is less than the "
                f"number of processes. Start with `torchrun` or `accelerate launch`."
            )
        self._owned = False

    def __enter__(self) -> Ranks:
        """Initialize the process group, unless the caller already has."""
        if self.size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                try:
                    dist.init_process_group("gloo", timeout=_PATIENCE)
                except (ValueError, RuntimeError) as error:
                    raise RunError(
                        f"Cannot connect the {self.size} processes of WORLD_SIZE "
                        f"({first_line(error)}). Start with `torchrun` or `accelerate launch`, or "
                        f"unset WORLD_SIZE."
                    ) from error
                self._owned = True
        return self

    def __exit__(self, *_: object) -> None:
        """Destroy the process group if this object created it."""
        if self._owned:
            import torch.distributed as dist

            dist.destroy_process_group()

    @property
    def cores(self) -> int:
        """Processor cores available to this process, shared with its peers on this machine."""
        mine = psutil.Process()
        usable = len(mine.cpu_affinity()) if hasattr(mine, "cpu_affinity") else psutil.cpu_count()
        peers = _variable("LOCAL_WORLD_SIZE", 1, least=1) if self.size > 1 else 1
        return max(1, (usable or 1) // peers)

    def device(self, device: str) -> str:
        """Return this process's own GPU if only "cuda" or "xpu" was requested."""
        if device in ("cuda", "xpu") and self.size > 1:
            return f"{device}:{_variable('LOCAL_RANK', 0)}"
        return device

    def led(self, work: Callable[[], _T]) -> _T:
        """Run `work` on rank 0 and return its result, or raise its error, on all ranks."""
        outcome: tuple[Any, str | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (work(), None)
            except IPMergeError as error:
                self._send_all((None, str(error)))
                raise
            self._send_all(outcome)
        else:
            outcome = self._receive(0)
            if outcome[1] is not None:
                raise RunError(f"The first process stopped: {outcome[1]}")
        result: _T = outcome[0]
        return result

    def gather(self, mine: _T) -> list[_T]:
        """Gather each process's value on rank 0, in order; other ranks return only their own."""
        if self.rank:
            self._send(mine, 0)
            return [mine]
        return [mine, *(self._receive(rank) for rank in range(1, self.size))]

    def _send_all(self, value: object) -> None:
        for rank in range(1, self.size):
            self._send(value, rank)

    def _send(self, value: object, rank: int) -> None:
        import torch.distributed as dist

        try:
            dist.send_object_list([value], dst=rank)
        except RuntimeError as error:
            raise self._lost(rank) from error

    def _receive(self, rank: int) -> Any:  # noqa: ANN401
        import torch.distributed as dist

        box: list[Any] = [None]
        try:
            dist.recv_object_list(box, src=rank)
        except RuntimeError as error:
            raise self._lost(rank) from error
        return box[0]

    def _lost(self, rank: int) -> RunError:
        return RunError(
            f"Process {rank} of {self.size} (counted from 0) has died. Check its error message, "
            f"then run the same command again; finished tensors are kept."
        )


def _variable(name: str, default: int, *, least: int = 0) -> int:
    """Read an integer of the launcher from the environment; an empty variable is not set."""
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise RunError(
            f"The environment variable {name} is '{text[:40]}'; expected an integer from {least} "
            f"on. Unset it, or start with `torchrun` or `accelerate launch`."
        )
    return int(text)


def share_out(costs: Sequence[float], size: int) -> list[int]:
    """Assign each piece of work to one of `size` processes: costliest first, to the least loaded.

    The result depends only on the costs, so that all processes compute the same assignment.

    >>> share_out([5, 1, 4, 2], 2)
    [0, 0, 1, 1]
    """
    loads = [0.0] * size
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = min(range(size), key=lambda rank: loads[rank])
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
