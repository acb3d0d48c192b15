"""Measure the app under the load of many clients, on loopback.

    python benchmarks/bench_load.py [--clients 50] [--seconds 180] [--answers 10] [--url URL]

Starts `app.py` over the demo models with an empty home folder, or takes the one at --url. It
answers one question, and its memory is read once it rests. Then every client requests one page and
one pack, commits a plan every 5 s as the layer map does, and requests a preview every 10 s; some
ask for 16 tokens once. Clients arrive evenly within --arrive seconds. Prints the quantiles of the
times, the refusals, and the memory after the load, once the app rests again. The clients run on the
same machine and are part of its load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser_fixtures import free_port, serving  # noqa: E402

COMMIT_SECONDS, PREVIEW_SECONDS = 5.0, 10.0
REST_SECONDS = 60.0
PATIENCE = 120.0  # seconds for one answer
TARGETS = {"page": None, "pack": 1.0, "commit": 0.4, "preview": 1.0, "answer": None}
# The arguments of /answer_pair: question, image, plan, settings, both sides and their keys.
QUESTION = ["pack", "What is 7 + 5?", "", 0.4, 1.0, "first", "sum", 0.0, 16, 0]
QUESTION += ["base", "plan", "", ""]


class App(NamedTuple):
    """A running app: its address, its process, and the event of a commit."""

    url: str
    process: psutil.Process | None
    commit: int


class Times:
    """The seconds that calls took, and the ones that were refused, by kind."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.refused: Counter[str] = Counter()
        self.errors: set[str] = set()

    async def of(self, kind: str, call: Awaitable[object]) -> None:
        """Time a call."""
        started = time.perf_counter()
        try:
            await call
        except (httpx.HTTPError, RuntimeError) as error:
            self.refused[kind] += 1
            self.errors.add(f"{kind}: {str(error)[:200] or type(error).__name__}")
            return
        self.seconds[kind].append(time.perf_counter() - started)

    def rows(self) -> list[list[str]]:
        """Format the table."""
        rows = []
        for kind, target in TARGETS.items():
            values = sorted(self.seconds[kind])
            if not values:
                values = [float("nan")]
            at = [values[int(q * (len(values) - 1))] for q in (0.5, 0.95, 1.0)]
            bar = "" if target is None else f"{target:g} s"
            numbers = [f"{value:.2f} s" for value in at]
            rows.append(
                [kind, str(len(self.seconds[kind])), *numbers, bar, str(self.refused[kind])]
            )
        return rows


def main() -> None:
    """Start the app, load it, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--answers", type=int, default=10, help="clients that ask for 16 tokens")
    parser.add_argument("--arrive", type=float, default=5.0, help="seconds")
    parser.add_argument("--rest", type=float, default=REST_SECONDS, help="seconds")
    parser.add_argument("--url", help="an app that is already running")
    options = parser.parse_args()
    print(machine(), "\n")
    with opened(options.url) as app:
        asyncio.run(measure(app, options))


@contextmanager
def opened(url: str | None) -> Iterator[App]:
    """Start an app and stop it at the end, or take the one at an address."""
    if url:
        yield App(url, None, commit_of(url))
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder) / "log", "app.py", port=free_port(), warm_up=True) as address,
    ):
        process = psutil.Process().children()[-1]
        yield App(address, process, commit_of(address))


def commit_of(url: str) -> int:
    """Return the number of the event that the layer map triggers at the end of a drag."""
    config = httpx.get(f"{url}/config", timeout=PATIENCE).json()
    found = [
        one["id"]
        for one in config["dependencies"]
        if any(event == "commit" for _, event in one["targets"])
    ]
    return int(found[0])


async def measure(app: App, options: argparse.Namespace) -> None:
    """Answer once, load, rest, and print."""
    async with new_client(app) as client:
        await call(client, "answer_pair", QUESTION)
    await asyncio.sleep(options.rest / 2)
    before = nbytes(app)
    times = Times()
    asking = random.sample(range(options.clients), min(options.answers, options.clients))
    started = time.perf_counter()
    ends = started + options.seconds
    await asyncio.gather(
        *(
            visit(app, times, ends, after=n * options.arrive / options.clients, asks=n in asking)
            for n in range(options.clients)
        )
    )
    most = nbytes(app)
    async with new_client(app) as client:
        sizes = [len((await client.send(r, stream=False)).content) for r in [page_request(client)]]
        sent = await wire_size(client)
    await asyncio.sleep(options.rest)
    after = nbytes(app)
    print(f"{options.clients} clients for {options.seconds:g} s:\n")
    head = ["call", "answered", "p50", "p95", "most", "p95 at most", "refused"]
    print(table(head, times.rows()))
    print(f"\nPage: {sent / 1e3:.0f} kB sent for {sizes[0] / 1e3:.0f} kB.")
    print(
        f"Memory of the app: {before / 1e6:.0f} MB after one answer, {most / 1e6:.0f} MB at the "
        f"end of the load, {after / 1e6:.0f} MB after {options.rest:g} s of rest: "
        f"{(after - before) / 1e6:+.0f} MB (at most +100 MB)."
    )
    for error in sorted(times.errors):
        print(f"Refused: {error}")


async def visit(app: App, times: Times, ends: float, *, after: float, asks: bool) -> None:
    """Do what one visitor does until the end."""
    await asyncio.sleep(after)
    async with new_client(app) as client:
        await times.of("page", fetched(client.get("/")))
        await times.of("pack", call(client, "pack", ["pack"]))
        jobs = [
            repeat(COMMIT_SECONDS, ends, lambda: times.of("commit", commit(client, app.commit))),
            repeat(PREVIEW_SECONDS, ends, lambda: times.of("preview", preview(client))),
        ]
        if asks:
            jobs.append(
                later(ends, lambda: times.of("answer", call(client, "answer_pair", QUESTION)))
            )
        await asyncio.gather(*jobs)


async def repeat(every: float, ends: float, act: Any) -> None:  # noqa: ANN401 (a callable)
    """Act at an even pace, from a random moment on."""
    await asyncio.sleep(random.random() * every)
    while (now := time.perf_counter()) < ends:
        await act()
        await asyncio.sleep(max(0.0, now + every - time.perf_counter()))


async def later(ends: float, act: Any) -> None:  # noqa: ANN401
    """Act once, in the first half of the time."""
    await asyncio.sleep(random.random() * max(ends - time.perf_counter(), 0) / 2)
    await act()


def new_client(app: App) -> httpx.AsyncClient:
    """A client that drops an idle connection before the server does, after five seconds.

    A browser connects again where it meets a closed one; httpx reports an error.
    """
    return httpx.AsyncClient(
        base_url=app.url, timeout=PATIENCE, limits=httpx.Limits(keepalive_expiry=4)
    )


def page_request(client: httpx.AsyncClient) -> httpx.Request:
    """The request for the page."""
    return client.build_request("GET", "/")


async def wire_size(client: httpx.AsyncClient) -> int:
    """The bytes that the page takes on the wire."""
    answer = await client.send(page_request(client), stream=True)
    size = sum([len(chunk) async for chunk in answer.aiter_raw()])
    await answer.aclose()
    return size


async def fetched(answer: Awaitable[httpx.Response]) -> httpx.Response:
    """Wait for an answer that is not an error."""
    found = await answer
    if found.is_error:
        raise RuntimeError(f"{found.status_code} {found.text[:200]}")
    return found


async def commit(client: httpx.AsyncClient, event: int) -> None:
    """Send the plan as the layer map does at the end of a drag."""
    plan = {
        "s": round(random.random(), 3),
        "lambda": 1.0,
        "similarity": "first",
        "variant": "sum",
        "overrides": {},
    }
    body = {
        "data": ["pack", None],
        "fn_index": event,
        "session_hash": f"load{id(client)}",
        "event_data": plan,
        "trigger_id": None,
    }
    await fetched(client.post("/gradio_api/run/predict", json=body))


async def preview(client: httpx.AsyncClient) -> None:
    """Ask for a preview of a random plan."""
    await call(client, "preview", ["pack", round(random.random(), 3), 1.0, "first", "sum", {}])


async def call(client: httpx.AsyncClient, name: str, data: list[Any]) -> None:
    """Call an endpoint as the documentation of the API says, and wait for its last answer."""
    event = (await fetched(client.post(f"/gradio_api/call/{name}", json={"data": data}))).json()
    ending = ""
    async with client.stream("GET", f"/gradio_api/call/{name}/{event['event_id']}") as answer:
        async for line in answer.aiter_lines():
            ending = line.removeprefix("event: ") if line.startswith("event: ") else ending
            if ending == "error" and line.startswith("data: "):
                raise RuntimeError(json.loads(line.removeprefix("data: ")))
    if ending != "complete":
        raise RuntimeError(f"the answer ended with '{ending}'")


def nbytes(app: App) -> int:
    """Return the resident memory of the app's own process."""
    return int(app.process.memory_info().rss) if app.process else 0


if __name__ == "__main__":
    main()
