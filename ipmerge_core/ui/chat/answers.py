"""Answer one question with the models of all columns, each of which can be stopped and retried.

In: the chosen merge, the model of each column, a question, its images and earlier messages. Out: a
generator of one `Side` per column, about ten times a second. An error affects only its own column.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from ipmerge_core.errors import IPMergeError, RunCancelled
from ipmerge_core.ui.backend import Backend, Progress
from ipmerge_core.ui.chat.columns import BASE, PLAN, column_names, merge_of, name_asked
from ipmerge_core.ui.chosen_merge import ChosenMerge, name_of
from ipmerge_core.ui.errors import public_text, sentence_of
from ipmerge_core.ui.finished_merges import Keys, describe_unmerged, find_merge
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.inference.generation import GenerationSettings
    from ipmerge_core.inference.loading import LoadedModel
    from ipmerge_core.inference.prompts import Message

YIELD_EVERY = 0.1  # seconds
STOP_TIMEOUT = 10.0  # seconds to wait for a stopped model
LONGEST_TURN = 1800.0  # seconds; a generation that does not end is stopped


@dataclass
class Side:
    """The answer of one column so far."""

    name: str
    source: str = ""  # label of the model; empty until it is found
    state: Literal["waiting", "answering", "finished", "stopped", "failed"] = "waiting"
    text: str = ""
    thinking: str = ""  # what a thinking model writes before its answer
    note: str = ""  # progress, or the reason of a failure
    seconds: float = 0.0
    tokens: int = 0
    cut_off: bool = False  # whether it ended at the limit of new tokens
    plan: str = ""  # the short digest of its plan
    image_processor: str = ""  # its class and library, for a question with an image

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, stopped or failed."""
        return self.state in ("finished", "stopped", "failed")

    def stopped(self, note: str = "") -> Side:
        """Return the side after Stop was pressed."""
        return replace(self) if self.is_over else replace(self, state="stopped", note=note)


class Question(NamedTuple):
    """A question and the models to ask.

    `columns` are the values of the columns, see `columns`. `before` are the earlier messages of
    each column, beginning with the system prompt; empty if there are none.
    """

    chosen: ChosenMerge
    text: str
    images: tuple[Image, ...]
    settings: GenerationSettings
    columns: tuple[str, ...] = (BASE, PLAN)
    keys: Keys = MappingProxyType({})
    before: tuple[tuple[Message, ...], ...] = ()

    @property
    def pack_id(self) -> str:
        """The pair."""
        return self.chosen.pack_id


class Answerer(NamedTuple):
    """A model that can answer, with its folder, label and the digest of its plan."""

    folder: Path
    label: str
    plan: str = ""


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


def new_sides(columns: Sequence[str]) -> tuple[Side, ...]:
    """Return one waiting side per column, with different names."""
    return tuple(Side(name) for name in column_names(columns))


def find_answerer(backend: Backend, asked: Question, who: str, progress: Progress) -> Answerer:
    """Find the model of a column; a plan of a small model is merged if that has not been done yet.

    Raises: IPMergeError if the model does not exist or does not belong to the pair.
    """
    if who == BASE:
        label = describe_unmerged(analysis_of(asked.pack_id).sources.mllm.id)
        return Answerer(backend.base_folder(asked.pack_id), label)
    chosen = merge_of(asked.chosen, who)
    if chosen is None or chosen.merge is not None:
        run = chosen.run if chosen else who
        merge = find_merge(backend, asked.pack_id, run, asked.keys)
        return Answerer(merge.folder, merge.label, merge.made.plan)
    progress("making the plan")
    plan = chosen.make_plan()
    label = name_of(chosen, plan.hash)
    return Answerer(backend.merged_folder(plan, progress), label, plan.hash)


def answer_columns(
    backend: Backend,
    asked: Question,
    request: ActiveRequest | None = None,
    *,
    before: Sequence[Side] = (),
    only: Sequence[int] | None = None,
) -> Generator[tuple[Side, ...], None, None]:
    """Answer with the models of all columns, or of `only` some where `before` are the others.

    Yields copies of all sides until they are over. Closing the generator or stopping the request
    stops the models at their next token. A column whose retry is requested is asked again.
    """
    answers = _Answers(backend, asked, request or ActiveRequest(len(asked.columns)), before)
    deadline = time.monotonic() + LONGEST_TURN
    try:
        for column in range(len(asked.columns)) if only is None else only:
            answers.start(column)
        while not answers.are_over:
            yield answers.snapshot()
            time.sleep(YIELD_EVERY)
            if time.monotonic() > deadline:
                break
        words = "" if answers.are_over else f"the limit of {LONGEST_TURN / 60:.0f} minutes"
        yield tuple(side.stopped(words) for side in answers.snapshot())
    finally:
        answers.close()


class _Answers:
    """The sides of one question and the threads that fill them."""

    def __init__(
        self, backend: Backend, asked: Question, request: ActiveRequest, before: Sequence[Side]
    ) -> None:
        self.backend, self.asked, self.request = backend, asked, request
        self.sides = list(before) or list(new_sides(asked.columns))
        self.locks: dict[str, threading.Lock] = {}  # a model answers one question at a time
        self.threads: list[threading.Thread] = []

    @property
    def are_over(self) -> bool:
        """Whether all sides are over and no retry is requested; retries are started."""
        if self.request.stop_all.is_set():
            return self.request.close(finished=False)
        for column in self.request.take_retries():
            if self.sides[column].is_over:
                self.start(column)
        return all(side.is_over for side in self.sides) and self.request.close()

    def start(self, column: int) -> None:
        """Ask a column in a thread of its own."""
        name = column_names(self.asked.columns)[column]
        self.sides[column] = side = Side(name)
        self.request.stops[column] = stop = _Either(self.request.stop_all)
        thread = threading.Thread(target=self._fill, args=(side, column, stop), daemon=True)
        self.threads.append(thread)
        thread.start()

    def snapshot(self) -> tuple[Side, ...]:
        """Return copies of all sides."""
        return tuple(map(replace, self.sides))

    def close(self) -> None:
        """Stop all models and wait for their threads."""
        self.request.close(finished=False)
        self.request.stop_all.set()
        for thread in self.threads:
            thread.join(STOP_TIMEOUT)

    def _fill(self, side: Side, column: int, stop: threading.Event) -> None:
        """Fill one side. An error is shown on this side and does not affect the others."""

        def progress(words: str) -> None:
            side.note = words
            if stop.is_set():
                raise RunCancelled("Stopped while the model was loading.")

        who = self.asked.columns[column]
        side.source = name_asked(self.asked.chosen, who)
        try:
            progress("importing libraries")
            self.backend.import_libraries()
            found = find_answerer(self.backend, self.asked, who, progress)
            side.source, side.plan = found.label, found.plan
            progress("loading weights")
            loaded = self.backend.load(found.folder, [stop])
            progress("waiting for another column, which uses the same model")
            with self.locks.setdefault(str(loaded.folder), threading.Lock()):
                progress("generating")
                _answer(loaded, side, self.asked, stop)
        except RunCancelled:
            side.note, side.state = "", "stopped"
        except IPMergeError as error:
            side.note, side.state = sentence_of(error), "failed"
        except Exception as error:  # noqa: BLE001 (a bug in one column must not affect the others)
            side.note = public_text(f"Unexpected {type(error).__name__}: {error}")
            side.state = "failed"


class _Either(threading.Event):
    """An event that is also set by another one."""

    def __init__(self, other: threading.Event) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        """Whether either of both is set."""
        return super().is_set() or self._other.is_set()


def _answer(loaded: LoadedModel, side: Side, asked: Question, stop: threading.Event) -> None:
    from ipmerge_core.inference.generation import stream_answer

    image = asked.images[-1] if asked.images else None
    if image is not None:
        side.image_processor = loaded.processor.image_processor or ""
    started = time.perf_counter()
    for piece in stream_answer(loaded, asked.text, image, asked.settings, stop):
        side.state, side.note = "answering", ""
        side.text += piece
        side.seconds = time.perf_counter() - started
    side.note = ""
    side.state = "stopped" if stop.is_set() else "finished"
