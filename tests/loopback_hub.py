"""A stand-in for the hub on the loopback interface, which serves models from folders.

Only what huggingface_hub needs to resolve a commit, list its files and read them, whole or by
ranges. It counts the bytes that it sends, by path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The address of the stand-in, and the bytes it has sent of each file."""

    def __init__(self, models: Mapping[str, Path]) -> None:
        self.models, self.sent, self.address = dict(models), Counter[str](), ""


@contextlib.contextmanager
def loopback_hub(models: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders as the models of their names inside the block."""
    hub = Hub(models)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests readable."""

    def do_GET(self) -> None:
        self._answer(sends=True)

    def do_HEAD(self) -> None:
        self._answer(sends=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        folder = self.hub.models.get("/".join(parts[2:4]))
        if folder is None or "paths-info" not in parts:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        paths = json.loads(body)["paths"] if body.startswith("{") else _form(body)
        found = [_entry(folder, name) for name in paths if (folder / name).is_file()]
        self._send_json(found)

    def _answer(self, *, sends: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[:2])
        folder, rest = self.hub.models.get(name), parts[4:] if is_api else parts[2:]
        if folder is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif not is_api:
            self._send_file(folder, name, "/".join(rest[2:]), sends=sends)
        elif "tree" in rest:
            self._send_json([_entry(folder, each.name) for each in _files(folder)])
        else:
            files = [{"rfilename": each.name} for each in _files(folder)]
            self._send_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": files})

    def _send_file(self, folder: Path, name: str, file: str, *, sends: bool) -> None:
        if not (folder / file).is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = (folder / file).read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, chosen = 200, self.headers.get("Range", "")
        if chosen.startswith("bytes="):
            first, _, last = chosen.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if sends:
            self.hub.sent[f"{name}/{file}"] += len(data)
        self._send(status, data, headers, sends=sends)

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, data: bytes, headers: Mapping[str, str], *, sends: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if sends:
            self.wfile.write(data)


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_file())


def _entry(folder: Path, name: str) -> dict[str, object]:
    data = (folder / name).read_bytes()
    digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    return {"type": "file", "oid": digest, "size": len(data), "path": name}


def _form(body: str) -> list[str]:
    pairs = (pair.partition("=") for pair in body.split("&"))
    return [unquote(value) for key, _, value in pairs if key == "paths"]
