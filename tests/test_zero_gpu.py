"""A Space that lends its GPU: one call for all columns, its duration, its errors, its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.zero_gpu import call_seconds, is_zero_gpu, on_gpu


class Lent:
    """Stands for the library spaces: notes the duration of every call, and its end."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[int] = []
        self.ended = 0
        self.error = error

    def GPU(self, duration: Callable[..., int]) -> Callable[..., Any]:  # noqa: N802 (its name)
        def decorate(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            def call(*args: Any, **kwargs: Any) -> Iterator[Any]:
                self.calls.append(duration(*args, **kwargs))
                if self.error:
                    raise self.error
                try:
                    yield from function(*args, **kwargs)
                finally:
                    self.ended += 1

            return call

        return decorate


@on_gpu(call_seconds)
def answers(tokens: int, columns: int) -> Iterator[str]:
    """Yield one word per token and column."""
    for number in range(tokens):
        yield " ".join([f"word{number}"] * columns)


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> Lent:
    stand_in, module = Lent(), ModuleType("spaces")
    module.GPU = stand_in.GPU  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spaces", module)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    return stand_in


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert not is_zero_gpu()
    assert list(answers(2, 1)) == ["word0", "word1"]


def test_all_columns_are_one_call_of_a_computed_duration(lent: Lent) -> None:
    assert list(answers(3, 2)) == ["word0 word0", "word1 word1", "word2 word2"]
    assert lent.calls == [call_seconds(3, 2)]
    assert lent.ended == 1


def test_a_visitor_who_leaves_ends_the_call(lent: Lent) -> None:
    stream = answers(1000, 2)
    next(stream)
    assert lent.ended == 0
    stream.close()  # type: ignore[attr-defined]
    assert lent.ended == 1


def test_the_duration_grows_with_tokens_and_batches_up_to_the_limit() -> None:
    durations = [call_seconds(tokens, 2) for tokens in (16, 256, 1024, 10**9)]
    assert durations == sorted(durations)
    assert durations[-1] == 300
    assert call_seconds(256, 1) < call_seconds(256, 2) < call_seconds(256, 2, prepares=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "You have exceeded your GPU quota (60s requested vs. 12s left). Try again in 0:12:33",
            r"used up: 60 s are needed and 12 s are left. Try again in 0:12:33",
        ),
        ("You have exceeded your free GPU quota.", r"used up. Try again later"),
        ("No GPU was available after 60s", r"No GPU is free .* Try again in a minute"),
        ("GPU task aborted", r"ended the GPU call .* fewer columns"),
    ],
)
def test_errors_of_the_quota_become_one_sentence(lent: Lent, text: str, expected: str) -> None:
    lent.error = Exception(text)
    with pytest.raises(RunError, match=expected):
        list(answers(1, 1))


def test_other_errors_stay_what_they_are(lent: Lent) -> None:
    lent.error = ZeroDivisionError("by zero")
    with pytest.raises(ZeroDivisionError):
        list(answers(1, 1))


def test_a_space_without_the_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    monkeypatch.setitem(sys.modules, "spaces", None)
    with pytest.raises(RunError, match="spaces is not installed"):
        list(answers(1, 1))
