"""Run a generator on the GPU that a ZeroGPU Space lends for the time of one call.

In: a generator function of plain values. Out: the same function; on ZeroGPU it runs in a process
with a GPU for at most the computed duration. Elsewhere nothing changes. On ZeroGPU the arguments
and what is yielded are pickled, and what the process changes in memory is lost with it.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, ParamSpec, TypeVar

from ipmerge_core.errors import RunError, first_line

P = ParamSpec("P")
T = TypeVar("T")

STARTING, PREPARING = 15, 60  # seconds to put a model on the GPU, and to prepare factors
PER_TOKEN = 0.05  # seconds per step of one batch; an assumption for a model of 8e9 parameters
LONGEST = 300  # seconds of one call
_TIME_LEFT = re.compile(r"([0-9]+)s requested vs\. ([0-9]+)s left")
_WAIT = re.compile(r"[Tt]ry again in ([0-9]+:[0-9]{2}:[0-9]{2})")


def is_zero_gpu() -> bool:
    """Return whether this is a Space whose GPU is lent for each call."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def call_seconds(tokens: int, batches: int, *, prepares: bool = False) -> int:
    """Return the duration to request: all columns together, for the longest reply.

    Args:
        tokens: the most tokens of a reply, its thinking part included.
        batches: how many batches take turns: one for the base and all factors, and one for each
            column of tensors.
        prepares: whether factors or tensors are computed first.

    >>> call_seconds(256, 1), call_seconds(256, 3, prepares=True), call_seconds(10**6, 1)
    (28, 113, 300)
    """
    found = STARTING + PER_TOKEN * tokens * batches + (PREPARING if prepares else 0)
    return min(LONGEST, round(found))


def on_gpu(
    duration: Callable[P, int],
) -> Callable[[Callable[P, Iterator[T]]], Callable[P, Iterator[T]]]:
    """Decorate a generator function so that one call holds the GPU for all that it yields.

    `duration` takes the same arguments and returns seconds. Closing the generator ends the call.
    The function must be one of a module, and its arguments plain values.

    Raises, when the generator runs: RunError if the visitor's quota is used up, or no GPU is free.
    """

    def decorate(function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
            if not is_zero_gpu():
                yield from function(*args, **kwargs)
                return
            lent = _lent(function, duration)
            try:
                with closing(lent(*args, **kwargs)) as found:
                    yield from found
            except Exception as error:
                if explained := explain_quota(error):
                    raise explained from error
                raise

        return call

    return decorate


def _lent(function: Callable[..., Any], duration: Callable[..., int]) -> Callable[..., Any]:
    """Wrap a function for ZeroGPU. Raises: RunError if its library is missing."""
    try:
        spaces = importlib.import_module("spaces")
    except ImportError as error:
        raise RunError(
            "This Space has ZeroGPU hardware and the library spaces is not installed. Select the "
            "Gradio SDK, which installs it."
        ) from error
    wrapped: Callable[..., Any] = spaces.GPU(duration=duration)(function)
    return wrapped


def explain_quota(error: Exception) -> RunError | None:
    """Describe an error of ZeroGPU in one sentence; None for other errors.

    >>> error = Exception("You have exceeded your GPU quota (60s requested vs. 12s left).")
    >>> str(explain_quota(error)).partition(".")[0]
    'Your GPU time on this Space is used up: 60 s are needed and 12 s are left'
    """
    text = str(getattr(error, "message", "") or error)
    if "quota" in text:
        left, wait = _TIME_LEFT.search(text), _WAIT.search(text)
        how = f": {left[1]} s are needed and {left[2]} s are left" if left else ""
        when = f"in {wait[1]}" if wait else "later"
        return RunError(
            f"Your GPU time on this Space is used up{how}. Try again {when}, or sign in for more."
        )
    if "No GPU" in text:
        return RunError("No GPU is free on this Space at the moment. Try again in a minute.")
    if "GPU task aborted" in text or "larger than the maximum" in text:
        return RunError(
            f"This Space ended the GPU call ({first_line(error)}). Ask fewer columns or a shorter "
            f"answer."
        )
    return None
