"""Encode many conversations with one call of a processor, where that changes no tensor.

In: a `ModelProcessor` and conversations. Out: for each the inputs that `ModelProcessor.encode`
returns, or its error. One call per conversation costs more than resizing a small picture. A batch
consists of conversations with pictures of one size, which no processor pads or tiles differently;
the first one of a size is compared with single calls, and if anything differs, all are encoded one
at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.prompts import Message, render_chat

if TYPE_CHECKING:
    from ipmerge_core.inference.encoding import ModelProcessor

Encoded: TypeAlias = dict[str, Any] | ModelLoadError
Sizes: TypeAlias = tuple[tuple[int, int], ...]  # of the pictures of a conversation

_MOST_PIXELS = 1 << 18  # of a picture; the time for larger ones is that of their pixels
_MOST_CHARACTERS = 4000  # of a prompt, since all are padded to the longest


def encode_batch(
    model: ModelProcessor, conversations: Iterable[Sequence[Message]]
) -> list[Encoded]:
    """Encode conversations, each to its inputs or its error; large pictures are not collected.

    Raises: ModelLoadError that was caused by a MemoryError, which ends the process.
    """
    found: dict[int, Encoded] = {}
    alike: dict[Sizes, dict[int, Sequence[Message]]] = {}
    for row, messages in enumerate(conversations):
        sizes = tuple(image.size for message in messages for image in message.images)
        small = all(width * height <= _MOST_PIXELS for width, height in sizes)
        if len(sizes) <= 1 and small and model.exact_batches.get(sizes, True):
            alike.setdefault(sizes, {})[row] = messages
        else:
            found[row] = _single(model, messages)
    for sizes, rows in alike.items():
        found |= zip(rows, _encode_alike(model, sizes, list(rows.values())), strict=True)
    return [found[row] for row in sorted(found)]


def _encode_alike(
    model: ModelProcessor, sizes: Sizes, conversations: Sequence[Sequence[Message]]
) -> list[Encoded]:
    """Encode conversations whose pictures have one size."""
    prompts: list[dict[str, Any] | None] = [None] * len(conversations)
    if len(conversations) > 1:
        prompts = _together(model, conversations) or prompts
        if sizes not in model.exact_batches:
            model.exact_batches[sizes] = _are_exact(model, conversations, prompts)
    exact = model.exact_batches.get(sizes, False)
    return [
        prompt if exact and prompt is not None else _single(model, messages)
        for messages, prompt in zip(conversations, prompts, strict=True)
    ]


def _together(
    model: ModelProcessor, conversations: Sequence[Sequence[Message]]
) -> list[dict[str, Any] | None] | None:
    """Encode with one call; None for a conversation, or for all, that need a call of their own."""
    texts: dict[int, str] = {}
    for row, messages in enumerate(conversations):
        try:
            prompt = render_chat(model.chat_format, messages, model.layouts)
        except ModelLoadError:
            continue
        if not prompt.verbatim and len(prompt.text) <= _MOST_CHARACTERS:
            texts[row] = prompt.text
    images = [image for row in texts for message in conversations[row] for image in message.images]
    try:
        inputs = model.call(list(texts.values()), images, padding=True, padding_side="left")
    except Exception:  # noqa: BLE001 (of untrusted files; the single calls raise and describe it)
        return None
    split = _split(inputs, len(texts))
    if split is None:
        return None
    rows = dict(zip(texts, split, strict=True))
    return [rows.get(row) for row in range(len(conversations))]


def _split(inputs: dict[str, Any], count: int) -> list[dict[str, Any]] | None:
    """Split a padded batch into its rows without padding; None if its tensors are not by row."""
    import torch

    if not count or not all(isinstance(value, torch.Tensor) for value in inputs.values()):
        return None
    shape, mask = inputs["input_ids"].shape, inputs.get("attention_mask")
    if mask is None or mask.shape != shape or any(len(v) % count for v in inputs.values()):
        return None
    lengths = mask.sum(1).tolist()
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in inputs.items():
        for row, part in enumerate(value.chunk(count)):
            rows[row][name] = part[:, -lengths[row] :] if value.shape == shape else part
    return rows


def _are_exact(
    model: ModelProcessor,
    conversations: Sequence[Sequence[Message]],
    prompts: Sequence[dict[str, Any] | None],
) -> bool:
    """Whether the shortest and the longest prompt of a batch are those of single calls."""
    rows = [row for row, prompt in enumerate(prompts) if prompt is not None]
    rows.sort(key=lambda row: len(conversations[row][-1].text))
    if not rows:
        return False
    return all(
        _are_equal(_single(model, conversations[row]), prompts[row]) for row in {rows[0], rows[-1]}
    )


def _are_equal(one: Encoded, other: dict[str, Any] | None) -> bool:
    import torch

    if isinstance(one, ModelLoadError) or other is None or one.keys() != other.keys():
        return False
    return all(
        isinstance(value, torch.Tensor)
        and value.dtype == other[name].dtype
        and torch.equal(value, other[name])
        for name, value in one.items()
    )


def _single(model: ModelProcessor, messages: Sequence[Message]) -> Encoded:
    try:
        return model.encode(messages)
    except ModelLoadError as error:
        if isinstance(error.__cause__, MemoryError):
            raise
        return error
