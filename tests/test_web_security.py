"""Requests that are refused before Gradio sees them, and the headers of every response."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from ipmerge_core.ui import web_security
from ipmerge_core.ui.errors import public_text
from ipmerge_core.ui.web_security import ALLOWED_HOSTS, LARGEST_BODY, MOST_VALUES

CALL = "/gradio_api/call/preview"


async def echo(request: Request) -> Response:
    """Answer with the size of the body that arrived."""
    return PlainTextResponse(str(len(await request.body())))


def client(
    base_url: str = "http://127.0.0.1:7860", *, server_name: str | None = None
) -> TestClient:
    """A client of an app that answers everything, behind the middleware."""
    routes = [Route("/{path:path}", echo, methods=["GET", "POST"])]
    app = Starlette(routes=routes, middleware=[web_security.web_security(server_name)])
    return TestClient(app, base_url=base_url)


def post(body: bytes, path: str = CALL) -> tuple[int, str]:
    """Post a body; return the status and the text of the answer."""
    answer = client().post(path, content=body, headers={"Content-Type": "application/json"})
    return answer.status_code, answer.text


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:7860", "localhost", "LOCALHOST:80", "[::1]:7860", "192.0.2.7", "a.localhost"],
)
def test_an_address_and_the_local_names_are_served(host: str) -> None:
    assert client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org:7860", "localhost.org", ""])
def test_a_name_that_a_foreign_page_may_control_is_refused(host: str) -> None:
    answer = client().get("/", headers={"Host": host})
    assert answer.status_code == 400
    assert host.partition(":")[0] in answer.text
    assert ALLOWED_HOSTS in answer.text


def test_the_names_of_this_host_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED_HOSTS, "models.example.org, other.example.org")
    for name in ("models.example.org", "other.example.org:8000", "box"):
        assert client(server_name="box").get("/", headers={"Host": name}).status_code == 200


def test_a_space_is_served_at_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/ipmerge")
    answer = client().get("/", headers={"Host": "someone-ipmerge.hf.space"})
    assert answer.status_code == 200
    assert (
        "frame-ancestors 'self' https://huggingface.co" in answer.headers["Content-Security-Policy"]
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "example.org"])
def test_every_response_has_the_headers(host: str) -> None:
    headers = client().get("/", headers={"Host": host}).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "strict-origin-when-cross-origin"
    policy = headers["Content-Security-Policy"]
    assert "object-src 'none'" in policy
    assert "huggingface.co" not in policy


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"[" * 100_000, "values"),
        (b"[" * 5_000 + b"]" * 5_000, "nests values"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nests values"),
        (json.dumps({"data": [{str(i): "on" for i in range(MOST_VALUES + 2)}]}).encode(), "values"),
        (b'"' + b"x" * LARGEST_BODY + b'"', "larger than 21 MB"),
    ],
    ids=["open", "deep list", "deep object", "many values", "large"],
)
def test_bodies_are_bounded(body: bytes, expected: str) -> None:
    status, text = post(body)
    assert (status, expected in text) == (400, True)
    assert text.count(".") == 2  # what, and what to do


@pytest.mark.parametrize("path", ["http://127.0.0.1/x", " HTTPS://example.org", "//example.org/x"])
def test_the_server_fetches_no_address_of_a_visitor(path: str) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    nested: list[Any] = [file, {"files": [file]}, [[file]]]
    for data in nested:
        status, text = post(json.dumps({"data": [data]}).encode())
        assert (status, "Upload" in text) == (400, True)
    escaped = b'{"data": [{"p\\u0061th": "http:\\/\\/127.0.0.1\\/x"}]}'
    assert post(escaped)[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b'{"data": ["pack", 0.4, {"a": "on"}]}',
        b'{"data": [{"path": "image.png"}]}',
    ],
)
def test_other_bodies_arrive_unchanged(body: bytes) -> None:
    assert post(body) == (200, str(len(body)))


def test_an_upload_is_passed_on_as_it_arrives() -> None:
    body = b"x" * (LARGEST_BODY + 1)
    assert post(body, "/gradio_api/upload") == (200, str(len(body)))


def test_a_space_shows_no_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "No such file: '/usr/lib/x/y.json' of google/gemma-2, https://a.example/b, 3/4"
    assert public_text(text) == text
    monkeypatch.setenv("SPACE_ID", "someone/ipmerge")
    assert public_text(text) == text.replace("/usr/lib/x/", "")
