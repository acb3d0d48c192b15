"""Read how a merged model was made from the manifest `ipmerge.json` in its folder."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.analysis.records import Sources

MANIFEST = "ipmerge.json"


class Provenance(NamedTuple):
    """How a merged model was made."""

    plan: str  # the hash
    method: str  # a key of METHODS
    sources: Sources
    content: dict[str, Any]  # what the manifest says of the plan


def read_provenance(folder: Path) -> Provenance | None:
    """Read the provenance from a merged model's manifest; None if there is no manifest."""
    path = folder / MANIFEST
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _read(path: Path, _modified: int) -> Provenance | None:
    try:
        content = json.loads(path.read_text("utf-8"))
        plan = content["plan"]
        sources = Sources.from_dict(content["sources"])
        return Provenance(str(plan["hash"]), str(plan["method"]), sources, dict(plan))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
