"""List the jobs of one owner, describe what a job does, and delete the folders of jobs.

In: a `JobStore`, and the keys or the secret of a user. Out: keys, descriptions, or the folder is
gone. What a job wrote outside of its own folder is left to the caller.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.job_files import JobStatus, read_request
from ipmerge_core.runtime.jobs import JobStore


class JobRequest(NamedTuple):
    """What a job was started with: the name of its target, and what to show of it."""

    target: str  # the name of the generator function, without its module
    about: Mapping[str, str]


def describe_job(store: JobStore, job: str) -> JobRequest:
    """Return what a job was started with. Raises: RunError for an unknown id."""
    if job.isalnum() and (store.folder / job).is_dir():  # no path
        return _request_of(store.folder / job)
    raise RunError(f"There is no run with the id '{job[:40]}'. Was its folder removed?")


@lru_cache(maxsize=4096)
def _request_of(folder: Path) -> JobRequest:
    """Read a file that never changes."""
    request = read_request(folder)
    about = {name: str(text) for name, text in (request.about or {}).items()}
    return JobRequest(request.target.rpartition(":")[2], about)


def keys_of_owner(store: JobStore, owner: str) -> dict[str, str]:
    """Map the ids of all jobs that `owner` started to their keys; see `JobStore.key_of`."""
    if not store.key_of("", owner) or not store.folder.is_dir():
        return {}
    found = {}
    for path in store.folder.iterdir():
        key = store.key_of(path.name, owner)
        with contextlib.suppress(RunError, OSError):  # not a job, or deleted meanwhile
            if store.holds_key(path.name, key):
                found[path.name] = key
    return found


def jobs_with_keys(
    store: JobStore, keys: Mapping[str, str]
) -> Iterator[tuple[JobStatus, JobRequest, str]]:
    """Yield the status and request of each job with its key, for the keys that are right."""
    for job, key in keys.items():
        with contextlib.suppress(RunError, OSError):  # not a job, or deleted meanwhile
            if store.holds_key(job, key):
                yield store.status(job), describe_job(store, job), key


def delete_job(store: JobStore, job: str, key: str) -> None:
    """Delete the folder of a job that is not running.

    Raises: RunError for an unknown id, a wrong key, or a running job.
    """
    with store.one_at_a_time():
        if not store.holds_key(job, key):
            raise RunError(
                "Only the browser that started this run can delete it. Others can watch."
            )
        status = store.status(job)
        if status.is_running:
            raise RunError(f"The run '{status.title}' is in progress. Cancel it, then delete it.")
        gone = store.folder / f".deleted-{job}"  # not a job's name: gone at once, whatever follows
        (store.folder / job).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
