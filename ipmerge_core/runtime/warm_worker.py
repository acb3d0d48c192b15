"""Keep one process with its libraries imported that runs the next job without that delay.

In: the names of modules to import. Out: a `WarmWorker`, which a `JobStore` takes as its launcher.
The process runs one job, in a session of its own, and is replaced: a job that crashes or leaks
memory does not affect the next one, and a running job survives the end of the app. A process that
waits for a job ends with the app, and when the app has not been used for some time.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from ipmerge_core.runtime.job_process import run_locked
from ipmerge_core.runtime.jobs import log_event, read_status, write_status

IDLE_SECONDS = 600.0  # without use of the app, after which a waiting process ends
_REPLACE_SECONDS = 5.0  # from the start of a job to that of the next process
_RETRY_SECONDS = 60.0  # after a process that could not import its modules
_LOOK_EVERY = 0.25  # seconds
_LARGEST_ORDER = 1 << 20  # bytes; an order holds the environment
_START = (
    "import sys; from ipmerge_core.runtime.warm_worker import main; sys.exit(main(*sys.argv[1:]))"
)


class WorkerStatus(NamedTuple):
    """State of the waiting process; `nbytes_memory` is what it holds once it is ready."""

    state: Literal["none", "importing", "ready"]
    process: int = 0
    nbytes_memory: int = 0


class WarmWorker:
    """Starts a process when the app is used, hands it one job, and replaces it.

    Args:
        modules: the modules to import, in order.
        idle_seconds: time without use after which the waiting process ends.
        report: takes a line for the log at every change.
    """

    def __init__(
        self,
        modules: Sequence[str],
        *,
        idle_seconds: float = IDLE_SECONDS,
        report: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._modules, self._idle_seconds, self._report = tuple(modules), idle_seconds, report
        self._lock = threading.Lock()
        self._waiting: _Waiting | None = None
        self._used = self._not_before = 0.0
        self._closed = False

    def wake(self) -> None:
        """Start the process if there is none; call it whenever the app is used."""
        with self._lock:
            self._used = now = time.monotonic()
            if self._waiting or self._closed or now < self._not_before:
                return
            self._waiting = waiting = _Waiting(self._modules)
        threading.Thread(target=self._watch, args=(waiting,), daemon=True).start()

    def run(self, folder: Path, lock: int, log: int) -> bool:
        """Hand a job to the process; False if there is none.

        A process that is still importing takes it too, as it is ahead of a new one.

        Args:
            folder: the job's folder.
            lock: descriptor of the job's locked file.
            log: descriptor of the file for its output.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, None
        return waiting is not None and waiting.hand_over(folder, [lock, log])

    def status(self) -> WorkerStatus:
        """Return the state of the process."""
        with self._lock:
            return self._waiting.status if self._waiting else WorkerStatus("none")

    def close(self) -> None:
        """End the waiting process, for good; a job that was handed over continues."""
        with self._lock:
            self._closed = True
            if self._waiting:
                self._waiting.process.terminate()

    def _watch(self, waiting: _Waiting) -> None:
        """Report what a process does until it has ended, and replace it once it has a job."""
        ready = False
        while not waiting.taken.wait(_LOOK_EVERY) and waiting.process.poll() is None:
            if not ready and (ready := waiting.read_ready()):
                self._used = time.monotonic()
                self._report(f"Worker ready: {waiting.status.nbytes_memory / 1e6:.0f} MB.")
            if ready and time.monotonic() - self._used > self._idle_seconds:
                self._dismiss(waiting)
        if waiting.taken.is_set():
            waiting.wait(_REPLACE_SECONDS)
            if time.monotonic() - self._used <= self._idle_seconds:
                self.wake()
        else:
            self._dismiss(waiting, retry_after=0.0 if ready else _RETRY_SECONDS)
        waiting.wait(None)
        waiting.close()

    def _dismiss(self, waiting: _Waiting, retry_after: float = 0.0) -> None:
        """End an unused process, or drop one that has ended; no effect on one with a job."""
        with self._lock:
            if self._waiting is not waiting:
                return
            self._waiting = None
            self._not_before = time.monotonic() + retry_after
        waiting.process.terminate()
        self._report("Worker ended.")


class _Waiting:
    """A process that imports modules and waits for a job, as the app sees it."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._channel, theirs = socket.socketpair()
        self._nbytes = 0
        self.taken = threading.Event()
        paths = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 (our own interpreter and code)
                [sys.executable, "-c", _START, str(theirs.fileno()), *modules],
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    @property
    def status(self) -> WorkerStatus:
        state: Literal["importing", "ready"] = "ready" if self._nbytes else "importing"
        return WorkerStatus(state, self.process.pid, self._nbytes)

    def read_ready(self) -> bool:
        """Whether the process has reported that it is ready."""
        try:
            said = self._channel.recv(64, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionError):
            return False
        self._nbytes = int(said or 0)
        return bool(said)

    def hand_over(self, folder: Path, descriptors: list[int]) -> bool:
        """Send a job; False if the process has died."""
        order = {
            "folder": str(folder),
            "environment": dict(os.environ),
            "path": sys.path,
        }
        try:
            if self.process.poll() is not None:
                return False
            socket.send_fds(self._channel, [json.dumps(order).encode() + b"\n"], descriptors)
        except OSError:
            return False
        finally:
            self.taken.set()
        return True

    def wait(self, seconds: float | None) -> None:
        """Wait for the end of the process, at most for some seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def close(self) -> None:
        self._channel.close()


# --- in the worker's own process ---


def main(channel: str, *modules: str) -> int:
    """Import the modules, wait for one job, run it and return its exit code."""
    inbox = _Inbox(socket.socket(fileno=int(channel)))
    threading.Thread(target=inbox.receive, daemon=True).start()
    for module in modules:
        importlib.import_module(module)
    order = inbox.open()
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.path[:] = order["path"]
    return run_locked(order["folder"], inbox.lock, warm=True)


class _Inbox:
    """Receives the one order while the main thread imports.

    A job that is cancelled meanwhile ends at once: nothing of it has begun.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._arrived, self._mutex, self._importing = threading.Event(), threading.Lock(), True
        self.lock = -1
        self._order: Mapping[str, Any]

    def open(self) -> Mapping[str, Any]:
        """Report that this process is ready, wait for the order and return it."""
        if not self._arrived.is_set():
            self._channel.send(str(psutil.Process().memory_info().rss).encode())
        self._arrived.wait()
        with self._mutex:
            self._importing = False
        return self._order

    def _read_order(self) -> tuple[bytes, list[int]]:
        """Return the order with its descriptors; no bytes if the app has ended."""
        data, descriptors, *_ = socket.recv_fds(self._channel, _LARGEST_ORDER, 2)
        while data and not data.endswith(b"\n"):
            more = self._channel.recv(_LARGEST_ORDER)
            data = data + more if more else b""
        return data, descriptors

    def receive(self) -> None:
        """Wait for the order; end this process if the app ends first, or the job is cancelled."""
        try:
            data, descriptors = self._read_order()
        except OSError:  # the app was killed while it was sending
            os._exit(0)
        if not data:
            os._exit(0)
        self._order = json.loads(data)
        self.lock, log = descriptors
        for stream in (1, 2):
            os.dup2(log, stream)
        folder = Path(self._order["folder"])
        if self._importing:
            write_status(folder, replace(read_status(folder), phase="importing"))
        self._arrived.set()
        while self._importing:
            with self._mutex:
                if self._importing and (folder / "cancel").exists():
                    status = replace(read_status(folder), state="cancelled", phase="")
                    write_status(folder, replace(status, updated=time.time()))
                    log_event(folder, {"event": "cancelled"})
                    os._exit(0)
            time.sleep(_LOOK_EVERY)
