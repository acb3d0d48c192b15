"""Check every HTTP request before Gradio sees it, and add security headers to every response.

In: requests of strangers. Out: a refusal in one sentence, or the request unchanged. A request must
name this host, so that a foreign page cannot reach a local app through a name that it controls (DNS
rebinding); its JSON body is bounded in bytes, values and nesting, and may not ask the server to
fetch an address. The headers keep browsers from guessing types, from loading scripts of other hosts
and from showing the app in a frame of any site but a Space's own page.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.host import is_hosted

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALLOWED_HOSTS = "IPMERGE_ALLOWED_HOSTS"  # environment: more names of this host, with commas between
LARGEST_BODY = 21_000_000  # bytes of JSON: an image of 15 MB in base64
MOST_VALUES = 50_000  # in one JSON body
DEEPEST = 64  # nested lists and objects in one JSON body
UPLOAD = "/gradio_api/upload"  # multipart; bounded by Gradio's `max_file_size`

_OWN_FRAMES = "'self' http://localhost:* http://127.0.0.1:*"  # a notebook shows the app in a frame
_SPACE_FRAMES = "'self' https://huggingface.co https://*.hf.space"
_POLICY = (
    # Gradio makes functions from strings and has inline scripts and styles.
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors {frames}"
)


class WebSecurity:
    """ASGI middleware that refuses foreign hosts and oversized bodies and adds headers."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        frames = _SPACE_FRAMES if is_hosted() else _OWN_FRAMES
        self._headers = {
            "Content-Security-Policy": _POLICY.format(frames=frames),
            "Referrer-Policy": "strict-origin-when-cross-origin",
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or pass it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        try:
            self._check_host(Headers(scope=scope).get("host", ""))
            checked = await _checked_body(scope, receive)
        except RunError as error:
            refusal = PlainTextResponse(str(error), status_code=400)
            await refusal(scope, receive, with_headers)
            return
        await self._app(scope, checked, with_headers)

    def _check_host(self, header: str) -> None:
        """Check that a request is for this host. Raises: RunError."""
        name = host_name(header)
        if is_hosted() or is_address(name) or name in self._hosts or name.endswith(".localhost"):
            return
        raise RunError(
            f"This app is not served as '{name[:100]}'. If you serve it under that name, add it to "
            f"the environment variable {ALLOWED_HOSTS}."
        )


def web_security(server_name: str | None) -> Middleware:
    """Return the middleware for an app served at `server_name` and at its usual names."""
    named = os.environ.get(ALLOWED_HOSTS, "").split(",")
    own = ["localhost", socket.gethostname(), server_name or "", *(name.strip() for name in named)]
    return Middleware(WebSecurity, hosts=[name for name in own if name])


def host_name(header: str) -> str:
    """Return the name or address in a Host header, without its port.

    >>> host_name("LocalHost:7860"), host_name("[::1]:7860"), host_name("[::1]")
    ('localhost', '::1', '::1')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def is_address(name: str) -> bool:
    """Return whether a host is named by its address; no foreign page can redirect an address.

    >>> is_address("127.0.0.1"), is_address("example.org")
    (True, False)
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_values(content: Any) -> None:  # noqa: ANN401 (parsed JSON)
    """Check the nesting of the values of a JSON body, and that none is to be fetched.

    Gradio fetches a file whose `path` is an address, with no bound on its size.

    Raises: RunError.
    """
    level = [content]
    for _ in range(DEEPEST):
        level = [value for parent in level for value in _children(parent)]
        if not level:
            return
    raise RunError(f"The request nests values more than {DEEPEST} levels deep. Send a flatter one.")


def _children(value: Any) -> Iterator[Any]:  # noqa: ANN401
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and path.strip().lower().startswith(("http:", "https:", "//")):
            raise RunError("A file is given by its address. Upload the file instead.")
        yield from value.values()
    elif isinstance(value, list):
        yield from value


async def _checked_body(scope: Scope, receive: Receive) -> Receive:
    """Read and check a JSON body; return a `receive` that delivers it. Raises: RunError."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    if scope["type"] != "http" or scope["method"] != "POST" or path.startswith(UPLOAD):
        return receive
    body = await _read_body(receive)
    if body:
        check_values(_parsed(body))
    delivered = False

    async def replay() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _read_body(receive: Receive) -> bytes:
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > LARGEST_BODY:
            raise RunError(
                f"The request is larger than {LARGEST_BODY / 1e6:.0f} MB. Send a smaller one."
            )
        more = message.get("more_body", False)
    return b"".join(pieces)


def _parsed(body: bytes) -> Any:  # noqa: ANN401
    """Parse a JSON body of few values; what is not JSON is bounded in bytes. Raises: RunError."""
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MOST_VALUES:
        raise RunError(f"The request has more than {MOST_VALUES} values. Send fewer.")
    try:
        return json.loads(body)
    except RecursionError as error:
        raise RunError("The request nests values too deeply. Send a flatter one.") from error
    except ValueError:
        return None
