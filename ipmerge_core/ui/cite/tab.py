"""Build the API & cite tab: the current plan as code and commands, and references to cite.

In: the chosen pair and the session's `PlanChoice`. Out: texts to copy, updated whenever the tab is
opened; the plan's hash follows later, because it needs torch.
"""

from __future__ import annotations

import gradio as gr
from gradio.events import Dependency

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.cite.snippets import Snippets, page_address, snippets_of
from ipmerge_core.ui.errors import QUIET, sentence_of, show_errors
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.pairs import SKIP_ALL, find_partial, load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, describe_choice, plan_of
from ipmerge_core.ui.runs import Updates
from ipmerge_core.ui.safe_text import as_markdown

LABELS = {
    "json": "Plan as JSON",
    "python": "Python",
    "shell": "Command line",
    "client": "gradio_client: use this app from another program",
    "curl": "curl",
    "bibtex": "BibTeX",
}


def cite_tab(pair: gr.Dropdown, choice: gr.State, tab: gr.Tab, opened: Dependency) -> None:
    """Lay out the tab inside the open `tab`; fill it when the tab or a pair is opened."""
    # layout
    gr.Markdown("The current plan in Explore as code, commands and citations.", elem_classes="lead")
    state = gr.Markdown("", elem_id="cite-state")
    digest = gr.Markdown("", elem_id="cite-hash")
    with gr.Column(elem_id="snippets"):
        texts = {
            name: gr.Code(
                label=LABELS[name],
                language=None,  # plain: Gradio's colours for code are too pale to read on white
                interactive=False,
                wrap_lines=True,
                show_line_numbers=False,
                lines=1,
                max_lines=40,
                buttons=["copy"],
                elem_id=f"cite-{name}",
            )
            for name in Snippets._fields
        }

    # handlers
    def write(pack_id: str, plan: PlanChoice, request: gr.Request) -> Updates:
        address = page_address(request.headers.get("referer", ""))
        try:
            words = describe_state(pack_id, plan)
            written = snippets_of(pack_id, plan, address)._asdict()
        except PlanError as error:  # a pair that is only partly analysed
            words, written = as_markdown(sentence_of(error)), {}
        return {state: words, **{code: written.get(name, "") for name, code in texts.items()}}

    def name_plan(pack_id: str, plan: PlanChoice) -> str:
        if find_partial(pack_id, SKIP_ALL) is not None:
            return ""
        return f"Plan `{plan_of(pack_id, plan).hash}`. Python and the command line give the same."

    def name_again(pack_id: str, plan: PlanChoice, before: str) -> str:
        return name_plan(pack_id, plan) if before else ""  # never opened: do not import torch yet

    # wiring
    here, shown = [pair, choice], [state, *texts.values()]
    after_commits(tab.select).then(show_errors(write), here, shown, queue=False, **QUIET).success(
        show_errors(name_plan), here, digest, **QUIET
    )
    opened.success(show_errors(write), here, shown, **QUIET).success(
        show_errors(name_again), [*here, digest], digest, **QUIET
    )


def describe_state(pack_id: str, choice: PlanChoice) -> str:
    """Describe the pair and the plan of the texts."""
    pack = load_pack(pack_id)
    made = f"analysed {pack['created'][:10]} with IPMerge {pack['engine']}"
    return f"**{as_markdown(pack['name'])}** · {describe_choice(choice)} · {made}"
