"""Targets of runs that end at once. They import no torch, so that a test can make many of them."""

from __future__ import annotations

import json
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
