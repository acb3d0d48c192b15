"""The pairs a visitor can choose: bundled packs and those in the user's own folder.

In: the packs in `assets/demo` and in the folder `packs` of the home folder. Out: a list for the
dropdown, and a pack's content as plain values for the browser. Reads no weights and loads no torch;
what a pack means is `ipmerge_core.analysis`' business.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.errors import CheckpointError, PlanError
from ipmerge_core.jobs import home_folder

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"


class PackEntry(NamedTuple):
    """One pair of the dropdown."""

    id: str
    label: str
    path: Path


def list_packs() -> list[PackEntry]:
    """List the packs: the bundled ones first, then the user's own."""
    entries = []
    for folder, prefix in ((DEMO, ""), (home_folder() / "packs", "own: ")):
        for path in sorted([*folder.glob("pack*.json.gz"), *folder.glob("*.pack.json.gz")]):
            stem = path.name.split(".")[0]
            name = f"{folder.name}-{stem}" if prefix else stem
            entries.append(PackEntry(name, f"{prefix}{read_pack_file(path)['name']}", path))
    return entries


def find_pack(pack_id: str) -> PackEntry:
    """Return the pack with this id. Raises: PlanError for an unknown one."""
    entries = list_packs()
    for entry in entries:
        if entry.id == pack_id:
            return entry
    known = ", ".join(entry.id for entry in entries) or "none"
    raise PlanError(f"Unknown pair '{str(pack_id)[:60]}'. Available: {known}.")


def load_pack(pack_id: str) -> dict[str, Any]:
    """Read a pack's content by id; the caller must not change it. Raises: PlanError."""
    return read_pack_file(find_pack(pack_id).path)


def read_pack_file(path: Path) -> dict[str, Any]:
    """Read one pack, once per version of the file. Raises: CheckpointError."""
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _read(path: Path, _modified: int) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        if content["format"] != "ipmerge-pack" or content["version"] != 1:
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path.name}' is no pack of this version ({type(error).__name__}: {error}). Make it "
            f"again with `ipmerge analyse`."
        ) from error
    return dict(content)
