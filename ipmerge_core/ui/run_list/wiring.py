"""Wire the list of runs: one poll for everything that follows runs, and the actions of a row.

In: events of the component with the visitor's secret. Out: the updated list, the views of runs in
the tabs, and for "Show" and "Try it" the tab, pair and models on show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.ui.analyse.models_form import is_running
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.column_choice import Held, TryFinished, keys_of, with_run
from ipmerge_core.ui.chat.columns import Selections
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.errors import QUIET, sentence_of, show_errors
from ipmerge_core.ui.explore.partial_packs import pair_choices
from ipmerge_core.ui.explore.tab import PairView, open_pair
from ipmerge_core.ui.finetuned_models import pair_of_finetuned
from ipmerge_core.ui.finished_merges import pair_of_merge
from ipmerge_core.ui.merge.method_form import list_methods
from ipmerge_core.ui.method_choice import MethodChoice, data_kind
from ipmerge_core.ui.pairs import id_of, list_packs
from ipmerge_core.ui.run_list.component import RunList
from ipmerge_core.ui.run_list.deletion import delete_run
from ipmerge_core.ui.run_list.rows import (
    Json,
    Keys,
    Run,
    describe_runs,
    keys_held,
    visible_runs,
)
from ipmerge_core.ui.runs import (
    ANALYSIS,
    CALIBRATION,
    EVALUATION,
    FINETUNING,
    POKE,
    RunPoll,
    Updates,
)

if TYPE_CHECKING:
    from gradio.events import Dependency

_LONGEST_TEXT = 200  # characters of a secret or an id
_METHODS_OF = {"gram": "regmean", "fisher": "fisher"}  # a method that uses a calibration


class Frame(NamedTuple):
    """The components that the list reads and updates."""

    runs: RunList
    pair: gr.Dropdown
    view: PairView
    taking: TryFinished
    method: gr.Dropdown
    job: gr.BrowserState  # the runs on show in the tabs
    analysis: gr.BrowserState
    calibration: gr.BrowserState
    evaluation: gr.BrowserState
    finetuning: gr.BrowserState

    @property
    def memories(self) -> list[Any]:
        """Where a browser remembers keys of runs: inputs of a handler, read by `_keys`."""
        lasts = [self.job, self.analysis, self.calibration, self.evaluation, self.finetuning]
        return [self.taking.choice.runs, *lasts]

    def open_pair(self, backend: Backend, pack_id: str, now: ChosenMerge) -> Updates:
        """Return the updates that select a pair and show it, if it is not on show already."""
        if pack_id == now.pack_id:
            return {}
        runs = partial(is_running, backend)
        select = gr.update(choices=pair_choices(runs, pack_id), value=pack_id)
        return {self.pair: select, **self.view.updates(open_pair(pack_id, runs), now)}


class Asked(NamedTuple):
    """An event of the component; whatever a browser sends becomes a text or a number."""

    n: int
    is_first: bool  # the page has just been opened
    visitor: str
    run: str
    action: str

    @classmethod
    def read(cls, event: gr.EventData) -> Asked:
        """Read the data of an event."""
        data = event._data if isinstance(event._data, Mapping) else {}
        n = data.get("n")
        texts = (str(data.get(name, ""))[:_LONGEST_TEXT] for name in ("visitor", "run", "action"))
        return cls(n if isinstance(n, int) else 0, data.get("first") is True, *texts)


def wire_run_list(backend: Backend, frame: Frame, poll: RunPoll) -> Dependency:
    """Wire the list; call it when all views have been added to the poll.

    Returns the event after which the chosen merge may be another one.
    """
    _wire_tick(backend, frame, poll)
    _wire_actions(backend, frame)
    return _wire_open(backend, frame)


def _wire_tick(backend: Backend, frame: Frame, poll: RunPoll) -> None:
    """Let one event update the list and every view of a run."""
    n_views = len(poll.views)

    def tick(event: gr.EventData, *values: Any) -> Updates:  # noqa: ANN401
        asked = Asked.read(event)
        memories, remembered = values[:n_views], values[n_views:]
        # The list before the views: the page stops asking when no run of the list is in progress,
        # and a run that ends between two readings must have ended in the later one, its view.
        content = _content(backend, asked, remembered)
        found = poll.updates(asked.visitor, memories, first=asked.is_first)
        if asked.is_first:
            found[poll.visitor] = asked.visitor
        return {**found, frame.runs: content}

    inputs = [*poll.memories, *frame.memories]
    outputs = [frame.runs, poll.visitor, *poll.outputs]
    frame.runs.tick(tick, inputs, outputs, queue=False, trigger_mode="multiple", **QUIET)


def _wire_actions(backend: Backend, frame: Frame) -> None:
    """Wire Cancel, Resume and Delete; an error is shown in the row."""

    def act(event: gr.EventData, now: ChosenMerge, *remembered: Any) -> Updates:  # noqa: ANN401
        asked, failed = Asked.read(event), ""
        key = _keys(backend, asked, remembered).get(asked.run, "")
        try:
            _do(backend, asked, key)
        except IPMergeError as error:
            failed = sentence_of(error)
        found = {frame.runs: _content(backend, asked, remembered, failed)}
        deletes = asked.action == "delete" and not failed
        return {**found, **_remaining_pairs(backend, frame, now)} if deletes else found

    inputs, outputs = [frame.view.chosen, *frame.memories], [frame.runs, frame.pair, *frame.view]
    acted = frame.runs.act(act, inputs, outputs, queue=False, trigger_mode="multiple", **QUIET)
    acted.then(None, None, None, js=POKE, queue=False, **QUIET)


def _do(backend: Backend, asked: Asked, key: str) -> None:
    """Cancel, resume or delete a run. Raises: RunError, also without the right key."""
    if asked.action == "cancel":
        backend.store.cancel(asked.run, key)
    elif asked.action == "resume":
        backend.store.resume(asked.run, key)
    elif asked.action == "delete":
        delete_run(backend, asked.run, key)
    else:
        raise RunError(f"Unknown action '{asked.action[:40]}'; expected cancel, resume or delete.")


def _remaining_pairs(backend: Backend, frame: Frame, now: ChosenMerge) -> Updates:
    """List the pairs again after a deletion; show the first one if the shown one is gone."""
    runs, known = partial(is_running, backend), [entry.id for entry in list_packs()]
    choices = pair_choices(runs, now.pack_id)
    if known and now.pack_id not in [value for _, value in choices]:
        return frame.open_pair(backend, known[0], now)
    return {frame.pair: gr.update(choices=choices)}


def _wire_open(backend: Backend, frame: Frame) -> Dependency:
    """Wire "Show", which opens the tab of a run, and "Try it", which asks its model."""

    def take(
        event: gr.EventData,
        method: str,
        now: ChosenMerge,
        selections: Selections,
        kept: str,
        *remembered: Any,  # noqa: ANN401
    ) -> Updates:
        asked = Asked.read(event)
        keys = _keys(backend, asked, remembered)
        if asked.action == "try":
            runs, last = remembered[:2]
            held = Held(now, selections, runs, last, kept)
            return _try(backend, frame, (asked.run, keys), held)
        return _show(backend, frame, _find(backend, keys, asked.run), now, method)

    taking = frame.taking
    choice = taking.choice
    inputs = [frame.method, choice.chosen, choice.selections, choice.kept, *frame.memories]
    outputs = [taking.tabs, frame.pair, *frame.view, frame.method, *frame.memories]
    outputs += [choice.selections, *choice.shown]
    # Queued, because the page shows errors of queued events only.
    opened = frame.runs.open(show_errors(take), inputs, outputs, **QUIET)
    poked: Dependency = opened.then(None, None, None, js=POKE, queue=False, **QUIET)
    return poked


def _try(backend: Backend, frame: Frame, wanted: tuple[str, Keys], held: Held) -> Updates:
    """Choose a finished merge, under its own pair, and open the chat."""
    run, keys = wanted
    now = held.chosen
    tuned = [known.status.id for known in visible_runs(backend, keys) if known.kind == FINETUNING]
    if run in tuned:
        pack_id = pair_of_finetuned(backend, run, keys, now.pack_id)
        opened = frame.open_pair(backend, pack_id, now)
        held = held._replace(chosen=opened.get(frame.view.chosen, now))
        return {**opened, **frame.taking.finetuned(run, keys, held)}
    opened = frame.open_pair(backend, pair_of_merge(backend, run, keys, now.pack_id), now)
    runs = with_run(held.runs, {"id": run, "key": keys.get(run, "")})
    held = held._replace(chosen=opened.get(frame.view.chosen, now), runs=runs)
    return {**opened, **frame.taking.updates(run, held), frame.taking.choice.runs: runs}


def _show(backend: Backend, frame: Frame, run: Run, now: ChosenMerge, method: str) -> Updates:
    """Show a run in its tab: an analysis on the map, the others in the Merge tab."""
    remembered = {"id": run.status.id, "key": run.key}
    if run.kind == ANALYSIS:
        found = frame.open_pair(backend, id_of(run.out), now)
        return {**found, frame.analysis: remembered, frame.taking.tabs: gr.Tabs(selected="explore")}
    if run.kind == EVALUATION:
        return {frame.evaluation: remembered, frame.taking.tabs: gr.Tabs(selected="evaluate")}
    if run.kind == FINETUNING:
        return {frame.finetuning: remembered, frame.taking.tabs: gr.Tabs(selected="finetune")}
    found = {frame.taking.tabs: gr.Tabs(selected="merge")}
    if run.kind != CALIBRATION:
        return {**found, frame.job: remembered}
    pack_id = run.request.about.get("pack", "")
    if pack_id in [entry.id for entry in list_packs()]:
        found |= frame.open_pair(backend, pack_id, now)
    kind = run.status.arguments.get("kind")
    if data_kind(MethodChoice(method)) != kind:
        found[frame.method] = gr.update(**list_methods(), value=_METHODS_OF[str(kind)])
    return {**found, frame.calibration: remembered}


def _find(backend: Backend, keys: Keys, run: str) -> Run:
    """Find a run that the visitor may see. Raises: RunError."""
    for found in visible_runs(backend, keys):
        if found.status.id == run:
            return found
    raise RunError("This run no longer exists. It may have been deleted in another window.")


def _keys(backend: Backend, asked: Asked, remembered: Sequence[object]) -> Keys:
    """Return the keys that a browser holds: derived from its secret, or remembered."""
    runs, *lasts = remembered
    known = [keys_of(runs, lasts[0]), *(keys_of(None, last) for last in lasts[1:])]
    return keys_held(backend, asked.visitor, {k: v for keys in known for k, v in keys.items()})


def _content(
    backend: Backend, asked: Asked, remembered: Sequence[object], failed: str = ""
) -> Json:
    """Return the content of the component as the answer to an event."""
    rows = describe_runs(backend, _keys(backend, asked, remembered))
    return {"n": asked.n, "run": asked.run, "failed": failed, **rows}
