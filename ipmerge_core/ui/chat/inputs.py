"""Gather the values that every handler that asks a model reads, in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.layout import Parts
from ipmerge_core.ui.chat.recorded import Reference
from ipmerge_core.ui.chat.turns import Past, Turn
from ipmerge_core.ui.errors import QUIET

# Of a listener that runs a model: one question at a time, whoever asks it.
MODELS: dict[str, Any] = {**QUIET, "concurrency_id": "models", "concurrency_limit": 1}


class Inputs(NamedTuple):
    """The values of the components that `inputs_of` lists."""

    turns: list[Turn]
    past: list[Past]
    given: Reference | None
    held: Held
    settings: tuple[Any, ...]

    @classmethod
    def read(cls, values: Sequence[Any]) -> Inputs:
        """Read the values in the order of `inputs_of`."""
        turns, past, given, *rest = values
        n_held = len(Held._fields)
        return cls(turns, past, given, Held(*rest[:n_held]), tuple(rest[n_held:]))


def inputs_of(parts: Parts) -> list[Any]:
    """List the components that a handler reads with `Inputs.read`."""
    states = [parts.turns, parts.past, parts.given]
    return [*states, *parts.choice.asked, *parts.settings.inputs]


def session_of(request: gr.Request) -> str:
    """Return the session of a visitor's page."""
    return str(request.session_hash)
