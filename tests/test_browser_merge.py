"""The Merge tab in a real Chromium: check, confirm, run, reload, cancel, resume, result."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from browser_fixtures import free_port, serving
from gradio_client import Client
from playwright.sync_api import Locator, Page, expect
from slow_steps import held
from transformers import AutoModelForImageTextToText

from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.ui.plan_choice import analysis_of

pytestmark = pytest.mark.browser

LOADING = 60_000  # the first check loads torch


class Place(NamedTuple):
    """A running app and the folder where it keeps what it makes."""

    url: str
    home: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The app over the demo trio, whose runs can be held to step in between."""
    home = tmp_path_factory.mktemp("merge")
    with serving(home / "log", "tests/slow_app.py", str(home), port=free_port()) as url:
        yield Place(url, home)


@pytest.fixture
def page(place: Place, new_page: Callable[..., Page]) -> Page:
    """The Merge tab, checked and ready."""
    return open_merge(new_page(), place.url)


def open_merge(page: Page, url: str, *, ready: bool = True) -> Page:
    """Open the tab; `ready` waits for Start, which is off while a run of this browser goes."""
    page.goto(url)
    expect(page.locator("#layer-map .sum")).not_to_be_empty()
    page.locator("#tabs").get_by_role("tab", name="Merge").click()
    if ready:
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


def test_a_preset_fills_the_form_until_a_value_changes(page, place):
    preset, method = page.locator("#merge-preset input"), page.locator("#merge-method input")
    preset.click()
    page.get_by_role("option", name="TIES 1.6 / 0.2").click()
    expect(method).to_have_value("TIES")
    weight = page.locator("#parameter-math-weight input[type=number]")
    expect(weight).to_have_value("0.2")
    expect(page.locator("#preset-source")).to_contain_text("arXiv 2510.15050")
    expect(page.locator("#merge-chosen")).to_contain_text("mllm_weight 1.6, math_weight 0.2")
    expect(page).to_have_url(re.compile(r"method=ties&p\.mllm_weight=1\.6"))

    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    start(page, "as-in-drift")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    made = json.loads((place.home / "models" / "as-in-drift" / "ipmerge.json").read_text())
    assert made["plan"]["method"] == "ties"
    assert made["plan"]["parameters"]["mllm_weight"] == 1.6

    weight.fill("0.4")
    weight.press("Tab")
    expect(preset).to_have_value("none: own values")
    expect(page.locator("#preset-source")).to_be_empty()
    expect(page.locator("#merge-chosen")).to_contain_text("math_weight 0.4")
    preset.click()
    page.get_by_role("option", name="Weighted average 0.9").click()
    expect(method).to_have_value(re.compile("average", re.IGNORECASE))
    expect(preset).to_have_value("Weighted average 0.9")


def aim(page: Page) -> None:
    """Choose task arithmetic with AIM, an option that needs a calibration."""
    page.locator("#merge-preset input").click()
    page.get_by_role("option", name="Task arithmetic 1.0 / 0.3").click()
    expect(page.locator("#preset-source")).to_contain_text("defaults of this package")
    expect(page.locator("#parameter-math-weight")).to_be_visible()
    page.get_by_text("Advanced: scope and anchor").click()
    expect(page.locator("#calibration")).to_be_hidden()
    page.locator("#option-input-share textarea").fill("0.2")
    expect(page.locator("#calibration")).to_be_visible()


def test_an_option_that_needs_data_is_calibrated_once_and_merges(page, place, new_page):
    aim(page)
    expect(page.locator("#findings")).to_contain_text("needs a calibration")
    page.get_by_role("button", name="Calibrate").click()
    ready = re.compile("input share 0.2 · plan")
    expect(page.locator("#merge-chosen")).to_contain_text(ready, timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    start(page, "aimed")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    made = json.loads((place.home / "models" / "aimed" / "ipmerge.json").read_text())
    assert made["plan"]["input_share"] == 0.2
    calibration = Path(made["plan"]["calibration"]["folder"])
    assert calibration.is_dir()

    again = open_merge(new_page(), place.url)  # the calibration is found again
    aim(again)
    expect(again.locator("#merge-chosen")).to_contain_text(ready, timeout=LOADING)
    expect(again.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    expect(again.locator("#findings")).not_to_contain_text("needs a calibration")
    shutil.rmtree(calibration)  # other tests begin without one


def test_a_run_survives_a_reload_a_cancel_and_a_resume(page, place):
    with held(place.home):
        start(page, "through-it-all")
        assert "1 of 98 tensors" in run_words(page)

        open_merge(page, place.url, ready=False)  # which loads the page again
        expect(page.locator("#run-status")).to_contain_text("through-it-all")
        expect(page.locator("#run-status")).to_contain_text("1 of 98 tensors")
        expect(page.locator("#cancel-merge")).to_be_visible()

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
    with held(place.home):
        start(page, "not-yours")
        other = open_merge(new_page(), place.url)
        expect(other.locator("#run-status")).to_contain_text("No run yet")
        expect(other.locator("#cancel-merge")).to_be_hidden()
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    expect(other.locator("#run-status")).to_contain_text("No run yet")


def test_a_folder_that_is_taken_is_said_before_start_and_a_free_name_suggested(page, place):
    taken = place.home / "models" / "taken"
    taken.mkdir(parents=True)
    (taken / "note.txt").write_text("mine")
    folder, note = page.get_by_label("Output folder"), page.locator("#start-note")
    folder.fill("taken")
    expect(note).to_contain_text("exists and is not empty")
    expect(note).to_contain_text("Available name: taken-2")
    expect(page.locator("#start-merge")).to_be_disabled()
    expect(folder).to_have_value("taken")
    folder.fill("taken-2")
    expect(note).to_be_empty()
    expect(page.locator("#start-merge")).to_be_enabled()
    folder.fill("../up")
    expect(note).to_contain_text("neither a name")
    expect(page.locator("#start-merge")).to_be_disabled()
    assert [path.name for path in taken.iterdir()] == ["note.txt"]


# --- one run per press ---


def jobs(place: Place) -> list[dict]:
    """The status of every run of this app, as it stands on disk."""
    return [json.loads(path.read_text()) for path in place.home.glob("runs/*/status.json")]


def merges_into(place: Place, name: str) -> list[dict]:
    return [job for job in jobs(place) if Path(job["arguments"]["out"]).name == name]


def checked_digest(page: Page) -> str:
    return page.locator("#confirmation dl").get_attribute("data-digest")


def test_many_presses_make_one_run_and_start_is_off_while_it_goes(page, place):
    page.get_by_label("Output folder").fill("pressed")
    with held(place.home):
        page.locator("#start-merge").evaluate(
            "button => { for (let i = 0; i < 5; i++) button.click(); }"
        )
        expect(page.locator("#run-status")).to_contain_text("pressed", timeout=LOADING)
        expect(page.locator("#start-merge")).to_be_disabled()
        expect(page.locator("#start-note")).to_contain_text("A merge is in progress")
        expect(page.locator("#run-status")).to_contain_text("tensors", timeout=LOADING)
        expect(page.locator("#start-merge")).to_be_disabled()
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    expect(page.locator("#start-note")).to_contain_text("exists and is not empty")
    assert [job["state"] for job in merges_into(place, "pressed")] == ["finished"]


def test_a_second_tab_attaches_to_the_run_of_the_first_and_may_cancel_it(page, place):
    second = page.context.new_page()
    open_merge(second, place.url)
    for each in (page, second):
        each.get_by_label("Output folder").fill("by-two")
        expect(each.locator("#start-merge")).to_be_enabled()
    with held(place.home):
        page.locator("#start-merge").click()
        expect(page.locator("#run-status")).to_contain_text("by-two", timeout=LOADING)
        second.locator("#start-merge").click()
        expect(second.locator("#run-status")).to_contain_text("by-two", timeout=LOADING)
        second.locator("#cancel-merge").click()
        for each in (page, second):
            expect(each.locator("#run-status")).to_contain_text("Cancelled", timeout=LOADING)
    assert len(merges_into(place, "by-two")) == 1
    page.locator("#resume-merge").click()
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)


def test_a_run_of_a_program_in_the_same_folder_is_shown_without_buttons(page, place):
    page.get_by_label("Output folder").fill("by-program")
    expect(page.locator("#start-merge")).to_be_enabled()
    client = Client(place.url, verbose=False)
    with held(place.home):
        started = client.predict(pack="pack", folder="by-program", api_name="/merge_start")
        client.close()
        page.locator("#start-merge").click()
        expect(page.locator("#run-status")).to_contain_text("by-program", timeout=LOADING)
        expect(page.locator("#cancel-merge")).to_be_hidden()
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    assert [job["id"] for job in merges_into(place, "by-program")] == [started["job_id"]]


# --- Start makes what Confirm shows ---


CHOOSE_AND_PRESS = """async (option) => {
  option.dispatchEvent(new MouseEvent("mousedown", { bubbles: true }));
  const start = document.querySelector("#start-merge"), shown = [];
  for (let i = 0; i < 40; i++) {
    if (!start.disabled) shown.push(document.querySelector("#confirmation code").textContent);
    start.click();
    await new Promise((wake) => setTimeout(wake, 5));
  }
  return shown;
}"""


def test_a_press_right_after_another_choice_makes_what_confirm_showed_or_nothing(page, place):
    before = checked_digest(page)
    expect(page.locator("#confirmation")).to_contain_text("IP-Merging: similarity threshold")
    folder = f"at-once-{time.time_ns()}"  # a second try must not find the run of the first
    page.get_by_label("Output folder").fill(folder)
    page.get_by_label("Method", exact=True).click()
    shown = page.get_by_role("option", name="TIES", exact=True).evaluate(CHOOSE_AND_PRESS)
    expect(page.locator("#confirmation")).to_contain_text("TIES", timeout=LOADING)
    assert checked_digest(page) != before
    expect(page.locator("#start-note")).not_to_contain_text("Checking")
    made = merges_into(place, folder)
    assert len(made) <= 1
    if made:
        expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
        assert manifest_of(place, folder)["hash"] in shown


def own_pair(place: Place) -> str:
    """Add a pair of the demo models under another name, and return its label."""
    path = place.home / "packs" / "another.pack.json.gz"
    path.parent.mkdir(exist_ok=True)
    replace(analysis_of("pack"), name="another pair").save(path)
    return "own: another pair"


def test_a_change_of_pair_is_checked_again_and_start_makes_the_pair_on_show(place, new_page):
    label = own_pair(place)
    page = open_merge(new_page(), place.url)
    before = checked_digest(page)
    expect(page.locator("#confirmation")).to_contain_text("demo trio")
    page.get_by_role("combobox", name="Pair", exact=True).click()
    page.get_by_role("option", name=re.compile(label)).click()
    expect(page.locator("#confirmation")).to_contain_text("another pair", timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    assert checked_digest(page) != before
    start(page, "other-pair")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    made = json.loads((place.home / "models" / "other-pair" / "ipmerge.json").read_text())
    shown = page.locator("#confirmation code").first.inner_text()
    assert made["plan"]["hash"] == shown


def test_the_server_refuses_what_confirm_does_not_show(page, place):
    """The page is made to press with the digest of something else."""
    page.get_by_label("Output folder").fill("refused")
    expect(page.locator("#start-merge")).to_be_enabled()
    page.locator("#confirmed-digest textarea, #confirmed-digest input").first.evaluate(
        """field => {
          field.value = "0".repeat(64);
          field.dispatchEvent(new Event("input", { bubbles: true }));
        }"""
    )
    page.locator("#start-merge").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("has changed since the check")
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    assert not merges_into(place, "refused")


def test_a_plan_that_selects_nothing_says_so(new_page, place):
    page = new_page()
    page.goto(place.url)
    number = page.get_by_label("S alpha as a number")
    number.fill("1")
    number.press("Enter")
    expect(page.locator("#layer-map .sum")).to_contain_text("equals")
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


def calibration_of(page: Page) -> Locator:
    return page.get_by_label("Calibration", exact=True)


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


def test_parameters_of_the_plan_from_explore_are_set_kept_and_merged(page, place):
    unfold = page.get_by_text("Advanced: parameters not set in Explore")
    unfold.click(timeout=LOADING)
    field = page.locator("#parameter-temperature").get_by_role("textbox")
    expect(field).to_have_attribute("placeholder", "as in the analysis")
    field.fill("-1")
    field.blur()
    expect(page.locator("#findings")).to_contain_text("temperature is -1", timeout=LOADING)
    field.fill("8.5")
    field.blur()
    confirmation = page.locator("#confirmation")
    expect(confirmation).to_contain_text("temperature 8.5", timeout=LOADING)
    tabs = page.locator("#tabs")
    tabs.get_by_role("tab", name="Explore").click()
    tabs.get_by_role("tab", name="Merge").click()
    expect(field).to_have_value("8.5", timeout=LOADING)  # shown again as it is used
    expect(confirmation).to_contain_text("temperature 8.5", timeout=LOADING)
    start(page, "by-temperature")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    assert manifest_of(place, "by-temperature")["parameters"]["temperature"] == 8.5


def test_scope_gains_norms_and_anchor_stand_under_advanced(page, place):
    choose(page, "Task arithmetic")
    facts = page.locator("#confirmation")
    expect(facts).to_contain_text("inject", timeout=LOADING)
    page.get_by_text("Advanced: scope and anchor").click()
    write(page, "Include matrices", "mlp")
    expect(facts).to_contain_text("12 of 28", timeout=LOADING)
    write(page, "Exclude matrices", "layers[.]0[.]")
    expect(facts).to_contain_text("9 of 28", timeout=LOADING)
    write(page, "Layer gains", "nonsense")
    expect(page.locator("#findings")).to_contain_text("expected numbers such as", timeout=LOADING)
    write(page, "Layer gains", "0 1")
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
    page.get_by_label("Norms and biases", exact=True).click()
    page.get_by_role("option", name="merge", exact=True).click()
    expect(facts).to_contain_text("norms merge", timeout=LOADING)
    expect(facts).to_contain_text("9 tensors (not selected)")
    page.get_by_label("Anchor", exact=True).click()
    page.get_by_role(
        "option", name="two base: task vectors relative to each model's own base"
    ).click()
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
    with held(place.home):
        page.locator("#start-merge").click()
        expect(page.locator("#run-status")).to_contain_text("matrices measured", timeout=LOADING)
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    assert len(manifest_of(place, "by-nan")["statistic"]) == 2


def test_samples_are_measured_here_and_the_merge_uses_them(page, place):
    choose(page, "RegMean")
    expect(page.locator("#findings")).to_contain_text("press Calibrate", timeout=LOADING)
    expect(page.locator("#start-merge")).to_be_disabled()
    write(page, "Samples per model", "3")
    status = page.locator("#calibration-status")
    with held(place.home):
        page.locator("#start-calibration").click()
        expect(status).to_contain_text("Calibrate mllm-gram", timeout=LOADING)
        expect(page.locator("#cancel-calibration")).to_be_visible()
    expect(status).to_contain_text("Finished", timeout=LOADING)
    expect(page.get_by_label("Calibration", exact=True)).to_have_value(
        re.compile(r"^mllm-gram · 20.* · 3 \+ 3 samples · demo$")
    )
    expect(page.locator("#findings")).to_contain_text("fewer tokens", timeout=LOADING)
    start(page, "by-regmean")
    expect(page.locator("#run-status")).to_contain_text("Finished", timeout=LOADING)
    assert manifest_of(place, "by-regmean")["method"] == "regmean"

    page.reload()
    open_merge(page, place.url)
    choose(page, "RegMean")
    expect(page.get_by_label("Calibration", exact=True)).to_have_value(
        re.compile(r"^mllm-gram · 20.* · 3 \+ 3 samples · demo$")
    )
    expect(page.locator("#confirmation")).to_contain_text("28 of 28", timeout=LOADING)


def test_a_calibration_can_be_cancelled_and_resumed(page, place):
    choose(page, "Fisher merging")
    write(page, "Samples per model", "20")
    status = page.locator("#calibration-status")
    with held(place.home):
        page.locator("#start-calibration").click()
        expect(status).to_contain_text("passes", timeout=LOADING)
        page.locator("#cancel-calibration").click()
        expect(status).to_contain_text("Cancelled", timeout=LOADING)
        page.locator("#resume-calibration").click()
        expect(status).to_contain_text("Running", timeout=LOADING)
        open_merge(page, place.url)  # which loads the page again
        choose(page, "Fisher merging")
        expect(status).to_contain_text("Running", timeout=LOADING)
    expect(status).to_contain_text("Finished", timeout=LOADING)
    expect(page.get_by_label("Calibration", exact=True)).to_have_value(
        re.compile("^mllm-fisher · ")
    )
    expect(page.locator("#start-merge")).to_be_enabled(timeout=LOADING)
