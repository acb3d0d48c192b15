"""Run long jobs in separate processes; start, monitor, cancel and resume them by id.

In: a generator function that yields small steps (any driver of this package) and its arguments.
Out: a job folder with the request (`job.json`), the current state (`status.json`), a history
(`journal.jsonl`) and the printed output (`log.txt`). A job survives the browser tab and the server;
anyone who has the id can monitor it, only the holder of the key can cancel and resume it. Starts
and resumes are serialized across all processes that use the folder, so that the limit on running
jobs holds and no two jobs write to one output folder. Independent of what the callables do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

from ipmerge_core.errors import FolderInUseError, RunError
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.host import Limits, check_home
from ipmerge_core.runtime.host import limits as host_limits
from ipmerge_core.runtime.job_files import (
    Claim,
    JobStatus,
    Phase,
    State,
    read_request,
    read_status,
)

__all__ = [
    "SHORTEST_SECRET",
    "Claim",
    "JobStatus",
    "JobStore",
    "Launcher",
    "Phase",
    "Saved",
    "Started",
    "State",
    "log_event",
    "read_status",
    "write_status",
]

_ID = re.compile(r"[0-9a-f]{32}")
SHORTEST_SECRET = 32  # minimum number of characters of an owner's secret
_LOCK_PATIENCE = 10.0  # seconds that a process may take to release its lock after its last status
_START = (
    "import sys; from ipmerge_core.runtime.job_process import main; sys.exit(main(*sys.argv[1:]))"
)


@runtime_checkable
class Saved(Protocol):
    """An argument that is stored in its own file; its class has a matching `load`."""

    def save(self, path: str | Path) -> None:
        """Write the argument to `path`."""
        ...


class Launcher(Protocol):
    """Runs a job in a process that is ready for it: `WarmWorker`."""

    def run(self, folder: Path, lock: int, log: int) -> bool:
        """Run the job in `folder`, with its locked file and its log; False if none is ready."""
        ...


class Started(NamedTuple):
    """Result of `JobStore.start`; the key is stored nowhere else."""

    id: str
    key: str


class JobStore:
    """Manages the jobs in one folder.

    Args:
        folder: the folder of all jobs.
        limits: how many jobs may run at the same time, and how long; by default those of the host.
        launcher: runs jobs without the time for imports; without it, each job imports them itself.
    """

    def __init__(
        self, folder: Path, limits: Limits | None = None, launcher: Launcher | None = None
    ) -> None:
        self.folder, self.launcher = folder, launcher
        self.limits = host_limits() if limits is None else limits
        self._digests: dict[str, str] = {}  # of the jobs' keys, which never change

    def start(
        self,
        target: Callable[..., Iterator[Any]],
        arguments: Mapping[str, Any],
        *,
        title: str,
        claim: Claim | None = None,
        owner: str = "",
        about: Mapping[str, str] | None = None,
        visitor: str = "",
    ) -> Started:
        """Start `target(**arguments)` in a new process.

        Args:
            target: a generator function that can be imported by its module and name.
            arguments: JSON values, or objects with `save` and a class method `load`.
            title: a human-readable name.
            claim: a folder that no other job may write to in the meantime.
            owner: a secret of the caller; the job's key is then `key_of(job, owner)`.
            about: what to show of the job in a list, such as its method; see `describe_job`.
            visitor: whom the job counts for under `Limits.runs_per_visitor`, such as an address.

        Raises: RunError if too many jobs are running, FolderInUseError for a claimed folder.
        """
        with self.one_at_a_time():
            self._admit(claim, _digest(visitor) if visitor else "")
            return self._start(target, arguments, title, claim, owner, about or {}, visitor)

    def _start(
        self,
        target: Callable[..., Iterator[Any]],
        arguments: Mapping[str, Any],
        title: str,
        claim: Claim | None,
        owner: str,
        about: Mapping[str, str],
        visitor: str,
    ) -> Started:
        job = secrets.token_hex(16)
        key = self.key_of(job, owner) or secrets.token_urlsafe(24)
        folder = self.folder / job
        folder.mkdir(parents=True, mode=0o700)
        plain, files = _store_arguments(folder, arguments)
        content = {
            "target": f"{target.__module__}:{target.__qualname__}",
            "title": title,
            "arguments": plain,
            "files": files,
            "claim": claim,
            "about": dict(about),
            "key": _digest(key),
            "visitor": _digest(visitor) if visitor else "",
            "seconds": self.limits.run_minutes and 60 * self.limits.run_minutes,
        }
        _write_json(folder / "job.json", content)
        self._spawn(job)
        return Started(job, key)

    def status(self, job: str) -> JobStatus:
        """Return the status of a job. Raises: RunError for an unknown id."""
        folder = self._folder(job)
        for _ in range(2):  # a process may end between the two reads below
            status = read_status(folder, job)
            if not status.is_running or _is_locked(folder):
                break
        else:
            return replace(status, state="interrupted", error="The process ended unexpectedly.")
        if status.state == "running" and (folder / "cancel").exists():
            return replace(status, state="cancelling")
        return status

    def all(self) -> list[JobStatus]:
        """List all jobs, newest first."""
        if not self.folder.is_dir():
            return []
        jobs = [path.name for path in self.folder.iterdir() if (path / "status.json").is_file()]
        statuses = [self._status_if_readable(job) for job in jobs if _ID.fullmatch(job)]
        found = [status for status in statuses if status is not None]
        return sorted(found, key=lambda status: -status.started)

    def _status_if_readable(self, job: str) -> JobStatus | None:
        """Return a job's status; None if it was deleted meanwhile.

        A job with damaged files is failed, so that it hides no other.
        """
        try:
            status = self.status(job)
            read_request(self.folder / job)
        except (RunError, OSError) as error:
            if not (self.folder / job / "status.json").is_file():
                return None
            return JobStatus(job, "Unreadable run", "failed", error=str(error))
        return status

    def cancel(self, job: str, key: str) -> JobStatus:
        """Request that a job stop after its current step; finished work is kept.

        Raises: RunError for an unknown id or a wrong key.
        """
        self._authorise(job, key)
        if self.status(job).is_running:
            (self._folder(job) / "cancel").touch()
        return self.status(job)

    def resume(self, job: str, key: str) -> JobStatus:
        """Run a stopped job again with the same arguments; its target skips finished work.

        Raises: RunError for an unknown id, a wrong key, a job that is running or finished, or if
            too many jobs are running; FolderInUseError if another job is writing to its folder.
        """
        self._authorise(job, key)
        with self.one_at_a_time():
            status = self.status(job)
            if not status.can_resume:
                raise RunError(
                    f"The run '{status.title}' is {status.state}; there is nothing to resume."
                )
            self._admit(self._claim(job), self._visitor(job))
            self._spawn(job)
        return self.status(job)

    def writer_of(self, folder: str | Path) -> str | None:
        """Return the id of the running job that has claimed a folder."""
        running = [status.id for status in self.all() if status.is_running]
        return next((job for job in running if _same(self._claim(job), str(folder))), None)

    @staticmethod
    def key_of(job: str, owner: str) -> str:
        """Return the key of a job that `owner` started; "" if `owner` is too short a secret."""
        if len(owner) < SHORTEST_SECRET:
            return ""
        return hmac.new(owner.encode(), job.encode(), hashlib.sha256).hexdigest()

    def holds_key(self, job: str, key: str) -> bool:
        """Return whether `key` is the key that `start` returned for this job."""
        if job not in self._digests:
            self._digests[job] = read_request(self._folder(job)).key
        return hmac.compare_digest(self._digests[job], _digest(key))

    def _authorise(self, job: str, key: str) -> None:
        if not self.holds_key(job, key):
            raise RunError(
                "Only the browser that started this run can cancel or resume it. Others can watch."
            )

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Hold the store's lock, so that job counts do not change inside the block."""
        check_home(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _admit(self, claim: Claim | None, visitor: str) -> None:
        """Raise if the folder is claimed or too many jobs are running, of all or of a visitor."""
        running = [status.id for status in self.all() if status.is_running]
        for job in running:
            found = self._claim(job)
            if claim and found and _same(found, claim.folder):
                raise FolderInUseError(claim.folder, job, same_work=found.work == claim.work)
        own = [job for job in running if visitor and self._visitor(job) == visitor]
        _check_limit(len(own), self.limits.runs_per_visitor, " from your address")
        _check_limit(len(running), self.limits.runs, "")

    def _claim(self, job: str) -> Claim | None:
        return read_request(self._folder(job)).claim

    def _visitor(self, job: str) -> str:
        return read_request(self._folder(job)).visitor

    def _folder(self, job: str) -> Path:
        folder = self.folder / job
        if not _ID.fullmatch(job) or not (folder / "status.json").is_file():
            raise RunError(f"There is no run with the id '{job[:40]}'. Was its folder removed?")
        return folder

    def _spawn(self, job: str) -> None:
        folder = self.folder / job
        request, now = read_request(folder), time.time()
        status = JobStatus(
            job, request.title, "running", {}, request.arguments, now, now, phase="starting"
        )
        with (folder / "lock").open("w") as lock, (folder / "log.txt").open("ab") as log:
            # The child inherits the open, locked file, so that a running job never appears
            # interrupted.
            _lock(lock)
            (folder / "cancel").unlink(missing_ok=True)
            write_status(folder, status)
            if self.launcher and self.launcher.run(folder, lock.fileno(), log.fileno()):
                return
            paths = os.pathsep.join(path for path in sys.path if path)
            child = subprocess.Popen(  # noqa: S603 (our own interpreter and code)
                [sys.executable, "-c", _START, str(folder), str(lock.fileno())],
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
        # Reap the child when it ends, otherwise it remains as a zombie process.
        threading.Thread(target=child.wait, daemon=True).start()


# --- files -----------------------------------------------------------------------------------


def _store_arguments(
    folder: Path, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    plain, files = {}, {}
    for name, value in arguments.items():
        if isinstance(value, Saved):
            value.save(folder / f"{name}.json")
            kind = type(value)
            files[name] = {
                "file": f"{name}.json",
                "class": f"{kind.__module__}:{kind.__qualname__}",
            }
        else:
            plain[name] = value
    return plain, files


def _check_limit(number: int, limit: float | None, whose: str) -> None:
    if limit is not None and number >= limit:
        runs = "1 run is" if number == 1 else f"{number} runs are"
        raise RunError(
            f"{runs} already in progress{whose} (limit {limit:g}). Wait for one to finish, or "
            f"cancel one."
        )


def _same(claim: Claim | None, folder: str) -> bool:
    """Return whether a claim refers to this folder, after resolving links."""
    return claim is not None and os.path.realpath(claim.folder) == os.path.realpath(folder)


def write_status(folder: Path, status: JobStatus) -> None:
    """Write the status file of a job."""
    _write_json(folder / "status.json", asdict(status))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write atomically, so that readers never see a partial file."""
    write_whole(path, json.dumps(content) + "\n")


def log_event(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to the journal of a job."""
    with (folder / "journal.jsonl").open("a", encoding="utf-8") as journal:
        journal.write(json.dumps({"time": round(time.time(), 3), **entry}) + "\n")


def _is_locked(folder: Path) -> bool:
    """Return whether the job's process is alive: it holds the lock until it ends for any reason."""
    with (folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _lock(lock: IO[str]) -> None:
    """Acquire the lock; status checks hold it briefly, a running job until it ends."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    raise RunError("This run is still in progress. Wait a moment and try again.")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
