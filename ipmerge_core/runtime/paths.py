"""Check the paths that users give: expanded, resolved, writable, and short enough, before any work.

In: a path as typed. Out: an absolute `Path` that can be read, or written under its name and under
the longer names of its unfinished forms. Every command and every handler of the app passes its
paths through these functions, so that a mistake costs no work.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ipmerge_core.errors import RunError

_LONGEST_NAME = 255  # bytes of one name on the usual file systems
_LONGEST_PATH = 4096  # bytes; PATH_MAX of Linux (macOS has 1024, which its errors report)


def expand_path(path: str | Path) -> Path:
    """Return a path with `~` and `~user` expanded.

    Raises: RunError if it is empty or too long, contains a null character or a lone surrogate, or
        there is no such home folder.
    """
    text = os.fspath(path)
    if not text.strip():
        raise RunError("The path is empty; expected the path of a file or a folder.")
    if "\0" in text:
        raise RunError(f"The path {text[:80]!r} contains a null character; choose another path.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise RunError(
            f"The path {text[:80]!r} contains a character that no file name can have; choose "
            f"another path."
        ) from error
    try:
        found = Path(text).expanduser()
    except RuntimeError as error:
        raise RunError(
            f"Cannot expand '{text[:80]}': there is no such home folder. Specify an absolute path."
        ) from error
    _check_name(found, "")
    return found


def readme_hint(missing: Path) -> str:
    """Return a sentence that names the README next to a missing folder; empty without one."""
    readme = missing.parent / "README.md"
    return f" See '{readme}'." if readme.is_file() else ""


def resolve_path(path: str | Path) -> Path:
    """Return the absolute path without links and dots. Raises: RunError, as `expand_path`."""
    try:
        return expand_path(path).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, or a deleted current folder
        reason = getattr(error, "strerror", None) or "its symbolic links form a loop"
        raise RunError(
            f"Cannot resolve the path '{str(path)[:200]}': {reason}. Specify another path."
        ) from error


def input_file(path: str | Path, what: str) -> Path:
    """Return the path of a file to read, such as a "plan"; a pipe is accepted.

    Raises: RunError if it is missing, a folder or a device.
    """
    found = expand_path(path)
    try:
        mode = found.stat().st_mode
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"Cannot read the {what} '{path}': {reason}.") from error
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        raise RunError(f"Cannot read the {what} '{path}': it is {_kind(mode)}, not a file.")
    return found


def output_file(path: str | Path, *, suffix: str = "") -> Path:
    """Return the resolved path of a file to write; an existing file will be replaced.

    Args:
        path: as typed. A pipe is accepted unless a suffix is given.
        suffix: what the names of files written next to it have in addition.

    Raises: RunError if its folder is missing or read-only, if it is a folder or a device, or if
        its name is too long.
    """
    given = expand_path(path)
    _check_name(given, suffix)
    if not suffix and given.is_fifo():
        return given  # resolving /dev/stdout does not give a path
    found = resolve_path(given)
    _check_name(found, suffix)
    if found.exists() and not found.is_file():
        kind = _kind(found.stat().st_mode)
        raise RunError(f"Cannot write '{path}': it is {kind}. Expected the path of a file.")
    if not found.parent.is_dir():
        raise RunError(f"Cannot write '{path}': the folder '{found.parent}' does not exist.")
    _check_writable(path, found.parent)
    if is_mounted(found):
        raise RunError(
            f"Cannot write '{path}': it is a mount point and cannot be replaced. Choose another "
            f"file."
        )
    return found


def output_folder(path: str | Path, *, suffix: str = "") -> Path:
    """Return the resolved path of a folder to write into; it and its parents may not exist yet.

    Raises: RunError if it is a file, cannot be created or written to, or its name is too long with
        the suffix of its unfinished form.
    """
    _check_name(expand_path(path), suffix)
    found = resolve_path(path)
    _check_name(found, suffix)
    parent = existing_parent(found)
    if not parent.is_dir():
        what = "it is" if parent == found else f"'{parent}' is"
        kind = _kind(parent.stat().st_mode)
        raise RunError(f"Cannot write to '{path}': {what} {kind}. Expected the path of a folder.")
    _check_writable(path, parent)
    return found


def existing_parent(path: Path) -> Path:
    """Return the closest existing parent of a path, or the path itself if it exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def is_fixed(folder: Path) -> bool:
    """Return whether an existing folder cannot be replaced by renaming another one.

    This applies to mount points, to the current folder, and below a folder without permission to
    write. Such a folder is filled instead.
    """
    if not folder.is_dir():
        return False
    here = Path(os.curdir)
    current = here.is_dir() and folder.samefile(here)
    return current or is_mounted(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def is_mounted(path: Path) -> bool:
    """Return whether a path is a mount point; bind mounts of one file system are included."""
    if os.path.ismount(path):
        return True
    import psutil  # here: it does not import where IPMerge is refused, see `check_platform`

    return path.exists() and str(path) in {
        partition.mountpoint for partition in psutil.disk_partitions(all=True)
    }


def _check_name(path: Path, suffix: str) -> None:
    """Check the length of every name, and of the last one with its suffix, in bytes."""
    names = [*path.parts[:-1], path.name + suffix]
    longest = max(names, key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > _LONGEST_NAME:
        room = _LONGEST_NAME - (len(os.fsencode(suffix)) if longest == names[-1] else 0)
        shown = longest.removesuffix(suffix)
        raise RunError(
            f"The name '{shown[:40]}...' has {len(os.fsencode(shown))} bytes; at most {room} are "
            f"possible here. Choose a shorter name."
        )
    size = len(os.fsencode(path)) + len(os.fsencode(suffix))
    if size >= _LONGEST_PATH:
        raise RunError(
            f"The path '{str(path)[:40]}...' has {size} bytes; fewer than {_LONGEST_PATH} are "
            f"possible. Choose a shorter path."
        )


def _check_writable(path: str | Path, folder: Path) -> None:
    if os.access(folder, os.W_OK | os.X_OK):
        return
    read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
    reason = "is on a read-only file system" if read_only else "does not permit writing"
    raise RunError(
        f"Cannot write '{path}': the folder '{folder}' {reason}. Choose another output path."
    )


def _kind(mode: int) -> str:
    """Describe what is at a path, for messages."""
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISREG(mode):
        return "a file"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
