"""The "Analyse other models" panel: name the models, check them, start an analysis, watch it.

In: names of models. Out: a run that makes a pack, shown on the map while it is made and selected
under Pair when it is finished. Nothing is downloaded before Start, and user input is kept. The run
outlives the page: the browser keeps its id and key and shows it again after a reload.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.models.catalogue import load_catalogue
from ipmerge_core.spectral.kinds import TEMPERATURE
from ipmerge_core.ui.analyse.descriptions import known_html, known_label, needs_html, pair_html
from ipmerge_core.ui.analyse.models_form import (
    AnalysisRequest,
    Checked,
    check_request,
    discard,
    failed_check,
    is_running,
    read_request,
    start_analysis,
)
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.device_choice import AUTO, device_field, list_devices
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.partial_packs import explored_pack, pair_choices
from ipmerge_core.ui.explore.tab import PairView, open_pair
from ipmerge_core.ui.format import findings_html
from ipmerge_core.ui.pairs import SKIP_ALL, find_partial, id_of, list_packs
from ipmerge_core.ui.runs import (
    Remembered,
    RunPoll,
    RunState,
    RunView,
    Updates,
    disable_on_click,
    find_run,
)
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from gradio.events import Dependency

EXACT, QUICK = "exact", "quick"
LEAD = (
    "Compare a vision-language model with math models that were fine-tuned from the same language "
    "model. Check reads headers and a few rows of the weights; the rest is read after you start."
)
ADDRESS = "Hub id such as org/name"
OR_FOLDER = ", or a local folder"
READY = "Ready to start. No weights have been downloaded yet."
REFUSED = "Cannot start: fix the items marked ✕. Your input is kept."
STALE = "Changed since the check. Check again."


class Form(NamedTuple):
    """The form: its fields, in the order of `read_request`, and the outputs of the check."""

    known: gr.Dropdown
    note: gr.HTML
    fields: list[Any]
    device: gr.Dropdown  # one of the fields
    check: gr.Button
    status: gr.HTML
    findings: gr.HTML
    facts: gr.HTML
    start: gr.Button
    close: gr.Button


class Panel(NamedTuple):
    """The components between the heading and the tabs."""

    details: gr.HTML
    opener: gr.Button
    card: gr.Column
    form: Form
    run: RunView
    show: gr.Button
    dismiss: gr.Button
    job: gr.BrowserState  # what the browser remembers of the run


# --- wiring ----------------------------------------------------------------------------------


def wire_panel(
    app: gr.Blocks,
    backend: Backend,
    panel: Panel,
    pair: gr.Dropdown,
    view: PairView,
    tabs: gr.Tabs,
    poll: RunPoll,
) -> Dependency:
    """Wire the panel to the pair's dropdown and to the map.

    Returns the event after which a pair has appeared or its analysis has finished.
    """
    waiting = gr.State("")
    started = _wire_form(backend, panel, pair, waiting, poll)
    arrived = _wire_run(backend, panel, pair, view, waiting, tabs, poll)
    panel.run.follow(started.success)

    def describe(pack_id: str | None) -> str:
        return pair_html(explored_pack(pack_id)) if pack_id else ""

    def refresh(pack_id: str | None) -> dict[str, Any]:
        return gr.update(choices=pair_choices(partial(is_running, backend), pack_id or ""))

    pair.change(show_errors(describe), pair, panel.details, queue=False, **QUIET)
    arrived.success(show_errors(describe), pair, panel.details, **QUIET)
    app.load(refresh, pair, pair, queue=False, **QUIET)
    return arrived


def _wire_form(
    backend: Backend, panel: Panel, pair: gr.Dropdown, waiting: gr.State, poll: RunPoll
) -> Dependency:
    """Wire the fields, the check and Start; returns the event after which `job` holds a run."""
    form, checked, is_open, job = panel.form, gr.State(None), gr.State(False), panel.job

    def toggle(shown: bool) -> Updates:
        return {panel.card: gr.update(visible=not shown), is_open: not shown}

    def fill(number: int | None, found: Checked | None) -> Updates:
        if number is None:
            return {form.note: "", **forget(found)}
        known = load_catalogue().pairs[number]
        typed = [known.mllm, "\n".join(known.math), known.base, known.base_mllm or ""]
        filled = dict(zip(form.fields, typed, strict=False))  # depth, rank and device stay
        return {form.note: known_html(known), **filled, **forget(found)}

    def forget(found: Checked | None) -> Updates:
        """Drop a check that no longer matches the fields."""
        stale = {} if found is None else {form.status: _waiting(STALE)}
        return {form.start: gr.update(interactive=False), checked: None, **stale}

    def check(*typed: Any) -> Iterator[Updates]:  # noqa: ANN401 (the fields' values)
        for found in iter_check(backend, *typed):
            yield {
                form.status: found.status,
                form.start: gr.update(interactive=found.ready),
                checked: found.checked,
                **(result(found) if found.over else {}),
            }

    def result(found: CheckView) -> Updates:
        devices = list_devices(backend)  # the check has loaded torch
        return {form.findings: found.findings, form.facts: found.facts, form.device: devices}

    def begin(
        visitor: str,
        found: Checked | None,
        before: str,
        *typed: Any,  # noqa: ANN401
    ) -> Updates:
        if found is None or found.pinned is None or found.asked != _read(*typed):
            raise PlanError("The form has changed since the check. Press Check again.")
        started = start_analysis(backend, found.pinned, owner=visitor)
        closed = {panel.card: gr.update(visible=False), is_open: False}
        return {job: started._asdict(), waiting: before, **closed}

    for button in (panel.opener, form.close):
        button.click(toggle, is_open, [panel.card, is_open], queue=False, **QUIET)
    stale = [form.start, form.status, checked]
    filled = [form.note, *form.fields[:4], *stale]
    form.known.input(fill, [form.known, checked], filled, queue=False, **QUIET)
    for field in form.fields:
        field.input(forget, checked, stale, queue=False, trigger_mode="once", **QUIET)
    views = [form.status, form.findings, form.facts, form.start, form.device, checked]
    lines = [field.submit for field in form.fields[:4] if field.lines == 1]
    gr.on([form.check.click, *lines], show_errors(check), form.fields, views, **QUIET)
    disable_on_click(form.start)
    pressed = form.start.click(
        show_errors(begin),
        [poll.visitor, checked, pair, *form.fields],
        [job, waiting, panel.card, is_open],
        **QUIET,
    )
    enabled = "() => ({ __type__: 'update', interactive: true })"
    pressed.failure(None, None, form.start, js=enabled, queue=False, **QUIET)
    return pressed


def _wire_run(
    backend: Backend,
    panel: Panel,
    pair: gr.Dropdown,
    view: PairView,
    waiting: gr.State,
    tabs: gr.Tabs,
    poll: RunPoll,
) -> Dependency:
    """Wire the run; returns the event after which a pair has appeared or has been completed."""
    news, job, runs = _hidden("analysis-news"), panel.job, partial(is_running, backend)

    def extras(run: RunState, _: str) -> Updates:
        text = news_of(run)
        return {
            news: text,
            panel.show: gr.update(visible=bool(text)),
            panel.dismiss: gr.update(
                value="Dismiss" if run.finished else "Discard",
                visible=run.finished or (run.owned and run.resumable),
            ),
        }

    def arrive(text: str, pack_id: str, before: str) -> Updates:
        """List the new pair, and open it if the pair shown at the start is still shown."""
        _, _, new = text.partition(":")
        if new and before and pack_id == before:
            return {**opened(new), waiting: ""}
        return {pair: gr.update(choices=pair_choices(runs, pack_id))}

    def opened(pack_id: str) -> Updates:
        shown = gr.update(choices=pair_choices(runs, pack_id), value=pack_id)
        return {pair: shown, **view.updates(open_pair(pack_id, runs))}

    def show(mine: Remembered) -> Updates:
        return {**opened(_pack_of(find_run(backend, mine))), tabs: gr.Tabs(selected="explore")}

    def dismiss(mine: Remembered, pack_id: str, visitor: str) -> Updates:
        run = find_run(backend, mine, visitor)
        if run.resumable:
            discard(backend, mine["id"], run.key)
        if pack_id == _pack_of(run) and not run.finished:
            return {job: {}, **opened(list_packs()[0].id)}
        return {job: {}, pair: gr.update(choices=pair_choices(runs, pack_id))}

    outputs = [panel.show, panel.dismiss, news]
    panel.run.wire(backend, job, poll, extras=extras, outputs=outputs)
    panel.show.click(show_errors(show), job, [pair, *view, tabs], **QUIET)
    dismissed = panel.dismiss.click(
        show_errors(dismiss), [job, pair, poll.visitor], [job, pair, *view], **QUIET
    )
    panel.run.follow(dismissed.success)
    return news.change(show_errors(arrive), [news, pair, waiting], [pair, *view, waiting], **QUIET)


def _hidden(elem_id: str) -> gr.Textbox:
    return gr.Textbox("", visible="hidden", elem_id=elem_id)


def news_of(run: RunState) -> str:
    """Return what there is to show of a run's pair: `growing:ID`, `finished:ID` or nothing."""
    pack_id = _pack_of(run)
    if run.finished:
        return f"finished:{pack_id}"
    return f"growing:{pack_id}" if find_partial(pack_id, SKIP_ALL) is not None else ""


def _pack_of(run: RunState) -> str:
    """Return the id of the pair that a run makes."""
    return id_of(Path(run.out)) if run.status else ""


class CheckView(NamedTuple):
    """What the form shows of a check: its progress, and in the end its findings."""

    status: str
    findings: str = ""
    facts: str = ""
    checked: Checked | None = None  # None until the check is over

    @property
    def over(self) -> bool:
        """Whether the check is over."""
        return self.checked is not None

    @property
    def ready(self) -> bool:
        """Whether the analysis can start."""
        return self.checked is not None and self.checked.ready


def iter_check(backend: Backend, *typed: Any) -> Iterator[CheckView]:  # noqa: ANN401
    """Check what was typed; yield what the form shows while it reads, then the findings."""
    found: Checked | None = None
    try:
        for news in _checks(backend, *typed):
            if isinstance(news, Checked):
                found = news
            else:
                yield CheckView(_waiting(f"{news} …"))
    except PlanError as error:
        found = failed_check(error)
    assert found is not None, "a check ends with what it found"
    facts = needs_html(found, hosted=backend.hosted) if found.ready else ""
    words = _waiting(READY if found.ready else REFUSED)
    yield CheckView(words, findings_html(found.findings), facts, found)


def _read(
    mllm: str,
    math: str,
    base: str,
    own: str,
    depth: str,
    rank: float | None,
    temperature: float | None,
    directions: str,
    device: str = AUTO,
) -> AnalysisRequest:
    options = (depth == QUICK, rank, temperature, directions)
    return read_request(mllm, math, base, own, *options)._replace(device=device)


def _checks(backend: Backend, *typed: Any) -> Iterator[str | Checked]:  # noqa: ANN401
    request = _read(*typed)
    device = backend.device if request.device == AUTO else request.device
    return check_request(request, hub_only=backend.hosted, device=device)


def _waiting(text: str) -> str:
    return f'<p class="waiting">{as_html(text)}</p>'


# --- layout ----------------------------------------------------------------------------------


def lay_out_panel(
    opener: gr.Button, details: gr.HTML, job: gr.BrowserState, *, hosted: bool
) -> Panel:
    """Lay out the form and the view of the run; `opener` and `details` are laid out by the app."""
    with gr.Column(visible=False, elem_classes="card", elem_id="analyse-panel") as card:
        form = _form(hosted=hosted)
    run = RunView("analysis")
    with run.buttons:
        show = gr.Button("Show on the map", size="sm", visible=False, elem_id="show-analysis")
        dismiss = gr.Button("Dismiss", size="sm", visible=False, elem_id="dismiss-analysis")
    return Panel(details, opener, card, form, run, show, dismiss, job)


def _form(*, hosted: bool) -> Form:
    gr.HTML("<h2>Analyse other models</h2>")
    gr.Markdown(LEAD, elem_classes="lead")
    pairs = load_catalogue().pairs
    known = gr.Dropdown(
        [(known_label(pair), number) for number, pair in enumerate(pairs)],
        value=None,
        label="Known pairs",
        info="Published combinations. Choosing one fills in the form",
        elem_id="analyse-known",
    )
    note = gr.HTML("", elem_id="analyse-note")
    fields = _fields(hosted=hosted)
    with gr.Row(elem_classes="run-row"):
        check = gr.Button("Check", size="sm", elem_id="analyse-check")
        close = gr.Button("Close", size="sm", elem_id="analyse-close")
    status = gr.HTML("", elem_id="analyse-status")
    findings = gr.HTML("", elem_id="analyse-findings")
    facts = gr.HTML("", elem_id="analyse-facts")
    start = gr.Button(
        "Start analysis", variant="primary", interactive=False, elem_id="start-analysis"
    )
    return Form(known, note, fields, fields[-1], check, status, findings, facts, start, close)


def _fields(*, hosted: bool) -> list[Any]:
    """Lay out the fields that `read_request` reads."""
    address = ADDRESS + ("" if hosted else OR_FOLDER)
    with gr.Row(elem_classes="fields"):
        mllm = gr.Textbox(label="Vision-language model", info=address, elem_id="analyse-mllm")
        math = gr.Textbox(
            label="Math models",
            info="One per line, fine-tuned from the base; also LoRA adapters",
            lines=2,
            max_lines=4,
            elem_id="analyse-math",
        )
        base = gr.Textbox(
            label="Base",
            info="Their common language model",
            elem_id="analyse-base",
        )
        own = gr.Textbox(
            label="Base of the vision-language model",
            info="Only if it differs from the base",
            elem_id="analyse-own-base",
        )
        depth = gr.Radio(
            [EXACT, QUICK],
            value=EXACT,
            label="Depth",
            info="Quick is approximate: 64 singular directions",
            elem_id="analyse-depth",
        )
        rank = gr.Number(
            0,
            label="Rank",
            info="Number of leading singular directions; 0 for all",
            precision=0,
            minimum=0,
            elem_id="analyse-rank",
        )
        temperature = gr.Number(
            TEMPERATURE,
            label="Temperature",
            info="Softmax temperature over directions; plans use the same value by default",
            elem_id="analyse-temperature",
        )
        directions = gr.Dropdown(
            ["existing", "all"],
            value="existing",
            label="Directions",
            info="Exclude directions within the rounding noise, or use all, as in the paper",
            elem_id="analyse-directions",
        )
        device = device_field("analyse-device", "Device that computes the analysis")
    return [mllm, math, base, own, depth, rank, temperature, directions, device]
