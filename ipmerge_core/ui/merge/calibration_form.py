"""The part of the Merge tab for methods that need samples: choose a calibration, or make one.

In: the chosen pair and method. Out: the folder of a finished calibration, put into the method's
choice; a run that makes one is a job like a merge, with progress, cancel and resume, and the
browser keeps its id and key. Only calibrations of these very weights are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import QUIET, told
from ipmerge_core.ui.format import size_words
from ipmerge_core.ui.merge.method_form import MethodChoice
from ipmerge_core.ui.merge.start_gate import LAST, StartGate
from ipmerge_core.ui.runs import Remembered, RunState, RunView, Updates, disable_on_click

if TYPE_CHECKING:
    from gradio.events import Dependency

WHAT = {
    "gram": "what every matrix reads",
    "fisher": "how much every answer depends on every weight",
}
SAMPLES_HINT = (
    "demo ({tasks} tasks), demo:perception, demo:math, datasets:NAME, or a jsonl file with "
    "{columns} on each line"
)


class _Parts(NamedTuple):
    """The components of the block."""

    intro: gr.Markdown
    folder: gr.Dropdown
    seen: gr.Textbox
    told: gr.Textbox
    limit: gr.Number
    start: gr.Button
    run: RunView


class CalibrationView(NamedTuple):
    """What the block shows for a method that needs samples, and the choice that goes with it."""

    intro: str
    folders: dict[str, Any]
    choice: MethodChoice


def calibration_form(
    app: gr.Blocks,
    backend: Backend,
    block: gr.Column,
    pair: gr.Dropdown,
    method: gr.State,
    *,
    job: gr.BrowserState,
    gate: StartGate,
) -> Callable[[Dependency], Dependency]:
    """Lay out the block inside `block` and wire it; returns what fills it when it is needed.

    Args:
        app: the whole page, whose loading attaches to a run again.
        backend: where runs are kept.
        block: the column to lay it out in; it is shown for the methods that need it.
        pair: the chosen pair.
        method: holds a MethodChoice.
        job: what the browser remembers of a run.
        gate: what keeps Start off until a change of the choice is checked.
    """
    with block:
        parts = _layout(hosted=backend.hosted)
    made = gr.State("")

    def show(pack_id: str, how: MethodChoice, just_made: str) -> Updates:
        view = calibration_view(backend, pack_id, how, just_made)
        if view is None:
            return {block: gr.update(visible=False)}
        return {
            block: gr.update(visible=True),
            parts.intro: view.intro,
            parts.folder: view.folders,
            method: view.choice,
        }

    def keep(pack_id: str, how: MethodChoice, folder: str | None) -> MethodChoice:
        made_here = [str(path) for path in backend.finished_calibrations(pack_id, how.name)]
        allowed = not backend.hosted or folder in made_here
        return how._replace(calibration=folder if folder and allowed else "")

    def begin(
        pack_id: str, how: MethodChoice, seen: str, read: str, limit: float | None
    ) -> Remembered:
        started = backend.start_calibration(pack_id, how.name, seen, read, int(limit or 0))
        return started._asdict()

    def extras(run: RunState) -> Updates:
        idle = not (run.owned and run.running)
        return {made: made_by(run), parts.start: gr.update(interactive=idle)}

    filled = [block, parts.intro, parts.folder, method]
    asked = [pair, method, parts.seen, parts.told, parts.limit]
    kept = parts.folder.input
    gate.at_once(kept)
    gate.after(kept(keep, [pair, method, parts.folder], method, queue=False, **QUIET).then)
    gate.at_once(made.change)
    gate.after(made.change(told(show), [pair, method, made], filled, **QUIET).then)
    parts.run.wire(
        backend, job, [app.load], extras=extras, outputs=[made, parts.start], queued=True
    )
    disable_on_click(parts.start)
    pressed = parts.start.click(told(begin), asked, job, **QUIET)
    for ends in (pressed.success, pressed.failure):  # Gradio lets no `then` follow an error
        parts.run.follow(ends)
    return lambda event: event.then(told(show), [pair, method, made], filled, **LAST)


def calibration_view(
    backend: Backend, pack_id: str, how: MethodChoice, just_made: str
) -> CalibrationView | None:
    """Return what the block shows for a method; None for a method that needs no samples.

    A calibration that was just made is chosen; else the one chosen before, if it is not one made
    here for another pair or method.
    """
    method = data_method(how.name)
    if method is None:
        return None
    try:
        folders = [str(path) for path in backend.finished_calibrations(pack_id, how.name)]
    except IPMergeError:
        folders = []  # of a pair that cannot be read: the check says why
    elsewhere = Path(how.calibration).parent != backend.calibrations_folder
    chosen_before = how.calibration if elsewhere or how.calibration in folders else ""
    wanted = [just_made if just_made in folders else "", chosen_before, *folders[-1:]]
    chosen = next(filter(None, wanted), "")
    intro = (
        f"{method.label} needs to know {WHAT[str(method.data)]}, measured by running both models "
        f"on samples. {_cost_words(backend, pack_id, how.name)}"
    )
    listed = gr.update(
        choices=[(Path(folder).name, folder) for folder in folders],
        value=chosen or None,
        info=f"{'made here before' if folders else 'none made here yet'}, of these weights"
        + ("" if backend.hosted else "; or any folder with one"),
    )
    return CalibrationView(intro, listed, how._replace(calibration=chosen))


def data_method(name: str) -> Any:  # noqa: ANN401 (a MergeMethod; methods are imported late)
    """Return the method of that name if it needs data."""
    if not name:  # the plan from Explore; no methods are loaded for it
        return None
    from ipmerge_core.methods import METHODS

    method = METHODS.get(name)
    return method if method is not None and method.data is not None else None


def made_by(run: RunState) -> str:
    """Return the folder of a finished calibration; empty until it is finished."""
    return run.out if run.finished else ""


def _cost_words(backend: Backend, pack_id: str, name: str) -> str:
    """Say what one sample more or less does not change: memory and disk."""
    try:
        cost = backend.calibration_cost(pack_id, name)
    except (RunError, IPMergeError) as error:
        return str(error)
    return (
        f"It loads one model after the other ({size_words(cost.nbytes_model)} the largest), holds "
        f"{size_words(cost.nbytes_held)} of sums and writes {size_words(cost.nbytes_written)}."
    )


def _layout(*, hosted: bool) -> _Parts:
    intro = gr.Markdown("")
    with gr.Row(elem_classes="fields"):
        folder = gr.Dropdown(
            [], label="Calibration", elem_id="calibration-folder", allow_custom_value=not hosted
        )
        words: dict[str, Any] = {"value": "demo", "interactive": not hosted}
        seen = gr.Textbox(
            label="Samples for the vision model",
            info=SAMPLES_HINT.format(tasks="all", columns="question, answer and image"),
            elem_id="samples-seen",
            **words,
        )
        read = gr.Textbox(
            label="Samples for the math model",
            info=SAMPLES_HINT.format(tasks="math", columns="question and answer"),
            elem_id="samples-told",
            **words,
        )
        limit = gr.Number(
            60,
            label="How many of each",
            info="a few hundred for real models",
            precision=0,
            minimum=1,
            elem_id="samples-limit",
        )
    with gr.Row(elem_classes="run-row"):
        start = gr.Button("Calibrate", size="sm", elem_id="start-calibration")
    run = RunView("calibration")
    return _Parts(intro, folder, seen, read, limit, start, run)
