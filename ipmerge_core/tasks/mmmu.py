"""MMMU validation: 900 questions of college level in 30 subjects, with up to seven pictures each.

The prompt is that of lmms-eval: the question, its options as lines "A. text", and the request for
the letter, or for a word or phrase. The official scorer compares by rules as well, but guesses a
random letter where it finds none; here such a reply is wrong. Source: Yue et al., CVPR 2024,
arXiv 2311.16502.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from typing import Any

from ipmerge_core.errors import RunError
from ipmerge_core.tasks.items import (
    AnswerKind,
    Draw,
    Item,
    ItemSet,
    Picture,
    Task,
    as_text,
    letter_of,
    unknown_part,
)
from ipmerge_core.tasks.numerals import quantities
from ipmerge_core.tasks.own_data import LETTER_PROMPT, pictures_of
from ipmerge_core.tasks.reply_text import plain
from ipmerge_core.tasks.rows import DatasetName, all_rows

NAME, SPLIT = "mmmu", "validation"
DATASET = "lmms-lab-encoder/MMMU"
_OPEN_PROMPT = "Answer the question using a single word or phrase."
_TOKENS = 1024
_LONGEST_OPTIONS = 50_000  # characters
_PLACE = re.compile(r"<image ([1-7])>")
_SUBJECT = re.compile(r"[a-z]+_(.+)_[0-9]+")


def mmmu_task(part: str = "", source: str = "") -> Task:
    """Return MMMU validation.

    Args:
        part: "".
        source: a folder with a copy in the data set's layout, or another hub id.

    Raises: RunError for any part.
    """
    if part:
        raise unknown_part(NAME, part, ["no part: subjects are its skills"])
    name = DatasetName(source or DATASET, None, SPLIT)
    return Task(
        name=f"{NAME}@{source}" if source else NAME,
        label=f"MMMU {SPLIT}",
        group="other",
        source=f"data set {name}",
        prompt="pictures, question, options, request for the letter or for a word or phrase",
        max_new_tokens=_TOKENS,
        load=functools.partial(_load, name),
        unofficial="The official scorer guesses a letter where it finds none; here it is wrong.",
    )


def _load(name: DatasetName, draw: Draw) -> ItemSet:
    rows = all_rows(name)
    ids = [as_text(rows[index].get("id")) or str(index) for index in range(len(rows))]
    return draw.convert(range(len(rows)), ids, lambda index, name: _item(rows[index], name))


def _item(row: Mapping[str, Any], name: str) -> Item:
    """Convert a row. Raises: RunError if it cannot be evaluated."""
    question = as_text(row.get("question"))
    answers = tuple(filter(None, map(as_text, _literal(row.get("answer")))))
    if not question or not answers or answers == ("?",):
        raise RunError(f"The row has no {'question' if not question else 'reference answer'}.")
    choices: tuple[str, ...] = ()
    kind: AnswerKind
    if as_text(row.get("question_type")) == "multiple-choice":
        choices = tuple(map(as_text, _literal(row.get("options"))))
        letters = [letter_of(index) for index in range(len(choices))]
        if answers[0] not in letters:
            raise RunError(
                f"The reference {answers[0][:80]!r} is none of its {len(choices)} choices."
            )
        lines = "\n".join(
            f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)
        )
        kind, text = "choice", f"{question}\n{lines}\n\n{LETTER_PROMPT}"
    else:
        is_number = all(len(quantities(plain(answer))) == 1 for answer in answers)
        kind, text = "number" if is_number else "text", f"{question}\n\n{_OPEN_PROMPT}"
    subject = _SUBJECT.fullmatch(name)
    return Item(
        id=name,
        question=text,
        answers=answers,
        kind=kind,
        pictures=_pictures(row, text),
        choices=choices,
        skill=subject[1].replace("_", " ") if subject else "",
        shown=question,
    )


def _pictures(row: Mapping[str, Any], text: str) -> tuple[Picture, ...]:
    """Return the pictures that a prompt mentions, in the order of their numbers."""
    numbers = sorted(set(_PLACE.findall(text)))
    return tuple(
        picture for number in numbers for picture in pictures_of(row.get(f"image_{number}"))
    )


def _literal(value: Any) -> list[Any]:  # noqa: ANN401
    """Return a list that the data set stores as a string; another value alone.

    Raises: RunError if the string starts like a list and is not one.

    >>> _literal("['red', 'blue']"), _literal("42")
    (['red', 'blue'], ['42'])
    """
    text = as_text(value)
    if not text.startswith("["):
        return [text]
    if len(text) > _LONGEST_OPTIONS:
        raise RunError(f"Its options have {len(text)} characters; at most {_LONGEST_OPTIONS}.")
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise RunError(f"Its options are not a list: {text[:80]!r}.") from error
    return found if isinstance(found, list) else [found]
