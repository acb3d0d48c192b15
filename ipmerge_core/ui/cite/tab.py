"""The API & cite tab: what is on show, as code that repeats it and as references to quote.

In: the frame's pair and the session's `PlanChoice`. Out: texts to copy, written anew each time the
tab is opened; the plan's hash follows, because it needs torch.
"""

from __future__ import annotations

import gradio as gr
from gradio.events import Dependency

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.cite.snippets import Snippets, page_address, snippets_of
from ipmerge_core.ui.errors import QUIET, sentence_of, told
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.pairs import EVERYTHING, find_growing, load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, describe_choice, plan_of
from ipmerge_core.ui.runs import Updates
from ipmerge_core.ui.safe_text import as_markdown

LABELS = {
    "json": "Plan as JSON",
    "python": "Python",
    "shell": "Command line",
    "client": "gradio_client: this app from another program",
    "curl": "curl",
    "bibtex": "BibTeX",
}


def cite_tab(pair: gr.Dropdown, choice: gr.State, tab: gr.Tab, opened: Dependency) -> None:
    """Lay out the tab inside the open `tab`; write it anew with `tab` and when a pair is opened."""
    # layout
    gr.Markdown("The plan of Explore, exactly as it stands there.", elem_classes="lead")
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
            words = state_words(pack_id, plan)
            written = snippets_of(pack_id, plan, address)._asdict()
        except PlanError as error:  # a pair that is only partly analysed
            words, written = as_markdown(sentence_of(error)), {}
        return {state: words, **{code: written.get(name, "") for name, code in texts.items()}}

    def name_plan(pack_id: str, plan: PlanChoice) -> str:
        if find_growing(pack_id, EVERYTHING) is not None:
            return ""
        return f"Plan `{plan_of(pack_id, plan).hash}`: Python and the command line make the same."

    def name_again(pack_id: str, plan: PlanChoice, before: str) -> str:
        return name_plan(pack_id, plan) if before else ""  # never opened: torch can wait

    # wiring
    here, shown = [pair, choice], [state, *texts.values()]
    after_commits(tab.select).then(told(write), here, shown, queue=False, **QUIET).success(
        told(name_plan), here, digest, **QUIET
    )
    opened.success(told(write), here, shown, **QUIET).success(
        told(name_again), [*here, digest], digest, **QUIET
    )


def state_words(pack_id: str, choice: PlanChoice) -> str:
    """Say which pair and plan the texts are of."""
    pack = load_pack(pack_id)
    made = f"analysed {pack['created'][:10]} with IPMerge {pack['engine']}"
    return f"**{as_markdown(pack['name'])}** · {describe_choice(choice)} · {made}"
