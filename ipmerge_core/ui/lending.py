"""Hand work to the process that is lent a GPU: its backend, stops, and messages as plain values.

In: what this process knows. Out: values that can be pickled, small and without weights, and their
counterparts in the other process, which loads the models itself.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.ui.backend import Backend

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.inference.precisions import Precision
    from ipmerge_core.inference.prompts import Message

_serving: dict[int, Backend] = {}  # by process; locks and models of another one cannot be used


def serve_lent(backend: Backend) -> None:
    """Let lent calls that run in this process use this backend."""
    _serving.clear()
    _serving[os.getpid()] = backend


class LentHost(NamedTuple):
    """The options of an app that the process with the GPU needs to load models as the app does."""

    device: str
    precision: Precision

    @classmethod
    def of(cls, backend: Backend) -> LentHost:
        """Return the options of a backend."""
        return cls(backend.device, backend.precision)

    def backend(self) -> Backend:
        """Return the backend of this process, which keeps its models for the next call."""
        if os.getpid() not in _serving:
            serve_lent(Backend(device=self.device, precision=self.precision))
        return _serving[os.getpid()]


@dataclass(frozen=True)
class StopFiles:
    """The stops of work that another process does, as files that both processes see.

    A file named by the number of a column stops that column. Without the folder everything stops.
    """

    folder: str

    def stop(self, columns: Iterable[int]) -> None:
        """Stop some columns; the folder must exist."""
        for column in columns:
            (Path(self.folder) / str(column)).touch()

    def read(self, stop_all: threading.Event, stops: Sequence[threading.Event] = ()) -> None:
        """Set the events of this process as the files state them."""
        if not Path(self.folder).is_dir():
            stop_all.set()
        for column, stop in enumerate(stops):
            if (Path(self.folder) / str(column)).exists():
                stop.set()


class PackedMessage(NamedTuple):
    """A message whose images are the bytes of PNG files."""

    role: Any
    text: str
    images: tuple[bytes, ...]

    @classmethod
    def of(cls, message: Message) -> PackedMessage:
        """Pack a message."""
        return cls(message.role, message.text, tuple(map(_png, message.images)))

    def unpack(self) -> Message:
        """Return the message in the process that reads it."""
        from ipmerge_core.inference.prompts import Message

        return Message(self.role, self.text, tuple(map(_read_image, self.images)))


def _png(image: Image) -> bytes:
    """Encode an image without loss, fast rather than small."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _read_image(data: bytes) -> Image:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return image.convert("RGB")
