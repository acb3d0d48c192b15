"""Build the app from a heading, the pair dropdown and the tabs, and serve it.

In: the available packs. Out: a `gr.Blocks`, and a running server. Each tab is a package; they share
the chosen pair, the session's `ChosenMerge` and one `Backend`.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.inference.precisions import Precision
from ipmerge_core.runtime.host import warms_up
from ipmerge_core.runtime.warm_worker import WarmWorker
from ipmerge_core.ui.analyse.descriptions import pair_html
from ipmerge_core.ui.analyse.models_form import is_running
from ipmerge_core.ui.analyse.panel import lay_out_panel, wire_panel
from ipmerge_core.ui.api import AppBlocks, add_endpoints
from ipmerge_core.ui.backend import MODULES, Backend
from ipmerge_core.ui.chat.column_choice import (
    TryFinished,
    remembered_merges,
    wire_try_it,
    with_run,
)
from ipmerge_core.ui.chat.recorded import unreadable_records
from ipmerge_core.ui.chat.tab import try_tab
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.cite.tab import cite_tab
from ipmerge_core.ui.compare.tab import compare_tab
from ipmerge_core.ui.errors import QUIET, public_text
from ipmerge_core.ui.evaluate.tab import evaluate_tab
from ipmerge_core.ui.explore.tab import ExploreTab, explore_tab, start_choice
from ipmerge_core.ui.finetune.tab import Elsewhere, finetune_tab
from ipmerge_core.ui.merge.download import download_route
from ipmerge_core.ui.merge.permalink import Permalink
from ipmerge_core.ui.merge.tab import MergeTab, merge_tab
from ipmerge_core.ui.pairs import DEMO, ROOT, list_packs, load_pack, unreadable_packs
from ipmerge_core.ui.run_list.component import RunList
from ipmerge_core.ui.run_list.wiring import Frame, wire_run_list
from ipmerge_core.ui.runs import RunPoll, remembered_run
from ipmerge_core.ui.safe_text import as_markdown
from ipmerge_core.ui.serving import layers, limit_waiting
from ipmerge_core.ui.theme import theme
from ipmerge_core.ui.web.modules import join_modules
from ipmerge_core.ui.web_security import web_security

HEADING = """\
# IPMerge
Merge a math model into a vision-language model. Drag the threshold to see which layers are merged.
"""
NO_PACKS = """\
**No pair has been analysed yet.** Create a pack and reload this page:
`ipmerge analyse --mllm A --math B --base Z -o {folder}/name.pack.json.gz`
"""
LEFT_OUT = "**These files cannot be read and are left out:**"
LISTED = 4  # files that are left out
LARGEST_UPLOAD = "15mb"
UPLOADS_KEPT = (3600, 86400)  # seconds: how often old uploads are deleted, and from what age
QUEUE = 1000  # waiting calls of all kinds
WAITING = {"models": 32}  # waiting calls of the kinds that take long
SCRIPT = Path(__file__).with_name("page.js")
STORAGE = SCRIPT.parent / "web" / "storage.js"
STYLES = (
    ROOT / "assets" / "style.css",
    SCRIPT.parent / "chat" / "style.css",
    SCRIPT.parent / "finetune" / "style.css",
)


def left_out() -> str:
    """Return Markdown on files that cannot be read and are not shown; empty if there are none."""
    faults = [public_text(fault) for fault in (*unreadable_packs(), *unreadable_records())]
    for fault in faults:
        logging.getLogger(__name__).warning("Left out: %s", fault)
    listed = [as_markdown(fault) for fault in faults[:LISTED]]
    if len(faults) > LISTED:
        listed.append(f"{len(faults) - LISTED} more, see the log of the app.")
    return "\n".join(f"- {line}" for line in listed)


def build_app(backend: Backend | None = None) -> gr.Blocks:
    """Build the app without running anything or loading a model."""
    backend = backend or Backend()
    packs = list_packs()
    gr.set_static_paths([DEMO / "examples"])
    with AppBlocks(
        title="IPMerge", fill_width=True, analytics_enabled=False, delete_cache=UPLOADS_KEPT
    ) as app:
        with gr.Row(elem_id="top"):
            gr.Markdown(HEADING, elem_id="heading")
            with gr.Column(elem_id="pair-column"):
                pair = gr.Dropdown(
                    [(pack.label, pack.id) for pack in packs],
                    value=packs[0].id if packs else None,
                    label="Pair",
                    elem_id="pair",
                    interactive=bool(packs),
                )
                with gr.Row(elem_id="pair-line"):
                    details = gr.HTML(
                        pair_html(load_pack(packs[0].id)) if packs else "", elem_id="pair-details"
                    )
                    runs = RunList()
                    opener = gr.Button("Analyse other models", size="sm", elem_id="analyse-open")
        if faults := left_out():
            gr.Markdown(f"{LEFT_OUT}\n\n{faults}", elem_id="left-out")
        analysis = remembered_run("analysis")
        panel = lay_out_panel(opener, details, analysis, hosted=backend.hosted)
        poll = RunPoll(gr.Textbox("", visible="hidden", elem_id="visitor"))
        first = packs[0].id if packs else ""
        chosen = gr.State(ChosenMerge(first, start_choice(load_pack(first))) if packs else None)
        if not packs:
            gr.Markdown(NO_PACKS.format(folder=backend.packs_folder), elem_id="no-packs")
        else:
            parts = _add_tabs(app, backend, pair, chosen, poll, analysis)
            view, tabs = parts.explore.view, parts.taking.tabs
            arrived = wire_panel(app, backend, panel, pair, view, tabs, poll)
            # The analysis of the chosen pair may have finished.
            parts.merging.gate.check_after(arrived.success)
            lasts = (parts.calibration, parts.evaluation, parts.finetuning)
            remembered = (parts.job, analysis, *lasts)
            frame = Frame(runs, pair, view, parts.taking, parts.merging.method, *remembered)
            parts.link.write_after(wire_run_list(backend, frame, poll))
        add_endpoints(backend)
    app.queue(max_size=QUEUE, default_concurrency_limit=4)
    limit_waiting(app._queue, WAITING)
    return app  # type: ignore[no-any-return]


class _Parts(NamedTuple):
    """The tabs, and what the frame around them uses of them."""

    explore: ExploreTab
    merging: MergeTab
    taking: TryFinished
    link: Permalink
    job: gr.BrowserState
    calibration: gr.BrowserState
    evaluation: gr.BrowserState
    finetuning: gr.BrowserState


def _add_tabs(
    app: gr.Blocks,
    backend: Backend,
    pair: gr.Dropdown,
    chosen: gr.State,
    poll: RunPoll,
    analysis: gr.BrowserState,
) -> _Parts:
    names = ("job", "calibration", "evaluation", "finetuning")
    job, calibration, evaluation, finetuning = map(remembered_run, names)
    runs, link = remembered_merges(), Permalink(chosen)
    with gr.Tabs(selected="explore", elem_id="tabs") as tabs:
        with gr.Tab("Explore", id="explore", elem_id="tab-explore"):
            explore = explore_tab(pair, chosen, partial(is_running, backend))
        with gr.Tab("Try it", id="try", elem_id="tab-try") as asking:
            trying = try_tab(backend, pair, explore.view, runs=runs, last=job, tab=asking)
        with gr.Tab("Merge", id="merge", elem_id="tab-merge") as merge:
            merging = merge_tab(
                backend,
                pair,
                chosen,
                poll=poll,
                job=job,
                calibration=calibration,
                link=link,
                tab=merge,
            )
        merging.started.success(with_run, [runs, job], runs, queue=False, **QUIET)
        taking = TryFinished(backend, trying.choice, tabs)
        taken = wire_try_it(taking, merging.try_it)
        with gr.Tab("Evaluate", id="evaluate", elem_id="tab-evaluate") as evaluating:
            evaluated = evaluate_tab(
                backend,
                pair,
                chosen,
                trying.fill.parts,
                tabs,
                poll=poll,
                memory=evaluation,
                tab=evaluating,
            )
        with gr.Tab("Fine-tune", id="finetune", elem_id="tab-finetune") as tuning:
            elsewhere = Elsewhere(taking, evaluated.form, analysis)
            finetune_tab(backend, pair, elsewhere, poll=poll, memory=finetuning, tab=tuning)
        with gr.Tab("Compare", id="compare", elem_id="tab-compare") as comparing:
            compare_tab(pair, chosen, comparing, explore.opened)
        with gr.Tab("API & cite", id="cite", elem_id="tab-cite") as cite:
            cite_tab(chosen, cite, explore.opened)
    link.read(app)
    for event in (explore.opened, taken, *trying.chose, *evaluated.chose):
        link.write_after(event)
    return _Parts(explore, merging, taking, link, job, calibration, evaluation, finetuning)


def page_script() -> str:
    """Return the page's own JavaScript as the function that Gradio calls once."""
    return f"() => {{\n{join_modules(SCRIPT, 'watchPage()')}}}"


def launch(
    host: str | None = None,
    port: int | None = None,
    *,
    block: bool = True,
    device: str = "auto",
    precision: Precision = "auto",
    quiet: bool = False,
) -> tuple[Any, str, str]:
    """Build the app, serve it and print its address.

    Args:
        host: the network interface; by default GRADIO_SERVER_NAME, else 127.0.0.1.
        port: the port; by default GRADIO_SERVER_PORT, else the first free one from 7860 on.
        block: whether to wait until the server is stopped.
        device: default device of all runs: "auto" for the best one, or a torch device.
        precision: in which models are loaded for the chat, see `load_model`.
        quiet: do not print the address.
    """
    worker = WarmWorker(MODULES, report=_log) if warms_up() else None
    backend = Backend(device=device, precision=precision, worker=worker, report=_log)
    return build_app(backend).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        quiet=quiet,
        theme=theme(),
        css_paths=[*STYLES],
        js=page_script(),
        head=f"<script>{STORAGE.read_text('utf-8')}</script>",
        footer_links=["api", "settings"],
        ssr_mode=False,
        run_history=False,  # do not keep images and questions in the browser
        max_file_size=LARGEST_UPLOAD,
        allowed_paths=[],
        # Gradio asks itself for the page and ends the app where that takes over three seconds, as
        # on a busy machine, or where a proxy is set for this machine's own address.
        _frontend=False,
        app_kwargs={
            "routes": [download_route(backend)],
            "middleware": [
                web_security(host or os.environ.get("GRADIO_SERVER_NAME")),
                *layers(backend.use),
            ],
        },
    )


def _log(line: str) -> None:
    """Print a line to the log of the server."""
    sys.stderr.write(f"{line}\n")
