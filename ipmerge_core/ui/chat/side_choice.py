"""Choose the two models of the chat, one per side, separately for each pair.

In: the chosen pair, the runs that this browser started, and a click on "Try it" next to a finished
merge. Out: two dropdowns. A side is the unmerged model, the plan in Explore or a finished merge.
Access to a merge is checked when it is asked, in `answers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import BASE, PLAN
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.finished_merges import Keys, describe_lost, find_merge, merges_of_pair
from ipmerge_core.ui.runs import Remembered, Updates

RUNS_KEY = "ipmerge.merges.v1"
RUNS_SECRET = "ipmerge-merges"  # noqa: S105 (it only keeps the entry readable after a restart)
MOST_RUNS = 30  # remembered by a browser
ALWAYS = [("Vision-language model, unmerged", BASE), ("Plan in Explore", PLAN)]

Chosen = Mapping[str, tuple[str, str]]  # pair -> left and right model


class SideChoice(NamedTuple):
    """The components that hold the choice, and the runs that the browser remembers."""

    left: gr.Dropdown
    right: gr.Dropdown
    chosen: gr.State
    runs: gr.BrowserState  # the merges started here
    last: gr.BrowserState  # the one started last

    @property
    def inputs(self) -> list[Any]:
        """The inputs of a handler that asks: left, right, and two values for `keys_of`."""
        return [self.left, self.right, self.runs, self.last]


def side_choice(runs: gr.BrowserState, last: gr.BrowserState) -> SideChoice:
    """Lay out the two dropdowns."""
    with gr.Row(elem_id="sides"):
        left, right = (
            gr.Dropdown(
                ALWAYS,
                value=who,
                label=label,
                elem_id=elem_id,
                min_width=280,
            )
            for label, who, elem_id in (
                ("Left model", BASE, "model-left"),
                ("Right model", PLAN, "model-right"),
            )
        )
    return SideChoice(left, right, gr.State({}), runs, last)


def wire_choice(backend: Backend, sides: SideChoice, pair: gr.Dropdown, tab: gr.Tab) -> None:
    """Store the choice per pair, and update the list of merges when it may have changed."""

    def keep(pack_id: str, left: str, right: str, chosen: Chosen) -> Chosen:
        return {**chosen, pack_id: (left, right)}

    def show(pack_id: str, chosen: Chosen, runs: object, last: object) -> list[Any]:
        return shown(backend, pack_id, chosen, keys_of(runs, last))

    both = [sides.left, sides.right]
    asked = [pair, sides.chosen, sides.runs, sides.last]
    for side in both:
        side.input(keep, [pair, *both, sides.chosen], sides.chosen, queue=False, **QUIET)
    for event in (tab.select, pair.change):
        event(show, asked, both, queue=False, **QUIET)


def wire_try_it(
    backend: Backend, sides: SideChoice, pair: gr.Dropdown, button: gr.Button, tabs: gr.Tabs
) -> None:
    """Let "Try it" select the finished merge for the right side and open the chat."""

    def take(pack_id: str, chosen: Chosen, runs: object, last: object) -> Updates:
        run = last.get("id", "") if isinstance(last, Mapping) else ""
        found = choose_merge(backend, sides, pack_id, str(run), chosen, keys_of(runs, last))
        return {**found, tabs: gr.Tabs(selected="try")}

    asked = [pair, sides.chosen, sides.runs, sides.last]
    filled = [sides.chosen, sides.left, sides.right, tabs]
    # Queued, because the page shows errors of queued events only.
    button.click(show_errors(take), asked, filled, **QUIET)


def choose_merge(
    backend: Backend, sides: SideChoice, pack_id: str, run: str, chosen: Chosen, keys: Keys
) -> Updates:
    """Return the updates that put a finished merge of a pair on the right side.

    Raises: RunError, PlanError as `find_merge`.
    """
    merge = find_merge(backend, pack_id, run, keys)
    left, _ = chosen.get(pack_id, (BASE, PLAN))
    now = {**chosen, pack_id: (left, merge.run)}
    left_side, right_side = shown(backend, pack_id, now, keys)
    return {sides.chosen: now, sides.left: left_side, sides.right: right_side}


def remembered_merges() -> gr.BrowserState:
    """Create the browser state that keeps ids and keys of all merges across reloads.

    Create it outside of all tabs: the contents of a tab do not exist before the tab is opened.
    """
    return gr.BrowserState([], storage_key=RUNS_KEY, secret=RUNS_SECRET)


def with_run(runs: object, last: object) -> list[Remembered]:
    """Return the remembered runs with one added at the end; the oldest are dropped."""
    keys = keys_of(runs, last)
    return [{"id": run, "key": key} for run, key in keys.items()][-MOST_RUNS:]


def keys_of(runs: object, last: object) -> Keys:
    """Read the keys of the runs that a browser remembers; anything that is not a run is skipped.

    >>> keys_of([{"id": "a", "key": "1"}, None], {"id": "b", "key": "2"})
    {'a': '1', 'b': '2'}
    """
    known = [*runs[-MOST_RUNS:], last] if isinstance(runs, list) else [last]
    found = [entry for entry in known if isinstance(entry, Mapping)]
    return {str(entry["id"]): str(entry["key"]) for entry in found if {"id", "key"} <= set(entry)}


def shown(backend: Backend, pack_id: str, chosen: Chosen, keys: Keys) -> list[Any]:
    """Return the updates of both dropdowns for a pair: its choices and the selected ones.

    A selected merge that no longer exists stays selected and is labelled as such.
    """
    try:
        merges = [(merge.label, merge.run) for merge in merges_of_pair(backend, pack_id, keys)]
    except PlanError:  # the analysis of the pair has not finished
        merges = []
    values = chosen.get(pack_id, (BASE, PLAN))
    options = [*ALWAYS, *merges]
    known = {value for _, value in options}
    lost = [value for value in dict.fromkeys(values) if value not in known]
    options += [(describe_lost(backend, value, keys), value) for value in lost]
    return [gr.update(choices=options, value=value) for value in values]
