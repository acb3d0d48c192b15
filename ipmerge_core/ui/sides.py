"""Both answers to one question, growing side by side, with one Stop for the two.

In: a pair, a choice, a question and perhaps a picture. Out: a generator of two `Side`s, about ten
times a second. Each side finds, loads and runs its model in a thread of its own, and fails alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ipmerge_core.errors import IPMergeError, RunCancelled
from ipmerge_core.ui.backend import Backend, Progress
from ipmerge_core.ui.choice import plan_of
from ipmerge_core.ui.layer_map import PlanChoice
from ipmerge_core.ui.messages import public_text, sentence_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.inference import Settings

YIELD_EVERY = 0.1  # seconds
PATIENCE = 10.0  # seconds that a stopped model may take to notice


@dataclass
class Side:
    """One of the two answers, as far as it has come."""

    name: str
    state: Literal["waiting", "answering", "finished", "stopped", "failed"] = "waiting"
    text: str = ""
    note: str = ""  # what it is doing, or why it failed
    seconds: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("finished", "stopped", "failed")

    def stopped(self) -> Side:
        """Return the side as it is once somebody has pressed Stop."""
        return replace(self) if self.is_over else replace(self, state="stopped", note="")


class Question(NamedTuple):
    """What both models are asked."""

    pack_id: str
    choice: PlanChoice
    text: str
    image: Image | None
    settings: Settings


@dataclass
class Turnstile:
    """Lets one question at a time through per visitor, and stops it when told."""

    def __post_init__(self) -> None:
        """Start with nobody inside."""
        self._stops: dict[str, threading.Event] = {}

    def enter(self, visitor: str) -> threading.Event:
        """Stop what this visitor asked before; return the event that stops what comes now."""
        self.stop(visitor)
        self._stops[visitor] = threading.Event()
        return self._stops[visitor]

    def stop(self, visitor: str) -> None:
        """Stop what this visitor asked."""
        if visitor in self._stops:
            self._stops.pop(visitor).set()


def answer_both(
    backend: Backend, question: Question, stop: threading.Event | None = None
) -> Iterator[tuple[Side, Side]]:
    """Answer with the model as it is and with the merged one, both at the same time.

    Yields copies of both sides until both are over. Setting `stop`, or closing the generator, stops
    both models at their next token.
    """
    base, merged = Side("Base"), Side("Merged")
    stop = stop or threading.Event()

    def find_base(_: Progress) -> Path:
        return backend.base_folder(question.pack_id)

    def find_merged(progress: Progress) -> Path:
        progress("reading the plan")
        return backend.merged_folder(plan_of(question.pack_id, question.choice), progress)

    threads = [
        threading.Thread(target=_fill, args=(backend, side, find, question, stop), daemon=True)
        for side, find in ((base, find_base), (merged, find_merged))
    ]
    for thread in threads:
        thread.start()
    try:
        while not ((base.is_over and merged.is_over) or stop.is_set()):
            yield replace(base), replace(merged)
            time.sleep(YIELD_EVERY)
        yield base.stopped(), merged.stopped()
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


def _fill(
    backend: Backend,
    side: Side,
    find: Callable[[Progress], Path],
    question: Question,
    stop: threading.Event,
) -> None:
    """Fill one side; whatever goes wrong is told there and leaves the other side alone."""

    def progress(words: str) -> None:
        side.note = words
        if stop.is_set():
            raise RunCancelled("Stopped before the model was ready.")

    try:
        from ipmerge_core.inference import stream_answer

        progress("loading the libraries")
        backend.import_libraries()
        folder = find(progress)
        progress("loading weights")
        loaded = backend.load(folder)
        progress("thinking")
        started = time.perf_counter()
        for piece in stream_answer(loaded, question.text, question.image, question.settings, stop):
            side.state, side.note = "answering", ""
            side.text += piece
            side.seconds = time.perf_counter() - started
        side.note = ""
        side.state = "stopped" if stop.is_set() else "finished"
    except RunCancelled:
        side.note, side.state = "", "stopped"
    except IPMergeError as error:
        side.note, side.state = sentence_of(error), "failed"
    except Exception as error:  # noqa: BLE001 (a bug on one side must not take the other along)
        side.note = public_text(f"Unexpected {type(error).__name__}: {error}")
        side.state = "failed"
