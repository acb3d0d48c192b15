"""Build the Try it tab: a conversation with the models of two to four columns at the same time.

In: the session's `ChosenMerge`, and the models selected for the columns. Out: answers streamed from
one generator, with one Stop per column and one for all. A recorded example shows its own plan,
which one button chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import (
    ActiveRequests,
    Question,
    Side,
    answer_columns,
)
from ipmerge_core.ui.chat.asking import Typed, make_question, new_turn, read_prompt
from ipmerge_core.ui.chat.column_choice import ColumnChoice, Held, wire_choice
from ipmerge_core.ui.chat.layout import EMPTY_PROMPT, Parts, lay_out
from ipmerge_core.ui.chat.recorded import Reference
from ipmerge_core.ui.chat.settings import read_settings
from ipmerge_core.ui.chat.tools import (
    FillPrompt,
    wire_columns_view,
    wire_examples,
    wire_exports,
    wire_history,
    wire_random,
    wire_records,
    wire_vote,
)
from ipmerge_core.ui.chat.turns import Turn, check_room, pushed
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.tab import PairView
from ipmerge_core.ui.runs import Updates

if TYPE_CHECKING:
    from gradio.events import Dependency

Json = dict[str, Any]
N_SETTINGS = 6  # inputs of `read_settings`
MODELS: dict[str, Any] = {**QUIET, "concurrency_id": "models", "concurrency_limit": 1}


class TryTab(NamedTuple):
    """What the app uses of this tab.

    `chose` are the events after which another merge is chosen; `fill` puts a question into the
    prompt.
    """

    choice: ColumnChoice
    chose: list[Dependency]
    fill: FillPrompt


def try_tab(
    backend: Backend,
    pair: gr.Dropdown,
    shown: PairView,
    *,
    runs: gr.BrowserState,
    last: gr.BrowserState,
    tab: gr.Tab,
) -> TryTab:
    """Lay out the tab inside the open `tab` and wire it.

    `shown` shows the pair in Explore and holds the chosen merge; `runs` and `last` are the merges
    that the browser remembers, see `column_choice`.
    """
    parts = lay_out(shown.chosen, runs, last)
    resized = wire_choice(backend, parts.choice, pair, tab)
    _wire_questions(backend, parts)
    wire_columns_view(parts, resized)
    wire_examples(parts)
    wire_random(parts)
    wire_history(parts)
    wire_exports(parts)
    wire_vote(parts)
    chose = wire_records(backend, parts, pair, shown)
    return TryTab(parts.choice, [chose], FillPrompt(parts))


class Inputs(NamedTuple):
    """The values of `_inputs`: what a handler that asks reads."""

    turns: list[Turn]
    past: list[Any]
    given: Reference | None
    held: Held
    settings: tuple[Any, ...]

    @classmethod
    def read(cls, values: Sequence[Any]) -> Inputs:
        """Read the values in the order of `_inputs`."""
        turns, past, given, *rest = values
        return cls(turns, past, given, Held(*rest[:-N_SETTINGS]), tuple(rest[-N_SETTINGS:]))


def _inputs(parts: Parts) -> list[Any]:
    return [
        parts.turns, parts.past, parts.given, *parts.choice.asked, *parts.settings.inputs,
    ]  # fmt: skip


# --- questions -------------------------------------------------------------------------------


def _wire_questions(backend: Backend, parts: Parts) -> None:
    """Wire Send, Ask again, Stop and Retry."""
    requests = ActiveRequests()

    def check(typed: dict[str, Any], *values: Any) -> None:  # noqa: ANN401
        now = Inputs.read(values)
        read = read_prompt(typed)
        make_question(read, now.held, read_settings(*now.settings), now.turns)
        check_room(now.turns, read.text)

    def ask(request: gr.Request, typed: Json, *values: Any) -> Iterator[Updates]:  # noqa: ANN401
        now, read = Inputs.read(values), read_prompt(typed)
        started = _start(now, read, now.turns, now.given)
        sent = {parts.past: pushed(now.past, typed, now.turns), parts.prompt: EMPTY_PROMPT}
        yield from _run(
            backend, parts, _Run(requests, _session(request), *started, now.turns), sent
        )

    def ask_again(request: gr.Request, typed: Json, *values: Any) -> Iterator[Updates]:  # noqa: ANN401
        now = Inputs.read(values)
        last, before = now.turns[-1], now.turns[:-1]
        again = _start(now, Typed(last.question, last.images), before, last.reference)
        sent = {parts.past: pushed(now.past, typed, now.turns)}
        yield from _run(backend, parts, _Run(requests, _session(request), *again, before), sent)

    def check_again(turns: list[Turn]) -> None:
        if not turns:
            raise RunError("There is no question yet. Type a question first.")

    asks = [parts.prompt, *_inputs(parts)]
    # Checks have no outputs, so that an error keeps the question and the answers on the page.
    parts.prompt.submit(show_errors(check), asks, None, **QUIET).success(
        show_errors(ask), asks, [parts.past, parts.prompt, *parts.outputs], **MODELS
    )
    parts.tools.again.click(show_errors(check_again), parts.turns, None, **QUIET).success(
        show_errors(ask_again), asks, [parts.past, *parts.outputs], **MODELS
    )
    parts.tools.stop.click(_stopper(requests), None, None, queue=False, **QUIET)
    for position in range(len(parts.choice.columns)):
        _wire_column(backend, parts, requests, position)


def _wire_column(backend: Backend, parts: Parts, requests: ActiveRequests, position: int) -> None:
    """Wire Stop and Retry of a column; a column that failed early is asked while others answer."""
    column = parts.choice.columns[position]

    def stop(request: gr.Request, turns: list[Turn]) -> None:
        if turns:
            requests.stop(_session(request), turns[-1].column_at(position))

    def join(request: gr.Request, turns: list[Turn]) -> bool:
        return bool(turns) and requests.retry(_session(request), turns[-1].column_at(position))

    def retry(request: gr.Request, accepted: bool, *values: Any) -> Iterator[Updates]:  # noqa: ANN401
        now = Inputs.read(values)
        if accepted or not now.turns:
            return
        last, before = now.turns[-1], now.turns[:-1]
        number = last.column_at(position)
        _, asked = _start(now, Typed(last.question, last.images), before, last.reference)
        if number >= len(asked.columns):
            raise RunError("This column was removed. Add it again, or press Ask again.")
        columns = asked.columns[: len(last.answers)]  # one may have been added since
        run = _Run(requests, _session(request), last, asked._replace(columns=columns), before)
        yield from _run(backend, parts, run, {}, only=[number])

    asked = [parts.accepted, *_inputs(parts)]
    column.stop.click(stop, parts.turns, None, queue=False, **QUIET)
    column.retry.click(join, parts.turns, parts.accepted, queue=False, **QUIET).success(
        show_errors(retry), asked, parts.outputs, **MODELS
    )


class _Run(NamedTuple):
    """A question to run: the turn that shows it and the turns before it."""

    requests: ActiveRequests
    session: str
    turn: Turn
    asked: Question
    before: list[Turn]


def _start(
    now: Inputs, typed: Typed, before: list[Turn], given: Reference | None
) -> tuple[Turn, Question]:
    settings = read_settings(*now.settings)
    asked = make_question(typed, now.held, settings, before)
    return new_turn(typed, now.held, settings, before, given), asked


def _run(
    backend: Backend,
    parts: Parts,
    run: _Run,
    sent: Updates,
    *,
    only: Sequence[int] | None = None,
) -> Iterator[Updates]:
    """Ask the models and yield what changed in the view, about ten times a second."""
    n_columns = len(run.asked.columns)
    changes = _Changes(parts)
    request = run.requests.start(run.session, n_columns)
    kept = run.turn.answers if only is not None else ()
    try:
        first = replace(run.turn, answers=_waiting(run.turn, only)) if only else run.turn
        yield {**sent, **changes.since(parts.updates([*run.before, first], n_columns))}
        stream = answer_columns(backend, run.asked, request, before=kept, only=only)
        with closing(stream):
            for sides in stream:
                turns = [*run.before, replace(run.turn, answers=sides)]
                yield changes.since(parts.updates(turns, n_columns))
    finally:
        run.requests.end(run.session, request)


def _waiting(turn: Turn, columns: Sequence[int]) -> tuple[Side, ...]:
    """Return the answers of a turn, those of some columns not begun."""
    return tuple(Side(side.name) if n in columns else side for n, side in enumerate(turn.answers))


class _Changes:
    """Leaves out of updates what the page already shows."""

    def __init__(self, parts: Parts) -> None:
        self._shown: Updates = {}
        self._always = parts.status  # an update that is never empty, so that Gradio takes it

    def since(self, updates: Updates) -> Updates:
        """Return the updates that differ from those returned before."""
        missing = object()
        found = {c: v for c, v in updates.items() if self._shown.get(c, missing) != v}
        self._shown.update(found)
        return found or {self._always: updates[self._always]}


def _stopper(requests: ActiveRequests) -> Callable[[gr.Request], None]:
    def stop(request: gr.Request) -> None:
        requests.stop(_session(request))

    return stop


def _session(request: gr.Request) -> str:
    return str(request.session_hash)
