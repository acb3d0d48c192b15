"""Where matrices are computed: which device, and how many at once on a GPU.

In: a device as torch names it, and the memory that one matrix takes. Out: numbers and contexts. On
a CPU a matrix uses the threads that torch was given; on a GPU some matrices run at once, each in a
stream of its own, so that one is copied there while another is computed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

STREAMS = 3  # one computes, one is on its way in, one on its way out; more were no faster


def best_device() -> str:
    """Name the device to compute on: the GPU where torch sees one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def streams(device: str | torch.device, working_set: int) -> int:
    """How many matrices run at once: as many streams as a GPU's free memory holds, one on a CPU.

    0 where a GPU cannot hold even one. `working_set` is bytes for the largest matrix.
    """
    if torch.device(device).type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(STREAMS, free // max(working_set, 1)))


def stream(device: str | torch.device) -> AbstractContextManager[object]:
    """Enter a stream of its own on a GPU; nothing happens on a CPU."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    own: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(own)
