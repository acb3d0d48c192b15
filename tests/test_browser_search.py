"""Search in a real Chromium: from the form to a plan that is taken, and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Locator, Page, expect
from test_browser_axe import findings
from test_browser_evaluate import COMMITTED, LOADING, open_tab, select_tab

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]
USUAL = "lambda_=0.5,1,2,4,8\nsimilarity_threshold=0.1,0.3,0.5,0.7,0.9"
EXPLORED = "#tabs [role=tab][aria-selected=true]"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app over the demo models."""
    home = tmp_path_factory.mktemp("search")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as found:
        yield found


def fill_form(page: Page, ranges: str, evaluations: int) -> None:
    page.get_by_text("Search: the best parameters").click()
    field = page.locator("#search-ranges textarea")
    expect(field).to_have_value(USUAL, timeout=LOADING)
    field.fill(ranges)
    page.get_by_label("Optimizer", exact=True).click()
    page.get_by_role("option", name="Grid of the listed values").click()
    numbers = {"Evaluations": evaluations, "Validation share": 0.5, "Items per task": 2}
    for name, value in numbers.items():
        page.get_by_label(name, exact=True).fill(str(value))
        page.get_by_label(name, exact=True).blur()


def wait_for_result(page: Page, evaluations: int, words: str = "Best: evaluation") -> Locator:
    progress = page.locator("#evaluation-status")
    expect(progress).to_contain_text(f"{evaluations} of {evaluations} eval", timeout=LOADING)
    expect(page.locator("#evaluation .ev-notes")).to_contain_text(words, timeout=LOADING)
    return page.locator("#evaluation .ev-search").last.locator("tbody tr")


def click_point(page: Page, figure: str) -> None:
    """Click on the first evaluated point of a figure."""
    drawn = page.locator(f"#search-{figure} .js-plotly-plot")
    expect(drawn).to_be_visible(timeout=LOADING)
    point = drawn.locator(".scatterlayer .points path").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_a_search_is_cancelled_resumed_and_a_point_opens_its_plan_in_explore(
    chromium_page: Page, url: str
) -> None:
    page = open_tab(chromium_page, url)
    fill_form(page, "lambda=1,2,4,8\nsimilarity_threshold=0.1,0.2,0.3,0.4", 16)
    page.locator("#start-evaluation").click()
    progress = page.locator("#evaluation-status")
    expect(progress).to_contain_text("of 16 evaluations", timeout=LOADING)
    page.locator("#cancel-evaluation").click()
    expect(progress).to_contain_text("Cancelled", timeout=LOADING)
    page.locator("#resume-evaluation").click()
    rows = wait_for_result(page, 16)
    expect(rows).to_have_count(16)
    numbers = rows.locator("th").all_inner_texts()
    assert len({text.split()[0] for text in numbers}) == 16

    for figure in ("landscape", "front"):
        click_point(page, figure)
        expect(page.locator(EXPLORED)).to_have_text("Explore")
        expect(page.locator("#layer-map .lm-status")).to_contain_text("Plan of the evaluation")
        select_tab(page)
        chosen = page.locator("#evaluation .ev-point h3")
        expect(chosen).to_contain_text("Chosen: evaluation")
        number = chosen.inner_text().split()[2]
        row = rows.filter(has=page.get_by_role("rowheader", name=f"{number} ")).first
        assert page.evaluate(COMMITTED) == float(row.locator("td").first.inner_text())
        page.locator("#evaluation [data-act=untake]").click()
        assert page.evaluate(COMMITTED) == 1
    expect(page.locator("#search-importance .js-plotly-plot")).to_be_visible()


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_a_search_runs_and_a_button_takes_the_plan_of_an_evaluation(
    new_page: NewPage, url: str, tmp_path: Path, width: int, theme: str
) -> None:
    page = new_page(width, 900, color_scheme=theme)
    open_tab(page, f"{url}/?__theme={theme}")
    fill_form(page, "lambda=2,8\nsimilarity_threshold=0.1,0.3", 3)
    found = findings(page, "#evaluate-search")
    assert found == set(), found
    page.locator("#start-evaluation").click()
    rows = wait_for_result(page, 3)
    expect(rows).to_have_count(3)
    wanted = float(rows.nth(0).locator("td").nth(0).inner_text())
    rows.nth(0).get_by_role("button").click()
    expect(page.locator("#evaluation .lm-status")).to_contain_text("is the chosen plan")
    assert page.evaluate(COMMITTED) == wanted
    expect(page.locator("#evaluate-chosen")).to_contain_text(f"λ {wanted:g}")
    page.locator("#evaluation [data-act=edit]").click()
    expect(page.locator(EXPLORED)).to_have_text("Explore")
    select_tab(page)
    page.locator("#evaluation [data-act=untake]").click()
    assert page.evaluate(COMMITTED) == 1
    expect(page.locator("#evaluate-chosen")).to_contain_text("λ 1 ")
    page.locator("#evaluation [data-sort=evaluation]").click()
    expect(rows.nth(0).locator("th")).to_contain_text("0")
    expect(page.locator("#search-front .js-plotly-plot")).to_be_visible(timeout=LOADING)
    for kind in ("csv", "json", "html"):
        with page.expect_download() as saved:
            page.locator(f"#evaluation [data-act={kind}]").click()
        assert saved.value.suggested_filename == f"ipmerge-search.{kind}"
        saved.value.save_as(tmp_path / f"saved.{kind}")
    assert len((tmp_path / "saved.csv").read_text().splitlines()) == 4
    assert findings(page, "#evaluation") == set()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_search_without_labels_selects_the_grid_and_shows_disagreements(
    chromium_page: Page, url: str
) -> None:
    page = open_tab(chromium_page, url)
    fill_form(page, "lambda=1,2,8", 40)
    page.get_by_label("Optimizer", exact=True).click()
    page.get_by_role("option", name="Random").click()
    page.get_by_label("Without labels").check()
    expect(page.get_by_label("Optimizer", exact=True)).to_have_value("Grid of the listed values")
    page.locator("#start-evaluation").click()
    wait_for_result(page, 3, "Chosen without labels: evaluation")
    heads = page.locator("#evaluation .ev-search").last.locator("thead")
    expect(heads).to_contain_text("disagreement")
    expect(page.locator("#search-path .js-plotly-plot")).to_be_visible(timeout=LOADING)


def test_what_cannot_be_searched_is_refused_in_a_sentence(chromium_page: Page, url: str) -> None:
    page = open_tab(chromium_page, url)
    fill_form(page, "lambda=8,1", 3)
    page.locator("#start-evaluation").click()
    expect(page.get_by_text("Write the lower one first")).to_be_visible(timeout=LOADING)
    expect(page.locator("#start-evaluation")).to_be_enabled()
