"""Read what requests of the API contain: conversations and images, checked as untrusted input."""

from __future__ import annotations

import base64
import binascii
import functools
import inspect
import io
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from ipmerge_core.errors import RunError
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.prompts import Message

P = ParamSpec("P")
R = TypeVar("R")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}
LARGEST_IMAGE = 15_000_000  # bytes, before base64
MOST_IMAGES, MOST_MESSAGES = 8, 40  # of one conversation


def typed(endpoint: Callable[P, R]) -> Callable[P, R]:
    """Wrap an endpoint so that it refuses texts, numbers and truth values of another type.

    Lists and objects are checked by the endpoints themselves. Raises: RunError.
    """
    signature = inspect.signature(endpoint)

    def check(*args: P.args, **kwargs: P.kwargs) -> None:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kinds, words = _KINDS.get(str(signature.parameters[name].annotation), ((), ""))
            is_truth = isinstance(value, bool) and bool not in kinds
            if kinds and (is_truth or not isinstance(value, kinds)):
                label = name.rstrip("_").replace("_", " ")
                raise RunError(f"{label} is {value!r:.80}; expected {words}.")

    if inspect.isgeneratorfunction(endpoint):

        @functools.wraps(endpoint)
        def stepping(*args: P.args, **kwargs: P.kwargs) -> Any:  # noqa: ANN401
            check(*args, **kwargs)
            yield from endpoint(*args, **kwargs)

        return stepping

    @functools.wraps(endpoint)
    def at_once(*args: P.args, **kwargs: P.kwargs) -> R:
        check(*args, **kwargs)
        return endpoint(*args, **kwargs)

    return at_once


def read_conversation(
    question: object, images: object, history: object, system: object
) -> list[Message]:
    """Check and convert the conversation of a request. Raises: RunError."""
    if not isinstance(images, list) or not isinstance(history, list):
        raise RunError("`images` and `history` must be lists.")
    if len(images) > MOST_IMAGES or len(history) > MOST_MESSAGES:
        raise RunError(
            f"The conversation has {len(images)} images and {len(history)} earlier messages; the "
            f"maximum is {MOST_IMAGES} and {MOST_MESSAGES}."
        )
    before = [Message("system", str(system))] if system else []
    pictures = tuple(open_image(decoded_image(str(image))) for image in images)
    return [*before, *map(_message, history), Message("user", str(question), pictures)]


def _message(given: object) -> Message:
    role = given.get("role") if isinstance(given, Mapping) else None
    text = given.get("text") if isinstance(given, Mapping) else None
    if role not in ("user", "assistant") or not isinstance(text, str):
        raise RunError('A message must have a "role", user or assistant, and a "text".')
    return Message("user" if role == "user" else "assistant", text)


def decoded_image(image: str) -> io.BytesIO:
    """Decode a base64 image, with or without a `data:` prefix."""
    _, _, data = image.rpartition(",")
    if len(data) > LARGEST_IMAGE * 4 / 3 + 4:
        raise RunError(f"The image is larger than {LARGEST_IMAGE / 1e6:.0f} MB. Use a smaller one.")
    try:
        return io.BytesIO(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError) as error:
        raise RunError("The image is not a base64-encoded PNG, JPEG or WebP file.") from error
