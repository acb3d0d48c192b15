"""Search in a real Chromium: from the form to a plan that is taken, and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Page, expect
from test_browser_axe import findings
from test_browser_evaluate import COMMITTED, LOADING, open_tab

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("search")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as found:
        yield found


def run_search(page: Page) -> None:
    page.get_by_text("Search: the best parameters").click()
    ranges = page.locator("#search-ranges textarea")
    expect(ranges).to_have_value("lambda_=0.5,1,2,4,8\nsimilarity_threshold=0.1,0.3,0.5,0.7,0.9")
    ranges.fill("lambda=2,8\nsimilarity_threshold=0.1,0.3")
    page.get_by_label("Optimizer", exact=True).click()
    page.get_by_role("option", name="Grid of the listed values").click()
    for name, value in (("Evaluations", "3"), ("Validation share", "0.5"), ("Items per task", "2")):
        page.get_by_label(name, exact=True).fill(value)
        page.get_by_label(name, exact=True).blur()
    page.locator("#start-evaluation").click()
    progress = page.locator("#evaluation-status")
    expect(progress).to_contain_text("3 of 3 evaluations", timeout=LOADING)
    expect(page.locator("#evaluation .ev-notes")).to_contain_text(
        "Best: evaluation", timeout=LOADING
    )


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_a_search_runs_and_a_button_takes_the_plan_of_an_evaluation(
    new_page: NewPage, url: str, width: int, theme: str
) -> None:
    page = new_page(width, 900, color_scheme=theme)
    open_tab(page, f"{url}/?__theme={theme}")
    run_search(page)
    rows = page.locator("#evaluation .ev-search").last.locator("tbody tr")
    expect(rows).to_have_count(3)
    first = rows.nth(0).locator("td")
    wanted = float(first.nth(0).inner_text())
    rows.nth(0).get_by_role("button").click()
    expect(page.locator("#evaluation .lm-status")).to_contain_text("is the chosen plan")
    assert page.evaluate(COMMITTED) == wanted
    page.locator("#evaluation [data-act=untake]").click()
    assert page.evaluate(COMMITTED) == 1
    page.locator("#evaluation [data-sort=evaluation]").click()
    expect(rows.nth(0).locator("th")).to_contain_text("0")
    expect(page.locator("#search-front .js-plotly-plot")).to_be_visible(timeout=LOADING)
    for kind in ("csv", "json", "html"):
        with page.expect_download() as saved:
            page.locator(f"#evaluation [data-act={kind}]").click()
        assert saved.value.suggested_filename == f"ipmerge-search.{kind}"
    assert findings(page, "#evaluation") == set()
    assert findings(page, "#evaluate-search") == set()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
