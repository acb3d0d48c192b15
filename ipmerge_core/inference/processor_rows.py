"""Encode many conversations and decode many replies with few requests to a model's process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.processor_checks import checked_text, prompt_error
from ipmerge_core.inference.processor_process import RemoteProcessor
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.wire import pack_conversations, unpack_many


def encode_rows(
    processor: RemoteProcessor,
    conversations: Sequence[Sequence[Message]],
    stops: Sequence[threading.Event] = (),
) -> list[dict[str, Any] | ModelLoadError]:
    """Encode conversations as `RemoteProcessor.encode` does, each to its inputs or its own error.

    Raises: as the methods of `RemoteProcessor`, for errors that are not of one conversation.
    """
    plain, pixels = pack_conversations(conversations)
    reply, blob = processor.ask({"call": "encode_rows", "conversations": plain}, stops, pixels)
    rows = unpack_many(reply["rows"], blob)
    return [
        ModelLoadError(error)
        if error is not None
        else prompt_error(processor.folder.name, inputs) or inputs
        for inputs, error in zip(rows, reply["errors"], strict=True)
    ]


def decode_rows(
    processor: RemoteProcessor,
    rows: Sequence[Sequence[int]],
    stops: Sequence[threading.Event] = (),
) -> list[str]:
    """Decode the tokens of several replies to text, without special tokens.

    Raises: as the methods of `RemoteProcessor`.
    """
    request = {"call": "decode_rows", "rows": [list(map(int, ids)) for ids in rows]}
    texts = processor.ask(request, stops)[0]["texts"]
    return [
        checked_text(processor.folder.name, str(t), len(ids))
        for t, ids in zip(texts, rows, strict=True)
    ]
