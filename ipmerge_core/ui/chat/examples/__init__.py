"""Define the recorded examples: a `gr.HTML` component with one button per example.

In: `{"examples": [{"question", "outcome", "image"}]}`. Out: the browser event `pick` with the
number of an example.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ipmerge_core.ui.chat.recorded import Example
from ipmerge_core.ui.web.component import Component

MODULE = Path(__file__).with_name("examples.js")
THUMBNAIL = 80  # pixels of the longer side
OUTCOMES = {
    "fixed": "✓ fixed",
    "broken": "✕ broken",
    "both right": "= both correct",
    "both wrong": "= both wrong",
}


class Examples(Component):
    """A component that lists recorded examples."""

    def __init__(
        self, value: dict[str, Any] | None = None, elem_id: str = "examples", *, render: bool = True
    ) -> None:
        super().__init__(value, elem_id, MODULE, render=render)


def content_of(examples: Sequence[Example]) -> dict[str, Any]:
    """Return the content of the component."""
    return {
        "examples": [
            {
                "question": example.reference.question,
                "outcome": OUTCOMES[example.outcome],
                "image": _thumbnail(example.image),
            }
            for example in examples
        ]
    }


@lru_cache(maxsize=256)
def _thumbnail(path: Path) -> str:
    """Return a small image as a data address; empty if the file cannot be read."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        content = io.BytesIO()
        small.save(content, "PNG", optimize=True)
    except (OSError, ValueError):
        return ""
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def picked(event: gr.EventData, examples: Sequence[Example]) -> Example | None:
    """Return the example that a `pick` event names; None if there is none."""
    number = event._data.get("number") if isinstance(event._data, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return examples[number] if 0 <= number < len(examples) else None
