"""Take turns: threads that share one resource, each for a step at a time, in order of arrival.

A plain lock that is released and taken again lets one thread starve the others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_POLL_SECONDS = 0.1  # at which a waiting thread looks at its `stops`


class Turns:
    """A fair lock whose holder can let the others go first.

    >>> turns = Turns()
    >>> with turns.taken():
    ...     turns.switch(lambda: None, lambda: None)  # no other thread waits: returns at once
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # the first one holds the turn

    @contextmanager
    def taken(self, stops: Sequence[threading.Event] = ()) -> Iterator[bool]:
        """Wait for a turn and hold it; yields False if one of `stops` was set before."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            mine = self._wait(ticket, stops)
        try:
            yield mine
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def switch(self, leave: Callable[[], object], enter: Callable[[], object]) -> None:
        """Let the waiting threads have a turn each; `leave` and `enter` run before and after.

        Returns at once if none waits. Only for the thread that holds the turn.
        """
        with self._changed:
            if len(self._queue) < 2:
                return
            leave()
            ticket = self._queue.popleft()
            self._queue.append(ticket)
            self._changed.notify_all()
            self._wait(ticket, ())
        enter()

    def _wait(self, ticket: object, stops: Sequence[threading.Event]) -> bool:
        while self._queue[0] is not ticket:
            if any(event.is_set() for event in stops):
                return False
            self._changed.wait(_POLL_SECONDS)
        return True
