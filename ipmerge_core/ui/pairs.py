"""List and read the pairs: bundled packs, packs in the user's folder, and unfinished ones.

In: the packs in the folders `BUNDLED` of the repository, and in the folder `packs` of the home
folder. Out: a list for the dropdown, and the content of a pack as plain values for the browser; for
an unfinished analysis, the content so far. Reads no weights and does not import torch.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.analysis.partial import Unfinished, journal_of, read_journal
from ipmerge_core.analysis.records import read_pack
from ipmerge_core.errors import PlanError
from ipmerge_core.planning.options import shown
from ipmerge_core.runtime.atomic import FileVersion, version_of
from ipmerge_core.runtime.host import check_home, home_folder
from ipmerge_core.spectral.kinds import TEMPERATURE

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"
BUNDLED = (DEMO, ROOT / "assets" / "taught", ROOT / "assets" / "smollm2")
_ENDING = ".pack.json.gz"
_OWN = "packs-"  # prefix of the ids of a user's own packs
SKIP_ALL = sys.maxsize  # for `find_partial`: return no records
_LONGEST_NAME = 60  # characters of a new pack's name, which is part of links


class PackEntry(NamedTuple):
    """One entry of the pair dropdown."""

    id: str
    label: str
    path: Path


def packs_folder() -> Path:
    """Return the folder of the user's own packs."""
    return home_folder() / "packs"


def list_packs() -> list[PackEntry]:
    """List the packs that can be read, the bundled ones first, with unique labels."""
    labels = [
        (pack_id, _label(pack_id, path), path) for pack_id, path in _files() if _is_readable(path)
    ]
    often = Counter(label for _, label, _ in labels)
    return [
        PackEntry(pack_id, f"{label} · {stem_of(path)}" if often[label] > 1 else label, path)
        for pack_id, label, path in labels
    ]


def unreadable_packs() -> list[str]:
    """Return why each pack that cannot be read is not listed, one sentence per file."""
    return [fault for _, path in _files() if (fault := _named(path).fault)]


def find_pack(pack_id: str) -> PackEntry:
    """Return the finished pack with this id.

    Raises: PlanError for an unknown or unfinished pack, or one that cannot be read.
    """
    for found, path in _files():
        if found == pack_id:
            if fault := _named(path).fault:
                raise PlanError(fault)
            return PackEntry(found, _label(found, path), path)
    partial = find_partial(pack_id, SKIP_ALL)
    if partial is not None:
        raise PlanError(
            f"The pair '{partial.pack['name']}' is only partly analysed, {partial.n_done} of "
            f"{len(partial.places)} matrices so far. Until its analysis has finished, it is only "
            f"available in Explore."
        )
    known = ", ".join(entry.id for entry in list_packs()) or "none"
    raise PlanError(f"Unknown pair '{str(pack_id)[:60]}'. Available: {known}.")


def pair_name(pack_id: str) -> str:
    """Return the label of a pair, or its id if it has no finished pack."""
    try:
        return find_pack(pack_id).label
    except PlanError:
        return str(pack_id)


def load_pack(pack_id: str) -> dict[str, Any]:
    """Read the content of a finished pack, which callers must not modify. Raises: PlanError."""
    return read_pack_file(find_pack(pack_id).path)


def read_pack_file(path: Path) -> dict[str, Any]:
    """Read a pack file, once per version of it. Raises: PlanError."""
    return _read(path, _version_of(path))


# --- partial packs ---------------------------------------------------------------------------


def find_partial(pack_id: str, skip: int = 0) -> Unfinished | None:
    """Return the content so far of a running or interrupted analysis.

    The records of the first `skip` matrices are left out. None before the first matrix is done.
    """
    if not isinstance(pack_id, str) or not re.fullmatch(rf"{_OWN}[A-Za-z0-9][\w.+-]*", pack_id):
        return None
    try:
        found = read_journal(journal_of(path_of(pack_id)), skip)
    except PlanError:
        return None
    return found if found.n_done else None


def partial_ids() -> list[str]:
    """List the ids of the packs of running and interrupted analyses."""
    journals = sorted(packs_folder().glob(f"[!.]*{_ENDING}.journal"))
    return [id_of(path.with_suffix("")) for path in journals]


def path_of(pack_id: str) -> Path:
    """Return the file of one of the user's own packs, whether it exists or not."""
    return packs_folder() / f"{pack_id.removeprefix(_OWN)}{_ENDING}"


def id_of(path: Path) -> str:
    """Return the id of one of the user's own packs from its file.

    >>> id_of(Path("packs/llava-1.5-7b.pack.json.gz"))
    'packs-llava-1.5-7b'
    """
    return _OWN + stem_of(path)


def reserve_name(*parts: str) -> Path:
    """Reserve an unused file name for a new pack, made of the names of its models.

    An empty journal reserves the name, so that simultaneous calls get different ones.
    """
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._") for part in parts]
    stem = "-".join(filter(None, words))[:_LONGEST_NAME].rstrip("-._") or "pair"
    check_home(packs_folder()).mkdir(parents=True, exist_ok=True)
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 1000))):
        path = packs_folder() / f"{name}{_ENDING}"
        if path.exists():
            continue
        try:
            journal_of(path).touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise PlanError(f"There are 999 packs named '{stem}'. Delete some of them.")


# --- files -----------------------------------------------------------------------------------


def _files() -> Iterator[tuple[str, Path]]:
    """List the packs with their ids; of two files with the same stem, one has its whole name."""
    for folder, prefix in (*((bundled, "") for bundled in BUNDLED), (packs_folder(), _OWN)):
        paths = {*folder.glob("pack*.json.gz"), *folder.glob(f"[!.]*{_ENDING}")}
        stems = Counter(stem_of(path) for path in paths)
        for path in sorted(paths, key=lambda path: (stem_of(path), path.name)):
            is_named = stems[stem_of(path)] > 1 and not path.name.endswith(_ENDING)
            yield prefix + (path.name if is_named else stem_of(path)), path


def stem_of(path: Path) -> str:
    """Return the name of a pack without its endings."""
    return path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".pack")


def _label(pack_id: str, path: Path) -> str:
    own = "own: " if pack_id.startswith(_OWN) else ""
    return own + _named(path).name


class _Named(NamedTuple):
    """A pack's name with the options of its analysis, or why it cannot be read."""

    name: str
    fault: str = ""


def _is_readable(path: Path) -> bool:
    return not _named(path).fault


def _named(path: Path) -> _Named:
    return _read_name(path, _version_of(path))


@lru_cache(maxsize=1024)
def _read_name(path: Path, _version: FileVersion | None) -> _Named:
    try:
        content = read_pack_file(path)
    except PlanError as error:
        return _Named("", str(error))
    return _Named(f"{content['name']}{describe_depth(content['parameters'])}")


def _version_of(path: Path) -> FileVersion | None:
    """Return a file's version; None if there is no file, as for a dead link."""
    try:
        return version_of(path)
    except OSError:
        return None


def describe_depth(parameters: dict[str, Any]) -> str:
    """Describe the options of an analysis that are not the default.

    >>> describe_depth({"quick": True, "rank": None}), describe_depth({})
    (' (quick, approximate)', '')
    >>> describe_depth({"temperature": 8.0, "rank": 256})
    ' (rank 256, temperature 8)'
    """
    words = ["quick, approximate"] if parameters.get("quick") else []
    if parameters.get("rank"):
        words.append(f"rank {parameters['rank']}")
    temperature = parameters.get("temperature", TEMPERATURE)
    if isinstance(temperature, int | float) and temperature != TEMPERATURE:
        words.append(f"temperature {shown(temperature)}")
    if parameters.get("directions", "existing") != "existing":
        words.append(f"{parameters['directions']} directions")
    return f" ({', '.join(words)})" if words else ""


@lru_cache(maxsize=16)
def _read(path: Path, _version: FileVersion | None) -> dict[str, Any]:
    return read_pack(path)[0]
