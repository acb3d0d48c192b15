"""Check what the processor of a model returns, before it reaches the model or the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ipmerge_core.errors import ModelLoadError

MOST_PROMPT_TOKENS = 32_768
_LONGEST_TOKEN = 1000  # characters, on average over a text


def prompt_error(name: str, inputs: Mapping[str, Any]) -> ModelLoadError | None:
    """Return the error for an encoded prompt of too many tokens; `name` is the model."""
    count = inputs["input_ids"].shape[1]
    if count <= MOST_PROMPT_TOKENS:
        return None
    return ModelLoadError(
        f"The prompt of '{name}' has {count} tokens; the maximum is {MOST_PROMPT_TOKENS}. Use a "
        f"shorter question or a smaller image, and check the chat template of the model."
    )


def checked_text(name: str, text: str, count: int) -> str:
    """Return the text of `count` tokens. Raises: ModelLoadError if it is too long for them."""
    if len(text) > _LONGEST_TOKEN * (1 + count):
        raise ModelLoadError(
            f"The tokenizer of '{name}' decodes {count} tokens to {len(text)} characters. Is "
            f"tokenizer.json that of this model?"
        )
    return text
