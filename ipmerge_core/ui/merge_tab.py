"""The Merge tab: check, confirm, run, result.

In: the frame's pair and the session's `PlanChoice`. Out: a job that writes the merged model. The
job outlives the tab: the browser keeps its id and key, and attaches to it again after a reload.
What is true stands in the job's folder, never in this page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError, PlanError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.calibration_form import calibration_form
from ipmerge_core.ui.download import download_link
from ipmerge_core.ui.explore import after_commits
from ipmerge_core.ui.layer_map import PlanChoice
from ipmerge_core.ui.merge_words import (
    change_words,
    confirm_html,
    findings_html,
    result_html,
)
from ipmerge_core.ui.messages import QUIET, public_finding, sentence_of, told
from ipmerge_core.ui.method_form import MethodChoice, chosen_plan, method_form, offered
from ipmerge_core.ui.watching import POLL_SECONDS, RunView, Watched, find_run, steer

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.pairing import Finding
    from ipmerge_core.plan import MergePlan

JOB_KEY = "ipmerge.job.v1"
JOB_SECRET = "ipmerge-job"  # noqa: S105 (it only keeps the entry readable after a restart)
READING = '<p class="waiting">Reading headers and a few small matrices …</p>'
NO_RUN = '<p class="waiting">No run yet.</p>'
NOTHING_MERGED = '<p class="waiting">Nothing has been merged yet.</p>'
# A visitor's own name stays; suggested ones end in a plan's hash.
SUGGEST = r"(typed, name) => typed && !/-[0-9a-f]{8}(-\d+)?$/.test(typed) ? typed : name"
FOLDER_HINT = "A name, or the path of a new folder"
FOLDER_HINT_HOSTED = "A name"


class _Steps(NamedTuple):
    """The parts of the four cards that events fill or listen to."""

    form: gr.Column
    findings: gr.HTML
    confirmation: gr.HTML
    folder: gr.Textbox
    start: gr.Button
    progress: gr.HTML
    cancel: gr.Button
    resume: gr.Button
    result: gr.HTML
    try_it: gr.Button


class MergeTab(NamedTuple):
    """What other tabs listen to: a run was started, "Try it" was pressed beside its result."""

    started: Dependency
    try_it: gr.Button


class Readiness(NamedTuple):
    """What the check found: findings, what would change, and whether it may start."""

    findings: list[Finding]
    confirmation: str
    folder: str
    ready: bool


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
    # layout
    method = gr.State(MethodChoice())
    steps = _steps(backend)
    timer = gr.Timer(POLL_SECONDS, active=False)

    # handlers
    def check(
        pack_id: str, plan: PlanChoice, how: MethodChoice
    ) -> tuple[str, str, dict[str, Any], str]:
        found = readiness(backend, pack_id, plan, how)
        start = gr.update(interactive=found.ready)
        return findings_html(found.findings), found.confirmation, start, found.folder

    def begin(pack_id: str, plan: PlanChoice, how: MethodChoice, name: str) -> dict[str, str]:
        started = backend.start_merge(chosen_plan(pack_id, plan, how), name)
        return started._asdict()

    def watch(mine: dict[str, str] | None) -> list[Any]:
        return watched(backend, mine or {})

    # wiring
    watching = [steps.progress, steps.cancel, steps.resume, timer, steps.result, steps.try_it]
    suggested = gr.Textbox(visible="hidden", elem_id="suggested-folder")
    checked = [steps.findings, steps.confirmation, steps.start, suggested]

    def checks(event: Dependency) -> Dependency:
        found = event.then(told(check), [pair, choice, method], checked, **QUIET)
        # In the page itself, at once: what a visitor wrote during the check stays.
        named = [steps.folder, suggested]
        then: Dependency = found.then(None, named, steps.folder, js=SUGGEST, **QUIET)
        return then

    with steps.form:
        form = method_form(method, checks)
        shows = calibration_form(
            app, backend, form.data, pair, method, job=calibration, after=checks
        )
    checks(shows(form.changed))
    tab.select(watch, job, watching, queue=False, **QUIET)
    opened = tab.select(lambda: READING, None, steps.findings, queue=False, **QUIET)
    checks(shows(after_commits(opened.then))).then(offered, None, form.name, **QUIET)
    inputs = [pair, choice, method, steps.folder]
    started = steps.start.click(told(begin), inputs, job, **QUIET)
    started.success(watch, job, watching, **QUIET)
    view = RunView(steps.progress, steps.cancel, steps.resume, timer)
    steer(app, backend, job, view, watch, watching)
    return MergeTab(started, steps.try_it)


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
                start = gr.Button(
                    "Start merge", variant="primary", interactive=False, elem_id="start-merge"
                )
        with _card("3", "Run", "run"):
            progress = gr.HTML(NO_RUN, elem_id="run-status", elem_classes="run-status")
            with gr.Row(elem_classes="run-row"):
                cancel = gr.Button("Cancel", visible=False, size="sm", elem_id="cancel-merge")
                resume = gr.Button("Resume", visible=False, size="sm", elem_id="resume-merge")
        with _card("4", "Result", "result"):
            result = gr.HTML(NOTHING_MERGED, elem_id="result")
            try_it = gr.Button("Try it", visible=False, size="sm", elem_id="try-merged")
    return _Steps(
        form, findings, confirmation, folder, start, progress, cancel, resume, result, try_it
    )


def remembered_job() -> gr.BrowserState:
    """Make the place in the browser where the run's id and key are kept.

    It must stand outside all tabs: a tab's contents are not there before it is opened.
    """
    return gr.BrowserState({}, storage_key=JOB_KEY, secret=JOB_SECRET)


def readiness(
    backend: Backend, pack_id: str, choice: PlanChoice, method: MethodChoice | None = None
) -> Readiness:
    """Check pair, plan and room before anything is written."""
    from ipmerge_core.merging import estimate, reopen
    from ipmerge_core.pairing import Finding
    from ipmerge_core.work import work_of

    try:
        plan = chosen_plan(pack_id, choice, method or MethodChoice())
        models = reopen(plan)
        name = backend.free_name(plan)
        need = estimate(plan, backend.output_folder(name))
        found = [public_finding(finding) for finding in models.check()]
        found.append(_room(need.nbytes_written, need.nbytes_free))
        beside = work_of(plan, models)
        kept = {name: reason for name, reason in models.kept.items() if name not in beside}
        words = confirm_html(plan, change_words(plan), need, kept)
    except IPMergeError as error:
        refusal = Finding("refusal", "This merge cannot be made.", sentence_of(error))
        return Readiness([refusal], "", "", ready=False)
    found += _doubts(plan)
    ready = all(finding.level != "refusal" for finding in found)
    return Readiness(found, words, name, ready)


def watched(backend: Backend, mine: dict[str, str]) -> list[Any]:
    """Return what the third and fourth card show of a run: a `RunView`, then the result."""
    run = find_run(backend, mine)
    return [*run.updates(NO_RUN), _result(backend, run, mine), gr.update(visible=run.finished)]


def _result(backend: Backend, run: Watched, mine: dict[str, str]) -> str:
    if run.status is None:
        return NOTHING_MERGED
    if not run.finished:
        return '<p class="waiting">The run is not finished.</p>'
    link = download_link(run.status.id, mine.get("key", "")) if run.owned else None
    return result_html(str(run.status.arguments["out"]), link, show_path=not backend.hosted)


def _card(number: str, title: str, name: str) -> gr.Column:
    card = gr.Column(elem_classes="card", elem_id=f"step-{name}")
    with card:
        gr.HTML(f'<h2><span class="number">{number}</span> {title}</h2>')
    return card


def _room(nbytes: int, free: int) -> Finding:
    from ipmerge_core.pairing import Finding
    from ipmerge_core.ui.merge_words import size_words

    words = f"The model takes {size_words(nbytes)} and {size_words(free)} are free."
    if nbytes > free:
        return Finding("refusal", "disk", words, "Free some space or choose another folder.")
    return Finding("ok", "disk", words)


def _doubts(plan: MergePlan) -> list[Finding]:
    """What is legal and probably not meant."""
    from ipmerge_core.measurements import Measurements
    from ipmerge_core.pairing import Finding

    equals = "the merged model would equal the vision-language model."
    if not plan.selected and plan.similarity_threshold is not None:
        message = f"No matrix reaches the similarity threshold {plan.similarity_threshold:g}"
        return [Finding("warning", "plan", f"{message}: {equals}", "Lower S_alpha in Explore.")]
    if not plan.selected:
        return [Finding("warning", "plan", f"No matrix is left: {equals}", "Widen the patterns.")]
    found = []
    if _change(plan) == 0 and not plan.beside:
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
