"""The encoded conversations of a run, kept in memory where they fit, and a held-out share.

In: `Rows` and an `Encoder`. Out: two `ExampleSet`s, and the rows that cannot be used, by reason.
Every conversation is encoded once before training, so that no row fails in the middle of it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.finetuning.conversations import Conversation, Rows
from ipmerge_core.finetuning.examples import Encoder, Example, Unusable

MEMORY = 1 << 30  # bytes of encoded examples that are kept


@dataclass
class ExampleSet:
    """Examples by number: kept ones are returned, others are encoded again."""

    encoder: Encoder
    conversations: list[Conversation] = field(default_factory=list)
    kept: dict[int, Example] = field(default_factory=dict)
    n_answer: int = 0
    longest: int = 0

    def add(self, conversation: Conversation, example: Example, *, keep: bool) -> None:
        """Add a conversation with its encoding, which is kept if requested."""
        if keep:
            self.kept[len(self.conversations)] = example
        self.conversations.append(conversation)
        self.n_answer += example.n_answer
        self.longest = max(self.longest, example.length)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.conversations)

    def __getitem__(self, number: int) -> Example:
        """Return one example."""
        found = self.kept.get(number)
        if found is not None:
            return found
        try:
            return self.encoder.encode(self.conversations[number])
        except Unusable as reason:
            where = self.conversations[number].where
            raise RunError(
                f"A conversation that was used before cannot be encoded again: {reason} "
                f"({where}). Restore its image, then run the same command again."
            ) from reason


class Encoded(NamedTuple):
    """A row that was encoded or skipped."""

    done: int
    total: int


class Datasets:
    """The training and held-out examples of a run, filled by `iter_encode`.

    Args:
        rows: the conversations.
        encoder: encodes them.
        held_out: share of the conversations to hold out.
        seed: determines which.
    """

    def __init__(self, rows: Rows, encoder: Encoder, held_out: float, seed: int) -> None:
        self.rows, self.encoder = rows, encoder
        self.skipped = Counter(rows.skipped)
        self.train, self.held_out = ExampleSet(encoder), ExampleSet(encoder)
        self.held_out_share = held_out
        self._held = _held_out(len(rows.conversations), held_out, seed)

    def iter_encode(self) -> Iterator[Encoded]:
        """Encode every conversation; unusable ones are counted. Raises: RunError if all are."""
        size = 0
        for number, conversation in enumerate(self.rows.conversations):
            try:
                example = self.encoder.encode(conversation)
            except Unusable as reason:
                self.skipped[str(reason)] += 1
            else:
                size += example.nbytes
                chosen = self.held_out if number in self._held else self.train
                chosen.add(conversation, example, keep=size <= MEMORY)
            yield Encoded(number + 1, len(self.rows.conversations))
        if not len(self.train):
            raise RunError(f"No conversation can be used for training: {self.describe()}.")
        if self.held_out_share and not len(self.held_out):
            raise RunError(
                f"No conversation can be held out: {self.describe()}. Use more conversations, or "
                f"hold out none."
            )

    def describe(self) -> str:
        """Describe how many conversations are used, and why others are not."""
        used = len(self.train) + len(self.held_out)
        text = f"{used} conversations ({len(self.held_out)} held out), {self.train.n_answer} tokens"
        text += f" with a loss, at most {self.train.longest} tokens each"
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            text += f"; {self.skipped.total()} rows skipped ({reasons})"
        return text


def _held_out(n: int, share: float, seed: int) -> frozenset[int]:
    """Choose the numbers to hold out: at least one if the share is positive."""
    if not share:
        return frozenset()
    count = min(max(1, round(share * n)), n - 1)
    return frozenset(random.Random(seed).sample(range(n), count))  # noqa: S311 (no secret)


def first_examples(rows: Rows, encoder: Encoder, count: int) -> Sequence[Example]:
    """Encode the first conversations that can be used, to show what is learned."""
    found: list[Example] = []
    for conversation in rows.conversations:
        if len(found) == count:
            break
        try:
            found.append(encoder.encode(conversation))
        except Unusable:
            continue
    return found
