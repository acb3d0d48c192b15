"""Define the list of runs: a `gr.HTML` component with its own JavaScript in the frame of the tabs.

In: `{"n": ..., "run": ..., "failed": ..., "runs": [...], "more": ...}`, see `rows`. Out: browser
events. `tick` requests the state of all runs: once when the page is opened, repeatedly while a run
is in progress, and when the page is looked at again. `act` cancels, resumes or deletes a run,
`open` shows it in its tab or asks its model. Every event carries the visitor's secret, which stays
in this browser; Python checks it against the runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipmerge_core.ui.web.component import Component

HERE = Path(__file__).parent
ELEM_ID = "run-list"


class RunList(Component):
    """A component that lists the runs of a visitor."""

    def __init__(
        self, value: dict[str, Any] | None = None, elem_id: str = ELEM_ID, *, render: bool = True
    ) -> None:
        super().__init__(value, elem_id, HERE / "run_list.js", render=render)
