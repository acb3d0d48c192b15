"""Store the replies of models, so that no item is answered twice.

In: the replies of one model to the items of one task. Out: the same after a restart, from a journal
per model content, task and settings: JSON lines, appended after every batch. A line that a kill has
truncated is skipped, and its item is answered again. Replies are stored as decoded and judged
when they are read, so that a change of the rules needs no model. Several processes may append.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.atomic import write_whole, writing
from ipmerge_core.runtime.host import home_folder
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    Count,
    InvalidContentError,
    Magnitude,
    Schema,
    parse_json,
    read_bounded,
)

_LONGEST_LINE = 4 * MEGABYTE
_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Reply:
    """What a model has answered to one item.

    Attributes:
        item: the key of the item.
        text: the decoded reply.
        tokens: new tokens, the one that ends the reply included.
        cut: whether the token limit ended the reply.
        seconds: of generation, its share of the batch.
    """

    item: Annotated[str, Field(max_length=64)]
    text: str
    tokens: Count
    cut: bool
    seconds: Magnitude = 0.0


_REPLY = Schema[Reply](Reply)
_FACTS: Schema[dict[str, Any]] = Schema(dict[str, Any])


class ReplyStore:
    """Journals of replies in a folder; by default `evaluations` in the home folder."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = home_folder() / "evaluations" if folder is None else Path(folder)

    def __repr__(self) -> str:
        """Return the folder."""
        return f"ReplyStore({str(self.folder)!r})"

    def journal(self, subject: str, task: str, settings: dict[str, Any]) -> Journal:
        """Return the journal of a model's replies: `subject` is the key of its content.

        The name of a task does not select a journal but names it: an item has the same key in a
        task and in its parts, so that their replies are shared if `task` is the whole task.
        """
        content = json.dumps([subject, task, settings], sort_keys=True)
        name = hashlib.sha256(content.encode()).hexdigest()[:40]
        return Journal(self.folder / name[:2] / f"{name}{_SUFFIX}")


class Journal:
    """The replies of one model to the items of one task with the same settings."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Reply]:
        """Return the stored replies by item; the last of an item counts.

        Raises: RunError if the file exists and cannot be read.
        """
        found: dict[str, Reply] = {}
        try:
            with self.path.open("rb") as file:
                while line := file.readline(_LONGEST_LINE + 1):
                    if reply := _parsed(line):
                        found[reply.item] = reply
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RunError(
                f"Cannot read the stored replies '{self.path}': {error.strerror}. Choose another "
                f"folder for them."
            ) from error
        return found

    def append(self, replies: Iterable[Reply]) -> None:
        """Write replies in one call, so that those of several processes do not mix.

        Raises: RunError if the disk is full or read-only.
        """
        lines = [json.dumps(asdict(reply)).encode() + b"\n" for reply in replies]
        with writing(self.path, "the replies so far are kept"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if self._is_truncated():
                    lines.insert(0, b"\n")
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Store how the replies were made, such as the class of the image processor."""
        with writing(self._facts):
            self._facts.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._facts, json.dumps(facts, indent=1))

    def read_facts(self) -> dict[str, Any]:
        """Return how the replies were made; empty if that is not known."""
        try:
            return _FACTS.validate(parse_json(read_bounded(self._facts, MEGABYTE), MEGABYTE))
        except (FileNotFoundError, InvalidContentError):
            return {}

    @property
    def _facts(self) -> Path:
        return self.path.with_suffix(".facts.json")

    def _is_truncated(self) -> bool:
        """Whether the last line has no end, as after a kill."""
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


def _parsed(line: bytes) -> Reply | None:
    """Return the reply of a line; None for a damaged one."""
    try:
        return _REPLY.validate(parse_json(line, _LONGEST_LINE))
    except InvalidContentError:
        return None
