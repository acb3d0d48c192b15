"""Import libraries whose imports are not thread-safe, or may fail although they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from functools import cache
from typing import Any, NamedTuple, cast

from ipmerge_core.errors import RunError, explained, first_line

IMPORTING = (
    threading.RLock()
)  # held while transformers, which imports its modules lazily, is imported


class Torchvision(NamedTuple):
    """Whether torchvision can be imported, and the error of an installed one that cannot."""

    works: bool
    failure: str = ""


@cache
def find_torchvision() -> Torchvision:
    """Import torchvision where it is installed; one that fails is treated as absent from then on.

    A torchvision for another build of torch fails while it is imported, and takes every image
    processor of transformers along, which only looks for an installed one. Call this before
    transformers is imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        return Torchvision(works=False)
    try:
        with IMPORTING, explained(lambda error: RunError(first_line(error))):
            importlib.import_module("torchvision")
    except RunError as error:
        # Python's own way to make a module absent in this process: find_spec returns None.
        cast("dict[str, Any]", sys.modules)["torchvision"] = None
        return Torchvision(works=False, failure=str(error))
    return Torchvision(works=True)
