"""Define the strip: a `gr.HTML` component that shows the answers to one question over lambda.

In: `{"question", "note", "error", "cells": [{"gain", "state", "text", "answer", "verdict"}]}`. Out:
the browser event `take` with the gain of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ipmerge_core.planning.map_variants import LARGEST_LAMBDA
from ipmerge_core.tasks.answers import is_right, stated_result
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.recorded import Reference
from ipmerge_core.ui.safe_text import clean_text
from ipmerge_core.ui.web.component import Component

MODULE = Path(__file__).with_name("strip.js")
GAINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0)
LONGEST_TEXT = 4000  # characters of an answer in a cell


class Strip(Component):
    """A component that shows the answers to one question over lambda."""

    def __init__(
        self,
        value: dict[str, Any] | None = None,
        elem_id: str = "lambda-strip",
        *,
        render: bool = True,
    ) -> None:
        super().__init__(value, elem_id, MODULE, render=render)


def content_of(
    question: str,
    sides: Sequence[Side],
    reference: Reference | None,
    *,
    chosen: float,
    note: str = "",
) -> dict[str, Any]:
    """Return the content of the component; `chosen` is lambda of the chosen merge."""
    gains = zip(GAINS, sides, strict=True)
    return {
        "question": question,
        "note": note,
        "running": any(not side.is_over for side in sides),
        "cells": [_cell(gain, side, reference, gain == chosen) for gain, side in gains],
    }


def _cell(gain: float, side: Side, reference: Reference | None, is_chosen: bool) -> dict[str, Any]:
    verdict = ""
    if reference is not None and side.state == "finished":
        verdict = "right" if is_right(reference, side.text) else "wrong"
    return {
        "gain": gain,
        "label": f"{gain:g}",
        "state": side.state,
        "text": clean_text(side.text)[:LONGEST_TEXT],
        "answer": stated_result(side.text) or "",
        "verdict": verdict,
        "facts": ", ".join(_facts(side)),
        "note": side.note,
        "chosen": is_chosen,
    }


def _facts(side: Side) -> list[str]:
    counted = [f"{side.tokens} tokens"] if side.tokens else []
    return [*counted, *(["cut off"] if side.cut_off else [])]


def taken_gain(event: gr.EventData) -> float | None:
    """Return the gain that a `take` event names; None if it is not one of the dial."""
    gain = event._data.get("gain") if isinstance(event._data, dict) else None
    if not isinstance(gain, int | float) or isinstance(gain, bool):
        return None
    return float(gain) if 0 <= gain <= LARGEST_LAMBDA else None
