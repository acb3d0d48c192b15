"""What leaves the Explore tab: links, files and the report; and what hostile links cannot do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from explore_page import (
    COMPONENT,
    PACKS,
    Traffic,
    csv_rows,
    expect_summary,
    open_map,
    plan_on_page,
    python_preview,
    received,
    text_of,
)
from playwright.sync_api import Download, Page, expect

from ipmerge_core.analysis.analyse import Analysis
from ipmerge_core.planning.plan import make_plan

pytestmark = pytest.mark.browser

DEFAULT = {
    "s": 0.4,
    "lambda": 1,
    "similarity": "first",
    "variant": "sum",
    "overrides": {},
    "budget": 0,
}
NOTICE = "#layer-map .lm-notice"


def save(page: Page, kind: str) -> Download:
    """Press one of the "Save as" buttons."""
    with page.expect_download() as download:
        page.locator(f"#layer-map [data-act={kind}]").click()
    return download.value


def test_a_copied_link_opens_the_same_plan_and_cell_elsewhere(
    new_page: Callable[..., Page], explore_url: str
):
    page = new_page(permissions=["clipboard-read", "clipboard-write"])
    open_map(page, explore_url)
    page.get_by_role("button", name="All of layer 3").click()
    page.locator(".lm-detail").get_by_role("button", name="Keep").click()
    number = page.get_by_label("lambda as a number")
    number.fill("0.3")
    number.press("Enter")
    page.get_by_role("button", name=re.compile("^Layer 5, up,")).click()
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#layer-map .lm-note-line")).to_have_text("Link copied.")
    link = page.evaluate("navigator.clipboard.readText()")
    assert len(link) <= 300
    plan = plan_on_page(page)
    assert len(plan["overrides"]) == 7
    other = new_page()
    open_map(other, explore_url, link.split("?")[1])
    assert plan_on_page(other) == plan
    received(other, **{"lambda": 0.3, "overrides": plan["overrides"]})
    expect(other.locator(".lm-detail-head h2")).to_have_text("Layer 5 · up")


def test_a_link_to_another_pair_opens_that_pair(chromium_page: Page, explore_url: str):
    open_map(chromium_page, explore_url, "v=1&pack=packs-b&s=0.25&l=2")
    expect(chromium_page.locator("#layer-map [role=gridcell]")).to_have_count(28)
    received(chromium_page, s=0.25)
    expect(chromium_page.get_by_role("combobox", name="Pair")).to_have_value(
        "own: synthetic 4 layers"
    )
    expect_summary(chromium_page, PACKS["b"])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("v=1&pack=packs-a&o=<script>alert(1)</script>", "o is damaged"),
        ("v=1&pack=packs-a&c=<img src=x onerror=alert(1)>&s=abc", "s must be a number"),
        ("v=<b>1</b>", "version <b>1</b>"),
    ],
)
def test_hostile_values_in_a_link_give_the_default_and_a_sentence(
    chromium_page: Page, explore_url: str, query: str, message: str
):
    traffic = open_map(chromium_page, explore_url, query)
    expect(chromium_page.locator(NOTICE)).to_contain_text(message)
    expect(chromium_page.locator(NOTICE)).to_be_in_viewport()
    assert plan_on_page(chromium_page) == DEFAULT
    assert chromium_page.locator("#layer-map script, #layer-map img, .lm-notice b").count() == 0
    assert traffic.complaints == []


@pytest.mark.parametrize("pack", ["../../etc/passwd", "%00", "nobody"])
def test_a_link_to_an_unknown_pair_shows_the_first_one_and_says_so(
    chromium_page: Page, explore_url: str, pack: str
):
    open_map(chromium_page, explore_url, f"v=1&pack={pack}&s=0.1")
    expect(chromium_page.get_by_text("Unknown pair")).to_be_visible()
    assert plan_on_page(chromium_page) == DEFAULT
    expect_summary(chromium_page, PACKS["a"])


def test_the_csv_holds_every_matrix_and_the_json_rebuilds_the_plan(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url, "v=1&pack=packs-c&s=0.3&l=2&u=max")
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(42)
    expected = python_preview(PACKS["c"], plan_on_page(page))
    rows = csv_rows(save(page, "csv"))
    assert [(row["name"], int(row["expert"])) for row in rows] == [
        (record["name"], record["expert"]) for record in PACKS["c"]["records"]
    ]
    assert {row["name"] for row in rows if row["merges"] == "true"} == set(expected.selected)
    similarities = [record["similarity"]["first"] for record in PACKS["c"]["records"]]
    assert [float(row["similarity"]) for row in rows] == similarities
    saved = json.loads(text_of(save(page, "json")))
    plan = make_plan(Analysis.from_dict(PACKS["c"]), **saved["arguments"])
    assert plan.preview() == expected
    assert saved["preview"]["relative_change"] == pytest.approx(expected.relative_change)


def test_the_picture_is_valid_svg_with_the_plan_in_its_caption_and_a_sharp_png(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url, "v=1&pack=packs-b&s=0.3&l=1")
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(28)
    picture = ElementTree.fromstring(text_of(save(page, "svg")))
    words = " ".join(node.text or "" for node in picture.iter("{http://www.w3.org/2000/svg}text"))
    assert "Sα 0.300" in words
    assert "of 28 matrices merge" in words
    assert "synthetic 4 layers" in words
    png = Path(save(page, "png").path()).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20]) == 2 * int(picture.get("width"))


def test_the_report_works_from_a_file_without_any_server(
    new_page: Callable[..., Page], explore_url: str, tmp_path: Path
):
    page = new_page()
    open_map(page, explore_url, "v=1&pack=packs-b&s=0.2&l=2&c=3.up")
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(28)
    summary = page.locator("#layer-map .sum").inner_text()
    report = tmp_path / "report.html"
    save(page, "html").save_as(report)
    alone = new_page(offline=True)
    traffic = Traffic(alone)
    alone.goto(report.as_uri())
    expect(alone.locator(".sum")).to_have_text(summary)
    expect(alone.locator(".lm-detail-head h2")).to_have_text("Layer 3 · up")
    facts = alone.locator("header .facts")
    for source in ("mllm", "base", "math"):
        expect(facts).to_contain_text(source)
    expect(facts).to_contain_text(re.compile(r"Saved \d{4}-\d\d-\d\d"))
    alone.get_by_role("button", name=re.compile("^Layer 2, k,")).click()
    expect(alone.locator(".lm-detail-head h2")).to_have_text("Layer 2 · k")
    expect(alone.locator(".lm-spectra svg").first).to_be_visible()
    alone.get_by_role("slider", name=re.compile("similarity threshold")).press("Home")
    expect(alone.locator(".sum")).to_contain_text("28 of 28")
    assert {url.split(":")[0] for _, url, _ in traffic.requests} == {"file"}
    assert traffic.complaints == []


def test_names_from_a_pack_never_become_markup(new_page: Callable[..., Page], tmp_path: Path):
    from ipmerge_core.ui.explore.layer_map import report
    from ipmerge_core.ui.plan_choice import PlanChoice

    pack = json.loads(json.dumps(PACKS["b"]))
    pack["name"] = "</script><img src=x onerror=alert(1)>"
    for record in pack["records"]:
        record["module"] = record["module"].replace("up", "<img src=x onerror=alert(2)>")
    path = tmp_path / "hostile.html"
    content = {"id": "x", "pack": pack, "plan": PlanChoice().to_browser(), "presets": []}
    path.write_text(report(content), encoding="utf-8")
    page = new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    page.get_by_role("button", name=re.compile("^Layer 1, <img")).click()
    expect(page.locator(".lm-detail-head h2")).to_contain_text("<img src=x")
    assert page.locator("img").count() == 0
    assert dialogs == []


def test_a_whole_module_can_be_set_by_hand_and_undone_and_reset(
    chromium_page: Page, explore_url: str
):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_role("button", name="All down matrices").click()
    page.locator(".lm-detail").get_by_role("button", name="Merge", exact=True).click()
    assert set(plan_on_page(page)["overrides"].values()) == {"merge"}
    expect(page.get_by_role("button", name=re.compile("^Layer 9, down,"))).to_have_accessible_name(
        re.compile("always merged")
    )
    page.get_by_role("button", name="Undo").click()
    assert plan_on_page(page) == DEFAULT
    page.get_by_role("button", name="Redo").click()
    assert len(plan_on_page(page)["overrides"]) == 28
    page.get_by_role("button", name="Reset").click()
    assert plan_on_page(page) == DEFAULT
    received(page, overrides={})


def test_why_is_answered_from_the_live_values(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    record = next(r for r in PACKS["a"]["records"] if (r["layer"], r["module"]) == (27, "down"))
    page.get_by_role("button", name=re.compile("^Layer 27, down,")).click()
    page.get_by_role("button", name="Why?").click()
    similarities = sorted((r["similarity"]["first"] for r in PACKS["a"]["records"]), reverse=True)
    value = record["similarity"]["first"]
    place = 1 + similarities.index(value)
    why = page.locator(".lm-why")
    expect(why).to_contain_text(f"is kept because {value:.3f} < Sα 0.400. Rank {place} of 196")
    number = page.get_by_label("S alpha as a number")
    number.fill("0")
    number.press("Enter")
    expect(why).to_contain_text(f"is merged because {value:.3f} ≥ Sα 0.000")


def test_the_table_tells_what_the_map_shows(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_text("Table of all matrices").click()
    table = page.locator(".lm-table")
    expect(table.locator("tbody tr")).to_have_count(196)
    table.get_by_role("button", name="similarity").click()
    highest = max(record["similarity"]["first"] for record in PACKS["a"]["records"])
    expect(table.locator("tbody tr").first).to_contain_text(f"{highest:.3f}")
    merging = len(python_preview(PACKS["a"], DEFAULT).selected)
    expect(table.locator("tbody td", has_text=re.compile("^merges$"))).to_have_count(merging)


def test_the_component_forgets_nothing_it_was_told(chromium_page: Page, explore_url: str):
    page = chromium_page
    open_map(page, explore_url)
    page.get_by_role("combobox", name="Similarity").select_option("max")
    received(page, similarity="max")
    page.reload()
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    assert page.evaluate(f"{COMPONENT}.plan.similarity") == "max"
    expect_summary(page, PACKS["a"])
