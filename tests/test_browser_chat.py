"""The Try it tab in a real Chromium: recorded answers, live ones, formulas, failures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser_fixtures import free_port, serving
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from slow_steps import held

from ipmerge_core.ui.chat.recorded import recorded_examples

pytestmark = pytest.mark.browser

SIDES = ("#chat-base", "#chat-merged")
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
    return open_chat(new_page(), url)


def open_chat(page: Page, url: str) -> Page:
    page.goto(url)
    page.locator("#tabs").get_by_role("tab", name="Try it").click()
    expect(page.locator("#prompt textarea")).to_be_visible()
    return page


def answers(page: Page, side: str) -> Locator:
    return page.locator(f"{side} [data-testid=bot]")


def ask(page: Page, question: str) -> None:
    box = page.get_by_role("textbox", name="Question")
    box.fill(question)
    box.press("Enter")


def clear(page: Page) -> None:
    page.locator("#clear").click()
    expect(answers(page, "#chat-base")).to_have_count(0)
    expect(page.get_by_role("textbox", name="Question")).to_have_value("")


def wait_until_finished(page: Page) -> None:
    status = page.locator("#answers-status")
    expect(status).to_contain_text("Base finished. Merged finished.", timeout=LOADING)


def test_a_recorded_example_is_there_at_once_and_says_when_it_was_recorded(page):
    example = recorded_examples()[0]
    source = page.locator("#answers-source")
    expect(source).to_contain_text(f"Recorded {example.recorded}")
    expect(source).to_contain_text(example.plan)
    expect(answers(page, "#chat-base").last).to_contain_text(example.base.strip())
    expect(answers(page, "#chat-merged").last).to_contain_text(example.merged.strip())
    expect(page.locator("#verdict-merged .chip")).to_have_text("✓ correct")
    expect(page.locator("#chat-base img").first).to_be_visible()


def test_an_example_that_the_merge_broke_is_shown_as_plainly(page):
    broken = next(i for i, e in enumerate(recorded_examples()) if e.outcome == "broken")
    page.locator(f"#example-{broken}").click()
    expect(page.locator("#verdict-base .chip")).to_have_text("✓ correct")
    expect(page.locator("#verdict-merged .chip")).to_have_text("✕ wrong")
    expect(page.get_by_role("textbox", name="Question")).to_have_value(
        recorded_examples()[broken].reference.question
    )


def test_a_picture_and_a_question_are_answered_by_both_sides(page):
    picture = recorded_examples()[0].image
    clear(page)
    page.locator("#prompt input[type=file]").set_input_files(picture)
    expect(page.locator("#prompt img")).to_be_visible()
    ask(page, "What is the perimeter?")
    wait_until_finished(page)
    for side in SIDES:
        expect(page.locator(f"{side} [data-testid=user] img")).to_be_visible()
        expect(answers(page, side).last).to_have_text(re.compile(r"\d"))
    expect(page.locator("#answers-source")).to_contain_text("Live")
    expect(page.get_by_role("textbox", name="Question")).to_have_value("What is the perimeter?")


def test_both_sides_grow_together_and_stop_keeps_what_is_there(page, home):
    with held(home):
        ask(page, "Say: " + " ".join(f"word{number}" for number in range(400)))
        for side in SIDES:
            expect(answers(page, side).last).to_contain_text("word5", timeout=LOADING)
        page.get_by_role("button", name="Stop both").click()
        expect(page.locator("#answers-status")).to_contain_text("Base stopped. Merged stopped.")
    expect(page.get_by_role("button", name="Stop both")).to_be_disabled()
    texts = [answers(page, side).last.inner_text() for side in SIDES]
    page.wait_for_timeout(600)
    assert texts == [answers(page, side).last.inner_text() for side in SIDES]
    for text in texts:
        assert "word5" in text
        assert "word399" not in text
        assert "(stopped)" in text


def test_ask_again_replaces_the_last_answer(page):
    recorded = page.locator("#answers-source")
    expect(recorded).to_contain_text("Recorded")
    before = answers(page, "#chat-base").count()
    page.locator("#retry").click()
    expect(recorded).to_contain_text("Live", timeout=LOADING)
    wait_until_finished(page)
    assert answers(page, "#chat-base").count() == before


def test_clear_can_be_undone(page):
    shown = answers(page, "#chat-base").count()
    clear(page)
    page.locator("#undo-clear").click()
    expect(answers(page, "#chat-base")).to_have_count(shown)


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


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_render_and_money_and_code_stay(page, text):
    clear(page)
    ask(page, f"Say: {text}")
    wait_until_finished(page)
    answer = answers(page, "#chat-merged").last
    assert "Say:" not in answer.inner_text()
    expect(answer.locator(".katex")).to_have_count(FORMULAS[text])
    expect(answer.locator(".katex-error")).to_have_count(0)
    if FORMULAS[text] == 0:
        expect(answer).to_contain_text(text.replace("`", ""))


def test_stars_between_factors_stay_stars(page):
    ask(page, "Say: 2*3*4=24. and 5*6=30.")
    wait_until_finished(page)
    expect(answers(page, "#chat-base").last).to_contain_text("2*3*4=24. and 5*6=30.")


def test_text_from_a_model_is_never_markup(page):
    ask(page, "Say: <img src=x onerror=alert(1)> <b>bold</b> ![p](http://example.invalid/p.png)")
    wait_until_finished(page)
    answer = answers(page, "#chat-base").last
    expect(answer).to_contain_text("<b>bold</b>")
    expect(answer.locator("img, b")).to_have_count(0)


def test_what_is_no_image_is_refused_and_the_question_kept(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("this is no picture")
    clear(page)
    with page.expect_response("**/upload**"):
        page.locator("#prompt input[type=file]").set_input_files(broken)
    expect(page.locator("#prompt img")).to_be_attached()
    ask(page, "What is this?")
    expect(page.get_by_test_id("toast-body")).to_contain_text(
        "'broken.png' is not a readable image. Expected a PNG, JPEG or WebP file.",
        timeout=LOADING,
    )
    expect(page.get_by_role("textbox", name="Question")).to_have_value("What is this?")
    expect(answers(page, "#chat-base")).to_have_count(0)


def test_a_picture_without_a_question_gets_a_sentence(page, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "grey.png")
    clear(page)
    page.locator("#prompt input[type=file]").set_input_files(tmp_path / "grey.png")
    expect(page.locator("#prompt img")).to_be_visible()
    ask(page, "")
    expect(page.get_by_test_id("toast-body")).to_contain_text("an image but no question")


def test_one_side_may_fail_and_the_other_still_answers(page):
    ask(page, "Fail: how many?")
    status = page.locator("#answers-status")
    expect(status).to_contain_text("Base finished. Merged failed.", timeout=LOADING)
    expect(answers(page, "#chat-merged").last).to_contain_text("as the test wanted")
    expect(page.get_by_role("textbox", name="Question")).to_have_value("Fail: how many?")


def test_a_phone_scrolls_only_downwards(url, new_page):
    page = open_chat(new_page(width=390, height=844), url)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_streaming_chats_are_quiet_and_one_line_speaks_for_both(page):
    for side in SIDES:
        expect(page.locator(f"{side} [role=log]")).to_have_attribute("aria-live", "off")
    expect(page.locator("#answers-status")).to_have_attribute("role", "status")


def test_asset_paths_of_examples_exist():
    assert all(Path(example.image).is_file() for example in recorded_examples())
    assert any(example.outcome == "broken" for example in recorded_examples())
