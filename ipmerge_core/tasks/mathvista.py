"""MathVista testmini: 1000 questions about pictures, mathematical (540) and general (460).

The prompt is the data set's own column `query` (the "solution" format: a hint, the question, its
choices), zero-shot. The official score extracts answers with a language model; here rules do, so
that it is not the official number. Source: Lu et al., ICLR 2024, arXiv 2310.02255.
"""

from __future__ import annotations

import functools
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
from ipmerge_core.tasks.own_data import pictures_of
from ipmerge_core.tasks.rows import DatasetName, all_rows

NAME, SPLIT = "mathvista", "testmini"
DATASET = "AI4Math/MathVista"
PARTS = {"math": "math-targeted-vqa", "general": "general-vqa"}  # by metadata.category
_TOKENS = 1024
_KINDS: dict[str, AnswerKind] = {
    "integer": "number",
    "float": "number",
    "list": "list",
    "text": "text",
}


def mathvista_task(part: str = "", source: str = "") -> Task:
    """Return MathVista testmini, or its math or general questions.

    Args:
        part: "", "math" or "general".
        source: a folder with a copy in the data set's layout, or another hub id.

    Raises: RunError for another part.
    """
    if part and part not in PARTS:
        raise unknown_part(NAME, part, list(PARTS))
    name = DatasetName(source or DATASET, None, SPLIT)
    place = f"@{source}" if source else ""
    return Task(
        name=f"{NAME}:{part}{place}" if part else f"{NAME}{place}",
        label=f"MathVista {SPLIT}, {part}" if part else f"MathVista {SPLIT}",
        group={"math": "math", "general": "perception"}.get(part, "other"),  # type: ignore[arg-type]
        source=f"data set {name}",
        prompt="query of the data set (solution format, zero-shot)",
        max_new_tokens=_TOKENS,
        load=functools.partial(_load, name, PARTS.get(part)),
        guard=f"{NAME}:general{place}",
        unofficial="The official scorer extracts answers with a language model, this one by rules.",
    )


def _load(name: DatasetName, category: str | None, draw: Draw) -> ItemSet:
    rows = all_rows(name)
    wanted = [
        index
        for index in range(len(rows))
        if category in (None, _metadata(rows[index], "category"))
    ]
    ids = [as_text(rows[index].get("pid")) or str(index) for index in wanted]
    return draw.convert(wanted, ids, lambda index, name: _item(rows[index], name))


def _metadata(row: Mapping[str, Any], name: str) -> str:
    metadata = row.get("metadata")
    return as_text(metadata.get(name)) if isinstance(metadata, Mapping) else ""


def _item(row: Mapping[str, Any], pid: str) -> Item:
    """Convert a row. Raises: RunError if it has no question or no answer."""
    question, answer = as_text(row.get("query")), as_text(row.get("answer"))
    if not question or not answer:
        raise RunError(f"The row has no {'question' if not question else 'reference answer'}.")
    choices = tuple(as_text(choice) for choice in row.get("choices") or ())
    kind = _KINDS.get(as_text(row.get("answer_type")), "text")
    if as_text(row.get("question_type")) == "multi_choice":
        kind = "choice"
        if answer not in choices:
            raise RunError(f"The reference {answer[:80]!r} is none of its {len(choices)} choices.")
        answer = letter_of(choices.index(answer))
    precision = row.get("precision")
    return Item(
        id=pid,
        question=question,
        answers=(answer,),
        kind=kind,
        pictures=pictures_of(row.get("decoded_image")),
        choices=choices,
        skill=_metadata(row, "task"),
        group="math" if _metadata(row, "category") == PARTS["math"] else "perception",
        precision=int(precision) if isinstance(precision, int | float) else None,
        shown=as_text(row.get("question")),
    )
