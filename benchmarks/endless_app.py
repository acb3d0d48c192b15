"""The real app with models that never end an answer before its limit of tokens.

Run as a program it serves until it is stopped. Used by `bench_chat_page.py`: the answers of the
demo models are too short to type into the prompt while they arrive.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ipmerge_core.adapters.live import LiveModel

quick_stream = LiveModel.stream


def endless_stream(
    live: LiveModel, rows: Sequence[Any], stops: Sequence[Any] = ()
) -> Iterator[Any]:
    """Answer without the token that ends an answer."""
    config = live.loaded.model.generation_config
    ends = config.eos_token_id
    config.suppress_tokens = ends if isinstance(ends, list) else [ends]
    yield from quick_stream(live, rows, stops)


if __name__ == "__main__":
    from ipmerge_core.ui.app import launch

    LiveModel.stream = endless_stream  # type: ignore[method-assign, assignment]
    launch()
