"""Which two models the chat asks: a choice per side, kept for each pair.

In: the frame's pair, the runs that this browser started, and a press on "Try it" beside a finished
merge. Out: two dropdowns. A side is the unmerged model, Explore's plan or a finished merge; what is
chosen for one pair is never used for another. Whether a merge may answer is checked when it is
asked, in `sides.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import BASE, PLAN
from ipmerge_core.ui.errors import QUIET, told
from ipmerge_core.ui.finished_merges import Keys, find_merge, lost_words, merges_of_pair
from ipmerge_core.ui.runs import Remembered, Updates

RUNS_KEY = "ipmerge.merges.v1"
RUNS_SECRET = "ipmerge-merges"  # noqa: S105 (it only keeps the entry readable after a restart)
MOST_RUNS = 30  # that a browser remembers
ALWAYS = [("Vision-language model, unmerged", BASE), ("Your plan in Explore", PLAN)]

Chosen = Mapping[str, tuple[str, str]]  # by pair, what is chosen for left and right


class SideChoice(NamedTuple):
    """The components that hold the choice, and what the browser remembers of its runs."""

    left: gr.Dropdown
    right: gr.Dropdown
    chosen: gr.State
    runs: gr.BrowserState  # the merges started here
    last: gr.BrowserState  # the one started last

    @property
    def inputs(self) -> list[Any]:
        """What an asking handler reads: left, right, and two values for `keys_of`."""
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
    """Keep what is chosen per pair, and list the merges again where they may have changed."""

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
    """Let "Try it" choose the merge it stands beside for the right side, and open the chat."""

    def take(pack_id: str, chosen: Chosen, runs: object, last: object) -> Updates:
        keys = keys_of(runs, last)
        run = last.get("id", "") if isinstance(last, Mapping) else ""
        merge = find_merge(backend, pack_id, str(run), keys)
        left, _ = chosen.get(pack_id, (BASE, PLAN))
        now = {**chosen, pack_id: (left, merge.run)}
        left_side, right_side = shown(backend, pack_id, now, keys)
        return {
            sides.chosen: now,
            sides.left: left_side,
            sides.right: right_side,
            tabs: gr.Tabs(selected="try"),
        }

    asked = [pair, sides.chosen, sides.runs, sides.last]
    filled = [sides.chosen, sides.left, sides.right, tabs]
    # In the queue: the page shows no message of a refusal that comes from outside of it.
    button.click(told(take), asked, filled, **QUIET)


def remembered_merges() -> gr.BrowserState:
    """Make the place in the browser where ids and keys of all its merges are kept.

    It must stand outside all tabs: a tab's contents are not there before it is opened.
    """
    return gr.BrowserState([], storage_key=RUNS_KEY, secret=RUNS_SECRET)


def with_run(runs: object, last: object) -> list[Remembered]:
    """Return the remembered runs with one more, the newest last; the oldest are forgotten."""
    keys = keys_of(runs, last)
    return [{"id": run, "key": key} for run, key in keys.items()][-MOST_RUNS:]


def keys_of(runs: object, last: object) -> Keys:
    """Read the keys of the runs that a browser remembers; whatever is no run is left out.

    >>> keys_of([{"id": "a", "key": "1"}, None], {"id": "b", "key": "2"})
    {'a': '1', 'b': '2'}
    """
    known = [*runs[-MOST_RUNS:], last] if isinstance(runs, list) else [last]
    found = [entry for entry in known if isinstance(entry, Mapping)]
    return {str(entry["id"]): str(entry["key"]) for entry in found if {"id", "key"} <= set(entry)}


def shown(backend: Backend, pack_id: str, chosen: Chosen, keys: Keys) -> list[Any]:
    """Return the updates of both dropdowns: what can be chosen for a pair, and what is.

    A chosen merge that is no longer there stays chosen and says so, until another is chosen.
    """
    try:
        merges = [(merge.words, merge.run) for merge in merges_of_pair(backend, pack_id, keys)]
    except PlanError:  # a pair that is still being analysed has none
        merges = []
    values = chosen.get(pack_id, (BASE, PLAN))
    options = [*ALWAYS, *merges]
    known = {value for _, value in options}
    lost = [value for value in dict.fromkeys(values) if value not in known]
    options += [(lost_words(backend, value, keys), value) for value in lost]
    return [gr.update(choices=options, value=value) for value in values]
