"""A pack while it is being made: a file that grows by one line a matrix.

In: what a pack says before its records, then the records of one matrix after the other. Out: the
records that an interrupted analysis finds again, and, for whoever watches, the pack as far as it
has come. The first line says what the file is of; a line that a kill cut short counts as not
written. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.analysis.records import LayerRecord
from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.atomic import write_whole

_FORMAT = "ipmerge-journal"


def journal_of(pack: Path) -> Path:
    """Where the records of a pack stand until it is whole."""
    return pack.with_name(pack.name + ".journal")


class PendingMatrix(NamedTuple):
    """One matrix that an analysis will come to, and its cost, m n min(m, n)."""

    layer: int
    module: str
    cost: int


class Unfinished(NamedTuple):
    """What a journal holds: the pack without its records, all places, and the records from one on.

    `n_done` counts matrices; `records` leaves out those of the matrices that a watcher knows.
    """

    pack: dict[str, Any]
    places: list[PendingMatrix]
    n_done: int
    records: list[dict[str, Any]]

    @property
    def share(self) -> float:
        """How much of the work is done, by cost."""
        done = sum(place.cost for place in self.places[: self.n_done])
        return done / max(sum(place.cost for place in self.places), 1)


def read_journal(path: Path, known: int = 0) -> Unfinished:
    """Read a journal, without the records of its first `known` matrices.

    Raises: PlanError where there is none, or none that has begun.
    """
    head, lines = _read(path)
    if not head:
        raise PlanError(f"The analysis '{path.name}' has not begun, or was discarded.")
    return Unfinished(
        pack=head["pack"],
        places=[PendingMatrix(*place) for place in head["places"]],
        n_done=len(lines),
        records=[record for line in lines[known:] for record in json.loads(line)],
    )


class Journal:
    """The writing side: records found again for the same identity, and appended as they come."""

    def __init__(
        self, path: Path, identity: str, pack: Mapping[str, Any], places: Sequence[PendingMatrix]
    ) -> None:
        self.path, self.records = path, dict[str, list[LayerRecord]]()
        head, lines = _read(path)
        lines = lines if head.get("identity") == identity else []
        for line in lines:
            records = [LayerRecord.from_dict(record) for record in json.loads(line)]
            self.records[records[0].name] = records
        new = {"format": _FORMAT, "identity": identity, "pack": pack, "places": list(places)}
        # A kill in mid-write must not cost the lines.
        write_whole(path, "\n".join([json.dumps(new), *lines]) + "\n")

    def append(self, records: Sequence[LayerRecord]) -> None:
        """Add the records of one matrix, one for each expert."""
        line = json.dumps([record.to_dict() for record in records])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the first line's content, and the whole lines after it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        head = json.loads(lines[0])
    except (OSError, ValueError, IndexError):
        return {}, []
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        return {}, []
    return head, _whole(lines[1:])


def _whole(lines: Sequence[str]) -> list[str]:
    """Leave out what is not whole: only the last line can be cut short, by a kill or a reader."""
    try:
        json.loads(lines[-1] if lines else "[]")
    except ValueError:
        return list(lines[:-1])
    return list(lines)
