"""Attack the app and the command line as hostile or unlucky visitors would, and print what held.

    python benchmarks/attack.py [--only D1 D8]      or: make attack

Starts the app on a free port of the loopback interface, once as a local app and once with the
settings of a Space, and sends it a bounded number of requests; command lines run in processes of
their own with a time limit. Nothing outside this machine is addressed. Exits with 1 if any attack
gets through.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser_fixtures import free_port, serving  # noqa: E402

PATIENCE = 60  # seconds for one request or command
QUICK = 2.0  # seconds within which other visitors are answered meanwhile
SHORT = 10.0  # seconds within which a command refuses what it cannot use
LONG = 180.0  # seconds within which a model's own code is stopped: loading, then its CPU seconds
DEMO = ROOT / "assets" / "demo"


class App(NamedTuple):
    """A running app: its address, its process and its home folder."""

    url: str
    process: int
    home: Path


class Outcome(NamedTuple):
    """Whether an attack was held, and what was measured."""

    held: bool
    measured: str


class Attack(NamedTuple):
    """One attack: its row, what it tries, and how."""

    row: str
    tries: str
    run: Callable[[App, App], Outcome]  # with the local app and with the Space


@contextmanager
def started(folder: Path, **environment: str) -> Iterator[App]:
    """Start `app.py` with its home in a folder of its own; stop it afterwards."""
    port, before = free_port(), dict(os.environ)
    os.environ.update(environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with serving(folder / "log", "app.py", port=port, warm_up=True) as url:
            yield App(url, listener(port), folder / "home")
    finally:
        os.environ.clear()
        os.environ.update(before)


def listener(port: int) -> int:
    """Return the process of the app that was started at a port (Linux)."""
    wanted = f"GRADIO_SERVER_PORT={port}".encode()
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if b"app.py" in command and wanted in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (OSError, ValueError):
            continue
    sys.exit(f"No process of the app was found at port {port}.")


def memory(process: int) -> float:
    """Return the resident memory of a process in MB (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


def request(app: App, path: str, body: bytes | None = None, host: str = "") -> tuple[int, bytes]:
    """Send one request; return its status and body, (0, ...) where none came in time."""
    headers = {"Content-Type": "application/json"} | ({"Host": host} if host else {})
    sent = urllib.request.Request(app.url + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(sent, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


def call(app: App, endpoint: str, *data: Any) -> tuple[bool, Any]:  # noqa: ANN401
    """Call an endpoint; return whether it succeeded, and its last value or its error."""
    body = json.dumps({"data": data}).encode()
    status, answer = request(app, f"/gradio_api/call/{endpoint}", body)
    if status != 200:
        return False, answer.decode(errors="replace")
    event = json.loads(answer)["event_id"]
    lines = request(app, f"/gradio_api/call/{endpoint}/{event}")[1].decode().splitlines()
    events = [line[len("event: ") :] for line in lines if line.startswith("event: ")]
    values = [line[len("data: ") :] for line in lines if line.startswith("data: ")]
    if not events or events[-1] not in ("complete", "error"):
        return False, "no answer"
    content = json.loads(values[-1]) if values else None
    if events[-1] == "complete":
        return True, content[0]
    return False, content.get("error") if isinstance(content, dict) else content


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and its seconds."""
    begun = time.perf_counter()
    return run(), time.perf_counter() - begun


def others_while(app: App, run: Callable[[], Any], most: float = 20.0) -> tuple[Any, float]:
    """Run an attack; return its result and the longest time that another visitor waited."""
    with ThreadPoolExecutor(1) as pool:
        attack, longest, deadline = pool.submit(run), 0.0, time.monotonic() + most
        while not attack.done() and time.monotonic() < deadline:
            longest = max(longest, timed(lambda: request(app, "/config"))[1])
            time.sleep(0.2)
        return attack.result(), longest


def command(*words: str, limit: float = PATIENCE, home: Path) -> tuple[int, str, float]:
    """Run `ipmerge`; return its exit code (124 past the limit), stderr and seconds."""
    environment = {**os.environ, "IPMERGE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ipmerge_core", *words],
            capture_output=True, text=True, timeout=limit, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, "", limit
    return done.returncode, done.stderr, time.perf_counter() - begun


def refused(code: int, said: str, seconds: float, limit: float = SHORT) -> Outcome:
    """Whether a command ended with one sentence in time."""
    held = code == 2 and "Traceback" not in said and seconds <= limit
    return Outcome(held, f"exit {code} in {seconds:.1f} s")


# The attacks, in the order of their rows.


def quadratic_text(local: App, _: App) -> Outcome:
    """A question of opening brackets, a nest of boxes, an unending fence."""
    longest = 0.0
    for token in (r"\(", r"\boxed{", "`", "$x ", "*a"):
        question = token * 16_000
        _answer, waited = others_while(
            local, lambda q=question: call(local, "answer_pair", "pack", q)
        )
        longest = max(longest, waited)
    return Outcome(longest <= QUICK, f"others waited at most {longest:.2f} s")


def endless_calibration(local: App, _: App) -> Outcome:
    """Ten million samples per side."""
    models = [f"--{role}={DEMO / role}" for role in ("mllm", "math", "base")]
    output = str(local.home / "calibration")
    words = ("calibrate", *models, "--limit", "10000000", "-o", output)
    code, said, seconds = command(*words, home=local.home)
    left = Path(output).exists()
    outcome = refused(code, said, seconds)
    return Outcome(outcome.held and not left, outcome.measured)


def endless_template(local: App, _: App) -> Outcome:
    """A chat template that doubles a text without end."""
    folder = local.home / "template"
    shutil.copytree(DEMO / "mllm", folder)
    doubling = "{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}"
    hostile = "{% set n = namespace(t='ab') %}" + doubling
    for entry in folder.glob("chat_template*"):
        entry.unlink()
    (folder / "chat_template.jinja").write_text(hostile + "{{ n.t }}")
    words = ("chat", str(folder), "--prompt", "What is 2 + 2?")
    return refused(*command(*words, limit=LONG, home=local.home), limit=LONG)


def duplicate_keys(local: App, _: App) -> Outcome:
    """A header of 0.6 MB that names one tensor 20 000 times."""
    folder = local.home / "duplicates"
    folder.mkdir(parents=True)
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = ("{" + ",".join([entry] * 12_000) + "}").encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "config.json").write_bytes((DEMO / "base" / "config.json").read_bytes())
    models = (f"--mllm={folder}", f"--math={DEMO / 'math'}", f"--base={DEMO / 'base'}")
    return refused(*command("check", *models, home=local.home))


def too_many_runs(local: App, _: App) -> Outcome:
    """Six merges at the same moment, where two may run."""

    def start(number: int) -> bool:
        return call(local, "merge_start", "pack", f"attack-{number}")[0]

    with ThreadPoolExecutor(6) as pool:
        accepted = sum(pool.map(start, range(6)))
    files = list((local.home / "runs").glob("*/status.json"))
    while any(json.loads(file.read_text())["state"] == "running" for file in files):
        time.sleep(0.1)
    ran = [json.loads(file.read_text()) for file in files]  # the demo's merge takes under a second
    most = max(
        sum(other["started"] <= run["started"] < other["updated"] for other in ran) for run in ran
    )
    return Outcome(most <= 2, f"{accepted} of 6 started, {most} at the same time, limit 2")


def server_paths(_: App, space: App) -> Outcome:
    """Errors of runs and refusals on a Space, searched for the server's folders."""
    said = [
        call(space, "merge_start", "pack", "../../outside")[1],
        call(space, "merge_start", "pack", "x" * 400)[1],
        call(space, "analyse_start", f"{DEMO}/mllm", [f"{DEMO}/math"], f"{DEMO}/base")[1],
        call(space, "job_status", "../../etc")[1],
        call(space, "pack", "../../../etc/passwd")[1],
    ]  # fmt: skip
    secret = (str(ROOT), str(space.home), str(Path.home()) + "/")
    shown = [text for text in map(str, said) if any(folder in text for folder in secret)]
    return Outcome(not shown, shown[0][:80] if shown else f"{len(said)} refusals, no folder")


def huge_image(local: App, _: App) -> Outcome:
    """A PNG of 19 000 000 x 1 pixels in a few kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    width = 19_000_000
    pixels = zlib.compress(bytes(1 + width * 3), 9)
    header = struct.pack(">IIBBBBB", width, 1, 8, 2, 0, 0, 0)
    image = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    before = memory(local.process)
    encoded = base64.b64encode(image).decode()
    (good, _said), seconds = timed(lambda: call(local, "answer_pair", "pack", "What?", encoded))
    grown = memory(local.process) - before
    return Outcome(
        not good and seconds <= SHORT and grown <= 200, f"{seconds:.1f} s, {grown:+.0f} MB"
    )


def huge_bodies(local: App, _: App) -> Outcome:
    """A body of 18 MB, a million overrides, 100 000 brackets, a file given by its address."""
    overrides = {f"layers.{i}": "on" for i in range(1_000_000)}
    bodies = [
        json.dumps({"data": ["pack", 0.4, 1.0, "first", "sum", overrides]}).encode(),
        b"[" * 100_000,
        json.dumps({"data": ["x" * 18_000_000]}).encode(),
        json.dumps({"data": ["pack", {"path": "http://127.0.0.1:1/x", "meta": {}}]}).encode(),
    ]

    def send() -> list[int]:
        return [request(local, "/gradio_api/call/preview", body)[0] for body in bodies]

    (statuses, waited), seconds = timed(lambda: others_while(local, send))
    held = statuses[0] == statuses[1] == statuses[3] == 400 and waited <= QUICK and seconds <= SHORT
    return Outcome(held, f"{statuses} in {seconds:.1f} s, others waited {waited:.2f} s")


def foreign_host(local: App, _: App) -> Outcome:
    """A page under a foreign name that was pointed at this machine."""
    status, _said = request(local, "/config", host="attacker.example")
    with urllib.request.urlopen(local.url, timeout=PATIENCE) as answer:
        headers = answer.headers
    wanted = ("Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy")
    missing = [name for name in wanted if name not in headers]
    return Outcome(status == 400 and not missing, f"status {status}, missing headers: {missing}")


def bad_packs(local: App, _: App) -> Outcome:
    """Damaged files in the packs folder of an app that starts."""
    folder = local.home.parent / "with-bad-packs"
    packs = folder / "home" / "packs"
    packs.mkdir(parents=True)
    contents = {"json": b"{", "utf8": b"\xff\xfe", "deep": b"[" * 100_000, "list": b"[]"}
    contents |= {"bomb": b'"' + b"x" * 50_000_000 + b'"', "types": b'{"version": [], "records": 3}'}
    for name, content in contents.items():
        (packs / f"{name}.pack.json.gz").write_bytes(gzip.compress(content))
    (packs / "zip.pack.json.gz").write_bytes(b"not compressed")
    (packs / "empty.pack.json.gz").write_bytes(b"")
    try:
        with started(folder) as app:
            good, listed = call(app, "packs")
    except (RuntimeError, TimeoutError) as error:
        return Outcome(False, f"the app did not start: {str(error)[-80:]}")
    measured = f"{len(contents) + 2} bad files, pairs listed: {len(listed)}"
    return Outcome(good and len(listed) == 1, measured)


def endless_pattern(local: App, _: App) -> Outcome:
    """A regular expression that backtracks without end, and a plain one."""
    seconds = {}
    for pattern in ("mlp", r"(.*.*.*.*.*.*.*.*.*.*)*=$"):
        words = ("plan", f"{DEMO}/pack.json.gz", "--include", pattern)
        output = str(local.home / f"pattern-{len(pattern)}.json")
        seconds[pattern] = command(*words, "-o", output, home=local.home)[2]
    plain, hostile = seconds.values()
    return Outcome(hostile <= 3 * plain, f"{hostile:.1f} s, a plain pattern {plain:.1f} s")


def crowd(local: App, _: App) -> Outcome:
    """Twenty visitors for fifteen seconds; the full figures are those of bench_load.py."""
    until, refusals, slowest = time.monotonic() + 15, [0], [0.0]

    def visit(_number: int) -> None:
        while time.monotonic() < until:
            for endpoint in ("preview", "pack"):
                (good, _said), seconds = timed(lambda e=endpoint: call(local, e, "pack"))
                refusals[0] += not good
                slowest[0] = max(slowest[0], seconds)
            time.sleep(2)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(visit, range(20)))
    return Outcome(not refusals[0], f"{refusals[0]} refusals, slowest answer {slowest[0]:.1f} s")


ATTACKS = [
    Attack("D1", "text that makes a search quadratic", quadratic_text),
    Attack("D2", "a calibration of ten million samples", endless_calibration),
    Attack("D3", "a chat template that doubles a text without end", endless_template),
    Attack("D4", "a weight file that names a tensor 12 000 times", duplicate_keys),
    Attack("D5", "six merges at once", too_many_runs),
    Attack("D7", "refusals of a Space that name its folders", server_paths),
    Attack("D8", "an image of 19 000 000 x 1 pixels", huge_image),
    Attack("D8", "bodies of 18 MB, a million values, an address to fetch", huge_bodies),
    Attack("D9", "a foreign host name; missing headers", foreign_host),
    Attack("D10", "damaged packs in the folder of an app that starts", bad_packs),
    Attack("D12", "a regular expression without end", endless_pattern),
    Attack("D13", "twenty visitors at once", crowd),
]


def main() -> int:
    """Run the attacks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="ROW", help="rows to try; by default all")
    only = parser.parse_args().only
    print(f"{machine()}\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        local, space = Path(folder) / "local", Path(folder) / "space"
        with started(local) as here, started(space, SPACE_ID="someone/ipmerge") as hosted:
            for attack in ATTACKS:
                if not only or attack.row in only:
                    outcome = attack.run(here, hosted)
                    verdict = "held" if outcome.held else "ESCAPED"
                    rows.append((attack.row, attack.tries, verdict, outcome.measured))
                    print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(table(("row", "attack", "outcome", "measured"), rows))
    return int(any(row[2] != "held" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
