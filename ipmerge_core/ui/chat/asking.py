"""Build a question and its turn from what a visitor typed, and run it.

In: the values of the prompt, the settings and the columns. Out: a `Question` with the earlier
messages of each column, a `Turn`, and the stream of its answers.
"""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.prompts import Message, check_question
from ipmerge_core.ui.chat.answers import new_sides
from ipmerge_core.ui.chat.blind import shuffled
from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.question import Question
from ipmerge_core.ui.chat.recorded import Reference, examples_for
from ipmerge_core.ui.chat.settings import ChatSettings
from ipmerge_core.ui.chat.turns import Turn, Turns, earlier_turns
from ipmerge_core.ui.pairs import pair_name

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_IMAGES = 8  # of one question
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class Typed(NamedTuple):
    """A question and the paths of its images."""

    text: str
    images: tuple[str, ...]


def read_prompt(typed: Mapping[str, Any] | None) -> Typed:
    """Read and check the prompt. Raises: RunError without a question, or with too many images."""
    typed = typed or {}
    question, files = typed.get("text") or "", [str(file) for file in typed.get("files") or []]
    others = [file for file in files if Path(file).suffix.lower() not in IMAGE_ENDINGS]
    if others:
        raise RunError(
            f"'{Path(others[0]).name}' is not an image. Remove it and add PNG, JPEG or WebP files; "
            f"a pasted text that is too long becomes such a file."
        )
    if not question and not files:
        raise RunError("The prompt is empty. Type a question; an image is optional.")
    if not question:
        raise RunError("There is an image but no question. Type a question about the image.")
    if len(files) > MOST_IMAGES:
        raise RunError(f"There are {len(files)} images; a question can have {MOST_IMAGES}.")
    return Typed(check_question(question), tuple(files))


def make_question(typed: Typed, held: Held, settings: ChatSettings, turns: Turns) -> Question:
    """Build the question. Raises: RunError for an image that cannot be read."""
    columns = held.columns
    return Question(
        held.chosen,
        typed.text,
        tuple(map(read_image, typed.images)),
        settings.generation,
        columns,
        held.keys,
        tuple(
            _before(turns, column, held.chosen.pack_id, settings) for column in range(len(columns))
        ),
    )


def new_turn(
    typed: Typed, held: Held, settings: ChatSettings, turns: Turns, given: Reference | None
) -> Turn:
    """Return a turn without answers; in blind mode its columns are shuffled."""
    columns, seed = held.columns, settings.generation.seed
    return Turn(
        question=typed.text,
        images=typed.images,
        pair=pair_name(held.chosen.pack_id),
        answers=new_sides(columns),
        reference=find_reference(typed, given, held.chosen.pack_id),
        pack_id=held.chosen.pack_id,
        system=settings.system,
        settings=settings.generation,
        order=shuffled(len(columns), seed, len(turns)) if settings.blind else (),
        blind_seed=seed if settings.blind else None,
    )


def find_reference(typed: Typed, given: Reference | None, pack_id: str) -> Reference | None:
    """Return the correct answer of a question that was filled in or is an example of the pair."""

    def asks(reference: Reference) -> bool:
        names = [Path(path).name for path in typed.images]
        return typed.text == reference.question and names == [reference.image]

    if given and asks(given):
        return given
    known = [example for example in examples_for(pack_id) if asks(example.reference)]
    return next((e.reference for e in known if _same_content(e.image, typed.images[0])), None)


def _same_content(image: Path, path: str) -> bool:
    """Whether two files are equal; examples of several pairs have pictures of the same name."""
    try:
        return filecmp.cmp(image, path, shallow=False)
    except OSError:
        return False


def read_image(path: str) -> Image:
    """Open an image of a visitor. Raises: RunError if it is gone or not an image."""
    if not Path(path).is_file():
        raise RunError(f"The image '{Path(path).name}' is no longer there. Add it again.")
    return open_image(path)


def _before(turns: Turns, column: int, pack_id: str, settings: ChatSettings) -> tuple[Message, ...]:
    """Return the system prompt and the earlier messages of a column."""
    found = [Message("system", settings.system)] if settings.system else []
    for turn in earlier_turns(turns, column, pack_id, settings.history):
        found += [
            _user_message(turn.question, turn.images),
            Message("assistant", turn.answers[column].text.strip()),
        ]
    return tuple(found)


def _user_message(text: str, images: Sequence[str]) -> Message:
    opened = [read_image(path) for path in images if Path(path).is_file()]
    return Message("user", text, tuple(opened))
