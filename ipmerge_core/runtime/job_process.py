"""Run one job in the current process: its phases, its steps, cancelling, its time limit.

In: the folder of a job (see `jobs.JobStore`), written by the process that starts it. Out: its
status, journal and exit code. A cancelled job stops after its current step. Before its first step,
while it imports libraries or reads headers, it stops within a second. A time limit works the same
way, and ends the process if a step does not return.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import psutil

from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.runtime.job_files import JobStatus, Phase, Request, read_request, read_status
from ipmerge_core.runtime.jobs import log_event, write_status
from ipmerge_core.runtime.pipeline import keep_freed_memory

_WRITE_EVERY = 0.1  # seconds between two writes of status.json
_JOURNAL_EVERY = 2.0  # seconds between two journal lines about progress
_LOOK_EVERY = 0.1  # seconds between two looks at the request to cancel and at the time
_INTERRUPT_EVERY = 1.0  # seconds between two interruptions: one is lost in a destructor
_GRACE = 60.0  # seconds after the time limit in which the current step may still return
# Former import paths of job targets and arguments, as stored in older jobs.
_FORMER = {
    "ipmerge_core.merging:iter_merge": "ipmerge_core.merging.merge:iter_merge",
    "ipmerge_core.analysis:iter_pack": "ipmerge_core.analysis.analyse:iter_pack",
    "ipmerge_core.calibration:iter_calibration_of": (
        "ipmerge_core.calibration.calibrate:iter_calibration_of"
    ),
    "ipmerge_core.plan:MergePlan": "ipmerge_core.planning.plan:MergePlan",
}


def main(folder: str, lock: str) -> int:
    """Run a job in a new process and return the exit code; `lock` is an inherited descriptor."""
    return run_locked(folder, int(lock))


def run_locked(folder: str | Path, lock: int, *, warm: bool = False) -> int:
    """Run a job, then release its lock: interpreter shutdown may take a while after that.

    Args:
        folder: the job's folder.
        lock: descriptor of the job's locked file.
        warm: whether this process had imported the libraries before, for the journal.
    """
    keep_freed_memory()
    code = run_job(folder, warm=warm)
    fcntl.flock(lock, fcntl.LOCK_UN)
    return code


def run_job(folder: str | Path, *, warm: bool = False) -> int:
    """Run the job in `folder` in the main thread of this process and return the exit code."""
    folder = Path(folder)
    try:
        request = read_request(folder)
    except RunError as error:
        write_status(folder, replace(read_status(folder), state="failed", error=str(error)))
        return 1
    with _Supervisor(folder, request.seconds) as supervisor:
        log_event(folder, {"event": "started", **supervisor.process, "warm": warm})
        try:
            supervisor.enter("importing")
            target, arguments = _load_target(folder, request)
            supervisor.enter("opening")
            _drain(target(**arguments), supervisor)
        except _Interrupted:
            supervisor.stop()
        except IPMergeError as error:
            supervisor.fail(str(error))
        except Exception as error:  # noqa: BLE001 (a bug is reported in the job's status)
            traceback.print_exc()
            text = f"Unexpected {type(error).__name__}: {error}. See the run's log for details."
            supervisor.fail(text)
        status = supervisor.conclude()
    end = {"event": status.state, "error": status.error, "nbytes_memory": status.nbytes_memory}
    log_event(folder, {**end, **status.step})
    return 0 if status.state in ("finished", "cancelled") else 1


class _Interrupted(BaseException):
    """Stops a job that has made no step yet; not an Exception, so that no library catches it."""


class _Supervisor(contextlib.AbstractContextManager["_Supervisor"]):
    """Keeps the status of a job and stops the job when that is requested or its time is over.

    A thread watches for a request to cancel and the time limit. Before the first step it interrupts
    the main thread; later the job stops at its next step, so that no finished work is lost.
    """

    def __init__(self, folder: Path, seconds: float | None) -> None:
        self.folder, self._seconds = folder, seconds
        self._deadline = time.monotonic() + seconds if seconds else float("inf")
        self._status = read_status(folder)
        self._may_interrupt, self._over = True, threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._previous: Any = None

    def __enter__(self) -> Self:
        """Start watching; SIGTERM requests to cancel too."""
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()
        signal.signal(signal.SIGTERM, self._previous)

    @property
    def process(self) -> dict[str, int]:
        """The id of this process and its memory in bytes."""
        return {"process": self._process.pid, "nbytes_memory": self._process.memory_info().rss}

    def enter(self, phase: Phase) -> None:
        """Show the phase that begins."""
        self._status = replace(self._status, phase=phase)
        self.write()

    def take(self, step: Mapping[str, Any]) -> None:
        """Take note of a step. Speed is measured from the first step of a pass."""
        self._may_interrupt = False
        status = replace(self._status, phase="working", step=step, updated=time.time())
        if _begins_pass(status.first, step):
            status = replace(status, first=step, since=status.updated)
        self._status = status

    def write(self) -> JobStatus:
        """Write the status file and return the status."""
        memory = max(self._status.nbytes_memory, self._process.memory_info().rss)
        self._status = replace(self._status, nbytes_memory=memory, updated=time.time())
        write_status(self.folder, self._status)
        return self._status

    @property
    def must_stop(self) -> bool:
        """Whether the time is over, or a request to cancel was made."""
        return time.monotonic() >= self._deadline or (self.folder / "cancel").exists()

    def stop(self) -> None:
        """Take note of why the job stops before its end."""
        self._may_interrupt = False
        if (self.folder / "cancel").exists():
            self._status = replace(self._status, state="cancelled")
            return
        self.fail(
            f"The run reached the time limit of {(self._seconds or 0) / 60:g} minutes. Completed "
            f"work is kept; resume it to continue."
        )

    def fail(self, error: str) -> None:
        """Take note of an error."""
        self._status = replace(self._status, state="failed", error=error)

    def conclude(self) -> JobStatus:
        """Write and return the last status: finished, unless the job was stopped or failed."""
        self._may_interrupt = False
        if self._status.state == "running":
            self._status = replace(self._status, state="finished")
        self._status = replace(self._status, phase="")
        return self.write()

    def _on_signal(self, number: int, frame: object) -> None:
        """Handle SIGTERM in the main thread."""
        if not self.must_stop:
            (self.folder / "cancel").touch()
        if self._may_interrupt:
            raise _Interrupted

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._over.wait(_LOOK_EVERY):
            if self._may_interrupt and self.must_stop:
                signal.pthread_kill(main, signal.SIGTERM)
                self._over.wait(_INTERRUPT_EVERY)
            if time.monotonic() >= self._deadline + _GRACE:
                self.stop()
                self.conclude()
                os._exit(1)


def _begins_pass(first: Mapping[str, Any], step: Mapping[str, Any]) -> bool:
    """Whether a step is the first one of a pass: its totals are new, or it repeats old work."""
    totals = [{k: v for k, v in one.items() if k.endswith("total")} for one in (first, step)]
    return totals[0] != totals[1] or step.get("action") == "resumed"


def _drain(steps: Generator[Any], supervisor: _Supervisor) -> None:
    """Advance the generator until it ends or the job must stop."""
    written = noted = 0.0
    with contextlib.closing(steps):
        for step in steps:
            values = _plain(step)
            supervisor.take(values)
            if supervisor.must_stop:
                supervisor.stop()
                return
            now = time.monotonic()
            if now - written >= _WRITE_EVERY:
                supervisor.write()
                written = now
            if now - noted >= _JOURNAL_EVERY:
                log_event(supervisor.folder, {"event": "step", **values})
                noted = now


def _load_target(folder: Path, request: Request) -> tuple[Any, dict[str, Any]]:
    """Import the generator function of a job and load its arguments."""
    arguments = dict(request.arguments)
    for name, file in request.files.items():
        arguments[name] = _find(file["class"]).load(folder / file["file"])
    return _find(request.target), arguments


def _find(name: str) -> Any:  # noqa: ANN401 (a function or a class)
    module, _, path = _FORMER.get(name, name).partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _plain(step: Any) -> dict[str, Any]:  # noqa: ANN401 (whatever a driver yields)
    """Convert a step (a named tuple, a dataclass or a mapping) to JSON values."""
    if isinstance(step, Mapping):
        return dict(step)
    if hasattr(step, "_asdict"):
        return dict(step._asdict())
    return asdict(step)
