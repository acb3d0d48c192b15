"""Tasks as data: items with pictures, a question and references, and where they come from.

A `Task` names its data, prompt format and token limit, and loads an `ItemSet`: the items of a draw,
and the faults of rows that cannot be used. Pictures are opened when a model needs them. Nothing
here runs a model or judges a reply.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from ipmerge_core.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

# How a reply is compared with the references, see `judging`. "stated" and "whole" are the rules of
# the demo problems: the number after the last `=`, or the whole reply.
AnswerKind: TypeAlias = Literal["choice", "number", "text", "yes_no", "list", "stated", "whole"]
Group: TypeAlias = Literal["math", "perception", "other"]

MOST_ITEMS = 100_000  # of one draw
LARGEST_SEED = 2**32 - 1

_T = TypeVar("_T")


class Picture(Protocol):
    """An unopened picture."""

    def key(self) -> str:
        """Return a text that identifies the pixels. Raises: RunError if they cannot be read."""
        ...

    def source(self) -> Path | io.BytesIO | Image:
        """Return what `open_image` reads, or an image of this package."""
        ...


@dataclass(frozen=True)
class PictureFile:
    """A picture in a file."""

    path: Path

    def key(self) -> str:
        """Return the SHA-256 of the file."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RunError(
                f"Cannot read the picture '{self.path}' ({reason}). Correct its path."
            ) from error

    def source(self) -> Path:
        """Return the path."""
        return self.path


@dataclass(frozen=True)
class PictureBytes:
    """A picture as the bytes of a file, as data sets store it."""

    data: bytes = field(repr=False)

    def key(self) -> str:
        """Return the SHA-256 of the bytes."""
        return hashlib.sha256(self.data).hexdigest()

    def source(self) -> io.BytesIO:
        """Return the bytes as a file."""
        return io.BytesIO(self.data)


@dataclass(frozen=True)
class Item:
    """One question with its references.

    Attributes:
        id: its name in the task, unique there.
        question: the text of the user's message, with choices and instructions.
        answers: acceptable references; a reply that matches one of them is right.
        kind: how a reply is compared with them.
        pictures: the pictures of the message, in order.
        choices: the texts of the choices A, B, C, ...; the reference of a choice is its letter.
        skill: the part of the task that it belongs to, such as "add" or "Geometry".
        group: whether it measures mathematics, perception, or something else.
        precision: decimals of a numeric reference, if the task defines them.
        shown: the question without instructions, for lists of items.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    kind: AnswerKind = "text"
    pictures: tuple[Picture, ...] = ()
    choices: tuple[str, ...] = ()
    skill: str = ""
    group: Group = "other"
    precision: int | None = None
    shown: str = ""

    @property
    def answer(self) -> str:
        """The first reference."""
        return self.answers[0]

    @property
    def is_math(self) -> bool:
        """Whether only the stated result counts, for `answers.is_right`."""
        return self.kind == "stated"

    def key(self) -> str:
        """Return a hash of what a model sees: the message and its pictures, not the references.

        Raises: RunError if a picture cannot be read.
        """
        seen = [self.question, *(picture.key() for picture in self.pictures)]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]


class Fault(NamedTuple):
    """A row of a task that cannot be evaluated, and why."""

    id: str
    reason: str


class ItemSet(NamedTuple):
    """The items of a draw, the faults among the drawn rows, and the size of the whole task."""

    items: tuple[Item, ...]
    faults: tuple[Fault, ...] = ()
    total: int | None = None  # None for a task of unlimited size


@dataclass(frozen=True)
class Draw:
    """Which items of a task are used: at most `limit`, selected by `seed`; None is the default.

    The items of a larger limit include those of a smaller one. The limit of the demo task is per
    skill, that of other tasks is in total.
    """

    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the values. Raises: RunError."""
        if self.limit is not None and not 1 <= self.limit <= MOST_ITEMS:
            raise RunError(
                f"The limit is {self.limit} items; expected an integer from 1 to {MOST_ITEMS}."
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise RunError(
                f"The seed is {self.seed}; expected an integer from 0 to {LARGEST_SEED}."
            )

    def select(self, rows: Sequence[_T], ids: Sequence[str]) -> list[_T]:
        """Return the drawn rows in their order; without a limit, all.

        Each row has a pseudo-random rank that depends on the seed and its id alone.

        >>> Draw(2, seed=1).select(["a", "b", "c"], ["1", "2", "3"])
        ['a', 'b']
        """
        if self.limit is None or self.limit >= len(rows):
            return list(rows)
        ranks = [hashlib.sha256(f"{self.seed}|{name}".encode()).digest() for name in ids]
        drawn = sorted(range(len(rows)), key=lambda index: ranks[index])[: self.limit]
        return [rows[index] for index in sorted(drawn)]

    def convert(
        self, rows: Sequence[_T], ids: Sequence[str], item_of: Callable[[_T, str], Item]
    ) -> ItemSet:
        """Convert the drawn rows; one for which `item_of` raises RunError becomes a fault.

        So does an item with the id of an earlier one.
        """
        items: dict[str, Item] = {}
        faults = []
        for row, name in self.select(list(zip(rows, ids, strict=True)), ids):
            try:
                item = item_of(row, name)
                if item.id in items:
                    raise RunError(f"Another item has the same id '{item.id[:80]}'.")
                items[item.id] = item
            except RunError as error:
                faults.append(Fault(name, str(error)))
        return ItemSet(tuple(items.values()), tuple(faults), len(rows))


@dataclass(frozen=True)
class Task:
    """A set of items and what is needed to repeat its score.

    Attributes:
        name: how it is specified, such as "mathvista:math".
        label: how it is shown.
        group: what its score measures; "other" if its items differ.
        source: the data: hub id and split, file, or "generated".
        prompt: the format of the message, for reports.
        max_new_tokens: the default token limit of a reply.
        load: loads the items of a draw. Raises: RunError if the data are not available.
        guard: the perception task whose score is shown with this one, if it measures mathematics.
        unofficial: why its score is not the number of the official scorer; empty if it is.
    """

    name: str
    label: str
    group: Group
    source: str
    prompt: str
    max_new_tokens: int
    load: Callable[[Draw], ItemSet] = field(repr=False, compare=False)
    guard: str = ""
    unofficial: str = ""


def letter_of(index: int) -> str:
    """Return the letter of a choice, counted from 0.

    >>> letter_of(0), letter_of(3)
    ('A', 'D')
    """
    return chr(ord("A") + index)


def lettered(choices: Sequence[str]) -> str:
    """Return choices as lines "(A) text".

    >>> print(lettered(["red", "blue"]))
    (A) red
    (B) blue
    """
    return "\n".join(f"({letter_of(i)}) {text}" for i, text in enumerate(choices))


def unknown_part(task: str, part: str, parts: Sequence[str]) -> RunError:
    """Return the error for a part that a task does not have."""
    return RunError(
        f"The task '{task}' has no part '{part[:80]}'. Expected '{task}', or '{task}:' and one of "
        f"{', '.join(parts)}."
    )


def as_text(value: Any) -> str:  # noqa: ANN401 (values of a data set)
    """Return a value of a row as text: numbers without a trailing `.0`, None as empty.

    >>> as_text(3.0), as_text(None), as_text(" a ")
    ('3', '', 'a')
    """
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).strip()
