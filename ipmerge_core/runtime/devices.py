"""Where matrices are computed: which device, and how many at once on a GPU.

In: a device as torch names it or "auto", and the memory that one matrix takes. Out: the name of a
device that is there, numbers and contexts. On a CPU a matrix uses the threads that torch was given;
on a CUDA GPU some matrices run at once, each in a stream of its own, so that one is copied there
while another is computed.
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
KINDS = ("cuda", "xpu", "mps", "cpu")  # the best first; torch's ROCm builds call their GPUs cuda
STREAMS = 3  # one computes, one is on its way in, one on its way out

_NAME = re.compile(rf"({'|'.join(KINDS)})(?::([0-9]{{1,3}}))?")

# torch keeps the memory that was freed on a stream for that stream, so a few are used for ever.
_idle: dict[torch.device, deque[torch.cuda.Stream]] = defaultdict(deque)


def available_devices(*, fp64: bool = True) -> list[str]:
    """List the devices that torch sees here, the best first, the CPU last.

    Args:
        fp64: only those that compute in 64 bits, as analyses and merges do. Apple's GPUs do not.
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
        name: as torch names it, such as "cpu", "cuda" or "cuda:1"; "auto" is the best one here.
        fp64: whether the work needs 64-bit floating point: True for all work on weights, False for
            running a model.

    Raises: PlanError for a device that does not exist, is not here, or cannot do this work.
    """
    here = available_devices(fp64=fp64)
    if name == AUTO:
        return here[0].partition(":")[0]  # "cuda" lets several processes take a GPU each
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise PlanError(
            f"Unknown device {str(name)[:40]!r}. Expected auto, or one that torch sees here: "
            f"{', '.join(here)}."
        )
    kind, index = found[1], int(found[2] or 0)
    if index >= _count(kind):
        raise PlanError(
            f"The device '{name}' is not available: torch {torch.__version__} sees "
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
    """Return a device's name for people.

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
    """Whether a device is the CPU.

    >>> is_cpu("cpu"), is_cpu("cuda:1")
    (True, False)
    """
    return name.partition(":")[0] == "cpu"


def has_fp64(device: str | torch.device) -> bool:
    """Whether a device computes in 64-bit floating point."""
    where = torch.device(device)
    if where.type == "xpu":
        return bool(torch.xpu.get_device_properties(where).has_fp64)
    return where.type != "mps"


def _count(kind: str) -> int:
    """How many devices of a kind torch can use here."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind == "cpu":
        return 1
    room = getattr(torch, kind)
    return int(room.device_count()) if room.is_available() else 0


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
