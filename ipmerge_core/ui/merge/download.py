"""A finished model as one zip file, made while it is sent: nothing is copied on the server.

In: a run's id and the key of whoever started it. Out: a stored (uncompressed) zip of the model
folder, streamed. The folder stays outside of what Gradio serves to everybody.
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
    """Return the address, relative to the page, under which the owner finds the file."""
    return f"{PATH.lstrip('/').format(job=job)}?key={quote(key)}"


def download_route(backend: Backend) -> Route:
    """Return the route under which finished runs are downloaded."""

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
    """Return a finished run's model folder. Raises: RunError for anybody but its owner."""
    status = backend.store.status(job)
    if not backend.store.holds_key(job, key):
        raise RunError("Only the browser that started this run can download its model.")
    folder = Path(str(status.arguments.get("out", "")))
    if status.state != "finished" or not folder.is_dir():
        raise RunError(f"The run '{status.title}' has no finished model folder.")
    return folder


def zip_pieces(folder: Path) -> Iterator[bytes]:
    """Yield the bytes of a zip of the files in a folder, a piece at a time."""
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
    """A file that cannot be rewound: what is written waits to be taken."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._waiting.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        return data
