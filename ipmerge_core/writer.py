"""Writes a merged model next to nobody's data: sparse shards, a journal, one rename at the end.

In: the checkpoint whose layout is kept (names, order, shapes, dtypes, shard files) and the bytes of
one tensor at a time, in any order. Out: a folder that appears under its final name only when it is
whole. Until then all lies in `OUT.partial`, whose shard files carry a suffix no loader accepts, and
a journal line with a SHA-256 follows each tensor, so that a run killed at any moment goes on where
it was. Nothing that existed before is ever overwritten or deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from ipmerge_core.checkpoint import Checkpoint, TensorSpec
from ipmerge_core.errors import CheckpointError, RunError

_PARTIAL = ".partial"
_RUN = "run.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx")
_NOT_COPIED = (*_WEIGHTS, ".gguf", ".tflite", ".ot", ".py")
_REPLACED = {"README.md", "ipmerge.json", ".gitattributes"}


class CheckpointWriter:
    """Writes tensors into the layout of `source` at `out`; use as a context manager.

    Args:
        source: the checkpoint whose files, names, order and dtypes the result keeps.
        out: the folder to make; it must not exist, or be empty.
        run: what identifies the work (plan and sources); only the same work is resumed.
        resume: go on with an unfinished run of the same work, else start it anew.

    Raises:
        CheckpointError: `out` exists and is not empty.
        RunError: another process is writing there, or an unfinished run of other work lies there.
    """

    def __init__(self, source: Checkpoint, out: str | Path, run: str, *, resume: bool) -> None:
        self.source, self.run = source, run
        self.out = check_output(out)
        self.folder = self.out.with_name(self.out.name + _PARTIAL)
        self._resume = resume
        self._descriptors: dict[str, int] = {}
        self.done: dict[str, str] = {}  # tensor name -> sha256 of its bytes

    def __enter__(self) -> Self:
        """Take the folder, and find what an earlier run of the same work has finished."""
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / "lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise RunError(
                    f"Another run is writing '{self.out}' right now. Wait for it, cancel it, or "
                    f"choose another output folder."
                ) from error
            try:
                self._take_over()
                self._journal = (self.folder / "journal.jsonl").open("a", encoding="utf-8")
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the files; unfinished work stays in the partial folder for a resume."""
        self._journal.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._lock.release()

    def write(self, name: str, data: bytes) -> None:
        """Write one tensor's bytes in its place, then its line in the journal."""
        spec = self.source.spec(name)
        if len(data) != spec.nbytes:
            raise AssertionError(f"{name}: {len(data)} bytes for a place of {spec.nbytes}")
        with _explained(self.folder):
            _write_at(self._shard(spec.shard), spec.start, data)
            digest = hashlib.sha256(data).hexdigest()
            self._journal.write(json.dumps({"tensor": name, "sha256": digest}) + "\n")
            self._journal.flush()
        self.done[name] = digest

    def finish(self, documents: dict[str, str]) -> None:
        """Copy the model's other files, add `documents`, and give the folder its final name."""
        missing = [name for name in self.source.tensors if name not in self.done]
        if missing:
            raise AssertionError(f"{len(missing)} tensors were never written: {missing[:3]}")
        with _explained(self.folder):
            for shard in self.source.shards:
                os.fsync(self._shard(shard))
            for name in files_to_copy(self.source):
                (self.folder / name).write_bytes(self.source.files.read(name))
            for name, text in documents.items():
                (self.folder / name).write_text(text, encoding="utf-8")
            for shard in self.source.shards:
                (self.folder / (shard + _PARTIAL)).replace(self.folder / shard)
            for name in (_RUN, "journal.jsonl", "lock"):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.replace(self.out)

    def discard(self) -> None:
        """Remove the partial folder: for errors after which no resume makes sense."""
        shutil.rmtree(self.folder)

    def _take_over(self) -> None:
        record = self.folder / _RUN
        if record.exists():
            found = json.loads(record.read_text(encoding="utf-8")).get("run")
            if found != self.run and self._resume:
                raise RunError(
                    f"'{self.folder}' holds an unfinished merge of another plan ({str(found)[:8]}; "
                    f"this one is {self.run[:8]}). Finish it with its own plan, delete that "
                    f"folder, or choose another output folder."
                )
            if self._resume:
                self.done = self._verified()
                return
            for stale in self.folder.iterdir():
                if stale.name == "journal.jsonl" or stale.name.endswith(_PARTIAL):
                    stale.unlink()
        elif any(entry.name != "lock" for entry in self.folder.iterdir()):
            raise CheckpointError(
                f"'{self.folder}' exists and was not made by a merge. Choose another output folder."
            )
        record.write_text(json.dumps({"run": self.run}), encoding="utf-8")

    def _verified(self) -> dict[str, str]:
        """Return the journal's tensors whose bytes on disk still have the recorded hash."""
        done: dict[str, str] = {}
        journal = self.folder / "journal.jsonl"
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that a kill cut short
                continue
            spec = self.source.spec(entry["tensor"])
            if (self.folder / (spec.shard + _PARTIAL)).exists():
                data = os.pread(self._shard(spec.shard), spec.nbytes, spec.start)
                if hashlib.sha256(data).hexdigest() == entry["sha256"]:
                    done[spec.name] = entry["sha256"]
        return done

    def _shard(self, shard: str) -> int:
        """Open a shard file, made with its header and full length on first use."""
        if shard not in self._descriptors:
            path = self.folder / (shard + _PARTIAL)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors[shard] = descriptor
            size = self.source.files.size(shard)
            if os.fstat(descriptor).st_size != size:
                os.truncate(descriptor, size)
                _write_at(descriptor, 0, self.source.read_header(shard))
        return self._descriptors[shard]


def check_output(out: str | Path) -> Path:
    """Return the absolute output folder. Raises: CheckpointError if it exists and is not empty."""
    path = Path(out).expanduser().absolute()
    if path.is_dir() and any(path.iterdir()):
        raise CheckpointError(
            f"The output folder '{path}' exists and is not empty. Choose another, or empty it."
        )
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"The output '{path}' is a file. Give the name of a new folder.")
    return path


def files_to_copy(source: Checkpoint) -> list[str]:
    """List the files that a merged model takes over as they are: all but weights, code and card."""
    return [
        name
        for name in source.files.names()
        if not name.endswith(_NOT_COPIED) and name not in _REPLACED
    ]


def _write_at(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


class _explained:  # noqa: N801 (reads as a word at its use)
    """Turns what the file system says into one sentence that keeps the finished work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Raise RunError for a full, read-only or forbidden target."""
        if not isinstance(error, OSError):
            return
        reason = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EROFS: "the file system is read-only: choose another output folder",
            errno.EACCES: "permission was denied: choose another output folder",
        }.get(error.errno or 0, f"{error.strerror or error}")
        raise RunError(
            f"Cannot write to '{self.folder}': {reason}, then run the same command again; "
            f"finished tensors are kept."
        ) from error


def layout_bytes(source: Checkpoint) -> int:
    """Bytes that a merged model will take on disk."""
    shards = sum(source.files.size(shard) for shard in source.shards)
    return shards + sum(source.files.size(name) for name in files_to_copy(source))


def in_file_order(source: Checkpoint) -> list[TensorSpec]:
    """List the tensors shard by shard, in the order of their data: the cheapest to read."""
    return sorted(source.tensors.values(), key=lambda spec: (spec.shard, spec.start))
