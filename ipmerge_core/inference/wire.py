"""Exchange messages between processes as JSON and safetensors.

Nothing is pickled, since unpickling runs code and one side reads untrusted files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from ipmerge_core.inference.prompts import Message

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MOST_JSON, _MOST_DATA = 1 << 24, 1 << 30  # bytes of one message


def send(connection: Connection, content: Mapping[str, Any], data: bytes = b"") -> None:
    """Send a JSON object and binary data. Raises: OSError if the other side is gone."""
    connection.send_bytes(json.dumps(content).encode())
    connection.send_bytes(data)


def receive(connection: Connection) -> tuple[dict[str, Any], bytes]:
    """Receive what `send` sent.

    Raises: EOFError or OSError if the other side is gone, or sends more than a prompt can need.
    """
    content: dict[str, Any] = json.loads(connection.recv_bytes(_MOST_JSON))
    return content, connection.recv_bytes(_MOST_DATA)


def pack_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], bytes]:
    """Convert messages to JSON values and the pixels of their images (RGB, in order)."""
    plain: list[dict[str, Any]] = []
    pixels: list[bytes] = []
    for role, text, images in messages:
        pixels += [image.convert("RGB").tobytes() for image in images]
        plain.append({"role": role, "text": text, "sizes": [image.size for image in images]})
    return plain, b"".join(pixels)


def unpack_messages(plain: Sequence[Mapping[str, Any]], pixels: bytes) -> list[Message]:
    """Reverse `pack_messages`."""
    from PIL import Image

    messages, start = [], 0
    for each in plain:
        images = []
        for width, height in each["sizes"]:
            stop = start + 3 * width * height
            images.append(Image.frombytes("RGB", (width, height), pixels[start:stop]))
            start = stop
        messages.append(Message(each["role"], each["text"], tuple(images)))
    return messages


def pack_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Separate a processor's output into JSON values and serialized tensors.

    Raises: TypeError for a value that is neither.
    """
    import torch
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value.contiguous()
        else:
            json.dumps(value)
            plain[name] = value
    return plain, save(tensors)


def pack_conversations(
    conversations: Sequence[Sequence[Message]],
) -> tuple[list[dict[str, Any]], bytes]:
    """Convert conversations to JSON values, each with the size of its pixels, and all pixels."""
    packed = [pack_messages(messages) for messages in conversations]
    plain = [{"messages": messages, "nbytes": len(pixels)} for messages, pixels in packed]
    return plain, b"".join(pixels for _, pixels in packed)


def unpack_conversations(
    plain: Sequence[Mapping[str, Any]], pixels: bytes
) -> Iterator[list[Message]]:
    """Reverse `pack_conversations`, one at a time."""
    start = 0
    for each in plain:
        stop = start + each["nbytes"]
        yield unpack_messages(each["messages"], pixels[start:stop])
        start = stop


def pack_many(prompts: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], bytes]:
    """Separate the outputs of a processor for several prompts, as `pack_inputs` does for one.

    The tensors of all prompts with one name and dtype are one tensor of the binary data.
    """
    import torch

    flat: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        tensors = {n: v for n, v in prompt.items() if isinstance(v, torch.Tensor)}
        for name, value in tensors.items():
            flat.setdefault(_joint(name, value.dtype), []).append(value.reshape(-1))
        rows.append(
            {
                "plain": {n: v for n, v in prompt.items() if n not in tensors},
                "shapes": {n: [_joint(n, v.dtype), *v.shape] for n, v in tensors.items()},
            }
        )
        json.dumps(rows[-1]["plain"])
    return rows, pack_inputs({key: torch.cat(values) for key, values in flat.items()})[1]


def unpack_many(rows: Sequence[Mapping[str, Any]], data: bytes) -> list[dict[str, Any]]:
    """Reverse `pack_many`."""
    flat = unpack_inputs({}, data)
    start = dict.fromkeys(flat, 0)
    prompts = []
    for row in rows:
        prompt = dict(row["plain"])
        for name, (key, *shape) in row["shapes"].items():
            stop = start[key] + math.prod(shape)
            # A copy, since a kept prompt would keep the tensors of all.
            prompt[name] = flat[key][start[key] : stop].reshape(shape).clone()
            start[key] = stop
        prompts.append(prompt)
    return prompts


def _joint(name: str, dtype: torch.dtype) -> str:
    return f"{name}|{dtype}"


def unpack_inputs(plain: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Reverse `pack_inputs`."""
    from safetensors.torch import load

    return {**plain, **load(data)}
