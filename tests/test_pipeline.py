"""Threads that read ahead, compute, report and write behind: order, budget and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.pipeline import (
    Load,
    WriteBehind,
    compute_ahead,
    read_ahead,
    with_reports,
)


def test_reading_ahead_keeps_to_its_budget_and_order() -> None:
    held, most, lock = 0, 0, threading.Lock()

    def read(number: int) -> int:
        nonlocal held, most
        with lock:
            held += 10
            most = max(most, held)
        return number

    seen = []
    for number in read_ahead([Load(10, lambda n=n: read(n)) for n in range(30)], budget=30):
        time.sleep(0.001)
        seen.append(number)
        with lock:
            held -= 10
    assert seen == list(range(30))
    assert most <= 40


def test_an_error_while_reading_appears_in_the_loop_after_what_came_before() -> None:
    def fail() -> int:
        raise RunError("gone")

    seen = []
    with pytest.raises(RunError, match="gone"):  # noqa: PT012
        for number in read_ahead([Load(1, lambda: 1), Load(1, fail), Load(1, lambda: 3)], 10):
            seen.append(number)  # noqa: PERF402
    assert seen == [1]


def test_computing_ahead_keeps_the_order_and_raises_where_the_loop_is() -> None:
    gate = threading.Barrier(3, timeout=10)

    def slow(number: int) -> int:
        gate.wait()  # passes only where three are computed at once
        if number == 4:
            raise RunError("four")
        return number * number

    found = compute_ahead(slow, range(6), workers=3)
    assert [next(found) for _ in range(4)] == [0, 1, 4, 9]
    with pytest.raises(RunError, match="four"):
        next(found)


def test_after_a_failed_write_nothing_more_is_written() -> None:
    written = []

    def fail() -> None:
        raise RunError("full")

    def write() -> None:
        written.append(1)

    with WriteBehind[None](budget=100) as behind, pytest.raises(RunError, match="full"):  # noqa: PT012
        behind.submit(10, write)
        behind.submit(10, fail)
        for _ in range(20):
            behind.submit(10, write)
        list(behind.drain())
    assert len(written) == 1


def test_every_report_comes_before_the_result() -> None:
    def work(report: Callable[[int], None]) -> str:
        for number in (0, 1, 2):
            report(number)
        return "result"

    steps = with_reports(work)
    assert [next(steps) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == "result"


def test_an_error_in_reporting_work_appears_in_the_loop() -> None:
    def work(report: Callable[[int], None]) -> None:
        report(0)
        raise RunError("gone")

    steps = with_reports(work)
    assert next(steps) == 0
    with pytest.raises(RunError, match="gone"):
        next(steps)


def test_closing_ends_the_work_at_its_next_report() -> None:
    seen: list[str] = []
    closing = threading.Event()

    def work(report: Callable[[int], None]) -> None:
        report(0)
        assert closing.wait(10)
        try:
            while True:  # until the generator has been closed
                report(1)
        except CancelledError:
            seen.append("cancelled")
            raise

    steps = with_reports(work)
    assert next(steps) == 0
    closing.set()
    steps.close()
    assert seen == ["cancelled"]
