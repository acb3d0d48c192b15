"""Build the calibration form of the Merge tab: choose a finished calibration or run a new one.

In: the chosen pair and method. Out: the folder of a finished calibration, stored in the method's
choice. A new calibration is a run with progress, cancel and resume; the browser keeps its id and
key. Only calibrations of the same weights are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.calibration.samples import MOST_SAMPLES
from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.format import format_size
from ipmerge_core.ui.merge.method_form import MethodChoice
from ipmerge_core.ui.merge.start_gate import LAST, StartGate
from ipmerge_core.ui.runs import Remembered, RunState, RunView, Updates, disable_on_click

if TYPE_CHECKING:
    from gradio.events import Dependency

MEASURES = {
    "gram": "the Gram matrices of the layer inputs",
    "fisher": "the diagonal Fisher values of the weights",
}
SAMPLES_HINT = (
    "demo ({tasks} tasks), demo:perception, demo:math, datasets:NAME, or a jsonl file with "
    "{columns} per line"
)


class _Parts(NamedTuple):
    """The components of the form."""

    intro: gr.Markdown
    folder: gr.Dropdown
    mllm_samples: gr.Textbox
    math_samples: gr.Textbox
    limit: gr.Number
    start: gr.Button
    run: RunView


class CalibrationView(NamedTuple):
    """The contents of the form for a method that needs samples, and the method's choice."""

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
    """Lay out the form inside `block` and wire it; returns a function that fills it after an event.

    Args:
        app: the app, whose load event shows a remembered run again.
        backend: the app's runs.
        block: the column to lay it out in; it is shown for methods that need samples.
        pair: the chosen pair.
        method: holds a MethodChoice.
        job: what the browser remembers of the run.
        gate: disables Start until a change has been checked.
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
    asked = [pair, method, parts.mllm_samples, parts.math_samples, parts.limit]
    kept = parts.folder.input
    gate.disable_on(kept)
    gate.check_after(kept(keep, [pair, method, parts.folder], method, queue=False, **QUIET).then)
    gate.disable_on(made.change)
    gate.check_after(made.change(show_errors(show), [pair, method, made], filled, **QUIET).then)
    parts.run.wire(
        backend, job, [app.load], extras=extras, outputs=[made, parts.start], queued=True
    )
    disable_on_click(parts.start)
    pressed = parts.start.click(show_errors(begin), asked, job, **QUIET)
    for ends in (pressed.success, pressed.failure):  # Gradio lets no `then` follow an error
        parts.run.follow(ends)
    return lambda event: event.then(show_errors(show), [pair, method, made], filled, **LAST)


def calibration_view(
    backend: Backend, pack_id: str, how: MethodChoice, just_made: str
) -> CalibrationView | None:
    """Return the contents of the form; None for a method that needs no samples.

    A calibration that has just finished is selected. Otherwise the selection stays, unless it is
    one that was made here for another pair or method.
    """
    method = data_method(how.name)
    if method is None:
        return None
    try:
        folders = [str(path) for path in backend.finished_calibrations(pack_id, how.name)]
    except IPMergeError:
        folders = []  # the pair cannot be read; the check reports why
    elsewhere = Path(how.calibration).parent != backend.calibrations_folder
    chosen_before = how.calibration if elsewhere or how.calibration in folders else ""
    wanted = [just_made if just_made in folders else "", chosen_before, *folders[-1:]]
    chosen = next(filter(None, wanted), "")
    intro = (
        f"{method.label} needs {MEASURES[str(method.data)]}. A calibration measures them by "
        f"running both models on samples. {_describe_cost(backend, pack_id, how.name)}"
    )
    listed = gr.update(
        choices=[(Path(folder).name, folder) for folder in folders],
        value=chosen or None,
        info=("Finished for these weights" if folders else "None finished for these weights")
        + ("" if backend.hosted else "; or enter a path"),
    )
    return CalibrationView(intro, listed, how._replace(calibration=chosen))


def data_method(name: str) -> Any:  # noqa: ANN401 (a MergeMethod; methods are imported late)
    """Return the method of this name if it needs data, else None."""
    if not name:  # the plan from Explore needs none; do not import the methods for it
        return None
    from ipmerge_core.methods import METHODS

    method = METHODS.get(name)
    return method if method is not None and method.data is not None else None


def made_by(run: RunState) -> str:
    """Return the folder of a finished calibration; empty until it is finished."""
    return run.out if run.finished else ""


def _describe_cost(backend: Backend, pack_id: str, name: str) -> str:
    """Describe the memory and disk space of a calibration, which do not depend on the samples."""
    try:
        cost = backend.calibration_cost(pack_id, name)
    except (RunError, IPMergeError) as error:
        return str(error)
    return (
        f"It loads one model at a time (up to {format_size(cost.nbytes_model)}), keeps "
        f"{format_size(cost.nbytes_held)} of statistics in memory and writes "
        f"{format_size(cost.nbytes_written)}."
    )


def _layout(*, hosted: bool) -> _Parts:
    intro = gr.Markdown("")
    with gr.Row(elem_classes="fields"):
        folder = gr.Dropdown(
            [], label="Calibration", elem_id="calibration-folder", allow_custom_value=not hosted
        )
        words: dict[str, Any] = {"value": "demo", "interactive": not hosted}
        seen = gr.Textbox(
            label="Samples for the vision-language model",
            info=SAMPLES_HINT.format(tasks="all", columns="question, answer and image"),
            elem_id="samples-mllm",
            **words,
        )
        read = gr.Textbox(
            label="Samples for the math model",
            info=SAMPLES_HINT.format(tasks="math", columns="question and answer"),
            elem_id="samples-math",
            **words,
        )
        limit = gr.Number(
            60,
            label="Samples per model",
            info="A few hundred for real models",
            precision=0,
            minimum=1,
            maximum=MOST_SAMPLES,
            elem_id="samples-limit",
        )
    with gr.Row(elem_classes="run-row"):
        start = gr.Button("Calibrate", size="sm", elem_id="start-calibration")
    run = RunView("calibration")
    return _Parts(intro, folder, seen, read, limit, start, run)
