"""Answer one conversation with several columns of a pair: the base, plans and finished merges.

In: a pair, what each column is, and messages. Out: a generator of one `ColumnAnswer` per column,
several times a second. A column that cannot be prepared fails alone.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.runtime.zero_gpu import call_seconds, is_zero_gpu, on_gpu
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import sentence_of
from ipmerge_core.ui.lending import LentHost, PackedMessage, StopFiles

if TYPE_CHECKING:
    from pathlib import Path

    from ipmerge_core.adapters.columns import Column
    from ipmerge_core.adapters.live import LiveModel
    from ipmerge_core.inference.prompts import Message
    from ipmerge_core.inference.sampling import GenerationSettings
    from ipmerge_core.inference.streaming import RowState
    from ipmerge_core.planning.plan import MergePlan

MOST_COLUMNS = 8


class AskedColumn(NamedTuple):
    """A column by its label: the unmerged model, a plan, or a folder."""

    label: str
    plan: MergePlan | None = None
    folder: Path | None = None


class ColumnAnswer(NamedTuple):
    """The reply of one column so far; `note` is progress, or the reason of a failure."""

    label: str
    state: str
    text: str = ""
    thinking: str = ""
    note: str = ""
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    is_cut: bool = False

    @classmethod
    def of(cls, label: str, row: RowState) -> ColumnAnswer:
        """Describe the state of a row in plain values."""
        return cls(
            label,
            row.state,
            row.text,
            row.reply.thinking,
            sentence_of(RunError(row.note)) if row.note else "",
            len(row.ids),
            round(row.seconds, 3),
            round(row.tokens_per_second, 2),
            row.is_cut,
        )


def answer_columns(
    backend: Backend,
    pack_id: str,
    asked: Sequence[AskedColumn],
    messages: Sequence[Message],
    settings: GenerationSettings,
    stops: Sequence[threading.Event] = (),
) -> Iterator[list[ColumnAnswer]]:
    """Prepare the columns, then answer with all of them at the same time.

    Closing the generator stops the model at its next token.

    Raises: RunError for no column or too many; otherwise as `Backend.live_model`.
    """
    if not 1 <= len(asked) <= MOST_COLUMNS:
        raise RunError(f"{len(asked)} columns were requested; expected 1 to {MOST_COLUMNS}.")
    if not is_zero_gpu():
        yield from _answer_columns(backend, pack_id, asked, messages, settings, stops)
        return
    packed = [PackedMessage.of(message) for message in messages]
    folder = tempfile.TemporaryDirectory(prefix="ipmerge-stops-")
    files, host = StopFiles(folder.name), LentHost.of(backend)
    lent: Any = _lent_columns(host, files, pack_id, tuple(asked), packed, settings)
    with closing(lent) as stream, folder:  # the folder goes first, which ends the process
        for found in stream:
            if any(stop.is_set() for stop in stops):
                return
            yield found


def _seconds(
    host: LentHost,
    files: StopFiles,
    pack_id: str,
    asked: Sequence[AskedColumn],
    packed: Sequence[PackedMessage],
    settings: GenerationSettings,
) -> int:
    """Return the GPU time of `_lent_columns`, whose arguments these are."""
    del host, files, pack_id, packed
    own = sum(each.folder is not None or each.plan is not None for each in asked)
    tokens = settings.max_new_tokens + settings.max_thinking_tokens
    return call_seconds(tokens, 1 + own, prepares=bool(own))


@on_gpu(_seconds)
def _lent_columns(
    host: LentHost,
    files: StopFiles,
    pack_id: str,
    asked: Sequence[AskedColumn],
    packed: Sequence[PackedMessage],
    settings: GenerationSettings,
) -> Iterator[list[ColumnAnswer]]:
    """Answer with all columns, in a process that has a GPU for them."""
    stop, messages = threading.Event(), [each.unpack() for each in packed]
    for found in _answer_columns(host.backend(), pack_id, asked, messages, settings, [stop]):
        files.read(stop)
        yield found


def _answer_columns(
    backend: Backend,
    pack_id: str,
    asked: Sequence[AskedColumn],
    messages: Sequence[Message],
    settings: GenerationSettings,
    stops: Sequence[threading.Event],
) -> Iterator[list[ColumnAnswer]]:
    """Prepare the columns and answer, in this process."""
    backend.import_libraries()
    from ipmerge_core.adapters.columns import Row

    answers = [ColumnAnswer(each.label, "waiting") for each in asked]
    answers[0] = answers[0]._replace(note="loading weights")
    yield list(answers)
    live = backend.live_model(pack_id, stops)
    columns: dict[int, Column] = {}
    for number, each in enumerate(asked):
        answers[number] = answers[number]._replace(note="preparing the merge" if each.plan else "")
        yield list(answers)
        try:
            columns[number] = _column(backend, live, each, stops)
        except IPMergeError as error:
            answers[number] = ColumnAnswer(each.label, "failed", note=sentence_of(error))
    rows = [Row(column, messages, settings) for column in columns.values()]
    for states in live.stream(rows, stops) if rows else iter(()):
        for number, state in zip(columns, states, strict=True):
            answers[number] = ColumnAnswer.of(asked[number].label, state)
        yield list(answers)
    if not rows:
        yield list(answers)


def _column(
    backend: Backend, live: LiveModel, asked: AskedColumn, stops: Sequence[threading.Event]
) -> Column:
    if asked.folder is not None:
        return backend.live.folder_column(live, asked.folder, asked.label, stops=stops)
    if asked.plan is None:
        return live.base(asked.label)
    device = backend.device_for()
    return backend.live.column(live, asked.plan, asked.label, stops=stops, device=device)
