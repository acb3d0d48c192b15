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
from ipmerge_core.ui.chat.active_requests import ActiveRequests
from ipmerge_core.ui.chat.answers import Side, answer_question
from ipmerge_core.ui.chat.asking import Typed, make_question, new_turn, read_prompt
from ipmerge_core.ui.chat.column_choice import ColumnChoice, wire_choice
from ipmerge_core.ui.chat.costs import check_consent, column_costs, wire_costs
from ipmerge_core.ui.chat.differences import wire_difference
from ipmerge_core.ui.chat.inputs import MODELS, Inputs, inputs_of, session_of
from ipmerge_core.ui.chat.layout import EMPTY_PROMPT, Parts, lay_out
from ipmerge_core.ui.chat.question import Question
from ipmerge_core.ui.chat.recorded import Reference
from ipmerge_core.ui.chat.sending import end_sending, return_refused, wire_send
from ipmerge_core.ui.chat.settings import read_settings
from ipmerge_core.ui.chat.sweeping import wire_strip
from ipmerge_core.ui.chat.turn_actions import (
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
from ipmerge_core.ui.lending import serve_lent
from ipmerge_core.ui.runs import Updates

if TYPE_CHECKING:
    from gradio.events import Dependency

Json = dict[str, Any]
WAITS = "Waiting: the question of another visitor is being answered."


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
    serve_lent(backend)
    parts = lay_out(shown.chosen, runs, last)
    events = wire_choice(backend, parts.choice, pair, tab)
    wire_costs(backend, parts, events.changed)
    requests = ActiveRequests()
    _wire_questions(backend, parts, requests)
    wire_difference(backend, parts)
    wire_columns_view(parts, events.resized)
    wire_examples(parts)
    wire_random(parts)
    wire_history(parts)
    wire_exports(parts)
    wire_vote(parts)
    chose = [
        wire_records(backend, parts, pair, shown),
        wire_strip(backend, parts, shown, requests),
    ]
    return TryTab(parts.choice, chose, FillPrompt(parts))


# --- questions -------------------------------------------------------------------------------


def _wire_questions(backend: Backend, parts: Parts, requests: ActiveRequests) -> None:
    """Wire Send, Ask again, Stop and Retry."""

    def check(typed: Json, agreed: bool, *values: Any) -> None:  # noqa: ANN401
        now = Inputs.read(values)
        read = read_prompt(typed)
        make_question(read, now.held, read_settings(*now.settings), now.turns)
        check_room(now.turns, read.text)
        check_consent(column_costs(backend, now.held), agreed=agreed)

    def ask(request: gr.Request, typed: Json, *values: Any) -> Iterator[Updates]:  # noqa: ANN401
        now, read = Inputs.read(values), read_prompt(typed)
        started = _start(now, read, now.turns, now.given)
        sent = {parts.past: pushed(now.past, typed, now.turns, EMPTY_PROMPT)}
        yield from _run(
            backend, parts, _Run(requests, session_of(request), *started, now.turns), sent
        )

    def ask_again(request: gr.Request, typed: Json, *values: Any) -> Iterator[Updates]:  # noqa: ANN401
        now = Inputs.read(values)
        last, before = now.turns[-1], now.turns[:-1]
        again = _start(now, Typed(last.question, last.images), before, last.reference)
        sent = {parts.past: pushed(now.past, typed, now.turns)}
        yield from _run(backend, parts, _Run(requests, session_of(request), *again, before), sent)

    def check_again(agreed: bool, *values: Any) -> None:  # noqa: ANN401
        now = Inputs.read(values)
        if not now.turns:
            raise RunError("There is no question yet. Type a question first.")
        check_consent(column_costs(backend, now.held), agreed=agreed)

    asks, shown = inputs_of(parts), [parts.past, *parts.outputs]
    # Checks have no outputs, so that an error keeps the question and the answers on the page.
    agreed = [parts.agree, *inputs_of(parts)]
    checked = wire_send(parts).success(show_errors(check), [parts.sent, *agreed], None, **QUIET)
    asked = checked.success(show_errors(ask), [parts.sent, *asks], shown, **MODELS)
    for event in (checked, asked):
        return_refused(parts, event)
    end_sending(asked)
    again = parts.tools.again.click(show_errors(check_again), agreed, None, **QUIET)
    again.success(show_errors(ask_again), [parts.prompt, *asks], shown, **MODELS)
    for event in (checked, again):
        event.success(_waiter(requests), None, parts.status, queue=False, **QUIET)
    parts.tools.stop.click(_stopper(requests), None, None, queue=False, **QUIET)
    for position in range(len(parts.choice.columns)):
        _wire_column(backend, parts, requests, position)


def _wire_column(backend: Backend, parts: Parts, requests: ActiveRequests, position: int) -> None:
    """Wire Stop and Retry of a column; a column that failed early is asked while others answer."""
    column = parts.choice.columns[position]

    def stop(request: gr.Request, turns: list[Turn]) -> None:
        if turns:
            requests.stop(session_of(request), turns[-1].column_at(position))

    def join(request: gr.Request, turns: list[Turn]) -> bool:
        return bool(turns) and requests.retry(session_of(request), turns[-1].column_at(position))

    def retry(request: gr.Request, accepted: bool, *values: Any) -> Iterator[Updates]:  # noqa: ANN401
        now = Inputs.read(values)
        if accepted or not now.turns:
            yield {parts.status: gr.skip()}  # a generator without values would clear all outputs
            return
        last, before = now.turns[-1], now.turns[:-1]
        number = last.column_at(position)
        _, asked = _start(now, Typed(last.question, last.images), before, last.reference)
        if number >= len(asked.columns):
            raise RunError("This column was removed. Add it again, or press Ask again.")
        columns = asked.columns[: len(last.answers)]  # one may have been added since
        run = _Run(requests, session_of(request), last, asked._replace(columns=columns), before)
        yield from _run(backend, parts, run, {}, only=[number])

    asked = [parts.accepted, *inputs_of(parts)]
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
        stream = answer_question(backend, run.asked, request, before=kept, only=only)
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


def _waiter(requests: ActiveRequests) -> Callable[[gr.Request], Any]:
    """Return a handler that states that a question waits for those of other visitors."""

    def wait(request: gr.Request) -> Any:  # noqa: ANN401
        return WAITS if requests.ahead(session_of(request)) else gr.skip()

    return wait


def _stopper(requests: ActiveRequests) -> Callable[[gr.Request], None]:
    def stop(request: gr.Request) -> None:
        requests.stop(session_of(request))

    return stop
