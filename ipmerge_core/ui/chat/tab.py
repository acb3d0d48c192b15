"""Build the Try it tab: ask two models one question and show both answers side by side.

In: the session's `ChosenMerge`, and the model selected for each side. Out: two answers streamed
from one generator, with one Stop. The prompt stays in the box until the user clears it, so that no
error can lose it. Earlier turns are not sent to the models. A recorded example shows its own plan,
which one button chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import RunError
from ipmerge_core.inference.generation import GenerationSettings
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.prompts import check_question
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import BASE, ActiveRequests, Question, answer_both, new_sides
from ipmerge_core.ui.chat.recorded import Example, Reference, recorded_examples
from ipmerge_core.ui.chat.side_choice import (
    SideChoice,
    default_right,
    keys_of,
    list_sides,
    side_choice,
    wire_choice,
)
from ipmerge_core.ui.chat.turns import Turn, View, turn_of_example, view, without_records
from ipmerge_core.ui.chosen_merge import ChosenMerge, chosen_line
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.tab import PairView, after_commits, map_content
from ipmerge_core.ui.latex import DELIMITERS
from ipmerge_core.ui.pairs import pair_name
from ipmerge_core.ui.runs import Updates

if TYPE_CHECKING:
    from gradio.events import Dependency
    from PIL.Image import Image

INTRODUCTION = (
    "Ask two models the same question: the unmerged model, the chosen merge, or a finished merge. "
    "Earlier messages are not sent."
)
SEND_HINT = "Type a question and add an image; only the newest image is used"
LONGEST_ANSWER = 512
EMPTY_PROMPT: dict[str, Any] = {"text": "", "files": []}
OUTCOMES = {
    "fixed": "✓ fixed",
    "broken": "✕ broken",
    "both right": "= both correct",
    "both wrong": "= both wrong",
}


class Parts(NamedTuple):
    """The components of the tab that handlers read or write."""

    sides: SideChoice
    turns: gr.State
    prompt: gr.MultimodalTextbox
    numbers: list[Any]  # temperature, longest answer, seed
    stop: gr.Button
    again: gr.Button
    clear: gr.Button
    undo: gr.Button
    take: gr.Button  # chooses the plan of the recorded example on show
    examples: list[gr.Button]
    view: Mapping[str, Any]  # by the field of `View` that it shows

    @property
    def outputs(self) -> list[Any]:
        """What `updates` fills."""
        return [self.turns, *self.view.values(), self.stop, self.take, *self._idle_buttons]

    def updates(self, turns: list[Turn]) -> Updates:
        """Return the updates that show turns; while answers arrive, only Stop is enabled."""
        running = bool(turns) and not turns[-1].is_over
        shown = view(turns)._asdict()
        return {
            self.turns: turns,
            **{component: shown[field] for field, component in self.view.items()},
            self.stop: gr.update(interactive=running),
            self.take: gr.update(visible=bool(turns) and turns[-1].choice is not None),
            **{button: gr.update(interactive=not running) for button in self._idle_buttons},
        }

    @property
    def _idle_buttons(self) -> list[gr.Button]:
        return [self.again, self.clear, *self.examples]


class TryTab(NamedTuple):
    """What the app uses of this tab: the sides, and the events after which a merge is chosen."""

    sides: SideChoice
    chose: list[Dependency]


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
    that the browser remembers, see `side_choice`.
    """
    parts = _layout(recorded_examples(), shown.chosen, runs, last)
    chose = wire_choice(backend, parts.sides, pair, tab)
    _wire_questions(backend, parts, shown.chosen)
    _wire_examples(parts)
    _wire_clear(parts)
    return TryTab(parts.sides, [chose, _wire_records(backend, parts, pair, shown)])


# --- wiring ----------------------------------------------------------------------------------


def _wire_questions(backend: Backend, parts: Parts, chosen: gr.State) -> None:
    """Wire Send, Ask again and Stop."""
    requests = ActiveRequests()

    def check(typed: dict[str, Any], *numbers: float) -> None:
        _, image = _read_prompt(typed)
        _read_settings(*numbers)
        _open(image)

    # `how` is the rest of `inputs` after the turns: see `_question`.
    def ask(
        request: gr.Request,
        typed: dict[str, Any],
        before: list[Turn],
        *how: Any,  # noqa: ANN401
    ) -> Iterator[Updates]:
        text, image = _read_prompt(typed)
        asked = _question(text, image, *how)
        turn = _new_turn(asked, image, _known(text, image))
        yield from _run(backend, parts, requests.start(_session(request)), before, turn, asked)

    def check_again(before: list[Turn]) -> None:
        if not before:
            raise RunError("There is no question yet. Type a question first.")

    def ask_again(
        request: gr.Request,
        before: list[Turn],
        *how: Any,  # noqa: ANN401
    ) -> Iterator[Updates]:
        last = before[-1]
        asked = _question(last.question, last.image, *how)
        turn = _new_turn(asked, last.image, last.reference)
        yield from _run(backend, parts, requests.start(_session(request)), before[:-1], turn, asked)

    def stop_both(request: gr.Request) -> None:
        requests.stop(_session(request))

    inputs = [parts.turns, chosen, *parts.sides.inputs, *parts.numbers]
    models: dict[str, Any] = {**QUIET, "concurrency_id": "models", "concurrency_limit": 1}
    # Checks have no outputs, so that an error keeps the answers on the page.
    parts.prompt.submit(show_errors(check), [parts.prompt, *parts.numbers], None, **QUIET).success(
        show_errors(ask), [parts.prompt, *inputs], parts.outputs, **models
    )
    parts.again.click(show_errors(check_again), parts.turns, None, **QUIET).success(
        show_errors(ask_again), inputs, parts.outputs, **models
    )
    parts.stop.click(stop_both, None, None, queue=False, **QUIET)


def _wire_examples(parts: Parts) -> None:
    """Wire the examples; under another pair than theirs they are questions without answers."""
    examples = recorded_examples()

    def show_example(number: int, before: list[Turn], chosen: ChosenMerge) -> Updates:
        turn = turn_of_example(examples[number])
        kept = before[:-1] if before and before[-1].recorded else before
        turns = [*kept, turn] if turn.pack_id == chosen.pack_id else kept
        return {parts.prompt: _prompt_value(turn), **parts.updates(turns)}

    for number, button in enumerate(parts.examples):
        show = partial(show_example, number)
        asked, filled = [parts.turns, parts.sides.chosen], [parts.prompt, *parts.outputs]
        button.click(show, asked, filled, queue=False, **QUIET)


def _wire_records(backend: Backend, parts: Parts, pair: gr.Dropdown, shown: PairView) -> Dependency:
    """Wire the button that chooses a record's plan; remove the records of another pair.

    Returns the event after which the plan is chosen.
    """

    def take(turns: list[Turn], now: ChosenMerge, *how: Any) -> Updates:  # noqa: ANN401
        choice = turns[-1].choice if turns else None
        if choice is None or turns[-1].pack_id != now.pack_id:
            raise RunError("There is no recorded answer of this pair on show. Select an example.")
        taken = now.with_record(choice)
        left, right = list_sides(backend, taken, *how)
        return {
            shown.chosen: taken,
            shown.layer_map: map_content(now.pack_id, choice),
            parts.sides.left: left,
            parts.sides.right: right,
        }

    def drop(turns: list[Turn], now: ChosenMerge) -> Updates:
        return parts.updates(without_records(turns, now.pack_id))

    sides = parts.sides
    filled = [shown.chosen, shown.layer_map, *sides.shown]
    taken = parts.take.click(
        show_errors(take), [parts.turns, *sides.asked], filled, show_progress_on=[], **QUIET
    )
    taken.success(chosen_line, sides.chosen, sides.line, **QUIET)
    after_commits(pair.change, pair).then(
        drop, [parts.turns, sides.chosen], parts.outputs, queue=False, **QUIET
    )
    return taken


def _wire_clear(parts: Parts) -> None:
    """Wire Clear and Undo clear."""

    def clear_all(typed: dict[str, Any], before: list[Turn]) -> Updates:
        undo = {cleared: (typed, before), parts.undo: gr.update(visible=True)}
        return {**undo, parts.prompt: EMPTY_PROMPT, **parts.updates([])}

    def restore(before: tuple[dict[str, Any], list[Turn]]) -> Updates:
        typed, turns = before
        hidden = {parts.undo: gr.update(visible=False)}
        return {**hidden, parts.prompt: typed, **parts.updates(turns)}

    cleared = gr.State((EMPTY_PROMPT, []))
    filled = [parts.undo, parts.prompt, *parts.outputs]
    asked = [parts.prompt, parts.turns]
    parts.clear.click(clear_all, asked, [cleared, *filled], queue=False, **QUIET)
    parts.undo.click(restore, cleared, filled, queue=False, **QUIET)


# --- layout ----------------------------------------------------------------------------------


def _layout(
    examples: list[Example], chosen: gr.State, runs: gr.BrowserState, last: gr.BrowserState
) -> Parts:
    own = [example for example in examples if example.pack_id == chosen.value.pack_id]
    first = [turn_of_example(own[0])] if own else []
    gr.Markdown(INTRODUCTION, elem_classes="lead")
    buttons = _example_buttons(examples)
    prompt = gr.MultimodalTextbox(
        value=_prompt_value(first[0]) if first else None,
        placeholder=SEND_HINT,
        label="Question",
        show_label=False,
        file_types=["image"],
        file_count="multiple",  # "single" takes no new picture before the old one is removed
        sources=["upload"],
        max_plain_text_length=100_000,
        elem_id="prompt",
    )
    with gr.Row(elem_id="chat-tools"):
        stop = gr.Button("Stop both", size="sm", interactive=False, elem_id="stop")
        again = gr.Button("Ask again", size="sm", elem_id="retry")
        clear = gr.Button("Clear", size="sm", elem_id="clear")
        undo = gr.Button("Undo clear", size="sm", visible=False, elem_id="undo-clear")
    with gr.Accordion("Settings", open=False, elem_id="chat-settings"), gr.Row():
        numbers = [
            gr.Slider(
                0,
                2,
                value=0,
                step=0.05,
                label="Temperature",
                info="0: the most likely token",
            ),
            gr.Slider(1, LONGEST_ANSWER, value=128, step=1, label="Maximum new tokens"),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
        ]
    sides = side_choice(chosen, runs, last)
    turns = gr.State(first)
    shown, take = _answers(view(first))
    return Parts(sides, turns, prompt, numbers, stop, again, clear, undo, take, buttons, shown)


def _example_buttons(examples: list[Example]) -> list[gr.Button]:
    if not examples:
        return []
    gr.Markdown("Recorded examples: no model is run", elem_classes="caption")
    with gr.Row(elem_id="examples"):
        return [
            gr.Button(
                f"{example.reference.question}\n{OUTCOMES[example.outcome]}",
                icon=example.image,
                size="sm",
                min_width=120,
                elem_classes="example",
                elem_id=f"example-{number}",
            )
            for number, example in enumerate(examples)
        ]


def _answers(first: View) -> tuple[Mapping[str, Any], gr.Button]:
    """Lay out the two chats and their captions.

    Returns them by the field of `View` they show, and the button that chooses a record's plan.
    """
    with gr.Row(elem_id="answers-line"):
        source = gr.HTML(first.source, elem_id="answers-source", elem_classes="chips")
        take = gr.Button(
            "Use this plan",
            size="sm",
            visible=bool(first.chat_left),
            elem_id="take-record",
        )
        status = gr.HTML(first.status, elem_id="answers-status")
    with gr.Row(elem_id="chats"):
        with gr.Column(min_width=300):
            left = lay_out_chat("Left model", "chat-base", first.chat_left)
            verdict_left = gr.HTML(first.verdict_left, elem_id="verdict-base", elem_classes="chips")
        with gr.Column(min_width=300):
            right = lay_out_chat("Right model", "chat-merged", first.chat_right)
            verdict_right = gr.HTML(
                first.verdict_right, elem_id="verdict-merged", elem_classes="chips"
            )
    shown = {
        "chat_left": left,
        "chat_right": right,
        "verdict_left": verdict_left,
        "verdict_right": verdict_right,
        "status": status,
        "source": source,
    }
    return shown, take


def lay_out_chat(label: str, elem_id: str, value: list[Any]) -> gr.Chatbot:
    """Lay out a chat whose messages are HTML made by `safe_text`; it must not render Markdown."""
    return gr.Chatbot(
        value,
        label=label,
        elem_id=elem_id,
        height=420,
        render_markdown=False,
        latex_delimiters=DELIMITERS,
        sanitize_html=True,
        allow_tags=False,
        buttons=["copy", "copy_all"],
        feedback_options=None,
        placeholder="The answer appears here.",
    )


# --- turns -----------------------------------------------------------------------------------


def _run(
    backend: Backend, parts: Parts, stop: Event, before: list[Turn], turn: Turn, asked: Question
) -> Iterator[Updates]:
    """Ask both models and yield the view about ten times a second."""
    yield parts.updates([*before, turn])  # immediately: importing torch may take a while
    for left, right in answer_both(backend, asked, stop):
        yield parts.updates([*before, replace(turn, left=left, right=right)])


def _new_turn(asked: Question, image: str | None, reference: Reference | None) -> Turn:
    """Return a turn without answers."""
    sides = new_sides(asked.left, asked.right)
    name = pair_name(asked.pack_id)
    return Turn(asked.text, image, name, *sides, reference, pack_id=asked.pack_id)


def _question(  # the components of the tab, in order
    text: str,
    image: str | None,
    chosen: ChosenMerge,
    left: str | None,
    right: str | None,
    runs: object,
    last: object,
    *numbers: float,
) -> Question:
    """Build the question from the inputs. Raises: RunError for a setting out of range."""
    settings, keys = _read_settings(*numbers), keys_of(runs, last)
    left, right = left or BASE, right or default_right(chosen)
    return Question(chosen, text, _open(image), settings, left, right, keys)


def _open(image: str | None) -> Image | None:
    return open_image(image) if image else None


def _read_settings(
    temperature: float | None, longest: float | None, seed: float | None
) -> GenerationSettings:
    """Check the three settings; an empty field is 0. Raises: RunError."""
    return GenerationSettings(float(temperature or 0), int(longest or 0), int(seed or 0))


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _read_prompt(typed: dict[str, Any] | None) -> tuple[str, str | None]:
    """Return the question and the newest image of a prompt. Raises: RunError without a question."""
    typed = typed or EMPTY_PROMPT
    question, files = typed.get("text") or "", typed.get("files") or []
    if not question and not files:
        raise RunError("The prompt is empty. Type a question; an image is optional.")
    if not question:
        raise RunError("There is an image but no question. Type a question about the image.")
    return check_question(question), str(files[-1]) if files else None


def _prompt_value(turn: Turn) -> dict[str, Any]:
    return {"text": turn.question, "files": [turn.image] if turn.image else []}


def _known(question: str, image: str | None) -> Reference | None:
    """Return the correct answer if question and image are those of an example."""
    for example in recorded_examples():
        reference = example.reference
        if image and question == reference.question and Path(image).name == reference.image:
            return reference
    return None
