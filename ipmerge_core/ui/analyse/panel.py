"""The panel that has another trio analysed: name the models, check, start, watch.

In: names of models. Out: a run that makes a pack, drawn on the map while it grows and chosen under
Pair once it is whole. Nothing is downloaded before Start, and what was typed stays. The run
outlives the page: the browser keeps its id and key, and attaches to it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.models.catalogue import load_catalogue
from ipmerge_core.ui.analyse.descriptions import known_html, known_label, needs_html, pair_html
from ipmerge_core.ui.analyse.models_form import (
    Checked,
    Trio,
    check_trio,
    discard,
    is_running,
    read_trio,
    refused,
    start_analysis,
)
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import QUIET, told
from ipmerge_core.ui.explore.partial_packs import explored_pack, pair_choices
from ipmerge_core.ui.explore.tab import ExploreTab, opened_pair
from ipmerge_core.ui.format import findings_html
from ipmerge_core.ui.pairs import EVERYTHING, find_growing, id_of, list_packs
from ipmerge_core.ui.runs import Remembered, RunView, Watched, find_run, steer
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from gradio.events import Dependency

JOB_KEY = "ipmerge.analysis.v1"
JOB_SECRET = "ipmerge-analysis"  # noqa: S105 (it only keeps the entry readable after a restart)
POLL_SECONDS = 1.0
EXACT, QUICK = "exact", "quick"
LEAD = (
    "Compare a vision-language model with math models that were tuned from the same language "
    "model. Check reads headers and a few rows; nothing more is read before you start."
)
ADDRESS = "Hub id: org/name"
OR_FOLDER = ", or a folder"
READY = "Checked. Nothing has been downloaded yet."
REFUSED = "This cannot start: see what is marked ✕. What you typed is kept."
STALE = "Changed since the check: check again."


class Form(NamedTuple):
    """The fields, in the order of `read_trio`, and what the check fills."""

    known: gr.Dropdown
    note: gr.HTML
    fields: list[Any]
    check: gr.Button
    status: gr.HTML
    findings: gr.HTML
    facts: gr.HTML
    start: gr.Button
    close: gr.Button


class Panel(NamedTuple):
    """All that stands between the frame's heading and the tabs."""

    details: gr.HTML
    opener: gr.Button
    card: gr.Column
    form: Form
    strip: gr.Column
    run: RunView
    show: gr.Button
    dismiss: gr.Button


def remembered_analysis() -> gr.BrowserState:
    """Make the place in the browser where the run's id and key are kept; outside all tabs."""
    return gr.BrowserState({}, storage_key=JOB_KEY, secret=JOB_SECRET)


# --- wiring ----------------------------------------------------------------------------------


def wire_panel(
    app: gr.Blocks,
    backend: Backend,
    panel: Panel,
    pair: gr.Dropdown,
    choice: gr.State,
    explore: ExploreTab,
    tabs: gr.Tabs,
) -> Dependency:
    """Wire the panel to the frame's pair and to the map.

    Returns the event after which a pair has come, or become whole.
    """
    job, waiting = remembered_analysis(), gr.State("")
    shown = [pair, explore.layer_map, choice, explore.spectra]
    started = _wire_form(backend, panel, pair, job, waiting)
    arrived = _wire_run(app, backend, panel, job, waiting, shown, tabs, started)

    def describe(pack_id: str) -> str:
        return pair_html(explored_pack(pack_id))

    def refresh(pack_id: str) -> dict[str, Any]:
        return gr.update(choices=pair_choices(partial(is_running, backend), pack_id))

    pair.change(told(describe), pair, panel.details, queue=False, **QUIET)
    arrived.success(told(describe), pair, panel.details, **QUIET)
    app.load(refresh, pair, pair, queue=False, **QUIET)
    return arrived


def _wire_form(
    backend: Backend, panel: Panel, pair: gr.Dropdown, job: gr.BrowserState, waiting: gr.State
) -> Dependency:
    """Wire the fields, the check and Start; returns the event after which `job` holds a run."""
    form, checked, is_open = panel.form, gr.State(None), gr.State(False)

    def toggle(shown: bool) -> tuple[dict[str, Any], bool]:
        return gr.update(visible=not shown), not shown

    def fill(number: int, found: Checked | None) -> list[Any]:
        known = load_catalogue().pairs[number]
        typed = [known.mllm, "\n".join(known.math), known.base, known.base_mllm or ""]
        return [known_html(known), *typed, *forget(found)]

    def forget(found: Checked | None) -> list[Any]:
        """What was checked no longer stands in the fields."""
        words = gr.skip() if found is None else _words(STALE)
        return [gr.update(interactive=False), words, None]

    def check(*typed: Any) -> Iterator[list[Any]]:  # noqa: ANN401 (the fields' values)
        yield from checked_views(backend, *typed)

    def begin(
        found: Checked | None,
        before: str,
        *typed: Any,  # noqa: ANN401
    ) -> tuple[dict[str, str], str, dict[str, Any], bool]:
        if found is None or found.pinned is None or found.asked != _read(*typed):
            raise PlanError("The fields have changed since the check. Press Check again.")
        started = start_analysis(backend, found.pinned)
        return started._asdict(), before, gr.update(visible=False), False

    views = [form.status, form.findings, form.facts, form.start, checked]
    for button in (panel.opener, form.close):
        button.click(toggle, is_open, [panel.card, is_open], queue=False, **QUIET)
    stale = [form.start, form.status, checked]
    filled = [form.note, *form.fields[:4], *stale]
    form.known.input(fill, [form.known, checked], filled, queue=False, **QUIET)
    for field in form.fields:
        field.input(forget, checked, stale, queue=False, trigger_mode="once", **QUIET)
    lines = [field.submit for field in form.fields[:4] if field.lines == 1]
    gr.on([form.check.click, *lines], told(check), form.fields, views, **QUIET)
    return form.start.click(
        told(begin), [checked, pair, *form.fields], [job, waiting, panel.card, is_open], **QUIET
    )


def _wire_run(
    app: gr.Blocks,
    backend: Backend,
    panel: Panel,
    job: gr.BrowserState,
    waiting: gr.State,
    shown: list[Any],
    tabs: gr.Tabs,
    started: Dependency,
) -> Dependency:
    """Wire the strip; returns the event after which a pair has come, or become whole."""
    arrived, runs = gr.State(""), partial(is_running, backend)
    pair = shown[0]

    def watch(mine: Remembered | None) -> list[Any]:
        return watched(backend, mine)

    def arrive(news: str, pack_id: str, before: str) -> list[Any]:
        """List the new pair; show it to whoever still looks at what stood there at the start."""
        _, _, new = news.partition(":")
        if new and before and pack_id == before:
            return [*_opened(new), ""]
        return [gr.update(choices=pair_choices(runs, pack_id)), *[gr.skip()] * 3, before]

    def _opened(pack_id: str) -> list[Any]:
        choices = pair_choices(runs, pack_id)
        return [gr.update(choices=choices, value=pack_id), *opened_pair(pack_id, runs)]

    def show(mine: Remembered) -> list[Any]:
        return [*_opened(_made_by(find_run(backend, mine))), gr.Tabs(selected="explore")]

    def put_away(mine: Remembered, pack_id: str) -> list[Any]:
        run = find_run(backend, mine)
        if run.status is not None and run.status.can_resume:
            discard(backend, mine["id"], mine["key"])
        if pack_id == _made_by(run) and not run.finished:
            return [{}, *_opened(list_packs()[0].id)]
        return [{}, gr.update(choices=pair_choices(runs, pack_id)), *[gr.skip()] * 3]

    watching = [*panel.run, panel.strip, panel.show, panel.dismiss, arrived]
    steer(app, backend, job, panel.run, watch, watching, queued=True)  # `arrived` has a listener
    started.success(watch, job, watching, **QUIET)
    panel.show.click(told(show), job, [*shown, tabs], **QUIET)
    panel.dismiss.click(told(put_away), [job, pair], [job, *shown], **QUIET).success(
        watch, job, watching, **QUIET
    )
    return arrived.change(told(arrive), [arrived, pair, waiting], [*shown, waiting], **QUIET)


def watched(backend: Backend, mine: Remembered | None) -> list[Any]:
    """Return what the strip shows of a run: a `RunView`, its visibility, buttons, and the news."""
    run = find_run(backend, mine)
    there = run.finished or find_growing(_made_by(run), EVERYTHING) is not None
    stopped = run.status is not None and run.status.can_resume
    label = "Dismiss" if run.finished else "Discard"
    return [
        *run.updates(),
        gr.update(visible=run.status is not None),
        gr.update(visible=there),
        gr.update(value=label, visible=run.finished or (run.owned and stopped)),
        f"{'finished' if run.finished else 'growing'}:{_made_by(run)}" if there else "",
    ]


def _made_by(run: Watched) -> str:
    """Return the id of the pair that a run makes."""
    return id_of(Path(str(run.status.arguments.get("out", "")))) if run.status else ""


def checked_views(backend: Backend, *typed: Any) -> Iterator[list[Any]]:  # noqa: ANN401
    """Check what was typed; yield what the form shows: words while it reads, then the findings."""
    off = gr.update(interactive=False)
    found: Checked | None = None
    try:
        for news in _checks(backend, *typed):
            if isinstance(news, Checked):
                found = news
            else:
                yield [_words(f"{news} …"), gr.skip(), gr.skip(), off, None]
    except PlanError as error:
        found = refused(error)
    assert found is not None, "a check ends with what it found"
    yield [
        _words(READY if found.ready else REFUSED),
        findings_html(found.findings),
        needs_html(found, hosted=backend.hosted) if found.ready else "",
        gr.update(interactive=found.ready),
        found,
    ]


def _read(mllm: str, math: str, base: str, own: str, depth: str, rank: float | None) -> Trio:
    return read_trio(mllm, math, base, own, depth == QUICK, rank)


def _checks(backend: Backend, *typed: Any) -> Iterator[str | Checked]:  # noqa: ANN401
    return check_trio(_read(*typed), hub_only=backend.hosted, device=backend.device)


def _words(text: str) -> str:
    return f'<p class="waiting">{as_html(text)}</p>'


# --- layout ----------------------------------------------------------------------------------


def lay_out_panel(opener: gr.Button, details: gr.HTML, *, hosted: bool) -> Panel:
    """Lay out the form and the strip that shows a run; the frame brings the opener and details."""
    with gr.Column(visible=False, elem_classes="card", elem_id="analyse-panel") as card:
        form = _form(hosted=hosted)
    with gr.Column(visible=False, elem_id="analysis-run") as strip:
        progress = gr.HTML("", elem_id="analysis-status", elem_classes="run-status")
        with gr.Row(elem_classes="run-row"):
            show = gr.Button("Show on the map", size="sm", visible=False, elem_id="show-analysis")
            cancel = gr.Button("Cancel", size="sm", visible=False, elem_id="cancel-analysis")
            resume = gr.Button("Resume", size="sm", visible=False, elem_id="resume-analysis")
            dismiss = gr.Button("Dismiss", size="sm", visible=False, elem_id="dismiss-analysis")
    run = RunView(progress, cancel, resume, gr.Timer(POLL_SECONDS, active=False))
    return Panel(details, opener, card, form, strip, run, show, dismiss)


def _form(*, hosted: bool) -> Form:
    gr.HTML("<h2>Analyse another trio</h2>")
    gr.Markdown(LEAD, elem_classes="lead")
    pairs = load_catalogue().pairs
    known = gr.Dropdown(
        [(known_label(pair), number) for number, pair in enumerate(pairs)],
        value=None,
        label="Known pairs",
        info="Somebody merged these; choosing one fills the fields",
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
    return Form(known, note, fields, check, status, findings, facts, start, close)


def _fields(*, hosted: bool) -> list[Any]:
    """Lay out the fields that `read_trio` reads."""
    address = ADDRESS + ("" if hosted else OR_FOLDER)
    with gr.Row(elem_classes="fields"):
        mllm = gr.Textbox(label="Vision-language model", info=address, elem_id="analyse-mllm")
        math = gr.Textbox(
            label="Math models",
            info="One a line, tuned from the base",
            lines=2,
            max_lines=4,
            elem_id="analyse-math",
        )
        base = gr.Textbox(
            label="Base", info="The language model they were tuned from", elem_id="analyse-base"
        )
        own = gr.Textbox(
            label="Base of the vision-language model",
            info="Only where it is another one",
            elem_id="analyse-own-base",
        )
        depth = gr.Radio(
            [EXACT, QUICK],
            value=EXACT,
            label="Depth",
            info="Quick is approximate: 64 directions",
            elem_id="analyse-depth",
        )
        rank = gr.Number(
            0,
            label="Rank",
            info="Leading directions to keep; 0 for all",
            precision=0,
            minimum=0,
            elem_id="analyse-rank",
        )
    return [mllm, math, base, own, depth, rank]
