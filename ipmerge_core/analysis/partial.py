"""The journal of an unfinished pack: a file that grows by one line per matrix.

In: the pack's metadata, then the records of one matrix at a time. Out: the records that a resumed
analysis reuses, and a partial pack for monitoring. The first line identifies the contents; a line
truncated by a kill is ignored. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.analysis.records import LayerRecord
from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.atomic import write_whole, writing

_FORMAT = "ipmerge-journal"
SUFFIX = ".journal"  # of the journal, after the name of its pack


def journal_of(pack: Path) -> Path:
    """Return the path of the journal of an unfinished pack."""
    return pack.with_name(pack.name + SUFFIX)


class PendingMatrix(NamedTuple):
    """One matrix of an analysis and its cost, m n min(m, n)."""

    layer: int
    module: str
    cost: int


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


def read_journal(path: Path, known: int = 0) -> Unfinished:
    """Read a journal without the records of its first `known` matrices.

    Raises: PlanError if there is no journal, or it is empty.
    """
    head, lines = _read(path)
    if not head:
        raise PlanError(f"The analysis '{path.name}' has not started, or was discarded.")
    return Unfinished(
        pack=head["pack"],
        places=[PendingMatrix(*place) for place in head["places"]],
        n_done=len(lines),
        records=[record for line in lines[known:] for record in json.loads(line)],
    )


class Journal:
    """Appends records to a journal; records of the same identity are reused."""

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
        """Append the records of one matrix, one per expert."""
        line = json.dumps([record.to_dict() for record in records])
        with (
            writing(self.path, "finished matrices are kept"),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(line + "\n")


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the content of the first line, and the complete lines after it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        head = json.loads(lines[0])
    except (OSError, ValueError, IndexError):
        return {}, []
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        return {}, []
    return head, _whole(lines[1:])


def _whole(lines: Sequence[str]) -> list[str]:
    """Drop an incomplete line: only the last one can be, after a kill or during a write."""
    try:
        json.loads(lines[-1] if lines else "[]")
    except ValueError:
        return list(lines[:-1])
    return list(lines)
