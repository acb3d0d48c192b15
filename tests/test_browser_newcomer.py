"""The first visit: an offered tour, the simple layout, and nothing of it where it is not wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from explore_page import PACKS, expect_summary, open_map, plan_on_page, received
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]
TOUR = "#layer-map .lm-tour"
THRESHOLD = re.compile("similarity threshold")


def expect_step(page: Page, number: int, of: int = 4) -> None:
    """The Explore tab alone has no answers to see, so its tour has four steps."""
    expect(page.locator(TOUR)).to_contain_text(f"Step {number} of {of}")


def test_the_tour_is_offered_once_and_never_again(new_page: NewPage, explore_url: str):
    page = new_page(newcomer=True)
    open_map(page, explore_url)
    expect(page.locator(TOUR)).to_contain_text("New here?")
    page.goto(explore_url)
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    expect(page.locator(TOUR)).to_be_hidden()
    page.get_by_role("button", name="Tour", exact=True).click()
    expect_step(page, 1)


@pytest.mark.parametrize("query", ["present=1", "v=1&pack=packs-a&s=0.3", "v=1&pack=packs-b"])
def test_no_tour_is_offered_on_a_stage_or_behind_a_link(
    new_page: NewPage, explore_url: str, query: str
):
    page = new_page(newcomer=True)
    open_map(page, explore_url, query)
    page.wait_for_load_state("load")
    expect(page.locator(TOUR)).to_be_hidden()


def test_no_tour_is_offered_in_the_report(new_page: NewPage, tmp_path: Path):
    from ipmerge_core.ui.explore.layer_map import report
    from ipmerge_core.ui.plan_choice import PlanChoice

    path = tmp_path / "report.html"
    content = {"id": "b", "pack": PACKS["b"], "plan": PlanChoice().to_browser(), "presets": []}
    path.write_text(report(content), encoding="utf-8")
    page = new_page(newcomer=True)
    page.goto(path.as_uri())
    expect(page.locator(".lm-grid")).to_be_visible()
    expect(page.locator(".lm-tour")).to_be_hidden()
    expect(page.locator(".lm")).to_have_attribute("data-layout", "full")


@pytest.mark.parametrize("width", [1280, 390])
def test_every_step_of_the_tour_is_done_by_doing_it(
    new_page: NewPage, explore_url: str, width: int
):
    page = new_page(width=width, newcomer=True, reduced_motion="reduce")
    traffic = open_map(page, explore_url)
    page.get_by_role("button", name="Start the tour").click()
    expect_step(page, 1)
    for name in ("Layer 0, q,", "Layer 1, q,", "Layer 1, k,"):
        page.get_by_role("button", name=re.compile(f"^{name}")).hover()
    expect_step(page, 2)
    page.get_by_role("slider", name=THRESHOLD).press("ArrowLeft")
    expect_step(page, 3)
    page.get_by_role("button", name=re.compile("^Layer 2, k,")).click()
    expect_step(page, 4)
    page.get_by_role("slider", name="scale of the update").press("ArrowRight")
    expect(page.locator(TOUR)).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert traffic.complaints == []


def test_the_tour_goes_on_by_keyboard_speaks_and_ends_with_escape_from_anywhere(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    start = page.get_by_role("button", name="Tour", exact=True)
    start.press("Enter")
    expect(page.locator(f"{TOUR} h2")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Next", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#layer-map [role=status]")).to_contain_text("Tour, step 2 of 4. Drag")
    expect(page.get_by_role("button", name="Next", exact=True)).to_be_focused()
    expect(page.locator("#layer-map .lm-lit-up")).to_have_attribute("data-dial", "s")
    page.keyboard.press("Escape")
    expect(page.locator(TOUR)).to_be_hidden()
    expect(start).to_be_focused()
    start.press("Enter")
    page.locator("body").click(position={"x": 5, "y": 5})
    page.keyboard.press("Escape")
    expect(page.locator(TOUR)).to_be_hidden()
    expect(page.locator("#layer-map .lm-lit-up")).to_have_count(0)


def test_the_hint_to_drag_goes_with_the_first_drag(new_page: NewPage, explore_url: str):
    page = new_page(newcomer=True)
    open_map(page, explore_url)
    hint = page.locator("#layer-map .lm-drag-me")
    expect(hint).to_be_visible()
    page.get_by_role("slider", name=THRESHOLD).press("ArrowLeft")
    expect(hint).to_be_hidden()
    page.reload()
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    expect(hint).to_be_hidden()


def test_a_newcomer_gets_the_simple_layout_and_the_other_one_is_remembered(
    new_page: NewPage, explore_url: str
):
    page = new_page(newcomer=True)
    open_map(page, explore_url)
    expect_summary(page, PACKS["a"])
    expect(page.get_by_role("combobox", name="Similarity")).to_be_hidden()
    page.get_by_role("button", name=re.compile("^Layer 12, k,")).click()
    detail = page.locator("#layer-map .lm-detail")
    value = next(
        r["similarity"]["first"]
        for r in PACKS["a"]["records"]
        if (r["layer"], r["module"]) == (12, "k")
    )
    expect(detail).to_contain_text(f"in directions with a similarity of {value:.2f}")
    expect(detail.locator("table")).to_have_count(0)
    page.get_by_role("button", name="All numbers and spectra").click()
    expect(detail.locator(".lm-numbers")).to_contain_text("gap (σ₁ − σ₂) / σ₁")
    expect(page.locator("#layer-map .lm-spectra svg").first).to_be_visible()
    page.reload()
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    expect(page.get_by_role("combobox", name="Similarity")).to_be_visible()
    page.get_by_role("button", name="Simple").click()
    page.reload()
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    expect(page.get_by_role("combobox", name="Similarity")).to_be_hidden()


def test_the_simple_layout_never_hides_a_choice_that_decides(new_page: NewPage, explore_url: str):
    page = new_page(newcomer=True)
    open_map(page, explore_url, "v=1&pack=packs-a&s=0.3&m=max&u=max")
    received(page, similarity="max")
    expect(page.get_by_role("combobox", name="Similarity")).to_have_value("max")
    expect(page.get_by_role("combobox", name="Update")).to_have_value("max")
    page.get_by_role("combobox", name="Similarity").select_option("first")
    expect(page.get_by_role("combobox", name="Similarity")).to_be_hidden()
    assert plan_on_page(page)["variant"] == "max"


def test_the_answer_button_opens_the_answers_and_ends_the_tour(new_page: NewPage, app_url: str):
    page = new_page(newcomer=True)
    open_map(page, app_url)
    page.get_by_role("button", name="Start the tour").click()
    for number in range(1, 5):
        expect_step(page, number, of=5)
        page.get_by_role("button", name="Next", exact=True).click()
    expect_step(page, 5, of=5)
    page.get_by_role("button", name="Ask both models").click()
    expect(page.get_by_role("tab", name="Try it")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#prompt")).to_be_visible()
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator(TOUR)).to_be_hidden()
