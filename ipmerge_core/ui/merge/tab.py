"""The Merge tab: check, confirm, run, result.

In: the frame's pair and the session's `PlanChoice`. Out: a job that writes the merged model. The
job outlives the tab: the browser keeps its id and key, and attaches to it again after a reload.
What is true stands in the job's folder, never in this page.
"""

from __future__ import annotations

import secrets
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import FolderInUseError, IPMergeError, PlanError
from ipmerge_core.runtime.jobs import SHORTEST_SECRET
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import QUIET, public_finding, public_text, sentence_of, told
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.format import findings_html
from ipmerge_core.ui.merge.calibration_form import calibration_form
from ipmerge_core.ui.merge.download import download_link
from ipmerge_core.ui.merge.method_form import (
    MethodChoice,
    chosen_plan,
    method_form,
    method_names,
    offered,
    with_method,
)
from ipmerge_core.ui.merge.start_gate import Answer, Shown, StartGate
from ipmerge_core.ui.merge.summary import change_words, confirm_html, result_html
from ipmerge_core.ui.plan_choice import PlanChoice, choice_digest
from ipmerge_core.ui.runs import POLL_SECONDS, Remembered, RunView, Watched, find_run, steer

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.planning.plan import MergePlan

AUTO = "auto"
JOB_KEY = "ipmerge.job.v1"
JOB_SECRET = "ipmerge-job"  # noqa: S105 (it only keeps the entry readable after a restart)
READING = '<p class="waiting">Reading headers and a few small matrices …</p>'
NO_RUN = '<p class="waiting">No run yet.</p>'
NOTHING_MERGED = '<p class="waiting">Nothing has been merged yet.</p>'
BUSY = "A merge is in progress. Start is available again when it has ended."
CHANGED = (
    "What would be merged has changed since the check: another pair, plan or device. Check it "
    "again, then start."
)
FOLDER_HINT = "A name, or the path of a new folder"
FOLDER_HINT_HOSTED = "A name"


class _Steps(NamedTuple):
    """The parts of the four cards that events fill or listen to."""

    form: gr.Column
    findings: gr.HTML
    confirmation: gr.HTML
    folder: gr.Textbox
    device: gr.Dropdown
    start: gr.Button
    note: gr.HTML
    progress: gr.HTML
    cancel: gr.Button
    resume: gr.Button
    result: gr.HTML
    try_it: gr.Button


class MergeTab(NamedTuple):
    """What other tabs listen to: a run was started, "Try it" was pressed beside its result.

    `gate` lets a check follow events outside of the tab.
    """

    started: Dependency
    try_it: gr.Button
    gate: StartGate


class Readiness(NamedTuple):
    """What the check found: findings, what would change, and whether it may start."""

    findings: list[Finding]
    confirmation: str
    folder: str
    ready: bool
    digest: str = ""  # of exactly what was checked
    device: str = ""


def merge_tab(
    app: gr.Blocks,
    backend: Backend,
    pair: gr.Dropdown,
    choice: gr.State,
    *,
    job: gr.BrowserState,
    calibration: gr.BrowserState,
    tab: gr.Tab,
) -> MergeTab:
    """Lay out the tab and wire it; `job` and `calibration` are the runs a browser remembers."""
    method = gr.State(MethodChoice())
    steps = _steps(backend)
    with steps.form:
        named = method_names()
    # The form's own name counts: it may be ahead of what is known of its values.
    chosen = [pair, choice, method, named, steps.device]
    gate = _gate(backend, steps, chosen)
    with steps.form:
        form = method_form(named, method, gate)
        shows = calibration_form(app, backend, form.data, pair, method, job=calibration, gate=gate)
    gate.after(shows(form.changed).then)
    gate.at_once(pair.change)
    gate.after(shows(after_commits(pair.change, pair)).then)
    gate.at_once(steps.device.input)
    gate.after(steps.device.input)
    gate.at_once(tab.select, first=True)
    started = _wire_run(app, backend, steps, gate, chosen, job, tab)
    opened = tab.select(lambda: READING, None, steps.findings, queue=False, **QUIET)
    checked = gate.after(shows(after_commits(opened.then, pair)).then)
    filled = checked.then(offered, None, named, **QUIET)
    filled.then(lambda: offered_devices(backend), None, steps.device, **QUIET)
    return MergeTab(started, steps.try_it, gate)


def _gate(backend: Backend, steps: _Steps, chosen: list[Any]) -> StartGate:
    """Make what keeps Start off until everything that is `chosen` has been checked."""

    def check(pack_id: str, plan: PlanChoice, how: MethodChoice, named: str, device: str) -> Answer:
        found = readiness(backend, pack_id, plan, with_method(how, named), device)
        listed = findings_html(found.findings)
        return Answer(listed, found.confirmation, found.folder, found.digest, found.ready)

    def say(name: str, busy: str) -> str:
        return note_html(backend, name, busy=bool(busy))

    shown = Shown(steps.findings, steps.confirmation, steps.folder, steps.note, steps.start)
    return StartGate(shown, check, chosen, say)


def _wire_run(
    app: gr.Blocks,
    backend: Backend,
    steps: _Steps,
    gate: StartGate,
    chosen: list[Any],
    job: gr.BrowserState,
    tab: gr.Tab,
) -> Dependency:
    """Wire Start, and what shows the run that it starts or finds; returns the press of Start."""
    timer = gr.Timer(POLL_SECONDS, active=False)

    def begin(
        mine: Remembered | None,
        digest: str,
        name: str,
        pack_id: str,
        plan: PlanChoice,
        how: MethodChoice,
        named: str,
        device: str,
    ) -> Remembered:
        made = chosen_plan(pack_id, plan, with_method(how, named))
        check_digest(backend, digest, pack_id, made, device)
        return started_merge(backend, with_secret(mine), made, name, device)

    def attach(mine: Remembered | None) -> Remembered:
        return attached(backend, mine)

    def watch(mine: Remembered | None) -> list[Any]:
        return watched(backend, mine or {})

    watching = [
        steps.progress, steps.cancel, steps.resume, timer, steps.result, steps.try_it, gate.busy
    ]  # fmt: skip
    for arrives in (app.load, tab.select):
        found = arrives(attach, job, job, queue=False, **QUIET)
        found.then(watch, job, watching, queue=False, **QUIET)
    gate.at_once(steps.start.click)
    asked = [job, gate.digest, steps.folder, *chosen]
    pressed = steps.start.click(told(begin), asked, job, **QUIET)
    gate.after(pressed.success(watch, job, watching, **QUIET).then)
    gate.after(pressed.failure)  # Gradio lets no `then` follow an error
    view = RunView(steps.progress, steps.cancel, steps.resume, timer)
    steer(app, backend, job, view, watch, watching)
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
                device = gr.Dropdown(  # filled when the tab opens: finding devices takes torch
                    [AUTO],
                    value=AUTO,
                    label="Device",
                    info="Where the matrices are merged",
                    visible=False,
                    elem_id="merge-device",
                )
                start = gr.Button(
                    "Start merge", variant="primary", interactive=False, elem_id="start-merge"
                )
            note = gr.HTML("", elem_id="start-note")
        with _card("3", "Run", "run"):
            progress = gr.HTML(NO_RUN, elem_id="run-status", elem_classes="run-status")
            with gr.Row(elem_classes="run-row"):
                cancel = gr.Button("Cancel", visible=False, size="sm", elem_id="cancel-merge")
                resume = gr.Button("Resume", visible=False, size="sm", elem_id="resume-merge")
        with _card("4", "Result", "result"):
            result = gr.HTML(NOTHING_MERGED, elem_id="result")
            try_it = gr.Button("Try it", visible=False, size="sm", elem_id="try-merged")
    return _Steps(
        form, findings, confirmation, folder, device, start, note,
        progress, cancel, resume, result, try_it,
    )  # fmt: skip


def remembered_job() -> gr.BrowserState:
    """Make the place in the browser where the run's id and key are kept.

    It must stand outside all tabs: a tab's contents are not there before it is opened.
    """
    return gr.BrowserState({}, storage_key=JOB_KEY, secret=JOB_SECRET)


def readiness(
    backend: Backend,
    pack_id: str,
    choice: PlanChoice,
    method: MethodChoice | None = None,
    device: str = AUTO,
) -> Readiness:
    """Check pair, plan, device and room before anything is written."""
    from ipmerge_core.merging.merge import estimate, reopen
    from ipmerge_core.merging.parts import work_of
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.runtime.devices import describe_device

    try:
        device = backend.device_for(device)
        plan = chosen_plan(pack_id, choice, method or MethodChoice())
        models = reopen(plan)
        name = backend.free_name(plan)
        need = estimate(plan, backend.output_folder(name), device=device)
        found = [public_finding(finding) for finding in models.check()]
        found.append(_room(need.nbytes_written, need.nbytes_free))
        beside = work_of(plan, models)
        kept = {name: reason for name, reason in models.kept.items() if name not in beside}
        digest = choice_digest(pack_id, plan, device)
        where = describe_device(device)
        words = confirm_html(plan, change_words(plan), need, kept, device=where, digest=digest)
    except IPMergeError as error:
        refusal = Finding("refusal", "This merge cannot be made.", sentence_of(error))
        return Readiness([refusal], "", "", ready=False)
    found += _doubts(plan)
    ready = all(finding.level != "refusal" for finding in found)
    return Readiness(found, words, name, ready, digest, device)


def offered_devices(backend: Backend) -> dict[str, Any]:
    """Return the update of the choice of devices: shown where there is more than one."""
    from ipmerge_core.runtime.devices import available_devices, describe_device

    here = available_devices()
    best = describe_device(backend.device_for())
    choices = [(f"auto: {best}", AUTO), *((describe_device(name), name) for name in here)]
    update: dict[str, Any] = gr.update(choices=choices, visible=len(here) > 1)
    return update


def note_html(backend: Backend, name: str, *, busy: bool) -> str:
    """Say why Start is off: a run in progress, or a folder that cannot be used; else nothing."""
    problem = BUSY if busy else backend.folder_problem(name)
    if not problem:
        return ""
    if busy:
        return f'<p class="waiting">{escape(problem)}</p>'
    free = backend.free_name_like(name)
    advice = f" <em>A free name: {escape(free)}</em>" if free else ""
    return f'<p class="failure">✕ {escape(public_text(problem))}{advice}</p>'


# --- starting, and finding a run again -------------------------------------------------------


def check_digest(
    backend: Backend, digest: str, pack_id: str, plan: MergePlan, device: str = AUTO
) -> None:
    """Refuse a start of anything but what was checked. Raises: PlanError."""
    if digest != choice_digest(pack_id, plan, backend.device_for(device)):
        raise PlanError(CHANGED)


def started_merge(
    backend: Backend, mine: Remembered, plan: MergePlan, name: str, device: str = AUTO
) -> Remembered:
    """Start a merge for a browser, or attach it to the run that is making the very same there.

    Returns what the browser remembers. Off a Space, that may be a run that was started elsewhere;
    the browser then only watches it.

    Raises: as `Backend.start_merge`.
    """
    try:
        started = backend.start_merge(plan, name, device=device, owner=mine["owner"])
    except FolderInUseError as error:
        if backend.hosted or not error.same_work:
            raise
        return {**mine, "id": error.job, "key": ""}
    return {**mine, **started._asdict()}


def with_secret(mine: Remembered | None) -> Remembered:
    """Return what a browser remembers, with the secret from which its runs' keys are made."""
    mine = mine or {}
    if len(mine.get("owner", "")) >= SHORTEST_SECRET:
        return mine
    return {**mine, "owner": secrets.token_urlsafe(SHORTEST_SECRET)}


def attached(backend: Backend, mine: Remembered | None) -> Remembered:
    """Return what a browser remembers, turned to a run of its own that is in progress, if any."""
    mine = with_secret(mine)
    remembered = find_run(backend, mine)
    if remembered.owned and remembered.running:
        return mine
    for status in backend.store.all():
        key = backend.store.key_of(status.id, mine["owner"])
        if status.is_running and backend.store.holds_key(status.id, key):
            return {**mine, "id": status.id, "key": key}
    return mine


def watched(backend: Backend, mine: dict[str, str]) -> list[Any]:
    """Return what shows a run: a `RunView`, the result, and "1" while it keeps Start off."""
    run = find_run(backend, mine)
    return [
        *run.updates(NO_RUN),
        _result(backend, run, mine),
        gr.update(visible=run.finished),
        "1" if run.owned and run.running else "",
    ]


def _result(backend: Backend, run: Watched, mine: dict[str, str]) -> str:
    if run.status is None:
        return NOTHING_MERGED
    if not run.finished:
        return '<p class="waiting">The run is not finished.</p>'
    link = download_link(run.status.id, mine.get("key", "")) if run.owned else None
    made = run.status.arguments
    return result_html(
        str(made["out"]), link, show_path=not backend.hosted, device=str(made.get("device", ""))
    )


def _card(number: str, title: str, name: str) -> gr.Column:
    card = gr.Column(elem_classes="card", elem_id=f"step-{name}")
    with card:
        gr.HTML(f'<h2><span class="number">{number}</span> {title}</h2>')
    return card


def _room(nbytes: int, free: int) -> Finding:
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.ui.format import size_words

    words = f"The model takes {size_words(nbytes)} and {size_words(free)} are free."
    if nbytes > free:
        return Finding("refusal", "disk", words, "Free some space or choose another folder.")
    return Finding("ok", "disk", words)


def _doubts(plan: MergePlan) -> list[Finding]:
    """What is legal and probably not meant."""
    from ipmerge_core.calibration.store import Measurements
    from ipmerge_core.models.pairing import Finding

    equals = "the merged model would equal the vision-language model."
    if not plan.selected and plan.similarity_threshold is not None:
        message = f"No matrix reaches the similarity threshold {plan.similarity_threshold:g}"
        return [Finding("warning", "plan", f"{message}: {equals}", "Lower S_alpha in Explore.")]
    if not plan.selected:
        return [Finding("warning", "plan", f"No matrix is left: {equals}", "Widen the patterns.")]
    found = []
    if _change(plan) == 0 and not plan.extras:
        remedy = "Look at the weights, and at the layers that are kept."
        found.append(Finding("warning", "plan", f"With these values {equals}", remedy))
    if plan.calibration is not None:
        measured = Measurements.open(plan.calibration.folder)
        inputs = max(record.shape[1] for record in plan.records)
        found += [Finding("warning", "calibration", *words) for words in measured.doubts(inputs)]
    return found


def _change(plan: MergePlan) -> float | None:
    try:
        return plan.preview().relative_change
    except PlanError:
        return None
