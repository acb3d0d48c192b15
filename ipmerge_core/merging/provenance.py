"""Read how a merged model was made from the manifest `ipmerge.json` in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ipmerge_core.analysis.records import Sources
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    InvalidContentError,
    Name,
    Schema,
    parse_json,
    read_bounded,
)

MANIFEST = "ipmerge.json"


LARGEST = 128 * MEGABYTE


class Provenance(NamedTuple):
    """How a merged model was made."""

    plan: str  # the hash
    method: str  # a key of METHODS
    sources: Sources


@dataclass(frozen=True)
class _Plan:
    hash: Name
    method: Name


@dataclass(frozen=True)
class _Manifest:
    """The part of a manifest that identifies the merge; the rest is for people."""

    plan: _Plan
    sources: Sources


_MANIFEST = Schema[_Manifest](_Manifest)


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
        found = _MANIFEST.validate(parse_json(read_bounded(path, LARGEST), LARGEST))
    except (OSError, InvalidContentError):
        return None
    return Provenance(found.plan.hash, found.plan.method, found.sources)
