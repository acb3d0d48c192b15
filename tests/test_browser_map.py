"""The layer map under a hand: nothing jumps, ranges and kept plans work, all can be undone."""

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
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser

NewPage = Callable[..., Page]
RECORDS = PACKS["a"]["records"]
THRESHOLD = re.compile("similarity threshold")
DEFAULT = {
    "s": 0.4,
    "lambda": 1,
    "similarity": "first",
    "variant": "sum",
    "overrides": {},
    "budget": 0,
}


def selected(**changes: object) -> set[str]:
    """What Python merges of pack a under the default plan with these changes."""
    return set(python_preview(PACKS["a"], {**DEFAULT, **changes}).selected)


def layer_head(page: Page, layer: int) -> Locator:
    return page.get_by_role("button", name=f"All of layer {layer}", exact=True)


def set_threshold(page: Page, value: float) -> None:
    number = page.get_by_label("S alpha as a number")
    number.fill(str(value))
    number.press("Enter")
    received(page, s=value)


@pytest.mark.parametrize("width", [1280, 800, 390])
@pytest.mark.parametrize("layout", ["Simple", "Full"])
def test_nothing_moves_under_the_finger_while_the_threshold_is_dragged(
    new_page: NewPage, explore_url: str, width: int, layout: str
):
    page = new_page(width=width)
    open_map(page, explore_url)
    page.get_by_role("button", name=layout, exact=True).click()
    tops = page.evaluate(
        """async () => {
          const slider = document.querySelector('[data-range=s]'), tops = [];
          const grid = document.querySelector('.lm-grid-holder'), frame = () => new Promise(requestAnimationFrame);
          for (let s = 0; s <= 1; s += 0.05) {
            slider.value = s;
            slider.dispatchEvent(new Event('input', { bubbles: true }));
            await frame(); await frame();
            tops.push(grid.getBoundingClientRect().top);
          }
          return tops;
        }"""  # noqa: E501
    )
    assert len(set(tops)) == 1


def test_axes_stay_fixed_in_a_drag_and_follow_when_it_ends(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    axes = f"(({{ barTop, curveLow, domain }}) => [barTop, curveLow, ...domain])({COMPONENT})"
    before = page.evaluate(axes)
    slider = page.get_by_role("slider", name="scale of the update")
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + box["height"] / 2, steps=5)
    expect(page.locator("#layer-map .lm")).to_have_attribute("data-dragging", "1")
    assert page.evaluate(axes) == before
    page.mouse.up()
    assert page.evaluate(axes)[0] > before[0]


def test_a_range_of_layers_is_brushed_counted_set_by_hand_and_cleared(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    layer_head(page, 8).hover()
    page.mouse.down()
    layer_head(page, 13).hover()
    layer_head(page, 16).hover()
    page.mouse.up()
    detail, sense = page.locator("#layer-map .lm-detail"), page.locator("#layer-map .lm-sense")
    expect(detail.locator("h2")).to_have_text("Layers 8 to 16")
    inside = {r["name"] for r in RECORDS if 8 <= r["layer"] <= 16}
    number = len(inside & selected())
    expect(sense).to_contain_text(f"In range, layers 8 to 16: {number} of 63 merge.")
    expect(page.locator("#layer-map .lm-hist")).to_contain_text(
        "similarity of 63 matrices in range"
    )
    detail.get_by_role("button", name="Keep", exact=True).click()
    assert set(plan_on_page(page)["overrides"]) == inside
    expect(sense).to_contain_text("In range, layers 8 to 16: 0 of 63 merge.")
    layer_head(page, 16).press("Escape")
    expect(sense).not_to_contain_text("In range")
    expect(page.locator("#layer-map .lm-hist")).to_contain_text("similarity of 196 matrices")


def test_a_range_is_chosen_from_the_keyboard_too(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    heading = page.locator("#layer-map .lm-detail h2")
    layer_head(page, 3).click()
    for _ in range(2):
        page.keyboard.press("Shift+ArrowRight")
    expect(heading).to_have_text("Layers 3 to 5")
    page.keyboard.press("f")
    assert len(plan_on_page(page)["overrides"]) == 21
    layer_head(page, 1).click(modifiers=["Shift"])
    expect(heading).to_have_text("Layers 1 to 3")


def test_what_joined_and_left_is_told_and_marked_when_the_measure_changes(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_role("combobox", name="Similarity").select_option("weighted")
    before, after = selected(), selected(similarity="weighted")
    assert before - after
    expect(page.locator("#layer-map .lm-drift")).to_have_text(
        f"+{len(after - before)} −{len(before - after)}"
    )
    left = page.locator("#layer-map .c[data-was='1'][data-on='0']")
    expect(left).to_have_count(len(before - after))
    mark = "node => getComputedStyle(node, '::before').content"
    assert left.first.evaluate(mark) == '""'  # drawn; "none" would be no mark
    stayed = page.locator("#layer-map .c[data-was='0'][data-on='0']").first
    assert stayed.evaluate(mark) == "none"


def test_undo_brings_back_the_pair_before_with_its_plan(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    set_threshold(page, 0.25)
    page.get_by_role("combobox", name="Pair").click()
    page.get_by_role("option", name="4 layers").click()
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(28)
    set_threshold(page, 0.5)
    undo, redo = (page.get_by_role("button", name=name) for name in ("Undo", "Redo"))
    undo.click()
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(28)
    undo.click()
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(196)
    assert plan_on_page(page)["s"] == 0.25
    received(page, s=0.25)
    expect(page.get_by_role("combobox", name="Pair")).to_have_value("own: synthetic 28 layers")
    undo.click()
    assert plan_on_page(page) == DEFAULT
    for _ in range(2):
        redo.click()
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(28)
    redo.click()
    received(page, s=0.5)
    expect_summary(page, PACKS["b"])


def test_kept_plans_stand_on_the_number_keys_survive_a_reload_and_can_be_forgotten(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    for value in (0.3, 0.6):
        set_threshold(page, value)
        page.get_by_role("button", name="Keep plan").click()
    page.reload()
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    preset = page.get_by_role("combobox", name="Preset")
    expect(preset.locator("option:checked")).to_have_text("2 · Sα 0.600, λ 1")
    slider = page.get_by_role("slider", name=THRESHOLD)
    slider.press("1")
    received(page, s=0.3)
    page.get_by_role("button", name="Forget plan").click()
    expect(preset.locator("optgroup option")).to_have_text(["1 · Sα 0.600, λ 1"])
    slider.press("1")
    received(page, s=0.6)


def test_damaged_memory_of_the_browser_is_survived(chromium_page: Page, explore_url: str):
    page = chromium_page
    damaged = '{"layout": 7, "kept": {"packs-a": [{"s": "<b>", "overrides": {"x": 1}}, null, 3]}}'
    page.add_init_script(f"localStorage.setItem('ipmerge.map.v1', {damaged!r})")
    traffic = open_map(page, explore_url)
    expect_summary(page, PACKS["a"])
    expect(page.get_by_role("combobox", name="Preset").locator("optgroup option")).to_have_count(3)
    assert page.locator("#layer-map select b").count() == 0
    assert traffic.complaints == []


def test_a_double_click_on_a_handle_takes_the_presets_value(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    set_threshold(page, 0.7)
    page.locator("#layer-map .lm-hist").dblclick()
    received(page, s=0.4)
    gain = page.get_by_role("slider", name="scale of the update")
    gain.press("End")
    received(page, **{"lambda": 32})
    gain.dblclick()
    received(page, **{"lambda": 1})


def test_a_finger_drags_the_histogram_and_a_cancelled_touch_keeps_what_is_seen(
    new_page: NewPage, explore_url: str
):
    page = new_page(390, 844, has_touch=True, is_mobile=True)
    traffic = open_map(page, explore_url)
    box = page.locator("#layer-map .lm-hist").bounding_box()
    session = page.context.new_cdp_session(page)

    def touch(kind: str, share: float | None = None) -> None:
        points = (
            [] if share is None else [{"x": box["x"] + share * box["width"], "y": box["y"] + 30}]
        )
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    for end in ("touchEnd", "touchCancel"):
        touch("touchStart", 0.6)
        for share in (0.5, 0.4, 0.3):
            touch("touchMove", share)
        touch(end)
        expect(page.locator("#layer-map .lm")).not_to_have_attribute("data-dragging", "1")
        seen = plan_on_page(page)["s"]
        assert seen == pytest.approx(0.29, abs=0.03)
        received(page, s=seen)
        expect_summary(page, PACKS["a"])
        set_threshold(page, 0.8)
    assert len(traffic.commits()) == 4


def test_flips_of_several_experts_say_whose_they_are(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url, "v=1&pack=packs-c&s=0.5&l=1")
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(42)
    below = [r for r in PACKS["c"]["records"] if r["similarity"]["first"] < 0.5]
    joins = max(below, key=lambda r: r["similarity"]["first"])
    page.get_by_role("slider", name=THRESHOLD).press("[")
    expect(page.locator("#layer-map [role=status]")).to_contain_text(
        f"Layer {joins['layer']}, {joins['module']} of math-{joins['expert']} joins."
    )
    page.get_by_role(
        "button", name=re.compile(f"^Layer {joins['layer']}, {joins['module']},")
    ).click()
    merging = page.locator("#layer-map .lm-detail tr", has_text=f"math-{joins['expert']}")
    expect(merging).to_contain_text("merges")
    expect_summary(page, PACKS["c"])


def test_every_figure_says_its_numbers_in_a_sentence_a_table_and_a_file(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_role("button", name=re.compile("^Layer 12, k,")).click()
    record = next(r for r in RECORDS if (r["layer"], r["module"]) == (12, "k"))
    figures = page.locator("#layer-map .lm-figure")
    expect(figures).to_have_count(5)  # the last two are heat maps
    words = [figures.nth(i).locator("svg").get_attribute("aria-label") for i in range(3)]
    assert f"{record['mllm_sigma'][0]:.4g}"[:5] in words[0]
    assert f"best {record['similarity']['max']:.3f} at rank {record['best_index']}" in words[1]
    assert "in 28 layers" in words[2]
    tables = [*(figures.nth(i) for i in range(3)), *page.locator(".lm-twins > details").all()]
    lengths = [
        len(record["index"]),
        len(record["index"]) + 4,
        28 * len(record["index"]),
        196,
        28,
        10,
    ]
    for place, length in zip(tables, lengths, strict=True):
        place.locator("summary").click()
        with page.expect_download() as download:
            place.locator("[data-act=twin-csv]").click()
        rows = csv_rows(download.value)
        expect(place.locator("tbody tr")).to_have_count(len(rows))
        place.locator("summary").click()
        if length is not None:
            assert len(rows) == length
    for plot in (".lm-hist", ".lm-curve"):
        assert len(page.locator(plot).get_attribute("aria-label")) > 40


def test_singular_values_are_shown_on_a_linear_scale_when_asked(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_role("button", name=re.compile("^Layer 12, k,")).click()
    chart = page.locator("#layer-map .lm-figure").first
    expect(chart.locator("svg")).to_contain_text("1e-2")
    page.get_by_role("button", name="linear", exact=True).click()
    expect(page.get_by_role("button", name="linear", exact=True)).to_be_focused()
    expect(chart.locator("svg")).not_to_contain_text("1e-2")
    page.get_by_role("button", name=re.compile("^Layer 13, k,")).click()
    expect(page.get_by_role("button", name="linear", exact=True)).to_have_attribute(
        "aria-pressed", "true"
    )


def test_show_me_moves_the_threshold_over_the_flip_and_back(new_page: NewPage, explore_url: str):
    page = new_page(reduced_motion="reduce")
    traffic = open_map(page, explore_url)
    merging = next(r for r in RECORDS if r["similarity"]["first"] > 0.5)
    cell = page.get_by_role(
        "button", name=re.compile(f"^Layer {merging['layer']}, {merging['module']},")
    )
    cell.click()
    page.get_by_role("button", name="Why?").click()
    cell.evaluate(
        """cell => {
          window.flips = [];
          const note = () => window.flips.push(cell.dataset.on);
          new MutationObserver(note).observe(cell, { attributeFilter: ["data-on"] });
        }"""
    )
    page.get_by_role("button", name="Animate the threshold").click()
    page.wait_for_function("window.flips.includes('0') && window.flips.at(-1) === '1'")
    assert plan_on_page(page) == DEFAULT
    assert traffic.commits() == []


def test_two_visitors_at_once_do_not_see_each_others_plans(new_page: NewPage, explore_url: str):
    pages = [new_page(), new_page()]
    for page in pages:
        open_map(page, explore_url)
    for turn in range(3):
        for number, page in enumerate(pages):
            page.get_by_label("S alpha as a number").fill(str(0.1 * (turn + 1) + 0.05 * number))
            page.get_by_label("S alpha as a number").press("Enter")
    for number, page in enumerate(pages):
        received(page, s=0.1 * 3 + 0.05 * number)
        expect_summary(page, PACKS["a"])
        page.reload()
        page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
        assert plan_on_page(page)["s"] == 0.1 * 3 + 0.05 * number


def test_a_reload_inside_a_frame_brings_the_plan_back(new_page: NewPage, explore_url: str):
    page = new_page(permissions=["local-network-access"])
    host = f"{explore_url}/a-page-with-the-app-in-a-frame"
    page.route(
        host,
        lambda route: route.fulfill(
            content_type="text/html",
            body=f"<iframe src='{explore_url}' width=1200 height=900></iframe>",
        ),
    )
    page.goto(host)
    inside = page.frame_locator("iframe")
    number = inside.get_by_label("S alpha as a number")
    number.fill("0.275")
    number.press("Enter")
    expect(inside.locator("#received textarea")).to_have_value(re.compile('"s": 0.275'))
    page.reload()
    expect(inside.get_by_label("S alpha as a number")).to_have_value("0.275")


def test_the_map_fits_when_the_page_was_turned_while_another_tab_was_open(
    chromium_page: Page, app_url: str
):
    page = chromium_page
    traffic = open_map(page, app_url)
    assert page.locator("#compare-map").count() == 0  # not mounted before it is first opened
    page.get_by_role("tab", name="Try it").click()
    expect(page.locator("#prompt")).to_be_visible()
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator("#layer-map .lm-grid-holder")).to_have_attribute("data-turned", "true")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert traffic.complaints == []
