"""Compile regular expressions from outside with RE2, which searches any text in linear time.

In: a pattern of a form, a plan or a file of another program. Out: an object with `search`, or one
error with the reason why the pattern is not valid.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import re2

_LONGEST_PATTERN = 1000  # characters


class Pattern(Protocol):
    """A compiled regular expression."""

    def search(self, text: str) -> object | None:
        """Return the first match in a text, or None."""


@lru_cache(maxsize=64)
def compile_pattern(pattern: str) -> Pattern:
    """Compile a regular expression that searches any text in linear time (RE2's syntax).

    Raises: ValueError for one that is invalid, too long, or needs look-around or backreferences.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters; the maximum is {_LONGEST_PATTERN}")
    settings = re2.Options()
    settings.log_errors = False
    try:
        compiled: Pattern = re2.compile(pattern, options=settings)
    except re2.error as error:
        reason = error.args[0]
        raise ValueError(reason.decode() if isinstance(reason, bytes) else reason) from error
    return compiled
