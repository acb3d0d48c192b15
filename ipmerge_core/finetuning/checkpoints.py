"""The folder of an unfinished run, `OUT.training`: whose work it is, and its complete checkpoints.

In: the folder, and the digest of the work. Out: the newest checkpoint to continue from. One run
uses a folder at a time. A checkpoint is complete when its mark is written, which lists the sizes of
its files: a checkpoint of a killed process, or one that lost a part of its files, is not used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.atomic import is_temporary, write_whole, writing
from ipmerge_core.runtime.input_files import (
    Count,
    EntryName,
    FileKind,
    InvalidContentError,
    Name,
    Schema,
    parse_json,
    read_bounded,
)

COMPLETE = "ipmerge-complete.json"  # written last
KEPT = "complete checkpoints are kept"
_RUN = "run.json"
_LOCK = "lock"
_FINISHED = "finished"  # the result is written, and the folder is being removed
_LARGEST_MARK = 1 << 20
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,9})")
_OF_OTHERS = "rng_state_"  # written by each process for itself


@dataclass(frozen=True)
class _Record:
    """What the folder is for; the settings are for people."""

    digest: Name
    settings: dict[str, Any]


@dataclass(frozen=True)
class _Mark:
    """The sizes of the files of a complete checkpoint."""

    files: dict[EntryName, Count]


_KIND = FileKind("the record of a training run", "Delete its folder and start again.", RunError)
_RECORD = Schema[_Record](_Record)
_MARK = Schema[_Mark](_Mark)


def mark_complete(checkpoint: Path) -> None:
    """Mark a checkpoint as complete. Raises: RunError if the disk is full."""
    sizes = {
        path.name: path.stat().st_size
        for path in checkpoint.iterdir()
        if path.is_file() and not path.name.startswith(_OF_OTHERS)
    }
    write_whole(checkpoint / COMPLETE, json.dumps({"files": sizes}) + "\n", KEPT)


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has its mark, and every file of it in its size."""
    try:
        content = parse_json(read_bounded(checkpoint / COMPLETE, _LARGEST_MARK), _LARGEST_MARK)
        files = _MARK.validate(content).files
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, InvalidContentError):
        return False


class TrainingFolder:
    """The folder of one run; `release` it after `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK, thread_local=False)

    def open(self, digest: str, settings: Mapping[str, Any], *, resume: bool) -> str | None:
        """Return the newest checkpoint of the same work, or start over with an empty folder.

        Other work that ended before its first checkpoint is replaced, since nothing is lost.

        Raises: RunError if another run uses the folder, if it is of other work, or of no run.
        """
        self._refuse_foreign()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            record = self.path / _RUN
            if record.is_file() and resume:
                newest = self._newest()
                is_same = _KIND.load(_RECORD, record).digest == digest
                if newest is not None and not is_same:
                    raise self._of_other_work()
                if is_same:
                    return newest
            self._empty()
            content = {"digest": digest, "settings": settings}
            write_whole(record, json.dumps(content) + "\n")
        except BaseException:
            self.release()
            raise
        return None

    def release(self) -> None:
        """Let other runs use the folder."""
        self._lock.release(force=True)

    def remove(self) -> None:
        """Remove the folder after the result is written. Raises: RunError if it cannot be."""
        write_whole(self.path / _FINISHED, "")
        with writing(self.path):
            self.release()
            shutil.rmtree(self.path)

    def tidy(self) -> None:
        """Remove what a process leaves that was killed while it removed the folder."""
        if (self.path / _FINISHED).is_file():
            shutil.rmtree(self.path, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        """Refuse what is no folder, and a folder that no run has created."""
        path = self.path
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise RunError(f"'{path}' exists and is no folder. Choose another output folder.")
        if path.is_dir() and not (path / _RUN).is_file():
            entries = list(path.iterdir())
            if any(not (entry.name == _LOCK or is_temporary(entry)) for entry in entries):
                raise RunError(
                    f"'{path}' exists and was not created by a training run. Choose another output "
                    f"folder."
                )

    def _acquire(self) -> None:
        with writing(self.path):
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise RunError(
                    f"Another run is training in '{self.path}'. Wait for it, cancel it, or choose "
                    f"another output folder."
                ) from error

    def _of_other_work(self) -> RunError:
        return RunError(
            f"'{self.path}' contains an unfinished run with other models, data or settings. Finish "
            f"it with those, start over with --no-resume, or choose another output folder."
        )

    def _newest(self) -> str | None:
        """Return the newest complete checkpoint; incomplete ones are removed."""
        found: dict[int, Path] = {}
        for path in self.path.iterdir():
            name = _CHECKPOINT.fullmatch(path.name)
            if name is None or path.is_symlink() or not path.is_dir():
                continue
            if is_complete(path):
                found[int(name[1])] = path
            else:
                with writing(path):
                    shutil.rmtree(path)
        return str(found[max(found)]) if found else None

    def _empty(self) -> None:
        """Remove everything but the lock, the record last."""
        with writing(self.path):
            for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == _RUN):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != _LOCK:
                    entry.unlink()
