"""Combine encoded conversations to one batch.

In: what the processor returned for each, a batch of one. Out: one batch, left-padded where the
prompts differ in length, or None where the inputs of a family cannot be combined. No model here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Their second dimension is never that of the tokens.
_PIXELS = ("pixel", "image", "video", "audio", "aspect", "patch")


def combine_inputs(encoded: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any] | None:
    """Return one batch of several encoded prompts; None if they cannot be combined.

    Args:
        encoded: inputs of a model, each a batch of one.
        pad: the id of the padding token.
    """
    if len(encoded) == 1:
        return dict(encoded[0])
    if len({frozenset(inputs) for inputs in encoded}) != 1:
        return None
    length = max(inputs["input_ids"].shape[1] for inputs in encoded)
    is_padded = any(inputs["input_ids"].shape[1] != length for inputs in encoded)
    if is_padded and "attention_mask" not in encoded[0]:
        return None
    combined: dict[str, Any] = {}
    for name in encoded[0]:
        values = [inputs[name] for inputs in encoded]
        found = _combined(name, values, encoded, length, pad)
        if found is None:
            return None
        combined[name] = found
    return combined


def _combined(
    name: str, values: list[Any], encoded: Sequence[Mapping[str, Any]], length: int, pad: int
) -> Any:  # noqa: ANN401
    import torch

    if not all(isinstance(value, torch.Tensor) for value in values):
        return values[0] if all(value == values[0] for value in values) else None
    if _is_per_token(name, values[0], encoded[0]):
        fill = pad if name == "input_ids" else 0
        values = [_padded(value, length, fill) for value in values]
    if len({(value.dtype, *value.shape[1:]) for value in values}) != 1:
        return None
    return torch.cat(values)


def _is_per_token(name: str, value: Tensor, inputs: Mapping[str, Any]) -> bool:
    return value.shape[:2] == inputs["input_ids"].shape and not name.startswith(_PIXELS)


def _padded(value: Tensor, length: int, fill: int) -> Tensor:
    """Extend the token dimension at its start."""
    import torch

    missing = length - value.shape[1]
    return torch.cat([value.new_full((1, missing, *value.shape[2:]), fill), value], dim=1)
