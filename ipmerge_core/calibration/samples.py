"""Load calibration samples: a question, its answer and optionally an image.

In: a jsonl file with `question`, `answer` and, for a vision-language model, `image` (a path
relative to the file) on each line; `datasets:NAME`, loaded with the datasets library; or `demo`,
the demo problems, with `demo:perception` and the like for some of their tasks. Out: frozen
`Sample`s; images are opened on access. Loads no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import RunError
from ipmerge_core.inference.images import open_image
from ipmerge_core.runtime.input_files import (
    InvalidContentError,
    Location,
    Schema,
    parse_json,
)
from ipmerge_core.runtime.paths import input_file
from ipmerge_core.tasks.demo import MATH_TASKS, TASKS, Task, problems
from ipmerge_core.tasks.demo_items import PARTS
from ipmerge_core.tasks.rows import (
    DATASETS,
    LONGEST_LINE,
    DatasetName,
    column_of,
    first_rows,
    jsonl_lines,
    no_question,
)

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO = "demo"
_EXPECTED = "Expected a jsonl file, datasets:NAME, or demo."
MOST_SAMPLES = 5_000  # of one model; drawn ones are held in memory


@dataclass(frozen=True)
class Sample:
    """One example. `picture` is a path or an image."""

    question: str
    answer: str
    picture: Any = None

    @property
    def image(self) -> Image | None:
        """The opened image. Raises: RunError if it is not an image."""
        if isinstance(self.picture, Path):
            return open_image(self.picture)
        image: Image | None = self.picture
        return image

    def key(self) -> bytes:
        """Bytes that identify the sample by its content, wherever its picture is stored.

        Raises: RunError if the picture cannot be read.
        """
        return repr((self.question, self.answer, self._picture_key())).encode()

    def _picture_key(self) -> tuple[object, ...]:
        picture = self.picture
        if picture is None:
            return ()
        if not isinstance(picture, Path):
            return picture.mode, picture.size, picture.tobytes()
        try:
            return (hashlib.sha256(picture.read_bytes()).hexdigest(),)
        except OSError as error:
            raise RunError(
                f"Cannot read the picture '{picture}' of a calibration sample ({error.strerror}). "
                f"Correct its path in the samples file."
            ) from error


def digest(samples: Sequence[Sample]) -> str:
    """Return the SHA-256 over all samples in order."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(hashlib.sha256(sample.key()).digest())
    return whole.hexdigest()


def load_samples(source: str | Path, limit: int, *, takes_images: bool) -> list[Sample]:
    """Load at most `limit` samples from a file or dataset, or generate demo problems.

    Args:
        source: a path; "datasets:NAME", "datasets:NAME:SPLIT" or "datasets:NAME:CONFIG:SPLIT" for
            a dataset on the hub or in a folder; "demo": drawings of all tasks for a vision-language
            model, math problems as text otherwise; or "demo:TASKS" with comma-separated tasks of
            `PARTS`: "demo:perception", "demo:sides,area".
        limit: maximum number, up to MOST_SAMPLES; the first ones are used.
        takes_images: whether the samples are for a vision-language model.

    Raises:
        RunError: the file does not exist, contains an invalid line or no samples, or a task is
            unknown.
    """
    check_limit(limit)
    if is_demo(source):
        return _demo(
            _demo_tasks(str(source), takes_images=takes_images), limit, takes_images=takes_images
        )
    if str(source).startswith(DATASETS):
        return _from_dataset(str(source).removeprefix(DATASETS), limit, takes_images=takes_images)
    return _from_file(source, limit)


def check_source(source: str | Path, limit: int, *, takes_images: bool) -> None:
    """Check a source without drawing or downloading samples: of a file only the first line is read.

    Args and Raises: as for `load_samples`.
    """
    check_limit(limit)
    if is_demo(source):
        _demo_tasks(str(source), takes_images=takes_images)
    elif not str(source).startswith(DATASETS):
        _from_file(source, 1)


def check_limit(limit: int) -> None:
    """Check a number of samples. Raises: RunError."""
    if not 1 <= limit <= MOST_SAMPLES:
        raise RunError(f"Got a limit of {limit} calibration samples; expected 1 to {MOST_SAMPLES}.")


def _from_file(source: str | Path, limit: int) -> list[Sample]:
    """Read the first samples of a jsonl file; later lines are not read."""
    try:
        path = input_file(source, "calibration samples")
    except RunError as error:
        raise RunError(f"{error} {_EXPECTED}") from error
    samples = [
        _parse(path, number, line)
        for number, line in jsonl_lines(path, "calibration samples", limit, _EXPECTED)
    ]
    if not samples:
        raise RunError(f"'{path}' contains no samples. Expected one JSON object per line.")
    return samples


def is_demo(source: str | Path) -> bool:
    """Return whether a source refers to demo problems, which are generated instead of read."""
    return str(source) == DEMO or str(source).startswith(f"{DEMO}:")


@dataclass(frozen=True)
class _Line:
    """One line of a jsonl file; other fields are ignored."""

    question: str
    answer: str = ""
    image: Location | None = None


_LINE = Schema[_Line](_Line)


def _parse(path: Path, number: int, line: bytes) -> Sample:
    try:
        entry = _LINE.validate(parse_json(line, LONGEST_LINE))
    except InvalidContentError as error:
        raise RunError(
            f"Line {number} of '{path}' is invalid: {error}. Expected "
            f'{{"question": "...", "answer": "...", "image": "picture.png"}}, image optional.'
        ) from error
    return Sample(entry.question, entry.answer, path.parent / entry.image if entry.image else None)


def _from_dataset(name: str, limit: int, *, takes_images: bool) -> list[Sample]:
    """Stream the first rows of a dataset; common column names are recognised."""
    source = DatasetName.parse(name)
    rows = first_rows(source, limit)
    columns = {kind: column_of(list(rows[0]), kind) for kind in ("question", "answer", "image")}
    if columns["question"] is None:
        raise no_question(name, list(rows[0]))
    samples = []
    for row in rows:
        picture = row.get(columns["image"] or "") if takes_images else None
        picture = picture[0] if isinstance(picture, list) and picture else picture or None
        answer = str(row.get(columns["answer"] or "", ""))
        samples.append(Sample(str(row[columns["question"]]), answer, picture))
    return samples


def _demo_tasks(source: str, *, takes_images: bool) -> tuple[Task, ...]:
    if source == DEMO:
        return TASKS if takes_images else MATH_TASKS
    names = [name.strip() for name in source.removeprefix(f"{DEMO}:").split(",")]
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None:
        raise RunError(
            f"Unknown demo task '{unknown}' in the samples '{source}'. Expected demo, or demo: and "
            f"one or more of {', '.join(PARTS)}, comma-separated."
        )
    return tuple(dict.fromkeys(task for name in names for task in PARTS[name]))


def _demo(tasks: tuple[Task, ...], limit: int, *, takes_images: bool) -> list[Sample]:
    """Generate problems of the training split, alternating between tasks."""
    each = -(-limit // len(tasks))
    turns = zip(*(problems(task, each, seed=1, split="train") for task in tasks), strict=True)
    found = [problem for turn in turns for problem in turn][:limit]
    if takes_images:
        return [Sample(problem.question, problem.answer, problem.image) for problem in found]
    return [
        Sample(f"{problem.words}\n{problem.question}", problem.worked or problem.answer)
        for problem in found
    ]
