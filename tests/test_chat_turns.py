"""Turns of a conversation: what is sent later, dividers, marks, blind votes, exports, bounds."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipmerge_core.errors import RunError
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.ui.chat import turns as turns_module
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.asking import (
    MOST_IMAGES,
    Typed,
    find_reference,
    make_question,
    read_prompt,
)
from ipmerge_core.ui.chat.blind import BOTH_BAD, TIE, preferred, shuffled, tally_html, voted
from ipmerge_core.ui.chat.blind import votes_csv as csv_of
from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.differences import difference_html, find_difference
from ipmerge_core.ui.chat.export import KINDS, export
from ipmerge_core.ui.chat.messages import messages, view
from ipmerge_core.ui.chat.recorded import Reference, examples_for, recorded_examples
from ipmerge_core.ui.chat.settings import NOT_SENT, SENT, SENT_RECORDED, read_settings
from ipmerge_core.ui.chat.turns import (
    MOST_PAST,
    MOST_TURNS,
    HistoryRule,
    Turn,
    check_room,
    divider,
    earlier_turns,
    pushed,
    turn_of_example,
)
from ipmerge_core.ui.chat.verdicts import difference_marks, first_difference
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.safe_text import show_text

PACK = "pack"
EVIL = "<script>alert(1)</script>"


def side(text: str = "5.", **more: object) -> Side:
    """A finished answer."""
    return Side(**{"name": "Base", "state": "finished", "text": text, **more})


def turn(*texts: str, **more: object) -> Turn:
    """A finished turn of one pair."""
    values = {"question": "q", "images": (), "pair": "a pair", "pack_id": "p", **more}
    return Turn(answers=tuple(map(side, texts)), **values)


# --- what is sent ------------------------------------------------------------------------------


def test_a_column_is_sent_its_own_answers_for_its_pair_only():
    record = turn_of_example(recorded_examples()[0])
    of_pair = replace(record, pack_id="p")
    turns = [turn("a", "b"), turn("c"), turn("d", " "), turn("e", "f", pack_id="other"), of_pair]

    def sent(column: int, rule: HistoryRule) -> list[str]:
        found = earlier_turns(turns, column, "p", rule)
        return [each.answers[column].text for each in found]

    assert sent(0, HistoryRule()) == ["a", "c", "d"]
    assert sent(1, HistoryRule()) == ["b"]
    assert sent(1, HistoryRule(recorded=True)) == ["b", of_pair.answers[1].text]
    assert sent(0, HistoryRule(earlier=False, recorded=True)) == []


def test_a_question_carries_the_system_prompt_and_each_column_its_own_history():
    image = str(recorded_examples()[0].image)
    record = turn_of_example(recorded_examples()[0])
    before = replace(turn("one", "two", question="first?", images=(image,)), pack_id=PACK)
    held = Held(ChosenMerge(PACK, by="explore"), {})
    how = read_settings(0, 8, 0, 0, "Be brief.", SENT, False)
    asked = make_question(Typed("second?", (image, image)), held, how, [record, before])
    first, second = asked.messages()
    roles = ["system", "user", "assistant", "user"]
    assert [message.role for message in first] == [message.role for message in second] == roles
    assert [message.text for message in first] == ["Be brief.", "first?", "one", "second?"]
    assert second[2].text == "two"
    assert [len(message.images) for message in first] == [0, 1, 0, 2]
    alone = make_question(Typed("q", ()), held, how._replace(system=""), [])
    first, second = alone.messages()
    assert first is second, "equal conversations are encoded once"
    with pytest.raises(RunError, match="'gone.png' is no longer there"):
        make_question(Typed("q", ("/nowhere/gone.png",)), held, how, [])


def test_settings_are_read_and_refused_with_a_sentence():
    values = (0.5, 64, 256, 7, "  Be brief. ", SENT_RECORDED, True)
    read = read_settings(*values)
    assert read.generation == GenerationSettings(0.5, 64, 7, 256)
    assert (read.system, read.history, read.blind) == ("Be brief.", HistoryRule(True, True), True)
    assert read_settings(*values[:5], SENT, False).history == HistoryRule()
    for rule in (NOT_SENT, None, "x"):
        assert not read_settings(*values[:5], rule, None).history.earlier
    with pytest.raises(RunError, match="system prompt has 16001 characters"):
        read_settings(*values[:4], "x" * 16_001, SENT, False)
    with pytest.raises(RunError, match="number of new tokens is 0"):
        read_settings(0, None, None, None, None, None, None)


def test_the_prompt_is_read_or_refused_with_a_sentence():
    images = [f"/tmp/{n}.png" for n in range(MOST_IMAGES)]
    assert read_prompt({"text": " q ", "files": images}) == Typed("q", tuple(images))
    for typed, words in {
        None: "The prompt is empty",
        ("", ("a.png",)): "an image but no question",
        ("q", ("long.txt",)): "'long.txt' is not an image",
        ("q", ("a.png",) * 9): "There are 9 images; a question can have 8",
        ("x" * 100_000, ()): "The question has 100000 characters; the maximum is",
    }.items():
        given_prompt = typed and {"text": typed[0], "files": list(typed[1])}
        with pytest.raises(RunError, match=words):
            read_prompt(given_prompt)


@pytest.mark.parametrize("pair", ["pack", "taught", "smollm2"])
def test_a_reference_is_found_for_its_question_and_image_only(pair, tmp_path):
    example = examples_for(pair)[0]
    assert example.pack_id == pair
    known, image = example.reference, str(shutil.copy(example.image, tmp_path))
    assert find_reference(Typed(known.question, (image,)), None, pair) == known
    assert find_reference(Typed(known.question, (image, image + "2")), None, pair) is None
    assert find_reference(Typed("another", (image,)), None, pair) is None
    filled = Reference("q", "x.png", "12", True)
    assert find_reference(Typed("q", ("/cache/x.png",)), filled, pair) == filled
    assert find_reference(Typed("q", ()), filled, pair) is None
    # A picture of the same name with other content, such as that of another pair's example.
    Path(image).write_bytes(b"other")
    assert find_reference(Typed(known.question, (image,)), None, pair) is None
    Path(image).unlink()
    assert find_reference(Typed(known.question, (image,)), None, pair) is None


def test_a_pair_without_records_shows_those_of_the_demo():
    assert examples_for("packs-none") == recorded_examples()


def test_a_conversation_is_bounded_by_turns_and_characters(monkeypatch):
    check_room([turn("a")] * (MOST_TURNS - 1), "q")
    with pytest.raises(RunError, match=f"has {MOST_TURNS} turns .* Export it, then press Clear"):
        check_room([turn("a")] * MOST_TURNS, "q")
    monkeypatch.setattr(turns_module, "LONGEST_CONVERSATION", 10)
    with pytest.raises(RunError, match="1 turns and 12 characters"):
        check_room([turn("a" * 5, "b" * 5)], "q")
    past: list = []
    for number in range(MOST_PAST + 5):
        past = pushed(past, {"text": str(number)}, [])
    assert [state.typed["text"] for state in past] == [str(n) for n in range(5, MOST_PAST + 5)]


# --- dividers and marks ----------------------------------------------------------------------


def test_a_divider_says_what_changed_between_two_turns():
    def with_plan(source: str, plan: str, **more: object) -> Turn:
        return replace(turn("x", **more), answers=(side("x", source=source, plan=plan),))

    first = with_plan("plan in Explore", "3f9a0000")
    for second, words in [
        (with_plan("plan in Explore", "3f9a0000"), ""),
        (with_plan("plan in Explore λ 2", "81c00000"), "plan 3f9a → 81c0"),
        (with_plan("mllm, unmerged", ""), "plan in Explore → mllm, unmerged"),
        (with_plan("x", "1", pack_id="o", pair="other"), "pair a pair → other"),
        (with_plan("x", "1", recorded="2026-01-01"), ""),
        (with_plan("x", "1", blind_seed=0), ""),
    ]:
        assert divider(first, second, 0) == words
    assert divider(None, first, 0) == ""
    shown = messages([first, with_plan("y", "81c00000")], 0)
    assert [m["role"] for m in shown] == ["user", "assistant", "assistant", "user", "assistant"]
    assert shown[2]["content"][0]["text"] == '<p class="divider">plan 3f9a → 81c0</p>'


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [
        ("", "", None),
        ("a", "a", None),
        ("a", "", 0),
        ("area 12", "area 15", 5),
        ("8*5.", "8*5=40.", 3),
        ("same", "same, but longer", 4),
        ("ab cd", "ab ce", 3),
    ],
)
def test_the_first_difference_is_at_the_start_of_its_word(first, second, place):
    assert first_difference(first, second) == place
    assert first_difference(second, first) == place


def test_marks_compare_complete_answers_with_the_first_column():
    assert difference_marks(turn("a 1", "a 1", "a 2")) == {0: 2, 2: 2}
    assert difference_marks(turn("a", "a")) == {}
    assert difference_marks(Turn("q", (), "p", (side("a"), side("b", state="stopped")))) == {}
    shown = messages([turn("it is 12.", "it is 15.")], 1)[-1]["content"][-1]["text"]
    assert 'it is <mark class="difference">15.</mark>' in shown


MARKUP = st.lists(
    st.sampled_from(
        [
            "word",
            " ",
            "\n",
            "*",
            "**",
            "`",
            "```\n",
            "$x$",
            r"\(a\)",
            "|",
            "|-|-|\n",
            "<b>",
            "&",
            "5",
        ]
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(MARKUP, st.integers(0, 40))
def test_a_mark_adds_one_element_and_changes_nothing_else(text, place):
    plain, marked = show_text(text), show_text(text, mark=min(place, len(text)))
    assert marked.count("<mark") <= 1
    assert re.sub(r"</?mark[^>]*>", "", marked) == plain


# --- blind mode --------------------------------------------------------------------------------


def test_the_order_of_a_blind_turn_is_seeded_and_differs_between_turns():
    orders = [shuffled(2, 3, number) for number in range(40)]
    assert orders == [shuffled(2, 3, number) for number in range(40)]
    assert set(orders) == {(0, 1), (1, 0)}


def blind(**more: object) -> Turn:
    sides = (
        side("one", name="Base", source="org/mllm, unmerged"),
        side("two", name="Merged", source="plan X", plan="3f9a0000"),
    )
    return replace(turn(), answers=sides, order=(1, 0), blind_seed=7, **more)


def test_a_blind_turn_hides_every_name_until_the_vote():
    hidden = view([blind()], 2)
    shown = json.dumps([hidden.chats, hidden.status, hidden.source, hidden.tabs])
    for name in ("org/mllm", "plan X", "3f9a", "Base", "Merged"):
        assert name not in shown
    assert "two" in hidden.chats[0][-1]["content"][-1]["text"]  # the second column, first
    assert hidden.status.startswith("Model A finished. Model B finished.")
    for kind in KINDS:
        _, text = export([blind()], kind)
        for name in ("org/mllm", "plan X", "3f9a"):
            assert name not in text
    (after,) = voted([blind()], "A", " because ")
    assert (preferred(after), after.vote.reason) == ("plan X", "because")
    assert "plan X" in view([after], 2).source


def test_votes_are_counted_and_exported_and_others_refused():
    turns = [*voted([blind()], "A", ""), *voted([blind()], TIE, "=1+1"), *voted([blind()], "A", "")]
    assert "<caption>3 blind votes</caption>" in tally_html(turns)
    assert "<tr><td>plan X</td><td>2</td></tr>" in tally_html(turns)
    rows = list(csv.DictReader(io.StringIO(csv_of(turns))))
    assert len(rows) == 6
    assert (rows[2]["vote"], rows[2]["reason"], rows[2]["shown"]) == (TIE, "'=1+1", "A")
    assert (rows[0]["preferred"], rows[0]["model"], rows[0]["answer"]) == (
        "plan X",
        "plan X",
        "two",
    )
    assert tally_html([]) == ""
    for turns_before, choice in (([], "A"), ([turn("a")], "A"), ([blind()], "C"), (turns, TIE)):
        with pytest.raises(RunError, match="no blind answer|Unknown vote"):
            voted(turns_before, choice, "")
    with pytest.raises(RunError, match="reason has 501 characters"):
        voted([blind()], BOTH_BAD, "x" * 501)
    with pytest.raises(RunError, match="no votes yet"):
        csv_of([blind()])


# --- exports -----------------------------------------------------------------------------------


def test_exports_hold_every_text_and_no_markup_of_it(tmp_path):
    example = turn_of_example(recorded_examples()[0])
    odd = turn("```\ncode\n```` `", EVIL, question=EVIL, system=EVIL, pair=EVIL)
    failed = replace(turn("a"), answers=(Side("Base", state="failed", note=EVIL),))
    found = {kind: export([example, odd, failed], kind)[1] for kind in KINDS}
    assert EVIL not in found["html"]
    assert "data:image/png;base64," in found["html"]
    assert "Content-Security-Policy" in found["html"]
    assert not re.search(r"""(src|href)="(?!data:)""", found["html"])
    content = json.loads(found["json"])
    assert [answer["text"] for answer in content["turns"][1]["answers"]] == [
        "```\ncode\n```` `",
        EVIL,
    ]
    assert content["turns"][0]["reference"]["answer"] == example.reference.answer
    assert content["turns"][0]["images"][0]["name"] == example.reference.image
    assert "`````text\n```\ncode\n```` `\n`````" in found["md"]
    for text in found.values():
        assert str(recorded_examples()[0].image.parent) not in text
    with pytest.raises(RunError, match="conversation is empty"):
        export([], "json")


def test_images_that_are_too_large_for_an_export_are_refused(tmp_path, monkeypatch):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG" + b"0" * 100)
    monkeypatch.setattr("ipmerge_core.ui.chat.export.MOST_IMAGE_BYTES", 50)
    with pytest.raises(RunError, match="Export it as Markdown"):
        export([turn("a", images=(str(picture),))], "html")
    assert "a.png" in export([turn("a", images=(str(picture),))], "md")[1].replace("&#46;", ".")


# --- token probabilities -----------------------------------------------------------------------


def test_the_first_difference_of_tokens_is_found_against_the_first_column():
    def with_ids(*ids: tuple[int, ...]) -> Turn:
        return replace(turn(), answers=tuple(side("x", ids=each) for each in ids))

    assert find_difference(with_ids((1, 2), (1, 3))) == (0, 1, 1)
    assert find_difference(with_ids((1, 2), (1, 2), (1,))) == (0, 2, 1)
    for same in (((1, 2), (1, 2)), ((1,), ()), ()):
        with pytest.raises(RunError, match="no first difference"):
            find_difference(with_ids(*same))


def test_tokens_are_shown_escaped_with_their_probability():
    from ipmerge_core.adapters.first_difference import TokenChoice

    shown = difference_html(["A"], EVIL, [[TokenChoice(1, "\n<b>", 0.25)]])
    assert EVIL not in shown
    assert "<code>\\n&lt;b&gt;</code></td><td>25.00%" in shown
