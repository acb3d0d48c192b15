"""Write a merged model folder safely: resumable, verified, and renamed when complete.

In: the checkpoint whose layout is kept (names, order, shapes, dtypes, shard files) and the bytes of
its tensors. Out: a folder that appears under its final name only when complete. Until then all data
is in `OUT.partial`, whose shard files have a suffix that no loader accepts, and a journal entry
with a checksum follows each tensor, so that a run killed at any time can be resumed. Existing files
are never overwritten or deleted. A folder that cannot be replaced, such as a mount point, is filled
from a working folder inside it. Data is not explicitly flushed, as with `cp`: after a power loss
the checksums in the journal and the SHA-256 in the manifest show what reached the disk. SHA-256 is
slow, so it is computed once, on the data read back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from filelock import FileLock, Timeout
from xxhash import xxh3_128

from ipmerge_core.errors import CheckpointError, RunError
from ipmerge_core.models.checkpoint import Checkpoint, TensorSpec
from ipmerge_core.models.files import LocalFiles
from ipmerge_core.models.run_records import (
    Note,
    journal_entries,
    read_note,
    recorded_run,
)
from ipmerge_core.runtime.atomic import is_temporary, move_contents, write_whole, writing
from ipmerge_core.runtime.descriptors import Descriptors
from ipmerge_core.runtime.input_files import EntryName, Schema
from ipmerge_core.runtime.paths import is_fixed, output_folder, resolve_path

_PARTIAL = ".partial"
_INSIDE = "ipmerge" + _PARTIAL  # the working folder in an output folder that cannot be replaced
_CHECKSUM = "xxh3_128"  # a key of `run_records.JournalEntry`
_NOTE = ".note.json"
_RUN = "run.json"
MANIFEST = "ipmerge.json"
_REPLACED = {"README.md", MANIFEST, ".gitattributes"}
_COPY_STEP = 1 << 20
_MOVING = "moving"  # the note with the names of the files that are moved out of the working folder
_KEPT = "finished tensors are kept"
_NAMES = Schema[tuple[EntryName, ...]](tuple[EntryName, ...])


T = TypeVar("T")


class RunFolders(NamedTuple):
    """The folders of a run: final output, working folder, and the model inside it."""

    out: Path
    run: Path
    model: Path


def run_folders(out: str | Path) -> RunFolders:
    """Return the folders that a run for `out` uses: those of an unfinished run, if any."""
    final = resolve_path(out)
    inside, next_to = final / _INSIDE, final.parent / (final.name + _PARTIAL)
    if inside.is_dir() or (is_fixed(final) and not next_to.is_dir()):
        return RunFolders(final, inside, inside / "model")
    return RunFolders(final, next_to, next_to / "model")


class CheckpointWriter:
    """Writes tensors into the layout of `source` at `out`; use as a context manager.

    Several processes can write one model: rank 0 creates and finishes the folder, the others join
    while rank 0 is inside its `with` block.

    Args:
        source: the checkpoint whose files, names, order and dtypes the result keeps.
        out: the output folder; it must not exist or must be empty.
        run: identifies the work (plan and sources); only the same work is resumed.
        resume: continue an unfinished run of the same work; otherwise start over.
        rank: the rank of this process.

    Raises:
        CheckpointError: `out` exists and is not empty.
        RunError: another run is writing there, or an unfinished run of other work exists there.
    """

    def __init__(
        self, source: Checkpoint, out: str | Path, run: str, *, resume: bool, rank: int = 0
    ) -> None:
        self.source, self.run, self.rank = source, run, rank
        self.place = run_folders(check_output(out))
        self._resume = resume
        self._descriptors = Descriptors(self._open_shard)
        self._started: set[str] = set()  # shards whose header and length this process has written
        self._open_tensor: tuple[str, xxh3_128] | None = None
        self.done: dict[str, str] = {}  # tensor name -> checksum of the written bytes
        self.hashes: dict[str, str] = {}  # tensor name -> SHA-256 of the bytes read back
        self.copied: dict[str, str] = {}  # other files -> SHA-256 of the bytes copied

    def __enter__(self) -> Self:
        """Lock the folder and find the tensors finished by an earlier run of the same work."""
        self._headers = {shard: self.source.read_header(shard) for shard in self.source.shards}
        with writing(self.place.run, _KEPT):
            if self.rank == 0:
                self._lead()
            self._journal = self._journal_path(self.rank).open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; unfinished work stays in the partial folder for a resume."""
        self._journal.close()
        self._descriptors.close()
        if self.rank == 0:
            self._lock.release()

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Write the bytes of one tensor, then its journal entry."""
        self.write_piece(name, 0, data)

    def write_piece(self, name: str, offset: int, data: bytes | bytearray) -> None:
        """Write bytes of a tensor at `offset`; the pieces of a tensor must be written in order.

        The last piece is followed by the tensor's journal entry.
        """
        spec = self.source.spec(name)
        if offset == 0:
            self._open_tensor = name, xxh3_128()
        assert self._open_tensor is not None
        expected, digest = self._open_tensor
        assert name == expected, f"{name}: a piece while {expected} is being written"
        assert offset + len(data) <= spec.nbytes, f"{name}: a piece beyond its place"
        with writing(self.place.run, _KEPT):
            with self._descriptors.use(spec.shard) as descriptor:
                _write_at(descriptor, spec.start + offset, data)
            digest.update(data)
            if offset + len(data) == spec.nbytes:
                entry = {"tensor": name, _CHECKSUM: digest.hexdigest()}
                self._journal.write(json.dumps(entry) + "\n")
                self._journal.flush()
                self.done[name] = entry[_CHECKSUM]

    def note(self, name: str, content: object) -> None:
        """Store a JSON value with the run until it is finished."""
        text = json.dumps(content)
        note = Note(content=text, xxh3_128=xxh3_128(text.encode()).hexdigest())
        write_whole(self.place.run / f"{name}{_NOTE}", json.dumps(asdict(note)), _KEPT)

    def noted(self, name: str, schema: Schema[T]) -> T | None:
        """Return a value that `note` stored in this run; None if it is absent or damaged."""
        return read_note(self.place.run / f"{name}{_NOTE}", schema)

    def audit(self, names: Iterable[str], threads: int = 1) -> None:
        """Read written tensors back from disk, verify their checksums, and hash them.

        Raises: RunError naming the first that differs.
        """
        names = list(names)
        with ThreadPoolExecutor(threads) as pool:
            for name, found in zip(names, pool.map(self._read_back, names), strict=True):
                checksum, self.hashes[name] = found
                if checksum != self.done[name]:
                    raise RunError(
                        f"'{name}' read back from '{self.place.run}' differs from what was "
                        f"written. The disk is faulty, or another program changed the file. Check "
                        f"the disk, delete that folder and run again."
                    )

    def _read_back(self, name: str) -> tuple[str, str]:
        checksum, sha256 = xxh3_128(), hashlib.sha256()
        for piece in self._pieces(self.source.spec(name)):
            checksum.update(piece)
            sha256.update(piece)
        return checksum.hexdigest(), sha256.hexdigest()

    def finish(
        self,
        documents: Callable[[], Mapping[str, str]],
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the model's other files, add documents, verify the headers, rename the folder.

        `documents` is called when everything else is written, and `check` after it, before the
        rename.

        Raises: RunError if the headers on disk differ from those of the source.
        """
        missing = [name for name in self.source.tensors if name not in self.done]
        assert not missing, f"{len(missing)} tensors were never written: {missing[:3]}"
        model = self.place.model
        with writing(self.place.run, _KEPT):
            for name in files_to_copy(self.source):
                self._copy_file(name)
            for shard in self.source.shards:
                with self._descriptors.use(shard):
                    pass  # a shard without tensors has a header too
            self._audit_headers()
            for name, text in documents().items():
                (model / name).write_text(text, encoding="utf-8")
            check()
            for shard in self.source.shards:
                (model / (shard + _PARTIAL)).replace(model / self.source.weights.saved_as(shard))
            self._place_model()
            _remove(self.place)

    def _place_model(self) -> None:
        """Rename the complete model to the output folder, or move its files into it."""
        model, out, run = self.place.model, self.place.out, self.place.run
        if run.parent != out:
            model.replace(out)
            return
        self.note(_MOVING, sorted(path.name for path in model.iterdir()))
        move_contents(model, out)

    def discard(self) -> None:
        """Remove the partial folder, after errors that a resume cannot fix."""
        _remove(self.place)

    def _lead(self) -> None:
        run = self.place.run
        run.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(run / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"Another run is writing to '{self.place.out}'. Wait for it, cancel it, or "
                f"choose another output folder."
            ) from error
        try:
            check_output(self.place.out)  # again, now that no other process can finish it
            self._take_over()
            self.place.model.mkdir(exist_ok=True)
        except BaseException:
            self._lock.release()
            raise

    def _take_over(self) -> None:
        run = self.place.run
        record = run / _RUN
        if record.exists():
            self._undo_moves()
            if self._resume:
                check_unfinished(self.place.out, self.run)
                self._undo_renames()
                self.done = self._verified()
                return
            shutil.rmtree(self.place.model, ignore_errors=True)
            for old in [*self._journals(), *run.glob(f"*{_NOTE}*")]:
                old.unlink()
        elif any(not (entry.name == "lock" or is_temporary(entry)) for entry in run.iterdir()):
            raise CheckpointError(
                f"'{run}' exists and was not created by a merge. Choose another output folder."
            )
        write_whole(record, json.dumps({"run": self.run}))

    def _undo_moves(self) -> None:
        """Move files back that a killed run had already moved to the output folder."""
        moved = [self.place.out / name for name in self.noted(_MOVING, _NAMES) or ()]
        for path in filter(os.path.lexists, moved):
            self.place.model.mkdir(exist_ok=True)
            path.replace(self.place.model / path.name)

    def _undo_renames(self) -> None:
        """Restore the partial names of shards that a killed run had already renamed."""
        for shard in self.source.shards:
            final = self.place.model / self.source.weights.saved_as(shard)
            if final.exists():
                final.replace(self.place.model / (shard + _PARTIAL))

    def _verified(self) -> dict[str, str]:
        """Return the journalled tensors whose bytes on disk match the recorded checksum."""
        done: dict[str, str] = {}
        for entry in journal_entries(self._journals()):
            spec = self.source.tensors.get(entry.tensor)
            if spec is None or not (self.place.model / (spec.shard + _PARTIAL)).exists():
                continue
            checksum = xxh3_128()
            for piece in self._pieces(spec):
                checksum.update(piece)
            if checksum.hexdigest() == entry.xxh3_128:
                done[spec.name] = entry.xxh3_128
        return done

    def _pieces(self, spec: TensorSpec) -> Iterator[memoryview]:
        """Read a tensor's bytes on disk in pieces, reusing one buffer."""
        memory = memoryview(bytearray(_COPY_STEP))
        with self._descriptors.use(spec.shard) as descriptor:
            for start in range(spec.start, spec.stop, _COPY_STEP):
                piece = memory[: min(_COPY_STEP, spec.stop - start)]
                yield piece[: os.preadv(descriptor, [piece], start)]

    def _audit_headers(self) -> None:
        """Open the result as a checkpoint with partial names and compare its headers."""
        written = Checkpoint(_PartialFiles(self.place.model))
        if written.tensors != self.source.tensors or written.shards != self.source.shards:
            raise RunError(
                f"The headers in '{self.place.run}' differ from those of '{self.source.id}'. "
                f"Delete that folder and run again."
            )

    def _copy_file(self, name: str) -> None:
        size, sha256 = self.source.files.size(name), hashlib.sha256()
        path = self.place.model / name
        path.parent.mkdir(exist_ok=True)  # a subfolder
        with path.open("wb") as target:
            for start in range(0, size, _COPY_STEP):
                piece = self.source.files.read(name, start, min(start + _COPY_STEP, size))
                sha256.update(piece)
                target.write(piece)
        self.copied[name] = sha256.hexdigest()

    def _journal_path(self, rank: int) -> Path:
        return self.place.run / f"journal-{rank}.jsonl"

    def _journals(self) -> list[Path]:
        return sorted(self.place.run.glob("journal-*.jsonl"))

    def _open_shard(self, shard: str) -> int:
        """Open a shard file, creating it with its header and full length on first use."""
        path = self.place.model / (shard + _PARTIAL)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        if shard not in self._started:
            try:
                os.truncate(descriptor, self.source.files.size(shard))
                _write_at(descriptor, 0, self._headers[shard])
            except BaseException:
                os.close(descriptor)
                raise
            self._started.add(shard)
        return descriptor


class _PartialFiles(LocalFiles):
    """A model folder whose shards still have the partial suffix."""

    def names(self) -> list[str]:
        """List the files under their final names."""
        return sorted(name.removesuffix(_PARTIAL) for name in super().names())

    def size(self, name: str) -> int:
        """Size of one file in bytes."""
        return super().size(self._stored(name))

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        """Fill `memory` with the bytes of one file from `start` on."""
        super().read_into(memory, self._stored(name), start)

    def _stored(self, name: str) -> str:
        return name + _PARTIAL if (self.folder / (name + _PARTIAL)).exists() else name


def check_output(out: str | Path) -> Path:
    """Return the resolved path of the output folder, before any work.

    Raises:
        CheckpointError: it exists and is not empty, or is a file.
        RunError: it cannot be created or written to, or its name is too long.
    """
    path = resolve_path(out)
    if path.is_file():
        raise CheckpointError(f"The output '{path}' is a file. Expected the path of a new folder.")
    output_folder(path, suffix=_PARTIAL)
    own = {_INSIDE, *(read_note(path / _INSIDE / f"{_MOVING}{_NOTE}", _NAMES) or ())}
    if path.is_dir() and any(entry.name not in own for entry in path.iterdir()):
        raise CheckpointError(
            f"The output folder '{path}' exists and is not empty. Choose another, or empty it."
        )
    return path


def check_unfinished(out: str | Path, run: str) -> None:
    """Check that an unfinished run for `out`, if any, is of the same work.

    Raises: RunError for an unfinished run of another plan.
    """
    place = run_folders(out)
    if (place.run / _RUN).exists() and (found := recorded_run(place.run / _RUN)) != run:
        raise RunError(
            f"'{place.run}' contains an unfinished merge of another plan ({str(found)[:8]}, not "
            f"{run[:8]}). Finish it with that plan, delete the folder, or choose another output "
            f"folder."
        )


def tidy_finished(out: str | Path) -> None:
    """Remove what a run leaves next to the complete model in `out` if it is killed at its end."""
    place = run_folders(out)
    if (place.run / _RUN).is_file() and not place.model.exists():
        with writing(place.run, _KEPT), contextlib.suppress(FileNotFoundError):
            _remove(place)  # every process of a distributed run may do so


def files_to_copy(source: Checkpoint) -> list[str]:
    """List the files copied unchanged into a merged model: all but weights and model card.

    Of the indexes only the one in use is copied. Python files are copied if the config refers to
    them (`auto_map`), as users who trust the model need them to load it. They are never executed.
    """
    code = "auto_map" in source.config
    return [
        name
        for name in source.files.names()
        if source.weights.is_copied(name)
        and name not in _REPLACED
        and (code or not name.endswith(".py"))
    ]


def layout_bytes(source: Checkpoint) -> int:
    """Return the size of a merged model on disk in bytes."""
    shards = sum(source.files.size(shard) for shard in source.shards)
    return shards + sum(source.files.size(name) for name in files_to_copy(source))


def in_file_order(source: Checkpoint) -> list[TensorSpec]:
    """List the tensors by shard and offset, which is the fastest order to read."""
    return sorted(source.tensors.values(), key=lambda spec: (spec.shard, spec.start, spec.stop))


def _remove(place: RunFolders) -> None:
    """Remove a run's folder, its record last, so that an interrupted removal is detected."""
    if place.model.exists():
        shutil.rmtree(place.model)
    for entry in sorted(place.run.iterdir(), key=lambda path: path.name == _RUN):
        entry.unlink()
    place.run.rmdir()


def _write_at(descriptor: int, offset: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
