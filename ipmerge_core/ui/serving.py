"""Serve many visitors: compressed answers, one page for all, and a queue with a limit per kind.

In: an ASGI app and its queue, Gradio's. Out: the same app behind layers that compress, keep the
page for a few seconds and forget the sessions of finished calls, and a queue with a limit per kind.
Gradio compresses files by their extension only, so that the page itself, its largest answer, would
be sent as it is; and its queue has one limit, so that waiting questions would refuse quick calls.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from gradio.context import LocalContext
from gradio.route_utils import get_fn
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ipmerge_core.runtime.host import is_hosted

PAGE = "/"
COMPRESSED = ("/gradio_api/run/", "/gradio_api/info", "/config", "/theme.css")  # with the page
_EVENT = re.compile(r"/gradio_api/call/(?:v2/)?\w+/(\w+)")  # the answer of one call by its event
PAGE_SECONDS = 5.0  # for which one rendering of the page is sent to everybody
_READ = ("host", "x-forwarded-host", "x-forwarded-proto", "accept-encoding", "cookie")
_MOST_PAGES = 32
_FULL = "queue_full"  # gradio's name for this refusal
_LEVEL = 4  # of gzip: higher levels take much longer for little


class Compressed:
    """Compresses the page and JSON answers; event streams and downloads pass unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self._plain = app
        self._compressed = GZipMiddleware(app, minimum_size=1000, compresslevel=_LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = scope.get("path", "")
        chosen = scope["type"] == "http" and (path == PAGE or path.startswith(COMPRESSED))
        await (self._compressed if chosen else self._plain)(scope, receive, send)


class SharedPage:
    """Answers requests for the page that are alike with one rendering, for a few seconds.

    Rendering takes a core for about 60 ms. Requests are alike if all headers that Gradio reads for
    the page are equal, including cookies. Requests that arrive meanwhile wait for the rendering.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._kept: dict[tuple[Any, ...], tuple[float, list[Message]]] = {}
        self._turns: dict[tuple[Any, ...], asyncio.Lock] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] != PAGE or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = (scope["scheme"], scope["query_string"], *(headers.get(one, "") for one in _READ))
        async with self._turns.setdefault(key, asyncio.Lock()):
            now = time.monotonic()
            self._forget_before(now - PAGE_SECONDS)
            if key not in self._kept:
                self._kept[key] = (now, await self._render(scope, receive))
            messages = self._kept[key][1]
            if messages[0]["status"] != HTTPStatus.OK:
                del self._kept[key]
        for message in messages:
            await send(message)

    async def _render(self, scope: Scope, receive: Receive) -> list[Message]:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(dict(message))

        await self._app(scope, receive, keep)
        return messages

    def _forget_before(self, moment: float) -> None:
        """Forget old pages, and all if there are too many different ones."""
        old = [key for key, (made, _) in self._kept.items() if made < moment]
        for key in old if len(self._kept) < _MOST_PAGES else list(self._kept):
            del self._kept[key]
            if not self._turns[key].locked():
                del self._turns[key]


class AfterAnswers:
    """Calls `used` after the page or a call of a visitor has been answered.

    Args:
        app: the app.
        used: returns at once; it is called in the event loop.
    """

    def __init__(self, app: ASGIApp, used: Callable[[], None]) -> None:
        self._app, self._used = app, used

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, then call `used`."""
        await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        if scope["path"] == PAGE or scope["method"] == "POST":
            self._used()
        elif found := _EVENT.fullmatch(scope["path"]):
            _forget(scope["app"].state_holder, found[1])


def _forget(sessions: Any, event: str) -> None:  # noqa: ANN401 (gradio's StateHolder)
    """Forget the session of a call without one: Gradio names it after the event, and keeps it."""
    with sessions.lock:
        sessions.session_data.pop(event, None)
        sessions.time_last_used.pop(event, None)


def layers(used: Callable[[], None]) -> list[Middleware]:
    """Return the layers, for the argument `middleware` of the app."""
    return [Middleware(AfterAnswers, used=used), Middleware(SharedPage), Middleware(Compressed)]


def current_visitor() -> str:
    """Return the address of the visitor whose call is handled now; empty outside of a Space.

    A Space is behind a proxy, which names the visitor first in X-Forwarded-For. Visitors can name
    another address, so this divides a limit fairly between them but must not replace it.
    """
    request = LocalContext.request.get(None)
    if request is None or not is_hosted():
        return ""
    forwarded = request.headers.get("x-forwarded-for", "").partition(",")[0].strip()
    return forwarded or str(request.client.host if request.client else "")


def limit_waiting(queue: Any, most: Mapping[str, int]) -> None:  # noqa: ANN401 (gradio's Queue)
    """Refuse further calls of a kind while too many of it wait; other kinds are not affected.

    Args:
        queue: the queue of the app.
        most: number of waiting calls by `concurrency_id`.
    """
    push = queue.push

    async def push_if_room(body: Any, **rest: Any) -> Any:  # noqa: ANN401
        kind = get_fn(queue.blocks, None, body).concurrency_id
        waiting = queue.event_queue_per_concurrency_id.get(kind)
        if waiting and len(waiting.queue) >= most.get(kind, sys.maxsize):
            return False, f"{most[kind]} questions are waiting already. Ask again later.", _FULL
        return await push(body, **rest)

    queue.push = push_if_room
