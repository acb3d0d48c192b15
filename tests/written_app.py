"""One chat of the Try it tab, filled with texts: each is asked, and each is the answer to itself.

    python tests/written_app.py TEXTS.json

The component, the page's script and its style are the app's own; the address is Gradio's usual.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import gradio as gr

    from ipmerge_core.ui.app import STYLES, page_script
    from ipmerge_core.ui.chat.answers import Side
    from ipmerge_core.ui.chat.layout import lay_out_chat
    from ipmerge_core.ui.chat.messages import view
    from ipmerge_core.ui.chat.turns import Turn
    from ipmerge_core.ui.theme import theme

    texts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    turns = [Turn(text, (), "p", (Side("Base", "", "finished", text),)) for text in texts]
    with gr.Blocks(fill_width=True, analytics_enabled=False) as app, gr.Row(elem_id="chats"):
        lay_out_chat("Model A", "chat-a", view(turns, 1).chats[0])
    app.launch(
        theme=theme(),
        css_paths=[*STYLES],
        js=page_script(),
        ssr_mode=False,
        run_history=False,
    )
