"""Keep the questions that are being answered: their stops, and the columns to ask again.

In: the sessions of visitors. Out: at most one `ActiveRequest` per session, which other events of
the same visitor can stop or extend. Thread-safe.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class ActiveRequest:
    """A question that is being answered: its stops by column, and the columns to ask again."""

    n_columns: int
    stop_all: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Start without stops and retries."""
        self.stops = [threading.Event() for _ in range(self.n_columns)]
        self._retries: list[int] = []
        self._lock = threading.Lock()
        self.is_open = True

    def retry(self, column: int) -> bool:
        """Ask a column again within this request; False if the request is over."""
        with self._lock:
            if self.is_open and not self.stop_all.is_set():
                self._retries.append(column)
            return self.is_open

    def take_retries(self) -> list[int]:
        """Return the columns to ask again, once."""
        with self._lock:
            found, self._retries = self._retries, []
            return found

    def close(self, *, finished: bool = True) -> bool:
        """Accept no more retries; with `finished` only if none is left. Returns whether closed."""
        with self._lock:
            if finished and self._retries:
                return False
            self.is_open = False
            return True

    def is_stopped(self, column: int) -> bool:
        """Whether a column must stop."""
        return self.stop_all.is_set() or self.stops[column].is_set()


@dataclass
class ActiveRequests:
    """Keeps at most one active request per session."""

    def __post_init__(self) -> None:
        """Start without requests."""
        self._active: dict[str, ActiveRequest] = {}

    def start(self, session: str, n_columns: int = 2) -> ActiveRequest:
        """Stop the active request of a session and return a new one."""
        self.stop(session)
        self._active[session] = ActiveRequest(n_columns)
        return self._active[session]

    def ahead(self, session: str) -> int:
        """Return how many questions of other sessions are being answered."""
        return sum(other != session for other in list(self._active))

    def stop(self, session: str, column: int | None = None) -> None:
        """Stop one column of a session's request, or all of it."""
        found = self._active.get(session)
        if found is None:
            return
        if column is None:
            self._active.pop(session).stop_all.set()
        elif column < found.n_columns:
            found.stops[column].set()

    def retry(self, session: str, column: int) -> bool:
        """Ask a column again if a request of the session is active; return whether it is."""
        found = self._active.get(session)
        return found is not None and column < found.n_columns and found.retry(column)

    def end(self, session: str, request: ActiveRequest) -> None:
        """Forget a request that is over."""
        request.close(finished=False)
        if self._active.get(session) is request:
            del self._active[session]
