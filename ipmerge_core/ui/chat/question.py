"""Describe a question and the models to ask, in memory and for another process.

In: what a visitor asks. Out: the conversation of every column, and a packed form of plain values:
small enough to be sent to the process that is lent a GPU, which loads the models itself.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.ui.chat.columns import BASE, PLAN
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.finished_merges import Keys
from ipmerge_core.ui.lending import PackedMessage

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
        asked = self.asked.unpack()
        before = tuple(tuple(each.unpack() for each in column) for column in self.before)
        return Question(
            self.chosen, asked.text, asked.images, self.settings, self.columns, self.keys, before
        )


def pack_question(asked: Question) -> PackedQuestion:
    """Pack a question for another process."""
    from ipmerge_core.inference.prompts import Message

    before = tuple(tuple(map(PackedMessage.of, column)) for column in asked.before)
    question = PackedMessage.of(Message("user", asked.text, asked.images))
    keys = dict(asked.keys)
    return PackedQuestion(asked.chosen, asked.settings, asked.columns, keys, question, before)
