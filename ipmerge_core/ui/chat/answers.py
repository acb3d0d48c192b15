"""Answer one question with the models of all columns, each of which can be stopped and retried.

In: the chosen merge, the model of each column, a question, its images and earlier messages. Out: a
generator of one `Side` per column, about ten times a second. All columns are answered from one copy
of the weights; an error affects only its own column.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ipmerge_core.errors import IPMergeError, RunCancelled
from ipmerge_core.runtime.zero_gpu import call_seconds, is_zero_gpu, on_gpu
from ipmerge_core.ui.backend import Backend, Progress
from ipmerge_core.ui.chat.active_requests import ActiveRequest
from ipmerge_core.ui.chat.columns import (
    BASE,
    FORM,
    PLAN,
    RECORD,
    column_names,
    merge_of,
    name_asked,
)
from ipmerge_core.ui.chat.question import PackedQuestion, Question, pack_question
from ipmerge_core.ui.chosen_merge import name_of
from ipmerge_core.ui.errors import public_text, sentence_of
from ipmerge_core.ui.finetuned_models import PREFIX as FINETUNED
from ipmerge_core.ui.finetuned_models import find_finetuned
from ipmerge_core.ui.finished_merges import describe_unmerged, find_merge
from ipmerge_core.ui.lending import LentHost, StopFiles
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from ipmerge_core.adapters.columns import Column, Row
    from ipmerge_core.adapters.live import LiveModel
    from ipmerge_core.inference.streaming import RowState

YIELD_EVERY = 0.1  # seconds
# The page shows that it waits by itself, and a state without a token would delay the one with it.
FIRST_STATE = 0.3  # seconds
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
    speed: float = 0.0  # tokens per second after the first one
    cut_off: bool = False  # whether it ended at a limit of tokens
    plan: str = ""  # the short digest of its plan
    image_processor: str = ""  # its class and library, for a question with an image
    ids: tuple[int, ...] = ()  # the tokens, those of the thinking part included

    @property
    def has_begun(self) -> bool:
        """Whether there is text to show; the first token of a reply may be a space."""
        return bool(self.text or self.thinking)

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, stopped or failed."""
        return self.state in ("finished", "stopped", "failed")

    def stopped(self, note: str = "") -> Side:
        """Return the side after Stop was pressed."""
        return replace(self) if self.is_over else replace(self, state="stopped", note=note)

    def read(self, row: RowState) -> None:
        """Take over the state of a row of the model."""
        thinks = row.state == "thinking"
        self.text, self.thinking = row.reply.answer, row.reply.thinking
        self.seconds, self.tokens, self.ids = row.seconds, len(row.ids), row.ids
        self.speed, self.cut_off = row.tokens_per_second, row.is_cut
        self.note = public_text(row.note) if row.note else self.note if not row.ids else ""
        self.state = "answering" if thinks else row.state  # type: ignore[assignment]


class Found(NamedTuple):
    """A column that can answer, with its label and the digest of its plan."""

    column: Column
    label: str
    plan: str = ""


def new_sides(columns: Sequence[str]) -> tuple[Side, ...]:
    """Return one waiting side per column, with different names."""
    return tuple(Side(name) for name in column_names(columns))


def find_column(
    backend: Backend,
    live: LiveModel,
    asked: Question,
    who: str,
    progress: Progress,
    stops: Sequence[threading.Event] = (),
) -> Found:
    """Find the model of a column; what it needs is computed if that has not been done yet.

    Raises: IPMergeError if the model does not exist or does not belong to the pair.
    """
    pack_id = asked.pack_id
    if who == BASE:
        label = describe_unmerged(analysis_of(pack_id).sources.mllm.id)
        return Found(live.base(label), label)
    if who.startswith(FINETUNED):
        model = find_finetuned(backend, pack_id, who, asked.keys)
        column = backend.live.folder_column(live, model.folder, model.label, progress, stops)
        return Found(column, model.label)
    chosen = merge_of(asked.chosen, who)
    if chosen is None or chosen.merge is not None:
        run = chosen.run if chosen else who
        merge = find_merge(backend, pack_id, run, asked.keys)
        column = backend.live.folder_column(live, merge.folder, merge.label, progress, stops)
        return Found(column, merge.label, merge.made.plan)
    progress("making the plan")
    plan = chosen.make_plan()
    label = name_of(chosen, plan.hash)
    device = backend.device_for()
    column = backend.live.column(live, plan, label, progress, stops, device=device)
    return Found(column, label, plan.hash)


def answer_question(
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
    answers = Answers(backend, asked, request or ActiveRequest(len(asked.columns)), before)
    answers.start(list(range(len(asked.columns)) if only is None else only))
    yield from stream_sides(answers)


def stream_sides(answers: Answers) -> Generator[tuple[Side, ...], None, None]:
    """Yield copies of the sides until they are over; closing the generator stops the models."""
    deadline = time.monotonic() + LONGEST_TURN
    try:
        answers.wait(FIRST_STATE)
        while not answers.are_over:
            yield answers.snapshot()
            answers.wait(YIELD_EVERY)
            if time.monotonic() > deadline:
                break
        words = "" if answers.are_over else f"the limit of {LONGEST_TURN / 60:.0f} minutes"
        yield tuple(side.stopped(words) for side in answers.snapshot())
    finally:
        answers.close()


class Answers:
    """The sides of one question and the threads that fill them, one per group of columns.

    On a ZeroGPU Space a thread holds the GPU for all its columns and reads their sides from the
    process that answers; there `is_lent` is true.
    """

    def __init__(
        self,
        backend: Backend,
        asked: Question,
        request: ActiveRequest,
        before: Sequence[Side] = (),
        *,
        is_lent: bool = False,
    ) -> None:
        self.backend, self.asked, self.request = backend, asked, request
        self.is_lent = is_lent
        self.sides = list(before) or [Side(name) for name in self.names()]
        self.messages = asked.messages()
        self.threads: list[threading.Thread] = []
        self._news = threading.Event()  # set when a side begins or ends

    @classmethod
    def n_stops(cls, asked: Question) -> int:
        """Return the number of sides of a question."""
        return len(asked.columns)

    def names(self) -> Sequence[str]:
        """Return the names of the sides."""
        return column_names(self.asked.columns)

    @property
    def are_over(self) -> bool:
        """Whether all sides are over and no retry is requested; retries are started."""
        if self.request.stop_all.is_set():
            return self.request.close(finished=False)
        for column in self.request.take_retries():
            if self.sides[column].is_over:
                self.start([column])
        return all(side.is_over for side in self.sides) and self.request.close()

    def start(self, columns: Sequence[int]) -> None:
        """Ask some columns in a thread, in one batch where their models allow it."""
        names = self.names()
        for column in columns:
            self.sides[column] = Side(names[column])
            self.request.stops[column] = threading.Event()
        lends = is_zero_gpu() and not self.is_lent
        work = partial(self._fill_lent if lends else self.fill, tuple(columns))
        thread = threading.Thread(target=self._do, args=(work,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def _do(self, work: Callable[[], None]) -> None:
        work()
        self._news.set()  # also for a side that has failed

    def wait(self, seconds: float) -> None:
        """Wait, but not beyond the first text or the end of a side."""
        self._news.wait(seconds)
        self._news.clear()

    def read(self, sides: Sequence[Side], states: Sequence[RowState]) -> None:
        """Take over the states of rows."""
        for side, state in zip(sides, states, strict=True):
            before = side.has_begun, side.is_over
            side.read(state)
            if (side.has_begun, side.is_over) != before:
                self._news.set()

    def snapshot(self) -> tuple[Side, ...]:
        """Return copies of all sides."""
        return tuple(map(replace, self.sides))

    def close(self) -> None:
        """Stop all models and wait for their threads."""
        self.request.close(finished=False)
        self.request.stop_all.set()
        for thread in self.threads:
            thread.join(STOP_TIMEOUT)

    def _fill_lent(self, columns: tuple[int, ...]) -> None:
        """Fill the sides of some columns from a process that has the GPU for all of them."""
        sides = [self.sides[column] for column in columns]

        def answer() -> None:
            folder = tempfile.TemporaryDirectory(prefix="ipmerge-stops-")
            stops = StopFiles(folder.name)
            host = LentHost.of(self.backend)
            lent: Any = lent_sides(type(self), pack_question(self.asked), columns, stops, host)
            with closing(lent) as stream, folder:  # the folder goes first, which ends the process
                for found in stream:
                    stops.stop(column for column in columns if self.request.is_stopped(column))
                    if self.request.stop_all.is_set() or all(side.is_over for side in sides):
                        return
                    self._copy(columns, found)

        guarded(answer, sides)

    def _copy(self, columns: Sequence[int], found: Sequence[Side]) -> None:
        """Take over the sides of another process; those that are stopped here stay so."""
        for column, side in zip(columns, found, strict=True):
            mine, is_stopped = self.sides[column], self.request.stops[column].is_set()
            if not mine.is_over:
                vars(mine).update(vars(mine.stopped() if is_stopped else side))
        self._news.set()

    def fill(self, columns: tuple[int, ...]) -> None:
        """Fill the sides of some columns."""
        sides = {column: self.sides[column] for column in columns}
        for column, side in sides.items():
            side.source = name_asked(self.asked.chosen, self.asked.columns[column])

        def progress(words: str) -> None:
            for side in sides.values():
                side.note = words
            if self.request.stop_all.is_set():
                raise RunCancelled("Stopped while the model was loading.")

        def answer() -> None:
            progress("importing libraries")
            self.backend.import_libraries()
            progress("loading weights")
            live = self.backend.live_model(self.asked.pack_id, [self.request.stop_all])
            rows = {column: row for column in columns if (row := self._row(live, column))}
            for column in rows:
                sides[column].note = "reading the question"
            for states in live.stream(list(rows.values()), [self.request.stop_all]):
                self.read([sides[column] for column in rows], states)

        guarded(answer, list(sides.values()))

    def _row(self, live: LiveModel, column: int) -> Row | None:
        """Return the row of a column; None if its model cannot be found, which its side states."""
        from ipmerge_core.adapters.columns import Row

        side, stop = self.sides[column], self.request.stops[column]
        stops = [stop, self.request.stop_all]
        found: list[Row] = []

        def progress(words: str) -> None:
            side.note = words
            if any(event.is_set() for event in stops):
                raise RunCancelled("Stopped while the model was prepared.")

        def find() -> None:
            who, asked = self.asked.columns[column], self.asked
            model = find_column(self.backend, live, asked, who, progress, stops)
            side.source, side.plan = model.label, model.plan
            if asked.images:
                side.image_processor = live.loaded.processor.image_processor or ""
            found.append(Row(model.column, self.messages[column], asked.settings, [stop]))

        guarded(find, [side])
        return found[0] if found else None


def gpu_seconds(
    kind: type[Answers], asked: Question | PackedQuestion, columns: Sequence[int]
) -> int:
    """Return the GPU time that a question may take; columns of tensors take turns."""
    del kind  # a strip over lambda is one batch, too
    own = {who for who in asked.columns if who not in (BASE, PLAN, FORM, RECORD)}
    tokens = asked.settings.max_new_tokens + asked.settings.max_thinking_tokens
    return call_seconds(tokens, 1 + len(own) if columns else 1, prepares=bool(own))


def _lent_seconds(
    kind: type[Answers],
    asked: PackedQuestion,
    columns: Sequence[int],
    stops: StopFiles,
    host: LentHost,
) -> int:
    """Return the GPU time of `lent_sides`, whose arguments these are."""
    del stops, host
    return gpu_seconds(kind, asked, columns)


@on_gpu(_lent_seconds)
def lent_sides(
    kind: type[Answers],
    asked: PackedQuestion,
    columns: Sequence[int],
    stops: StopFiles,
    host: LentHost,
) -> Generator[tuple[Side, ...], None, None]:
    """Yield the sides of some columns, in a process that has a GPU for all of them.

    The process has a backend of its own.
    """
    question = asked.unpack()
    request = ActiveRequest(kind.n_stops(question))
    answers = kind(host.backend(), question, request, is_lent=True)
    answers.sides = [
        side if number in columns else side.stopped() for number, side in enumerate(answers.sides)
    ]
    answers.start(columns)
    with closing(stream_sides(answers)) as stream:
        for sides in stream:
            stops.read(request.stop_all, request.stops)
            yield tuple(sides[column] for column in columns)


def guarded(work: Callable[[], None], sides: Sequence[Side]) -> None:
    """Do a part of the work; an error is shown on its sides that are not over."""
    try:
        work()
    except RunCancelled:
        _end(sides, "stopped", "")
    except IPMergeError as error:
        _end(sides, "failed", sentence_of(error))
    except Exception as error:  # noqa: BLE001 (a bug in one column must not affect the others)
        _end(sides, "failed", public_text(f"Unexpected {type(error).__name__}: {error}"))


def _end(sides: Sequence[Side], state: Literal["stopped", "failed"], note: str) -> None:
    for side in sides:
        if not side.is_over:
            side.note, side.state = note, state
