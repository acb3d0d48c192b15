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
import importlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, runtime_checkable

from platformdirs import user_data_path

from ipmerge_core.errors import FolderInUseError, IPMergeError, RunError
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.job_files import Claim, JobStatus, State, read_request, read_status
from ipmerge_core.runtime.pipeline import keep_freed_memory

__all__ = [
    "Claim",
    "JobStatus",
    "JobStore",
    "Saved",
    "Started",
    "State",
    "home_folder",
    "main",
    "run_job",
]

_ID = re.compile(r"[0-9a-f]{32}")
SHORTEST_SECRET = 32  # minimum number of characters of an owner's secret
_WRITE_EVERY = 0.1  # seconds between two writes of status.json
_JOURNAL_EVERY = 2.0  # seconds between two journal lines about progress
_LOCK_PATIENCE = 10.0  # seconds that a process may take to release its lock after its last status
# Former import paths of job targets and arguments, as stored in older jobs.
_FORMER = {
    "ipmerge_core.merging:iter_merge": "ipmerge_core.merging.merge:iter_merge",
    "ipmerge_core.analysis:iter_pack": "ipmerge_core.analysis.analyse:iter_pack",
    "ipmerge_core.calibration:iter_calibration_of": (
        "ipmerge_core.calibration.calibrate:iter_calibration_of"
    ),
    "ipmerge_core.plan:MergePlan": "ipmerge_core.planning.plan:MergePlan",
}
_START = "import sys; from ipmerge_core.runtime.jobs import main; sys.exit(main(*sys.argv[1:]))"


@runtime_checkable
class Saved(Protocol):
    """An argument that is stored in its own file; its class has a matching `load`."""

    def save(self, path: str | Path) -> None:
        """Write the argument to `path`."""
        ...


class Started(NamedTuple):
    """Result of `JobStore.start`; the key is stored nowhere else."""

    id: str
    key: str


def home_folder() -> Path:
    """Where runs and models made in the app go: IPMERGE_HOME, else the user's data folder.

    It used to be a folder in the user's cache, which some systems empty. Where that folder exists,
    it stays in use, so that its runs and models are still found.
    """
    if chosen := os.environ.get("IPMERGE_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    earlier = cache / "ipmerge"
    return earlier if earlier.is_dir() else user_data_path("ipmerge", appauthor=False)


class JobStore:
    """Manages the jobs in one folder."""

    def __init__(self, folder: Path, *, most_running: int = 2) -> None:
        self.folder = folder
        self.most_running = most_running

    def start(
        self,
        target: Callable[..., Iterator[Any]],
        arguments: Mapping[str, Any],
        *,
        title: str,
        claim: Claim | None = None,
        owner: str = "",
    ) -> Started:
        """Start `target(**arguments)` in a new process.

        Args:
            target: a generator function that can be imported by its module and name.
            arguments: JSON values, or objects with `save` and a class method `load`.
            title: a human-readable name.
            claim: a folder that no other job may write to in the meantime.
            owner: a secret of the caller; the job's key is then `key_of(job, owner)`.

        Raises: RunError if too many jobs are running, FolderInUseError for a claimed folder.
        """
        with self._one_at_a_time():
            self._admit(claim)
            return self._start(target, arguments, title, claim, owner)

    def _start(
        self,
        target: Callable[..., Iterator[Any]],
        arguments: Mapping[str, Any],
        title: str,
        claim: Claim | None,
        owner: str,
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
            "key": _digest(key),
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
        return sorted(statuses, key=lambda status: -status.started)

    def _status_if_readable(self, job: str) -> JobStatus:
        """Return a job's status; a job with damaged files is failed, so that it hides no other."""
        try:
            status = self.status(job)
            read_request(self.folder / job)
        except RunError as error:
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
        with self._one_at_a_time():
            status = self.status(job)
            if not status.can_resume:
                raise RunError(
                    f"The run '{status.title}' is {status.state}; there is nothing to resume."
                )
            self._admit(self._claim(job))
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
        return hmac.compare_digest(read_request(self._folder(job)).key, _digest(key))

    def _authorise(self, job: str, key: str) -> None:
        if not self.holds_key(job, key):
            raise RunError(
                "Only the browser that started this run can cancel or resume it. Others can watch."
            )

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Hold the store's lock, so that job counts do not change inside the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _admit(self, claim: Claim | None) -> None:
        """Raise if the folder is claimed or too many jobs are running."""
        running = [status.id for status in self.all() if status.is_running]
        for job in running:
            found = self._claim(job)
            if claim and found and _same(found, claim.folder):
                raise FolderInUseError(claim.folder, job, same_work=found.work == claim.work)
        if len(running) >= self.most_running:
            number = "1 run is" if len(running) == 1 else f"{len(running)} runs are"
            raise RunError(
                f"{number} already in progress (limit {self.most_running}). Wait for one to "
                f"finish, or cancel one."
            )

    def _claim(self, job: str) -> Claim | None:
        return read_request(self._folder(job)).claim

    def _folder(self, job: str) -> Path:
        folder = self.folder / job
        if not _ID.fullmatch(job) or not (folder / "status.json").is_file():
            raise RunError(f"There is no run with the id '{job[:40]}'. Was its folder removed?")
        return folder

    def _spawn(self, job: str) -> None:
        folder = self.folder / job
        request = read_request(folder)
        status = JobStatus(job, request.title, "running", {}, request.arguments, time.time())
        with (folder / "lock").open("w") as lock, (folder / "log.txt").open("ab") as log:
            # The child inherits the open, locked file, so that a running job never appears
            # interrupted.
            _lock(lock)
            (folder / "cancel").unlink(missing_ok=True)
            _write_status(folder, status)
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


# --- in the job's own process ----------------------------------------------------------------


def main(folder: str, lock: str) -> int:
    """Run a job, then release its lock: interpreter shutdown may take a while after that."""
    keep_freed_memory()
    code = run_job(folder)
    fcntl.flock(int(lock), fcntl.LOCK_UN)
    return code


def run_job(folder: str | Path) -> int:
    """Run the job in `folder` in the current process and return the exit code."""
    folder = Path(folder)
    status = read_status(folder)
    _log_event(folder, {"event": "started", "process": os.getpid()})
    try:
        steps = _open_target(folder)
        status = _drain(folder, steps, status)
    except IPMergeError as error:
        status = replace(status, state="failed", error=str(error))
    except Exception as error:  # noqa: BLE001 (a bug is reported in the job's status)
        traceback.print_exc()
        text = f"Unexpected {type(error).__name__}: {error}. See the run's log for details."
        status = replace(status, state="failed", error=text)
    status = replace(status, updated=time.time())
    _write_status(folder, status)
    _log_event(folder, {"event": status.state, "error": status.error, **status.step})
    return 0 if status.state in ("finished", "cancelled") else 1


def _drain(folder: Path, steps: Generator[Any], status: JobStatus) -> JobStatus:
    """Advance the generator until it ends or the job is cancelled."""
    written = noted = 0.0
    with contextlib.closing(steps):
        for step in steps:
            now = time.time()
            status = replace(status, step=_plain(step), updated=now)
            if (folder / "cancel").exists():
                return replace(status, state="cancelled")
            if now - written >= _WRITE_EVERY:
                _write_status(folder, status)
                written = now
            if now - noted >= _JOURNAL_EVERY:
                _log_event(folder, {"event": "step", **status.step})
                noted = now
    return replace(status, state="finished")


def _open_target(folder: Path) -> Generator[Any]:
    request = read_request(folder)
    arguments = dict(request.arguments)
    for name, file in request.files.items():
        arguments[name] = _find(file["class"]).load(folder / file["file"])
    steps: Generator[Any] = _find(request.target)(**arguments)
    return steps


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


def _same(claim: Claim | None, folder: str) -> bool:
    """Return whether a claim refers to this folder, after resolving links."""
    return claim is not None and os.path.realpath(claim.folder) == os.path.realpath(folder)


def _write_status(folder: Path, status: JobStatus) -> None:
    _write_json(folder / "status.json", asdict(status))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write atomically, so that readers never see a partial file."""
    write_whole(path, json.dumps(content) + "\n")


def _log_event(folder: Path, entry: Mapping[str, Any]) -> None:
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
