"""Build the calibration form of the Merge tab: choose a finished calibration or run a new one.

In: the chosen pair, method and device. Out: the folder of a finished calibration, stored in the
method's choice. A new calibration is a run with progress, cancel and resume; the browser keeps its
id and key, and the calibration chosen for each pair. Only those of the same weights are listed.
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
from ipmerge_core.ui.finished_merges import method_label
from ipmerge_core.ui.format import format_size
from ipmerge_core.ui.merge.start_gate import LAST, StartGate
from ipmerge_core.ui.method_choice import EXPLORED_METHOD, MethodChoice, data_kind
from ipmerge_core.ui.runs import (
    Listener,
    Remembered,
    RunPoll,
    RunState,
    RunView,
    Updates,
    disable_on_click,
)

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.methods.registry import DataKind

SELECTED = "selected"  # where the browser remembers the run whose result was selected last
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


class CalibrationInputs(NamedTuple):
    """What the form reads: the pair, a MethodChoice, the device, and the browser's memory."""

    pair: gr.Dropdown
    method: gr.State
    device: gr.Dropdown
    memory: gr.BrowserState


class CalibrationView(NamedTuple):
    """The contents of the form for a method that needs samples, the method's choice, and memory."""

    intro: str
    folders: dict[str, Any]
    choice: MethodChoice
    memory: Remembered


def calibration_form(
    backend: Backend,
    block: gr.Column,
    inputs: CalibrationInputs,
    *,
    poll: RunPoll,
    gate: StartGate,
    choose: Callable[[Listener], Dependency],
) -> Callable[[Dependency], Dependency]:
    """Lay out the form inside `block` and wire it; returns a function that fills it after an event.

    Args:
        backend: the app's runs.
        block: the column to lay it out in; it is shown for methods that need samples.
        inputs: what the form reads.
        poll: updates the view of the run.
        gate: disables Start until a change has been checked.
        choose: makes the form's merge the chosen one after an event.
    """
    pair, method, _, memory = inputs
    with block:
        parts = _layout(hosted=backend.hosted)
    made = gr.Textbox("", visible="hidden", elem_id="calibration-made")  # its change is an event

    def show(
        pack_id: str, how: MethodChoice, mine: Remembered | None, just_made: str
    ) -> Updates:  # fmt: skip
        view = calibration_view(backend, pack_id, how, mine or {}, just_made)
        if view is None:
            return {block: gr.update(visible=False)}
        return {
            block: gr.update(visible=True),
            parts.intro: view.intro,
            parts.folder: view.folders,
            method: view.choice,
            memory: view.memory,
        }

    def keep(
        pack_id: str, how: MethodChoice, mine: Remembered | None, folder: str | None
    ) -> tuple[MethodChoice, Remembered]:
        kind = data_kind(how)
        if kind is None:
            return how, mine or {}
        made_here = [str(path) for path in backend.finished_calibrations(pack_id, kind)]
        chosen = folder if folder and (not backend.hosted or folder in made_here) else ""
        return how._replace(calibration=chosen), {**(mine or {}), _place(pack_id, how): chosen}

    def extras(run: RunState, _: str) -> Updates:
        idle = not (run.owned and run.running)
        return {made: made_by(run), parts.start: gr.update(interactive=idle)}

    filled = [block, parts.intro, parts.folder, method, memory]
    shown, kept = [pair, method, memory, made], parts.folder.input
    gate.disable_on(kept)
    chosen = [pair, method, memory, parts.folder]
    stored = kept(keep, chosen, [method, memory], queue=False, **QUIET)
    gate.check_after(choose(stored.then).then)
    gate.disable_on(made.change)
    arrived = made.change(show_errors(show), shown, filled, **QUIET)
    gate.check_after(choose(arrived.then).then)
    parts.run.wire(backend, memory, poll, extras=extras, outputs=[made, parts.start])
    _wire_start(backend, parts, inputs, poll)
    return lambda event: event.then(show_errors(show), shown, filled, **LAST)


def _wire_start(backend: Backend, parts: _Parts, inputs: CalibrationInputs, poll: RunPoll) -> None:
    """Let the button start a calibration, which the form then follows."""
    pair, method, device, memory = inputs

    def begin(
        visitor: str,
        mine: Remembered | None,
        where: str,
        pack_id: str,
        how: MethodChoice,
        seen: str,
        read: str,
        limit: float | None,
    ) -> Remembered:
        count = int(limit or 0)
        kind = data_kind(how)
        if kind is None:
            raise RunError("The chosen merge needs no calibration.")
        started = backend.start_calibration(
            pack_id, kind, seen, read, count, device=where, owner=visitor
        )
        return {**(mine or {}), **started._asdict()}

    fields = [pair, method, parts.mllm_samples, parts.math_samples, parts.limit]
    disable_on_click(parts.start)
    pressed = parts.start.click(
        show_errors(begin), [poll.visitor, memory, device, *fields], memory, **QUIET
    )
    for ends in (pressed.success, pressed.failure):  # Gradio lets no `then` follow an error
        parts.run.follow(ends)


def calibration_view(
    backend: Backend, pack_id: str, how: MethodChoice, mine: Remembered, just_made: str
) -> CalibrationView | None:
    """Return the contents of the form; None for a method that needs no samples.

    A calibration that has just finished is selected once. Otherwise the selection is what the
    visitor chose for this pair and kind of data, or the newest one.
    """
    kind = data_kind(how)
    if kind is None:
        return None
    try:
        folders = [str(path) for path in backend.finished_calibrations(pack_id, kind)]
    except IPMergeError:
        folders = []  # the pair cannot be read; the check reports why
    is_new = just_made in folders and mine.get(SELECTED) != just_made
    before = str(mine.get(_place(pack_id, how), ""))
    is_path = not backend.hosted and Path(before).parent != backend.calibrations_folder
    wanted = [just_made if is_new else "", before if is_path or before in folders else ""]
    chosen = next(filter(None, [*wanted, *folders[-1:]]), "")
    memory = {**mine, _place(pack_id, how): chosen}
    if just_made in folders:
        memory[SELECTED] = just_made
    intro = (
        f"{method_label(how.name or EXPLORED_METHOD)} needs {MEASURES[kind]}. A calibration "
        f"measures them by running both models on samples. {_describe_cost(backend, pack_id, kind)}"
    )
    listed = gr.update(
        choices=[(_label(folder), folder) for folder in folders],
        value=chosen or None,
        info=("Finished for these weights" if folders else "None finished for these weights")
        + ("" if backend.hosted else "; or enter a path"),
    )
    return CalibrationView(intro, listed, how._replace(calibration=chosen), memory)


def _place(pack_id: str, how: MethodChoice) -> str:
    """Return where the browser remembers the choice for a pair and kind of data."""
    return f"{data_kind(how)} of {pack_id}"


def _label(folder: str) -> str:
    """Return the name of a calibration with its date, number of samples and their sources."""
    from ipmerge_core.calibration.store import Measurements

    return f"{Path(folder).name} · {Measurements.open(folder).describe()}"


def made_by(run: RunState) -> str:
    """Return the folder of a finished calibration; empty until it is finished."""
    return run.out if run.finished else ""


def _describe_cost(backend: Backend, pack_id: str, kind: DataKind) -> str:
    """Describe the memory and disk space of a calibration, which do not depend on the samples."""
    try:
        cost = backend.calibration_cost(pack_id, kind)
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
