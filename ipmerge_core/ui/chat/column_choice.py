"""Choose the models of the chat's columns, separately for each pair.

In: the chosen merge, the runs that this browser started, the plans that it keeps, and a click on
"Try it" next to a finished merge. Out: two to four dropdowns. A column that asks the chosen merge
follows it. Access to a merge is checked when it is asked, in `answers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.columns import (
    FEWEST_COLUMNS,
    FORM,
    KEPT_PREFIX,
    LETTERS,
    METHOD_PREFIX,
    MOST_COLUMNS,
    PLAN,
    Choices,
    Selection,
    Selections,
    default_columns,
    kept_choices,
    method_choices,
    name_asked,
    own_choices,
    selected,
    with_column,
)
from ipmerge_core.ui.chosen_merge import ChosenMerge, chosen_line
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.finetuned_models import PREFIX as FINETUNED
from ipmerge_core.ui.finetuned_models import find_finetuned, finetuned_of_pair
from ipmerge_core.ui.finished_merges import Keys, describe_lost, find_merge, merges_of_pair
from ipmerge_core.ui.runs import Remembered, Updates

if TYPE_CHECKING:
    from gradio.events import Dependency

RUNS_KEY = "ipmerge.merges.v1"
RUNS_SECRET = "ipmerge-merges"  # noqa: S105 (it only keeps the entry readable after a restart)
MOST_RUNS = 30  # remembered by a browser
# In the page: the plans that this browser keeps for the pair on the map, as JSON.
KEPT_PLANS = """() => {
  const kept = document.querySelector("#layer-map .lm")?.parentNode.ipmerge?.kept ?? [];
  return JSON.stringify(kept.map(({ plan }) => plan));
}"""


class Column(NamedTuple):
    """The components of one column."""

    box: gr.Column
    model: gr.Dropdown
    chat: gr.Chatbot
    verdict: gr.HTML
    stop: gr.Button
    retry: gr.Button
    copy: gr.Button


class ColumnChoice(NamedTuple):
    """The components that hold the choice, and what the browser remembers."""

    columns: tuple[Column, ...]  # all MOST_COLUMNS of them
    add: gr.Button
    remove: gr.Button
    selections: gr.State
    chosen: gr.State  # the ChosenMerge of all tabs
    line: gr.HTML  # names it
    runs: gr.BrowserState  # the merges started here
    last: gr.BrowserState  # the one started last
    kept: gr.Textbox  # the plans kept in Explore, as JSON

    @property
    def asked(self) -> list[Any]:
        """The inputs of a handler that needs the selected columns, see `Held`."""
        return [self.chosen, self.selections, self.runs, self.last, self.kept]

    @property
    def shown(self) -> list[Any]:
        """The outputs of a handler that returns `updates`."""
        models = [component for column in self.columns for component in (column.box, column.model)]
        return [*models, self.add, self.remove]

    def updates(self, backend: Backend, held: Held, *, methods: bool = True) -> Updates:
        """Return the updates that show the selected columns and their choices."""
        columns = held.columns
        options = choices_of(backend, held, methods=methods)
        found: Updates = {
            self.add: gr.update(visible=len(columns) < MOST_COLUMNS),
            self.remove: gr.update(
                visible=len(columns) > FEWEST_COLUMNS,
                value=f"Remove column {LETTERS[len(columns) - 1]}",
            ),
        }
        for number, column in enumerate(self.columns):
            is_shown = number < len(columns)
            found[column.box] = gr.update(visible=is_shown)
            value = columns[number] if is_shown else None
            found[column.model] = gr.update(choices=options, value=value)
        return found


class Held(NamedTuple):
    """The values of `ColumnChoice.asked`."""

    chosen: ChosenMerge
    selections: Selections
    runs: object = None
    last: object = None
    kept: str | None = ""

    @property
    def keys(self) -> Keys:
        """The keys of the runs that the browser remembers."""
        return keys_of(self.runs, self.last)

    @property
    def columns(self) -> tuple[str, ...]:
        """The selected columns."""
        return selected(self.chosen, self.selections)

    def select(self, columns: tuple[str, ...]) -> Held:
        """Return the values after columns were selected for the pair."""
        entry = {self.chosen.pack_id: Selection(columns, self.chosen)}
        return self._replace(selections={**self.selections, **entry})


class TryFinished(NamedTuple):
    """Chooses a finished merge, shows it in a column and opens the chat."""

    backend: Backend
    choice: ColumnChoice
    tabs: gr.Tabs

    @property
    def outputs(self) -> list[Any]:
        """The outputs of a handler that returns `updates`."""
        return [self.choice.chosen, self.choice.selections, *self.choice.shown, self.tabs]

    def updates(self, run: str, held: Held) -> Updates:
        """Choose the merge of a run for the pair of the chosen merge.

        Raises: RunError if the merge cannot be used, or if it is of another pair.
        """
        merge = find_merge(self.backend, held.chosen.pack_id, run, held.keys)
        now = held._replace(chosen=held.chosen.with_merge(merge))
        return {
            self.choice.chosen: now.chosen,
            **self.choice.updates(self.backend, now),
            self.tabs: gr.Tabs(selected="try"),
        }

    def finetuned(self, run: str, keys: Keys, held: Held) -> Updates:
        """Ask the fine-tuned model of a run in the last column, and open the chat.

        Raises: as `find_finetuned`.
        """
        model = find_finetuned(self.backend, held.chosen.pack_id, run, keys)
        others = [who for who in held.columns if who != model.value]
        kept = others[: max(len(held.columns) - 1, FEWEST_COLUMNS - 1)]
        now = held.select((*kept, model.value))
        return {
            self.choice.selections: now.selections,
            **self.choice.updates(self.backend, now),
            self.tabs: gr.Tabs(selected="try"),
        }


class ChoiceEvents(NamedTuple):
    """The events after which columns were added or removed, and after which any is another one."""

    resized: list[Dependency]
    changed: list[Dependency]


def first_choices(chosen: ChosenMerge, number: int) -> dict[str, Any]:
    """Return the choices and the value of a dropdown when the page is opened."""
    columns = default_columns(chosen)
    value = columns[number] if number < len(columns) else None
    return {"choices": own_choices(chosen), "value": value}


def wire_choice(
    backend: Backend, choice: ColumnChoice, pair: gr.Dropdown, tab: gr.Tab
) -> ChoiceEvents:
    """Store the choice per pair, and update the choices when they may have changed."""

    def keep(chosen: ChosenMerge, selections: Selections, *models: str | None) -> Selections:
        held = Held(chosen, selections)
        columns = tuple(model or PLAN for model in models[: len(held.columns)])
        return held.select(columns).selections

    def resize(*values: Any, more: bool) -> Updates:  # noqa: ANN401
        held = Held(*values)
        columns = with_column(held.chosen, held.columns) if more else held.columns[:-1]
        now = held.select(columns)
        return {choice.selections: now.selections, **choice.updates(backend, now)}

    def show(*values: Any) -> Updates:  # noqa: ANN401
        return choice.updates(backend, Held(*values))

    models = [column.model for column in choice.columns]
    inputs = [choice.chosen, choice.selections, *models]
    changed = [
        model.input(keep, inputs, choice.selections, queue=False, **QUIET) for model in models
    ]
    resized = [
        button.click(
            partial(resize, more=more),
            choice.asked,
            [choice.selections, *choice.shown],
            queue=False,
            **QUIET,
        )
        for button, more in ((choice.add, True), (choice.remove, False))
    ]
    for event in (after_commits(tab.select), after_commits(pair.change, pair)):
        kept = event.then(None, None, choice.kept, js=KEPT_PLANS, queue=False, **QUIET)
        listed = kept.then(show, choice.asked, choice.shown, queue=False, **QUIET)
        listed.then(chosen_line, choice.chosen, choice.line, **QUIET)
        changed.append(listed)
    return ChoiceEvents(resized, [*changed, *resized])


def wire_try_it(taking: TryFinished, button: gr.Button) -> Dependency:
    """Let "Try it" choose the merge that finished last and open the chat."""

    def take(*values: Any) -> Updates:  # noqa: ANN401
        held = Held(*values)
        run = held.last.get("id", "") if isinstance(held.last, Mapping) else ""
        return taking.updates(str(run), held)

    # Queued, because the page shows errors of queued events only.
    asked, filled = taking.choice.asked, taking.outputs
    taken: Dependency = button.click(show_errors(take), asked, filled, **QUIET)
    return taken


def choices_of(backend: Backend, held: Held, *, methods: bool = True) -> Choices:
    """List what a column of the pair can be; a selected merge that is gone is labelled as such."""
    pack_id = held.chosen.pack_id
    try:
        merges = [(merge.label, merge.run) for merge in merges_of_pair(backend, pack_id, held.keys)]
        tuned = finetuned_of_pair(backend, pack_id, held.keys)
        merges += [(f"Fine-tuned · {model.label}", model.value) for model in tuned]
    except PlanError:  # the analysis of the pair has not finished
        merges = []
    options = [*own_choices(held.chosen), *kept_choices(pack_id, held.kept), *merges]
    options += method_choices() if methods else []
    known = {value for _, value in options}
    lost = [value for value in dict.fromkeys(held.columns) if value not in known]
    return [*options, *((_lost_label(backend, value, held), value) for value in lost)]


def _lost_label(backend: Backend, value: str, held: Held) -> str:
    if value == FORM or value.startswith((KEPT_PREFIX, METHOD_PREFIX)):
        name = name_asked(held.chosen, value)
        return name[:1].upper() + name[1:]
    return describe_lost(backend, value.removeprefix(FINETUNED), held.keys)


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
