"""Read rows of questions: lines of a jsonl file, and rows of a data set of the datasets library.

In: a path, or the name of a data set on the hub or in a folder. Out: lines with their numbers, or
rows as dictionaries. Pictures of data sets stay undecoded (`bytes` and `path`), so that a broken
one affects its row only. The datasets library is optional, and imported when one is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.errors import RunError, explained, first_line
from ipmerge_core.runtime.input_files import MEGABYTE

DATASETS = "datasets:"
LONGEST_LINE = 16 * MEGABYTE
COLUMNS = {  # common names of columns, the usual one first
    "question": ("question", "problem", "instruction", "prompt", "query"),
    "answer": ("answer", "solution", "output", "response"),
    "image": ("image", "images", "picture", "decoded_image"),
    "choices": ("choices", "options"),
}


class DatasetName(NamedTuple):
    """A data set on the hub or in a folder, its configuration and its split."""

    path: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, name: str) -> DatasetName:
        """Read NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.

        >>> DatasetName.parse("org/maths:main:test")
        DatasetName(path='org/maths', config='main', split='test')
        """
        path, *rest = name.split(":")
        return cls(path, rest[0] if len(rest) > 1 else None, rest[-1] if rest else "train")

    def __str__(self) -> str:
        """Return the name that `parse` reads."""
        return ":".join(filter(None, (self.path, self.config, self.split)))


def jsonl_lines(path: Path, what: str, limit: int, expected: str) -> Iterator[tuple[int, bytes]]:
    """Yield at most `limit` non-empty lines with their numbers; later ones are not read.

    Args:
        path: the file.
        what: its content in messages, such as "calibration samples".
        limit: maximum number of lines.
        expected: the sentence that ends messages.

    Raises: RunError if the file cannot be read or a line is too long.
    """
    number = found = 0
    try:
        with path.open("rb") as file:
            while found < limit and (line := file.readline(LONGEST_LINE + 1)):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise RunError(
                        f"Line {number} of '{path}' has more than {LONGEST_LINE} bytes. Expected "
                        f"one JSON object per line."
                    )
                if line.strip():
                    found += 1
                    yield number, line
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot read the {what} '{path}' ({error}). {expected}") from error


def first_rows(name: DatasetName, limit: int) -> list[dict[str, Any]]:
    """Stream the first rows of a data set, with decoded pictures. Raises: RunError."""
    library = _library(name)
    with explained(lambda error: _unreadable(name, error)):
        stream = library.load_dataset(name.path, name.config, split=name.split, streaming=True)
        rows = list(stream.take(limit))
    if not rows:
        raise RunError(f"The dataset '{name}' has no rows.")
    return rows


def all_rows(name: DatasetName) -> Sequence[Mapping[str, Any]]:
    """Download a split of a data set, and return its rows with undecoded pictures.

    Raises: RunError if the library is missing, or the data set is not available.
    """
    library = _library(name)
    with explained(lambda error: _unreadable(name, error)):
        rows = library.load_dataset(name.path, name.config, split=name.split)
        undecoded = library.Image(decode=False)
        for column, feature in rows.features.items():
            if isinstance(feature, library.Image):
                rows = rows.cast_column(column, undecoded)
            elif isinstance(getattr(feature, "feature", None), library.Image):
                rows = rows.cast_column(column, library.List(undecoded))
    if not len(rows):
        raise RunError(f"The dataset '{name}' has no rows.")
    found: Sequence[Mapping[str, Any]] = rows
    return found


def column_of(names: Sequence[str], kind: str) -> str | None:
    """Return the column that has the questions, the answers, the images or the choices."""
    return next((name for name in COLUMNS[kind] if name in names), None)


def no_question(name: object, columns: Sequence[str]) -> RunError:
    """Return the error for a data set whose questions are not found."""
    return RunError(
        f"The dataset '{name}' has the columns {', '.join(columns)}, but none of "
        f"{', '.join(COLUMNS['question'])}. Write its samples to a jsonl file."
    )


def _library(name: DatasetName) -> Any:  # noqa: ANN401 (an optional library)
    try:
        import datasets
    except ImportError as error:
        raise RunError(
            f"Reading the dataset '{name}' requires the datasets library, which is not installed. "
            f"Install it with `pip install datasets`, or write the samples to a jsonl file."
        ) from error
    return datasets


def _unreadable(name: DatasetName, error: Exception) -> RunError:
    return RunError(
        f"Cannot read the dataset '{name}' ({first_line(error)}). Is there a network, or has it "
        f"been downloaded before? Expected NAME, NAME:SPLIT or NAME:CONFIG:SPLIT of the hub, or a "
        f"folder in the data set's layout."
    )
