"""Print the Chromium that the browser tests will use, installing browsers where there are none.

`make test` runs this first. The browser tests' own search comes first; if it finds nothing that
starts, Debian's package is tried (as root), then playwright's own; otherwise one sentence says
what to do. Playwright's driver may lack a library on a bare machine, and one file of tests needs
a Firefox: likewise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from browser_fixtures import CHROMIUM_NAMES, find_chromium, find_firefox
from playwright.sync_api import sync_playwright

ADVICE = (
    "The browser tests need Chromium; none was found and none could be installed. Install one "
    "(Debian or Ubuntu: apt-get install chromium) or name yours: "
    "IPMERGE_CHROMIUM=/path/to/chrome make test"
)
DRIVER_ADVICE = (
    "The browser tests need playwright's driver, which does not start here: {error}. On a bare "
    "Debian or Ubuntu it needs one library: apt-get install libatomic1"
)
PLAYWRIGHT = [sys.executable, "-m", "playwright"]


def main() -> None:
    """Print the path of a browser that starts, or say why there is none."""
    if driver_error() and may_use_apt():
        run(apt_get("libatomic1"))
    if error := driver_error():
        sys.exit(DRIVER_ADVICE.format(error=error))
    path = working_chromium()
    # Debian's packages come first, because they bring the libraries that a bare machine lacks.
    packages = CHROMIUM_NAMES[:2] if may_use_apt() else ()
    installers = [apt_get(package) for package in packages]
    for command in [*installers, [*PLAYWRIGHT, "install", "chromium"]]:
        if not path:
            run(command)
            path = working_chromium()
    if firefox_advice() and may_use_apt():
        run(apt_get("firefox-esr"))
    if advice := firefox_advice():
        sys.exit(advice)
    print(path or sys.exit(ADVICE))


def firefox_advice() -> str:
    """Say what to do where there is no Firefox, else nothing."""
    try:
        find_firefox()
    except FileNotFoundError as error:
        return str(error)
    return ""


def driver_error() -> str:
    """Return the last line of what playwright's driver complains of, or nothing."""
    answer = subprocess.run([*PLAYWRIGHT, "--version"], capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return ""
    return (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]


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


def may_use_apt() -> bool:
    """Whether this is Debian's family and we are root."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt_get(package: str) -> list[str]:
    """Make the command that installs a Debian package."""
    return ["sh", "-c", f"apt-get update -qq && apt-get install -y -qq {package}"]


def run(command: list[str]) -> None:
    """Run an installer and say so; what counts is what works afterwards."""
    print("Trying:", command[-1] if command[0] == "sh" else " ".join(command), file=sys.stderr)
    try:
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        print("No answer after five minutes.", file=sys.stderr)


if __name__ == "__main__":
    main()
