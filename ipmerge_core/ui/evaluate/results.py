"""Find the results of a visitor's evaluations, and the items behind their scores.

In: the id of a result, which only those know who may see it. Out: its content for the browser, its
file, and single items with their pictures. Files are read once per version.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.runtime.atomic import FileVersion, version_of
from ipmerge_core.ui.evaluate.content import (
    MOST_FLIPS,
    Changed,
    Json,
    changed_items,
    flip_of,
    knockout_content,
    sweep_content,
)
from ipmerge_core.ui.evaluate.search_content import search_content, search_points
from ipmerge_core.ui.pairs import load_pack
from ipmerge_core.ui.runs import results_folder

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.evaluation.knockout import Knockout
    from ipmerge_core.evaluation.report import Report
    from ipmerge_core.evaluation.sweeps import Sweep, SweptPoint
    from ipmerge_core.search.coefficients import SearchResult

_ID = re.compile(r"[a-z]{5,10}-[0-9a-f]{16}")
_SIDE = 112  # pixels of a small image


def result_path(result: str) -> Path:
    """Return the file of a result, which only those know who may see it.

    Raises: RunError for an id that is not valid, or a result that does not exist.
    """
    path = results_folder() / f"{result}.json"
    if not _ID.fullmatch(result) or not path.is_file():
        raise RunError(
            f"There is no result '{result[:40]}'. It may have been deleted in another window."
        )
    return path


class Found(NamedTuple):
    """A result that was read: a sweep, a knock-out or a search, and the id of its pair."""

    result: str
    pack_id: str
    sweep: Sweep | None = None
    knockout: Knockout | None = None
    search: SearchResult | None = None

    @property
    def content(self) -> Json:
        """What the component draws."""
        if self.sweep is not None:
            pack = load_pack(self.pack_id)
            return sweep_content(self.result, self.pack_id, self.sweep, pack)
        if self.search is not None:
            return search_content(self.result, self.pack_id, self.search)
        assert self.knockout is not None, "a result is one of three kinds"
        return knockout_content(self.result, self.pack_id, self.knockout)

    @property
    def report(self) -> Report:
        """The report of a sweep. Raises: RunError for another result."""
        if self.sweep is None:
            raise RunError("A knock-out or a search has no list of items that differ.")
        return self.sweep.report

    @property
    def points(self) -> Sequence[SweptPoint]:
        """The points whose plans can be chosen. Raises: RunError for a knock-out."""
        if self.search is not None:
            return search_points(self.search)
        if self.sweep is None:
            raise RunError("A knock-out has no plan to choose.")
        return self.sweep.points


def read_result(result: str, pack_id: str) -> Found:
    """Read a result of a pair. Raises: RunError if it does not exist or cannot be read."""
    path = result_path(result)
    return _read(path, version_of(path), pack_id)


@lru_cache(maxsize=4)
def _read(path: Path, _version: FileVersion, pack_id: str) -> Found:
    if path.name.startswith("knockout"):
        from ipmerge_core.evaluation.knockout import Knockout

        return Found(path.stem, pack_id, knockout=Knockout.load(path))
    if path.name.startswith("search"):
        from ipmerge_core.search.coefficients import SearchResult

        return Found(path.stem, pack_id, search=SearchResult.load(path))
    from ipmerge_core.evaluation.sweeps import Sweep

    return Found(path.stem, pack_id, Sweep.load(path))


def listed_items(found: Found, point: int) -> Json:
    """Return the items that a point fixes or breaks, with small images, and their number."""
    name = _subject(found, point)
    rows = changed_items(found.report, name)
    pictures = _pictures(found.report)
    flips = [flip_of(row, _small(pictures, row)) for row in rows[:MOST_FLIPS]]
    return {"flips": flips, "flipped": len(rows)}


def find_item(found: Found, point: int, item: str) -> tuple[Changed, Image | None]:
    """Return an item that a point fixes or breaks, and its image. Raises: RunError."""
    for row in changed_items(found.report, _subject(found, point)):
        if str(row.item["id"]) == item:
            return row, _picture(_pictures(found.report), row)
    raise RunError("This item is not in the result. Open the result again.")


def _subject(found: Found, point: int) -> str:
    names = list(found.report.subjects)
    if not 0 < point < len(names):
        raise RunError("Select a merged model to list the items that it changes.")
    return names[point]


def _pictures(report: Report) -> Callable[[str, str], Any]:
    """Return a function that finds the item of a task by its id; None if its data are gone."""
    from ipmerge_core.tasks.items import Draw
    from ipmerge_core.tasks.registry import find_task

    settings = report.settings
    draw = Draw(settings.get("limit"), int(settings.get("seed", 0)))
    known: dict[str, Mapping[str, Any]] = {}

    def item_of(task: str, item: str) -> Any:  # noqa: ANN401 (an Item)
        if task not in known:
            try:
                found = find_task(task).load(draw).items
            except IPMergeError:  # the data set is not on this machine
                found = ()
            known[task] = {each.id: each for each in found}
        return known[task].get(item)

    return item_of


def _picture(item_of: Callable[[str, str], Any], row: Changed) -> Image | None:
    from PIL import Image

    from ipmerge_core.inference.images import open_image

    item = item_of(row.task, str(row.item["id"]))
    if item is None or not item.pictures:
        return None
    source = item.pictures[0].source()
    return source if isinstance(source, Image.Image) else open_image(source)


def _small(item_of: Callable[[str, str], Any], row: Changed) -> str:
    """Return a small image of an item as a data URI; empty if it has none that can be read."""
    try:
        picture = _picture(item_of, row)
    except IPMergeError:
        return ""
    if picture is None:
        return ""
    picture = picture.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def result_json(found: Found) -> str:
    """Return the file of a result: all numbers and all replies."""
    whole = found.sweep or found.knockout or found.search
    assert whole is not None, "a result is one of three kinds"
    return json.dumps(whole.to_dict(), indent=1)
