"""What a model thinks is separated from its answer, at every length, and has its own limit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_families import CHAT_FAMILIES, ChatFamily
from chat_models import build_chat
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ipmerge_core.adapters.columns import Row
from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.errors import RunError
from ipmerge_core.inference.generation import encode_messages, stream_states
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.rows import RowTokens
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.thinking import MARKERS, Marker, Reply, ThinkingTokens, split_reply

ASKED = [Message("user", "What is it?", (Image.effect_noise((90, 60), 80).convert("RGB"),))]
THINK = Marker("<think>", "</think>")


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("opened", [True, False])
def test_the_parts_grow_and_no_marker_is_ever_shown(marker: Marker, opened: bool) -> None:
    start = "" if opened else f"\n{marker.start}"
    text = f"{start}\nTwo and two.\n{marker.end}\n\nFour < five."
    before = Reply("", "", opened)
    for end in range(len(text) + 1):
        found = split_reply(text[:end], opened=opened)
        for part in (found.thinking, found.answer):
            assert not any(mark in part for pair in MARKERS for mark in pair)
        assert found.thinking.startswith(before.thinking) or not before.thinking
        assert found.answer.startswith(before.answer)
        assert not (before.answer and found.is_thinking)
        before = found
    assert before == Reply("Two and two.", "Four < five.", False)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("", False, Reply("", "", False)),
        ("Four.", False, Reply("", "Four.", False)),
        ("<", False, Reply("", "<", False)),  # a whole reply
        ("<thin", False, Reply("", "<thin", False)),
        ("Four. <think>x</think>", False, Reply("", "Four. <think>x</think>", False)),
        ("<think>never ends", False, Reply("never ends", "", True)),
        ("never ends", True, Reply("never ends", "", True)),
        ("<think></think>", False, Reply("", "", False)),
        ("lost start</think>Four.", False, Reply("lost start", "Four.", False)),
        ("a</think>b</think>c", True, Reply("a", "b</think>c", False)),
    ],
)
def test_complete_replies(text: str, opened: bool, expected: Reply) -> None:
    assert split_reply(text, opened=opened, ended=True) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "<", "th", "ink>", " ", "a\n"])),
    st.booleans(),
    st.booleans(),
)
def test_nothing_is_lost_but_markers_and_spaces(
    parts: list[str], opened: bool, ended: bool
) -> None:
    text = "".join(parts)
    found = split_reply(text, opened=opened, ended=ended)
    kept = "".join(f"{found.thinking}{found.answer}".split())
    whole = iter("".join(text.split()))
    assert all(letter in whole for letter in kept), "in order, and nothing that was not there"


# --- the budget ---


class Steps:
    """The tokens of a row, fed by hand."""

    def __init__(self, limit: int, budget: int, opened: bool = False) -> None:
        how = GenerationSettings(max_new_tokens=limit, max_thinking_tokens=budget)
        self.row = RowTokens(how, opened=opened)

    def feed(self, *tokens: int) -> RowTokens:
        marks = ThinkingTokens.of({"<think>": 7, "</think>": 8})
        for token in tokens:
            if not self.row.ended:
                self.row.take(token, [2], marks)
        return self.row


def test_thinking_does_not_count_as_answer() -> None:
    row = Steps(limit=2, budget=9).feed(7, 5, 5, 5, 8, 6, 6, 6)
    assert (row.ended, row.thinking, row.ids) == ("length", 5, [7, 5, 5, 5, 8, 6, 6])
    row = Steps(limit=2, budget=9, opened=True).feed(5, 5, 5, 8, 6, 2)
    assert (row.ended, row.thinking, row.ids) == ("end", 4, [5, 5, 5, 8, 6])


def test_a_marker_within_the_answer_opens_nothing() -> None:
    row = Steps(limit=3, budget=9).feed(6, 7, 6, 6)
    assert (row.ended, row.thinking) == ("length", 0)


def test_the_budget_is_over_after_its_tokens() -> None:
    steps = Steps(limit=3, budget=3, opened=True)
    for count in range(3):
        assert not steps.row.is_over_budget, count
        steps.feed(5)
    assert steps.row.is_over_budget
    steps.feed(8)
    assert not steps.row.is_over_budget


@pytest.mark.parametrize("value", [-1, 32_769])
def test_a_budget_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(RunError, match=f"thinking tokens is {value}; expected"):
        GenerationSettings(max_thinking_tokens=value)


def thinking_model(folder: Path, template: str = "") -> LoadedModel:
    """A random model with thinking tokens that never ends its thinking part by itself."""
    known = CHAT_FAMILIES["Qwen2.5-VL"]
    family: ChatFamily = known._replace(tokens=(*known.tokens, *THINK))
    build_chat(family, folder)
    if template:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text() + template)
    return load_model(folder)


def test_a_budget_that_is_used_up_makes_the_model_answer(tmp_path: Path) -> None:
    loaded = thinking_model(tmp_path / "model", "<think>\n")
    marks = loaded.processor.thinking
    assert len(marks.start) == len(marks.end) == 1
    how = GenerationSettings(max_new_tokens=4, max_thinking_tokens=6)
    *_, state = stream_states(loaded, encode_messages(loaded, ASKED), how)
    assert state.thinking_tokens == 7  # the budget, and the marker that ends it
    assert state.ids[6] == marks.end[0]
    assert (len(state.ids), state.is_cut) == (11, True)
    assert "</think>" not in state.text + state.reply.thinking
    live = LiveModel(loaded)
    other = GenerationSettings(max_new_tokens=4, max_thinking_tokens=2)
    rows = [Row(live.base(), ASKED, how), Row(live.base(), ASKED, other)]
    *_, states = live.stream(rows)
    assert states[0].ids == state.ids
    assert states[1].thinking_tokens == 3
    assert states[1].ids[:2] == state.ids[:2]


def test_a_prompt_that_opens_no_thinking_has_no_budget(tmp_path: Path) -> None:
    loaded = thinking_model(tmp_path / "model")
    how = GenerationSettings(max_new_tokens=5, max_thinking_tokens=0)
    *_, state = stream_states(loaded, encode_messages(loaded, ASKED), how)
    assert (len(state.ids), state.thinking_tokens) == (5, 0)


def test_markers_that_the_tokenizer_drops_are_put_back(tmp_path: Path) -> None:
    loaded = thinking_model(tmp_path / "model")
    ids = dict(zip(THINK, itertools.chain(loaded.processor.thinking.start, [0]), strict=False))
    text = loaded.processor.decode([ids["<think>"], *loaded.processor.encode_text("ab")])
    assert text == "ab"  # a special token
    values: dict[str, Any] = {"opened": False, "ended": False}
    from ipmerge_core.inference.streaming import decode_reply

    tokens = [ids["<think>"], *loaded.processor.encode_text("ab")]
    found = decode_reply(loaded.processor, tokens, loaded.processor.thinking, **values)
    assert found == Reply("ab", "", True)
    assert torch.is_tensor(encode_messages(loaded, ASKED)["input_ids"])
