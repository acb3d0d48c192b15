"""The processes that share one run, as `torchrun` or `accelerate launch` starts them.

In: the launcher's environment (RANK, WORLD_SIZE, ...). Out: this process' number, and two ways to
talk: everybody learns what the leader (rank 0) says, and the leader hears of everybody's end. Only
small Python objects travel, over gloo, on any device. A process that has died is named. Without a
launcher there is one process and nothing is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import psutil

from ipmerge_core.errors import IPMergeError, RunError

_T = TypeVar("_T")
_PATIENCE = timedelta(days=7)  # a dead process closes its connection; a slow one is waited for


class Ranks(AbstractContextManager["Ranks"]):
    """This process among its peers; use as a context manager."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self._owned = False

    def __enter__(self) -> Ranks:
        """Connect to the others, unless the caller already has."""
        if self.size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
                self._owned = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect."""
        if self._owned:
            import torch.distributed as dist

            dist.destroy_process_group()

    @property
    def cores(self) -> int:
        """How many processor cores this process may keep busy, its peers on this machine too."""
        mine = psutil.Process()
        usable = len(mine.cpu_affinity()) if hasattr(mine, "cpu_affinity") else psutil.cpu_count()
        peers = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.size > 1 else 1
        return max(1, (usable or 1) // peers)

    def device(self, device: str) -> str:
        """Give each process of a machine its own GPU where just "cuda" was asked for."""
        if device in ("cuda", "xpu") and self.size > 1:
            return f"{device}:{os.environ.get('LOCAL_RANK', '0')}"
        return device

    def led(self, work: Callable[[], _T]) -> _T:
        """Let the leader do something and give everyone its result, or its error."""
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
        """Give the leader what every process has, in order; the others get a list of their own."""
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
            f"Process {rank} of {self.size} (counted from 0) has died. Look at its own message, "
            f"then run the same command again; finished tensors are kept."
        )


def share_out(costs: Sequence[float], size: int) -> list[int]:
    """Assign each piece of work to one of `size` processes: the costliest first, to the idlest.

    The result depends on the costs alone, so that every process finds the same.

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
