"""Measure the chat in a browser: keys while two columns stream, and the first token after a change.

    python benchmarks/bench_chat_page.py [--runs 5]

Drives the app over the demo models in a real headless Chromium. The latency of a key is the time
from the event to the end of the next frame, in the text box of the question, while both columns
answer; the answers of the demo models are too short for that, so `endless_app.py` generates up to
the limit of tokens. The time to the first token (`app.py`) runs from the press of Enter after
lambda was changed in Explore to the end of the frame with the first text of the merged column.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser_fixtures import (  # noqa: E402
    CHROMIUM_FLAGS,
    SEEN_BEFORE,
    find_chromium,
    free_port,
    serving,
)
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

PATIENCE = 180_000  # milliseconds
KEYS, KEY_PAUSE = 80, 60  # keys, and milliseconds between them
LATENCY_BAR, TOKEN_BAR = 100.0, 0.3
GAINS = ("2", "8", "4", "16", "1")
QUESTION = "What is the result?"
# In the page: the time from each key to the end of the frame that follows it.
WATCH_KEYS = """() => {
  window.latencies = [];
  document.querySelector("#prompt textarea").addEventListener("keydown", ({ timeStamp }) => {
    const done = () => window.latencies.push(performance.now() - timeStamp);
    requestAnimationFrame(() => setTimeout(done));
  }, true);
}"""
# In the page: the time from the next Enter to the first text of an answer that is not there yet.
WATCH_TOKEN = """() => {
  const shown = () => document.querySelectorAll("#chat-b [data-testid=bot] .written").length;
  const before = shown();
  window.firstToken = new Promise((found) => {
    document.querySelector("#prompt textarea").addEventListener("keydown", ({ timeStamp }) => {
      const watch = new MutationObserver(() => {
        if (shown() <= before) return;
        watch.disconnect();
        const done = () => found((performance.now() - timeStamp) / 1000);
        requestAnimationFrame(() => setTimeout(done));
      });
      watch.observe(document.querySelector("#chat-b"), { childList: true, subtree: true });
    }, { capture: true, once: true });
  });
}"""


def open_tab(page: Page, name: str) -> None:
    """Open a tab of the app."""
    page.locator("#tabs").get_by_role("tab", name=name).click()


def choose(page: Page, letter: str, option: str) -> None:
    """Select the model of a column."""
    page.get_by_role("combobox", name=f"Model {letter}").click()
    page.get_by_role("option", name=option).click()


def set_number(page: Page, label: str, value: str) -> None:
    """Set a dial of Explore by its number."""
    open_tab(page, "Explore")
    field = page.get_by_label(label)
    field.fill(value)
    field.press("Enter")
    open_tab(page, "Try it")
    sign = "λ" if label.startswith("lambda") else "Sα"
    shown = re.compile(f"{sign} {re.escape(value)}(,|$)")
    expect(page.get_by_role("combobox", name="Model B")).to_have_value(shown)


def ask(page: Page) -> None:
    """Type the question and send it."""
    box = page.get_by_role("textbox", name="Question")
    box.fill(QUESTION)
    box.press("Enter")


def wait_until_over(page: Page) -> None:
    """Wait until all columns have finished."""
    expect(page.locator("#stop")).to_be_disabled(timeout=PATIENCE)
    expect(page.locator("#answers-status")).to_contain_text("finished", timeout=PATIENCE)


def measure_tokens(page: Page, runs: int) -> list[float]:
    """The seconds to the first token after each of several changes of lambda."""
    found = []
    for number in range(runs):
        set_number(page, "lambda as a number", GAINS[number % len(GAINS)])
        page.evaluate(WATCH_TOKEN)
        ask(page)
        found.append(float(page.evaluate("window.firstToken")))
        wait_until_over(page)
    return found


def measure_keys(page: Page) -> list[float]:
    """The milliseconds of keys while two columns stream."""
    page.locator("#chat-settings button").first.click()
    page.get_by_label("number input for Maximum new tokens").fill("2048")
    page.get_by_label("number input for Maximum new tokens").press("Tab")
    ask(page)
    status = page.locator("#answers-status")
    expect(status).to_contain_text(re.compile("is answering.*is answering"), timeout=PATIENCE)
    before = n_characters(page)
    page.evaluate(WATCH_KEYS)
    box = page.get_by_role("textbox", name="Question")
    box.focus()
    for number in range(KEYS):
        page.keyboard.press("abcdefgh "[number % 9])
        page.wait_for_timeout(KEY_PAUSE)
    assert page.locator("#stop").is_enabled(), "the answers ended before the last key"
    grown = [after - start for start, after in zip(before, n_characters(page), strict=True)]
    assert min(grown) > KEYS, f"the columns grew by {grown} characters during {KEYS} keys"
    page.locator("#stop").click()
    expect(box).to_have_value(("abcdefgh " * KEYS)[:KEYS])
    return [float(value) for value in page.evaluate("window.latencies")]


def n_characters(page: Page) -> list[int]:
    """The lengths of the answers of both columns."""
    return [len(page.locator(f"#chat-{name} [data-testid=bot]").last.inner_text()) for name in "ab"]


def quantile(values: list[float], q: float) -> float:
    """The value below which the fraction q of them lies."""
    return sorted(values)[int(q * (len(values) - 1))]


@contextmanager
def live_page(app: str) -> Iterator[Page]:
    """Serve an app, and open Try it with the plan of Explore after a first live answer."""
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        serving(Path(folder) / "log", app, port=free_port(), warm_up=True) as url,
    ):
        browser = playwright.chromium.launch(
            executable_path=find_chromium(playwright), headless=True, args=CHROMIUM_FLAGS
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.add_init_script(SEEN_BEFORE)
        page.goto(url)
        open_tab(page, "Try it")
        choose(page, "B", "Plan in Explore")
        page.locator("#retry").click()  # loads the model and prepares the factors
        expect(page.locator("#answers-source")).to_contain_text("Live", timeout=PATIENCE)
        wait_until_over(page)
        yield page
        browser.close()


def rows(runs: int) -> list[list[str]]:
    """Measure both figures; each row is figure, target, measurement, whether it is reached."""
    with live_page("app.py") as page:
        tokens = measure_tokens(page, runs)
    with live_page("benchmarks/endless_app.py") as page:
        keys = measure_keys(page)
    first, late = median(tokens), quantile(keys, 0.95)
    return [
        ["change of λ in Explore: Enter to first token", f"{TOKEN_BAR} s", f"{first:.2f} s",
         "yes" if first <= TOKEN_BAR else "**no**",
         f"median of {len(tokens)}, largest {max(tokens):.2f} s"],
        ["key to next frame while two columns stream, p95", f"{LATENCY_BAR:.0f} ms",
         f"{late:.0f} ms", "yes" if late <= LATENCY_BAR else "**no**",
         f"{len(keys)} keys, median {median(keys):.0f} ms, largest {max(keys):.0f} ms"],
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="changes of lambda")
    options = parser.parse_args()
    print(machine(), flush=True)
    print(table(("figure", "target", "measured", "reached", ""), rows(options.runs)))


if __name__ == "__main__":
    main()
