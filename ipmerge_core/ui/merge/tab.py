"""Build the Merge tab: choose a method, check, confirm, run, result.

In: the chosen pair and the session's `ChosenMerge`, whose method the form changes. Out: a run that
writes the merged model. The run outlives the page: the browser keeps its id and key and shows it
again after a reload.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import FolderInUseError, IPMergeError, PlanError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chosen_merge import ChosenMerge, chosen_line
from ipmerge_core.ui.device_choice import AUTO, device_field, list_devices
from ipmerge_core.ui.errors import QUIET, public_finding, public_text, sentence_of, show_errors
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.format import findings_html
from ipmerge_core.ui.merge.calibration_form import CalibrationInputs, calibration_form
from ipmerge_core.ui.merge.download import download_link
from ipmerge_core.ui.merge.findings import disk_room, plan_warnings
from ipmerge_core.ui.merge.method_form import (
    list_methods,
    method_form,
    method_names,
    named_choices,
    preset_names,
    shown_preset,
    with_method,
    with_preset,
)
from ipmerge_core.ui.merge.permalink import Permalink
from ipmerge_core.ui.merge.start_gate import Answer, Shown, StartGate
from ipmerge_core.ui.merge.summary import confirm_html, result_html
from ipmerge_core.ui.method_choice import MethodChoice, chosen_plan
from ipmerge_core.ui.plan_choice import PlanChoice, choice_digest
from ipmerge_core.ui.runs import (
    MERGE,
    Listener,
    Remembered,
    RunPoll,
    RunState,
    RunView,
    Updates,
    find_run,
    own_running,
)

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.merging.estimates import Estimate
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.planning.plan import MergePlan

READING = '<p class="waiting">Reading headers and a few rows …</p>'
NO_RUN = '<p class="waiting">No run yet.</p>'
NOTHING_MERGED = '<p class="waiting">Nothing has been merged yet.</p>'
BUSY = "A merge is in progress. You can start another one when it has ended."
CHANGED = "The pair, the plan or the device has changed since the check. Check again, then start."
FOLDER_HINT = "A folder name, or an absolute path"
FOLDER_HINT_HOSTED = "A folder name"


class _Steps(NamedTuple):
    """The components of the four cards that events read or write."""

    form: gr.Column
    findings: gr.HTML
    confirmation: gr.HTML
    folder: gr.Textbox
    device: gr.Dropdown
    start: gr.Button
    note: gr.HTML
    run: RunView
    result: gr.HTML
    try_it: gr.Button


class MergeTab(NamedTuple):
    """What other tabs use: the start of a run, its "Try it" button, and the gate of Start.

    `gate` runs the check after events outside of the tab; `method` is the dropdown of methods.
    """

    started: Dependency
    try_it: gr.Button
    gate: StartGate
    method: gr.Dropdown


class Readiness(NamedTuple):
    """The result of a check: findings, a description of the merge, and whether it can start."""

    findings: list[Finding]
    confirmation: str
    folder: str
    ready: bool
    digest: str = ""  # of the pair, plan and device that were checked
    device: str = ""
    estimate: Estimate | None = None


def merge_tab(
    backend: Backend,
    pair: gr.Dropdown,
    choice: gr.State,
    *,
    poll: RunPoll,
    job: gr.BrowserState,
    calibration: gr.BrowserState,
    link: Permalink,
    tab: gr.Tab,
) -> MergeTab:
    """Lay out the tab and wire it; `job` and `calibration` are the remembered runs."""
    method = gr.State(MethodChoice())
    line = gr.HTML("", elem_id="merge-chosen", elem_classes="chosen-line")
    steps = _steps(backend)
    with steps.form:
        with gr.Row():
            named, preset = method_names(), preset_names()
        origin = gr.HTML("", elem_id="preset-source")
    # `named` is passed too: it may be newer than the method in `method`.
    chosen = [pair, choice, method, named, steps.device]
    gate = _gate(backend, steps, chosen)

    def choose(listener: Listener) -> Dependency:
        formed: Dependency = listener(
            _with_form, [choice, method, named], choice, queue=False, **QUIET
        )
        link.write_after(formed)
        formed.then(describe, choice, [line, preset, origin], queue=False, **QUIET)
        return formed

    def describe(now: ChosenMerge) -> tuple[str, str, str]:
        return (chosen_line(now), *shown_preset(now))

    def follow(now: ChosenMerge, drawn: int) -> Updates:
        how = now.method
        listed = named_choices(how.name)
        return {named: listed, method: how, **form.filled(how), form.drawn: drawn + 1}

    def show(event: Dependency) -> Dependency:
        """Show the chosen merge in the form after an event, and check it."""
        # In the queue: only its answers tell the page that a State has changed, which draws the
        # fields.
        known = event.then(follow, [choice, form.drawn], fields, **QUIET)
        known.then(describe, choice, [line, preset, origin], **QUIET)
        return gate.check_after(shows(known).then)

    def follow_data(event: Dependency) -> Dependency:
        # `shows` is laid out below, before a visitor enters a value.
        return gate.check_after(choose(shows(event).then).then)

    with steps.form:
        form = method_form(named, method, gate, choose, follow_data)
        asked = CalibrationInputs(pair, method, steps.device, calibration)
        shows = calibration_form(backend, form.data, asked, poll=poll, gate=gate, choose=choose)
    gate.check_after(choose(shows(form.changed).then).then)
    for decided in form.decided:
        gate.check_after(choose(shows(decided).then).then)
    gate.disable_on(pair.change)
    gate.check_after(shows(after_commits(pair.change, pair)).then)
    gate.disable_on(steps.device.input)
    gate.check_after(steps.device.input)
    gate.disable_on(tab.select, first=True)
    started = _wire_run(backend, steps, gate, chosen, job, poll)
    steps.run.follow(tab.select)
    opened = tab.select(lambda: READING, None, steps.findings, queue=False, **QUIET)
    # The form shows the chosen merge, wherever it was chosen.
    fields = [named, method, *form.options.values(), form.drawn]
    checked = show(after_commits(opened.then, pair))
    gate.disable_on(preset.input)
    picked = preset.input(with_preset, [choice, preset], choice, queue=False, **QUIET)
    link.write_after(picked)
    show(picked)
    filled = checked.then(list_methods, None, named, **QUIET)
    filled.then(lambda: list_devices(backend), None, steps.device, **QUIET)
    return MergeTab(started, steps.try_it, gate, named)


def _with_form(chosen: ChosenMerge, how: MethodChoice, named: str | None) -> ChosenMerge:
    return chosen.with_method(with_method(how, named))


def _gate(backend: Backend, steps: _Steps, chosen: list[Any]) -> StartGate:
    """Create the gate that disables Start until everything in `chosen` has been checked."""

    def check(
        pack_id: str, chosen: ChosenMerge, how: MethodChoice, named: str | None, device: str | None
    ) -> Answer:
        how = with_method(how, named)
        found = readiness(backend, pack_id, chosen.plan, how, device or AUTO)
        listed = findings_html(found.findings)
        return Answer(listed, found.confirmation, found.folder, found.digest, found.ready)

    def note(name: str, busy: str) -> str:
        return note_html(backend, name, busy=bool(busy))

    shown = Shown(steps.findings, steps.confirmation, steps.folder, steps.note, steps.start)
    return StartGate(shown, check, chosen, note)


def _wire_run(
    backend: Backend,
    steps: _Steps,
    gate: StartGate,
    chosen: list[Any],
    job: gr.BrowserState,
    poll: RunPoll,
) -> Dependency:
    """Wire Start and the view of the run; returns the click event of Start."""

    def begin(
        visitor: str,
        digest: str,
        name: str,
        pack_id: str,
        chosen: ChosenMerge,
        how: MethodChoice,
        named: str | None,
        device: str | None,
    ) -> Remembered:
        device = device or AUTO
        made = chosen_plan(pack_id, chosen.plan, with_method(how, named))
        check_digest(backend, digest, pack_id, made, device)
        return started_merge(backend, visitor, made, name, device)

    def attach(mine: Remembered | None, visitor: str) -> Remembered:
        return attached(backend, mine, visitor)

    def extras(run: RunState, visitor: str) -> Updates:
        busy = next(own_running(backend, visitor, MERGE), None) is not None
        return {
            steps.result: run_result(backend, run),
            steps.try_it: gr.update(visible=run.finished),
            gate.busy: "1" if busy or (run.owned and run.running) else "",
        }

    outputs = [steps.result, steps.try_it, gate.busy]
    steps.run.wire(backend, job, poll, attach=attach, extras=extras, outputs=outputs)
    gate.disable_on(steps.start.click)
    asked = [poll.visitor, gate.digest, steps.folder, *chosen]
    pressed = steps.start.click(show_errors(begin), asked, job, **QUIET)
    gate.check_after(steps.run.follow(pressed.success).then)
    gate.check_after(pressed.failure)  # Gradio does not run `then` after an error
    return pressed


def _steps(backend: Backend) -> _Steps:
    """Lay out the four cards: check, confirm, run, result."""
    with gr.Column(elem_id="merge-steps"):
        with _card("1", "Check", "check"):
            form = gr.Column(elem_id="method-form")
            findings = gr.HTML(READING, elem_id="findings")
        with _card("2", "Confirm", "confirm"):
            confirmation = gr.HTML("", elem_id="confirmation")
            with gr.Row(equal_height=True, elem_classes="start-row"):
                folder = gr.Textbox(
                    label="Output folder",
                    info=FOLDER_HINT_HOSTED if backend.hosted else FOLDER_HINT,
                    elem_id="output-folder",
                    scale=3,
                )
                device = device_field("merge-device", "Device of merges and calibrations")
                start = gr.Button(
                    "Start merge", variant="primary", interactive=False, elem_id="start-merge"
                )
            note = gr.HTML("", elem_id="start-note")
        with _card("3", "Run", "run"):
            run = RunView("merge", empty=NO_RUN, status_id="run-status")
        with _card("4", "Result", "result"):
            result = gr.HTML(NOTHING_MERGED, elem_id="result")
            try_it = gr.Button("Try it", visible=False, size="sm", elem_id="try-merged")
    return _Steps(
        form, findings, confirmation, folder, device, start, note, run, result, try_it
    )  # fmt: skip


def readiness(
    backend: Backend,
    pack_id: str,
    choice: PlanChoice,
    method: MethodChoice | None = None,
    device: str = AUTO,
) -> Readiness:
    """Check pair, plan, device and disk space before anything is written."""
    try:
        plan = chosen_plan(pack_id, choice, method or MethodChoice())
    except IPMergeError as error:
        return _cannot_merge(error)
    return readiness_of(backend, pack_id, plan, device)


def readiness_of(
    backend: Backend, pack_id: str, plan: MergePlan, device: str = AUTO, *, force: bool = False
) -> Readiness:
    """Check a plan like `readiness`; with `force` it is ready although the sibling check fails."""
    from ipmerge_core.merging.estimates import estimate_pair
    from ipmerge_core.merging.parts import count_extras, reason_to_copy, work_of
    from ipmerge_core.models.writer import check_output
    from ipmerge_core.planning.description import describe_change
    from ipmerge_core.planning.plan import reopen
    from ipmerge_core.runtime.devices import describe_device

    name = backend.free_name(plan)
    try:
        device = backend.device_for(device)
        models = reopen(plan)
        need = estimate_pair(plan, models, check_output(backend.output_folder(name)), device)
        siblings = [public_finding(finding) for finding in models.check()]
        found = [*siblings, disk_room(need.nbytes_written, need.nbytes_free)]
        extras = work_of(plan, models)
        kept = {
            name: reason_to_copy(plan, models, name) for name in models.kept if name not in extras
        }
        digest = choice_digest(pack_id, plan, device)
        where = describe_device(device)
        more = count_extras(plan, models)
        words = confirm_html(
            plan, describe_change(plan), more, need, kept, device=where, digest=digest
        )
    except IPMergeError as error:
        return _cannot_merge(error, name)
    found += plan_warnings(plan)
    required = [finding for finding in found if not (force and finding in siblings)]
    ready = all(finding.level != "refusal" for finding in required)
    return Readiness(found, words, name, ready, digest, device, need)


def _cannot_merge(error: IPMergeError, name: str = "") -> Readiness:
    from ipmerge_core.models.pairing import Finding

    refusal = Finding("refusal", "Cannot merge.", sentence_of(error))
    return Readiness([refusal], "", name, ready=False)


def note_html(backend: Backend, name: str, *, busy: bool) -> str:
    """Explain why Start is disabled: a run in progress or an unusable folder; empty otherwise."""
    problem = BUSY if busy else backend.folder_problem(name)
    if not problem:
        return ""
    if busy:
        return f'<p class="waiting">{escape(problem)}</p>'
    free = backend.free_name_like(name)
    advice = f" <em>Available name: {escape(free)}</em>" if free else ""
    return f'<p class="failure">✕ {escape(public_text(problem))}{advice}</p>'


# --- starting, and finding a run again -------------------------------------------------------


def check_digest(
    backend: Backend, digest: str, pack_id: str, plan: MergePlan, device: str = AUTO
) -> None:
    """Check that what is started is what was checked. Raises: PlanError."""
    if digest != choice_digest(pack_id, plan, backend.device_for(device)):
        raise PlanError(CHANGED)


def started_merge(
    backend: Backend, visitor: str, plan: MergePlan, name: str, device: str = AUTO
) -> Remembered:
    """Start a merge for a visitor, or attach them to a run of the same plan in the same folder.

    Returns what the browser remembers. Outside of a Space this can be a run that was started
    elsewhere; the browser then has no key and can only watch it.

    Raises: as `Backend.start_merge`.
    """
    try:
        started = backend.start_merge(plan, name, device=device, owner=visitor)
    except FolderInUseError as error:
        if backend.hosted or not error.same_work:
            raise
        return {"id": error.job, "key": ""}
    return started._asdict()


def attached(backend: Backend, mine: Remembered | None, visitor: str) -> Remembered:
    """Return what a browser remembers, pointed to a merge of its own in progress, if any."""
    remembered = find_run(backend, mine, visitor)
    if remembered.owned and remembered.running:
        return mine or {}
    for run in own_running(backend, visitor, MERGE):
        assert run.status is not None, "a run in progress has a status"
        return {"id": run.status.id, "key": run.key}
    return mine or {}


def run_result(backend: Backend, run: RunState) -> str:
    """Describe the result of a run; only the browser that started it gets a download link."""
    if run.status is None:
        return NOTHING_MERGED
    if not run.finished:
        return '<p class="waiting">The run has not finished yet.</p>'
    link = download_link(run.status.id, run.key) if run.owned else None
    device = str(run.status.arguments.get("device", ""))
    return result_html(run.out, link, show_path=not backend.hosted, device=device)


def _card(number: str, title: str, name: str) -> gr.Column:
    card = gr.Column(elem_classes="card", elem_id=f"step-{name}")
    with card:
        gr.HTML(f'<h2><span class="number">{number}</span> {title}</h2>')
    return card
