"""Read what an interrupted merge left in its folder: the record, the journals and the notes.

In: the paths of these files, which may be truncated or damaged. Out: the identity of a run, the
journalled tensors, and noted values. What is damaged counts as absent where the work is
simply done again, and raises an error otherwise. `writer` writes these files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from xxhash import xxh3_128

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    FileKind,
    InvalidContentError,
    Schema,
    parse_json,
    read_bounded,
)

T = TypeVar("T")
_LARGEST = 128 * MEGABYTE
RUN_RECORD = FileKind(
    "a record of this merge", "Delete its folder and run again.", RunError, largest=_LARGEST
)


@dataclass(frozen=True)
class _Run:
    run: str


@dataclass(frozen=True)
class JournalEntry:
    """A line of a journal: a tensor and the checksum of its bytes."""

    tensor: str
    xxh3_128: str


@dataclass(frozen=True)
class Note:
    """A JSON value that is stored with a run, and the checksum of its text."""

    content: str
    xxh3_128: str


_NOTE = Schema[Note](Note)
_RUN = Schema[_Run](_Run)
_ENTRY = Schema[JournalEntry](JournalEntry)


def recorded_run(record: Path) -> str | None:
    """Return the run that a record identifies; None if it is damaged."""
    try:
        return _RUN.validate(parse_json(read_bounded(record, MEGABYTE), MEGABYTE)).run
    except InvalidContentError:
        return None


def read_note(path: Path, schema: Schema[T]) -> T | None:
    """Return the value of a note; None if it is absent or damaged, so it is computed again."""
    if not path.is_file():
        return None
    try:
        note = _NOTE.validate(parse_json(read_bounded(path, _LARGEST), _LARGEST))
        if xxh3_128(note.content.encode()).hexdigest() != note.xxh3_128:
            return None
        return schema.validate(parse_json(note.content, _LARGEST))
    except InvalidContentError:
        return None


def journal_entries(journals: Iterable[Path]) -> Iterator[JournalEntry]:
    """Yield the entries of journals. Damaged lines are skipped: their tensors are written again.

    Raises: RunError if a journal cannot be read.
    """
    for journal in journals:
        for line in RUN_RECORD.read(journal).split(b"\n"):
            try:
                yield _ENTRY.validate(parse_json(line, MEGABYTE))
            except InvalidContentError:  # such as a line truncated by a kill
                continue
