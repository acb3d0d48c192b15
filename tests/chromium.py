"""Find a Chromium for the browser tests, or install one; used by `make test` and `conftest.py`.

`python tests/chromium.py` prints the path of a browser that starts. It looks at IPMERGE_CHROMIUM,
then for chromium or google-chrome on PATH, then for playwright's own browser. If there is none it
tries to install one (playwright's, then Debian's when root), and otherwise says what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ADVICE = (
    "The browser tests need Chromium and none was found or could be installed. Install one "
    "(Debian or Ubuntu: apt-get install chromium) or name yours: "
    "IPMERGE_CHROMIUM=/path/to/chrome make test"
)


def find_chromium() -> str | None:
    """Return the first browser that answers `--version`, or None."""
    return next((path for path in _candidates() if _starts(path)), None)


def _candidates() -> Iterator[str]:
    if named := os.environ.get("IPMERGE_CHROMIUM"):
        yield named
        return  # a browser that was asked for is never replaced by another one
    yield from filter(None, map(shutil.which, NAMES))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.executable_path


def _starts(path: str) -> bool:
    if not Path(path).is_file():
        return False
    answer = subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False)
    return answer.returncode == 0


def _install() -> None:
    commands = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        commands.append(["apt-get", "update", "-qq"])
        commands.append(["apt-get", "install", "-y", "-qq", "chromium"])
    for command in commands:
        if not find_chromium():
            print("Trying:", *command[-4:], file=sys.stderr)
            try:
                subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300, check=False)
            except subprocess.TimeoutExpired:
                print("No answer after five minutes.", file=sys.stderr)


def main() -> None:
    """Print the path of a browser that starts, installing one if there is none."""
    if not find_chromium() and not os.environ.get("IPMERGE_CHROMIUM"):
        _install()
    if not (path := find_chromium()):
        named = os.environ.get("IPMERGE_CHROMIUM")
        sys.exit(f"IPMERGE_CHROMIUM is '{named}', which does not start." if named else ADVICE)
    print(path)


if __name__ == "__main__":
    main()
