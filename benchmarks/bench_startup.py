"""Time from starting `python app.py` to the first page response.

    python benchmarks/bench_startup.py [--runs 5]

Each run is a new process on a free port; the page is requested every 10 ms until it responds. The
first run also reads the packages from disk and is reported separately. CPU seconds are those of the
app, so that other load has little effect. Also prints which heavy packages the process has loaded
by then (Linux).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser_fixtures import QUIET, free_port  # noqa: E402

HEAVY = ("torch", "transformers", "scipy", "sklearn")


class Start(NamedTuple):
    """One start of the app, measured at its first page response."""

    seconds: float
    processor_seconds: float
    heavy: set[str]


def start_app() -> Start:
    """Start the app, wait for its page, stop it."""
    port = free_port()
    address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=ROOT,
        env={**os.environ, **QUIET, **address},
        stdout=subprocess.DEVNULL,
    )
    try:
        while not answers(f"http://127.0.0.1:{port}/"):
            if process.poll() is not None:
                sys.exit(f"app.py ended with {process.returncode} before it answered.")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        return Start(seconds, processor_seconds_of(process.pid), loaded_by(process.pid))
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    """Whether the page is served yet."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.read())
    except (urllib.error.URLError, ConnectionError):
        return False


def processor_seconds_of(process: int) -> float:
    """Processor seconds that a process has used, in its own code and in the system's."""
    after_name = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    user, system = after_name.split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def loaded_by(process: int) -> set[str]:
    """Name the heavy packages whose libraries a process has mapped."""
    mapped = Path(f"/proc/{process}/maps").read_text(encoding="utf-8")
    return {name for name in HEAVY if f"/site-packages/{name}/" in mapped}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    count = parser.parse_args().runs
    print(machine(), "\n")
    first, *later = [start_app() for _ in range(count)]
    later = later or [first]
    rows = [
        ["first run", f"{first.seconds:.1f} s"],
        ["later runs, least", f"{min(start.seconds for start in later):.1f} s"],
        ["later runs, most", f"{max(start.seconds for start in later):.1f} s"],
        ["processor seconds, least", f"{min(start.processor_seconds for start in later):.1f} s"],
        [
            "heavy packages loaded",
            ", ".join(sorted(set.union(*(s.heavy for s in later)))) or "none",
        ],
    ]
    print(table(["`python app.py` to the first page", "measured"], rows))


if __name__ == "__main__":
    main()
