"""The Try it tab: one question, two chats, the model as it is and the merged one side by side.

In: the frame's pair and the session's `PlanChoice`. Out: answers that grow together, from one
generator, with a Stop for both. What was typed stays in the box until the visitor clears it, so no
failure can lose it. Every question is asked afresh: the models do not see earlier turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.choice import describe_choice
from ipmerge_core.ui.latex import DELIMITERS
from ipmerge_core.ui.layer_map import PlanChoice
from ipmerge_core.ui.messages import told
from ipmerge_core.ui.recorded import Example, Reference, recorded_examples
from ipmerge_core.ui.turns import Turn, View, turn_of_example, view

INTRODUCTION = (
    "One question, two answers: the vision-language model as it is, and merged with your plan. "
    "Each question is asked afresh."
)
SEND_HINT = "Ask about a picture: type a question, add an image, press Enter"
LONGEST_ANSWER = 512
EMPTY_PROMPT: dict[str, Any] = {"text": "", "files": []}
KEEP_NEWEST = """(value) => value && value.files && value.files.length > 1
  ? { ...value, files: value.files.slice(-1) } : value"""
OUTCOMES = {
    "fixed": "✓ fixed",
    "broken": "✕ broken",
    "both right": "= both right",
    "both wrong": "= both wrong",
}


class Controls(NamedTuple):
    """The components that handlers write to."""

    turns: gr.State
    prompt: gr.MultimodalTextbox
    stop: gr.Button
    view: list[gr.Blocks]

    @property
    def outputs(self) -> list[Any]:
        """What every handler of a turn returns, in order."""
        return [self.turns, *self.view, self.stop]


def try_tab(backend: Backend, pair: gr.Dropdown, choice: gr.State) -> None:
    """Lay out the tab inside the open `gr.Tab` and wire it."""
    examples = recorded_examples()
    first = [turn_of_example(examples[0])] if examples else []

    # layout
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
        temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature", info="0: the most likely token"
        )
        longest = gr.Slider(1, LONGEST_ANSWER, value=128, step=1, label="Longest answer in tokens")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
    turns = gr.State(first)
    controls = Controls(turns, prompt, stop, _answers(view(first)))

    # handlers
    def ask(
        typed: dict[str, Any],
        before: list[Turn],
        pack_id: str,
        plan: PlanChoice,
        *numbers: float,
    ) -> Iterator[list[Any]]:
        question, image = _read_prompt(typed)
        turn = Turn(question, image, describe_choice(plan), reference=_known(question, image))
        yield from _run(backend, before, turn, pack_id, plan, numbers)

    def ask_again(
        before: list[Turn], pack_id: str, plan: PlanChoice, *numbers: float
    ) -> Iterator[list[Any]]:
        if not before:
            raise RunError("There is nothing to ask again. Type a question first.")
        last = before[-1]
        turn = Turn(last.question, last.image, describe_choice(plan), reference=last.reference)
        yield from _run(backend, before[:-1], turn, pack_id, plan, numbers)

    def stop_both(before: list[Turn]) -> list[Any]:
        return _shown([*before[:-1], before[-1].stopped()] if before else [])

    def show_example(number: int, before: list[Turn]) -> list[Any]:
        turn = turn_of_example(examples[number])
        kept = before[:-1] if before and before[-1].recorded else before
        return [_prompt_value(turn), *_shown([*kept, turn])]

    def clear_all(typed: dict[str, Any], before: list[Turn]) -> list[Any]:
        return [(typed, before), gr.update(visible=True), EMPTY_PROMPT, *_shown([])]

    def restore(kept: tuple[dict[str, Any], list[Turn]]) -> list[Any]:
        return [gr.update(visible=False), kept[0], *_shown(kept[1])]

    # wiring
    kept = gr.State((EMPTY_PROMPT, []))
    settings = [pair, choice, temperature, longest, seed]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    shared: dict[str, Any] = {**quiet, "concurrency_id": "models", "concurrency_limit": 1}
    running: list[Any] = [
        prompt.submit(told(ask), [prompt, turns, *settings], controls.outputs, **shared),
        again.click(told(ask_again), [turns, *settings], controls.outputs, **shared),
    ]
    stop.click(stop_both, turns, controls.outputs, cancels=running, queue=False, **quiet)
    cleared = [kept, undo, prompt, *controls.outputs]
    clear.click(clear_all, [prompt, turns], cleared, cancels=running, queue=False, **quiet)
    undo.click(restore, kept, [undo, prompt, *controls.outputs], queue=False, **quiet)
    prompt.change(None, prompt, prompt, js=KEEP_NEWEST, api_visibility="private")
    for number, button in enumerate(buttons):
        button.click(
            _with_number(show_example, number),
            turns,
            [prompt, *controls.outputs],
            queue=False,
            **quiet,
        )


# --- layout ----------------------------------------------------------------------------------


def _example_buttons(examples: list[Example]) -> list[gr.Button]:
    if not examples:
        return []
    gr.Markdown("Recorded examples, shown at once", elem_classes="caption")
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


def _answers(first: View) -> list[Any]:
    """Lay out the two chats with what belongs to them, in the order of `View`."""
    with gr.Row(elem_id="answers-line"):
        source = gr.HTML(first.source, elem_id="answers-source", elem_classes="chips")
        status = gr.HTML(first.status, elem_id="answers-status")
    with gr.Row(elem_id="chats"):
        with gr.Column(min_width=300):
            base = _chat("Base: the model as it is", "chat-base", first.chat_base)
            verdict_base = gr.HTML(first.verdict_base, elem_id="verdict-base", elem_classes="chips")
        with gr.Column(min_width=300):
            merged = _chat("Merged: with your plan", "chat-merged", first.chat_merged)
            verdict_merged = gr.HTML(
                first.verdict_merged, elem_id="verdict-merged", elem_classes="chips"
            )
    return [base, merged, verdict_base, verdict_merged, status, source]


def _chat(label: str, elem_id: str, value: list[Any]) -> gr.Chatbot:
    return gr.Chatbot(
        value,
        label=label,
        elem_id=elem_id,
        height=420,
        latex_delimiters=DELIMITERS,
        sanitize_html=True,
        allow_tags=False,
        buttons=["copy", "copy_all"],
        feedback_options=None,
        placeholder="The answer appears here.",
    )


# --- turns -----------------------------------------------------------------------------------


def _run(
    backend: Backend,
    before: list[Turn],
    turn: Turn,
    pack_id: str,
    plan: PlanChoice,
    numbers: tuple[float, ...],
) -> Iterator[list[Any]]:
    """Ask both models and yield the whole view about ten times a second."""
    yield _shown([*before, turn])  # at once: torch may still have to be loaded
    from ipmerge_core.inference import Settings, open_image

    temperature, longest, seed = numbers
    settings = Settings(float(temperature), int(longest), int(seed))
    image = open_image(turn.image) if turn.image else None
    for base, merged in backend.answer_both(pack_id, plan, turn.question, image, settings):
        yield _shown([*before, replace(turn, base=base, merged=merged)])


def _shown(turns: list[Turn]) -> list[Any]:
    running = bool(turns) and not turns[-1].is_over
    return [turns, *view(turns), gr.update(interactive=running)]


def _read_prompt(typed: dict[str, Any]) -> tuple[str, str | None]:
    """Take question and picture from the prompt box. Raises: RunError with what is missing."""
    question, files = (typed.get("text") or "").strip(), typed.get("files") or []
    if not question and not files:
        raise RunError("There is nothing to ask yet. Type a question; a picture may go with it.")
    if not question:
        raise RunError("A picture came without a question. Type what you want to know about it.")
    if len(files) > 1:
        raise RunError(f"{len(files)} files were given; both models take one picture at a time.")
    return question, str(files[0]) if files else None


def _prompt_value(turn: Turn) -> dict[str, Any]:
    return {"text": turn.question, "files": [turn.image] if turn.image else []}


def _known(question: str, image: str | None) -> Reference | None:
    """Return the right answer where question and picture are those of an example."""
    for example in recorded_examples():
        reference = example.reference
        if image and question == reference.question and Path(image).name == reference.image:
            return reference
    return None


def _with_number(handler: Any, number: int) -> Any:  # noqa: ANN401
    return told(lambda turns: handler(number, turns))
