"""Ask one question over lambda: the strip of eight gains of one plan, in one batch.

In: the question of the last turn and the chosen merge. Out: the content of the strip while it is
answered; a cell that is selected sets lambda of the chosen merge.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr

from ipmerge_core.errors import PlanError, RunCancelled, RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.active_requests import ActiveRequest, ActiveRequests
from ipmerge_core.ui.chat.answers import Answers, Side, find_column, guarded, stream_sides
from ipmerge_core.ui.chat.asking import Typed, make_question
from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.columns import PLAN, with_gain
from ipmerge_core.ui.chat.inputs import MODELS, Inputs, inputs_of, session_of
from ipmerge_core.ui.chat.layout import Parts
from ipmerge_core.ui.chat.question import Question
from ipmerge_core.ui.chat.settings import read_settings
from ipmerge_core.ui.chat.strip import GAINS, content_of, taken_gain
from ipmerge_core.ui.chat.turns import Turn
from ipmerge_core.ui.chosen_merge import ChosenMerge, chosen_line, name_of
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.tab import PairView, map_content
from ipmerge_core.ui.runs import Updates

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.adapters.live import LiveModel


def wire_strip(
    backend: Backend, parts: Parts, shown: PairView, requests: ActiveRequests
) -> Dependency:
    """Wire "Same question over λ" and the cells of the strip.

    Returns the event after which another lambda is chosen.
    """

    def sweep(request: gr.Request, *values: Any) -> Iterator[Updates]:  # noqa: ANN401
        now = Inputs.read(values)
        asked, last = _question(now), now.turns[-1]
        active = requests.start(session_of(request), len(GAINS))
        idle = {button: gr.update(interactive=True) for button in parts.idle_buttons}
        busy = {button: gr.update(interactive=False) for button in parts.idle_buttons}
        try:
            yield {**busy, parts.tools.stop: gr.update(interactive=True)}
            with closing(answer_strip(backend, asked, active)) as stream:
                for sides in stream:
                    yield {parts.strip: _content(asked, last, sides)}
            yield {**idle, parts.tools.stop: gr.update(interactive=False)}
        finally:
            requests.end(session_of(request), active)

    def check(*values: Any) -> None:  # noqa: ANN401
        _question(Inputs.read(values))

    def take(event: gr.EventData, *values: Any) -> Updates:  # noqa: ANN401
        gain, held = taken_gain(event), Held(*values)
        if gain is None:
            raise RunError("This cell has no lambda that Explore can set. Select another one.")
        plan, _ = held.chosen.recipe
        taken = held._replace(chosen=held.chosen.with_plan(plan._replace(lambda_=gain)))
        return {
            shown.chosen: taken.chosen,
            shown.layer_map: map_content(taken.chosen.pack_id, taken.chosen.plan),
            **parts.choice.updates(backend, taken),
        }

    choice = parts.choice
    busy = [parts.tools.stop, *parts.idle_buttons]
    parts.sweep.click(show_errors(check), inputs_of(parts), None, **QUIET).success(
        show_errors(sweep), inputs_of(parts), [parts.strip, *busy], **MODELS
    )
    filled = [shown.chosen, shown.layer_map, *choice.shown]
    taken: Dependency = parts.strip.take(show_errors(take), choice.asked, filled, **QUIET)
    taken.success(chosen_line, choice.chosen, choice.line, **QUIET)
    return taken


def _question(now: Inputs) -> Question:
    """Return the last question for the chosen merge. Raises: RunError, PlanError."""
    if not now.turns:
        raise RunError("There is no question yet. Type a question, or select an example.")
    chosen, last = now.held.chosen, now.turns[-1]
    if chosen.recipe.method.name:
        raise PlanError(
            f"'{name_of(chosen)}' has no λ that scales its change. Choose a plan of IP-Merging in "
            f"Explore first."
        )
    settings = read_settings(*now.settings)
    asked = make_question(Typed(last.question, last.images), now.held, settings, now.turns[:-1])
    number = asked.columns.index(PLAN) if PLAN in asked.columns else 0
    return asked._replace(columns=(PLAN,), before=asked.before[number : number + 1])


def _content(asked: Question, last: Turn, sides: tuple[Side, ...]) -> dict[str, Any]:
    lambda_ = asked.chosen.recipe.plan.lambda_
    notes = dict.fromkeys(side.note for side in sides if side.note and not side.is_over)
    words = [name_of(asked.chosen), *notes]
    note = " · ".join(words)
    return content_of(asked.text, sides, last.reference, chosen=lambda_, note=note)


def answer_strip(
    backend: Backend, asked: Question, request: ActiveRequest
) -> Generator[tuple[Side, ...], None, None]:
    """Answer a question with the chosen plan at all gains, in one batch."""
    answers = StripAnswers(backend, asked, request)
    answers.start(range(len(GAINS)))
    yield from stream_sides(answers)


class StripAnswers(Answers):
    """The sides of one question over lambda, which only stop together."""

    @classmethod
    def n_stops(cls, _asked: Question) -> int:
        """Return the number of gains."""
        return len(GAINS)

    def names(self) -> list[str]:
        """Return the names of the sides."""
        return [f"λ {gain:g}" for gain in GAINS]

    def fill(self, _columns: tuple[int, ...]) -> None:
        """Fill all sides."""
        guarded(self._answer, self.sides)

    def _answer(self) -> None:
        stops = [self.request.stop_all]

        def progress(words: str) -> None:
            for side in self.sides:
                side.note = words
            if self.request.stop_all.is_set():
                raise RunCancelled("Stopped while the model was loading.")

        progress("importing libraries")
        self.backend.import_libraries()
        progress("loading weights")
        live: LiveModel = self.backend.live_model(self.asked.pack_id, stops)
        unit: ChosenMerge = with_gain(self.asked.chosen, 1.0)
        asked = self.asked._replace(chosen=unit)
        column = find_column(self.backend, live, asked, PLAN, progress, stops).column
        (messages,) = self.messages
        for states in live.strip(column, GAINS, messages, asked.settings, stops):
            self.read(self.sides, states)
