"""Read the knock-out of a pair from the file next to its pack, for the layer map.

In: the id of a pair. Out: the change of each score by model, group, layer and module, as written by
`ipmerge knockout --map NAME.knockout.json`; None if there is no such file. Does not import torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.atomic import FileVersion, version_of
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    FileKind,
    InvalidContentError,
    Number,
    Schema,
    versioned,
)
from ipmerge_core.ui.pairs import find_pack, stem_of

Changes = dict[str, dict[str, float]]
_KIND = FileKind(
    "a knock-out", "Write it again with `ipmerge knockout --map`.", PlanError, largest=16 * MEGABYTE
)


@dataclass(frozen=True)
class _Map:
    """The part of the file that is drawn."""

    changes: dict[str, dict[str, Number]]


_MAP = Schema[_Map](_Map)


def read_knockout(pack_id: str) -> Changes | None:
    """Return the changes of a pair's knock-out; None without a file that can be read."""
    try:
        pack = find_pack(pack_id).path
    except PlanError:  # a pair that is only partly analysed
        return None
    path = pack.with_name(f"{stem_of(pack)}.knockout.json")
    if not path.is_file():
        return None
    try:
        return _read(path, version_of(path))
    except PlanError as error:
        logging.getLogger(__name__).warning("Left out: %s", error)
        return None


@lru_cache(maxsize=16)
def _read(path: Path, _version: FileVersion) -> Changes:
    content = _KIND.content(path)
    try:
        _, fields = versioned(content, "ipmerge-knockout-map", (1,))
        return {name: dict(found) for name, found in _MAP.validate(fields).changes.items()}
    except InvalidContentError as error:
        raise _KIND.refusal(path, error) from error
