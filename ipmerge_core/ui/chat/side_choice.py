"""Choose the two models of the chat, one per side, separately for each pair.

In: the chosen merge, the runs that this browser started, and a click on "Try it" next to a finished
merge. Out: two dropdowns. A side is the unmerged model, the chosen merge, the plan of the recorded
answers or a finished merge; the right side follows the chosen merge, and selecting a merge there
chooses it. Access to a merge is checked when it is asked, in `answers.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import BASE, PLAN, RECORD, UNMERGED
from ipmerge_core.ui.chat.recorded import recorded_choice
from ipmerge_core.ui.chosen_merge import ChosenMerge, chosen_line, name_of
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.finished_merges import Keys, describe_lost, find_merge, merges_of_pair
from ipmerge_core.ui.runs import Remembered, Updates

if TYPE_CHECKING:
    from gradio.events import Dependency

RUNS_KEY = "ipmerge.merges.v1"
RUNS_SECRET = "ipmerge-merges"  # noqa: S105 (it only keeps the entry readable after a restart)
MOST_RUNS = 30  # remembered by a browser


class Sides(NamedTuple):
    """The models that a user selected, and the chosen merge of that moment."""

    left: str
    right: str
    chosen: ChosenMerge


Kept = Mapping[str, Sides]  # by pair


class SideChoice(NamedTuple):
    """The components that hold the choice, and the runs that the browser remembers."""

    left: gr.Dropdown
    right: gr.Dropdown
    kept: gr.State
    chosen: gr.State  # the ChosenMerge of all tabs
    line: gr.HTML  # names it
    runs: gr.BrowserState  # the merges started here
    last: gr.BrowserState  # the one started last

    @property
    def inputs(self) -> list[Any]:
        """The inputs of a handler that asks: left, right, and two values for `keys_of`."""
        return [self.left, self.right, self.runs, self.last]

    @property
    def asked(self) -> list[Any]:
        """The inputs of a handler that shows the sides, in the order of `shown`."""
        return [self.chosen, self.kept, self.runs, self.last]

    @property
    def shown(self) -> list[Any]:
        """The outputs of such a handler."""
        return [self.left, self.right]


class TryFinished(NamedTuple):
    """Chooses a finished merge for the right side and opens the chat."""

    backend: Backend
    sides: SideChoice
    tabs: gr.Tabs

    @property
    def outputs(self) -> list[Any]:
        """The outputs of a handler that returns `updates`."""
        return [self.sides.chosen, *self.sides.shown, self.tabs]

    def updates(self, run: str, chosen: ChosenMerge, kept: Kept, keys: Keys) -> Updates:
        """Choose the merge of a run for the pair of the chosen merge.

        Raises: RunError if the merge cannot be used, or if it is of another pair.
        """
        now = chosen.with_merge(find_merge(self.backend, chosen.pack_id, run, keys))
        left, right = shown(self.backend, now, kept, keys)
        return {
            self.sides.chosen: now,
            self.sides.left: left,
            self.sides.right: right,
            self.tabs: gr.Tabs(selected="try"),
        }


def side_choice(chosen: gr.State, runs: gr.BrowserState, last: gr.BrowserState) -> SideChoice:
    """Lay out the two dropdowns and the line that names the chosen merge."""
    line = gr.HTML("", elem_id="try-chosen", elem_classes="chosen-line")
    first = default_right(chosen.value)
    with gr.Row(elem_id="sides"):
        left, right = (
            gr.Dropdown(
                always(chosen.value), value=who, label=label, elem_id=elem_id, min_width=280
            )
            for label, who, elem_id in (
                ("Left model", BASE, "model-left"),
                ("Right model", first, "model-right"),
            )
        )
    return SideChoice(left, right, gr.State({}), chosen, line, runs, last)


def wire_choice(backend: Backend, sides: SideChoice, pair: gr.Dropdown, tab: gr.Tab) -> Dependency:
    """Store the choice per pair, and update the list of merges when it may have changed.

    Returns the event after which the model of the right side is the chosen merge.
    """

    def keep_left(chosen: ChosenMerge, kept: Kept, left: str | None, right: str | None) -> Kept:
        now = Sides(left or BASE, right or default_right(chosen), chosen)
        return {**kept, chosen.pack_id: now}

    def keep_right(
        chosen: ChosenMerge,
        kept: Kept,
        runs: object,
        last: object,
        left: str | None,
        right: str | None,
    ) -> Updates:
        right = right or PLAN
        now = with_side(backend, chosen, right, keys_of(runs, last))
        entry = Sides(left or BASE, right, now)
        return {sides.kept: {**kept, now.pack_id: entry}, sides.chosen: now}

    show = partial(list_sides, backend)
    both = [sides.left, sides.right]
    sides.left.input(keep_left, [sides.chosen, sides.kept, *both], sides.kept, queue=False, **QUIET)
    chose = sides.right.input(
        keep_right, [*sides.asked, *both], [sides.kept, sides.chosen], queue=False, **QUIET
    )
    chose.then(chosen_line, sides.chosen, sides.line, **QUIET)
    for event in (after_commits(tab.select), after_commits(pair.change, pair)):
        listed = event.then(show, sides.asked, both, queue=False, **QUIET)
        listed.then(chosen_line, sides.chosen, sides.line, **QUIET)
    return chose


def wire_try_it(taking: TryFinished, button: gr.Button) -> Dependency:
    """Let "Try it" select the merge that finished last for the right side and open the chat."""

    def take(chosen: ChosenMerge, kept: Kept, runs: object, last: object) -> Updates:
        run = last.get("id", "") if isinstance(last, Mapping) else ""
        return taking.updates(str(run), chosen, kept, keys_of(runs, last))

    # Queued, because the page shows errors of queued events only.
    taken: Dependency = button.click(show_errors(take), taking.sides.asked, taking.outputs, **QUIET)
    return taken


def with_side(backend: Backend, chosen: ChosenMerge, right: str, keys: Keys) -> ChosenMerge:
    """Return the chosen merge after a model was selected for the right side.

    The unmerged model, the recorded answers' plan, and a merge that no longer exists are sides of
    the chat only.
    """
    if right == PLAN:
        now = chosen.without_merge() if chosen.merge else chosen
        return replace(now, by="explore") if now.by == "start" else now
    if right in (BASE, RECORD):
        return chosen
    with contextlib.suppress(RunError, PlanError):
        return chosen.with_merge(find_merge(backend, chosen.pack_id, right, keys))
    return chosen


def default_right(chosen: ChosenMerge) -> str:
    """Return the right side that follows the chosen merge.

    As long as nothing was chosen it is the plan of the recorded answers, so that the first question
    gets the answer that is shown.
    """
    if chosen.merge is not None:
        return chosen.run
    return RECORD if chosen.by == "start" and recorded_choice(chosen.pack_id) else PLAN


def always(chosen: ChosenMerge) -> list[tuple[str, str]]:
    """List the sides that a pair has without any finished merge."""
    name = name_of(chosen.without_merge() if chosen.merge else chosen)
    found = [(UNMERGED, BASE), (name[:1].upper() + name[1:], PLAN)]
    recorded = recorded_choice(chosen.pack_id)
    if recorded is not None:
        label = name_of(ChosenMerge(chosen.pack_id, recorded, by="record"))
        found.append((label[:1].upper() + label[1:], RECORD))
    return found


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


def selected(chosen: ChosenMerge, kept: Kept) -> tuple[str, str]:
    """Return the selected sides; the right one follows a merge that was chosen since."""
    mine = kept.get(chosen.pack_id)
    if mine is None:
        return BASE, default_right(chosen)
    return mine.left, mine.right if mine.chosen == chosen else default_right(chosen)


def list_sides(
    backend: Backend, chosen: ChosenMerge, kept: Kept, runs: object, last: object
) -> list[Any]:
    """Return the updates of both dropdowns for the values of `SideChoice.asked`."""
    return shown(backend, chosen, kept, keys_of(runs, last))


def shown(backend: Backend, chosen: ChosenMerge, kept: Kept, keys: Keys) -> list[Any]:
    """Return the updates of both dropdowns for a pair: its choices and the selected ones.

    A selected merge that no longer exists stays selected and is labelled as such.
    """
    pack_id = chosen.pack_id
    try:
        merges = [(merge.label, merge.run) for merge in merges_of_pair(backend, pack_id, keys)]
    except PlanError:  # the analysis of the pair has not finished
        merges = []
    values = selected(chosen, kept)
    options = [*always(chosen), *merges]
    known = {value for _, value in options}
    lost = [value for value in dict.fromkeys(values) if value not in known]
    options += [(describe_lost(backend, value, keys), value) for value in lost]
    return [gr.update(choices=options, value=value) for value in values]
