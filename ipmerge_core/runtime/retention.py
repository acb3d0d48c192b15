"""Delete what visitors of a hosted app have made, by age and to stay within a disk budget.

In: the home folder of the app and `Limits`. Out: the deleted paths. Only entries of the app's own
folders are deleted, never an output folder elsewhere; without limits, as on a user's own machine,
nothing is. What a run in progress reads or writes is kept.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ipmerge_core.runtime.host import Limits
from ipmerge_core.runtime.jobs import JobStore

MADE = ("models", "previews", "calibrations", "packs", "updates")  # folders in the home folder
SWEEP_SECONDS = 600.0  # between two sweeps
_YOUNGEST = 600.0  # seconds; younger entries may be about to be used


class _Entry(NamedTuple):
    """Something that was made: a file or folder, when it was last changed, its size in bytes."""

    path: Path
    changed: float
    nbytes: int


def sweep(store: JobStore, home: Path) -> list[Path]:
    """Delete old runs and old results, then the oldest results beyond the disk budget.

    Args:
        store: the runs of the app and its limits, `keep_hours` and `disk_gb`.
        home: the home folder of the app.
    """
    limits, now = store.limits, time.time()
    running = {status.id: status for status in store.all() if status.is_running}
    used = [str(value) for status in running.values() for value in status.arguments.values()]
    found = [entry for folder in MADE for entry in _entries(home / folder)]
    free = [e for e in found if not _is_used(e.path, used) and now - e.changed > _YOUNGEST]
    doomed = _too_old(free, limits, now) + [
        entry
        for entry in _too_old(_entries(store.folder), limits, now)
        if entry.path.name not in running
    ]
    kept = [entry for entry in found if entry not in doomed]
    excess = sum(entry.nbytes for entry in kept) - (limits.disk_gb or 0) * 1e9
    for entry in sorted(free, key=lambda entry: entry.changed):
        if limits.disk_gb is not None and excess > 0 and entry not in doomed:
            doomed.append(entry)
            excess -= entry.nbytes
    for entry in doomed:
        _delete(entry.path)
    return [entry.path for entry in doomed]


def keep_sweeping(store: JobStore, home: Path, report: Callable[[str], object]) -> None:
    """Sweep now and every ten minutes in a background thread, if there is a limit."""
    if store.limits.keep_hours is None and store.limits.disk_gb is None:
        return

    def run() -> None:
        while True:
            if gone := sweep(store, home):
                report(f"Deleted {len(gone)} old runs and results.")
            time.sleep(SWEEP_SECONDS)

    threading.Thread(target=run, daemon=True).start()


def _too_old(entries: Iterable[_Entry], limits: Limits, now: float) -> list[_Entry]:
    if limits.keep_hours is None:
        return []
    return [entry for entry in entries if now - entry.changed > 3600 * limits.keep_hours]


def _entries(folder: Path) -> Iterator[_Entry]:
    """Yield what is in a folder, but for hidden files such as locks."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or path.is_symlink():
            continue
        files = [path, *(path.rglob("*") if path.is_dir() else ())]
        stats = [file.lstat() for file in files if file.exists()]
        if stats:  # it may have been deleted meanwhile
            size = sum(stat.st_blocks * 512 for stat in stats)
            yield _Entry(path, max(stat.st_mtime for stat in stats), size)


def _is_used(path: Path, used: Iterable[str]) -> bool:
    """Whether a run in progress uses this path: its output, or the partial folder of its output."""
    name = str(path)
    return any(
        value == name or value.startswith(f"{name}/") or name.startswith(f"{value}.")
        for value in used
        if value
    )


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
