"""Stream the replies of rows while threads generate them.

In: jobs that fill `RowTokens`, and a processor that decodes. Out: a `RowState` for every row,
several times a second. Closing the generator stops the model at its next token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from ipmerge_core.errors import (
    IPMergeError,
    ModelLoadError,
    RunCancelled,
    explained,
    first_line,
)
from ipmerge_core.inference.processor_process import RemoteProcessor
from ipmerge_core.inference.rows import RowTokens
from ipmerge_core.inference.thinking import Reply, ThinkingTokens, split_reply

TICK_SECONDS = 0.05  # at which threads are looked at when no row reports anything
YIELD_SECONDS = 0.05  # between two states: as fast as a page shows them
STOP_SECONDS = 10.0  # to wait for a model that is stopped
_UNFINISHED = "�"  # the first bytes of a character


class RowState(NamedTuple):
    """One reply so far.

    Attributes:
        state: what the row does.
        reply: its thinking part and its answer.
        ids: its token ids, the thinking part included, without the token that ended it.
        thinking_tokens: how many of them are the thinking part.
        seconds: since the model began to read the prompt.
        first_seconds: from then to the first token.
        is_cut: whether a limit ended it.
        note: why it failed, or progress.
        is_batched: whether other rows were generated in the same batch.
    """

    state: Literal["waiting", "thinking", "answering", "finished", "stopped", "failed"] = "waiting"
    reply: Reply = Reply("", "", False)
    ids: tuple[int, ...] = ()
    thinking_tokens: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    is_cut: bool = False
    note: str = ""
    is_batched: bool = False

    @property
    def text(self) -> str:
        """The answer without the thinking part."""
        return self.reply.answer

    @property
    def is_over(self) -> bool:
        """Whether the reply is complete, stopped or failed."""
        return self.state in ("finished", "stopped", "failed")

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second; 0 if there are fewer than two."""
        after = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / after if len(self.ids) > 1 and after > 0 else 0.0


@dataclass
class Stream:
    """One row while it is generated: its tokens, and the error that ended it."""

    tokens: RowTokens
    error: IPMergeError | None = None
    is_batched: bool = False
    is_done: bool = False
    _shown: int = -1
    _state: RowState = field(default_factory=RowState)

    def state(self, processor: RemoteProcessor, marks: ThinkingTokens) -> RowState:
        """Return the state of the row; decodes what is new."""
        row = self.tokens
        ids, ended, is_done = tuple(row.ids), row.ended, self.is_done
        if len(ids) != self._shown or (is_done and not self._state.is_over):
            try:
                reply = decode_reply(processor, ids, marks, opened=row.opened, ended=is_done)
            except IPMergeError as error:
                self.error, reply = self.error or error, self._state.reply
            self._state = RowState(
                state="thinking" if reply.is_thinking else "answering",
                reply=reply,
                ids=ids,
                thinking_tokens=row.thinking,
                seconds=max(row.last - row.started, 0.0),
                first_seconds=max(row.first - row.started, 0.0),
                is_cut=ended == "length",
                is_batched=self.is_batched,
            )
            self._shown = len(ids)
        if self.error is not None:
            return self._over("failed", note=str(self.error))
        if is_done:
            return self._over("stopped" if ended in ("stopped", "") else "finished")
        return self._state if ids else self._state._replace(state="waiting")

    def _over(self, state: Literal["finished", "stopped", "failed"], note: str = "") -> RowState:
        self._state = self._state._replace(state=state, note=note)
        return self._state


@dataclass
class Job:
    """Rows that one thread answers, and the function that does it."""

    run: Callable[[], None]
    streams: Sequence[Stream]
    name: str  # of the model, for errors

    def start(self) -> threading.Thread:
        """Start the thread."""
        thread = threading.Thread(target=self._run, name="generate", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        error: IPMergeError | None = None
        try:
            with explained(partial(failed_generation, self.name)):
                self.run()
        except RunCancelled:
            pass  # the rows are stopped
        except IPMergeError as found:
            error = found
        for stream in self.streams:
            if error is not None and not stream.tokens.ended:
                stream.error = error
            stream.is_done = True
            stream.tokens.news.set()


def stream_jobs(
    jobs: Sequence[Job],
    streams: Sequence[Stream],
    processor: RemoteProcessor,
    marks: ThinkingTokens,
    closed: threading.Event,
) -> Iterator[list[RowState]]:
    """Yield the states of all rows until each is over, at the first token and then by time.

    `closed` is set at the end, or when the generator is closed; the rows look at it.
    """
    news = threading.Event()
    for stream in streams:
        stream.tokens.news = news
    threads = [job.start() for job in jobs]
    last: list[RowState] = []
    shown_at = 0.0
    try:
        while not all(stream.is_done for stream in streams):
            news.wait(TICK_SECONDS)
            news.clear()
            begins = any(s.tokens.ids and s._shown <= 0 for s in streams)
            if begins or time.perf_counter() - shown_at >= YIELD_SECONDS:
                states = [stream.state(processor, marks) for stream in streams]
                shown_at = time.perf_counter()
                if states != last:
                    last = states
                    yield states
        yield [stream.state(processor, marks) for stream in streams]
    finally:
        closed.set()
        for thread in threads:
            thread.join(STOP_SECONDS)


def decode_reply(
    processor: RemoteProcessor,
    ids: Sequence[int],
    marks: ThinkingTokens,
    *,
    opened: bool,
    ended: bool,
) -> Reply:
    """Decode tokens and split them into the thinking part and the answer.

    Markers that a tokenizer drops from its text, as special tokens, are put back.
    """
    if not ids:
        return Reply("", "", opened and not ended)
    pieces: list[str] = []
    segment: list[int] = []
    for number in ids:
        if number in marks.names:
            pieces += [processor.decode(segment)] if segment else []
            pieces.append(marks.names[number])
            segment = []
        else:
            segment.append(number)
    pieces += [processor.decode(segment)] if segment else []
    text = "".join(pieces)
    text = text if ended else text.rstrip(_UNFINISHED)
    return split_reply(text, opened=opened, ended=ended)


def failed_generation(name: str, error: Exception) -> ModelLoadError:
    """Describe an error of a model that generates, with a remedy."""
    if type(error).__name__ == "OutOfMemoryError":
        return ModelLoadError(
            f"'{name}' ran out of memory while generating. Use a shorter conversation, a smaller "
            f"image or fewer columns, or load the model in 8 or 4 bit."
        )
    return ModelLoadError(
        f"'{name}' failed while generating ({first_line(error)}). "
        f"A shorter question or smaller image may help."
    )
