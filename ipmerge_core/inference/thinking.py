"""Separate what a model thinks from its answer, while it is written and afterwards.

In: the text of a reply, and whether the prompt had already opened the thinking part. Out: the
thinking and the answer. A family marks the part with a pair of tokens; `MARKERS` lists the pairs.
No IO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Marker(NamedTuple):
    """The tokens before and after the thinking part."""

    start: str
    end: str


# Qwen3, DeepSeek-R1, GLM and most others; Magistral; Kimi-VL; Seed.
MARKERS = (
    Marker("<think>", "</think>"),
    Marker("[THINK]", "[/THINK]"),
    Marker("◁think▷", "◁/think▷"),
    Marker("<seed:think>", "</seed:think>"),
)


class Reply(NamedTuple):
    """A reply in two parts; `is_thinking` while the thinking part has not ended."""

    thinking: str
    answer: str
    is_thinking: bool


def split_reply(text: str, *, opened: bool = False, ended: bool = False) -> Reply:
    r"""Split a reply, or its beginning, into what the model thinks and its answer.

    Only a thinking part at the start counts; a marker within the answer is text. A reply that ends
    within the thinking part has no answer. While it is written, the beginning of a
    marker belongs to neither part.

    Args:
        text: the reply so far.
        opened: whether the prompt ends with a start marker, so that the reply begins in the part.
        ended: whether the reply is complete.

    >>> split_reply("<think>2 + 2 is 4.</think>\n\n4")
    Reply(thinking='2 + 2 is 4.', answer='4', is_thinking=False)
    >>> split_reply("so 4.</thi", opened=True)
    Reply(thinking='so 4.', answer='', is_thinking=True)
    """
    start = text.lstrip()
    found = next((m for m in MARKERS if start.startswith(m.start)), None)
    if found is None and not opened:
        if not ended and start and any(m.start.startswith(start) for m in MARKERS):
            return Reply("", "", True)  # the first letters of a marker
        found = next((m for m in MARKERS if m.end in text and m.start not in text), None)
        if found is None:
            return Reply("", text.strip(), False)
    body = start.removeprefix(found.start) if found else text
    ends = [(body.find(m.end), m) for m in ((found,) if found else MARKERS) if m.end in body]
    if not ends:
        return Reply((body if ended else _without_partial(body, found)).strip(), "", True)
    at, marker = min(ends)
    return Reply(body[:at].strip(), body[at + len(marker.end) :].strip(), False)


def _without_partial(text: str, marker: Marker | None) -> str:
    """Remove the beginning of an end marker from the end of a text."""
    for each in (marker,) if marker else MARKERS:
        for length in range(len(each.end) - 1, 0, -1):
            if text.endswith(each.end[:length]):
                return text[:-length]
    return text


class ThinkingTokens(NamedTuple):
    """The ids of the markers in a model's vocabulary, where each is a single token."""

    start: frozenset[int] = frozenset()
    end: tuple[int, ...] = ()
    names: Mapping[int, str] = {}  # the text of each of these tokens

    @classmethod
    def of(cls, ids: Mapping[str, int]) -> ThinkingTokens:
        """Take the pairs of which both markers are tokens.

        >>> ThinkingTokens.of({"<think>": 7, "</think>": 8, "[THINK]": 9}).end
        (8,)
        """
        pairs = [m for m in MARKERS if m.start in ids and m.end in ids]
        names = {ids[text]: text for marker in pairs for text in marker}
        return cls(frozenset(ids[m.start] for m in pairs), tuple(ids[m.end] for m in pairs), names)

    def opens(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt leaves the thinking part open."""
        for number in reversed(prompt):
            if number in self.end:
                return False
            if number in self.start:
                return True
        return False
