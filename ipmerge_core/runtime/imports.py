"""Import libraries whose imports are not thread-safe."""

from __future__ import annotations

import threading

IMPORTING = (
    threading.RLock()
)  # held while transformers, which imports its modules lazily, is imported
