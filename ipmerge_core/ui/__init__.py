"""The app: `app.build_app()` puts a frame around one file per tab.

In: packs (the small records of an analysis) and the folders of finished runs. Out: a Gradio app.
The arithmetic of the package stays out of here, and torch is loaded only when a visitor first
chats, plans or merges, so that the page is there within seconds.
"""

from __future__ import annotations

from ipmerge_core.ui.startup import import_gradio

import_gradio()
