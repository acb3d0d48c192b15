"""Select compute devices and manage CUDA streams.

In: a torch device name or "auto", and the memory that one matrix requires. Out: the name of an
available device, counts and contexts. On a CPU a matrix uses torch's threads; on a CUDA GPU several
matrices run concurrently, each in its own stream, so that copying overlaps with computing.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ipmerge_core.errors import PlanError

AUTO = "auto"
KINDS = ("cuda", "xpu", "mps", "cpu")  # fastest first; torch's ROCm builds call their GPUs cuda
STREAMS = 3  # one computes, one is on its way in, one on its way out

_NAME = re.compile(rf"({'|'.join(KINDS)})(?::([0-9]{{1,3}}))?")

# torch reserves memory freed on a stream for that stream, so a few streams are reused.
_idle: dict[torch.device, deque[torch.cuda.Stream]] = defaultdict(deque)


def available_devices(*, fp64: bool = True) -> list[str]:
    """List the devices that torch can use on this machine, fastest first, the CPU last.

    Args:
        fp64: only those with 64-bit floating point, which analyses and merges need. Apple GPUs
            have none.
    """
    found: list[str] = []
    for kind in KINDS:
        count = _count(kind)
        names = [kind] if count == 1 else [f"{kind}:{index}" for index in range(count)]
        found += [name for name in names if has_fp64(name) or not fp64]
    return found


def resolve_device(name: str = AUTO, *, fp64: bool = True) -> str:
    """Return the device to compute on.

    Args:
        name: a torch device name such as "cpu", "cuda" or "cuda:1"; "auto" selects the fastest.
        fp64: whether 64-bit floating point is required: True for all work on weights, False for
            running a model.

    Raises: PlanError for a device that is unknown, unavailable, or lacks 64-bit floating point.
    """
    here = available_devices(fp64=fp64)
    if name == AUTO:
        return here[0].partition(":")[0]  # "cuda" lets several processes use one GPU each
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise PlanError(
            f"Unknown device {str(name)[:40]!r}. Expected auto or an available device: "
            f"{', '.join(here)}."
        )
    kind, index = found[1], int(found[2] or 0)
    if index >= _count(kind):
        raise PlanError(
            f"The device '{name}' is not available: torch {torch.__version__} finds "
            f"{_count(kind) or 'no'} {kind} device{'' if _count(kind) == 1 else 's'} on this "
            f"machine. Use auto, or one of: {', '.join(here)}."
        )
    if fp64 and not has_fp64(name):
        raise PlanError(
            f"The device '{name}' has no 64-bit floating point, which this work needs. Use auto, "
            f"or one of: {', '.join(here)}."
        )
    return "cpu" if kind == "cpu" else name


def describe_device(name: str) -> str:
    """Return a human-readable device name.

    >>> describe_device("cpu")
    'CPU'
    """
    kind = torch.device(name).type
    if kind == "cpu":
        return "CPU"
    model = (
        "Apple GPU" if kind == "mps" else getattr(torch, kind).get_device_name(torch.device(name))
    )
    return f"{model} ({name})"


def is_cpu(name: str) -> bool:
    """Return whether a device is the CPU.

    >>> is_cpu("cpu"), is_cpu("cuda:1")
    (True, False)
    """
    return name.partition(":")[0] == "cpu"


def has_fp64(device: str | torch.device) -> bool:
    """Return whether a device supports 64-bit floating point."""
    where = torch.device(device)
    if where.type == "xpu":
        return bool(torch.xpu.get_device_properties(where).has_fp64)
    return where.type != "mps"


def _count(kind: str) -> int:
    """Count the devices of a kind that torch can use on this machine."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind == "cpu":
        return 1
    backend = getattr(torch, kind)
    return int(backend.device_count()) if backend.is_available() else 0


def streams(device: str | torch.device, working_set: int) -> int:
    """Return how many matrices can run concurrently: limited by free GPU memory, one on a CPU.

    Returns 0 if the GPU cannot hold even one. `working_set` is in bytes, for the largest matrix.
    """
    if torch.device(device).type != "cuda":
        return 1
    _load_solvers(device)
    return int(min(STREAMS, free_memory(device) // max(working_set, 1)))


def free_memory(device: str | torch.device) -> int:
    """Return the available bytes of a GPU: unallocated ones and those cached by torch."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def stream(device: str | torch.device) -> Iterator[None]:
    """Enter a CUDA stream that no other thread uses; a no-op on other devices."""
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
    """Warn that a matrix is processed on the CPU because the device has too little memory."""
    warnings.warn(
        f"'{name}' {tuple(shape)} does not fit into the memory of {device}; falling back to the "
        f"CPU, which is slower.",
        stacklevel=2,
    )


def _load_solvers(device: str | torch.device) -> None:
    """Load the solver library: torch does so on first use, which fails from two threads at once."""
    torch.linalg.inv(torch.ones(1, 1, device=device))
