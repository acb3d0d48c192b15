"""The list of runs in a real Chromium: in every tab, after reload and restart, and by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Locator, Page, expect
from slow_steps import held
from test_browser_axe import findings

pytestmark = pytest.mark.browser

LOADING = 60_000  # the first check loads torch


class Place(NamedTuple):
    """A running app and the folder where it keeps what it makes."""

    url: str
    home: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The app over the demo trio, whose runs can be held to step in between."""
    home = tmp_path_factory.mktemp("runs")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as url:
        yield Place(url, home)


def open_app(page: Page, url: str, query: str = "") -> Page:
    page.goto(f"{url}/?{query}")
    expect(page.locator("#layer-map .sum")).not_to_be_empty()
    return page


def open_tab(page: Page, name: str) -> None:
    page.locator("#tabs").get_by_role("tab", name=name).click()


def start_merge(page: Page, name: str) -> None:
    open_tab(page, "Merge")
    expect(page.locator("#confirmation dl")).to_be_visible(timeout=LOADING)
    page.get_by_label("Output folder").fill(name)
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    page.locator("#start-merge").click()
    # A run that is not held may be over before the list shows it in progress.
    expect(page.locator("#run-status")).to_contain_text(f"into {Path(name).name}", timeout=LOADING)


def open_list(page: Page) -> Locator:
    if page.locator(".rl-open").get_attribute("aria-expanded") == "false":
        page.locator(".rl-open").click()
    expect(page.locator("#run-drawer")).to_be_visible()
    return page.locator("#run-drawer")


def row(page: Page, name: str) -> Locator:
    return open_list(page).locator("li").filter(has_text=re.compile(rf"Merge {name} "))


def press(page: Page, label: str, name: str) -> None:
    row(page, name).get_by_role("button", name=f"{label}: Merge {name}", exact=True).click()


def test_a_run_is_found_and_led_from_every_tab(place, new_page):
    page = open_app(new_page(), place.url)
    expect(page.locator(".rl-open")).to_have_text("Runs")
    with held(place.home):
        start_merge(page, "from-all")
        page.reload()
        expect(page.locator("#layer-map .sum")).not_to_be_empty()
        button = page.locator(".rl-open")
        for tab in ("Explore", "Try it", "Compare", "API & cite"):
            open_tab(page, tab)
            expect(button).to_contain_text(re.compile(r"1 run: \d+ %"))
        bar = page.locator("#tabs [role=tablist]").first
        place_before = bar.bounding_box()
        entry = row(page, "from-all")
        assert bar.bounding_box() == place_before, "the layout jumped"
        for text in ("running", "IP-Merging", str(place.home / "models" / "from-all"), "demo trio"):
            expect(entry).to_contain_text(text)
        expect(entry.locator(".rl-words")).to_contain_text("of 98 tensors")

        press(page, "Show", "from-all")
        expect(page.locator("#run-drawer")).to_be_hidden()
        expect(page.locator("#run-status")).to_contain_text("from-all")
        expect(page.locator("#start-note")).to_contain_text("A merge is in progress")
        press(page, "Cancel", "from-all")
        expect(row(page, "from-all")).to_contain_text("cancelled", timeout=LOADING)
        expect(page.locator("#run-status")).to_contain_text("Cancelled")
        expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
        expect(button).to_have_text("Runs (1)")
        press(page, "Resume", "from-all")
        expect(page.locator("#start-merge")).to_be_disabled()
        expect(page.locator("#run-status")).to_contain_text("Running", timeout=LOADING)
    expect(row(page, "from-all")).to_contain_text("finished", timeout=LOADING)
    expect(page.locator(".rl-said")).to_have_text("Merge from-all: finished.")
    link = row(page, "from-all").get_by_role("link", name="Download: Merge from-all")
    assert page.request.head(f"{place.url}/{link.get_attribute('href')}").status in (200, 405)

    press(page, "Try it", "from-all")
    right = page.get_by_label("Model B", exact=True)
    expect(right).to_have_value(re.compile("^Chosen merge · from-all · IP-Merging"))


def test_deleting_asks_first_and_deletes_what_the_app_wrote(place, new_page, tmp_path):
    page = open_app(new_page(), place.url)
    own = tmp_path / "own"
    for name in ("to-delete", str(own)):
        start_merge(page, name)
        expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    model = place.home / "models" / "to-delete"
    press(page, "Delete", "to-delete")
    confirm = row(page, "to-delete").locator(".rl-confirm")
    expect(confirm).to_contain_text("and the model 'to-delete'? This cannot be undone.")
    keep = confirm.get_by_role("button", name="Keep")
    expect(keep).to_be_focused()
    keep.press("Enter")
    expect(confirm).to_be_hidden()
    assert model.is_dir()
    press(page, "Delete", "to-delete")
    confirm.get_by_role("button", name="Delete").click()
    expect(row(page, "to-delete")).to_have_count(0)
    assert not model.exists()
    press(page, "Delete", "own")
    confirm = row(page, "own").locator(".rl-confirm")
    expect(confirm).to_contain_text("'own' is kept")
    confirm.get_by_role("button", name="Delete").click()
    expect(row(page, "own")).to_have_count(0)
    assert (own / "ipmerge.json").is_file()
    expect(page.locator("#run-status")).to_contain_text("No run yet")
    page.reload()
    expect(page.locator("#layer-map .sum")).not_to_be_empty()
    expect(row(page, "own")).to_have_count(0)


def test_runs_outlive_the_app_and_its_next_start_knows_whose_they_are(tmp_path, new_page):
    page, port = new_page(), free_port()
    command = ("tests/slow_app.py", str(tmp_path))
    with held(tmp_path):
        with serving(tmp_path / "log", *command, port=port) as url:
            start_merge(open_app(page, url), "outlives")
        with serving(tmp_path / "log", *command, port=port) as url:
            open_app(page, url)
            expect(page.locator(".rl-open")).to_contain_text("1 run:")
            press(page, "Cancel", "outlives")
            expect(row(page, "outlives")).to_contain_text("cancelled", timeout=LOADING)
            other = open_app(new_page(), url)
            expect(row(other, "outlives")).to_contain_text("another browser or program")
            for label in ("Cancel", "Resume", "Delete"):
                expect(row(other, "outlives").get_by_role("button", name=label)).to_have_count(0)


def test_keys_lead_through_the_list(place, new_page):
    page = open_app(new_page(), place.url)
    start_merge(page, "by-keys")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    button = page.locator(".rl-open")
    button.focus()
    button.press("Enter")
    expect(page.locator("#run-drawer")).to_be_visible()
    names = []
    for _ in range(5):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.textContent"))
    assert names == ["Close", "Show", "Try it", "Download", "Delete"]
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(row(page, "by-keys")).to_have_count(0)
    assert page.evaluate("document.activeElement.closest('#run-drawer') !== null")
    page.keyboard.press("Escape")
    expect(page.locator("#run-drawer")).to_be_hidden()
    expect(button).to_be_focused()


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_list_has_no_finding_by_axe_and_fits(place, new_page, width, theme):
    page = open_app(new_page(width=width, height=844), place.url, f"__theme={theme}")
    open_list(page)
    assert findings(page, "#run-list") == set()
    name = f"axe-{width}"
    with held(place.home):
        start_merge(page, name)
        expect(row(page, name).locator(".rl-words")).to_contain_text("tensors", timeout=LOADING)
        assert findings(page, "#run-list") == set(), "running"
        box = page.locator("#run-drawer").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert page.evaluate("document.documentElement.scrollWidth") == width
    expect(row(page, name)).to_contain_text("finished", timeout=LOADING)
    press(page, "Delete", name)
    assert findings(page, "#run-list") == set(), "a question"
