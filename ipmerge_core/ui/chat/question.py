"""Describe a question and the models to ask, in memory and for another process.

In: what a visitor asks. Out: the conversation of every column, and a packed form of plain values:
small enough to be sent to the process that is lent a GPU, which loads the models itself.
"""

from __future__ import annotations

import io
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.ui.chat.columns import BASE, PLAN
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.finished_merges import Keys

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.inference.prompts import Message
    from ipmerge_core.inference.sampling import GenerationSettings


class Question(NamedTuple):
    """A question and the models to ask.

    `columns` are the values of the columns, see `columns`. `before` are the earlier messages of
    each column, beginning with the system prompt; empty if there are none.
    """

    chosen: ChosenMerge
    text: str
    images: tuple[Image, ...]
    settings: GenerationSettings
    columns: tuple[str, ...] = (BASE, PLAN)
    keys: Keys = MappingProxyType({})
    before: tuple[tuple[Message, ...], ...] = ()

    @property
    def pack_id(self) -> str:
        """The pair."""
        return self.chosen.pack_id

    def messages(self) -> list[list[Message]]:
        """Return the conversation of every column; equal ones are one list, encoded once."""
        from ipmerge_core.inference.prompts import Message

        asked = Message("user", self.text, self.images)
        known: dict[tuple[tuple[str, str], ...], list[Message]] = {}
        found = []
        for column in range(len(self.columns)):
            before = self.before[column] if self.before else ()
            key = tuple((message.role, message.text) for message in before)
            found.append(known.setdefault(key, [*before, asked]))
        return found


class PackedMessage(NamedTuple):
    """A message whose images are the bytes of PNG files."""

    role: Any
    text: str
    images: tuple[bytes, ...]


class PackedQuestion(NamedTuple):
    """A question of plain values: strings, numbers and bytes."""

    chosen: ChosenMerge
    settings: GenerationSettings
    columns: tuple[str, ...]
    keys: dict[str, str]
    asked: PackedMessage
    before: tuple[tuple[PackedMessage, ...], ...]

    def unpack(self) -> Question:
        """Return the question in the process that answers it."""
        from ipmerge_core.inference.prompts import Message

        def read(packed: PackedMessage) -> Message:
            return Message(packed.role, packed.text, tuple(map(_read_image, packed.images)))

        asked = read(self.asked)
        before = tuple(tuple(map(read, column)) for column in self.before)
        return Question(
            self.chosen, asked.text, asked.images, self.settings, self.columns, self.keys, before
        )


def pack_question(asked: Question) -> PackedQuestion:
    """Pack a question for another process."""

    def pack(message: Message) -> PackedMessage:
        return PackedMessage(message.role, message.text, tuple(map(_png, message.images)))

    before = tuple(tuple(map(pack, column)) for column in asked.before)
    question = PackedMessage("user", asked.text, tuple(map(_png, asked.images)))
    keys = dict(asked.keys)
    return PackedQuestion(asked.chosen, asked.settings, asked.columns, keys, question, before)


def _png(image: Image) -> bytes:
    """Encode an image without loss, fast rather than small."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _read_image(data: bytes) -> Image:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return image.convert("RGB")
