"""Stands for the library spaces with real second processes: arguments and results are pickled.

A call runs in a process of its own, forked as the library does it, or started anew. A generator
that is closed leaves its process to end by itself, so that a test can watch that it does.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 120  # seconds for a process to load a model on a busy machine


class SecondProcess:
    """Lends a GPU that is none: notes the sizes of what is sent, and whether processes ended."""

    def __init__(self, method: str) -> None:
        self.context = multiprocessing.get_context(method)
        self.durations: list[int] = []
        self.sent: list[int] = []  # bytes of the arguments of each call
        self.ended: list[bool] = []  # whether the process ended by itself

    def GPU(self, duration: Callable[..., int]) -> Callable[..., Any]:  # noqa: N802 (its name)
        def decorate(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            @functools.wraps(function)
            def call(*args: Any) -> Iterator[Any]:
                self.durations.append(duration(*args))
                yield from self._run(function, pickle.dumps(args))

            return call

        return decorate

    def _run(self, function: Callable[..., Any], arguments: bytes) -> Iterator[Any]:
        self.sent.append(len(arguments))
        results: Any = self.context.Queue()
        name = function.__module__, function.__qualname__
        process = self.context.Process(target=serve, args=(*name, arguments, results))
        process.start()
        try:
            while (found := pickle.loads(results.get(timeout=PATIENCE))) is not None:
                yield from found
        finally:
            process.join(PATIENCE)
            self.ended.append(not process.is_alive())
            process.kill()


def serve(module: str, name: str, arguments: bytes, results: Any) -> None:
    """Run in the second process: the function under its decorator, with what was pickled."""
    function = getattr(importlib.import_module(module), name).__wrapped__
    results.cancel_join_thread()  # nobody may read the last results
    for found in function(*pickle.loads(arguments)):
        results.put(pickle.dumps([found]))
    results.put(pickle.dumps(None))
    results.close()
    results._thread.join(5)
