"""A pair on the map as far as it is analysed, and what has come since the map last asked.

In: the id of a pair, finished or not, and how many of its matrices the browser knows. Out: a pack's
content for the browser, of a growing one with the places of all its matrices, so that nothing moves
when one more is known; and all pairs that can be chosen. The browser asks by itself and keeps its
plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ipmerge_core.analysis.partial import Unfinished
from ipmerge_core.errors import PlanError
from ipmerge_core.ui.pairs import EVERYTHING, find_growing, growing_ids, list_packs, load_pack

Json = dict[str, Any]
IsRunning = Callable[[str], bool]


def nobody_runs(_: str) -> bool:
    """Stand for an app that starts no analyses."""
    return False


def pair_choices(is_running: IsRunning = nobody_runs, shown: str = "") -> list[tuple[str, str]]:
    """List all pairs by label and id: bundled, own, those being analysed now, and the one shown."""
    choices = [(pack.label, pack.id) for pack in list_packs()]
    finished = {pack_id for _, pack_id in choices}
    for pack_id in growing_ids():
        if pack_id in finished or not (pack_id == shown or is_running(pack_id)):
            continue
        growing = find_growing(pack_id, EVERYTHING)
        if growing is not None:
            choices.append((f"own: {growing.pack['name']} (partly analysed)", pack_id))
    return choices


def explored_pack(pack_id: str, is_running: IsRunning = nobody_runs) -> Json:
    """Return a pack's content, or of a growing one what there is. Raises: PlanError."""
    try:
        return load_pack(pack_id)
    except PlanError:
        growing = find_growing(pack_id)
        if growing is None:
            raise
    places = [{"layer": place.layer, "module": place.module} for place in growing.places]
    state = {**_state(pack_id, growing, is_running), "places": places}
    return {**growing.pack, "records": growing.records, "growing": state}


def growth(pack_id: str, known: int, is_running: IsRunning) -> Json:
    """Return what came after the first `known` matrices, and how the pair stands now.

    `growing` is null once the analysis is finished; `again` asks the browser to open the pair anew,
    because what it knows belongs to an analysis that was begun again. Raises: PlanError.
    """
    growing = find_growing(pack_id, max(known, 0))
    if growing is not None:
        state = _state(pack_id, growing, is_running)
        return {"records": growing.records, "growing": state, "again": growing.n_done < known}
    pack = load_pack(pack_id)
    records = pack["records"][max(known, 0) * len(pack["sources"]["math"]) :]
    return {"pack": {**pack, "records": None}, "records": records, "growing": None, "again": False}


def _state(pack_id: str, growing: Unfinished, is_running: IsRunning) -> Json:
    return {
        "done": growing.share,
        "total": len(growing.places),
        "running": is_running(pack_id),
    }
