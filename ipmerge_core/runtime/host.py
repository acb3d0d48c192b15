"""Query the host environment: operating system, and whether it is a Hugging Face Space."""

from __future__ import annotations

import os
import sys

from ipmerge_core.errors import RunError


def check_platform() -> None:
    """Check that the operating system is supported.

    Raises: RunError on Windows, which has neither `fcntl` nor `pwrite`.
    """
    if sys.platform == "win32":
        raise RunError(
            "IPMerge requires Linux or macOS: it uses file locks and positioned writes that are "
            "not available on Windows. On Windows, use WSL (Windows Subsystem for Linux)."
        )


def space_id() -> str:
    """Return the id of the Space, `owner/name`; empty elsewhere."""
    return os.environ.get("SPACE_ID", "")


def space_host() -> str:
    """Return the host name of the Space's page; empty elsewhere."""
    return os.environ.get("SPACE_HOST", "")


def is_hosted() -> bool:
    """Return whether the app runs on a public Space, for visitors who are not its owner."""
    return bool(space_id())
