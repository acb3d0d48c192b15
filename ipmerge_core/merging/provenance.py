"""Read how a merged model was made from the manifest `ipmerge.json` in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ipmerge_core.analysis.records import Sources
from ipmerge_core.runtime.atomic import FileVersion, version_of

MANIFEST = "ipmerge.json"


class Provenance(NamedTuple):
    """How a merged model was made."""

    plan: str  # the hash
    method: str  # a key of METHODS
    sources: Sources
    files: Mapping[str, str] | None = None  # SHA-256 of the files copied from the MLLM, if recorded


def read_provenance(folder: Path) -> Provenance | None:
    """Read the provenance from a merged model's manifest; None if there is no manifest."""
    path = folder / MANIFEST
    try:
        return _read(path, version_of(path))
    except OSError:
        return None


@lru_cache(maxsize=256)
def _read(path: Path, _version: FileVersion) -> Provenance | None:
    try:
        content = json.loads(path.read_text("utf-8"))
        plan = content["plan"]
        return Provenance(
            str(plan["hash"]),
            str(plan["method"]),
            Sources.from_dict(content["sources"]),
            content.get("files"),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
