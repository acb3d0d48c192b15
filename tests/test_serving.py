"""What many visitors share: the page, the queue, the memory of sessions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from event_loops import finished, in_loop
from gradio.context import LocalContext
from gradio.data_classes import PredictBodyInternal
from gradio.state_holder import SessionState
from starlette.types import Receive, Scope, Send

from ipmerge_core.ui.app import WAITING, build_app
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.serving import (
    AfterAnswers,
    Compressed,
    SharedPage,
    current_visitor,
)


class Site:
    """A small ASGI app that counts how often it renders its page."""

    def __init__(self) -> None:
        self.rendered, self.status = 0, 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.rendered += 1
        number = self.rendered
        await asyncio.sleep(0.05)
        headers = [(b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        body = f"page {number} {scope['path']} ".encode() + b"x" * 5000
        await send({"type": "http.response.body", "body": body})


def get_all(app: object, *requests: tuple[str, dict[str, str]]) -> list[httpx.Response]:
    """Send the requests at the same time."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await asyncio.gather(*(client.get(p, headers=h) for p, h in requests))

    return finished(run())


def test_the_page_is_rendered_once_for_visitors_who_get_the_same():
    site = Site()
    answers = get_all(SharedPage(site), *[("/", {})] * 20)
    assert site.rendered == 1
    assert len({answer.text for answer in answers}) == 1
    others = [
        ("/", {"cookie": "a=1"}),
        ("/", {"host": "there"}),
        ("/", {"accept-encoding": "br"}),
        ("/?view=x", {}),
        ("/other", {}),
        ("/other", {}),
    ]
    get_all(SharedPage(site), *others)
    assert site.rendered == 7


def test_a_page_is_kept_for_seconds_and_an_error_not_at_all(monkeypatch):
    site = Site()
    shared = SharedPage(site)
    get_all(shared, ("/", {}))
    monkeypatch.setattr("ipmerge_core.ui.serving.PAGE_SECONDS", -1.0)
    get_all(shared, ("/", {}))
    assert site.rendered == 2
    monkeypatch.setattr("ipmerge_core.ui.serving.PAGE_SECONDS", 1e6)
    site.status, shared = 500, SharedPage(site)
    for _ in range(2):
        assert get_all(shared, ("/", {}))[0].status_code == 500
    assert site.rendered == 4


def test_different_pages_do_not_pile_up():
    site = Site()
    shared = SharedPage(site)
    for start in range(0, 200, 20):
        get_all(shared, *[(f"/?n={n}", {}) for n in range(start, start + 20)])
    assert len(shared._kept) <= 60


def test_the_page_and_answers_are_compressed_and_downloads_are_not():
    site = Compressed(Site())
    paths = ["/", "/config", "/gradio_api/run/predict", "/merged/x.zip", "/gradio_api/queue/data"]
    for encoding, expected in (("gzip", [True, True, True, False, False]), ("", [False] * 5)):
        answers = get_all(site, *[(path, {"accept-encoding": encoding}) for path in paths])
        found = [answer.headers.get("content-encoding") == "gzip" for answer in answers]
        assert found == expected
        assert all("xxx" in answer.text for answer in answers)


def test_a_visitor_is_an_address_on_a_space_and_nobody_elsewhere(monkeypatch):
    def told(forwarded: str | None) -> str:
        headers = {} if forwarded is None else {"x-forwarded-for": forwarded}
        client = SimpleNamespace(host="10.0.0.1")
        LocalContext.request.set(SimpleNamespace(headers=headers, client=client))
        return current_visitor()

    monkeypatch.delenv("SPACE_ID", raising=False)
    assert told("1.2.3.4") == ""
    monkeypatch.setenv("SPACE_ID", "someone/space")
    assert told("1.2.3.4, 10.0.0.7") == "1.2.3.4"
    assert told(None) == told("") == "10.0.0.1"
    LocalContext.request.set(None)
    assert current_visitor() == ""


def test_a_call_without_a_session_leaves_none_behind():
    holder = SimpleNamespace(lock=threading.Lock(), session_data={}, time_last_used={})
    used: list[int] = []
    app = AfterAnswers(Site(), lambda: used.append(1))

    async def with_sessions(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "app": SimpleNamespace(state_holder=holder)}, receive, send)

    def left(path: str) -> set[str]:
        holder.session_data = {"e1": 1, "e2": 2, "a": 3}
        holder.time_last_used = dict(holder.session_data)
        get_all(with_sessions, (path, {}))
        assert holder.time_last_used == holder.session_data
        return set(holder.session_data)

    assert left("/gradio_api/call/preview/e1") == {"e2", "a"}
    assert left("/gradio_api/call/v2/preview/e2") == {"e1", "a"}
    assert left("/gradio_api/heartbeat/a") == {"e1", "e2", "a"}
    assert not used
    assert left("/") == {"e1", "e2", "a"}
    assert used == [1]


# --- the app itself ---


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gr.Blocks]:
    """The app, built but not served."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPMERGE_HOME", str(tmp_path_factory.mktemp("serving")))
        yield in_loop(lambda: build_app(Backend()))


def test_waiting_questions_are_limited_and_previews_are_not(blocks):
    queue = blocks._queue
    number = {fn.api_name: fn._id for fn in blocks.fns.values()}

    def push(name: str) -> tuple[bool, str, str]:
        body = PredictBodyInternal(data=[], fn_index=number[name], session_hash="visitor")
        return finished(queue.push(body=body, request=None, username=None))

    for _ in range(WAITING["models"]):
        assert push("answer_pair")[2] == "success"
    refusal = (False, "32 questions are waiting already. Ask again later.", "queue_full")
    assert push("answer_pair") == refusal
    assert all(push("preview")[0] for _ in range(40))


def test_a_session_holds_no_configuration_of_components(blocks):
    session = SessionState(blocks)
    assert not dict.keys(session.config_values)
    session._update_value_in_config(next(iter(session.blocks_config.blocks)), "value")
    assert not dict.keys(session.config_values)
    assert len(session.blocks_config.blocks) > 100
