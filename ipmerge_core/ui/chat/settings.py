"""Lay out the settings of the chat and read their values.

In: values of the form, any of which may be empty. Out: checked settings of generation, the system
prompt, which earlier turns are sent, and whether names are hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import RunError
from ipmerge_core.inference.prompts import LONGEST_MESSAGE
from ipmerge_core.inference.sampling import (
    MOST_NEW_TOKENS,
    MOST_THINKING_TOKENS,
    GenerationSettings,
)
from ipmerge_core.ui.chat.recorded import DEMO_PAIR
from ipmerge_core.ui.chat.turns import HistoryRule

SENT, SENT_RECORDED, NOT_SENT = "Sent", "Sent, recorded ones too", "Not sent"
RULES = {SENT: HistoryRule(), SENT_RECORDED: HistoryRule(recorded=True)}
KEYS = (
    "Keys: Enter sends, Shift+Enter starts a line, Esc stops all answers. Outside of text fields, "
    "[ and ] show the previous and the next column of a narrow page, and in blind mode A to D, T "
    "and 0 vote: T for a tie, 0 for both bad."
)


class ChatSettings(NamedTuple):
    """The settings of a question."""

    generation: GenerationSettings
    system: str
    history: HistoryRule
    blind: bool


class SettingFields(NamedTuple):
    """The components of the settings, in the order of `read_settings`."""

    temperature: gr.Slider
    longest: gr.Slider
    thinking: gr.Slider
    seed: gr.Number
    system: gr.Textbox
    earlier: gr.Radio
    blind: gr.Checkbox
    scrolling: gr.Checkbox  # read by the page

    @property
    def inputs(self) -> list[Any]:
        """The inputs of a handler that calls `read_settings`."""
        return list(self[:-1])


def usual_rule(pack_id: str) -> str:
    """Return whether earlier turns of a pair are sent unless a visitor selects otherwise.

    The demo models were trained on single questions.
    """
    return NOT_SENT if pack_id == DEMO_PAIR else SENT


def lay_out_settings(pack_id: str) -> SettingFields:
    """Lay out the settings in an accordion, for a pair."""
    with gr.Accordion("Settings", open=False, elem_id="chat-settings"):
        with gr.Row():
            temperature = gr.Slider(
                0, 2, value=0, step=0.05, label="Temperature", info="0: the most likely token",
                elem_id="chat-temperature",
            )  # fmt: skip
            longest = gr.Slider(
                1, MOST_NEW_TOKENS, value=128, step=1, label="Maximum new tokens",
                info="Of an answer", elem_id="chat-longest",
            )  # fmt: skip
            thinking = gr.Slider(
                0, MOST_THINKING_TOKENS, value=1024, step=16, label="Maximum thinking tokens",
                info="Of thinking models, before the answer", elem_id="chat-thinking",
            )  # fmt: skip
            seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1,
                info="Of sampling, and of the order in blind mode", elem_id="chat-seed",
            )  # fmt: skip
        system = gr.Textbox(
            "", label="System prompt", lines=1, max_lines=8,
            placeholder="None. A model without a system role reads it before the first question.",
            elem_id="chat-system",
        )  # fmt: skip
        with gr.Row():
            earlier = gr.Radio(
                [SENT, SENT_RECORDED, NOT_SENT], value=usual_rule(pack_id), label="Earlier turns",
                info="A column reads its own. Demo models know one question",
                elem_id="chat-earlier",
            )  # fmt: skip
            blind = gr.Checkbox(
                False, label="Blind mode", info="Hide names and shuffle answers until you vote",
                elem_id="chat-blind",
            )  # fmt: skip
            scrolling = gr.Checkbox(
                True, interactive=True, label="Link scrolling", info="All columns scroll together",
                elem_id="chat-scrolling",
            )  # fmt: skip
        gr.Markdown(KEYS, elem_classes="caption")
    return SettingFields(temperature, longest, thinking, seed, system, earlier, blind, scrolling)


def read_settings(
    temperature: float | None,
    longest: float | None,
    thinking: float | None,
    seed: float | None,
    system: str | None,
    earlier: str | None,
    blind: bool | None,
) -> ChatSettings:
    """Check the settings; an empty number is 0. Raises: RunError for a value out of range."""
    generation = GenerationSettings(
        float(temperature or 0), int(longest or 0), int(seed or 0), int(thinking or 0)
    )
    system = (system or "").strip()
    if len(system) > LONGEST_MESSAGE:
        raise RunError(
            f"The system prompt has {len(system)} characters; the maximum is {LONGEST_MESSAGE}."
        )
    history = RULES.get(str(earlier), HistoryRule(earlier=False))
    return ChatSettings(generation, system, history, bool(blind))
