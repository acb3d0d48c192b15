"""Another trio in a real Chromium: findings first, then a run whose matrices come onto the map."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from browser_fixtures import free_port, serving
from conftest import TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model, write_trio
from explore_page import COMPONENT, Traffic, count, percent, plan_on_page
from playwright.sync_api import Page, Request, expect
from slow_steps import held

from ipmerge_core.analysis.partial import read_journal
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.planning.plan import make_plan
from ipmerge_core.ui.plan_choice import read_commit

pytestmark = pytest.mark.browser

LOADING = 60_000  # the first check loads torch
ALL = 21  # matrices of a tiny trio
EVIL = "<img src=x onerror=document.title='owned'>"


class Place(NamedTuple):
    """A running app, the folder where it keeps what it makes, and models that it may read."""

    url: str
    home: Path
    trio: Trio


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The app over the demo trio, with analyses slow enough to step in between."""
    home = tmp_path_factory.mktemp("analyse")
    trio = write_trio(home / "models")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as url:
        yield Place(url, home, trio)


@pytest.fixture
def page(place: Place, new_page: Callable[..., Page]) -> Page:
    return open_panel(new_page(), place.url)


def open_app(page: Page, url: str, query: str = "") -> Page:
    page.goto(f"{url}/?{query}")
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    return page


def open_panel(page: Page, url: str, query: str = "") -> Page:
    open_app(page, url, query)
    page.locator("#analyse-open").click()
    expect(page.locator("#analyse-panel")).to_be_visible()
    return page


def fill(page: Page, **named: object) -> None:
    for name, text in named.items():
        page.locator(f"#analyse-{name.replace('_', '-')} textarea").fill(str(text))


def check(page: Page, *, ready: bool = True) -> None:
    page.locator("#analyse-check").click()
    if ready:
        expect(page.locator("#start-analysis")).to_be_enabled(timeout=LOADING)
    else:
        expect(page.locator("#analyse-status")).to_contain_text("Cannot start", timeout=LOADING)
        expect(page.locator("#start-analysis")).to_be_disabled()


def start(page: Page, place: Place, **named: object) -> None:
    """Have the tiny trio analysed and wait for its first matrix on the map."""
    trio = place.trio
    fill(page, **{"mllm": trio.mllm, "math": trio.math, "base": trio.base, **named})
    check(page)
    page.locator("#start-analysis").click()
    expect(page.locator("#layer-map .sum")).to_contain_text("analysis running", timeout=LOADING)


def cancel(page: Page) -> None:
    page.locator("#cancel-analysis").click()
    expect(page.locator("#analysis-status")).to_contain_text("Cancelled", timeout=LOADING)


def known(page: Page) -> int:
    return page.evaluate(f"{COMPONENT}.index.cells.length")


def wait_for(page: Page, condition: str) -> None:
    page.wait_for_function(f"(map) => {condition}", arg=page.evaluate_handle(COMPONENT))


def pack_on_show(page: Page) -> str:
    return page.evaluate(f"{COMPONENT}.packId")


def expect_finished(page: Page) -> None:
    expect(page.locator("#analysis-status")).to_contain_text("Finished", timeout=LOADING)
    expect(page.locator("#layer-map .sum")).to_contain_text(f"of {ALL} matrices merge")


# --- before the first byte -------------------------------------------------------------------


def test_findings_and_cost_come_before_anything_is_started(page, place):
    said = "window.said = []; new MutationObserver(() => window.said.push(document.querySelector('#analyse-status').textContent)).observe(document.querySelector('#analyse-status'), {childList: true, subtree: true, characterData: true});"  # noqa: E501
    page.evaluate(said)
    expect(page.locator("#start-analysis")).to_be_disabled()
    fill(page, mllm=place.trio.mllm, math=place.trio.math, base=place.trio.base)
    check(page)
    words = " ".join(page.evaluate("window.said"))
    assert "Reading headers, 1 of 3: vision-language model" in words
    findings = page.locator("#analyse-findings")
    expect(findings).to_contain_text(f"{ALL} decoder matrices of 3 layers match")
    expect(findings.locator(".ok")).to_have_count(5)  # with that of the task vectors
    facts = page.locator("#analyse-facts")
    for text in (f"{ALL} matrices, exact", "69.1 kB of weights", "free", "about 1 second"):
        expect(facts).to_contain_text(text)
    expect(facts).to_contain_text(str(place.home / "packs"))
    assert not list((place.home / "runs").glob("*"))
    page.locator("#analyse-base textarea").press_sequentially("2")
    expect(page.locator("#start-analysis")).to_be_disabled()
    expect(page.locator("#analyse-status")).to_contain_text("Changed since the check")


def test_a_refusal_keeps_what_was_typed_and_starts_nothing(page, place):
    trio = place.trio
    weights = {k: v for k, v in text_weights().items() if ".layers.2." not in k}
    short = write_model(place.home / "short", fine_tuned(weights, 5), TEXT_CONFIG)
    for math, words in (
        (trio.base, "equals the base"),
        (place.home / "nowhere", "The model folder"),
        (short, "2 decoder layers"),
        ("org/math", "Cannot open 'org/math'"),
        ("", "Missing: math model"),
    ):
        fill(page, mllm=trio.mllm, math=math, base=trio.base)
        check(page, ready=False)
        expect(page.locator("#analyse-findings .refusal")).to_contain_text(words)
        expect(page.locator("#analyse-math textarea")).to_have_value(str(math))
        expect(page.locator("#analyse-mllm textarea")).to_have_value(str(trio.mllm))
    expect(page.locator("#analyse-facts")).to_have_text("")
    assert not list((place.home / "runs").glob("*"))


def test_known_pairs_fill_the_fields_and_say_where_they_are_from(page):
    page.locator("#analyse-known input").click()
    page.get_by_role("option", name=re.compile("^llava-1.5-7b-hf [+] MetaMath-7B")).click()
    expect(page.locator("#analyse-mllm textarea")).to_have_value("llava-hf/llava-1.5-7b-hf")
    expect(page.locator("#analyse-math textarea")).to_have_value("meta-math/MetaMath-7B-V1.0")
    expect(page.locator("#analyse-own-base textarea")).to_have_value("lmsys/vicuna-7b-v1.5")
    note = page.locator("#analyse-note")
    expect(note).to_contain_text("math")
    expect(note).to_contain_text("licence unknown")
    expect(note).to_contain_text("the same pair in the transformers layout")


# --- a run -----------------------------------------------------------------------------------


def questions_for_more(page: Page) -> list[float]:
    """When the page asked for the matrices that have come since, in milliseconds, by its clock."""
    asked: list[float] = []

    def note(request: Request) -> None:
        if '"grown"' in (request.post_data or ""):
            asked.append(request.timing["startTime"])

    page.on("requestfinished", note)
    return asked


def test_matrices_come_onto_the_map_as_python_knows_them_and_the_plan_stays(page, place):
    asked = questions_for_more(page)
    traffic = Traffic(page)
    start(page, place)
    pack_id = pack_on_show(page)
    expect(page.get_by_role("combobox", name="Pair")).to_have_value(re.compile("partly analysed"))
    expect(page.locator("#layer-map [role=gridcell]")).to_have_count(ALL)
    missing = page.locator("#layer-map .lm-missing")
    assert missing.count() == ALL - known(page)
    number = page.get_by_label("S alpha as a number")
    number.fill("0.8")
    number.press("Enter")
    cell = page.get_by_role("button", name="Layer 0, q,")
    cell.scroll_into_view_if_needed()  # the click below does not move the page then
    box = page.locator("#layer-map .lm-grid").bounding_box()
    before = known(page)
    cell.click()
    wait_for(page, f"map.index.cells.length >= {before + 4}")
    assert page.locator("#layer-map .lm-grid").bounding_box() == box, "the layout jumped"
    assert cell.evaluate("node => node === document.activeElement"), "the focus was lost"
    expect(page.locator("#layer-map .lm-detail h2")).to_have_text("Layer 0 · q")
    assert plan_on_page(page)["s"] == 0.8
    expect_python_s_numbers(page, place, pack_id)
    page.locator("#layer-map button[aria-label='All of layer 2']").click()
    expect(page.locator("#layer-map .lm-detail")).to_contain_text("Not analysed yet")
    assert not traffic.complaints

    expect_finished(page)
    assert len(asked) >= 2
    assert min(b - a for a, b in pairwise(asked)) >= 1_950, "no more than every two seconds"
    assert missing.count() == 0
    assert plan_on_page(page)["s"] == 0.8
    expect(page.get_by_role("combobox", name="Pair")).to_have_value("own: mllm + math")
    pack = json.loads(json.dumps(Analysis.load(pack_file(place, pack_id)).to_dict()))
    assert page.evaluate(f"{COMPONENT}.pack.records.length") == len(pack["records"]) == ALL
    page.locator("#pair-details summary").click()
    expect(page.locator("#pair-details")).to_contain_text(str(place.trio.math))
    expect(page.locator("#pair-details")).to_contain_text("Analysed 20")
    page.locator("#tabs").get_by_role("tab", name="Merge").click()
    expect(page.locator("#confirmation")).to_contain_text(
        re.compile(rf"\d+ of {ALL} decoder matrices"), timeout=LOADING
    )
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    page.reload()
    pair = page.get_by_role("combobox", name="Pair")
    expect(pair).to_have_value("own: mllm + math")
    for label, n in (("demo trio", 28), ("own: mllm + math", ALL)):
        pair.click()
        page.get_by_role("option", name=label, exact=True).click()
        expect(page.locator("#layer-map .sum")).to_contain_text(f"of {n} matrices merge")
    page.locator("#dismiss-analysis").click()
    expect(page.locator("#analysis-run")).to_be_hidden()


def pack_file(place: Place, pack_id: str) -> Path:
    return place.home / "packs" / f"{pack_id.removeprefix('packs-')}.pack.json.gz"


def expect_python_s_numbers(page: Page, place: Place, pack_id: str) -> None:
    """The sentence on the page says what Python says of the same records and the same plan."""
    text, n, plan = page.evaluate(
        f"(() => {{ const map = {COMPONENT}; return [document.querySelector('#layer-map .sum').textContent, map.index.cells.length, map.plan]; }})()"  # noqa: E501
    )
    pack = pack_file(place, pack_id)
    seen = read_journal(pack.with_name(pack.name + ".journal"))
    content = {**seen.pack, "records": seen.records[:n]}
    found = make_plan(Analysis.from_dict(content), **read_commit(plan, content).arguments).preview()
    analysed = sum(record["shape"][0] * record["shape"][1] for record in content["records"])
    share = percent(100 * found.parameters_touched / analysed)
    assert 0 < len(found.selected) < n
    assert (
        f"{len(found.selected)} of {n} analysed ({ALL} in all) merge · "
        f"{count(found.parameters_touched)} of {count(analysed)} analysed parameters ({share}) · "
        f"change {percent(100 * found.relative_change)} of ‖W‖"
    ) in text


def test_an_open_merge_tab_follows_to_the_new_pair_and_waits_until_it_is_whole(page, place):
    page.locator("#tabs").get_by_role("tab", name="Merge").click()
    confirmation, start_merge = page.locator("#confirmation"), page.locator("#start-merge")
    expect(start_merge).to_be_enabled(timeout=LOADING)
    expect(confirmation).to_contain_text("demo trio")
    trio = place.trio
    fill(page, mllm=trio.mllm, math=trio.math, base=trio.base)
    check(page)
    with held(place.home):
        page.locator("#start-analysis").click()
        expect(page.locator("#findings")).to_contain_text("Cannot merge", timeout=LOADING)
        expect(start_merge).to_be_disabled()
    expect(page.locator("#analysis-status")).to_contain_text("Finished", timeout=LOADING)
    expect(confirmation).to_contain_text("mllm + math", timeout=LOADING)
    expect(start_merge).to_be_enabled(timeout=LOADING)


def test_a_run_survives_a_reload_a_cancel_and_a_resume(page, place):
    with held(place.home):
        start(page, place, math=place.trio.math_2)
        pack_id = pack_on_show(page)
        before = known(page)
        page.reload()
        expect(page.locator("#layer-map .sum")).to_contain_text("analysis running")
        assert pack_on_show(page) == pack_id
        assert known(page) >= before
        expect(page.locator("#cancel-analysis")).to_be_visible()

        cancel(page)
        expect(page.locator("#layer-map .sum")).to_contain_text("analysis stopped at")
        assert not pack_file(place, pack_id).exists()
        stopped = known(page)
        page.locator("#resume-analysis").click()
        running = page.locator("#layer-map .sum")
        expect(running).to_contain_text("analysis running", timeout=LOADING)
        assert known(page) >= stopped
    expect_finished(page)
    assert len(Analysis.load(pack_file(place, pack_id)).records) == ALL


def test_a_stranger_may_watch_by_link_and_has_no_buttons(page, place, new_page):
    with held(place.home):
        start(page, place, own_base=place.trio.base)
        other = open_app(new_page(), place.url, f"v=1&pack={pack_on_show(page)}&s=0.5")
        expect(other.locator("#layer-map .sum")).to_contain_text("analysis running")
        expect(other.locator("#analysis-run")).to_be_hidden()
        expect(other.locator("#cancel-analysis")).to_be_hidden()
        assert plan_on_page(other)["s"] == 0.5

        cancel(page)
    page.locator("#dismiss-analysis").click()
    expect(page.locator("#analysis-run")).to_be_hidden()
    expect(page.get_by_role("combobox", name="Pair")).to_have_value("demo trio")
    expect(other.locator("#layer-map .lm-note-line")).to_contain_text("no longer exists")
    assert not list((place.home / "packs").glob("*.journal"))


def test_what_needs_the_whole_analysis_says_so(page, place):
    with held(place.home):
        start(page, place, math=place.trio.math_2)
        cancel(page)
    words = "is only partly analysed"
    tabs = page.locator("#tabs")
    tabs.get_by_role("tab", name="Merge").click()
    expect(page.locator("#findings .refusal")).to_contain_text(words, timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_disabled()
    tabs.get_by_role("tab", name="Compare").click()
    expect(page.locator("#compare-reason")).to_contain_text(words)
    expect(page.locator("#compare-map .lm")).to_be_hidden()
    tabs.get_by_role("tab", name="API & cite").click()
    expect(page.locator("#cite-state")).to_contain_text(words)
    expect(page.locator("#cite-python")).not_to_contain_text("make_plan")
    tabs.get_by_role("tab", name="Try it").click()
    page.locator("#prompt textarea").fill("How many?")
    page.locator("#prompt textarea").press("Enter")
    for column in ("a", "b"):
        expect(page.locator(f"#chat-{column}")).to_contain_text(words, timeout=LOADING)
    expect(page.get_by_test_id("toast-body")).to_have_count(0)
    page.locator("#dismiss-analysis").click()
    expect(page.get_by_role("combobox", name="Pair")).to_have_value("demo trio")


# --- strangers and screens -------------------------------------------------------------------


def test_a_space_takes_hub_ids_alone(tmp_path, trio, new_page, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "org/ipmerge")
    with serving(tmp_path / "log", "app.py", port=free_port()) as url:
        page = open_panel(new_page(), url)
        expect(page.locator("#analyse-panel")).not_to_contain_text("folder")
        fill(page, mllm=trio.mllm, math=trio.math, base=trio.base)
        check(page, ready=False)
        refusal = page.locator("#analyse-findings .refusal")
        expect(refusal).to_have_count(1)
        expect(refusal).to_contain_text("is not a valid hub id; expected 'org/name'")
        expect(page.locator("#analyse-base textarea")).to_have_value(str(trio.base))


def test_names_of_models_never_become_markup(page, place):
    evil = place.home / EVIL
    if not evil.exists():
        evil.symlink_to(place.trio.math_2)
    page.locator("#analyse-math textarea").fill(str(place.home / "none" / EVIL.replace("/", "")))
    fill(page, mllm=place.trio.mllm, base=place.trio.base)
    check(page, ready=False)
    with held(place.home):
        start(page, place, math=evil)
        expect(page.locator("#analysis-status .run-title")).to_contain_text(EVIL)
        expect(page.locator("#layer-map .sum")).to_contain_text("analysis running")
        page.locator("#pair-details summary").click()
        expect(page.locator("#pair-details")).to_contain_text(EVIL)
        page.get_by_role("combobox", name="Pair").click()
        page.keyboard.press("Escape")
        for tab in ("Merge", "Compare", "API & cite", "Explore"):
            page.locator("#tabs").get_by_role("tab", name=tab).click()
            page.wait_for_timeout(500)
        cancel(page)
    page.locator("#dismiss-analysis").click()
    expect(page.locator("#analysis-run")).to_be_hidden()
    assert page.title() == "IPMerge"
    assert page.locator("img[src='x'], img[src$='/x']").count() == 0


def test_a_phone_in_the_dark_scrolls_only_downwards(place, new_page):
    page = open_panel(new_page(width=390, height=844), place.url, "__theme=dark")

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth") == 390

    assert fits()
    page.locator("#analyse-known input").click()
    page.get_by_role("option").first.click()
    expect(page.locator("#analyse-note")).to_contain_text("Licences")
    assert fits()
    fill(page, mllm=place.home / ("x" * 120), math=place.trio.math, base=place.trio.base)
    check(page, ready=False)
    assert fits()
    with held(place.home):
        start(page, place, own_base="")
        page.locator("#pair-details summary").click()
        assert fits()
        turned = page.locator("#layer-map .lm-grid-holder")
        expect(turned).to_have_attribute("data-turned", "true")
        box = page.locator("#layer-map .lm-grid").bounding_box()
        before = known(page)
    wait_for(page, f"map.index.cells.length >= {before + 3}")
    assert page.locator("#layer-map .lm-grid").bounding_box() == box
    with held(place.home):
        cancel(page)
    assert fits()
    page.locator("#dismiss-analysis").click()
    expect(page.locator("#analysis-run")).to_be_hidden()
