"""Files and folders that appear under their name whole, or not at all.

In: a path and its content. Out: the path, written beside its place under a hidden name and renamed
at the end, so that no reader and no kill ever sees a part of it. Models stream into a folder of
their own with a journal (`models.writer`): that is resumed, and this is not.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_ENDING = ".new"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` for a new file or folder; rename it at the end.

    Where `path` is a file it is replaced; a folder must be empty. If the block raises, its output
    is removed and `path` stays as it was. A kill leaves the hidden one: see `is_temporary`.
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
