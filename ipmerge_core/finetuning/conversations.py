"""Read training data: conversations about an image, from a jsonl file, a dataset, or the demo.

In: a jsonl file with one conversation per line, as `messages` (role, content), `conversations`
(from, value) or `question` and `answer`, each with `image` or `images` (paths relative to the
file); `datasets:NAME`; or `demo`, the built-in problems with their chains of thought. Out:
`Conversation`s, and the number of rows that were skipped, by reason. Images are opened on access,
as any untrusted image. A file of another program may have a byte order mark, NaN, or a key twice.
"""

from __future__ import annotations

import codecs
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ipmerge_core.calibration.samples import DEMO, is_demo
from ipmerge_core.errors import RunError
from ipmerge_core.inference.images import open_image
from ipmerge_core.runtime.input_files import MEGABYTE, InvalidContentError, parse_json
from ipmerge_core.runtime.paths import input_file
from ipmerge_core.tasks.demo import MATH_TASKS, Task, problems
from ipmerge_core.tasks.demo_items import PARTS
from ipmerge_core.tasks.rows import COLUMNS, DATASETS, DatasetName, all_rows

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_ROWS = 1_000_000
MOST_TURNS = 200  # each answer is encoded after all turns before it
_LONGEST_LINE = 16 * MEGABYTE
_PLACEHOLDER = "<image>"  # of an image inside a text, removed: the chat template adds its own
_EXPECTED = "Expected a jsonl file, datasets:NAME[:CONFIG]:SPLIT, or demo."
NO_IMAGE, NO_ANSWER = "no image", "no answer"
MISSING_IMAGE, NO_QUESTION = "the image file is missing", "no question"
SEVERAL_IMAGES, BAD_ROLES = "several images", "roles do not alternate"
MANY_TURNS, NO_UNICODE = f"more than {MOST_TURNS} turns", "text that is not valid Unicode"
Role: TypeAlias = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}


class Turn(NamedTuple):
    """One message without its image."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Alternating turns that end with an answer; `picture` belongs to the first user turn."""

    turns: tuple[Turn, ...]
    picture: Any = field(compare=False)  # a path, the bytes of a file, or an image

    @property
    def image(self) -> Image:
        """The opened image. Raises: RunError if it is not an image."""
        picture = self.picture
        if isinstance(picture, bytes):
            picture = BytesIO(picture)
        if isinstance(picture, Path | BytesIO):
            return open_image(picture)
        found: Image = picture
        return found

    @property
    def where(self) -> str:
        """The place of its image, for messages."""
        is_file = isinstance(self.picture, Path)
        return f"'{self.picture}'" if is_file else "an image of a dataset"

    @property
    def identity(self) -> str:
        """What distinguishes it from others: its turns, and the name and size of its image."""
        if isinstance(self.picture, Path):
            image = f"{self.picture.name} {_size_of(self.picture)}"
        else:
            known = isinstance(self.picture, bytes)
            image = str(len(self.picture) if known else self.picture.size)
        return repr((*self.turns, image))


@dataclass(frozen=True)
class Rows:
    """The usable conversations of a source, and the others counted by reason."""

    conversations: tuple[Conversation, ...]
    skipped: Mapping[str, int]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the conversations in their order, wherever their files are."""
        digest = hashlib.sha256()
        for conversation in self.conversations:
            digest.update(conversation.identity.encode("utf-8", "backslashreplace") + b"\n")
        return digest.hexdigest()

    def describe(self) -> str:
        """Describe both numbers, such as "40 conversations, 2 rows skipped (2 no image)"."""
        text = f"{len(self.conversations)} conversations"
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            text += f", {sum(self.skipped.values())} rows skipped ({reasons})"
        return text


def load_conversations(source: str | Path, limit: int | None = None) -> Rows:
    """Load the first `limit` rows of a source; unusable ones are skipped and counted.

    Args:
        source: a path, "datasets:NAME:SPLIT", "demo" (math problems with their chain of thought) or
            "demo:TASKS" with tasks of `PARTS`.
        limit: number of rows; by default all, for the demo 512.

    Raises: RunError if the source cannot be read, contains an invalid line, or no usable row.
    """
    if limit is not None and not (type(limit) is int and 1 <= limit <= MOST_ROWS):
        raise RunError(f"Got a limit of {limit!s:.80} rows; expected 1 to {MOST_ROWS}.")
    if is_demo(source):
        return Rows(tuple(_demo(str(source), 512 if limit is None else limit)), {})
    if str(source).startswith(DATASETS):
        found_rows = all_rows(DatasetName.parse(str(source).removeprefix(DATASETS)))
        rows: Iterable[tuple[Mapping[str, Any], Path | None]]
        rows = ((row, None) for row in islice(found_rows, limit))
    else:
        rows = _lines(source, limit)
    found, skipped = list[Conversation](), Counter[str]()
    for number, (row, folder) in enumerate(rows):
        if number == MOST_ROWS:
            raise RunError(f"'{source}' has more than {MOST_ROWS} rows. Use a limit.")
        result = read_row(row, folder)
        if isinstance(result, str):
            skipped[result] += 1
        else:
            found.append(result)
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"
        raise RunError(
            f"'{source}' has no usable conversation; rows skipped: {reasons}. Expected an image, a "
            f"question and an answer in each row."
        )
    return Rows(tuple(found), dict(skipped))


def read_row(row: Mapping[str, Any], folder: Path | None = None) -> Conversation | str:
    """Return the conversation of a row, or the reason why it cannot be used.

    >>> row = {"question": "<image> 6 * 4?", "answer": "6*4=24.", "image": b""}
    >>> read_row(row)
    'no image'
    >>> read_row({**row, "image": "a.png"}).turns[0]
    Turn(role='user', text='6 * 4?')
    """
    pictures = _pictures(row)
    if not pictures:
        return NO_IMAGE
    if len(pictures) > 1:
        return SEVERAL_IMAGES
    turns = list(_turns(row))
    if reason := _fault(turns):
        return reason
    picture = pictures[0]
    if isinstance(picture, str):
        picture = Path(picture) if folder is None else folder / picture
        if folder is not None and _size_of(picture) is None:
            return MISSING_IMAGE
    return Conversation(tuple(turns), picture)


def _fault(turns: list[Turn]) -> str:
    """Return why turns are no question and answer; empty if they are."""
    if len(turns) > MOST_TURNS:
        return MANY_TURNS
    if any("\ud800" <= char <= "\udfff" for turn in turns for char in turn.text):
        return NO_UNICODE
    spoken = [turn for turn in turns if turn.role != "system"]
    roles = [turn.role for turn in spoken]
    if not any(turn.role == "user" and turn.text for turn in spoken):
        return NO_QUESTION
    if not spoken or spoken[-1].role != "assistant" or not spoken[-1].text:
        return NO_ANSWER
    alternates = roles == ["user", "assistant"] * (len(roles) // 2)
    begins = all(turn.role != "system" for turn in turns[1:])
    return "" if alternates and begins and all(turn.text for turn in spoken) else BAD_ROLES


def _turns(row: Mapping[str, Any]) -> Iterator[Turn]:
    """Yield the turns of a row in any of the three forms; unknown roles end the conversation."""
    listed = row.get("messages") or row.get("conversations")
    if isinstance(listed, list):
        for message in listed:
            known = message if isinstance(message, Mapping) else {}
            found = _ROLES.get(str(known.get("role", known.get("from", ""))))
            if found is None:
                return
            yield _turn(found, known.get("content", known.get("value", "")))
        return
    roles: tuple[tuple[str, Role], ...] = (("question", "user"), ("answer", "assistant"))
    for kind, role in roles:
        value = next((row[name] for name in COLUMNS[kind] if name in row), "")
        yield _turn(role, value)


def _turn(role: Role, content: object) -> Turn:
    """Return a turn from a string or a list of parts; a question without image placeholders."""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, Mapping)]
        content = "".join(str(part.get("text", "")) for part in parts)
    text = content if isinstance(content, str) else ""
    text = text.replace(_PLACEHOLDER, "") if role == "user" else text
    return Turn(role, text.strip())


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    """Return the images of a row: paths, bytes of files, or opened images."""
    found = [row[name] for name in COLUMNS["image"] if row.get(name)]
    listed = [each for value in found for each in (value if isinstance(value, list) else [value])]
    files = [_undecoded(each) if isinstance(each, Mapping) else each for each in listed]
    return [each for each in files if isinstance(each, str | bytes) or hasattr(each, "convert")]


def _undecoded(image: Mapping[str, Any]) -> object:
    """Return the bytes of an image of a data set, or the path of its file."""
    content = image.get("bytes")
    return content if isinstance(content, bytes) else image.get("path")


def _size_of(path: Path) -> int | None:
    """Return the size of a file; None if there is none, whatever its name contains."""
    try:
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def _lines(source: str | Path, limit: int | None) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """Yield the rows of a jsonl file with the folder of their images."""
    try:
        path = input_file(source, "training data")
    except RunError as error:
        raise RunError(f"{error} {_EXPECTED}") from error
    number = found = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                if found == limit:
                    return
                found += 1
                yield _object(path, number, line), path.parent
    except OSError as error:
        raise RunError(f"Cannot read '{path}' ({error.strerror}). {_EXPECTED}") from error


def _object(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        row = parse_json(line, _LONGEST_LINE, foreign=True)
        if not isinstance(row, Mapping):
            raise InvalidContentError("it is not an object")
    except InvalidContentError as error:
        raise RunError(
            f"Line {number} of '{path}' is invalid: {error}. Expected one JSON object per line, "
            f'such as {{"image": "a.png", "question": "...", "answer": "..."}}.'
        ) from error
    return row


def _demo(source: str, limit: int) -> Iterator[Conversation]:
    """Generate training problems, alternating between tasks, answered by their chain of thought."""
    names = [] if source == DEMO else source.removeprefix(f"{DEMO}:").split(",")
    unknown = next((name for name in names if name.strip() not in PARTS), None)
    if unknown is not None:
        raise RunError(
            f"Unknown demo task '{unknown}' in '{source}'. Available: {', '.join(PARTS)}."
        )
    chosen: tuple[Task, ...] = MATH_TASKS
    if names:
        chosen = tuple(dict.fromkeys(t for name in names for t in PARTS[name.strip()]))
    each = -(-limit // len(chosen))
    turns = zip(*(problems(task, each, seed=4, split="train") for task in chosen), strict=True)
    for problem in [problem for turn in turns for problem in turn][:limit]:
        answer = f"{problem.worked or problem.answer}."
        turn = (Turn("user", problem.question), Turn("assistant", answer))
        yield Conversation(turn, problem.image)
