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
    page.locator("#cancel-merge").click()
    expect(page.locator("#run-status")).to_contain_text("Cancelled", timeout=LOADING)


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


def test_a_phone_scrolls_only_downwards(place, new_page):
    page = open_merge(new_page(width=390, height=844), place.url)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_another_method_is_chosen_set_and_merged(page, place):
    page.get_by_label("Method", exact=True).click()
    page.get_by_role("option", name="TIES", exact=True).click()
    density = page.get_by_label("density", exact=True)
    expect(density).to_be_visible(timeout=LOADING)
    expect(page.locator("#confirmation")).to_contain_text("not previewable", timeout=LOADING)
    density.fill("2")
    expect(page.locator("#findings")).to_contain_text("density is 2", timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_disabled()
    density.fill("0.5")
    expect(page.locator("#confirmation")).to_contain_text("28 of 28", timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_enabled()
    start(page, "by-ties")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    plan = json.loads((place.home / "models" / "by-ties" / "ipmerge.json").read_text())["plan"]
    assert (plan["method"], plan["parameters"]["density"]) == ("ties", 0.5)
