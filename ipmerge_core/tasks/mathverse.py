"""MathVerse testmini: 788 problems in five versions, from most text to the picture alone.

The prompt is the data set's own column `query_wo`. The official score uses a language model to
extract and to compare; here rules do, so that it is not the official number.
Source: Zhang et al., ECCV 2024, arXiv 2403.14624.
"""

from __future__ import annotations

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
    Task,
    as_text,
    letter_of,
    unknown_part,
)
from ipmerge_core.tasks.numerals import quantities
from ipmerge_core.tasks.own_data import pictures_of
from ipmerge_core.tasks.reply_text import plain
from ipmerge_core.tasks.rows import DatasetName, all_rows

NAME, SPLIT = "mathverse", "testmini"
DATASET, CONFIG = "CaraJ/MathVerse-lmmseval", "testmini"
VERSIONS = {
    "text_dominant": "Text Dominant",
    "text_lite": "Text Lite",
    "vision_intensive": "Vision Intensive",
    "vision_dominant": "Vision Dominant",
    "vision_only": "Vision Only",
}
_TOKENS = 1024
_CHOICE = re.compile(r"^\s*([A-H])\s*[:.)]\s*(.*?)\s*$", re.MULTILINE)


def mathverse_task(part: str = "", source: str = "") -> Task:
    """Return all five versions of MathVerse testmini, or one of them.

    Args:
        part: "" or a key of `VERSIONS`.
        source: a folder with a copy in the data set's layout, or another hub id.

    Raises: RunError for another part.
    """
    if part and part not in VERSIONS:
        raise unknown_part(NAME, part, list(VERSIONS))
    name = DatasetName(source or DATASET, CONFIG, SPLIT)
    place = f"@{source}" if source else ""
    return Task(
        name=f"{NAME}:{part}{place}" if part else f"{NAME}{place}",
        label=f"MathVerse {SPLIT}, {VERSIONS[part].lower()}" if part else f"MathVerse {SPLIT}",
        group="math",
        source=f"data set {name}",
        prompt="query_wo of the data set",
        max_new_tokens=_TOKENS,
        load=functools.partial(_load, name, VERSIONS.get(part)),
        guard="mathvista:general",
        unofficial="The official scorer judges with a language model, this one by rules.",
    )


def _load(name: DatasetName, version: str | None, draw: Draw) -> ItemSet:
    rows = all_rows(name)
    wanted = [
        index
        for index in range(len(rows))
        if version in (None, as_text(rows[index].get("problem_version")))
    ]
    ids = [as_text(rows[index].get("sample_index")) or str(index) for index in wanted]
    return draw.convert(wanted, ids, lambda index, name: _item(rows[index], name))


def _item(row: Mapping[str, Any], sample: str) -> Item:
    """Convert a row. Raises: RunError if it has no question or no answer."""
    question, answer = as_text(row.get("query_wo")), as_text(row.get("answer"))
    if not question or not answer:
        raise RunError(f"The row has no {'question' if not question else 'reference answer'}.")
    choices: tuple[str, ...] = ()
    kind: AnswerKind = "text"
    if as_text(row.get("question_type")) == "multi-choice":
        kind = "choice"
        choices = _choices(as_text(row.get("question_for_eval")) or question)
        if answer.upper() not in [letter_of(index) for index in range(len(choices))]:
            raise RunError(f"The reference {answer[:80]!r} is none of its {len(choices)} choices.")
    elif len(quantities(plain(answer))) == 1 and not re.search(r"[a-zA-Z]{2}|[=(]", plain(answer)):
        kind = "number"
    return Item(
        id=sample,
        question=question,
        answers=(answer,),
        kind=kind,
        pictures=pictures_of(row.get("image")),
        choices=choices,
        skill=as_text(row.get("problem_version")),
        group="math",
        shown=as_text(row.get("question")) or question,
    )


def _choices(text: str) -> tuple[str, ...]:
    r"""Return the choices A, B, C, ... at the line starts of a question.

    >>> _choices("Find x.\nChoices:\nA:2\nB:3")
    ('2', '3')
    """
    found: list[str] = []
    for letter, content in _CHOICE.findall(text.replace("Choices:", "Choices:\n")):
        if letter == letter_of(len(found)):
            found.append(content)
    return tuple(found)
