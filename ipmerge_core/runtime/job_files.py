"""Read the files of a job: its request `job.json` and its state `status.json`.

In: the folder of a job. Out: a validated `Request` or `JobStatus`, or a RunError that names the
damaged file. `jobs` writes these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.input_files import (
    CLOSED,
    MEGABYTE,
    Count,
    FileKind,
    FileName,
    Magnitude,
    Name,
    Schema,
    requiring,
)

State = Literal["running", "cancelling", "finished", "cancelled", "failed", "interrupted"]
Phase = Literal["", "starting", "importing", "opening", "working"]


@dataclass(frozen=True)
class JobStatus:
    """State of a job. Times are seconds since the epoch; `step` is the last one it yielded.

    `phase` is what a running job does: "starting" (its process), "importing" (libraries), "opening"
    (models, before its first step), "working". `first` is the first step of the current pass that
    did new work, made at `since`: speed is measured from there. `nbytes_memory` is the most memory
    that its process held.
    """

    __pydantic_config__ = CLOSED

    id: str
    title: str
    state: State
    step: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    started: float = 0.0
    updated: float = 0.0
    error: str = ""
    phase: Phase = ""
    first: Mapping[str, Any] = field(default_factory=dict)
    since: float = 0.0
    nbytes_memory: Count = 0

    @property
    def is_running(self) -> bool:
        """Whether a process is currently executing the job."""
        return self.state in ("running", "cancelling")

    @property
    def can_resume(self) -> bool:
        """Whether the job stopped before its end and can be resumed."""
        return self.state in ("cancelled", "failed", "interrupted")


class Claim(NamedTuple):
    """A folder reserved for one job while it runs, and a label of what the job writes there."""

    folder: str
    work: str = ""


Stored = Annotated[dict[str, FileName], requiring("file", "class")]


@dataclass(frozen=True)
class Request:
    """Contents of `job.json`: what to run with which arguments; `key` is a hash of the key.

    `files` are arguments stored in files of their own, with the classes that load them. `visitor`
    is a hash of whom the job counts for, `seconds` the time limit, `about` what a list shows of it.
    """

    __pydantic_config__ = CLOSED

    target: Name
    title: str
    arguments: dict[str, Any]
    files: dict[str, Stored]
    key: str
    claim: Claim | None = None
    visitor: str = ""
    seconds: Magnitude | None = None
    about: dict[str, Any] | None = None


_JOB_FILE = FileKind(
    "a file of a run", "Delete its folder and start again.", RunError, largest=16 * MEGABYTE
)
_STATUS, _REQUEST = Schema[JobStatus](JobStatus), Schema[Request](Request)


def read_status(folder: Path, job: str | None = None) -> JobStatus:
    """Read a job's status. Raises: RunError if its file is damaged or of another job."""
    path = folder / "status.json"
    status = _JOB_FILE.load(_STATUS, path)
    if job is not None and status.id != job:
        raise _JOB_FILE.refusal(path, f"'id' is {status.id!r:.80}; expected {job!r}")
    return status


def read_request(folder: Path) -> Request:
    """Read a job's request. Raises: RunError if its file is damaged."""
    return _JOB_FILE.load(_REQUEST, folder / "job.json")
