"""Read and write the results of sweeps and knock-outs as JSON files.

In: a frozen dataclass of plain values. Out: a file with its format and version, and the same object
again. Files come from other machines too, so that they are validated like any input.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    FileKind,
    InvalidContentError,
    Schema,
    versioned,
)

VERSION = 1
LARGEST = 512 * MEGABYTE


class ResultFile:
    """Base of results with a file format; subclasses are frozen dataclasses."""

    FORMAT: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"format": self.FORMAT, "version": VERSION, **asdict(self)}  # type: ignore[call-overload]

    def save(self, path: str | Path) -> None:
        """Write the result as JSON. Raises: RunError if the disk is full or read-only."""
        write_whole(path, json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result. Raises: RunError if the file is not one of this format and version."""
        kind = FileKind(
            f"a result ({cls.FORMAT})", "Run the evaluation again.", RunError, largest=LARGEST
        )
        content = kind.content(path)
        try:
            _, fields = versioned(content, cls.FORMAT, (VERSION,))
            return Schema[Self](cls).validate(fields)
        except InvalidContentError as error:
            raise kind.refusal(path, error) from error
