"""Text of others is handled in linear time and refused by its length first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_doors import DOORS, LONGEST, TOKENS

from ipmerge_core.errors import RunError
from ipmerge_core.inference.prompts import LONGEST_QUESTION
from ipmerge_core.ui import latex
from ipmerge_core.ui import safe_text as written
from ipmerge_core.ui.chat import asking, messages

LIMIT = 120  # seconds for all tokens; they take a tenth of it, what is quadratic takes hours


def filled(token: str, length: int = LONGEST) -> str:
    return (token * (length // len(token) + 1))[:length]


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("door", [name for name in DOORS if not name.startswith("message")])
def test_a_hundred_kilobytes_of_any_token_end_at_every_door(door):
    for token in TOKENS:
        DOORS[door](filled(token))
        DOORS[door](f"layers.1.{filled(token)}\n[INST")  # nearly what the pattern looks for


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("door", ["message", "message, growing"])
@pytest.mark.parametrize("token", [r"\(", r"\boxed{", "$x ", "` ", "```a\n", "**a ", "|a|\n|-|\n"])
def test_a_hundred_kilobytes_of_what_messages_are_searched_for_end(door, token):
    DOORS[door](filled(token))


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("door", ["message", "message, growing"])
def test_ten_kilobytes_of_every_token_end(door):
    for token in TOKENS:
        DOORS[door](filled(token, LONGEST // 10))


@pytest.mark.timeout(LIMIT)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), min_size=2, max_size=4).map("".join))
def test_ten_kilobytes_of_every_mixture_end(token):
    for door in ("message", "message, growing"):
        DOORS[door](filled(token, LONGEST // 10))


@pytest.mark.parametrize("token", [r"\(", r"\boxed{", r"\begin{align}", "$", "`", "{"])
def test_a_message_looks_at_each_of_its_tokens_a_bounded_number_of_times(monkeypatch, token):
    """Counted, not timed: how often the scan asks for an atom and for soundness."""
    counts = {"atom": 0, "sound": 0}
    atom_at, is_sound = latex._Scan._atom_at, latex._Scan._is_sound

    def counted_atom(self, number):
        counts["atom"] += 1
        return atom_at(self, number)

    def counted_sound(self, number, partner):
        counts["sound"] += partner - number
        return is_sound(self, number, partner)

    monkeypatch.setattr(latex._Scan, "_atom_at", counted_atom)
    monkeypatch.setattr(latex._Scan, "_is_sound", counted_sound)
    text = filled(token, 20_000) + filled(r"}\)\end{align}$`", 20_000)
    written._show(text, finished=True)
    assert counts["atom"] <= len(text)
    assert counts["sound"] <= 4 * len(text)


@pytest.mark.parametrize("length", [LONGEST_QUESTION + 1, LONGEST])
def test_a_question_that_is_too_long_meets_no_pattern(monkeypatch, length):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a pattern ran")

    for module, name in ((messages, "show_text"), (asking, "Turn"), (written, "clean_text")):
        monkeypatch.setattr(module, name, fail)
    with pytest.raises(
        RunError, match=f"has {length} characters; the maximum is {LONGEST_QUESTION}"
    ):
        asking.read_prompt({"text": filled(r"\(", length), "files": []})


def test_numbers_in_names_that_are_too_long_to_read_are_no_numbers():
    digits = "1" * 5000
    for door in DOORS.values():
        door(f"model.layers.{digits}.mlp.up_proj.weight")
        door(f"x[{digits}:{digits}]")
