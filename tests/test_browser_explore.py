"""The Explore tab in a real Chromium: its numbers, its drag, its keys, over synthetic packs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from explore_page import (
    COMPONENT,
    PACKS,
    csv_rows,
    expect_summary,
    open_map,
    plan_on_page,
    python_preview,
    received,
)
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

THRESHOLD = re.compile("similarity threshold")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_first_paint_is_complete_quiet_offline_and_fits(
    new_page: Callable[..., Page], explore_url: str, width: int, theme: str
):
    page = new_page(width=width)
    traffic = open_map(page, explore_url, f"__theme={theme}")
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(196)
    expect_summary(page, PACKS["a"])
    page.wait_for_load_state("load")
    assert traffic.complaints == []
    assert {url.split("/")[2] for _, url, _ in traffic.requests if url.startswith("http")} == {
        explore_url.split("/")[2]
    }
    assert page.evaluate("document.documentElement.scrollWidth") == width
    turned = page.locator("#layer-map .lm-grid-holder").get_attribute("data-turned")
    assert turned == ("true" if width == 390 else "false")


def test_a_drag_of_sixty_moves_asks_nothing_of_the_server_and_commits_once(
    chromium_page: Page, explore_url: str
):
    traffic = open_map(chromium_page, explore_url)
    chromium_page.wait_for_load_state("load")
    box = chromium_page.get_by_role("slider", name=THRESHOLD).bounding_box()
    x, y = box["x"] + 0.4 * box["width"], box["y"] + box["height"] / 2
    chromium_page.mouse.move(x, y)
    chromium_page.mouse.down()
    traffic.requests.clear()
    for step in range(60):
        chromium_page.mouse.move(x - 3 * step, y)
    assert traffic.queue_calls() == []
    chromium_page.mouse.up()
    expect(chromium_page.locator("#received textarea")).not_to_have_value("")
    plan = plan_on_page(chromium_page)
    assert plan["s"] < 0.3
    received(chromium_page, s=plan["s"])
    assert len(traffic.commits()) == 1
    expect_summary(chromium_page, PACKS["a"])


def test_every_commit_is_answered_so_that_other_tabs_do_not_wait(chromium_page: Page, app_url: str):
    """Other tabs wait until the server has the plan; an uncounted answer costs them 5 seconds."""
    open_map(chromium_page, app_url)
    number = chromium_page.get_by_label("S alpha as a number")
    for value in ("0.3", "0.2"):
        number.fill(value)
        number.press("Enter")
        chromium_page.wait_for_function(f"{COMPONENT}.isSettled()")


def test_everything_works_from_the_keyboard(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_label("Preset").focus()
    slider = page.get_by_role("slider", name=THRESHOLD)
    for _ in range(20):
        page.keyboard.press("Tab")
        if slider.evaluate("node => node === document.activeElement"):
            break
    expect(slider).to_be_focused()
    page.keyboard.press("ArrowRight")
    received(page, s=0.401)
    page.keyboard.press("Shift+ArrowRight")
    received(page, s=0.411)
    expect_summary(page, PACKS["a"])
    before = len(python_preview(PACKS["a"], plan_on_page(page)).selected)
    page.keyboard.press("]")
    expect(page.locator("#layer-map [role=status]")).to_contain_text(f"{before - 1} of 196")
    page.keyboard.press("[")
    expect(page.locator("#layer-map [role=status]")).to_contain_text(f"{before} of 196")
    for _ in range(3):
        page.keyboard.press("Control+z")
    received(page, s=0.401)
    page.keyboard.press("Control+y")
    received(page, s=0.411)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("Boolean(document.activeElement.closest('[role=grid]'))"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#layer-map .lm-detail-head h2")).to_have_text("Layer 1 · k")
    page.keyboard.press("f")
    received(page, **{"model.layers.1.self_attn.k_proj.weight": "merge"})
    expect(page.get_by_role("button", name="Layer 1, k,")).to_have_accessible_name(
        re.compile("always merged")
    )
    page.keyboard.press("Escape")
    expect(page.locator("#layer-map .lm-detail-head h2")).to_have_count(0)


def test_a_cell_is_chosen_by_click_compared_by_pin_and_not_by_hover(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    heading = page.locator("#layer-map .lm-detail-head h2")
    page.get_by_role("button", name=re.compile("^Layer 12, k,")).click()
    expect(heading).to_have_text("Layer 12 · k")
    page.get_by_role("button", name=re.compile("^Layer 3, up,")).hover()
    expect(page.locator("#layer-map .lm-read")).to_contain_text("Layer 3, up")
    expect(heading).to_have_text("Layer 12 · k")
    page.get_by_role("button", name=re.compile("^Layer 3, up,")).click(modifiers=["Shift"])
    expect(page.locator("#layer-map .lm-numbers thead")).to_contain_text("3 · up (pinned)")
    page.get_by_role("button", name="Large figure").click()
    expect(page.locator("#spectra .js-plotly-plot")).to_be_visible()
    expect(page.locator("#spectra .legend")).to_contain_text("Layer 3, up (pinned)")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save its numbers as CSV").click()
    rows = csv_rows(download.value)
    places = ("model.layers.12.self_attn.k_proj.weight", "model.layers.3.mlp.up_proj.weight")
    shown = [r for name in places for r in PACKS["a"]["records"] if r["name"] == name]
    assert [float(row["mllm_sigma"]) for row in rows] == [s for r in shown for s in r["mllm_sigma"]]
    page.keyboard.press("Escape")
    expect(heading).to_have_count(0)
    expect(page.locator("#layer-map .pinned")).to_have_count(0)


def test_the_histogram_can_be_dragged_and_a_cancelled_touch_commits_what_is_seen(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    traffic = open_map(page, explore_url)
    plot = page.locator("#layer-map .lm-hist")
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40, steps=10)
    plot.dispatch_event("pointercancel", {"pointerId": 1})
    expect(page.locator("#layer-map .lm")).not_to_have_attribute("data-dragging", "1")
    page.mouse.up()
    received(page, s=plan_on_page(page)["s"])
    assert len(traffic.commits()) == 1


def test_dead_ends_are_explained(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    number = page.get_by_label("S alpha as a number")
    summary = page.locator("#layer-map .sum")
    number.fill("1")
    number.press("Enter")
    expect(summary).to_contain_text("Nothing merges above")
    expect(summary).to_contain_text("equals the multimodal model")
    number.fill("0")
    number.press("Enter")
    expect(summary).to_contain_text("Every matrix merges: no selection step is left")


@pytest.mark.parametrize("typed", ["9", "-1", ""])
def test_a_wrong_number_stays_with_a_sentence_beside_it(
    chromium_page: Page, explore_url: str, typed: str
):
    page = chromium_page
    open_map(page, explore_url)
    plan = plan_on_page(page)
    for label, name in (("S alpha as a number", "s"), ("lambda as a number", "lambda")):
        number, wrong = page.get_by_label(label), page.locator(f"[data-wrong={name}]")
        number.fill("99" if typed == "9" else typed)
        number.press("Enter")
        expect(number).to_have_attribute("aria-invalid", "true")
        expect(number).to_have_value("99" if typed == "9" else typed)
        expect(wrong).to_contain_text("expected a number from 0 to")
        assert number.get_attribute("aria-describedby") == wrong.get_attribute("id")
        assert plan_on_page(page) == plan
        number.fill("0.123456789")
        expect(wrong).to_be_hidden()
        number.press("Enter")
        assert plan_on_page(page)[name] == 0.123456789
        expect(number).to_have_value("0.123456789")
        number.fill("")
        number.press("Enter")
        expect(wrong).to_be_visible()
        page.get_by_role("button", name="Reset").click()
        expect(wrong).to_be_hidden()
        expect(number).not_to_have_attribute("aria-invalid", "true")


def test_a_preset_sets_the_plan_and_says_where_it_comes_from(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_label("Preset").select_option(label="Task arithmetic")
    received(page, variant="select_only")
    expect(page.locator("#layer-map .lm-source")).to_contain_text("2212.04089")
    page.get_by_role("slider", name="scale of the update").press("ArrowRight")
    expect(page.get_by_label("Preset").locator("option:checked")).to_have_text(
        "Task arithmetic, edited"
    )


def test_another_pair_replaces_the_map(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_role("combobox", name="Pair").click()
    page.get_by_role("option", name="4 layers").click()
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(28)
    expect_summary(page, PACKS["b"])
