"""No accessibility finding by axe in what is ours, in any state; elsewhere only the known ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
from axe_playwright_python.sync_playwright import Axe
from explore_page import open_map
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
# A theme changes colours only, so that every other rule is tested in one of them.
CONTRAST = ["color-contrast"]
LOOKS = pytest.mark.parametrize(
    ("width", "theme", "rules"),
    [
        pytest.param(width, theme, rules, id=f"{width}-{theme}")
        for width in (1280, 390)
        for theme, rules in (("light", RULES), ("dark", CONTRAST))
    ],
)
# Gradio's own, by rule and place, with what is wrong there. What is not on this list fails.
KNOWN = {
    ("image-redundant-alt", "footer"): "the footer's icons repeat the words beside them",
    ("aria-required-parent", "#prompt .thumbnail-wrapper"): "a list item without its list",
    ("button-name", "#chat-a .image-container"): "the button around a picture has no name",
    ("button-name", "#chat-b .image-container"): "the same",
    ("target-size", "#chat-a .icon-button-wrapper"): "icon buttons of 20 px",
    ("target-size", "#chat-b .icon-button-wrapper"): "the same",
}


def findings(
    page: Page, place: str | None = None, *, rules: Sequence[str] = RULES
) -> set[tuple[str, str]]:
    """Rule and selector of every violation on the page or in one place of it.

    Of a long table the first rows are examined: the others look like them, and there are hundreds.
    """
    options = {"runOnly": list(rules), "resultTypes": ["violations"]}
    context = {"include": [[place or "html"]], "exclude": [["tbody tr:nth-child(n+9)"]]}
    found = Axe().run(page, context=context, options=options).response["violations"]
    return {
        (violation["id"], " ".join(node["target"]))
        for violation in found
        for node in violation["nodes"]
    }


def known(page: Page, rule: str, selector: str) -> bool:
    """Whether a finding is on the list: the rule, somewhere inside the place."""
    inside = "([node, place]) => Boolean(document.querySelector(node)?.closest(place))"
    return any(rule == name and page.evaluate(inside, [selector, place]) for name, place in KNOWN)


def open_tab(page: Page, name: str) -> None:
    if page.get_by_role("tab", name=name, exact=True).count():
        page.get_by_role("tab", name=name, exact=True).click()
    else:  # the last tabs are in the menu of a narrow page
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()


@LOOKS
def test_the_layer_map_has_no_finding_in_any_state(
    new_page: NewPage, app_url: str, width: int, theme: str, rules: Sequence[str]
):
    page = new_page(width=width, newcomer=True, reduced_motion="reduce")
    open_map(page, app_url, f"__theme={theme}")
    toggle = "nodes => nodes.forEach((node) => node.click())"
    tables = page.locator("#layer-map details > summary")
    states = {
        "first visit": lambda: expect(page.locator(".lm-tour")).to_contain_text("New here?"),
        "tour": page.get_by_role("button", name="Start the tour").click,
        "simple, a cell chosen": lambda: (
            page.keyboard.press("Escape"),
            cell(page, "Layer 3, k,").click(),
        ),
        "full, with all tables": lambda: (
            page.get_by_role("button", name="All numbers and spectra").click(),
            tables.evaluate_all(toggle),
        ),
        "pinned, by hand, kept, and why": lambda: (
            tables.evaluate_all(toggle),
            cell(page, "Layer 1, up,").click(modifiers=["Shift"]),
            page.get_by_role("button", name="Why?").click(),
            cell(page, "Layer 3, k,").press("f"),
            page.get_by_role("button", name="Keep plan").click(),
        ),
        "a layer, nothing merges": lambda: (
            page.get_by_role("button", name="All of layer 2").click(),
            page.get_by_role("slider", name=re.compile("threshold")).press("End"),
        ),
    }
    for state, reach in states.items():
        reach()
        assert findings(page, "#layer-map", rules=rules) == set(), state


def cell(page: Page, name: str):
    return page.get_by_role("button", name=re.compile(f"^{name}"))


@LOOKS
def test_the_comparison_has_no_finding_in_any_state(
    new_page: NewPage, app_url: str, width: int, theme: str, rules: Sequence[str]
):
    page = new_page(width=width)
    open_map(page, app_url, f"__theme={theme}")
    open_tab(page, "Compare")
    expect(page.locator("#compare-map .c").first).to_be_visible()
    for mode in ("Which merge", "Similarity B − A", "Change B − A", "Side by side"):
        page.get_by_role("button", name=mode).click()
        page.get_by_role("button", name="First difference").click()
        assert findings(page, "#compare-map", rules=rules) == set(), mode
    for summary in page.locator("#compare-map summary").all():
        summary.click()
    assert findings(page, "#compare-map", rules=rules) == set(), "tables open"


@LOOKS
def test_the_whole_page_has_no_finding_beyond_the_known_ones(
    new_page: NewPage, app_url: str, width: int, theme: str, rules: Sequence[str]
):
    page = new_page(width=width)
    open_map(page, app_url, f"__theme={theme}")
    contents = {
        "Explore": "#layer-map .c",
        "Try it": "#prompt textarea",
        "Merge": "#start-merge",
        "Compare": "#compare-map .c",
        "API & cite": "#tab-cite .cm-content",
    }
    for tab, content in contents.items():
        open_tab(page, tab)
        expect(page.locator(content).first).to_be_visible()
        found = findings(page, rules=rules)
        unknown = {(rule, place) for rule, place in found if not known(page, rule, place)}
        assert unknown == set(), tab
