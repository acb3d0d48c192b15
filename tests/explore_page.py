"""The Explore tab under test: synthetic packs, a page's traffic, and Python's own numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

from playwright.sync_api import Download, Page, expect
from synthetic_pack import make_pack

from ipmerge_core.analysis.analyse import Analysis
from ipmerge_core.planning.plan import Preview, make_plan
from ipmerge_core.ui.plan_choice import read_commit

COMPONENT = "document.querySelector('#layer-map .lm').parentNode.ipmerge"
SMALL = {"hidden": 128, "feed": 352}
PACKS = {
    "a": make_pack(28),
    "b": make_pack(4, seed=3, **SMALL),
    "c": make_pack(6, experts=2, seed=5, **SMALL),
}


class Traffic:
    """What a page asks of the network and what it complains about."""

    def __init__(self, page: Page) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self.complaints: list[str] = []
        page.on("request", lambda r: self.requests.append((r.method, r.url, r.post_data or "")))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None,
        )

    def queue_calls(self) -> list[str]:
        """The bodies of event calls to the server."""
        return [body for _, url, body in self.requests if "/gradio_api/" in url]

    def triggers(self) -> set[int]:
        """The components that event calls to the server started from, by Gradio's number.

        What follows an event, perhaps seconds later on a slow server, has the event's own.
        """
        return {json.loads(body)["trigger_id"] for body in self.queue_calls() if body}

    def commits(self) -> list[str]:
        """The bodies of commits."""
        return [body for body in self.queue_calls() if '"variant"' in body]


def open_map(page: Page, url: str, query: str = "") -> Traffic:
    """Open the app and wait until the map stands."""
    traffic = Traffic(page)
    page.goto(f"{url}/?{query}")
    page.wait_for_selector("#layer-map [role=gridcell] button[aria-label]")
    return traffic


def plan_on_page(page: Page) -> dict[str, object]:
    """The plan as the browser holds it."""
    return page.evaluate(f"{COMPONENT}.plan")


def python_preview(pack: dict[str, object], plan: dict[str, object]) -> Preview:
    """The same plan's preview in Python."""
    choice = read_commit({"overrides": {}, **plan}, pack)
    return make_plan(Analysis.from_dict(pack), **choice.arguments).preview()


def sentence(preview: Preview, llm_parameters: int) -> str:
    """The counting sentence that a preview stands for."""
    share = 100 * preview.parameters_touched / llm_parameters
    change = 100 * preview.relative_change
    return (
        f"{len(preview.selected)} of {preview.n_matrices} matrices merge · "
        f"{count(preview.parameters_touched)} of {count(llm_parameters)} language-model "
        f"parameters ({percent(share)}) · change {percent(change)} of ‖W‖"
    )


def count(number: int) -> str:
    """Three digits and a unit."""
    size, unit = next(
        (size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if number >= size
    )
    digits = 2 - math.floor(math.log10(number / size))
    return f"{number / size:.{digits}f} {unit}"


def percent(value: float) -> str:
    """Percent with as many digits as the page gives it."""
    return (
        f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 0.1 else f"{value:.1g} %"
    )


def expect_summary(page: Page, pack: dict[str, object]) -> None:
    """The sentence on the page says what Python says about the plan on the page."""
    preview = python_preview(pack, plan_on_page(page))
    llm_parameters = pack["totals"]["llm_parameters"]
    expect(page.locator("#layer-map .sum")).to_contain_text(sentence(preview, llm_parameters))


def received(page: Page, **values: object) -> None:
    """Python has received a plan with these values."""
    for key, value in values.items():
        text = re.compile(re.escape(f'"{key}": {json.dumps(value)}'))
        expect(page.locator("#received textarea")).to_have_value(text)


def text_of(download: Download) -> str:
    """What a downloaded file says."""
    return Path(download.path()).read_text(encoding="utf-8")


def csv_rows(download: Download) -> list[dict[str, str]]:
    """The rows of a downloaded CSV."""
    return list(csv.DictReader(io.StringIO(text_of(download))))
