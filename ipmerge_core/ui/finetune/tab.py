"""Build the Fine-tune tab: the form, its check, the run in progress with its curves, the result.

In: the chosen pair, whose models the form proposes. Out: a run that outlives the page. Its model
opens in the chat and in Evaluate, and an analysis shows on the map where training moved it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError, PlanError, RunError
from ipmerge_core.finetuning.curves import read_points
from ipmerge_core.finetuning.provenance import read_finetuning
from ipmerge_core.runtime.job_lists import describe_job
from ipmerge_core.ui.analyse.models_form import AnalysisRequest, start_analysis
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.column_choice import Held, TryFinished
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.device_choice import list_devices
from ipmerge_core.ui.errors import QUIET, sentence_of, show_errors
from ipmerge_core.ui.evaluate.form import Form as EvaluateForm
from ipmerge_core.ui.evaluate.form import shown_groups
from ipmerge_core.ui.evaluate.tab import listed_models
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.finetune.curves import curves_html
from ipmerge_core.ui.finetune.form import Asked, Form, lay_out_form
from ipmerge_core.ui.finetune.start import (
    COMMAND,
    Models,
    check,
    found_html,
    models_of,
    named,
    start,
)
from ipmerge_core.ui.finetuned_models import find_finetuned
from ipmerge_core.ui.plan_choice import analysis_of
from ipmerge_core.ui.run_list.rows import keys_held
from ipmerge_core.ui.runs import (
    POKE,
    Remembered,
    RunPoll,
    RunState,
    RunView,
    Updates,
    disable_on_click,
    find_run,
)
from ipmerge_core.ui.safe_text import as_html

LEAD = (
    "Supervised fine-tuning of the vision-language model, with its gradient tilted toward the "
    "expert: DRIFT (arXiv 2510.15050). Check reads headers and the first examples; training starts "
    "after it."
)
OFF = (
    "<p>Fine-tuning is off on this Space: it reads your own data, and runs for hours on the "
    f"hardware of the Space. Run it on your machine:</p><pre>{COMMAND}</pre>"
    "<p>The app on your machine has the same form: <code>python app.py</code>.</p>"
)
NO_RUN = '<p class="waiting">No fine-tuning yet.</p>'
STALE = '<p class="waiting">Check before you start: names, shapes, memory and examples.</p>'


class _Parts(NamedTuple):
    """The components of the tab."""

    form: Form
    checked: gr.State  # the values that the last check accepted, with the output folder
    proposed: gr.State  # the models that the tab filled in last
    run: RunView
    curves: gr.HTML
    buttons: gr.Row
    ask: gr.Button
    evaluate: gr.Button
    analyse: gr.Button


class Elsewhere(NamedTuple):
    """What the result opens in: the chat, the Evaluate tab, an analysis."""

    taking: TryFinished
    evaluating: EvaluateForm
    analysis: gr.BrowserState


def finetune_tab(
    backend: Backend,
    pair: gr.Dropdown,
    elsewhere: Elsewhere,
    *,
    poll: RunPoll,
    memory: gr.BrowserState,
    tab: gr.Tab,
) -> None:
    """Lay out the tab inside the open `tab` and wire it; on a Space, only show how to run it.

    Args:
        backend: the app's runs and models.
        pair: the pair dropdown.
        elsewhere: what the result opens in.
        poll: updates the view of the run.
        memory: the run that the browser remembers.
        tab: the tab itself.
    """
    if backend.hosted:
        gr.HTML(OFF, elem_id="finetune-off")
        return
    parts = _lay_out()
    _wire_form(backend, parts, pair, tab)
    _wire_run(backend, parts, poll, memory)
    _wire_result(backend, parts, elsewhere, poll, memory)


def _lay_out() -> _Parts:
    gr.Markdown(LEAD, elem_classes="lead")
    form = lay_out_form()
    run = RunView("finetune", empty=NO_RUN)
    curves = gr.HTML("", elem_id="finetune-curves")
    with gr.Row(visible=False, elem_classes="run-row", elem_id="finetune-result") as buttons:
        ask = gr.Button("Ask in the chat", size="sm", elem_id="finetune-try")
        evaluate = gr.Button("Evaluate", size="sm", elem_id="finetune-evaluate")
        analyse = gr.Button("Analyse what moved", size="sm", elem_id="finetune-analyse")
    state = gr.State(None), gr.State(Models())
    return _Parts(form, *state, run, curves, buttons, ask, evaluate, analyse)


def _wire_form(backend: Backend, parts: _Parts, pair: gr.Dropdown, tab: gr.Tab) -> None:
    """Propose the models of the pair, check on request, and forget a check that is stale."""
    form, inputs = parts.form, parts.form.inputs

    def propose(pack_id: str | None, mllm: str, math: str, before: Models) -> Updates:
        return proposed(backend, form, pack_id, Models(mllm, math), before) | {
            parts.proposed: models_of(backend, pack_id or "")
        }

    asked = [pair, inputs["mllm"], inputs["math"], parts.proposed]
    filled = [inputs["mllm"], inputs["math"], parts.proposed]
    opened = after_commits(tab.select, pair).then(propose, asked, filled, **QUIET)
    opened.then(lambda: list_devices(backend), None, inputs["device"], **QUIET)

    def run_check(*values: Any) -> Updates:  # noqa: ANN401
        ready, html = checked_form(backend, form, values)
        return {parts.checked: ready, form.found: html, form.start: _enabled(ready is not None)}

    outputs = [parts.checked, form.found, form.start]
    form.check.click(
        run_check, form.fields, outputs, show_progress="minimal", api_visibility="private"
    )

    def forget(known: Asked | None) -> Updates:
        if known is None:
            return {parts.checked: None, form.found: gr.skip(), form.start: gr.skip()}
        return {parts.checked: None, form.found: STALE, form.start: _enabled(False)}

    changes = [field.change for field in form.fields if field is not inputs["device"]]
    gr.on([*changes, inputs["device"].input], forget, parts.checked, outputs, queue=False, **QUIET)


def _enabled(is_enabled: bool) -> dict[str, Any]:
    update: dict[str, Any] = gr.update(interactive=is_enabled)
    return update


def proposed(
    backend: Backend, form: Form, pack_id: str | None, typed: Models, before: Models
) -> Updates:
    """Return the updates that fill in the models of a pair; what a user typed stays."""
    found = models_of(backend, pack_id or "")
    updates: Updates = {}
    for name in Models._fields:
        is_own = getattr(typed, name).strip() not in ("", getattr(before, name))
        value = gr.skip() if is_own else getattr(found, name)
        updates[form.inputs[name]] = value
    return updates


def checked_form(backend: Backend, form: Form, values: Any) -> tuple[Asked | None, str]:  # noqa: ANN401
    """Return the request that can start, and the findings of its check as HTML."""
    try:
        asked = named(backend, form.read(values))
        found = check(backend, asked)
    except IPMergeError as error:
        return None, f'<p class="failure" role="alert">✕ {as_html(sentence_of(error))}</p>'
    return asked, found_html(found, str(backend.output_folder(asked.name)))


def _wire_run(backend: Backend, parts: _Parts, poll: RunPoll, memory: gr.BrowserState) -> None:
    """Start runs, and follow them with their curves."""
    form = parts.form

    def begin(visitor: str, ready: Asked | None) -> Updates:
        if ready is None:
            raise PlanError("The form was not checked, or changed since. Check again.")
        started = start(backend, ready, owner=visitor)
        return {memory: started._asdict(), parts.checked: None}

    def extras(run: RunState, _: str) -> Updates:
        return {
            parts.curves: drawn_curves(run),
            parts.buttons: gr.update(visible=has_model(run)),
        }

    parts.run.wire(backend, memory, poll, extras=extras, outputs=[parts.curves, parts.buttons])
    disable_on_click(form.start)
    asked = [poll.visitor, parts.checked]
    pressed = form.start.click(show_errors(begin), asked, [memory, parts.checked], **QUIET)
    for ends in (pressed.success, pressed.failure):
        parts.run.follow(ends)

    def enable_again(ready: Asked | None) -> dict[str, Any]:
        return _enabled(ready is not None)

    pressed.failure(enable_again, parts.checked, form.start, queue=False, **QUIET)


def drawn_curves(run: RunState) -> str:
    """Return the curves of a run so far; empty if it has none."""
    path = str(run.status.arguments.get("curves", "")) if run.status else ""
    try:
        return curves_html(read_points(Path(path)), growing=run.running) if path else ""
    except RunError as error:
        return f'<p class="failure">✕ {as_html(sentence_of(error))}</p>'


def has_model(run: RunState) -> bool:
    """Whether a run has finished and its model still exists."""
    return run.finished and read_finetuning(Path(run.out)) is not None


def _wire_result(
    backend: Backend,
    parts: _Parts,
    elsewhere: Elsewhere,
    poll: RunPoll,
    memory: gr.BrowserState,
) -> None:
    """Open the model of the run in the chat, in Evaluate, or start its analysis."""
    taking, form = elsewhere.taking, elsewhere.evaluating

    def ask(remembered: Remembered, visitor: str, *values: Any) -> Updates:  # noqa: ANN401
        keys = keys_held(backend, visitor, {})
        return taking.finetuned(remembered.get("id", ""), keys, Held(*values))

    inputs = [memory, poll.visitor, *taking.choice.asked]
    parts.ask.click(show_errors(ask), inputs, taking.outputs, **QUIET)

    def evaluate(remembered: Remembered, visitor: str, now: ChosenMerge) -> Updates:
        keys = keys_held(backend, visitor, {})
        model = find_finetuned(backend, now.pack_id, remembered.get("id", ""), keys)
        choices = listed_models(backend, now.pack_id, keys)
        return {
            form.kind: "models",
            form.merges: gr.update(choices=choices, value=[model.value]),
            **shown_groups(form, "models"),
            taking.tabs: gr.Tabs(selected="evaluate"),
        }

    groups = [form.models, form.sweep, form.knockout]
    parts.evaluate.click(
        show_errors(evaluate),
        [memory, poll.visitor, taking.choice.chosen],
        [form.kind, form.merges, *groups, taking.tabs],
        **QUIET,
    )

    def analyse(remembered: Remembered, visitor: str) -> Remembered:
        run = find_run(backend, remembered, visitor)
        return start_analysis(backend, analysis_request(backend, run), owner=visitor)._asdict()

    started = parts.analyse.click(
        show_errors(analyse), [memory, poll.visitor], elsewhere.analysis, **QUIET
    )
    started.success(None, None, None, js=POKE, queue=False, **QUIET)


def analysis_request(backend: Backend, run: RunState) -> AnalysisRequest:
    """Return the analysis of a run's model with the base and the experts of its pair.

    Raises: RunError if the run has no model, or its models are not those of an analysed pair.
    """
    if run.status is None or not has_model(run):
        raise RunError("This run has no model to analyse: it has not finished, or was deleted.")
    pack_id = describe_job(backend.store, run.status.id).about.get("pack", "")
    if not pack_id:
        raise RunError(
            "The base of these models is not known, because they are not those of an analysed "
            "pair. Enter the result and the base under 'Analyse other models'."
        )
    found = analysis_of(pack_id).sources.locations()
    return AnalysisRequest(run.out, tuple(found.math), found.base, found.base_mllm or "")
