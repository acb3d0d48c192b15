"""The Explore tab alone, over synthetic packs: a small app for browser tests and benchmarks.

Run as a program it serves until it is stopped: `python tests/explore_app.py PORT HOME`, with packs
in `HOME/packs`. It prints the session's choice under the map, so that tests see what Python
has received.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def write_packs(home: Path, packs: dict[str, object]) -> None:
    """Put packs where the app looks for a user's own, as `<name>.pack.json.gz`."""
    (home / "packs").mkdir(parents=True, exist_ok=True)
    for name, pack in packs.items():
        path = home / "packs" / f"{name}.pack.json.gz"
        path.write_bytes(gzip.compress(json.dumps(pack).encode()))


def serve(port: int) -> None:
    """Serve the tab on the loopback interface until the process is stopped."""
    from ipmerge_core.ui.chosen_merge import ChosenMerge
    from ipmerge_core.ui.explore.tab import explore_tab, gr
    from ipmerge_core.ui.pairs import list_packs

    packs = [(pack.label, pack.id) for pack in list_packs() if pack.id.startswith("packs-")]
    with gr.Blocks(title="IPMerge", fill_width=True, analytics_enabled=False) as app:
        gr.Markdown("# IPMerge")
        pair = gr.Dropdown(packs, value=packs[0][1], label="Pair", elem_id="pair")
        choice = gr.State(ChosenMerge())
        with gr.Tabs(), gr.Tab("Explore"):
            explore = explore_tab(pair, choice)
        received = gr.Textbox(label="received", elem_id="received")
        explore.committed.then(
            lambda value: json.dumps(value.plan.to_browser()),
            choice,
            received,
            show_progress="hidden",
            trigger_mode="always_last",  # the usual "once" drops what comes while one is on its way
        )
    app.launch(server_name="127.0.0.1", server_port=port, quiet=True, ssr_mode=False)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))
    os.environ["IPMERGE_HOME"] = sys.argv[2]
    serve(int(sys.argv[1]))
