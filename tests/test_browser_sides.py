"""What answers in the chat, in a real Chromium: a merge just made, the plan, another pair."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from browser_fixtures import free_port, serving
from PIL import Image
from playwright.sync_api import Page, expect
from transformers import AutoModelForImageTextToText, AutoProcessor

from ipmerge_core import make_plan
from ipmerge_core.ui.chat.recorded import recorded_examples
from ipmerge_core.ui.plan_choice import analysis_of

pytestmark = pytest.mark.browser

LOADING = 90_000  # the first check and the first question load torch
EXPLORED = "Plan in Explore · IP-Merging, Sα 0.4, λ 1"
RECORDED = "Plan of the recorded answers · IP-Merging, Sα 0, λ 4, γ max"
UNMERGED = "Vision-language model, unmerged"


class Place(NamedTuple):
    """A running app and the folder where it keeps what it makes."""

    url: str
    home: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The app over the demo trio and a second pair, whose math model is another one."""
    home = tmp_path_factory.mktemp("sides")
    (home / "packs").mkdir()
    demo = analysis_of("pack")
    expert = replace(demo.sources.math[0], fingerprint="f" * 64)
    other = replace(demo, name="second pair", sources=replace(demo.sources, math=(expert,)))
    other.save(home / "packs" / "second.pack.json.gz")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as url:
        yield Place(url, home)


@pytest.fixture
def page(place: Place, new_page: Callable[..., Page]) -> Page:
    """Explore, ready."""
    page = new_page()
    page.goto(place.url)
    expect(page.locator("#layer-map .sum")).not_to_be_empty(timeout=LOADING)
    return page


def open_tab(page: Page, name: str) -> None:
    page.locator("#tabs").get_by_role("tab", name=name).click()


def merge_with_ties(page: Page, name: str) -> None:
    """Merge by TIES with the whole math vector: it computes where Explore's plan does not."""
    open_tab(page, "Merge")
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    page.get_by_label("Method", exact=True).click()
    page.get_by_role("option", name="TIES", exact=True).click()
    weight = page.get_by_label("number input for math weight", exact=True)
    expect(weight).to_be_visible(timeout=LOADING)
    expect(page.locator("#confirmation")).to_contain_text("not previewable", timeout=LOADING)
    before = page.locator("#confirmation code").first.inner_text()
    weight.fill("1")
    weight.blur()
    expect(page.locator("#confirmation code").first).not_to_have_text(before, timeout=LOADING)
    page.get_by_label("Output folder").fill(name)
    page.locator("#start-merge").click()
    expect(page.locator("#run-status")).to_contain_text(name, timeout=LOADING)
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)


def column(page: Page, letter: str) -> str:
    return str(page.get_by_role("combobox", name=f"Model {letter}").input_value())


def choose(page: Page, name: str, option: str) -> None:
    page.get_by_role("combobox", name=f"Model {name}").click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("combobox", name=f"Model {name}")).to_have_value(option)


def choose_pair(page: Page, option: str) -> None:
    page.get_by_role("combobox", name="Pair").click()
    page.get_by_role("option", name=option, exact=True).click()
    expect(page.get_by_role("combobox", name="Pair")).to_have_value(option)


def ask(page: Page, *, ends: str = "Base finished. Merged finished.") -> list[str]:
    """Ask about the first example; return what the chat of B shows: who answers, the answer."""
    page.locator("#clear").click()
    expect(page.locator("#chat-a [data-testid=bot]")).to_have_count(0, timeout=LOADING)
    page.locator("#example-0").click()
    expect(page.locator("#answers-source")).to_contain_text("Recorded", timeout=LOADING)
    page.locator("#retry").click()
    expect(page.locator("#answers-status")).to_contain_text(ends, timeout=LOADING)
    return page.locator("#chat-b [data-testid=bot]").all_inner_texts()


def said_by_transformers(folder: Path, question: str, picture: Path) -> str:
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = prompt.removeprefix(processor.tokenizer.bos_token)
    image = Image.open(picture).convert("RGB")
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=128)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_try_it_answers_with_the_folder_just_made(page, place):
    example = recorded_examples()[0]
    open_tab(page, "Try it")
    right = page.get_by_role("combobox", name="Model B")
    expect(right).to_have_value(RECORDED)
    assert ask(page)[1].strip() == example.merged  # the promise of the card
    choose(page, "B", EXPLORED)
    explored = ask(page)
    merge_with_ties(page, "by-ties")
    open_tab(page, "Try it")
    expect(right).to_have_value("Method in Merge · TIES, math_weight 1")
    expect(page.locator("#try-chosen")).to_contain_text("method in Merge · TIES, math_weight 1")

    open_tab(page, "Merge")
    page.locator("#try-merged").click()
    folder = place.home / "models" / "by-ties"
    plan = json.loads((folder / "ipmerge.json").read_text())["plan"]["hash"]
    words = f"by-ties · TIES · plan {plan}"
    expect(page.get_by_role("combobox", name="Model B")).to_have_value(f"Chosen merge · {words}")
    assert column(page, "A") == UNMERGED
    asked, said = ask(page)
    assert asked == f"{words} · demo trio"
    assert said.strip() == said_by_transformers(folder, example.reference.question, example.image)
    assert said != explored[1]
    assert "plan in Explore · IP-Merging, Sα 0.4, λ 1 · plan " in explored[0]
    expect(page.locator("#chat-a [data-testid=bot]").first).to_have_text(
        "mllm, unmerged · demo trio"
    )

    # All tabs speak of it; another plan in Explore is the next choice.
    open_tab(page, "API & cite")
    expect(page.locator("#cite-hash")).to_contain_text(words, timeout=LOADING)
    expect(page.locator("#cite-shell")).to_contain_text("--method ties")
    assert "method=ties&p.math_weight=1" in page.url
    open_tab(page, "Compare")
    expect(page.locator("#compare-chosen")).to_contain_text(words, timeout=LOADING)
    open_tab(page, "Explore")
    number = page.get_by_label("S alpha as a number")
    number.fill("0.9")
    number.press("Enter")
    assert "method=" not in page.url
    open_tab(page, "Try it")
    expect(right).to_have_value("Plan in Explore · IP-Merging, Sα 0.9, λ 1")
    assert "plan in Explore · IP-Merging, Sα 0.9" in ask(page)[0]

    # The same merge on the left, against the plan.
    choose(page, "A", words)
    ask(page, ends="Model A finished. Model B finished.")
    assert page.locator("#chat-a [data-testid=bot]").all_inner_texts() == [asked, said]


def test_a_choice_is_used_for_its_own_pair_only_and_a_lost_folder_is_said(page, place):
    merge_with_ties(page, "to-be-lost")
    page.locator("#try-merged").click()
    right = page.get_by_role("combobox", name="Model B")
    expect(right).to_have_value(re.compile("^Chosen merge · to-be-lost · TIES · plan "))
    lost = column(page, "B").removeprefix("Chosen merge · ")

    choose_pair(page, "own: second pair")
    form = "Method in Merge · TIES, math_weight 1"  # stays chosen
    expect(right).to_have_value(form)
    expect(page.locator("#chat-a [data-testid=bot]")).to_have_count(0)  # the record is of another
    right.click()
    expect(page.get_by_role("option", name="to-be-lost")).to_have_count(0)
    page.keyboard.press("Escape")
    open_tab(page, "Merge")
    page.locator("#try-merged").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text(
        "'to-be-lost' was merged from other models", timeout=LOADING
    )
    expect(page.locator("#tab-merge")).to_be_visible()

    choose_pair(page, "demo trio")
    open_tab(page, "Try it")
    choose(page, "B", lost)
    shutil.rmtree(place.home / "models" / "to-be-lost")
    failed = ask(page, ends="Base finished. Merged failed.")
    assert "The merged model 'to-be-lost' no longer exists" in failed[-1]
    open_tab(page, "Merge")
    open_tab(page, "Try it")
    expect(right).to_have_value("to-be-lost · no longer available")
    choose(page, "B", form)
    assert "method in Merge · TIES" in ask(page)[0]


def test_one_button_takes_over_the_plan_of_a_record(page):
    open_tab(page, "Try it")
    page.locator("#take-record").click()
    plan = make_plan(analysis_of("pack"), **recorded_examples()[0].choice.arguments)
    taken = f"plan of the recorded answers · IP-Merging, Sα 0, λ 4, γ max · plan {plan.hash}"
    expect(page.locator("#try-chosen")).to_contain_text(taken, timeout=LOADING)
    open_tab(page, "Explore")
    expect(page.get_by_label("lambda as a number")).to_have_value("4")
    expect(page.locator("#layer-map .sum")).to_contain_text("28 of 28")
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_label("lambda as a number")).to_have_value("1")


def test_a_link_opens_with_its_method_and_names_what_it_cannot_read(place, new_page):
    page = new_page()
    link = "v=1&pack=pack&s=0.3&l=1.2345&method=ties&p.density=0.25&p.densty=1&o.exclude=down"
    page.goto(f"{place.url}/?{link}")
    notice = page.locator("#layer-map .lm-notice")
    expect(notice).to_contain_text("the method has no parameter 'densty'", timeout=LOADING)
    expect(page.get_by_label("lambda as a number")).to_have_value("1.2345")
    open_tab(page, "Merge")
    named = page.get_by_role("combobox", name="Method", exact=True)
    expect(named).to_have_value("TIES", timeout=LOADING)
    expect(page.get_by_label("number input for density", exact=True)).to_have_value("0.25")
    expect(page.locator("#confirmation")).to_contain_text("density 0.25", timeout=LOADING)
    assert "method=ties&p.density=0.25&o.exclude=down" in page.url


def test_what_answers_fits_on_a_phone(place, new_page):
    page = new_page(width=390, height=844)
    page.goto(place.url)
    open_tab(page, "Try it")
    page.locator("#column-tabs").get_by_role("tab").nth(1).click()
    expect(page.get_by_role("combobox", name="Model B")).to_have_value(RECORDED)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_on_a_space_a_browser_chooses_among_its_own_merges(tmp_path, new_page, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "org/ipmerge")
    with serving(tmp_path / "log", "tests/slow_app.py", str(tmp_path), port=free_port()) as url:
        page, stranger = new_page(), new_page()
        for name in ("first-mine", "second-mine"):
            page.goto(url)
            open_tab(page, "Merge")
            expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
            page.get_by_label("Output folder").fill(name)
            page.locator("#start-merge").click()
            expect(page.locator("#run-status")).to_contain_text(name, timeout=LOADING)
            expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
        page.locator("#try-merged").click()
        right = page.get_by_role("combobox", name="Model B")
        expect(right).to_have_value(re.compile("^Chosen merge · second-mine · IP-Merging · plan "))
        right.click()
        expect(page.get_by_role("option", name="first-mine")).to_be_attached()
        page.keyboard.press("Escape")
        assert ask(page)[0].startswith("second-mine")

        stranger.goto(url)
        open_tab(stranger, "Try it")
        expect(stranger.get_by_role("combobox", name="Model B")).to_have_value(RECORDED)
        stranger.get_by_role("combobox", name="Model B").click()
        expect(stranger.get_by_role("option", name="Plan of the recorded answers")).to_be_attached()
        expect(stranger.get_by_role("option", name="mine")).to_have_count(0)
