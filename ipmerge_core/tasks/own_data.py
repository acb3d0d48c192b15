"""Tasks from the user's own data: a jsonl file, or any data set with questions and answers.

In: `jsonl:FILE` with `question`, `answer` and optionally `image`, `choices`, `kind`, `skill`,
`group`, `precision` and `id` on each line, or `datasets:NAME:CONFIG:SPLIT`. Out: a `Task`. A line
or row that cannot be used is a fault with its number; the others are evaluated.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.input_files import InvalidContentError, Location, Schema, parse_json
from ipmerge_core.runtime.paths import input_file
from ipmerge_core.tasks.extraction import split_list
from ipmerge_core.tasks.items import (
    MOST_ITEMS,
    AnswerKind,
    Draw,
    Group,
    Item,
    ItemSet,
    Picture,
    PictureBytes,
    PictureFile,
    Task,
    as_text,
    letter_of,
    lettered,
)
from ipmerge_core.tasks.numerals import quantities
from ipmerge_core.tasks.reply_text import plain
from ipmerge_core.tasks.rows import (
    LONGEST_LINE,
    DatasetName,
    all_rows,
    column_of,
    jsonl_lines,
    no_question,
)

JSONL = "jsonl"
DATASETS = "datasets"
LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
_EXPECTED = 'Expected lines such as {"question": "...", "answer": "...", "image": "picture.png"}.'
_PROMPT = "the question, with lettered choices and a request for the letter if there are any"
_TOKENS = 512
_GUARD = "mathvista:general"
_UNOFFICIAL = "Judged by the rules of this package."


@dataclass(frozen=True)
class _Line:
    """One line of a jsonl file; other fields are ignored."""

    question: str
    answer: str | int | float | list[str | int | float] | None = None
    image: Location | list[Location] | None = None
    choices: list[str] | None = None
    kind: str | None = None
    skill: str = ""
    group: str | None = None
    precision: int | None = None
    id: str | int | None = None


_LINE = Schema[_Line](_Line)


def jsonl_task(path: str) -> Task:
    """Return the task of a jsonl file. Raises: RunError if there is none."""
    file = input_file(path, "task")
    return _task(f"{JSONL}:{path}", Path(path).name, str(path), functools.partial(_from_file, file))


def dataset_task(name: str) -> Task:
    """Return the task of a data set."""
    parsed = DatasetName.parse(name)
    load = functools.partial(_from_dataset, parsed)
    return _task(f"{DATASETS}:{name}", str(parsed), f"data set {parsed}", load)


def _task(name: str, label: str, source: str, load: Any) -> Task:  # noqa: ANN401
    return Task(
        name=name,
        label=label,
        group="other",
        source=source,
        prompt=_PROMPT,
        max_new_tokens=_TOKENS,
        load=load,
        guard=_GUARD,
        unofficial=_UNOFFICIAL,
    )


def _from_file(path: Path, draw: Draw) -> ItemSet:
    lines = list(jsonl_lines(path, "task", MOST_ITEMS, _EXPECTED))
    names = [f"line {number}" for number, _ in lines]
    return draw.convert(
        [line for _, line in lines], names, lambda line, name: _item_of_line(path, line, name)
    )


def _item_of_line(path: Path, line: bytes, name: str) -> Item:
    """Convert a line of a jsonl file. Raises: RunError."""
    try:
        entry = _LINE.validate(parse_json(line, LONGEST_LINE))
    except InvalidContentError as error:
        raise RunError(str(error)) from error
    images = entry.image if isinstance(entry.image, list) else [entry.image]
    pictures = tuple(PictureFile(path.parent / image) for image in images if image)
    return _item(entry, str(entry.id or name), pictures)


def _from_dataset(dataset: DatasetName, draw: Draw) -> ItemSet:
    rows = all_rows(dataset)
    if column_of(list(rows[0]), "question") is None:
        raise no_question(dataset, list(rows[0]))
    names = [f"row {number}" for number in range(len(rows))]
    return draw.convert(
        range(len(rows)), names, lambda number, name: _item_of_row(rows[number], name)
    )


def _item_of_row(row: Mapping[str, Any], name: str) -> Item:
    """Convert a row of a data set with common column names. Raises: RunError."""

    def value(kind: str) -> Any:  # noqa: ANN401
        column = column_of(list(row), kind)
        return None if column is None else row[column]

    choices = value("choices")
    entry = _Line(
        question=as_text(value("question")),
        answer=value("answer"),
        choices=[as_text(each) for each in choices] if isinstance(choices, list) else None,
        skill=as_text(row.get("skill") or row.get("category")),
    )
    return _item(entry, as_text(row.get("id")) or name, pictures_of(value("image")))


def pictures_of(value: Any) -> tuple[Picture, ...]:  # noqa: ANN401
    """Return the undecoded pictures of a row: one, several or none. Raises: RunError."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(picture for each in value for picture in pictures_of(each))
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return (PictureBytes(value["bytes"]),)
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return (PictureFile(Path(value["path"])),)
    raise RunError(f"The picture is a {type(value).__name__}; expected an image.")


def _item(entry: _Line, name: str, pictures: tuple[Picture, ...]) -> Item:
    """Check an entry and convert it. Raises: RunError if it cannot be evaluated."""
    if not entry.question.strip():
        raise RunError("The question is empty.")
    given = entry.answer if isinstance(entry.answer, list) else [entry.answer]
    answers = tuple(text for each in given if (text := as_text(each)))
    if not answers:
        raise RunError("There is no reference answer.")
    choices = tuple(entry.choices or ())
    kind = _kind(entry.kind, answers, choices)
    if kind == "choice":
        answers = tuple(_letter(answer, choices) for answer in answers)
    question = entry.question
    if choices:
        question = f"{question}\n{lettered(choices)}\n{LETTER_PROMPT}"
    return Item(
        id=name,
        question=question,
        answers=answers,
        kind=kind,
        pictures=pictures,
        choices=choices,
        skill=entry.skill,
        group=_group(entry.group),
        precision=entry.precision,
        shown=entry.question,
    )


def _group(given: str | None) -> Group:
    groups: tuple[Group, ...] = get_args(Group)
    found = next((group for group in groups if group == (given or "other")), None)
    if found is None:
        raise RunError(f"The group is {str(given)[:40]!r}; expected one of {', '.join(groups)}.")
    return found


def _kind(given: str | None, answers: Sequence[str], choices: Sequence[str]) -> AnswerKind:
    """Return the kind of answer: the given one, or what the references look like."""
    kinds: tuple[AnswerKind, ...] = get_args(AnswerKind)
    if given is not None:
        found = next((kind for kind in kinds if kind == given), None)
        if found is None:
            raise RunError(f"The kind is {given[:40]!r}; expected one of {', '.join(kinds)}.")
        return found
    if choices:
        return "choice"
    if all(answer.lower() in ("yes", "no") for answer in answers):
        return "yes_no"
    if all(answer.startswith("[") and split_list(answer.strip("[]")) for answer in answers):
        return "list"
    if all(_is_number(answer) for answer in answers):
        return "number"
    return "text"


def _is_number(text: str) -> bool:
    found = quantities(plain(text))
    return len(found) == 1 and len(plain(text)) - (found[0].stop - found[0].start) <= 1


def _letter(answer: str, choices: Sequence[str]) -> str:
    """Return the letter of a reference: it is one, or the text of a choice. Raises: RunError."""
    letters = [letter_of(index) for index in range(len(choices))]
    same = [index for index, choice in enumerate(choices) if choice.strip() == answer.strip()]
    if len(same) == 1:
        return letters[same[0]]
    if answer.strip("(). ").upper() in letters:
        return answer.strip("(). ").upper()
    raise RunError(
        f"The reference {answer[:80]!r} is neither a letter of the {len(choices)} choices nor the "
        f"text of one of them."
    )
