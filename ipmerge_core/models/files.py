"""Read the files of a model from a folder or from a pinned commit on the hub.

In: a path or a hub id `org/name[@revision]`. Out: file names, sizes, and any byte range, by reads
of this range without memory mapping. Disk and network errors become readable messages.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ipmerge_core.errors import CheckpointError, CorruptShardError, RunError, first_line
from ipmerge_core.runtime.descriptors import Descriptors
from ipmerge_core.runtime.paths import expand_path, readme_hint

if TYPE_CHECKING:
    from collections.abc import Callable

    from fsspec import AbstractFileSystem

_LONGEST_ID = 300  # characters of a hub id with its revision
_REVISION = re.compile(r"[A-Za-z0-9._/-]+")  # a branch, a tag, a commit or refs/pr/1
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # to run a model
_READ_STEP = 1 << 30  # a read returns at most 2 GiB on Linux
SUBFOLDERS = ("additional_chat_templates",)  # the folders inside a model folder that belong to it
_LINKED_ANYWHERE = ".safetensors"  # read as tensors only, so that a link cannot disclose a file


class Pace(NamedTuple):
    """How to read a whole model: bytes per piece, bytes to read ahead, concurrent reads."""

    piece: int
    ahead: int
    threads: int


FROM_DISK = Pace(1 << 22, 1 << 26, 1)  # pieces that fit a CPU cache
OVER_NETWORK = Pace(1 << 24, 1 << 29, 8)  # each piece is a request with latency


class Stamp(NamedTuple):
    """What changes when a file is written or replaced."""

    size: int
    modified: int  # nanoseconds
    inode: int


class Files(Protocol):
    """The files of a model, local or remote."""

    id: str
    revision: str | None  # the commit, for a hub model
    remote: bool  # whether every read is a network request

    def local_folder(self) -> Path:
        """Return a folder that contains the files; a remote model is downloaded."""
        ...

    def names(self) -> list[str]:
        """List the files of the model folder and its known subfolders, sorted: `folder/name`."""
        ...

    def size(self, name: str) -> int:
        """Size of one file in bytes."""
        ...

    def content_id(self, name: str) -> str | None:
        """Return the hub's hash of a file's content; None for local files."""
        ...

    def stamp(self, name: str) -> Stamp | None:
        """Return the stamp of a local file; None for a pinned commit, which does not change."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read the bytes [start, stop) of one file."""
        ...

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill `memory` with the bytes of one file from `start` on."""
        ...


class LocalFiles:
    """A model folder on disk; `id` and `revision` are given for a hub model in the local cache."""

    remote = False

    def __init__(self, folder: Path, id: str | None = None, revision: str | None = None) -> None:  # noqa: A002
        self.id, self.revision = id or str(folder), revision
        self.folder = folder
        self._descriptors = Descriptors(lambda name: os.open(folder / name, os.O_RDONLY))

    def local_folder(self) -> Path:
        """Return the folder."""
        return self.folder

    def names(self) -> list[str]:
        """List the regular files in the folder and its known subfolders, sorted.

        Raises: CheckpointError for a symbolic link out of the folder, other than into the hub
            cache.
        """
        try:
            found = [entry for entry in self.folder.iterdir() if entry.is_file()]
            for name in SUBFOLDERS:
                if (self.folder / name).is_dir():
                    found += [e for e in (self.folder / name).iterdir() if e.is_file()]
            for entry in found:
                self._refuse_escape(entry)
            return sorted(entry.relative_to(self.folder).as_posix() for entry in found)
        except OSError as error:
            raise _unreadable(self.folder, error) from error

    def _refuse_escape(self, entry: Path) -> None:
        """Refuse a file outside the folder: it would be shown in errors, and copied by a merge."""
        linked = entry.is_symlink() or (entry.parent != self.folder and entry.parent.is_symlink())
        if not linked or entry.name.endswith(_LINKED_ANYWHERE):
            return
        target = entry.resolve()
        if not (target.is_relative_to(self.folder.resolve()) or _is_cached_blob(target)):
            raise CheckpointError(
                f"'{entry}' is a symbolic link to '{target}', outside the model folder. Replace it "
                f"by a copy of that file if it belongs to the model; otherwise delete it."
            )

    def size(self, name: str) -> int:
        """Size of one file in bytes."""
        try:
            return (self.folder / name).stat().st_size
        except OSError as error:
            raise _unreadable(self.folder / name, error) from error

    def content_id(self, name: str) -> str | None:
        """Return None: local files have no precomputed hash."""
        return None

    def stamp(self, name: str) -> Stamp | None:
        """Return the size, time and inode of a file."""
        try:
            found = (self.folder / name).stat()
        except OSError as error:
            raise _unreadable(self.folder / name, error) from error
        return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read the bytes [start, stop) of one file."""
        data = bytearray((self.size(name) if stop is None else stop) - start)
        self.read_into(memoryview(data), name, start)
        return data

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill `memory` by positioned reads, without memory mapping."""
        done = 0
        try:
            with self._descriptors.use(name) as descriptor:
                while done < len(memory):
                    piece = memory[done : done + _READ_STEP]
                    got = os.preadv(descriptor, [piece], start + done)
                    if not got:
                        break
                    done += got
        except OSError as error:
            raise _unreadable(self.folder / name, error) from error
        if done < len(memory):
            raise CorruptShardError(
                f"'{self.folder / name}' ends at byte {start + done}; expected at least "
                f"{start + len(memory)}. Was it modified during the run? Copy it again."
            )

    def __del__(self) -> None:
        """Close open files; at the end of the process the system does."""
        if not sys.is_finalizing():
            self._descriptors.close()


class RemoteFiles:
    """A model folder on any fsspec file system, read by byte ranges; used for the hub.

    `cached` returns the path of a file that has been downloaded, which is read instead.
    """

    remote = True

    def __init__(
        self,
        id: str,  # noqa: A002
        revision: str,
        system: AbstractFileSystem,
        folder: str,
        cached: Callable[[str], Path | None] = lambda _name: None,
    ) -> None:
        self.id = id
        self.revision: str | None = revision
        self._cached = cached
        self._system, self._folder = system, folder
        entries = self._ask(lambda: system.ls(folder, detail=True))
        found = {_last_name(entry): entry for entry in entries if entry["type"] == "file"}
        for entry in entries:
            if entry["type"] == "directory" and (name := _last_name(entry)) in SUBFOLDERS:
                inside = self._ask(lambda name=name: system.ls(f"{folder}/{name}", detail=True))
                found |= {f"{name}/{_last_name(e)}": e for e in inside if e["type"] == "file"}
        self._sizes = {name: int(entry["size"] or 0) for name, entry in found.items()}
        self._blobs: dict[str, str | None] = {
            name: entry.get("blob_id") for name, entry in found.items()
        }

    def local_folder(self) -> Path:
        """Download the commit to the local hub cache, unless it is there.

        Raises: CheckpointError if the download fails.
        """
        return local_copy(self.id, self.revision, download=True)

    def names(self) -> list[str]:
        """List the files of the repository's top level and known subfolders, sorted."""
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        """Size of one file in bytes, from the listing."""
        return self._sizes[name]

    def content_id(self, name: str) -> str | None:
        """Return the git hash of the file, or of its LFS pointer, which contains its SHA-256."""
        return self._blobs[name]

    def stamp(self, name: str) -> Stamp | None:
        """Return None: the files of a commit do not change."""
        return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytearray:
        """Read the bytes [start, stop) from a downloaded file, or by one range request."""
        stop = self._sizes[name] if stop is None else stop
        if stop <= start:
            return bytearray()
        if path := self._cached(name):
            return LocalFiles(path.parent).read(path.name, start, stop)
        data: bytearray = self._ask(lambda: self._range(f"{self._folder}/{name}", start, stop))
        if len(data) != stop - start:
            raise RunError(
                f"Reading '{name}' of '{self.id}' returned {len(data)} of {stop - start} requested "
                f"bytes. Run the same command again; finished tensors are kept."
            )
        return data

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill `memory` by one range request."""
        memory[:] = self.read(name, start, start + len(memory))

    def _range(self, path: str, start: int, stop: int) -> bytearray:
        with self._system.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            return bytearray(file.read(stop - start))

    def _ask(self, request: Any) -> Any:  # noqa: ANN401
        """Execute one request and convert its errors to a RunError."""
        try:
            return request()
        except _request_errors() as error:
            raise RunError(
                f"Reading '{self.id}' failed ({first_line(error)}). Check the connection and run "
                f"the same command again; finished tensors are kept."
            ) from error


def _last_name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rsplit("/", 1)[-1]


def _is_cached_blob(path: Path) -> bool:
    """Return whether a path is a file of the hub cache: models--org--name/blobs/hash."""
    return path.parent.name == "blobs" and path.parents[1].name.startswith("models--")


def find_files(source: str | Path, *, hub_only: bool = False) -> Files:
    """Return the files of a folder, or of a hub id if no such folder exists.

    With `hub_only`, for untrusted input, local folders are not accessed.

    Raises: CheckpointError if neither exists, or access is denied.
    """
    if hub_only:
        return open_hub(as_hub_id(source))
    folder = expand_path(source)
    if folder.is_dir():
        return LocalFiles(folder)
    if folder.is_file():
        raise CheckpointError(
            f"'{folder}' is a file. Expected a folder with config.json and safetensors files: give "
            f"'{folder.parent}' if it is one. Models in a single file, such as GGUF, are not read."
        )
    if isinstance(source, str) and is_hub_id(source) and not folder.exists():
        return open_hub(source)
    raise CheckpointError(
        f"The model folder '{source}' does not exist. Expected a folder with config.json and "
        f"safetensors files, or a hub id such as 'org/name'.{readme_hint(folder)}"
    )


def is_hub_id(text: str) -> bool:
    """Whether a text is `org/name` or `org/name@revision`, by the hub's own rules for names.

    >>> is_hub_id("org/name"), is_hub_id("org/name@v1.0"), is_hub_id("name"), is_hub_id("../name")
    (True, True, False, False)
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name, at, revision = text.partition("@")
    if len(text) > _LONGEST_ID or "/" not in name or not (name.isascii() and name.isprintable()):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not at or _REVISION.fullmatch(revision) is not None


def as_hub_id(source: str | Path) -> str:
    """Return a valid hub id unchanged. Raises: CheckpointError for anything else."""
    if isinstance(source, str) and is_hub_id(source):
        return source
    raise CheckpointError(
        f"'{str(source)[:80]}' is not a valid hub id; expected 'org/name' or 'org/name@revision'. "
        f"Models on disk are read only where the app runs on your own machine."
    )


def open_hub(hub_id: str) -> Files:
    """Resolve a hub model to a commit without downloading files.

    Offline (or with HF_HUB_OFFLINE=1) a copy in the local hub cache is used.
    """
    from huggingface_hub import HfApi, HfFileSystem

    name, _, revision = hub_id.partition("@")
    try:
        sha = HfApi().model_info(name, revision=revision or None).sha
    except _request_errors(ValueError) as error:
        cached = None if _is_answer(error) else _cached_copy(name, revision)
        if cached is None:
            remedy = _remedy_of(error, hub_id)
            raise CheckpointError(
                f"Cannot open '{hub_id}' ({type(error).__name__}). {remedy}"
            ) from error
        return cached
    assert sha is not None
    return RemoteFiles(
        name, sha, HfFileSystem(), f"{name}@{sha}", functools.partial(_cached_file, name, sha)
    )


def _cached_file(model: str, commit: str, name: str) -> Path | None:
    """Return the path of a file in the local hub cache, if it was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def local_copy(name: str, revision: str | None, *, download: bool = False) -> Path:
    """Return the folder of a hub model in the local cache, for libraries that read folders.

    Args:
        name: the hub id, without a revision.
        revision: the commit, or None for the default branch.
        download: fetch the files that are missing; offline, the copy is used unchanged.

    Raises: CheckpointError if there is no copy, or the download fails.
    """
    from huggingface_hub import snapshot_download

    try:
        if download:
            return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
        with contextlib.suppress(OSError, ValueError):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except _request_errors(ValueError) as error:
        raise CheckpointError(
            f"Cannot download '{name}' ({first_line(error)}). {_remedy_of(error, name)}"
        ) from error
    raise CheckpointError(
        f"The model '{name}' is not on this machine. Download it with "
        f"`hf download {name}{f' --revision {revision}' if revision else ''}`."
    )


def _request_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Name what a request may raise: huggingface_hub speaks httpx, and from 2.0 on httpx2."""
    clients = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return (OSError, *more, *(client.HTTPError for client in clients if client is not None))


def _cached_copy(name: str, revision: str) -> LocalFiles | None:
    """Find the model in the local hub cache."""
    try:
        folder = local_copy(name, revision or None)
    except CheckpointError:
        return None
    return LocalFiles(folder, id=name, revision=folder.name)


def _is_answer(error: Exception) -> bool:
    """Whether the hub itself refused, so that no cached copy should be used instead."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    return isinstance(error, DisabledRepoError | RepositoryNotFoundError | RevisionNotFoundError)


def _remedy_of(error: Exception, hub_id: str) -> str:
    """Return the remedy for an error of huggingface_hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # a subclass of RepositoryNotFoundError
        return (
            "The repository is gated: accept its terms on its page, then log in with "
            "`hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "Is the name spelled right, and is it public? A local folder must exist: "
            f"{Path(hub_id).resolve()} does not."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "The repository exists, this revision does not: give a branch, a tag or a commit."
    if isinstance(error, errors.DisabledRepoError):
        return "The hub has disabled access to this repository: choose another model."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set and the hub's cache on this disk has no copy: unset it, or "
            "give a local folder."
        )
    return "The hub could not be reached: check the connection, or give a local folder."


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"Cannot read '{path}': {error.strerror or error}. Was it moved, or its disk unmounted? "
        f"Restore it and run the same command again; finished tensors are kept."
    )
