"""What this process runs on: an operating system, the user's machine or a Hugging Face Space."""

from __future__ import annotations

import os
import sys

from ipmerge_core.errors import RunError


def check_platform() -> None:
    """Refuse to start where files cannot be locked and written as this package does.

    Raises: RunError on Windows, which has neither `fcntl` nor `pwrite`.
    """
    if sys.platform == "win32":
        raise RunError(
            "IPMerge needs Linux or macOS: it locks and writes files in ways that Windows does "
            "not offer. On Windows, run it in WSL (Windows Subsystem for Linux)."
        )


def space_id() -> str:
    """Return the id of the Space, `owner/name`; empty elsewhere."""
    return os.environ.get("SPACE_ID", "")


def space_host() -> str:
    """Return the host name of the Space's page; empty elsewhere."""
    return os.environ.get("SPACE_HOST", "")


def is_hosted() -> bool:
    """Whether the app is public: it runs on a Space, for visitors who are not its owner."""
    return bool(space_id())
