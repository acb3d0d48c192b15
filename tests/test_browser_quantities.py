"""What the map can show besides the similarity, and the heat maps of spectra, in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from synthetic_pack import make_pack

from ipmerge_core.analysis.records import Analysis, read_pack
from ipmerge_core.ui.explore.layer_map import report
from ipmerge_core.ui.explore.tab import content_of

PACK = make_pack(4, seed=3, hidden=64, feed=96, spectra=True)
OLDER = make_pack(4, seed=3, hidden=64, feed=96)
NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def opened(new_page: Callable[..., Page], tmp_path: Path) -> Callable[..., Page]:
    """Open the HTML report of a pack: the component without a server."""

    def made(pack: dict[str, object], query: str = "", **options: object) -> Page:
        file = tmp_path / "report.html"
        content = {**content_of("x", pack), "home": ""}
        file.write_text(report(json.loads(json.dumps(content))), encoding="utf-8")
        page = new_page(**options)
        page.goto(f"{file.as_uri()}?v=1&pack=x&c=1.q{query}")
        expect(page.locator(".lm-grid")).to_be_visible()
        return page

    return made


def record_of(pack: dict[str, object]) -> object:
    records = Analysis.from_dict(pack).records
    return next(record for record in records if record.name == NAME)


def test_every_quantity_can_be_chosen_and_is_named_in_legend_and_cells(opened):
    page = opened(PACK)
    select = page.get_by_label("Colour shows")
    options = select.locator("option").all_text_contents()
    assert len(options) == 14
    cell = page.get_by_role("button", name=re.compile("^Layer 1, q,"))
    for label in options[1:]:
        select.select_option(label=label)
        expect(page.locator("[data-out=quantity]")).to_contain_text(label)
        expect(cell).to_have_attribute("aria-label", re.compile(re.escape(label)))
    ratio = record_of(PACK).products.norm_ratio
    select.select_option(label="norm ratio, math / MLLM")
    expect(cell).to_have_attribute("aria-label", re.compile(f"norm ratio, math / MLLM {ratio:.2f}"))
    select.select_option(label="similarity")
    expect(cell).not_to_have_attribute("aria-label", re.compile("norm ratio"))


def test_the_keyboard_chooses_a_quantity(opened):
    page = opened(PACK)
    page.get_by_label("Colour shows").focus()
    page.keyboard.press("End")
    expect(page.locator("[data-out=quantity]")).to_contain_text("ranks for 90 % energy, math")


def test_a_link_opens_with_its_quantity_and_the_change_follows_lambda(opened):
    page = opened(PACK, "&q=change")
    expect(page.get_by_label("Colour shows")).to_have_value("change")
    low = page.locator("[data-out=low]")
    before = float(low.inner_text().split()[0])
    number = page.get_by_label("lambda as a number")
    number.fill("4")
    number.press("Enter")
    expect(low).not_to_have_text(f"{before:g} %")
    assert float(low.inner_text().split()[0]) == pytest.approx(4 * before, rel=0.06)


def test_heat_maps_read_out_single_values_by_keyboard(opened):
    page = opened(PACK)
    maps = page.locator(".lm-heat")
    expect(maps).to_have_count(4)
    spectra = record_of(PACK).spectra
    layers = maps.nth(1)  # of the MLLM's task vector
    layers.locator(".lm-heat-box").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    read = layers.locator(".lm-heat-read")
    expect(read).to_contain_text("Layer 1, rank 1")
    shown = float(read.inner_text().split("σ ")[1])
    assert shown == pytest.approx(spectra.mllm.values()[0], rel=1e-3)
    cosines = maps.nth(3)
    cosines.locator(".lm-heat-box").focus()
    first = spectra.overlap.matrix()[0][0]
    expect(cosines.locator(".lm-heat-read")).to_have_text(
        f"Direction 1 of the MLLM, 1 of the math model: cosine {first:.3f}"
    )


def test_figures_and_tables_say_how_many_values_they_hold(opened):
    page = opened(PACK)
    expect(page.locator(".lm-spectra")).to_contain_text("all 64 values")
    figure = page.locator(".lm-figure", has_text="base weights")
    figure.get_by_text("Numbers").click()
    expect(figure.locator("caption")).to_contain_text("256 rows")
    older = opened(OLDER)
    expect(older.locator(".lm-spectra")).to_contain_text(re.compile(r"\d+ samples of 64 values"))
    expect(older.locator(".lm-spectra")).to_contain_text("earlier version, which stored only")
    expect(older.locator(".lm-heat")).to_have_count(2)


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_them_without_scrolling_sideways(dark, opened):
    page = opened(
        PACK, "&q=cosine", width=390, height=844, color_scheme="dark" if dark else "light"
    )
    expect(page.locator(".lm-heat")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_truncation_is_dragged_with_its_rank_and_the_size_of_its_adapter(opened):
    pack, analysis = read_pack(Path(__file__).parents[1] / "assets" / "demo" / "pack.json.gz")
    page = opened(pack)
    page.locator("[data-pick=variant]").select_option(
        label="truncated: leading directions of the math change"
    )
    slider, words = page.locator("[data-energy]"), page.locator("[data-out=energy]")
    for share, place in ((90, 17), (50, 9), (95, 18)):
        slider.fill(str(share))
        counts = [record.kept_directions[place] for record in analysis.records]
        size = 4 * max(counts) * sum(sum(record.shape) for record in analysis.records)
        expect(words).to_contain_text(f"{share} % of the math change's energy")
        expect(words).to_contain_text(f"{min(counts)} to {max(counts)} directions of a matrix")
        shown = f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
        expect(words).to_contain_text(f"rank {max(counts)}, {shown}")
    assert slider.get_attribute("max") == "95"
    page.locator("[data-pick=variant]").select_option(label="complement: off the MLLM's directions")
    expect(page.locator("[data-out=energy-label]")).to_have_text("Left out")
    assert slider.get_attribute("max") == "100"
