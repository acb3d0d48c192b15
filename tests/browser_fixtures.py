"""Real headless browsers and a running app, shared by every browser test.

`chromium_page` is a fresh page (own profile, 1280 x 900); `new_page` makes pages of other sizes;
`app_url` starts `app.py` once in each worker, `explore_url` the Explore tab over packs of the
tests' own. Nothing here skips: where no Chromium is found the
test fails and says what to do.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Playwright

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM_NAMES = (  # the first renders as the others do, without their windows, in half the time
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
FIREFOX_NAMES = ("firefox-esr", "firefox")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
START_SECONDS = 90
PATIENCE = 30_000  # milliseconds for what a page is to show: a busy machine may take that long
SEEN_BEFORE = """try {
  const seen = { layout: "full", toured: true, dragged: true };
  if (!localStorage.getItem("ipmerge.map.v1")) localStorage.setItem("ipmerge.map.v1", JSON.stringify(seen));
} catch { /* a page without storage */ }"""  # noqa: E501
NO_CHROMIUM = (
    "No Chromium was found: looked at IPMERGE_CHROMIUM, at chromium-headless-shell, chromium and "
    "google-chrome on the PATH, and at playwright's own browser. Install one with "
    "`sudo apt-get install chromium` or `python -m playwright install chromium`, or set "
    "IPMERGE_CHROMIUM to the path of its executable."
)


NO_FIREFOX = (
    "No Firefox was found: looked at IPMERGE_FIREFOX and at firefox-esr and firefox on the PATH. "
    "Install one with `sudo apt-get install firefox-esr`, or set IPMERGE_FIREFOX to the path of "
    "its executable."
)


def find_chromium(playwright: Playwright) -> str:
    """Find a Chromium executable, or fail with a sentence that says what to do."""
    named = [os.environ.get("IPMERGE_CHROMIUM", "")]
    on_path = [shutil.which(name) or "" for name in CHROMIUM_NAMES]
    for candidate in [*named, *on_path, playwright.chromium.executable_path]:
        if candidate and Path(candidate).is_file():
            return candidate
    raise FileNotFoundError(NO_CHROMIUM)


def find_firefox() -> str:
    """Find a Firefox executable, or fail with a sentence that says what to do."""
    for candidate in [os.environ.get("IPMERGE_FIREFOX", ""), *FIREFOX_NAMES]:
        if candidate and (found := shutil.which(candidate)):
            return found
    raise FileNotFoundError(NO_FIREFOX)


def free_port() -> int:
    """A port of the loopback interface that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers; fail with its output if it stops or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"The server stopped with code {process.returncode}:\n{log.read_text()}"
            )
        try:
            with urllib.request.urlopen(f"{url}/config", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise TimeoutError(f"The server did not answer within {START_SECONDS} s:\n{log.read_text()}")


@contextmanager
def serving(log: Path, *command: str, port: int, warm_up: bool = False) -> Iterator[str]:
    """Run a Python program of this repository as a server; yield its address, then stop it.

    Its home folder lies beside the log, so that no test sees or touches the user's own runs. With
    `warm_up` it gets ready for a run and a question, as for users, which takes seconds of a core.
    """
    address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    address["IPMERGE_WARM_UP"] = "on" if warm_up else "off"
    home = {"IPMERGE_HOME": str(log.parent / "home")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **QUIET, **home, **address},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def app_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real app, started once as `python app.py` and stopped at the end."""
    log = tmp_path_factory.mktemp("app") / "app.log"
    with serving(log, "app.py", port=free_port(), warm_up=True) as url:
        yield url


@pytest.fixture(scope="session")
def explore_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a small app that shows the Explore tab over synthetic packs."""
    from explore_app import write_packs
    from explore_page import PACKS

    home, port = tmp_path_factory.mktemp("explore"), free_port()
    write_packs(home, PACKS)
    with serving(home / "log", "tests/explore_app.py", str(port), str(home), port=port) as url:
        yield url


@pytest.fixture(scope="session")
def playwright_driver() -> Iterator[Playwright]:
    """The driver behind all browsers; a thread can have only one."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def chromium(playwright_driver: Playwright) -> Iterator[Browser]:
    """One headless Chromium for all tests of a worker."""
    browser = playwright_driver.chromium.launch(
        executable_path=find_chromium(playwright_driver), headless=True, args=CHROMIUM_FLAGS
    )
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def firefox(playwright_driver: Playwright) -> Iterator[Browser]:
    """One headless Firefox, as it is installed: driven over WebDriver BiDi."""
    browser = playwright_driver.firefox.launch(
        executable_path=find_firefox(), channel="moz-firefox", headless=True
    )
    yield browser
    browser.close()


class Profiles:
    """Browser profiles that tests use one after another, each handed over as if it were new.

    A profile keeps what Chromium has fetched and compiled, which halves the time of a page's
    load; what a visitor leaves behind (cookies, storage of every kind, permissions) is removed.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._free: dict[tuple[object, ...], list[BrowserContext]] = {}
        self._keys: dict[BrowserContext, tuple[object, ...]] = {}

    def take(self, *, newcomer: bool, **options: object) -> BrowserContext:
        """A profile that nobody uses now, of a visitor who comes for the first time or not."""
        key = (newcomer, repr(sorted(options.items())))
        if self._free.get(key):
            context = self._free[key].pop()
        else:
            context = self._browser.new_context(**options)
            if not newcomer:
                context.add_init_script(SEEN_BEFORE)
        context.grant_permissions(options.get("permissions", []))
        self._keys[context] = key
        return context

    def give_back(self, context: BrowserContext) -> None:
        """Remove what the pages of a test left and keep the profile for the next one."""
        addresses = {frame.url for page in context.pages for frame in page.frames}
        for page in context.pages:
            page.close()
        context.clear_cookies()
        context.clear_permissions()
        self._clear_storage(context, {urlsplit(address)[:2] for address in addresses})
        self._free.setdefault(self._keys[context], []).append(context)

    def _clear_storage(self, context: BrowserContext, origins: set[tuple[str, str]]) -> None:
        page = context.new_page()
        session = context.new_cdp_session(page)
        for scheme, host in origins:
            if scheme.startswith("http"):
                what = {"origin": f"{scheme}://{host}", "storageTypes": "all"}
                session.send("Storage.clearDataForOrigin", what)
        page.close()


@pytest.fixture(scope="session")
def profiles(chromium: Browser) -> Profiles:
    """The profiles of a worker's browser."""
    return Profiles(chromium)


@pytest.fixture
def new_page(profiles: Profiles, request: pytest.FixtureRequest) -> Iterator[Callable[..., Page]]:
    """Make pages, each in its own profile: `new_page(width=390, height=844, **context options)`.

    The visitor has been here before: no tour is offered, and the map shows everything. With
    `newcomer=True` it is their first visit. A test that is tried again leaves a trace of each of
    its profiles in `test-results/`, for `playwright show-trace`.
    """
    contexts = []
    is_retry = getattr(request.node, "execution_count", 1) > 1

    def make(
        width: int = 1280, height: int = 900, *, newcomer: bool = False, **options: object
    ) -> Page:
        context = profiles.take(newcomer=newcomer, **options)
        contexts.append(context)
        if is_retry:
            context.tracing.start(screenshots=True, snapshots=True)
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.set_default_timeout(PATIENCE)
        return page

    yield make
    for number, context in enumerate(contexts, 1):
        if is_retry:
            name = re.sub(r"\W+", "-", request.node.nodeid).strip("-")
            context.tracing.stop(path=ROOT / "test-results" / f"{name}-{number}.zip")
        profiles.give_back(context)


@pytest.fixture
def chromium_page(new_page: Callable[..., Page]) -> Page:
    """A fresh page of 1280 x 900."""
    return new_page()
