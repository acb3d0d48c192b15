"""Write files and folders atomically: under their name they are complete or absent.

In: a path and its content. Out: the path, written under a hidden name in the same folder and
renamed at the end, so that no partial content is visible, even after a kill. Errors of the disk
become a `RunError`. Models are written to a folder with a journal (`models.writer`) and can be
resumed; these files cannot. `version_of` keys caches of a file's content.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.paths import expand_path, is_fixed

_ENDING = ".new"
_OS_ERROR = re.compile(r"os error ([0-9]+)")  # how errors of the safetensors library end
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is exceeded; free some space",
    errno.EFBIG: "the file is larger than the system permits (see `ulimit -f`); raise the limit",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EACCES: "permission denied; choose another output",
    errno.EPERM: "permission denied; choose another output",
    errno.EMFILE: "too many files are open (see `ulimit -n`); raise the limit",
    errno.ENAMETOOLONG: "its name is too long; choose a shorter name",
}


@contextlib.contextmanager
def writing(path: str | Path, kept: str = "") -> Iterator[None]:
    """Convert errors of the disk inside to a RunError about `path`.

    Args:
        path: the file or folder that is written.
        kept: what a later run of the same command reuses, such as "finished tensors are kept".
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code_of(error)
        reason = reason_of(error) or (os.strerror(code) if code else str(error))
        rest = f"; {kept}" if kept else ""
        raise RunError(
            f"Cannot write to '{path}': {reason}, then run the same command again{rest}."
        ) from error


def reason_of(error: OSError | SafetensorError) -> str | None:
    """Return the cause and the remedy if an error is one of the disk; None for others."""
    return _REASONS.get(_code_of(error))


def _code_of(error: OSError | SafetensorError) -> int:
    """Return the number of a system error; 0 if unknown."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else 0


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path next to `path` for a new file or folder; rename it at the end.

    An existing file is replaced; a folder must be empty. A folder that cannot be replaced (see
    `is_fixed`) is filled. If the block raises, its output is removed and `path` is unchanged. A
    killed process leaves the hidden path: see `is_temporary`.
    """
    target = expand_path(path)
    target = target.resolve() if target.is_symlink() else target
    fixed = is_fixed(target)
    parent = target if fixed else target.parent
    temporary = parent / f".ipmerge-{secrets.token_hex(8)}{_ENDING}"
    try:
        yield temporary
        if fixed:
            move_contents(temporary, target)
        else:
            temporary.replace(target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
        raise


def move_contents(folder: Path, target: Path) -> None:
    """Move the entries of a folder to another one on its disk, and remove the folder.

    Configurations are moved last: without them no loader takes the rest for a complete model.
    """
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name.endswith("config.json")):
        entry.replace(target / entry.name)
    folder.rmdir()


def write_whole(path: str | Path, content: str | bytes, kept: str = "") -> None:
    """Write a file in one step; text as UTF-8. A pipe is written to directly.

    `kept` is what a later run reuses, as of `writing`.

    Raises: RunError if the disk is full or read-only, or permission is denied.
    """
    data = content.encode() if isinstance(content, str) else content
    target = expand_path(path)
    with writing(path, kept):
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        with atomic_path(target) as temporary:
            temporary.write_bytes(data)


def is_temporary(path: Path) -> bool:
    """Whether this is what `atomic_path` leaves when its process is killed."""
    return path.name.startswith(".") and path.name.endswith(_ENDING)


class FileVersion(NamedTuple):
    """What changes when a file is written or replaced; the key of caches of its content."""

    modified: int  # nanoseconds
    size: int
    inode: int


def version_of(path: Path) -> FileVersion:
    """Return the current version of a file. Raises: OSError if there is none."""
    status = path.stat()
    return FileVersion(status.st_mtime_ns, status.st_size, status.st_ino)
