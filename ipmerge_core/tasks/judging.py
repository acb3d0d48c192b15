"""Judge replies by rules: right, wrong, or not decidable by rules.

In: an `Item` and a decoded reply. Out: a `Verdict`. The rules are those of `extraction`; a reply is
never mended before it is compared. Free texts that rules cannot compare are "unjudged", which is
neither right nor wrong.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from ipmerge_core.tasks.answers import is_right, normalized, stated_result
from ipmerge_core.tasks.items import Item

Outcome: TypeAlias = Literal["right", "wrong", "unjudged"]


class Verdict(NamedTuple):
    """The outcome for one reply, the answer found in it (None if there is none), and the reason."""

    outcome: Outcome
    found: str | None = None
    reason: str = ""


def judge(item: Item, reply: str) -> Verdict:
    """Compare a reply with the references of an item."""
    found = stated_result(reply) if item.kind == "stated" else normalized(reply)
    if not found:
        return Verdict("wrong", None, "no answer found")
    return Verdict("right" if is_right(item, reply) else "wrong", found)
