"""The Try it tab in a real Chromium: recorded and live answers, turns, columns, votes, errors."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser_fixtures import free_port, serving
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from slow_steps import held

from ipmerge_core.ui.chat.recorded import examples_for, recorded_examples

pytestmark = pytest.mark.browser

CHATS = ("#chat-a", "#chat-b")
LOADING = 180_000  # the first live question loads torch, here and in the process of processors


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's home folder."""
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """The address of the app over the demo trio, with answers slow enough to watch."""
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as address:
        yield address


@pytest.fixture
def page(url: str, new_page: Callable[..., Page]) -> Page:
    """The Try it tab, open."""
    return open_chat(new_page(permissions=["clipboard-read", "clipboard-write"]), url)


def open_chat(page: Page, url: str) -> Page:
    page.goto(url)
    page.locator("#tabs").get_by_role("tab", name="Try it").click()
    expect(page.locator("#prompt textarea")).to_be_visible()
    return page


def answers(page: Page, chat: str) -> Locator:
    return page.locator(f"{chat} [data-testid=bot]")


def ask(page: Page, question: str) -> None:
    box = page.get_by_role("textbox", name="Question")
    box.fill(question)
    box.press("Enter")


def clear(page: Page) -> None:
    page.locator("#clear").click()
    expect(answers(page, "#chat-a")).to_have_count(0)
    expect(page.get_by_role("textbox", name="Question")).to_have_value("")


def wait_until_finished(page: Page, ends: str = "Base finished. Merged finished.") -> None:
    expect(page.locator("#answers-status")).to_contain_text(ends, timeout=LOADING)


def choose(page: Page, letter: str, option: str) -> None:
    page.get_by_role("combobox", name=f"Model {letter}").click()
    page.get_by_role("option", name=option).click()
    expect(page.get_by_role("combobox", name=f"Model {letter}")).to_have_value(re.compile(option))


def setting(page: Page, name: str) -> Locator:
    found = page.get_by_label(name, exact=True)
    if not found.is_visible():
        page.locator("#chat-settings button").first.click()
    return found


def saved(page: Page, button: str) -> tuple[str, str]:
    """The name and the text of the file that a button saves."""
    with page.expect_download() as download:
        page.locator(button).click()
    return download.value.suggested_filename, download.value.path().read_text("utf-8")


def toast(page: Page) -> Locator:
    return page.get_by_test_id("toast-body")


# --- recorded answers --------------------------------------------------------------------------


def test_a_recorded_example_is_there_at_once_and_says_when_it_was_recorded(page):
    example = recorded_examples()[0]
    source = page.locator("#answers-source")
    expect(source).to_contain_text(f"Recorded {example.recorded}")
    expect(source).to_contain_text(example.plan)
    expect(answers(page, "#chat-a").last).to_contain_text(example.base.strip())
    expect(answers(page, "#chat-b").last).to_contain_text(example.merged.strip())
    expect(page.locator("#verdict-b .chip")).to_have_text("✓ correct")
    expect(page.locator("#chat-a img").first).to_be_visible()
    expect(page.locator("#chat-b mark")).to_have_text("=40.")


def test_an_example_that_the_merge_broke_is_shown_as_plainly_and_undo_takes_it_back(page):
    broken = next(i for i, e in enumerate(recorded_examples()) if e.outcome == "broken")
    page.locator(f"#example-{broken}").click()
    expect(page.locator("#verdict-a .chip")).to_have_text("✓ correct")
    expect(page.locator("#verdict-b .chip")).to_have_text("✕ wrong")
    box = page.get_by_role("textbox", name="Question")
    expect(box).to_have_value(recorded_examples()[broken].reference.question)
    page.locator("#undo-chat").click()
    expect(box).to_have_value(recorded_examples()[0].reference.question)
    expect(page.locator("#verdict-b .chip")).to_have_text("✓ correct")


def test_another_pair_shows_its_own_recorded_answers(page):
    for pair_id, name in (("smollm2", "SmolLM2-135M trio"), ("pack", "demo trio")):
        page.get_by_role("combobox", name="Pair").click()
        page.get_by_role("option", name=name, exact=True).click()
        own = examples_for(pair_id)
        assert own[0].pack_id == pair_id
        expect(page.locator("#answers-source")).to_contain_text(own[0].plan, timeout=LOADING)
        box = page.get_by_role("textbox", name="Question")
        expect(box).to_have_value(own[0].reference.question)
        expect(answers(page, "#chat-b").last).to_contain_text(own[0].merged.strip())
        broken = next(i for i, e in enumerate(own) if e.outcome == "broken")
        expect(page.locator(f"#example-{broken}")).to_contain_text("broken", timeout=LOADING)
        expect(page.locator(f"#example-{broken}")).to_contain_text(own[broken].reference.question)
        page.locator(f"#example-{broken}").click()
        expect(page.locator("#answers-source")).to_contain_text(own[broken].plan, timeout=LOADING)
        expect(answers(page, "#chat-b").last).to_contain_text(own[broken].merged.strip())
        expect(page.locator("#verdict-b .chip")).to_have_text("✕ wrong")


# --- live answers ------------------------------------------------------------------------------


def test_a_picture_and_a_question_are_answered_by_both_columns(page):
    clear(page)
    page.locator("#prompt input[type=file]").set_input_files(recorded_examples()[0].image)
    expect(page.locator("#prompt img")).to_be_visible()
    ask(page, "What is the perimeter?")
    wait_until_finished(page)
    for chat, verdict in zip(CHATS, ("#verdict-a", "#verdict-b"), strict=True):
        expect(page.locator(f"{chat} [data-testid=user] img")).to_be_visible()
        expect(answers(page, chat).last).to_have_text(re.compile(r"\d"))
        expect(page.locator(verdict)).to_have_text(re.compile(r"\d+ tokens"))
    expect(page.locator("#answers-source")).to_contain_text("Live")
    expect(page.get_by_role("textbox", name="Question")).to_have_value("")  # for the next turn


def test_turns_are_kept_sent_when_selected_and_undone(page):
    clear(page)
    ask(page, "Say: first answer")
    wait_until_finished(page)
    ask(page, "Say: second answer")
    expect(answers(page, "#chat-b").last).to_contain_text("second answer")
    wait_until_finished(page)
    expect(page.locator("#chat-b [data-testid=user]")).to_have_count(2)
    name, text = saved(page, "#export-json")
    assert name.endswith(".json")
    content = json.loads(text)
    assert [turn["question"] for turn in content["turns"]] == [
        "Say: first answer",
        "Say: second answer",
    ]
    assert content["turns"][1]["answers"][1]["text"] == "second answer"
    page.locator("#undo-chat").click()
    expect(page.locator("#chat-b [data-testid=user]")).to_have_count(1)
    expect(page.get_by_role("textbox", name="Question")).to_have_value("Say: second answer")


def test_both_columns_grow_together_and_stop_keeps_what_is_there(page, home):
    with held(home):
        ask(page, "Say: " + " ".join(f"word{number}" for number in range(400)))
        for chat in CHATS:
            expect(answers(page, chat).last).to_contain_text("word5", timeout=LOADING)
        page.get_by_role("textbox", name="Question").press("Escape")
        expect(page.locator("#answers-status")).to_contain_text("Base stopped. Merged stopped.")
    expect(page.get_by_role("button", name="Stop all")).to_be_disabled()
    texts = [answers(page, chat).last.inner_text() for chat in CHATS]
    page.wait_for_timeout(600)
    assert texts == [answers(page, chat).last.inner_text() for chat in CHATS]
    for text in texts:
        assert "word5" in text
        assert "word399" not in text
        assert "(stopped)" in text


def test_one_column_is_stopped_and_asked_again_while_the_other_answers(page, home):
    words = " ".join(f"word{number}" for number in range(30))
    with held(home):
        ask(page, f"Say: {words}")
        expect(answers(page, "#chat-a").last).to_contain_text("word9", timeout=LOADING)
        page.locator("#stop-a").click()
        status = page.locator("#answers-status")
        expect(status).to_contain_text("Base stopped. Merged is answering.")
        page.locator("#retry-a").click()
        expect(status).to_contain_text("Base is answering. Merged is answering.")
    wait_until_finished(page)
    for chat in CHATS:
        expect(answers(page, chat).last).to_contain_text("word29")


def test_a_column_that_failed_leaves_the_other_and_can_be_asked_again(page):
    ask(page, "Fail: how many?")
    wait_until_finished(page, "Base finished. Merged failed.")
    expect(answers(page, "#chat-b").last).to_contain_text("as the test wanted")
    page.locator("#retry-b").click()  # fails again, and nothing is locked
    expect(page.locator("#retry-b")).to_be_enabled()
    expect(page.locator("#answers-status")).to_contain_text("Base finished. Merged failed.")
    box = page.get_by_role("textbox", name="Question")
    box.fill("Say: still here")
    while box.input_value():  # refused as long as the retry, which has no sign of its end, runs
        box.press("Enter")
        page.wait_for_timeout(200)
    wait_until_finished(page)


def test_ask_again_replaces_the_last_answer(page):
    recorded = page.locator("#answers-source")
    expect(recorded).to_contain_text("Recorded")
    before = answers(page, "#chat-a").count()
    page.locator("#retry").click()
    expect(recorded).to_contain_text("Live", timeout=LOADING)
    wait_until_finished(page)
    assert answers(page, "#chat-a").count() == before


def test_clear_can_be_undone(page):
    shown = answers(page, "#chat-a").count()
    clear(page)
    page.locator("#undo-chat").click()
    expect(answers(page, "#chat-a")).to_have_count(shown)


def test_a_visitor_who_leaves_stops_the_models(url, home, new_page, page):
    leaving = open_chat(new_page(), url)
    with held(home):
        ask(leaving, "Say: " + " ".join(f"word{number}" for number in range(400)))
        expect(answers(leaving, "#chat-a").last).to_contain_text("word5", timeout=LOADING)
        ask(page, "Say: it is my turn")  # one question at a time
        expect(page.locator("#answers-status")).to_contain_text("the question of another visitor")
        leaving.close()
        expect(answers(page, "#chat-b").last).to_contain_text("it is my turn", timeout=60_000)
        expect(page.locator("#chats")).not_to_contain_text("word5")


# --- live plans and columns --------------------------------------------------------------------


def test_another_lambda_answers_the_next_turn_with_a_divider_and_no_merge(page, home):
    choose(page, "B", "Plan in Explore")
    page.locator("#retry").click()
    wait_until_finished(page)
    page.locator("#tabs").get_by_role("tab", name="Explore").click()
    number = page.get_by_label("lambda as a number")
    number.fill("8")
    number.press("Enter")
    page.locator("#tabs").get_by_role("tab", name="Try it").click()
    expect(page.get_by_role("combobox", name="Model B")).to_have_value(re.compile("λ 8"))
    ask(page, "What is the result?")
    wait_until_finished(page)
    expect(page.locator("#chat-b .divider")).to_have_text(
        re.compile(r"^plan [0-9a-f]{4} → [0-9a-f]{4}$")
    )
    expect(page.locator("#chat-a .divider")).to_have_count(0)
    assert not list((home / "previews").glob("*")), "no folder is made"


def test_a_third_column_of_another_method_says_its_cost_and_answers(page):
    page.locator("#add-column").click()
    choose(page, "C", "Other method · TIES, default values")
    expect(page.locator("#chat-cost")).to_contain_text(
        re.compile(r"Column C \(other method · TIES\) needs 3\.\d+ MB of memory of its own, about"),
        timeout=LOADING,
    )
    ask(page, "What is written here?")
    wait_until_finished(page, "Model A finished. Model B finished. Model C finished.")
    expect(answers(page, "#chat-c").first).to_contain_text("other method · TIES · plan")
    page.locator("#remove-column").click()
    expect(page.locator("#column-c")).to_be_hidden()
    expect(page.locator("#chat-cost")).to_have_text("")
    expect(page.locator("#column-b")).to_be_visible()


def test_the_strip_answers_over_lambda_and_a_cell_takes_its_lambda_to_explore(page):
    page.locator("#ask-strip").click()
    cells = page.locator("#lambda-strip .st-cells button")
    expect(cells).to_have_count(8, timeout=LOADING)
    expect(page.locator("#stop")).to_be_disabled(timeout=LOADING)
    expect(cells.nth(0).locator(".st-text")).to_have_text("8*5.")  # lambda 0: the unmerged model
    expect(cells.nth(6)).to_contain_text("✓ correct")
    expect(cells.nth(3)).to_have_attribute("aria-current", "true")
    cells.nth(6).click()
    expect(page.locator("#try-chosen")).to_contain_text("λ 8")
    page.locator("#tabs").get_by_role("tab", name="Explore").click()
    expect(page.get_by_label("lambda as a number")).to_have_value("8")
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_label("lambda as a number")).to_have_value("1")


def test_token_probabilities_at_the_first_difference(page):
    page.locator("#show-difference").click()
    expect(toast(page)).to_contain_text("Token probabilities need two live answers")
    page.locator("#retry").click()
    wait_until_finished(page)
    page.locator("#show-difference").click()
    tables = page.locator("#difference table")
    expect(tables).to_have_count(2, timeout=LOADING)
    expect(page.locator("#difference")).to_contain_text("after “8*5”")
    expect(tables.nth(0).locator("tbody tr").first).to_contain_text(".")
    expect(tables.nth(1).locator("tbody tr").first).to_contain_text("=")


def test_thinking_is_folded_away_and_not_the_answer(page):
    ask(page, "Say: it may be 99 </think> so it is 12")
    wait_until_finished(page)
    for chat in CHATS:
        last = answers(page, chat).last
        expect(last.locator("details summary")).to_have_text("Thinking · 4 words")
        expect(last).to_contain_text("so it is 12")
        expect(last.get_by_text("it may be 99")).to_be_hidden()
        last.locator("summary").click()
        expect(last.get_by_text("it may be 99")).to_be_visible()
    page.locator("#copy-b").click()
    page.wait_for_function("async () => await navigator.clipboard.readText() === 'so it is 12'")


# --- blind mode --------------------------------------------------------------------------------


def test_blind_answers_have_no_names_until_the_vote_which_is_counted_and_exported(page):
    clear(page)
    setting(page, "Blind mode").check()
    ask(page, "What is written here?")
    wait_until_finished(page, "Model A finished. Model B finished.")
    expect(page.locator("#chats")).not_to_contain_text("unmerged")
    expect(page.get_by_role("combobox", name="Model A")).to_be_hidden()
    expect(page.locator("#answers-source")).to_contain_text("Names hidden")
    page.get_by_label("Reason").fill("=clearer")
    page.locator("#vote-b").click()
    expect(page.locator("#vote")).to_be_hidden()
    expect(page.locator("#chats")).to_contain_text("mllm, unmerged")
    expect(page.locator("#tally caption")).to_have_text("1 blind vote")
    name, text = saved(page, "#export-votes")
    assert name == "ipmerge-votes.csv"
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["shown"] for row in rows] == ["A", "B"]
    assert {row["vote"] for row in rows} == {"B"}
    assert {row["preferred"] for row in rows} == {rows[1]["model"]}
    assert {row["reason"] for row in rows} == {"'=clearer"}, "no formula for a spreadsheet"


# --- texts -------------------------------------------------------------------------------------

FORMULAS = {
    r"so \(a^2\) it is": 1,
    r"thus \[b = \frac{1}{2}\] holds": 1,
    r"$$c$$ and \begin{align} x &= 1 \\ y &= 2 \end{align}": 2,
    r"the answer is \boxed{12}": 1,
    r"let $x$ be $y_1$": 2,
    "it costs $5 and $6 today": 0,
    "code `$x$` stays": 0,
    r"an open \( stays text": 0,
}


def test_formulas_render_and_money_and_code_stay(page):
    clear(page)
    for number, (text, formulas) in enumerate(FORMULAS.items(), 1):
        ask(page, f"Say: {text}")
        expect(page.locator("#chat-b [data-testid=user]")).to_have_count(number)
        wait_until_finished(page)
        answer = answers(page, "#chat-b").last
        expect(answer.locator(".katex")).to_have_count(formulas)
        expect(answer.locator(".katex-error")).to_have_count(0)
        assert "Say:" not in answer.inner_text()
        if formulas == 0:
            expect(answer).to_contain_text(text.replace("`", ""))


def test_text_from_a_model_is_never_markup(page):
    ask(page, "Say: 2*3*4=24. <img src=x onerror=alert(1)> <b>bold</b> ![p](http://x.invalid/p)")
    wait_until_finished(page)
    answer = answers(page, "#chat-a").last
    expect(answer).to_contain_text("2*3*4=24. ")
    expect(answer).to_contain_text("<b>bold</b>")
    expect(answer.locator("img, b")).to_have_count(0)
    _, text = saved(page, "#export-html")
    page.set_content(text)
    expect(page.locator("article").last).to_contain_text("<b>bold</b>")
    expect(page.locator("article img, article b")).to_have_count(0)


# --- input that cannot be answered -------------------------------------------------------------


def test_what_is_no_image_is_refused_and_the_question_kept(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("this is no picture")
    clear(page)
    with page.expect_response("**/upload**"):
        page.locator("#prompt input[type=file]").set_input_files(broken)
    expect(page.locator("#prompt img")).to_be_attached()
    ask(page, "What is this?")
    expect(toast(page)).to_contain_text(
        "'broken.png' is not a readable image. Expected a PNG, JPEG or WebP file.",
        timeout=LOADING,
    )
    expect(page.get_by_role("textbox", name="Question")).to_have_value("What is this?")
    expect(answers(page, "#chat-a")).to_have_count(0)


def test_a_picture_without_a_question_gets_a_sentence(page, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "grey.png")
    clear(page)
    page.locator("#prompt input[type=file]").set_input_files(tmp_path / "grey.png")
    expect(page.locator("#prompt img")).to_be_visible()
    ask(page, "")
    expect(toast(page)).to_contain_text("an image but no question")


def test_a_question_of_a_hundred_thousand_characters_is_refused_and_kept(page):
    text = "x" * 100_000
    ask(page, text)
    expect(toast(page)).to_contain_text("The question has 100000 characters; the maximum is")
    expect(page.get_by_role("textbox", name="Question")).to_have_value(text)


def test_several_images_for_the_demo_model_are_answered_or_refused_with_a_sentence(page, tmp_path):
    clear(page)
    files = [tmp_path / f"{name}.png" for name in ("one", "two")]
    for file in files:
        Image.new("RGB", (40, 40)).save(file)
    page.locator("#prompt input[type=file]").set_input_files(files)
    expect(page.locator("#prompt img")).to_have_count(2)
    ask(page, "What is this?")
    expect(page.locator("#chat-a [data-testid=user] img")).to_have_count(2)
    wait_until_finished(page)
    for chat in CHATS:
        expect(answers(page, chat).last).not_to_have_text("")


# --- what is typed -----------------------------------------------------------------------------


def slow_down(page: Page, milliseconds: int) -> None:
    """Let every request of a page take longer."""
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    limits = {"downloadThroughput": -1, "uploadThroughput": -1}
    session.send(
        "Network.emulateNetworkConditions", {"offline": False, "latency": milliseconds, **limits}
    )


@pytest.mark.parametrize("latency", [0, 700])
def test_what_is_typed_after_enter_stays_while_the_question_is_answered(page, home, latency):
    clear(page)
    slow_down(page, latency)
    box = page.get_by_role("textbox", name="Question")
    box.fill("Say: " + " ".join(f"word{number}" for number in range(30)))
    with held(home):
        page.keyboard.press("Enter")
        page.keyboard.type("Say: the next")
        expect(box).to_have_value("Say: the next")
        expect(answers(page, "#chat-b").last).to_contain_text("word5", timeout=LOADING)
        expect(box).to_have_value("Say: the next")
        box.press("Enter")
        expect(toast(page)).to_contain_text("Answers are still arriving.")
        expect(box).to_have_value("Say: the next")
    wait_until_finished(page)
    expect(page.locator("#chat-b [data-testid=user]")).to_have_count(1)
    page.locator("#undo-chat").click()
    expect(answers(page, "#chat-b")).to_have_count(0)
    expect(box).to_have_value("Say: the next")  # typed since
    expect(page.locator("#undo-chat")).to_be_enabled()
    box.press("Enter")
    expect(answers(page, "#chat-b").last).to_have_text("the next", timeout=LOADING)
    expect(box).to_have_value("")


@pytest.mark.parametrize("latency", [0, 700])
def test_a_refused_question_does_not_replace_what_was_typed_since(page, latency):
    clear(page)
    slow_down(page, latency)
    box, refused = page.get_by_role("textbox", name="Question"), "x" * 100_000
    box.fill(refused)
    page.keyboard.press("Enter")
    page.keyboard.type("the next")
    expect(toast(page)).to_contain_text("The question has 100000 characters")
    expect(box).to_have_value("the next")
    page.keyboard.type(" question")
    expect(box).to_have_value("the next question")
    page.wait_for_timeout(3000)  # until the server has kept the refused question for Undo
    box.fill("")
    page.locator("#undo-chat").click()
    expect(box).to_have_value(refused)


# --- narrow pages, keyboard, screen readers ----------------------------------------------------


def test_a_phone_shows_one_column_at_a_time_and_scrolls_only_downwards(url, new_page):
    page = open_chat(new_page(width=390, height=844), url)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    tabs = page.locator("#column-tabs").get_by_role("tab")
    expect(tabs).to_have_text(["A · Base✕", "B · Merged✓"])  # of the recorded answers
    expect(page.locator("#chat-a")).to_be_visible()
    expect(page.locator("#chat-b")).to_be_hidden()
    tabs.nth(1).click()
    expect(page.locator("#chat-b")).to_be_visible()
    expect(page.locator("#chat-a")).to_be_hidden()
    expect(tabs.nth(1)).to_have_attribute("aria-selected", "true")
    ask(page, "Say: both")
    wait_until_finished(page)
    expect(page.locator("#chat-b")).to_be_visible()  # stays selected while answers arrive
    tabs.nth(1).press("ArrowLeft")
    expect(page.locator("#chat-a")).to_be_visible()
    page.locator("#add-column").click()
    expect(tabs).to_have_count(3)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


SCROLLED = """() => ["a", "b"].map((name) => {
  const log = document.querySelector(`#chat-${name} [role=log]`);
  return { top: Math.round(log.scrollTop), below: Math.round(log.scrollHeight - log.clientHeight - log.scrollTop) };
})"""  # noqa: E501


def wait_for_scrolling(page: Page, state: str) -> None:
    """Wait until the chats are where an expression of `a` and `b` wants them, and stay there."""
    page.wait_for_function(f"() => {{ const [a, b] = ({SCROLLED})(); return {state}; }}")
    page.wait_for_timeout(600)  # Gradio's own following of answers came 300 ms later
    a, b = page.evaluate(SCROLLED)
    assert page.evaluate(f"([a, b]) => {state}", [a, b]), (state, a, b)


def say_until(page: Page, text: str, last: str) -> None:
    """Let both columns say a text, and wait until it is finished."""
    ask(page, f"Say: {text}")
    for chat in CHATS:
        expect(answers(page, chat).last).to_contain_text(last, timeout=LOADING)
    wait_until_finished(page)


def test_columns_scroll_together_unless_unlinked(page):
    say_until(page, " ".join(f"word{number}" for number in range(400)), "word399")
    wait_for_scrolling(page, "a.top > 200 && a.below < 2 && b.below < 2")
    page.locator("#chat-a").hover()
    page.mouse.wheel(0, -4000)
    wait_for_scrolling(page, "a.top === 0 && b.top === 0")
    setting(page, "Link scrolling").uncheck()
    page.locator("#chat-a").hover()
    page.mouse.wheel(0, 4000)
    wait_for_scrolling(page, "a.top > 200 && b.top === 0")


def test_answers_are_followed_to_their_end_until_the_visitor_scrolls_up(page, home):
    words = " ".join(f"word{number}" for number in range(300))
    say_until(page, words, "word299")
    with held(home):
        ask(page, f"Say: {words}")
        expect(page.locator("#answers-status")).to_contain_text("is answering", timeout=LOADING)
        expect(answers(page, "#chat-b").last).to_contain_text("word9", timeout=LOADING)
        wait_for_scrolling(page, "a.below < 2 && b.below < 2")
        page.locator("#chat-b").hover()
        page.mouse.wheel(0, -4000)
        wait_for_scrolling(page, "a.top === 0 && b.top === 0")
    for chat in CHATS:
        expect(answers(page, chat).last).to_contain_text("word150", timeout=LOADING)
    wait_for_scrolling(page, "a.top === 0 && b.top === 0")  # while the answers grow
    wait_until_finished(page)
    page.mouse.wheel(0, 40_000)
    wait_for_scrolling(page, "a.below < 2 && b.below < 2")
    say_until(page, "the next answer", "the next answer")
    wait_for_scrolling(page, "a.below < 2 && b.below < 2")


def test_streaming_chats_are_quiet_and_one_line_speaks_for_all(page):
    for chat in CHATS:
        expect(page.locator(f"{chat} [role=log]")).to_have_attribute("aria-live", "off")
    expect(page.locator("#answers-status")).to_have_attribute("role", "status")


def test_a_random_example_has_a_reference(page):
    page.locator("#random-example").click()
    expect(page.locator("#prompt img")).to_be_visible(timeout=LOADING)
    page.get_by_role("textbox", name="Question").press("Enter")
    wait_until_finished(page)
    expect(page.locator("#verdict-a .chip")).to_have_text(re.compile("✓ correct|✕ wrong"))
    expect(page.locator("#verdict-a")).to_contain_text("expected")


def test_asset_paths_of_examples_exist():
    assert all(Path(example.image).is_file() for example in recorded_examples())
    assert any(example.outcome == "broken" for example in recorded_examples())
