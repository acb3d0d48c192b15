"""Where matrices are computed: which device, and how many at once on a GPU.

In: a device as torch names it, and the memory that one matrix takes. Out: numbers and contexts. On
a CPU a matrix uses the threads that torch was given; on a GPU some matrices run at once, each in a
stream of its own, so that one is copied there while another is computed.
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

STREAMS = 3  # one computes, one is on its way in, one on its way out

# torch keeps the memory that was freed on a stream for that stream, so a few are used for ever.
_idle: dict[torch.device, deque[torch.cuda.Stream]] = defaultdict(deque)


def best_device() -> str:
    """Name the device to compute on: the GPU where torch sees one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def streams(device: str | torch.device, working_set: int) -> int:
    """How many matrices run at once: as many streams as a GPU's free memory holds, one on a CPU.

    0 where a GPU cannot hold even one. `working_set` is bytes for the largest matrix.
    """
    if torch.device(device).type != "cuda":
        return 1
    _load_solvers(device)
    return int(min(STREAMS, free_memory(device) // max(working_set, 1)))


def free_memory(device: str | torch.device) -> int:
    """Bytes of a GPU that can be had: those nobody holds, and those torch keeps for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def stream(device: str | torch.device) -> Iterator[None]:
    """Work in a stream that no other thread is in; on a CPU nothing happens."""
    where = torch.device(device)
    if where.type != "cuda":
        yield
        return
    try:
        own = _idle[where].pop()
    except IndexError:
        own = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        _idle[where].append(own)


def warn_of_cpu(device: str | torch.device, name: str, shape: Sequence[int]) -> None:
    """Say that a matrix goes to the CPU, since the device's memory does not suffice for it."""
    warnings.warn(
        f"'{name}' {tuple(shape)} does not fit the memory of {device}; it is worked on by the CPU, "
        f"which takes longer.",
        stacklevel=2,
    )


def _load_solvers(device: str | torch.device) -> None:
    """Use a solver once: torch loads them at the first use, and fails if two threads are first."""
    torch.linalg.inv(torch.ones(1, 1, device=device))
