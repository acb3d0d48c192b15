"""Targets of runs that end at once or not at all. They import no torch, so a test can make many."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from ipmerge_core.errors import RunError


def write_manifest(out: str, manifest: dict[str, object]) -> Iterator[dict[str, int]]:
    """Leave behind what tells a merged model's folder from others."""
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "ipmerge.json").write_text(json.dumps(manifest))
    yield {"index": 1}


def fail(out: str, manifest: dict[str, object]) -> Iterator[dict[str, int]]:
    """End as a run does that was refused."""
    yield {"index": 1}
    raise RunError(f"No room for {manifest['format']} in {Path(out).name}.")


def idle(**_: object) -> Iterator[dict[str, int]]:
    """Stand for a run that takes longer than any test, and writes nothing."""
    for number in range(6000):
        time.sleep(0.05)
        yield {"index": number}
