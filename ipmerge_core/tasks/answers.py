"""Extract the answer from a reply and compare it with the reference."""

from __future__ import annotations

import re
from typing import Protocol

_NUMBER = re.compile(r"-?\d+")


def stated_result(reply: str) -> str | None:
    """Return the number that a reply states as its result: after the last `=`, or the whole reply.

    An unevaluated expression states no result.

    >>> stated_result("6+4=10; 10*2=20."), stated_result("20."), stated_result("6*4.")
    ('20', '20', None)
    """
    _, _, tail = reply.rpartition("=")
    tail = tail.strip().removesuffix(".").strip()
    return tail if _NUMBER.fullmatch(tail) else None


class Question(Protocol):
    """Anything with a reference answer: a problem of a task, a recorded example."""

    @property
    def answer(self) -> str:
        """The reference answer."""
        ...

    @property
    def is_math(self) -> bool:
        """Whether only the stated result is compared, not the whole reply."""
        ...


def is_right(question: Question, reply: str) -> bool:
    """Return whether a reply is correct.

    For a math question the stated result is compared with the reference, otherwise the whole
    reply, ignoring case, surrounding whitespace and a final full stop.
    """
    if question.is_math:
        return stated_result(reply) == question.answer
    return normalized(reply) == normalized(question.answer)


def differ(first: str, second: str) -> bool:
    """Return whether two replies differ: in their stated results if both have one, else as text."""
    results = stated_result(first), stated_result(second)
    if None not in results:
        return results[0] != results[1]
    return normalized(first) != normalized(second)


def normalized(reply: str) -> str:
    """Return a reply in lower case without surrounding whitespace and a final full stop.

    >>> normalized(" Triangle. ")
    'triangle'
    """
    return reply.strip().removesuffix(".").strip().lower()
