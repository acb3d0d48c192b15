"""Overlap reading, computing and writing with background threads.

In: functions that read or write, each with the bytes it holds, and a memory budget. Out: their
results in order, so that no result depends on timing. An exception in a thread is raised in the
caller's loop. On early exit, reading stops after the current load and pending writes finish.
Independent of tensors and files.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from queue import SimpleQueue
from threading import Event
from typing import Generic, NamedTuple, TypeVar

_T = TypeVar("_T")
_U = TypeVar("_U")


_MALLOC = {"arenas": (-8, 1), "map from": (-3, 1 << 30), "trim from": (-1, 1 << 30)}  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the operating system.

    By default glibc returns large blocks immediately, and each new one is faulted in and zeroed
    page by page; for a stream of large pieces that costs more than the arithmetic on them. Intended
    for processes that do nothing else; a no-op without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC.values():
            mallopt(option, value)


class Load(NamedTuple, Generic[_T]):
    """A pending read. `nbytes` is the size of its result in memory."""

    nbytes: int
    read: Callable[[], _T]


def read_ahead(loads: Iterable[Load[_T]], budget: int, threads: int = 1) -> Generator[_T]:
    """Yield the results of loads in order, running them in threads within a memory budget.

    The result last yielded counts until the next one is requested. A load larger than the budget
    runs alone.

    >>> list(read_ahead([Load(8, lambda: "a"), Load(8, lambda: "b")], budget=8))
    ['a', 'b']
    """
    upcoming = iter(loads)
    load = next(upcoming, None)
    waiting: deque[tuple[int, Future[_T]]] = deque()
    held = 0
    with ThreadPoolExecutor(threads, "read-ahead") as pool:
        try:
            while load or waiting:
                while load and (not waiting or held + load.nbytes <= budget):
                    waiting.append((load.nbytes, pool.submit(load.read)))
                    held += load.nbytes
                    load = next(upcoming, None)
                nbytes, future = waiting.popleft()
                result = future.result()
                del future
                yield result
                del result
                held -= nbytes
        finally:
            for _, future in waiting:
                future.cancel()


def compute_ahead(function: Callable[[_T], _U], items: Iterable[_T], workers: int) -> Generator[_U]:
    """Yield function(item) for each item in order, computed in `workers` threads if more than one.

    >>> list(compute_ahead(str, [1, 2, 3], workers=2))
    ['1', '2', '3']
    """
    if workers <= 1:
        yield from map(function, items)
        return
    running: deque[Future[_U]] = deque()
    with ThreadPoolExecutor(workers, "compute") as threads:
        try:
            for item in items:
                running.append(threads.submit(function, item))
                del item
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def with_reports(work: Callable[[Callable[[_T], None]], _U]) -> Generator[_T, None, _U]:
    """Run `work(report)` in a thread, yield what it reports, and return its result.

    Closing the generator raises CancelledError in the next report, and waits for the thread.

    >>> list(with_reports(lambda report: [report(0.5), report(1.0)]))
    [0.5, 1.0]
    """
    reports: SimpleQueue[tuple[_T, ...]] = SimpleQueue()  # an empty one at the end
    closed = Event()

    def report(value: _T) -> None:
        if closed.is_set():
            raise CancelledError
        reports.put((value,))

    with ThreadPoolExecutor(1, "with-reports") as thread:
        try:
            future = thread.submit(work, report)
            future.add_done_callback(lambda _: reports.put(()))
            while found := reports.get():
                yield found[0]
            return future.result()
        finally:
            closed.set()


class WriteBehind(AbstractContextManager["WriteBehind[_T]"], Generic[_T]):
    """Runs jobs in order in one thread; `submit` blocks while they exceed the memory budget.

    After a job fails, no later job is run.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._held = budget, 0
        self._waiting: deque[tuple[int, Future[_T]]] = deque()
        self._broken = False
        self._thread = ThreadPoolExecutor(1, "write-behind")

    def __exit__(self, *_: object) -> None:
        """Wait for pending jobs."""
        self._thread.shutdown()

    def submit(self, nbytes: int, job: Callable[[], _T]) -> Iterator[_T]:
        """Submit a job that holds `nbytes`; return the results of jobs that have finished.

        Raises: any exception of an earlier job.
        """
        ended = []
        while self._waiting and self._held + nbytes > self._budget:
            ended.append(self._next())
        self._held += nbytes
        self._waiting.append((nbytes, self._thread.submit(self._guarded, job)))
        while self._waiting[0][1].done():
            ended.append(self._next())
            if not self._waiting:
                break
        return iter(ended)

    def drain(self) -> Iterator[_T]:
        """Wait for all jobs and yield their results. Raises: any exception of a job."""
        while self._waiting:
            yield self._next()

    def _next(self) -> _T:
        nbytes, future = self._waiting.popleft()
        result = future.result()
        self._held -= nbytes
        return result

    def _guarded(self, job: Callable[[], _T]) -> _T:
        if self._broken:
            raise CancelledError
        self._broken = True  # remains set if the job raises
        result = job()
        self._broken = False
        return result
