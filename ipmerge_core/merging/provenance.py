"""Read how a merged model was made from the manifest `ipmerge.json` in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import CheckpointError, RunError
from ipmerge_core.runtime.atomic import FileVersion, version_of
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
from ipmerge_core.runtime.paths import resolve_path

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

MANIFEST = "ipmerge.json"


LARGEST = 128 * MEGABYTE


class Provenance(NamedTuple):
    """How a merged model was made."""

    plan: str  # the hash
    method: str  # a key of METHODS
    sources: Sources
    digest: str = ""  # of the plan; "" in manifests from before it was recorded
    tensors: frozenset[str] = frozenset()  # the names of all tensors
    files: Mapping[str, str] | None = None  # SHA-256 of the files copied from the MLLM, if recorded
    content: Mapping[str, Any] = MappingProxyType({})  # what the manifest says of the plan


@dataclass(frozen=True)
class _Plan:
    hash: Name
    method: Name
    digest: Name = ""


@dataclass(frozen=True)
class _Manifest:
    """The part of a manifest that identifies the merge; the rest is for people."""

    plan: _Plan
    sources: Sources
    tensors: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] | None = None


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
    path = resolve_path(folder) / MANIFEST
    content: dict[str, Any] = _KIND.content(path)
    _KIND.validate(_RESULT, content, path)
    return content


def read_provenance(folder: Path) -> Provenance | None:
    """Read the provenance from a merged model's manifest; None if there is no manifest."""
    path = folder / MANIFEST
    try:
        return _read(path, version_of(path))
    except OSError:
        return None


def is_finished(plan: MergePlan, out: str | Path) -> bool:
    """Return whether `out` contains the model of this plan, complete, from an earlier run.

    Compared are the digest of the plan, the fingerprints of its sources and the headers; a folder
    without a manifest, or with that of another plan, is not. Raises: RunError for an invalid path.
    """
    from ipmerge_core.models.checkpoint import Checkpoint  # takes torch

    folder = resolve_path(out)
    made = read_provenance(folder)
    if made is None or made.digest != plan.digest:
        return False
    known = [source.fingerprint for source in made.sources.all()]
    if known != [source.fingerprint for source in plan.sources.all()]:
        return False
    try:
        return Checkpoint.open(folder).tensors.keys() == made.tensors
    except CheckpointError:  # such as a shard that is missing
        return False


@lru_cache(maxsize=256)
def _read(path: Path, _version: FileVersion) -> Provenance | None:
    try:
        content = parse_json(read_bounded(path, LARGEST), LARGEST)
        found = _MANIFEST.validate(content)
    except (OSError, InvalidContentError):
        return None
    plan = found.plan
    names = frozenset(found.tensors)
    facts = dict(content["plan"])
    return Provenance(plan.hash, plan.method, found.sources, plan.digest, names, found.files, facts)
