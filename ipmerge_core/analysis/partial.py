"""The journal of an unfinished pack: a file that grows by one line per matrix.

In: the pack's metadata, then the records of one matrix at a time. Out: the records that a resumed
analysis reuses, and a partial pack for monitoring. The first line identifies the contents; a line
truncated by a kill is ignored. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ipmerge_core.analysis.records import Analysis, LayerRecord, check_records
from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.atomic import write_whole, writing
from ipmerge_core.runtime.input_files import (
    CLOSED,
    MEGABYTE,
    Count,
    FileKind,
    InvalidContentError,
    Name,
    Schema,
)

_FORMAT = "ipmerge-journal"
JOURNAL = FileKind(
    "the journal of an analysis",
    "Delete it to start the analysis again.",
    PlanError,
    largest=128 * MEGABYTE,
)
SUFFIX = ".journal"  # of the journal, after the name of its pack


def journal_of(pack: Path) -> Path:
    """Return the path of the journal of an unfinished pack."""
    return pack.with_name(pack.name + SUFFIX)


class PendingMatrix(NamedTuple):
    """One matrix of an analysis and its cost, m n min(m, n)."""

    layer: Count
    module: Name
    cost: Count


class Unfinished(NamedTuple):
    """Contents of a journal: the pack's metadata, all places, and records from one matrix on.

    `n_done` counts matrices; `records` omits those of the matrices that the reader already knows.
    """

    pack: dict[str, Any]
    places: list[PendingMatrix]
    n_done: int
    records: list[dict[str, Any]]

    @property
    def share(self) -> float:
        """Finished share of the work, by cost."""
        done = sum(place.cost for place in self.places[: self.n_done])
        return done / max(sum(place.cost for place in self.places), 1)


@dataclass(frozen=True)
class _Head:
    """The first line of a journal. `pack` is the metadata of the pack, without records."""

    __pydantic_config__ = CLOSED

    format: Literal["ipmerge-journal"]
    identity: Name
    pack: dict[str, Any]
    places: list[PendingMatrix]


_HEAD, _RECORDS = Schema[_Head](_Head), Schema[list[LayerRecord]](list[LayerRecord])


def read_journal(path: Path, known: int = 0) -> Unfinished:
    """Read a journal without the records of its first `known` matrices.

    Raises: PlanError if there is no journal, or it is empty or damaged.
    """
    head, lines = _read(path)
    if head is None:
        raise PlanError(f"The analysis '{path.name}' has not started, or was discarded.")
    records = [record for line in lines[known:] for record in _records(path, line)]
    return Unfinished(
        pack=head.pack,
        places=head.places,
        n_done=len(lines),
        records=[record.to_dict() for record in records],
    )


class Journal:
    """Appends records to a journal; records of the same identity are reused."""

    def __init__(
        self, path: Path, identity: str, pack: Mapping[str, Any], places: Sequence[PendingMatrix]
    ) -> None:
        self.path, self.records = path, dict[str, list[LayerRecord]]()
        head, lines = _read(path)
        lines = lines if head is not None and head.identity == identity else []
        experts = len(pack["sources"]["math"])
        for line in lines:
            records = _records(path, line)
            if len(records) != experts:
                raise JOURNAL.refusal(
                    path, f"a line has {len(records)} records; expected one for each of {experts}"
                )
            self.records[records[0].name] = records
        new = {"format": _FORMAT, "identity": identity, "pack": pack, "places": list(places)}
        # A kill in mid-write must not cost the lines.
        write_whole(path, "\n".join([json.dumps(new), *lines]) + "\n")

    def append(self, records: Sequence[LayerRecord]) -> None:
        """Append the records of one matrix, one per expert."""
        line = json.dumps([record.to_dict() for record in records])
        with (
            writing(self.path, "finished matrices are kept"),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(line + "\n")


def _read(path: Path) -> tuple[_Head | None, list[str]]:
    """Return the first line, None if there is none, and the complete lines after it.

    Raises: PlanError for a file that is not a journal.
    """
    if not os.path.exists(path):  # noqa: PTH110 (False for a name that is too long)
        return None, []
    try:
        text = JOURNAL.read(path).decode()
    except UnicodeDecodeError as error:
        raise JOURNAL.refusal(path, f"byte {error.start} is not valid UTF-8") from error
    first, *rest = text.split("\n")
    if not text:
        return None, []  # reserves the name of a pack
    head = JOURNAL.validate(_HEAD, JOURNAL.parse(first, path), path)
    try:
        Analysis.from_dict({**head.pack, "records": []})
    except InvalidContentError as error:
        raise JOURNAL.refusal(path, error) from error
    return head, _whole(rest)


def _whole(lines: Sequence[str]) -> list[str]:
    """Drop the part after the last line feed: a line truncated by a kill, or being written."""
    return list(lines[:-1])


def _records(path: Path, line: str) -> list[LayerRecord]:
    """Read the records of one matrix, one per expert. Raises: PlanError."""
    records = JOURNAL.validate(_RECORDS, JOURNAL.parse(line, path), path)
    if not records:
        raise JOURNAL.refusal(path, "a line has no records")
    try:
        check_records(records, len(records))
    except InvalidContentError as error:
        raise JOURNAL.refusal(path, error) from error
    return records
