"""The Compare tab in a real Chromium: its numbers are Python's, and it can be read and operated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from browser_fixtures import free_port, serving
from explore_app import write_packs
from explore_page import PACKS, Traffic, open_map, percent, python_preview
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

BASE = {"similarity": "first", "variant": "sum"}
CELLS = "#compare-map [role=gridcell]"
A = {**BASE, "s": 0.3, "lambda": 1.0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real app, with synthetic packs of its own."""
    folder = tmp_path_factory.mktemp("compare")
    write_packs(folder / "home", PACKS)
    with serving(folder / "log", "app.py", port=free_port()) as url:
        yield url


def open_compare(page: Page, url: str) -> Traffic:
    """Open the 28-layer pack with plan A in Explore, then the tab."""
    traffic = open_map(page, url)
    page.get_by_label("Pair", exact=True).click()
    page.get_by_role("option", name="own: synthetic 28 layers").click()
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(196)
    set_value(page, "S alpha as a number", 0.3)
    if page.viewport_size["width"] < 600:  # the last tabs are in the menu of a narrow page
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text="Compare").click()
    else:
        page.get_by_role("tab", name="Compare").click()
    expect(page.locator(CELLS)).to_have_count(196)
    return traffic


def set_value(page: Page, label: str, value: float) -> None:
    field = page.get_by_label(label, exact=True)
    field.fill(str(value))
    field.press("Enter")


def summary(a: set[str], b: set[str]) -> str:
    return f"Jaccard {len(a & b) / len(a | b):.2f} · {len(a & b)} in both · B adds +{len(b - a)} and drops −{len(a - b)}"  # noqa: E501


def test_two_plans_on_one_pair_are_compared_as_python_does_without_a_request(
    chromium_page: Page, served: str
):
    page = chromium_page
    traffic = open_compare(page, served)
    before = traffic.triggers()
    set_value(page, "S alpha of B", 0.2)
    set_value(page, "lambda of B", 2)
    first = python_preview(PACKS["a"], A)
    second = python_preview(PACKS["a"], {**BASE, "s": 0.2, "lambda": 2.0})
    a, b = set(first.selected), set(second.selected)
    words = page.locator("#compare-map .sum")
    expect(words).to_contain_text(summary(a, b))
    changes = [percent(100 * preview.relative_change) for preview in (first, second)]
    expect(words).to_contain_text(f"change A {changes[0]}, B {changes[1]} of ‖W‖")
    for state, names in {"both": a & b, "a": a - b, "b": b - a}.items():
        expect(page.locator(f"#compare-map .c[data-state={state}]")).to_have_count(len(names))
    assert traffic.triggers() == before  # what opened the tab, no field of it
    assert traffic.complaints == []


SLOW_COMMITS = """
const send = window.fetch;
window.fetch = async (url, options) => {
  const commit = String(options?.body).includes('"variant"');
  if (commit) await new Promise((wake) => setTimeout(wake, 900));
  return send(url, options);
};
"""


def test_a_tab_that_is_opened_at_once_shows_the_plan_that_was_just_chosen(
    chromium_page: Page, served: str
):
    page = chromium_page
    page.add_init_script(SLOW_COMMITS)
    open_compare(page, served)
    expect(page.get_by_label("S alpha of A", exact=True)).to_have_value("0.300")
    page.get_by_role("tab", name="Explore").click()
    set_value(page, "S alpha as a number", 0.25)
    page.get_by_role("tab", name="Cite").click()
    expect(page.locator("#cite-state")).to_contain_text("0.25")


def test_the_table_lists_the_differences_and_sorts_them(chromium_page: Page, served: str):
    page = chromium_page
    open_compare(page, served)
    set_value(page, "S alpha of B", 0.2)
    names = [set(python_preview(PACKS["a"], {**A, "s": s}).selected) for s in (0.3, 0.2)]
    page.get_by_text("Table of differences").click()
    rows = page.locator("#compare-map tbody").last.locator("tr")
    expect(rows).to_have_count(len(names[0] ^ names[1]))
    head = page.get_by_role("button", name="similarity A", exact=True)
    for order in ("descending", "ascending"):
        head.click()
        expect(page.locator(f"#compare-map th[aria-sort={order}]")).to_contain_text("similarity A")
        shown = [float(text) for text in rows.locator("td:nth-child(4)").all_inner_texts()]
        assert shown == sorted(shown, reverse=order == "descending")


def test_another_pair_is_compared_by_relative_depth(chromium_page: Page, served: str):
    page = chromium_page
    traffic = open_compare(page, served)
    page.get_by_label("Pair B").click()
    page.get_by_role("option", name="own: synthetic 4 layers").click()
    expect(page.locator("#compare-map .lm-source")).to_contain_text("A has 28 layers and B has 4")
    selected = [set(python_preview(PACKS[name], A).selected) for name in ("a", "b")]
    pairs = set()
    for name in python_preview(PACKS["a"], {**A, "s": 0.0}).selected:
        head, layer, tail = name.split(".", 3)[:2], int(name.split(".")[2]), name.split(".", 3)[3]
        if ".".join([*head, str(int(layer / 27 * 3 + 0.5)), tail]) in selected[1]:
            pairs.add(name)
    expect(page.locator("#compare-map .sum")).to_contain_text(summary(selected[0], pairs))
    page.get_by_role("button", name="Similarity B − A").click()
    expect(page.locator("#compare-map .c[data-state=value]")).to_have_count(196)
    assert traffic.complaints == []


def test_the_first_difference_is_chosen_and_read_and_arrows_move_on(
    chromium_page: Page, served: str
):
    page = chromium_page
    open_compare(page, served)
    set_value(page, "S alpha of B", 1)
    page.get_by_role("button", name="First difference").click()
    expect(page.locator("#compare-map .lm-read")).to_contain_text("merges only in A")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#compare-map .c.chosen")).to_be_focused()


def test_side_by_side_shows_two_maps_with_one_choice_at_the_same_relative_depth(
    chromium_page: Page, served: str
):
    page = chromium_page
    traffic = open_compare(page, served)
    page.get_by_label("Pair B").click()
    page.get_by_role("option", name="own: synthetic 4 layers").click()
    expect(page.locator("#compare-map .lm-source")).to_contain_text("A has 28 layers and B has 4")
    page.get_by_role("button", name="Side by side").click()
    for letter, name, cells in (("a", "a", 196), ("b", "b", 28)):
        grid = page.locator(f"#compare-map [data-grid={letter}]")
        expect(grid.locator("[role=gridcell]")).to_have_count(cells)
        merging = python_preview(PACKS[name], A).selected
        expect(grid.locator(".c[data-on='1']")).to_have_count(len(merging))
    chosen = [page.locator(f"#compare-map [data-grid={letter}] .c.chosen") for letter in "ab"]
    place = "#compare-map [data-grid={}] [aria-label^='Layer {}, {},']"
    page.locator(place.format("a", 9, "up")).click()
    expect(chosen[1]).to_have_accessible_name(re.compile("^Layer 1, up,"))
    page.locator(place.format("b", 3, "q")).click()
    expect(chosen[0]).to_have_accessible_name(re.compile("^Layer 27, q,"))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(chosen[1]).to_have_accessible_name(re.compile("^Layer 3, k,"))
    expect(chosen[0]).to_have_accessible_name(re.compile("^Layer 27, k,"))
    expect(page.locator("#compare-map .lm-read")).to_contain_text("Layer 27, k")
    expect(page.locator("#compare-map .lm-read")).to_contain_text("B (layer 3)")
    tops = page.locator("#compare-map [data-grid] .lm-bars-top").all_inner_texts()
    assert len(set(tops)) == 1  # one axis for the bars of both
    assert traffic.complaints == []


def test_two_maps_on_a_phone_scroll_as_one(new_page: Callable[..., Page], served: str):
    page = new_page(390, 844)
    open_compare(page, served)
    page.get_by_role("button", name="Side by side").click()
    maps = [page.locator(f"#compare-map [data-grid={letter}]") for letter in "ab"]
    for moved, other in (maps, maps[::-1]):
        before = other.evaluate("node => node.scrollTop")
        moved.evaluate("node => { node.scrollTop = node.scrollTop ? 0 : node.scrollHeight; }")
        goal = moved.evaluate("node => node.scrollTop")
        assert goal != before
        page.wait_for_function(
            "([node, top]) => node.scrollTop === top", arg=[other.element_handle(), goal]
        )
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_differences_are_centred_at_zero_with_both_ends_printed(chromium_page: Page, served: str):
    page = chromium_page
    open_compare(page, served)
    page.locator("#compare-map [data-preset=b]").select_option(label="IP-Merging, public code")
    page.get_by_role("button", name="Similarity B − A").click()
    gaps = [r["similarity"]["max"] - r["similarity"]["first"] for r in PACKS["a"]["records"]]
    ends = [page.locator(f"#compare-map [data-out={end}]") for end in ("low", "high")]
    expect(ends[0]).to_have_text(f"−{max(gaps):.2f}")
    expect(ends[1]).to_have_text(f"+{max(gaps):.2f}")
    equal = min(range(len(gaps)), key=gaps.__getitem__)
    names = [f"Layer {r['layer']}, {r['module']}," for r in PACKS["a"]["records"]]
    colour = "node => node.style.getPropertyValue('--d')"
    cell = page.locator(f"#compare-map .cm-one [aria-label^='{names[equal]}']")
    assert cell.evaluate(colour) == "rgb(255,255,255)"  # no difference is white


def test_a_kept_plan_can_be_compared(chromium_page: Page, served: str):
    page = chromium_page
    open_compare(page, served)
    page.get_by_role("tab", name="Explore").click()
    set_value(page, "S alpha as a number", 0.55)
    page.get_by_role("button", name="Keep plan").click()
    set_value(page, "S alpha as a number", 0.3)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-map [data-preset=b]").select_option(label="Kept 1 · Sα 0.550, λ 1")
    expect(page.get_by_label("S alpha of B")).to_have_value("0.550")
    sets = [set(python_preview(PACKS["a"], {**A, "s": s}).selected) for s in (0.3, 0.55)]
    expect(page.locator("#compare-map .sum")).to_contain_text(summary(*sets))


def test_equal_plans_differ_in_nothing(chromium_page: Page, served: str):
    page = chromium_page
    open_compare(page, served)
    page.locator("#compare-map [data-preset=b]").select_option(index=0)
    expect(page.locator("#compare-map .sum")).to_contain_text("Jaccard 1.00")
    expect(page.get_by_role("button", name="First difference")).to_be_disabled()


def test_b_keeps_its_plan_while_a_follows_explore(chromium_page: Page, served: str):
    page = chromium_page
    open_compare(page, served)
    set_value(page, "S alpha of B", 0.123)
    page.get_by_role("tab", name="Explore").click()
    set_value(page, "S alpha as a number", 0.25)
    page.get_by_role("tab", name="Compare").click()
    expect(page.get_by_label("S alpha of A")).to_have_value("0.250")
    expect(page.get_by_label("S alpha of B")).to_have_value("0.123")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_comparison_without_scrolling_sideways(
    new_page: Callable[..., Page], served: str, dark: bool
):
    page = new_page(390, 844, color_scheme="dark" if dark else "light")
    open_compare(page, served)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    expect(page.locator("#compare-map .lm")).to_have_attribute("data-narrow", "true")
