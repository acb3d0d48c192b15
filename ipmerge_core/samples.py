"""Calibration samples: a question, its answer, perhaps an image; from a file or the demo problems.

In: a jsonl file with `question`, `answer` and, for a model with eyes, `image` (a path beside the
file) on each line, or the word `demo`. Out: frozen `Sample`s; images are opened when asked for.
Loads no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import RunError
from ipmerge_core.evaluate.demo import MATH_TASKS, TASKS, problems
from ipmerge_core.inference import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO = "demo"


@dataclass(frozen=True)
class Sample:
    """One example. `picture` is a path, or a drawing that exists already."""

    question: str
    answer: str
    picture: Any = None

    @property
    def image(self) -> Image | None:
        """The picture, opened. Raises: RunError when it is none."""
        if isinstance(self.picture, Path):
            return open_image(self.picture)
        image: Image | None = self.picture
        return image

    def key(self) -> bytes:
        """Bytes that are the same for the same sample."""
        picture = self.picture
        seen = str(picture) if isinstance(picture, Path) else picture and picture.tobytes()
        return repr((self.question, self.answer, seen)).encode()


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over all samples in their order."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(hashlib.sha256(sample.key()).digest())
    return whole.hexdigest()


def load_samples(source: str | Path, limit: int, *, sees: bool) -> list[Sample]:
    """Read at most `limit` samples from a jsonl file, or make that many demo problems.

    Args:
        source: a path, or "demo": drawings for a model that sees, the same in words otherwise.
        limit: how many; the first ones are taken.
        sees: whether the samples are for a vision-language model.

    Raises:
        RunError: no such file, a line that is no sample, or no sample at all.
    """
    if limit < 1:
        raise RunError(f"Asked for {limit} calibration samples; expected 1 or more.")
    if str(source) == DEMO:
        return _demo(limit, sees=sees)
    path = Path(source).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"Cannot read the calibration samples '{path}' ({error}). Give a jsonl file, or the "
            f"word demo."
        ) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    samples = [_parse(path, number, line) for number, line in numbered[:limit]]
    if not samples:
        raise RunError(f"'{path}' holds no samples. Write one JSON object on each line.")
    return samples


def _parse(path: Path, number: int, line: str) -> Sample:
    try:
        entry = json.loads(line)
        question, answer = entry["question"], entry.get("answer", "")
        picture = entry.get("image")
        if not all(isinstance(text, str) for text in (question, answer, picture or "")):
            raise TypeError("question, answer and image must be texts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"Line {number} of '{path}' is no sample ({type(error).__name__}: {error}). Expected "
            f'{{"question": "...", "answer": "...", "image": "picture.png"}}, the image optional.'
        ) from error
    return Sample(question, answer, path.parent / picture if picture else None)


def _demo(limit: int, *, sees: bool) -> list[Sample]:
    """Problems of the training split, task by task in turn."""
    tasks = TASKS if sees else MATH_TASKS
    each = -(-limit // len(tasks))
    turns = zip(*(problems(task, each, seed=1, split="train") for task in tasks), strict=True)
    found = [problem for turn in turns for problem in turn][:limit]
    if sees:
        return [Sample(problem.question, problem.answer, problem.image) for problem in found]
    return [Sample(f"{problem.words}\n{problem.question}", problem.worked) for problem in found]
