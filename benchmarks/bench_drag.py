"""How quickly the layer map follows a drag, and what a drag asks of the server.

Drives the real component in a real headless Chromium over synthetic packs of 196 and 448 matrices,
on an idle CPU and slowed four times. Prints paint times (milliseconds of script per frame), the
requests made during 60 pointer moves, and how long after the release Python has the plan.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from os import cpu_count
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser_fixtures import CHROMIUM_FLAGS, find_chromium, free_port, serving  # noqa: E402
from explore_app import write_packs  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402
from synthetic_pack import make_pack  # noqa: E402

LAYERS = {196: 28, 448: 64}
MOVES = 60
COMPONENT = "document.querySelector('#layer-map .lm').parentNode.ipmerge"


def drag(page: Page, name: str) -> tuple[list[float], int, float]:
    """Drag one slider; return paint times, requests during the drag, and the commit's delay."""
    box = page.locator(f"#layer-map [data-range={name}]").bounding_box()
    assert box is not None
    x, y = box["x"] + 0.45 * box["width"], box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(f"{COMPONENT}.paints.length = 0")
    requests: list[str] = []

    def note(request: object) -> None:
        requests.append(str(request))

    page.on("request", note)
    for step in range(MOVES):
        page.mouse.move(x - 4 * step, y)
        page.wait_for_timeout(16)
    page.remove_listener("request", note)
    before = page.locator("#received textarea").input_value()
    start = time.perf_counter()
    with page.expect_response(lambda response: "/gradio_api/run/" in response.url):
        page.mouse.up()
    delay = time.perf_counter() - start
    page.wait_for_function(
        "before => document.querySelector('#received textarea').value !== before", arg=before
    )
    return page.evaluate(f"{COMPONENT}.paints"), len(requests), delay


def measure(page: Page, url: str, cells: int, slowdown: int) -> None:
    """Print one line per slider."""
    page.goto(url)
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    if LAYERS[cells] != LAYERS[196]:
        page.get_by_role("combobox", name="Pair").click()
        page.get_by_role("option", name=f"{LAYERS[cells]} layers").click()
    page.wait_for_function(f"{COMPONENT}.index.cells.length === {cells}")
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setCPUThrottlingRate", {"rate": slowdown})
    for name in ("s", "lambda"):
        paints, requests, delay = drag(page, name)
        ordered = sorted(paints)
        middle, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.95))
        print(
            f"{cells} cells, CPU x1/{slowdown}, {name:>6}: paint p50 {middle:.1f} ms, "
            f"p95 {high:.1f} ms, max {ordered[-1]:.1f} ms over {len(paints)} frames; "
            f"{requests} requests in {MOVES} moves; commit answered after {1000 * delay:.0f} ms"
        )
    session.send("Emulation.setCPUThrottlingRate", {"rate": 1})


def main() -> None:
    """Print the table."""
    print(f"{datetime.now(UTC):%Y-%m-%d}, {cpu_count()} CPU cores ({platform.machine()}), Chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        home, port = Path(folder), free_port()
        write_packs(home, {f"l{layers}": make_pack(layers) for layers in LAYERS.values()})
        program = ("tests/explore_app.py", str(port), str(home))
        with serving(home / "log", *program, port=port) as url:
            browser = playwright.chromium.launch(
                executable_path=find_chromium(playwright), args=CHROMIUM_FLAGS
            )
            for cells in LAYERS:
                for slowdown in (1, 4):
                    page = browser.new_page(viewport={"width": 1280, "height": 900})
                    measure(page, url, cells, slowdown)
                    page.close()
            browser.close()


if __name__ == "__main__":
    main()
