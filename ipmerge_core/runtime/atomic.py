"""Write files and folders atomically: under their name they are complete or absent.

In: a path and its content. Out: the path, written under a hidden name in the same folder and
renamed at the end, so that no partial content is visible, even after a kill. Models are written to
a folder with a journal (`models.writer`) and can be resumed; these files cannot. `version_of` keys
caches of a file's content.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ENDING = ".new"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path next to `path` for a new file or folder; rename it at the end.

    An existing file is replaced; a folder must be empty. If the block raises, its output is removed
    and `path` is unchanged. A killed process leaves the hidden path: see `is_temporary`.
    """
    target = Path(path)
    target = target.resolve() if target.is_symlink() else target
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}{_ENDING}"
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file in one step; text as UTF-8. A pipe or device is written to directly."""
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
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
