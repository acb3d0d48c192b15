"""Read how a merged model was made from the manifest `ipmerge.json` in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import CheckpointError
from ipmerge_core.runtime.atomic import FileVersion, version_of
from ipmerge_core.runtime.paths import resolve_path

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

MANIFEST = "ipmerge.json"


class Provenance(NamedTuple):
    """How a merged model was made."""

    plan: str  # the hash
    method: str  # a key of METHODS
    sources: Sources
    digest: str = ""  # of the plan; "" in manifests from before it was recorded
    tensors: frozenset[str] = frozenset()  # the names of all tensors
    files: Mapping[str, str] | None = None  # SHA-256 of the files copied from the MLLM, if recorded


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
        content = json.loads(path.read_text("utf-8"))
        plan = content["plan"]
        return Provenance(
            str(plan["hash"]),
            str(plan["method"]),
            Sources.from_dict(content["sources"]),
            str(plan.get("digest", "")),
            frozenset(content.get("tensors", ())),
            content.get("files"),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
