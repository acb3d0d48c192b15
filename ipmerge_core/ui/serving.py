"""Serve the page compressed, and get ready for work once a visitor has been answered.

In: an ASGI app, Gradio's. Out: the same app behind two layers. Gradio compresses files by their
extension only, so that the page itself, its largest answer, would be sent as it is.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

PAGE = "/"
COMPRESSED = ("/gradio_api/run/", "/gradio_api/info", "/config", "/theme.css")  # with the page
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
        if scope["type"] == "http" and (scope["path"] == PAGE or scope["method"] == "POST"):
            self._used()


def layers(used: Callable[[], None]) -> list[Middleware]:
    """Return both layers, for the argument `middleware` of the app."""
    return [Middleware(AfterAnswers, used=used), Middleware(Compressed)]
