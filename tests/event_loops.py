"""Run code of the app outside the event loop of the main thread, which other tests use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def finished(work: Coroutine[object, object, T]) -> T:
    """Run a coroutine in a thread, so that the main thread's event loop stays as it is."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def in_loop(make: Callable[[], T]) -> T:
    """Call a function where an event loop runs; elsewhere Gradio makes one and leaves it open."""

    async def call() -> T:
        return make()

    return finished(call())
