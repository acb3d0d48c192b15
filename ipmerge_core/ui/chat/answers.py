"""Answer one question with two models at the same time, with one Stop for both.

In: the chosen merge, the model of each side, a question and perhaps an image. Out: a generator of
two `Side`s, about ten times a second. A side is the unmerged vision-language model, the chosen
merge, the plan of the recorded answers, or a finished merge. Each runs in its own thread, and an
error affects only its own side.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from ipmerge_core.errors import IPMergeError, RunCancelled
from ipmerge_core.ui.backend import Backend, Progress
from ipmerge_core.ui.chat.recorded import recorded_choice
from ipmerge_core.ui.chosen_merge import ChosenMerge, name_of
from ipmerge_core.ui.errors import public_text, sentence_of
from ipmerge_core.ui.finished_merges import Keys, describe_unmerged, find_merge
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.inference.generation import GenerationSettings
    from ipmerge_core.inference.loading import LoadedModel

# A side is one of these or the run of a finished merge.
BASE, PLAN, RECORD = "base", "plan", "record"
UNMERGED = "Vision-language model, unmerged"
YIELD_EVERY = 0.1  # seconds
STOP_TIMEOUT = 10.0  # seconds to wait for a stopped model


@dataclass
class Side:
    """One of the two answers so far."""

    name: str
    source: str = ""  # label of the model; empty until it is found
    state: Literal["waiting", "answering", "finished", "stopped", "failed"] = "waiting"
    text: str = ""
    note: str = ""  # progress, or the reason of a failure
    seconds: float = 0.0
    image_processor: str = ""  # its class and library, for a question with an image

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, stopped or failed."""
        return self.state in ("finished", "stopped", "failed")

    def stopped(self) -> Side:
        """Return the side after Stop was pressed."""
        return replace(self) if self.is_over else replace(self, state="stopped", note="")


class Question(NamedTuple):
    """A question and the models to ask.

    `left` and `right` are BASE, PLAN (the chosen merge), RECORD, or a run or folder.
    """

    chosen: ChosenMerge
    text: str
    image: Image | None
    settings: GenerationSettings
    left: str = BASE
    right: str = PLAN
    keys: Keys = MappingProxyType({})

    @property
    def pack_id(self) -> str:
        """The pair."""
        return self.chosen.pack_id


class Answerer(NamedTuple):
    """A model that can answer, with its folder and label."""

    folder: Path
    label: str


@dataclass
class ActiveRequests:
    """Keeps at most one active request per session."""

    def __post_init__(self) -> None:
        """Start without requests."""
        self._stops: dict[str, threading.Event] = {}

    def start(self, session: str) -> threading.Event:
        """Stop the active request of a session; return the event that stops the new one."""
        self.stop(session)
        self._stops[session] = threading.Event()
        return self._stops[session]

    def stop(self, session: str) -> None:
        """Stop the active request of a session."""
        if session in self._stops:
            self._stops.pop(session).set()


def new_sides(left: str, right: str) -> tuple[Side, Side]:
    """Return two waiting sides with different names.

    >>> [side.name for side in new_sides(BASE, PLAN)], [s.name for s in new_sides(PLAN, PLAN)]
    (['Base', 'Merged'], ['Left', 'Right'])
    """
    names = ["Base" if who == BASE else "Merged" for who in (left, right)]
    first, second = ("Left", "Right") if names[0] == names[1] else names
    return Side(first), Side(second)


def find_answerer(backend: Backend, asked: Question, who: str, progress: Progress) -> Answerer:
    """Find the model of a side; a plan of a small model is merged if it has not been merged yet.

    Raises: IPMergeError if the model does not exist or does not belong to the pair.
    """
    if who == BASE:
        label = describe_unmerged(analysis_of(asked.pack_id).sources.mllm.id)
        return Answerer(backend.base_folder(asked.pack_id), label)
    chosen = _merge_of(asked, who)
    if chosen is None or chosen.merge is not None:
        run = chosen.run if chosen else who
        merge = find_merge(backend, asked.pack_id, run, asked.keys)
        return Answerer(merge.folder, merge.label)
    progress("making the plan")
    plan = chosen.make_plan()
    label = name_of(chosen, plan.hash)
    return Answerer(backend.merged_folder(plan, progress), label)


def _merge_of(asked: Question, who: str) -> ChosenMerge | None:
    """Return the merge of a side that is no finished one; None for a run."""
    if who == PLAN:
        return asked.chosen
    recorded = recorded_choice(asked.pack_id) if who == RECORD else None
    return ChosenMerge(asked.pack_id, recorded, by="record") if recorded else None


def name_asked(asked: Question, who: str) -> str:
    """Name the model of a side before it is found."""
    if who == BASE:
        with contextlib.suppress(IPMergeError):
            return describe_unmerged(analysis_of(asked.pack_id).sources.mllm.id)
        return UNMERGED
    chosen = _merge_of(asked, who)
    return name_of(chosen) if chosen else who


def answer_both(
    backend: Backend, question: Question, stop: threading.Event | None = None
) -> Iterator[tuple[Side, Side]]:
    """Answer with the models of both sides at the same time.

    Yields copies of both sides until both are over. Setting `stop` or closing the generator stops
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
            thread.join(STOP_TIMEOUT)


def _fill(
    backend: Backend,
    side: Side,
    who: str,
    question: Question,
    stop: threading.Event,
    turns: dict[str, threading.Lock],
) -> None:
    """Fill one side. An error is shown on this side and does not affect the other.

    Sides with the same model share a lock in `turns`: a model answers one question at a time.
    """

    def progress(words: str) -> None:
        side.note = words
        if stop.is_set():
            raise RunCancelled("Stopped while the model was loading.")

    side.source = name_asked(question, who)
    try:
        progress("importing libraries")
        backend.import_libraries()
        found = find_answerer(backend, question, who, progress)
        side.source = found.label
        progress("loading weights")
        loaded = backend.load(found.folder, [stop])
        progress("waiting for the other side, which uses the same model")
        with turns.setdefault(str(loaded.folder), threading.Lock()):
            progress("generating")
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

    if question.image is not None:
        side.image_processor = loaded.processor.image_processor or ""
    started = time.perf_counter()
    for piece in stream_answer(loaded, question.text, question.image, question.settings, stop):
        side.state, side.note = "answering", ""
        side.text += piece
        side.seconds = time.perf_counter() - started
    side.note = ""
    side.state = "stopped" if stop.is_set() else "finished"
