"""The frame: a heading, the pair, the tabs around one plan; and how it is served.

In: the packs that are there. Out: a `gr.Blocks`, and a running server. Each tab is a file of its
own; what they share is the chosen pair, the session's `PlanChoice` and one `Backend`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ipmerge_core.ui.analyse_panel import lay_out_panel, wire_panel
from ipmerge_core.ui.analyse_words import pair_html
from ipmerge_core.ui.api import add_endpoints
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.calibration_form import remembered_calibration
from ipmerge_core.ui.cite_tab import cite_tab
from ipmerge_core.ui.compare import compare_tab
from ipmerge_core.ui.download import download_route
from ipmerge_core.ui.explore import ExploreTab, explore_tab, start_choice
from ipmerge_core.ui.layer_map import PlanChoice
from ipmerge_core.ui.merge_tab import merge_tab, remembered_job
from ipmerge_core.ui.messages import QUIET
from ipmerge_core.ui.packs import DEMO, ROOT, list_packs, load_pack
from ipmerge_core.ui.side_choice import remembered_merges, wire_try_it, with_run
from ipmerge_core.ui.start_gate import StartGate
from ipmerge_core.ui.trio import is_running
from ipmerge_core.ui.try_it import try_tab
from ipmerge_core.ui.web.modules import join_modules

HEADING = """\
# IPMerge
Give a vision model a math model's skill by merging weights. Drag to see which layers take part.
"""
NO_PACKS = """\
**No pair has been analysed yet.** Make a pack and reload this page:
`ipmerge analyse --mllm A --math B --base Z -o {folder}/name.pack.json.gz`
"""
LARGEST_UPLOAD = "15mb"
QUEUE = 32  # visitors who may wait
SCRIPT = Path(__file__).with_name("page.js")
STYLE = ROOT / "assets" / "style.css"


def build_app(backend: Backend | None = None) -> gr.Blocks:
    """Lay out the whole app; nothing runs and no model is loaded."""
    backend = backend or Backend()
    packs = list_packs()
    gr.set_static_paths([DEMO / "examples"])
    with gr.Blocks(title="IPMerge", fill_width=True, analytics_enabled=False) as app:
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
                    opener = gr.Button("Analyse another trio", size="sm", elem_id="analyse-open")
        panel = lay_out_panel(opener, details, hosted=backend.hosted)
        choice = gr.State(start_choice(load_pack(packs[0].id)) if packs else PlanChoice())
        if not packs:
            gr.Markdown(NO_PACKS.format(folder=backend.packs_folder), elem_id="no-packs")
        else:
            explore, tabs, gate = _add_tabs(app, backend, pair, choice)
            arrived = wire_panel(app, backend, panel, pair, choice, explore, tabs)
            gate.after(arrived.success)  # a pair that is on show may have become whole
        add_endpoints(backend)
    app.queue(max_size=QUEUE, default_concurrency_limit=4)
    return app  # type: ignore[no-any-return]


def _add_tabs(
    app: gr.Blocks, backend: Backend, pair: gr.Dropdown, choice: gr.State
) -> tuple[ExploreTab, gr.Tabs, StartGate]:
    job, runs, calibration = remembered_job(), remembered_merges(), remembered_calibration()
    with gr.Tabs(selected="explore", elem_id="tabs") as tabs:
        with gr.Tab("Explore", id="explore", elem_id="tab-explore"):
            explore = explore_tab(pair, choice, partial(is_running, backend))
        with gr.Tab("Try it", id="try", elem_id="tab-try") as asking:
            sides = try_tab(backend, pair, choice, runs=runs, last=job, tab=asking)
        asking.select(backend.warm_up, queue=False, api_visibility="private")
        with gr.Tab("Merge", id="merge", elem_id="tab-merge") as merge:
            merging = merge_tab(
                app, backend, pair, choice, job=job, calibration=calibration, tab=merge
            )
        merging.started.success(with_run, [runs, job], runs, queue=False, **QUIET)
        wire_try_it(backend, sides, pair, merging.try_it, tabs)
        with gr.Tab("Compare", id="compare", elem_id="tab-compare") as comparing:
            compare_tab(pair, choice, comparing, explore.opened)
        with gr.Tab("API & cite", id="cite", elem_id="tab-cite") as cite:
            cite_tab(pair, choice, cite, explore.opened)
    return explore, tabs, merging.gate


def theme() -> gr.themes.Base:
    """Gradio's own base, calmer: bundled fonts only, one accent, softer corners."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=(gr.themes.LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif"),
        font_mono=(gr.themes.LocalFont("IBM Plex Mono", (400, 700)), "ui-monospace", "monospace"),
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_400",
    )


def page_script() -> str:
    """The page's own JavaScript, as the function that Gradio calls once."""
    return f"() => {{\n{join_modules(SCRIPT, 'watchPage()')}}}"


def launch(
    host: str | None = None,
    port: int | None = None,
    *,
    block: bool = True,
    device: str = "auto",
) -> tuple[Any, str, str]:
    """Build the app and serve it; prints the address.

    Args:
        host: the interface; 127.0.0.1 if not given here or by GRADIO_SERVER_NAME.
        port: the first free one from 7860 on, if not given here or by GRADIO_SERVER_PORT.
        block: wait until the server is stopped.
        device: of every run that is not given one: "auto" for the best, or as torch names it.
    """
    backend = Backend(device=device)
    return build_app(backend).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        theme=theme(),
        css_paths=[STYLE],
        js=page_script(),
        footer_links=["api", "settings"],
        ssr_mode=False,
        run_history=False,  # pictures and questions are not kept in the visitor's browser
        max_file_size=LARGEST_UPLOAD,
        allowed_paths=[],
        app_kwargs={"routes": [download_route(backend)]},
    )
