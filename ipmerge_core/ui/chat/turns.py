"""Hold the turns of a conversation: what was asked, all answers, and what is sent of them later.

In: questions, answers and votes. Out: frozen values that fit in gr.State, the earlier messages of a
column, and the dividers where a plan or pair changed. Pure functions: no components and no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ipmerge_core.errors import RunError
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.columns import LETTERS
from ipmerge_core.ui.chat.recorded import Example, Reference, records_of
from ipmerge_core.ui.plan_choice import PlanChoice

if TYPE_CHECKING:
    from ipmerge_core.inference.generation import GenerationSettings

MOST_TURNS = 50
LONGEST_CONVERSATION = 500_000  # characters of all questions and answers
MOST_PAST = 20  # states that Undo can restore
SHORT = 4  # hexadecimal digits of a plan's digest in a divider


class Vote(NamedTuple):
    """A preference among the answers of a turn: the positions preferred, and the reason."""

    choice: str  # "A".."D", "tie" or "both bad"
    reason: str = ""


@dataclass(frozen=True)
class Turn:
    """A question, its images, and the answers of all columns so far.

    Attributes:
        order: the column shown at each position; another order than 0, 1, ... only in blind mode.
        blind_seed: the seed of that order; None outside of blind mode.
    """

    question: str
    images: tuple[str, ...]
    pair: str  # name of the pair of models
    answers: tuple[Side, ...] = ()
    reference: Reference | None = None
    recorded: str = ""  # the date of a recorded example
    choice: PlanChoice | None = None  # the plan of a recorded example
    pack_id: str = ""
    system: str = ""
    settings: GenerationSettings | None = None
    order: tuple[int, ...] = ()
    blind_seed: int | None = None
    vote: Vote | None = None
    asked: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def is_over(self) -> bool:
        """Whether all answers are over."""
        return all(side.is_over for side in self.answers)

    @property
    def is_hidden(self) -> bool:
        """Whether the names are hidden: in blind mode until the vote."""
        return self.blind_seed is not None and self.vote is None

    def column_at(self, position: int) -> int:
        """Return the column shown at a position."""
        return self.order[position] if position < len(self.order) else position

    def at(self, position: int) -> Side | None:
        """Return the answer shown at a position; None if there is none."""
        column = self.column_at(position)
        return self.answers[column] if column < len(self.answers) else None

    def name_at(self, position: int) -> str:
        """Return the name of the answer shown at a position."""
        side = self.at(position)
        return f"Model {LETTERS[position]}" if self.is_hidden or side is None else side.name


Turns = Sequence[Turn]
Prompt: TypeAlias = Mapping[str, Any]  # the value of the prompt: text and files


class Past(NamedTuple):
    """The prompt and the turns before a change, and the prompt that the change left."""

    typed: Prompt
    turns: list[Turn]
    left: Prompt


class HistoryRule(NamedTuple):
    """Which earlier turns are sent with a question."""

    earlier: bool = True
    recorded: bool = False


def turn_of_example(example: Example) -> Turn:
    """Return a recorded example as a finished turn."""
    return Turn(
        question=example.reference.question,
        images=(str(example.image),),
        pair=example.pair,
        pack_id=example.pack_id,
        answers=(
            Side("Base", example.base_model, "finished", example.base),
            Side("Merged", example.plan, "finished", example.merged),
        ),
        reference=example.reference,
        recorded=example.recorded,
        choice=example.choice,
    )


def opening_turns(pack_id: str) -> list[Turn]:
    """Return what a conversation about a pair begins with: its first recorded example, if any."""
    return [turn_of_example(example) for example in records_of(pack_id)[:1]]


def without_records(turns: Turns, pack_id: str) -> list[Turn]:
    """Return the turns without recorded examples of another pair than this one."""
    return [turn for turn in turns if not turn.recorded or turn.pack_id == pack_id]


def check_room(turns: Turns, question: str) -> None:
    """Check that a conversation may have one more turn. Raises: RunError."""
    size = len(question) + sum(map(_size, turns))
    if len(turns) < MOST_TURNS and size <= LONGEST_CONVERSATION:
        return
    raise RunError(
        f"This conversation has {len(turns)} turns and {size} characters; the maximum is "
        f"{MOST_TURNS} turns and {LONGEST_CONVERSATION} characters. Export it, then press Clear."
    )


def _size(turn: Turn) -> int:
    return len(turn.question) + sum(len(side.text) + len(side.thinking) for side in turn.answers)


def earlier_turns(turns: Turns, column: int, pack_id: str, rule: HistoryRule) -> list[Turn]:
    """Return the turns whose question and answer are sent to a column with the next question.

    Those of another pair, without an answer of this column, and recorded ones unless the rule
    includes them, are not sent.
    """
    if not rule.earlier:
        return []
    return [
        turn
        for turn in turns
        if turn.pack_id == pack_id
        and (rule.recorded or not turn.recorded)
        and column < len(turn.answers)
        and turn.answers[column].text.strip()
    ]


def pushed(
    past: Sequence[Past], typed: Prompt | None, turns: Turns, left: Prompt | None = None
) -> list[Past]:
    """Return what Undo can restore, with the state before one more change.

    `left` is the prompt after the change; without it, the change leaves the prompt as it is.
    """
    kept = dict(typed or {"text": "", "files": []})  # a page may send nothing
    return [*past, Past(kept, list(turns), dict(left or kept))][-MOST_PAST:]


def is_empty(typed: Prompt | None) -> bool:
    """Whether a prompt has neither text nor files."""
    return not (typed and (typed.get("text") or typed.get("files")))


def is_untouched(typed: Prompt | None, left: Prompt) -> bool:
    """Whether a prompt is as a change left it, or empty; of files only the number counts.

    >>> is_untouched({"text": "a", "files": ["/cache/x"]}, {"text": "a", "files": ["x"]})
    True
    """
    if is_empty(typed) or typed is None:
        return True
    n_files = len(typed.get("files") or []), len(left.get("files") or [])
    return typed.get("text") == left.get("text") and n_files[0] == n_files[1]


def divider(before: Turn | None, now: Turn, position: int) -> str:
    """Describe what changed between two turns of a position; empty if nothing did.

    Names hidden by blind mode and recorded answers have no divider.
    """
    if before is None or any(turn.is_hidden or turn.recorded for turn in (before, now)):
        return ""
    if before.pack_id != now.pack_id:
        return f"pair {before.pair} → {now.pair}"
    column = now.column_at(position)
    first = before.answers[column] if column < len(before.answers) else None
    second = now.answers[column] if column < len(now.answers) else None
    if first is None or second is None or not (first.source and second.source):
        return ""
    if first.plan and second.plan and first.plan != second.plan:
        return f"plan {first.plan[:SHORT]} → {second.plan[:SHORT]}"
    return f"{first.source} → {second.source}" if first.source != second.source else ""
