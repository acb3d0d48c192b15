"""Measure in a browser how soon a merge starts and ends, and how soon the chat answers.

    python benchmarks/bench_run.py [--runs 3] [--up 10]

Every run is a new app with an empty home folder and a new browser, over the demo models. The app is
up for --up seconds before the first question, and no model has been loaded. Times begin with the
press of the button; they are those of the page, except for the first tensor, which is read from
the status file of the run. Also prints the memory of the worker, from the log, and of the run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

PATIENCE = 120_000  # milliseconds
# In the page: the time of the press, and every text that an element shows after it.
RECORD = """([button, shown]) => {
  const record = (window.record = { pressed: 0, texts: [] });
  document.querySelector(button).addEventListener("click",
    () => { record.pressed = Date.now() }, { capture: true, once: true });
  const look = () => {
    const text = document.querySelector(shown)?.innerText ?? "";
    if (record.pressed && record.texts.at(-1)?.[1] !== text) record.texts.push([Date.now(), text]);
  };
  new MutationObserver(look).observe(document.body,
    { subtree: true, childList: true, characterData: true });
}"""


class Merge(NamedTuple):
    """One merge, in seconds after the press of Start."""

    first_tensor: float
    finished: float
    starting: float  # for which the page said that the run is starting
    worker: int  # MB
    memory: float  # MB, of the run at most


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--up", type=float, default=10.0, help="seconds before the first question")
    options = parser.parse_args()
    print(machine(), "\n")
    merges, tokens = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(playwright), args=CHROMIUM_FLAGS
        )
        for _ in range(options.runs):
            merges.append(in_new_app(browser, merge))
            tokens.append(in_new_app(browser, lambda page, _: first_token(page, options.up)))
    rows = [
        ["Start merge to the first tensor", "1 s", seconds([one.first_tensor for one in merges])],
        ["Start merge to the finished model", "1.5 s", seconds([one.finished for one in merges])],
        ["of which shown as starting", "", seconds([one.starting for one in merges])],
        ["first token in the chat after Send", "4 s", seconds(tokens)],
        ["memory of the waiting worker", "", f"{max(one.worker for one in merges)} MB"],
        ["memory of the merge at most", "", f"{max(one.memory for one in merges):.0f} MB"],
    ]
    print(table(["in a browser, least and most", "target", "measured"], rows))


def seconds(values: list[float]) -> str:
    """Format the least and the most of some times."""
    return f"{min(values):.2f} to {max(values):.2f} s"


def in_new_app(browser: Browser, measure: Callable[[Page, Path], Any]) -> Any:  # noqa: ANN401
    """Measure on a page of a new app, given its folder."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with serving(log, "app.py", port=free_port(), warm_up=True) as url:
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            context.add_init_script(SEEN_BEFORE)
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(url)
            page.locator("#layer-map .sum").wait_for()
            try:
                return measure(page, Path(folder))
            finally:
                context.close()


def merge(page: Page, folder: Path) -> Merge:
    """Merge the plan of Explore once the worker is ready."""
    log = folder / "log"
    page.locator("#tabs").get_by_role("tab", name="Merge").click()
    page.wait_for_function("!(document.querySelector('#start-merge')?.disabled ?? true)")
    while not (worker := re.search(r"Worker ready: (\d+) MB", log.read_text())):
        time.sleep(0.1)
    page.wait_for_timeout(3000)  # the app imports the libraries of the chat meanwhile
    page.evaluate(RECORD, ["#start-merge", "#run-status .run-words"])
    times: list[float] = []
    watch = threading.Thread(target=watch_first_tensor, args=(folder / "home" / "runs", times))
    watch.start()
    page.locator("#start-merge").click()
    page.wait_for_function("document.querySelector('#run-status').innerText.includes('Finished')")
    watch.join()
    record = page.evaluate("window.record")
    pressed = record["pressed"] / 1000
    texts = [(at / 1000, text) for at, text in record["texts"]]
    working = next(at for at, text in texts if "tensors" in text)
    status = json.loads(next((folder / "home" / "runs").glob("*/status.json")).read_text())
    return Merge(
        times[0] - pressed,
        texts[-1][0] - pressed,
        working - min((at for at, text in texts if "tensors" not in text), default=working),
        int(worker[1]),
        status["nbytes_memory"] / 1e6,
    )


def watch_first_tensor(runs: Path, times: list[float]) -> None:
    """Wait until a run has made a step, and add the time of its first one."""
    while not times:
        for path in runs.glob("*/status.json"):
            status = json.loads(path.read_text())
            if status["since"]:
                times.append(status["since"])
        time.sleep(0.01)


def first_token(page: Page, up: float) -> float:
    """Ask the first question; return the seconds until the first word of either answer."""
    page.locator("#tabs").get_by_role("tab", name="Try it").click()
    page.locator("#clear").click()
    page.wait_for_timeout(1000 * up)
    page.get_by_role("textbox", name="Question").fill("What is 7 + 5?")
    page.evaluate(RECORD, ["#prompt .submit-button", "#answers-status"])
    page.locator("#prompt .submit-button").click()
    page.wait_for_function("/answering|finished/.test(window.record.texts.at(-1)?.[1] ?? '')")
    record = page.evaluate("window.record")
    first = next(at for at, text in record["texts"] if re.search("answering|finished", text))
    return (first - record["pressed"]) / 1000


if __name__ == "__main__":
    main()
