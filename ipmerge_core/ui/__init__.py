"""The Gradio app: `app.build_app()` builds it from one package per tab.

In: packs (the small records of an analysis) and the folders of finished runs. Out: a Gradio app.
The arithmetic of the package stays out of here, and torch is loaded only when a user first chats,
plans or merges, so that the page loads within seconds.
"""

from __future__ import annotations

from ipmerge_core.ui.startup import import_gradio

import_gradio()
