"""Build the API & cite tab: the chosen merge as code and commands, and references to cite.

In: the session's `ChosenMerge`. Out: its description and texts to copy, updated whenever the tab is
opened; the description follows later, because the plan needs torch.
"""

from __future__ import annotations

import gradio as gr
from gradio.events import Dependency

from ipmerge_core.errors import PlanError
from ipmerge_core.ui.chosen_merge import ChosenMerge, describe, name_of
from ipmerge_core.ui.cite.snippets import Snippets, page_address, snippets_of
from ipmerge_core.ui.errors import QUIET, sentence_of, show_errors
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.pairs import SKIP_ALL, find_partial, load_pack
from ipmerge_core.ui.runs import Updates
from ipmerge_core.ui.safe_text import as_html, as_markdown

LABELS = {
    "json": "Plan as JSON",
    "python": "Python",
    "shell": "Command line",
    "client": "gradio_client: use this app from another program",
    "curl": "curl",
    "bibtex": "BibTeX",
}


def cite_tab(chosen: gr.State, tab: gr.Tab, opened: Dependency) -> None:
    """Lay out the tab inside the open `tab`; fill it when the tab or a pair is opened."""
    # layout
    gr.Markdown("The chosen merge as code, commands and citations.", elem_classes="lead")
    state = gr.Markdown("", elem_id="cite-state")
    digest = gr.HTML("", elem_id="cite-hash")
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
    def write(now: ChosenMerge, request: gr.Request) -> Updates:
        address = page_address(request.headers.get("referer", ""))
        try:
            words = describe_state(now)
            written = snippets_of(now, address)._asdict()
        except PlanError as error:  # a pair that is only partly analysed
            words, written = as_markdown(sentence_of(error)), {}
        return {state: words, **{code: written.get(name, "") for name, code in texts.items()}}

    def name_plan(now: ChosenMerge) -> str:
        return "" if find_partial(now.pack_id, SKIP_ALL) is not None else facts_html(now)

    def name_again(now: ChosenMerge, before: str) -> str:
        return name_plan(now) if before else ""  # never opened: do not import torch yet

    # wiring
    shown = [state, *texts.values()]
    after_commits(tab.select).then(show_errors(write), chosen, shown, **QUIET).success(
        show_errors(name_plan), chosen, digest, **QUIET
    )
    opened.success(show_errors(write), chosen, shown, **QUIET).success(
        show_errors(name_again), [chosen, digest], digest, **QUIET
    )


def describe_state(chosen: ChosenMerge) -> str:
    """Name the pair and the merge of the texts."""
    pack = load_pack(chosen.pack_id)
    made = f"analysed {pack['created'][:10]} with IPMerge {pack['engine']}"
    return f"**{as_markdown(pack['name'])}** · {as_markdown(name_of(chosen))} · {made}"


def facts_html(chosen: ChosenMerge) -> str:
    """Describe the merge of the texts in full. Raises: PlanError."""
    cells = "".join(
        f"<dt>{as_html(name)}</dt><dd>{as_html(text)}</dd>"
        for name, text in describe(chosen).items()
    )
    note = "Python and the command line give the same plan."
    return f'<dl class="facts">{cells}</dl><p class="caption">{note}</p>'
