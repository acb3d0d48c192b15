"""Import gradio in half the usual time, without side effects on source folders, for many sessions.

Each gradio component class writes an editor stub (`.pyi`) next to its source file when the class is
created. That takes half of gradio's import time, and for the component of this package it would
leave a file that type checkers then prefer. The stubs serve editors only, so none is written here.

Each session keeps the configuration of every component for Gradio's deep links, which this app does
not use. They take more time than a call, so a session here starts without them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

from ipmerge_core.runtime.host import is_hosted


def import_gradio() -> None:
    """Import gradio once, with telemetry off, no stub files, and no token on a Space."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if is_hosted():  # requests of users must not use the owner's token
        os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    getfile = inspect.getfile
    inspect.getfile = _no_source_file  # type: ignore[assignment]
    try:
        import gradio.component_meta
    finally:
        inspect.getfile = getfile
    gradio.component_meta.create_or_modify_pyi = _write_no_stub  # type: ignore[assignment]
    from gradio.state_holder import SessionState

    SessionState.__init__ = partialmethod(_start_session, SessionState.__init__)  # type: ignore


def _no_source_file(_: object) -> str:
    """Act as if the class had no source file; gradio then writes no stub for it."""
    raise OSError("no source file")


def _write_no_stub(*_: object) -> None:
    """Replace gradio's stub writer for component classes of this package."""


class _NotKept(dict[int, dict[str, Any]]):
    """Acts as the configurations of all components, each empty, and keeps none."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: int) -> dict[str, Any]:
        return {}

    def __setitem__(self, key: int, value: dict[str, Any]) -> None:
        """Discard a configuration."""


def _start_session(session: Any, start: Callable[..., None], blocks: Any) -> None:  # noqa: ANN401
    """Start a session of gradio without the configurations of the components of `blocks`."""
    start(session, SimpleNamespace(default_config=blocks.default_config, blocks={}))
    session.config_values = _NotKept()
