"""What merges can be told without colour, in forced colours, at rest, and from the last row."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from statistics import fmean, pstdev

import pytest
from explore_page import open_map, plan_on_page, received
from PIL import Image
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]
KINDS = ["none", "protanopia", "deuteranopia", "tritanopia", "achromatopsia"]


def grey(cell: Locator) -> Image.Image:
    """A cell as somebody sees who sees no colour at all."""
    return Image.open(io.BytesIO(cell.screenshot())).convert("L")


def framed(picture: Image.Image) -> bool:
    """Whether a dark or light frame runs round the cell: its rim is even and unlike its middle."""
    width, height = picture.size
    middle = height // 2
    rim = [picture.getpixel((x, middle)) for x in (1, width - 2)]
    inside = fmean(picture.getpixel((width // 2 + x, middle - 6)) for x in range(-4, 5))
    return min(abs(value - inside) for value in rim) > 40


def hatched(picture: Image.Image) -> bool:
    """Whether stripes cross the cell: brightness goes up and down along a line inside it."""
    width, height = picture.size
    line = [picture.getpixel((x, height - 7)) for x in range(6, width - 6)]
    return pstdev(line) > 8


def alike_cells(page: Page) -> tuple[Locator, Locator]:
    """A cell that merges and one of nearly the same similarity, so of one colour, that is kept."""
    page.get_by_label("S alpha as a number").fill("0.4")
    merges = page.locator("#layer-map .c[data-on='1']").first
    kept = page.locator("#layer-map .c[data-on='0']").first
    for cell in (merges, kept):
        cell.evaluate("node => node.style.setProperty('--c', 'rgb(138, 134, 120)')")
    return merges, kept


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_merging_and_kept_cells_of_one_colour_differ_by_frame_and_hatch_for_every_eye(
    chromium_page: Page, explore_url: str, theme: str
):
    page = chromium_page
    open_map(page, explore_url, f"__theme={theme}")
    merges, kept = alike_cells(page)
    session = page.context.new_cdp_session(page)
    for kind in KINDS:
        session.send("Emulation.setEmulatedVisionDeficiency", {"type": kind})
        assert framed(grey(merges)), kind
        assert hatched(grey(kept)), kind
        assert not framed(grey(kept)), kind
        assert not hatched(grey(merges)), kind


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_forced_colours_keep_the_frames_the_hatch_and_what_is_chosen(
    new_page: NewPage, explore_url: str, scheme: str
):
    page = new_page(forced_colors="active", color_scheme=scheme)
    open_map(page, explore_url)
    merges, kept = alike_cells(page)
    outline = "node => { const { outlineStyle, outlineWidth } = getComputedStyle(node); return [outlineStyle, outlineWidth]; }"  # noqa: E501
    assert merges.evaluate(outline) == ["solid", "2px"]
    assert kept.evaluate(outline)[0] == "none"
    assert framed(grey(merges))
    assert hatched(grey(kept))
    kept.click()
    assert kept.evaluate(outline) == ["solid", "4px"]
    background = "node => getComputedStyle(node).backgroundColor"
    automatic = page.locator(".lm-detail").get_by_role("button", name="Auto")
    forced = page.locator(".lm-detail").get_by_role("button", name="Merge", exact=True)
    assert automatic.evaluate(background) != forced.evaluate(background)


def test_the_four_states_of_a_comparison_differ_without_colour(chromium_page: Page, app_url: str):
    page = chromium_page
    open_map(page, app_url)
    page.get_by_role("tab", name="Compare").click()
    cells = page.locator("#compare-map .c")
    expect(cells.first).to_be_visible()
    page.locator("#compare-map .lm-legend .lm-swatch").first.scroll_into_view_if_needed()
    halves = {}
    for state in ("both", "a", "b", "none"):
        picture = grey(page.locator(f"#compare-map .cm-one .cm-{state}"))
        width, height = picture.size
        left, right = (
            fmean(picture.getpixel((x, y)) for x in columns for y in range(4, height - 4))
            for columns in (range(4, width // 2 - 2), range(width // 2 + 2, width - 4))
        )
        halves[state] = left < 190, right < 190
    assert halves == {
        "both": (True, True),
        "a": (True, False),
        "b": (False, True),
        "none": (False, False),
    }


def test_nothing_moves_by_itself_for_those_who_asked_for_rest(new_page: NewPage, explore_url: str):
    running = (
        "() => document.getAnimations().filter(({ playState }) => playState === 'running').length"
    )
    for motion in ("reduce", "no-preference"):
        page = new_page(newcomer=True, reduced_motion=motion)
        open_map(page, explore_url)
        hint = page.locator("#layer-map .lm-drag-me")
        name = hint.evaluate("node => getComputedStyle(node).animationName")
        assert name == ("none" if motion == "reduce" else "lm-nudge")
        page.get_by_role("button", name="Tour", exact=True).click()
        if motion == "reduce":
            assert page.evaluate(running) == 0


def test_on_a_stage_every_word_can_be_read_from_the_last_row_and_number_keys_jump(
    new_page: NewPage, app_url: str
):
    page = new_page(1024, 768)
    open_map(page, app_url, "present=1")
    expect(page.locator("footer")).to_be_hidden()
    page.get_by_role("button", name=re.compile("^Layer 3, v,")).click()
    small = page.evaluate(
        """() => [...document.querySelectorAll('#layer-map .lm *, #tabs [role=tab]')].filter((node) =>
          node.checkVisibility({ visibilityProperty: true }) && node.matches(':not(sub, .lm-status, option)')
          && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())
          && parseFloat(getComputedStyle(node).fontSize) < 18).map((node) => node.outerHTML.slice(0, 90))"""  # noqa: E501
    )
    assert small == []
    assert page.evaluate("document.documentElement.scrollWidth") == 1024
    expect(page.get_by_role("tab", name="Try it")).to_be_visible()
    expect(page.get_by_role("tab", name="Merge")).to_be_hidden()
    page.get_by_role("slider", name=re.compile("similarity threshold")).focus()
    page.keyboard.press("5")
    assert plan_on_page(page)["variant"] == "select_only"


def test_without_a_stage_number_keys_wait_for_a_kept_plan(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    slider = page.get_by_role("slider", name=re.compile("similarity threshold"))
    slider.press("5")
    slider.press("ArrowRight")
    received(page, s=0.401)
    assert plan_on_page(page)["variant"] == "sum"
