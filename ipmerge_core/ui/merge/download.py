"""Stream a finished model as one zip file, without a copy on the server.

In: a run's id and key. Out: a stored (uncompressed) zip of the model folder. The folder itself is
not in the paths that Gradio serves.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ipmerge_core.errors import RunError
from ipmerge_core.ui.errors import sentence_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from ipmerge_core.ui.backend import Backend

PATH = "/ipmerge/download/{job}"
_PIECE = 1 << 20  # bytes read at a time


def download_link(job: str, key: str) -> str:
    """Return the download URL, relative to the page."""
    return f"{PATH.lstrip('/').format(job=job)}?key={quote(key)}"


def download_route(backend: Backend) -> Route:
    """Return the route that serves finished models."""

    def download(request: Request) -> Response:
        job, key = request.path_params["job"], request.query_params.get("key", "")
        try:
            folder = finished_folder(backend, job, key)
        except RunError as error:
            return PlainTextResponse(sentence_of(error), status_code=404)
        headers = {"Content-Disposition": f'attachment; filename="{folder.name}.zip"'}
        return StreamingResponse(zip_pieces(folder), media_type="application/zip", headers=headers)

    return Route(PATH, download)


def finished_folder(backend: Backend, job: str, key: str) -> Path:
    """Return a finished run's model folder. Raises: RunError without the run's key."""
    status = backend.store.status(job)
    if not backend.store.holds_key(job, key):
        raise RunError("Only the browser that started this run can download its model.")
    folder = Path(str(status.arguments.get("out", "")))
    if status.state != "finished" or not folder.is_dir():
        raise RunError(f"The run '{status.title}' has no finished model folder.")
    return folder


def zip_pieces(folder: Path) -> Iterator[bytes]:
    """Yield the bytes of a zip of the files in a folder in pieces."""
    target = _Pieces()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            with (
                path.open("rb") as source,
                archive.open(f"{folder.name}/{path.name}", "w", force_zip64=True) as entry,
            ):
                while piece := source.read(_PIECE):
                    entry.write(piece)
                    yield target.take()
    yield target.take()


class _Pieces(io.RawIOBase):
    """A write-only file that cannot seek and hands out what was written to it."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._waiting.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """Return what has been written since the last call."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        return data
