"""The Merge tab in a real Chromium: check, confirm, run, reload, cancel, resume, result."""

from __future__ import annotations

import io
import json
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from browser_fixtures import free_port, serving
from playwright.sync_api import Page, expect
from transformers import AutoModelForImageTextToText

from ipmerge_core.checkpoint import Checkpoint

pytestmark = pytest.mark.browser

LOADING = 60_000  # the first check loads torch


class Place(NamedTuple):
    """A running app and the folder where it keeps what it makes."""

    url: str
    home: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The app over the demo trio, with merges slow enough to step in between."""
    home = tmp_path_factory.mktemp("merge")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as url:
        yield Place(url, home)


@pytest.fixture
def page(place: Place, new_page: Callable[..., Page]) -> Page:
    """The Merge tab, checked and ready."""
    return open_merge(new_page(), place.url)


def open_merge(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#layer-map .sum")).not_to_be_empty()
    page.locator("#tabs").get_by_role("tab", name="Merge").click()
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    return page


def start(page: Page, name: str) -> None:
    page.get_by_label("Output folder").fill(name)
    page.locator("#start-merge").click()
    expect(page.locator("#run-status")).to_contain_text("tensors", timeout=LOADING)


def run_words(page: Page) -> str:
    return page.locator("#run-status .run-words").inner_text()


def test_check_and_confirm_say_what_will_happen(page):
    findings = page.locator("#findings")
    expect(findings).to_contain_text("28 decoder matrices of 4 layers")
    expect(findings.locator(".refusal")).to_have_count(0)
    facts = page.locator("#confirmation")
    expect(facts).to_contain_text(re.compile(r"\d+ of 28 decoder matrices"))
    expect(facts).to_contain_text("outside the language model")
    expect(facts).to_contain_text(re.compile(r"about \d+ second"))
    expect(page.get_by_label("Output folder")).to_have_value(re.compile(r"^mllm-[0-9a-f]{8}$"))


def test_a_run_survives_a_reload_a_cancel_and_a_resume(page, place):
    start(page, "through-it-all")
    first = int(re.search(r"(\d+) of 98 tensors", run_words(page)).group(1))

    page.reload()
    open_merge(page, place.url)
    expect(page.locator("#run-status")).to_contain_text("through-it-all")
    expect(page.locator("#cancel-merge")).to_be_visible()
    assert int(re.search(r"(\d+) of 98 tensors", run_words(page)).group(1)) >= first

    page.locator("#cancel-merge").click()
    expect(page.locator("#run-status")).to_contain_text("Cancelled", timeout=LOADING)
    assert not (place.home / "models" / "through-it-all").exists()

    page.locator("#resume-merge").click()
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    out = Path(page.locator("#result-path").inner_text())
    assert out == place.home / "models" / "through-it-all"
    names = set(Checkpoint.open(out).tensors)
    assert names == set(Checkpoint.open("assets/demo/mllm").tensors)
    assert AutoModelForImageTextToText.from_pretrained(out)

    address = page.locator("#result a.whole-model").get_attribute("href")
    with urllib.request.urlopen(f"{place.url}/{address}") as answer:
        archive = zipfile.ZipFile(io.BytesIO(answer.read()))
    assert archive.testzip() is None
    assert "through-it-all/model.safetensors" in archive.namelist()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{place.url}/{address[:-4]}")

    page.locator("#try-merged").click()
    expect(page.locator("#prompt textarea")).to_be_visible()


def test_a_stranger_has_no_buttons_and_no_run(page, place, new_page):
    start(page, "not-yours")
    other = open_merge(new_page(), place.url)
    expect(other.locator("#run-status")).to_contain_text("No run yet")
    expect(other.locator("#cancel-merge")).to_be_hidden()
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    expect(other.locator("#run-status")).to_contain_text("No run yet")


def test_a_folder_that_is_not_empty_is_refused_and_nothing_is_written(page, place):
    taken = place.home / "models" / "taken"
    taken.mkdir(parents=True)
    (taken / "note.txt").write_text("mine")
    page.get_by_label("Output folder").fill("taken")
    page.locator("#start-merge").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("exists and is not empty")
    expect(page.get_by_label("Output folder")).to_have_value("taken")
    assert [path.name for path in taken.iterdir()] == ["note.txt"]


def test_a_plan_that_selects_nothing_says_so(new_page, place):
    page = new_page()
    page.goto(place.url)
    number = page.get_by_label("S alpha as a number")
    number.fill("1")
    number.press("Enter")
    expect(page.locator("#layer-map .sum")).to_contain_text("equals")
    page.wait_for_timeout(500)
    page.locator("#tabs").get_by_role("tab", name="Merge").click()
    expect(page.locator("#findings")).to_contain_text(
        "No matrix reaches the similarity threshold 1", timeout=LOADING
    )


def choose(page: Page, label: str) -> None:
    page.get_by_label("Method", exact=True).click()
    page.get_by_role("option", name=label, exact=True).click()
    expect(page.locator("#method-formula")).to_be_visible(timeout=LOADING)


def write(page: Page, label: str, text: str) -> None:
    field = page.get_by_label(label)
    field.fill(text)
    field.blur()


def manifest_of(place: Place, name: str) -> dict:
    return json.loads((place.home / "models" / name / "ipmerge.json").read_text())["plan"]


@pytest.mark.parametrize("method", [None, "TIES", "RegMean"])
def test_a_phone_scrolls_only_downwards(method, place, new_page):
    page = open_merge(new_page(width=390, height=844), place.url)
    if method:
        choose(page, method)
        page.get_by_text("Advanced: scope and anchor").click()
        expect(page.get_by_label("Anchor", exact=True)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_another_method_is_chosen_set_and_merged(page, place):
    choose(page, "TIES")
    expect(page.get_by_label("number input for density", exact=True)).to_have_value("0.2")
    expect(page.locator("#confirmation")).to_contain_text("not previewable", timeout=LOADING)
    write(page, "math density", "2")
    expect(page.locator("#findings")).to_contain_text("math_density is 2", timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_disabled()
    write(page, "math density", "")
    write(page, "number input for density", "0.5")
    expect(page.locator("#confirmation")).to_contain_text("28 of 28", timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_enabled()
    start(page, "by-ties")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    plan = manifest_of(place, "by-ties")
    assert plan["method"] == "ties"
    assert plan["parameters"]["density"] == 0.5
    assert plan["parameters"]["math_density"] is None


def test_scope_gains_norms_and_anchor_stand_under_advanced(page, place):
    choose(page, "Task arithmetic")
    facts = page.locator("#confirmation")
    expect(facts).to_contain_text("inject", timeout=LOADING)
    page.get_by_text("Advanced: scope and anchor").click()
    write(page, "Only these matrices", "mlp")
    expect(facts).to_contain_text("12 of 28", timeout=LOADING)
    write(page, "But not these", "layers[.]0[.]")
    expect(facts).to_contain_text("9 of 28", timeout=LOADING)
    write(page, "Gain over the layers", "nonsense")
    expect(page.locator("#findings")).to_contain_text("expected numbers such as", timeout=LOADING)
    write(page, "Gain over the layers", "0 1")
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    page.get_by_label("Norms and biases", exact=True).click()
    page.get_by_role("option", name="merge", exact=True).click()
    expect(facts).to_contain_text("norms and biases", timeout=LOADING)
    page.get_by_label("Anchor", exact=True).click()
    page.get_by_role("option", name="two base: each model's change, from its own base").click()
    expect(facts).to_contain_text("two_base", timeout=LOADING)
    start(page, "by-scope")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    plan = manifest_of(place, "by-scope")
    assert (plan["include"], plan["exclude"]) == ("mlp", "layers[.]0[.]")
    assert (plan["layer_gains"], plan["norms"], plan["anchor"]) == ([0, 1], "merge", "two_base")


def test_a_first_pass_is_seen_before_the_merge(page, place):
    choose(page, "NAN")
    expect(page.locator("#confirmation")).to_contain_text("which the merge measures first")
    page.get_by_label("Output folder").fill("by-nan")
    page.locator("#start-merge").click()
    expect(page.locator("#run-status")).to_contain_text("matrices measured", timeout=LOADING)
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    assert len(manifest_of(place, "by-nan")["statistic"]) == 2


def test_samples_are_measured_here_and_the_merge_uses_them(page, place):
    choose(page, "RegMean")
    expect(page.locator("#findings")).to_contain_text("press Calibrate", timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_disabled()
    write(page, "How many of each", "3")
    page.locator("#start-calibration").click()
    status = page.locator("#calibration-status")
    expect(status).to_contain_text("Calibrate mllm-gram", timeout=LOADING)
    expect(page.locator("#cancel-calibration")).to_be_visible()
    expect(status).to_contain_text("Finished", timeout=LOADING)
    expect(page.get_by_label("Calibration", exact=True)).to_have_value("mllm-gram")
    expect(page.locator("#findings")).to_contain_text("fewer tokens", timeout=LOADING)
    start(page, "by-regmean")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    assert manifest_of(place, "by-regmean")["method"] == "regmean"

    page.reload()
    open_merge(page, place.url)
    choose(page, "RegMean")
    expect(page.get_by_label("Calibration", exact=True)).to_have_value("mllm-gram")
    expect(page.locator("#confirmation")).to_contain_text("28 of 28", timeout=LOADING)


def test_a_calibration_can_be_cancelled_and_resumed(page, place):
    choose(page, "Fisher merging")
    write(page, "How many of each", "200")
    page.locator("#start-calibration").click()
    status = page.locator("#calibration-status")
    expect(status).to_contain_text("passes", timeout=LOADING)
    page.locator("#cancel-calibration").click()
    expect(status).to_contain_text("Cancelled", timeout=LOADING)
    page.locator("#resume-calibration").click()
    expect(status).to_contain_text("Running", timeout=LOADING)
    page.reload()
    open_merge(page, place.url)
    choose(page, "Fisher merging")
    expect(status).to_contain_text("Finished", timeout=3 * LOADING)
    expect(page.get_by_label("Calibration", exact=True)).to_have_value("mllm-fisher")
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
