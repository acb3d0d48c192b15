"""Fine-tune in a real Chromium: check, start, curves, cancel and resume, the model in the chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Page, expect
from test_browser_axe import findings

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]
LOADING = 120_000  # a run loads torch and the models


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app over the demo models."""
    home = tmp_path_factory.mktemp("finetune")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as found:
        yield found


def open_tab(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#layer-map .sum")).not_to_be_empty()
    select_tab(page)
    proposed = page.locator("#finetune-mllm textarea, #finetune-mllm input")
    expect(proposed).not_to_have_value("")
    return page


def select_tab(page: Page) -> None:
    tab = page.get_by_role("tab", name="Fine-tune")
    if tab.is_visible():
        tab.click()
        return
    page.locator(".overflow-menu > button").click()  # of a narrow page
    page.locator(".overflow-dropdown button", has_text="Fine-tune").click()


def fill(page: Page, name: str, value: str) -> None:
    field = page.locator(f"#finetune-{name} input")
    field.fill(value)
    field.blur()


def check(page: Page, steps: int) -> None:
    fill(page, "limit", "8")
    fill(page, "max-steps", str(steps))
    fill(page, "held-out", "0.25")
    page.locator("#check-finetune").click()
    expect(page.locator("#finetune-found")).to_contain_text("First examples", timeout=LOADING)
    expect(page.locator("#start-finetune")).to_be_enabled()


def test_a_change_after_the_check_needs_another_check(chromium_page: Page, url: str) -> None:
    page = open_tab(chromium_page, url)
    expect(page.locator("#start-finetune")).to_be_disabled()
    check(page, 4)
    fill(page, "seed", "7")
    expect(page.locator("#finetune-found")).to_contain_text("Check before you start")
    expect(page.locator("#start-finetune")).to_be_disabled()


def test_a_run_draws_curves_can_be_cancelled_and_resumed_and_opens_in_the_chat(
    chromium_page: Page, url: str
) -> None:
    page = open_tab(chromium_page, url)
    check(page, 30)
    page.locator("#start-finetune").click()
    expect(page.locator("#finetune-curves svg").first).to_be_visible(timeout=LOADING)
    page.locator("#cancel-finetune").click()
    expect(page.locator("#finetune-status")).to_contain_text("Cancelled", timeout=LOADING)
    page.reload()
    expect(page.locator("#layer-map .sum")).not_to_be_empty()
    select_tab(page)
    page.locator("#resume-finetune").click()
    expect(page.locator("#finetune-status")).to_contain_text("Finished", timeout=LOADING)
    expect(page.locator("#finetune-curves svg")).to_have_count(4)
    page.locator("#finetune-try").click()
    chosen = page.get_by_role("combobox", name="Model B")
    expect(chosen).to_have_value(re.compile("fine-tuned", re.IGNORECASE), timeout=LOADING)


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_form_has_no_accessibility_finding_and_no_sideways_scroll(
    new_page: NewPage, url: str, width: int, theme: str
) -> None:
    page = open_tab(new_page(width, 900, color_scheme=theme), url)
    page.get_by_role("button", name="Advanced").click()
    expect(page.locator("#finetune-warmup")).to_be_visible()
    assert not findings(page, "#tab-finetune")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
