"""Evaluate in a real Chromium: a run with progress, its plot, plans to take, items in the chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Page, expect
from test_browser_axe import findings

from ipmerge_core.evaluation.evaluate import EvaluationSettings
from ipmerge_core.evaluation.points import Axis
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.sweeps import iter_sweep
from ipmerge_core.methods.declarations import drained
from ipmerge_core.tasks.registry import find_tasks
from ipmerge_core.ui.plan_choice import analysis_of

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]
LOADING = 120_000  # a run loads torch and the models
COMMITTED = "document.querySelector('#layer-map .lm').parentNode.ipmerge.committed.lambda"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app over the demo models; the replies of a sweep are already stored."""
    home = tmp_path_factory.mktemp("evaluate")
    axis = Axis("lambda_", (1.0, 8.0))
    how = EvaluationSettings(limit=2)
    store = ReplyStore(home / "evaluations")
    drained(iter_sweep(analysis_of("pack"), [axis], find_tasks(["demo"]), how, store))
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as found:
        yield found


def open_tab(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#layer-map .sum")).not_to_be_empty()
    select_tab(page)
    expect(page.locator("#start-evaluation")).to_be_enabled(timeout=LOADING)
    expect(page.locator("#evaluate-chosen")).to_contain_text("IP-Merging", timeout=LOADING)
    return page


def select_tab(page: Page) -> None:
    named = page.locator("#tabs").get_by_role("tab", name="Evaluate")
    if named.is_visible():
        named.click()
    else:  # a narrow page has the last tabs in a menu
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text="Evaluate").click()


def run_sweep(page: Page) -> None:
    page.get_by_text("Sweep: values of one or two").click()
    page.get_by_label("Values of the parameter").fill("1, 8")
    page.get_by_label("Items per task").fill("2")
    page.get_by_label("Items per task").blur()
    page.locator("#start-evaluation").click()
    expect(page.locator("#evaluation-status")).to_contain_text("54 of 54 items", timeout=LOADING)
    expect(page.locator("#evaluation .ev-column")).to_have_count(2, timeout=LOADING)


def test_a_sweep_runs_and_a_click_on_a_point_takes_its_plan(chromium_page: Page, url: str) -> None:
    page = open_tab(chromium_page, url)
    run_sweep(page)
    expect(page.locator("#evaluation .ev-notes")).to_contain_text("Small sample")
    expect(page.locator("#evaluation .ev-key")).to_contain_text("perception")
    page.locator("#evaluation .ev-column").last.click()
    expect(page.locator("#evaluation .lm-status")).to_contain_text("lambda 8 is the chosen plan")
    assert page.evaluate(COMMITTED) == 8
    page.locator("#evaluation [data-act=untake]").click()
    assert page.evaluate(COMMITTED) == 1
    # by keyboard
    page.locator("#evaluation .ev-column").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#evaluation .ev-point h3")).to_contain_text("lambda 8")
    page.keyboard.press("Enter")
    assert page.evaluate(COMMITTED) == 8
    # the measured points are on the dials
    page.locator("#tabs").get_by_role("tab", name="Explore").click()
    lane = page.locator("[data-measured=lambda]")
    expect(lane).to_be_visible()
    expect(lane.locator("circle")).to_have_count(4)  # two plans, math and perception
    page.reload()
    expect(page.locator("[data-measured=lambda] circle")).to_have_count(4, timeout=LOADING)


def test_an_item_opens_in_the_chat_with_both_answers_and_files_are_saved(
    chromium_page: Page, url: str, tmp_path: Path
) -> None:
    page = open_tab(chromium_page, url)
    run_sweep(page)
    page.locator("#evaluation .ev-column").last.hover()
    page.locator("#evaluation [data-act=items]").click()
    rows = page.locator("#evaluation .ev-item")
    expect(rows.first).to_be_visible(timeout=LOADING)
    words = rows.first.inner_text()
    for kind in ("csv", "json", "html"):
        with page.expect_download() as saved:
            page.locator(f"#evaluation [data-act={kind}]").click()
        assert saved.value.suggested_filename == f"ipmerge-sweep.{kind}"
        saved.value.save_as(tmp_path / f"saved.{kind}")
    assert len((tmp_path / "saved.csv").read_text().splitlines()) == 4
    report = chromium_page.context.new_page()
    requests: list[str] = []
    report.on("request", lambda request: requests.append(request.url))
    report.goto((tmp_path / "saved.html").as_uri())
    expect(report.locator(".ev-sweep")).to_be_visible()
    expect(report.locator(".ev-item").first).to_be_visible()
    assert all(address.startswith(("file:", "data:")) for address in requests)
    report.close()
    rows.first.click()
    expect(page.locator(".chip.recorded")).to_be_visible(timeout=LOADING)
    after = re.search(r"After: (.+)", words)
    assert after is not None
    expect(page.locator("#tabs")).to_contain_text(after[1])


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_results_have_no_accessibility_finding_and_no_sideways_scroll(
    new_page: NewPage, url: str, width: int, theme: str
) -> None:
    page = new_page(width, 900, color_scheme=theme)
    open_tab(page, f"{url}/?__theme={theme}")
    run_sweep(page)
    page.locator("#evaluation [data-act=items]").click()
    expect(page.locator("#evaluation .ev-item").first).to_be_visible(timeout=LOADING)
    assert findings(page, "#evaluation") == set()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_narrow_page_shows_the_perception_of_every_model(new_page: NewPage, url: str) -> None:
    page = open_tab(new_page(390, 900), url)
    page.get_by_label("Items per task").fill("2")
    page.get_by_label("Items per task").blur()
    page.locator("#start-evaluation").click()
    cells = page.locator("#evaluation .ev-models td")
    expect(cells).to_have_count(8, timeout=LOADING)
    for label in ("Demo, math", "Demo, perception"):
        found = page.locator(f"#evaluation .ev-models td[data-label='{label}']")
        expect(found).to_have_count(2)
        for each in found.all():
            box = each.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
