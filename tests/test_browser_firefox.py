"""The map in a second engine: first paint, what an eye sees of it, drag, and keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from browser_fixtures import SEEN_BEFORE
from explore_page import (
    PACKS,
    Traffic,
    expect_summary,
    open_map,
    plan_on_page,
    python_preview,
    received,
)
from playwright.sync_api import Browser, Page, expect
from test_browser_looks import framed, grey, hatched

pytestmark = pytest.mark.browser

THRESHOLD = re.compile("similarity threshold")


@pytest.fixture(params=[1280, 390])
def page(firefox: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    context = firefox.new_context(viewport={"width": request.param, "height": 900})
    context.add_init_script(SEEN_BEFORE)
    page = context.new_page()
    page.set_default_timeout(30_000)
    yield page
    context.close()


def test_the_first_paint_is_complete_quiet_and_fits(page: Page, explore_url: str):
    traffic = open_map(page, explore_url)
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(196)
    expect_summary(page, PACKS["a"])
    width, shown = page.evaluate(
        "(({ scrollWidth, clientWidth }) => [scrollWidth, clientWidth])(document.documentElement)"
    )
    assert width == shown
    assert traffic.complaints == []
    assert {url.split("/")[2] for _, url, _ in traffic.requests if url.startswith("http")} == {
        explore_url.split("/")[2]
    }
    merges = page.locator("#layer-map .c[data-on='1']").first
    kept = page.locator("#layer-map .c[data-on='0']").first
    for cell in (merges, kept):
        cell.evaluate("node => node.style.setProperty('--c', 'rgb(138, 134, 120)')")
    assert framed(grey(merges))
    assert hatched(grey(kept))


def test_a_drag_asks_nothing_of_the_server_and_commits_once(page: Page, explore_url: str):
    traffic: Traffic = open_map(page, explore_url)
    page.wait_for_load_state("load")
    box = page.get_by_role("slider", name=THRESHOLD).bounding_box()
    x, y = box["x"] + 0.4 * box["width"], box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    traffic.requests.clear()
    for step in range(30):
        page.mouse.move(x - step * box["width"] / 150, y)
    assert traffic.queue_calls() == []
    expect(page.locator("#layer-map .lm")).to_have_attribute("data-dragging", "1")
    page.mouse.up()
    plan = plan_on_page(page)
    assert plan["s"] < 0.35
    received(page, s=plan["s"])
    assert len([url for _, url, _ in traffic.requests if "/gradio_api/run/" in url]) == 1
    expect_summary(page, PACKS["a"])


def test_everything_is_reached_by_keyboard(page: Page, explore_url: str):
    open_map(page, explore_url)
    slider = page.get_by_role("slider", name=THRESHOLD)
    slider.focus()
    page.keyboard.press("ArrowRight")
    received(page, s=0.401)
    before = len(python_preview(PACKS["a"], plan_on_page(page)).selected)
    page.keyboard.press("]")
    expect(page.locator("#layer-map [role=status]")).to_contain_text(f"{before - 1} of 196")
    page.keyboard.press("Control+z")
    received(page, s=0.401)
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("Boolean(document.activeElement.closest('[role=grid]'))"):
            break
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    heading = page.locator("#layer-map .lm-detail-head h2")
    expect(heading).to_have_text(re.compile(r"Layer \d+ · \w+"))
    page.keyboard.press("f")
    assert len(plan_on_page(page)["overrides"]) == 1
    page.keyboard.press("Escape")
    expect(heading).to_have_count(0)
