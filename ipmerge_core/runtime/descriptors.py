"""Keep a bounded number of files open for positioned reads and writes from several threads.

In: a function that opens a file by its key. Out: its descriptor, for the length of a `with` block.
A model may have hundreds of shards, and a process may have as few as 64 open files.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MOST_IDLE = 4  # per model: a merge reads three or more and writes one


class Descriptors:
    """Open files by key; the least recently used idle ones are closed."""

    def __init__(self, open_file: Callable[[str], int], most_idle: int = MOST_IDLE) -> None:
        self._open_file, self._most_idle = open_file, most_idle
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._users: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, key: str) -> Iterator[int]:
        """Yield the descriptor of a file, which stays open inside the block. Raises: OSError."""
        with self._lock:
            if key not in self._descriptors:
                self._close_idle(self._most_idle - 1)
                self._descriptors[key] = self._open_file(key)
            self._descriptors.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            descriptor = self._descriptors[key]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[key] -= 1
                self._close_idle(self._most_idle)

    def close(self) -> None:
        """Close all files; none may be in use."""
        with self._lock:
            self._close_idle(0)

    def _close_idle(self, most: int) -> None:
        idle = [key for key in self._descriptors if not self._users.get(key)]
        for key in idle[: max(0, len(idle) - most)]:
            self._users.pop(key, None)
            os.close(self._descriptors.pop(key))
