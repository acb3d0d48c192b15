"""What every benchmark prints: when, on what kind of machine, and a table for README."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from time import perf_counter


def machine(gpu: str = "no GPU") -> str:
    """Name the date and the class of machine, without anything that identifies it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores {platform.machine()}, "
        f"{memory:.0f} GiB, Python {platform.python_version()}, {gpu}, "
        f"load {load:.1f} when it started"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Time a call: the least of some repeats, since other work only ever adds."""
    times = []
    for _ in range(repeats):
        started = perf_counter()
        run()
        times.append(perf_counter() - started)
    return min(times)
