"""Read pairs whose analysis has not finished, and the records added since the last request.

In: the id of a pair, finished or not, and the number of matrices that the browser knows. Out: the
content of a pack, for an unfinished one with the positions of all matrices so that the layout does
not change; and all pairs that can be chosen. The browser polls by itself and keeps its plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ipmerge_core.analysis.partial import Unfinished
from ipmerge_core.errors import PlanError
from ipmerge_core.ui.pairs import SKIP_ALL, find_partial, list_packs, load_pack, partial_ids

Json = dict[str, Any]
IsRunning = Callable[[str], bool]


def nobody_runs(_: str) -> bool:
    """Return False: for an app that does not run analyses."""
    return False


def pair_choices(is_running: IsRunning = nobody_runs, shown: str = "") -> list[tuple[str, str]]:
    """List all pairs by label and id: bundled, own, being analysed, and the one shown."""
    choices = [(pack.label, pack.id) for pack in list_packs()]
    finished = {pack_id for _, pack_id in choices}
    for pack_id in partial_ids():
        if pack_id in finished or not (pack_id == shown or is_running(pack_id)):
            continue
        partial = find_partial(pack_id, SKIP_ALL)
        if partial is not None:
            choices.append((f"own: {partial.pack['name']} (partly analysed)", pack_id))
    return choices


def explored_pack(pack_id: str, is_running: IsRunning = nobody_runs) -> Json:
    """Return the content of a pack, or the content so far. Raises: PlanError."""
    try:
        return load_pack(pack_id)
    except PlanError:
        partial = find_partial(pack_id)
        if partial is None:
            raise
    places = [{"layer": place.layer, "module": place.module} for place in partial.places]
    state = {**_state(pack_id, partial, is_running), "places": places}
    return {**partial.pack, "records": partial.records, "growing": state}


def records_since(pack_id: str, known: int, is_running: IsRunning) -> Json:
    """Return the records after the first `known` matrices and the state of the analysis.

    `growing` is null when the analysis has finished; `again` asks the browser to reload the pair,
    because its records are from an earlier analysis. Raises: PlanError.
    """
    partial = find_partial(pack_id, max(known, 0))
    if partial is not None:
        state = _state(pack_id, partial, is_running)
        return {"records": partial.records, "growing": state, "again": partial.n_done < known}
    pack = load_pack(pack_id)
    records = pack["records"][max(known, 0) * len(pack["sources"]["math"]) :]
    return {"pack": {**pack, "records": None}, "records": records, "growing": None, "again": False}


def _state(pack_id: str, partial: Unfinished, is_running: IsRunning) -> Json:
    return {
        "done": partial.share,
        "total": len(partial.places),
        "running": is_running(pack_id),
    }
