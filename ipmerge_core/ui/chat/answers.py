"""Both answers to one question, growing side by side, with one Stop for the two.

In: a pair, what answers on either side, a question and perhaps a picture. Out: a generator of two
`Side`s, about ten times a second. A side is the unmerged vision-language model, the plan in
Explore, or a finished merge. Each finds, loads and runs its model in a thread of its own, and fails
alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from ipmerge_core.errors import IPMergeError, RunCancelled
from ipmerge_core.ui.backend import Backend, Progress
from ipmerge_core.ui.errors import public_text, sentence_of
from ipmerge_core.ui.finished_merges import Keys, find_merge, method_label, unmerged_words
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of, describe_choice, plan_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.inference.generation import Settings
    from ipmerge_core.inference.loading import LoadedModel

BASE, PLAN = "base", "plan"  # what may answer, besides finished merges, named by their run
YIELD_EVERY = 0.1  # seconds
PATIENCE = 10.0  # seconds that a stopped model may take to notice


@dataclass
class Side:
    """One of the two answers, as far as it has come."""

    name: str
    source: str = ""  # what answers, in words; empty until it is found
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
    """What is asked, and of whom: `left` and `right` are BASE, PLAN, or a merge's run or folder."""

    pack_id: str
    choice: PlanChoice
    text: str
    image: Image | None
    settings: Settings
    left: str = BASE
    right: str = PLAN
    keys: Keys = MappingProxyType({})


class Answerer(NamedTuple):
    """A model that can answer: where it is, and what it is in words."""

    folder: Path
    words: str


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


def new_sides(left: str, right: str) -> tuple[Side, Side]:
    """Return two sides that wait, under names that tell them apart.

    >>> [side.name for side in new_sides(BASE, PLAN)], [s.name for s in new_sides(PLAN, PLAN)]
    (['Base', 'Merged'], ['Left', 'Right'])
    """
    names = ["Base" if who == BASE else "Merged" for who in (left, right)]
    first, second = ("Left", "Right") if names[0] == names[1] else names
    return Side(first), Side(second)


def find_answerer(backend: Backend, asked: Question, who: str, progress: Progress) -> Answerer:
    """Find the model that answers on a side; a small plan that was never merged is merged now.

    Raises: IPMergeError when it is not there, or is no model of the pair.
    """
    if who == BASE:
        words = unmerged_words(analysis_of(asked.pack_id).sources.mllm.id)
        return Answerer(backend.base_folder(asked.pack_id), words)
    if who == PLAN:
        progress("reading the plan")
        plan = plan_of(asked.pack_id, asked.choice)
        method = f"{method_label(plan.method)}, {describe_choice(asked.choice)}"
        words = f"your plan in Explore · {method} · plan {plan.hash}"
        return Answerer(backend.merged_folder(plan, progress), words)
    merge = find_merge(backend, asked.pack_id, who, asked.keys)
    return Answerer(merge.folder, merge.words)


def answer_both(
    backend: Backend, question: Question, stop: threading.Event | None = None
) -> Iterator[tuple[Side, Side]]:
    """Answer with the models of both sides, at the same time.

    Yields copies of both sides until both are over. Setting `stop`, or closing the generator, stops
    both models at their next token.
    """
    left, right = new_sides(question.left, question.right)
    stop = stop or threading.Event()
    turns: dict[str, threading.Lock] = {}
    threads = [
        threading.Thread(
            target=_fill, args=(backend, side, who, question, stop, turns), daemon=True
        )
        for side, who in ((left, question.left), (right, question.right))
    ]
    for thread in threads:
        thread.start()
    try:
        while not ((left.is_over and right.is_over) or stop.is_set()):
            yield replace(left), replace(right)
            time.sleep(YIELD_EVERY)
        yield left.stopped(), right.stopped()
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


def _fill(
    backend: Backend,
    side: Side,
    who: str,
    question: Question,
    stop: threading.Event,
    turns: dict[str, threading.Lock],
) -> None:
    """Fill one side. An error is shown on that side and does not affect the other.

    Sides that run the same model take `turns` at it: a model answers one question at a time.
    """

    def progress(words: str) -> None:
        side.note = words
        if stop.is_set():
            raise RunCancelled("Stopped before the model was ready.")

    try:
        progress("loading the libraries")
        backend.import_libraries()
        found = find_answerer(backend, question, who, progress)
        side.source = found.words
        progress("loading weights")
        loaded = backend.load(found.folder)
        progress("waiting for the other side, which runs the same model")
        with turns.setdefault(str(loaded.folder), threading.Lock()):
            progress("thinking")
            _answer(loaded, side, question, stop)
    except RunCancelled:
        side.note, side.state = "", "stopped"
    except IPMergeError as error:
        side.note, side.state = sentence_of(error), "failed"
    except Exception as error:  # noqa: BLE001 (a bug on one side must not take the other along)
        side.note = public_text(f"Unexpected {type(error).__name__}: {error}")
        side.state = "failed"


def _answer(loaded: LoadedModel, side: Side, question: Question, stop: threading.Event) -> None:
    from ipmerge_core.inference.generation import stream_answer

    started = time.perf_counter()
    for piece in stream_answer(loaded, question.text, question.image, question.settings, stop):
        side.state, side.note = "answering", ""
        side.text += piece
        side.seconds = time.perf_counter() - started
    side.note = ""
    side.state = "stopped" if stop.is_set() else "finished"
