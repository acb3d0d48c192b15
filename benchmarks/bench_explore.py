"""Measure the layer map in a browser: drag, commit, switching pairs, first paint, accessibility.

    python benchmarks/bench_explore.py [--runs 5]

Drives the app (`app.py`) in a real headless Chromium over synthetic packs of 196 and 448 matrices,
with and without CPU throttling. Paint is the script time per frame. A cold page is one in a new
browser with an empty profile. axe checks both maps, light and dark, wide and narrow.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from browser_fixtures import (  # noqa: E402
    CHROMIUM_FLAGS,
    SEEN_BEFORE,
    find_chromium,
    free_port,
    serving,
)
from explore_app import write_packs  # noqa: E402
from explore_page import COMPONENT  # noqa: E402
from playwright.sync_api import Browser, Page, Playwright, sync_playwright  # noqa: E402
from synthetic_pack import make_pack  # noqa: E402
from test_browser_axe import RULES, open_tab  # noqa: E402

LAYERS = {196: 28, 448: 64}
MOVES = 60
CELLS = "#layer-map [role=gridcell] button[aria-label]"
Row = list[str]


def row(figure: str, bar: float | None, measured: float, unit: str, note: str = "") -> Row:
    """One line of the table: figure, target and measurement."""
    reached = "" if bar is None else "yes" if measured <= bar else "**no**"
    return [
        figure,
        "" if bar is None else f"{bar:g} {unit}",
        f"{measured:.3g} {unit}",
        reached,
        note,
    ]


def quantile(values: list[float], q: float) -> float:
    """The value below which the fraction q of them lies."""
    return sorted(values)[int(q * (len(values) - 1))]


def show_pair(page: Page, cells: int) -> float:
    """Choose the pair with this many matrices; return the seconds until its map stands."""
    page.get_by_role("combobox", name="Pair").click()
    option = page.get_by_role("option", name=f"{LAYERS[cells]} layers")
    option.wait_for()
    start = time.perf_counter()
    option.click()
    page.wait_for_function(f"{COMPONENT}.index.cells.length === {cells} && {COMPONENT}.isPainted()")
    return time.perf_counter() - start


def answered(page: Page) -> AbstractContextManager[object]:
    """Wait for the answer to a commit."""
    return page.expect_response(lambda response: "/gradio_api/run/" in response.url)


def drag(page: Page, name: str) -> tuple[list[float], int, float]:
    """Drag one slider; return paint times, requests meanwhile, and the seconds of the commit."""
    slider = page.locator(f"#layer-map [data-range={name}]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None
    x, y = box["x"] + 0.45 * box["width"], box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(f"{COMPONENT}.timings.length = 0")
    requests: list[object] = []

    def note(request: object) -> None:
        requests.append(request)

    page.on("request", note)
    for step in range(MOVES):
        page.mouse.move(x - 4 * step, y)
        page.wait_for_timeout(16)
    page.remove_listener("request", note)
    paints = page.evaluate(f"[...{COMPONENT}.timings]")
    start = time.perf_counter()
    with answered(page):
        page.mouse.up()
    seconds = time.perf_counter() - start
    with answered(page):  # so that the next drag ends elsewhere than this one
        page.get_by_role("button", name="Undo").click()
    return paints, len(requests), seconds


def measure_drags(page: Page) -> list[Row]:
    """Paint, requests and commits of both sliders, for both packs, at both speeds."""
    session = page.context.new_cdp_session(page)
    rows, requests, commits = [], 0, []
    for cells in LAYERS:
        show_pair(page, cells)
        for slowdown, bar in ((1, 16), (4, 50)):
            session.send("Emulation.setCPUThrottlingRate", {"rate": slowdown})
            paints: list[float] = []
            for name in ("s", "lambda"):
                found, asked, seconds = drag(page, name)
                paints += found
                requests += asked
                if slowdown == 1:
                    commits.append(1000 * seconds)
            note = f"p50 {quantile(paints, 0.5):.1f} ms over {len(paints)} frames"
            label = f"paint p95, {cells} matrices, CPU x 1/{slowdown}"
            rows.append(row(label, bar, quantile(paints, 0.95), "ms", note))
        session.send("Emulation.setCPUThrottlingRate", {"rate": 1})
    rows.append(row(f"requests during a drag of {MOVES} moves, maximum", 0, requests, ""))
    return [
        *rows,
        row("commit, from end of drag to response", 300, max(commits), "ms", "slowest of 4"),
    ]


def measure_switches(page: Page, runs: int) -> Row:
    """The change to another bundled pair and back."""
    times = [show_pair(page, cells) for _ in range(runs) for cells in (196, 448)]
    return row("switching the pair, slowest", 1, max(times), "s", f"median {median(times):.2f} s")


def measure_cold_pages(playwright: Playwright, url: str, runs: int) -> Row:
    """A new browser with an empty profile: from the address to the standing map."""
    times = []
    for _ in range(runs):
        browser = launch(playwright)
        page = browser.new_page()
        start = time.perf_counter()
        page.goto(url, wait_until="commit")
        page.wait_for_selector(CELLS)
        times.append(time.perf_counter() - start)
        browser.close()
    return row(
        "first paint of a cold page, median", 3, median(times), "s", f"worst {max(times):.2f} s"
    )


def count_findings(browser: Browser, url: str) -> Row:
    """What axe finds in both maps, light and dark, wide and narrow."""
    found = 0
    for width in (1280, 390):
        for theme in ("light", "dark"):
            page = new_page(browser, width)
            page.goto(f"{url}/?__theme={theme}")
            page.locator(CELLS).first.click()
            found += violations(page, "#layer-map")
            open_tab(page, "Compare")
            page.wait_for_selector("#compare-map .c")
            found += violations(page, "#compare-map")
            page.context.close()
    return row("axe violations in both maps", 0, found, "", "light, dark, 1280 and 390 px")


def violations(page: Page, place: str) -> int:
    """Count the rules that axe finds broken in one place of the page."""
    options = {"runOnly": RULES, "resultTypes": ["violations"]}
    return Axe().run(page, context=place, options=options).violations_count


def pack_size() -> Row:
    """A pair of 28 layers as it travels."""
    data = json.dumps(make_pack(LAYERS[196], spectra=True), separators=(",", ":")).encode()
    return row(
        "pack of 28 layers with all singular values, gzipped",
        600,
        len(gzip.compress(data)) / 1000,
        "kB",
    )


def launch(playwright: Playwright) -> Browser:
    """Start the browser that the tests use."""
    return playwright.chromium.launch(
        executable_path=find_chromium(playwright), args=CHROMIUM_FLAGS
    )


def new_page(browser: Browser, width: int = 1280) -> Page:
    """A page in a fresh profile of somebody who has been here before."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.add_init_script(SEEN_BEFORE)
    return context.new_page()


def measure(url: str, runs: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure everything, one after the other."""
    with sync_playwright() as playwright:
        tell("cold pages")
        rows = [measure_cold_pages(playwright, url, runs)]
        browser = launch(playwright)
        page = new_page(browser)
        page.goto(url)
        page.wait_for_selector(CELLS)
        tell("drags")
        rows += measure_drags(page)
        tell("changes of pair")
        rows.append(measure_switches(page, runs))
        tell("axe")
        rows.append(count_findings(browser, url))
        browser.close()
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=int, default=5, help="cold pages, and changes there and back"
    )
    runs = parser.parse_args().runs
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        home, port = Path(folder), free_port()
        write_packs(home / "home", {f"l{n}": make_pack(n, spectra=True) for n in LAYERS.values()})
        with serving(home / "log", "app.py", port=port, warm_up=True) as url:
            rows = measure(url, runs, lambda words: print(f"... {words}", file=sys.stderr))
    print(table(("figure", "bar", "measured", "reached", "note"), [*rows, pack_size()]))


if __name__ == "__main__":
    main()
