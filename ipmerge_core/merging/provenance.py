"""Read how a merged model was made from the manifest `ipmerge.json` in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import RunError
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    Count,
    FileKind,
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


@dataclass(frozen=True)
class _Result:
    """The part of a manifest that the command line prints."""

    n_merged: Count
    device: Name


_RESULT = Schema[_Result](_Result)
_KIND = FileKind("a manifest", "Delete the folder and merge again.", RunError, largest=LARGEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the whole manifest of a finished merge. Raises: RunError if it is damaged."""
    path = Path(folder).expanduser() / MANIFEST
    content: dict[str, Any] = _KIND.content(path)
    _KIND.validate(_RESULT, content, path)
    return content


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
