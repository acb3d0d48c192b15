"""Print the Chromium that the browser tests will use, installing one if there is none.

`make test` runs this first. The browser tests' own search comes first; if it finds nothing that
starts, Debian's package is tried (as root), then playwright's own; otherwise one sentence says
what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from browser_fixtures import find_chromium
from playwright.sync_api import sync_playwright

ADVICE = (
    "The browser tests need Chromium; none was found and none could be installed. Install one "
    "(Debian or Ubuntu: apt-get install chromium) or name yours: "
    "IPMERGE_CHROMIUM=/path/to/chrome make test"
)


def working_chromium() -> str | None:
    """Return the browser that the tests find, if it answers `--version`."""
    with sync_playwright() as playwright:
        try:
            path = find_chromium(playwright)
        except FileNotFoundError:
            return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False)
    except OSError:
        return None
    return path if answer.returncode == 0 else None


def installers() -> list[list[str]]:
    """Commands that may bring a Chromium, in the order to try them.

    Debian's package comes first, because it brings the libraries that a bare machine lacks.
    """
    playwrights_own = [sys.executable, "-m", "playwright", "install", "chromium"]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        update_and_install = "apt-get update -qq && apt-get install -y -qq chromium"
        return [["sh", "-c", update_and_install], playwrights_own]
    return [playwrights_own]


def main() -> None:
    """Print the path of a browser that starts, or say why there is none."""
    path = working_chromium()
    for command in installers():
        if path:
            break
        print("No Chromium found. Trying:", *command[-3:], file=sys.stderr)
        try:
            subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            print("No answer after five minutes.", file=sys.stderr)
        path = working_chromium()
    print(path or sys.exit(ADVICE))


if __name__ == "__main__":
    main()
