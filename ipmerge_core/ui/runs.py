"""A run that a tab watches: progress in words, Cancel and Resume, found again after a reload.

In: what the browser remembers of a run (its id and key) and the server's runs. Out: updates of the
components that show it. What is true stands in the run's folder, never in the page; whoever knows
the id may watch, whoever holds the key has buttons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import QUIET, told
from ipmerge_core.ui.format import progress_html

POLL_SECONDS = 0.5
Remembered = dict[str, str]


class RunView(NamedTuple):
    """The components that every watched run has."""

    progress: gr.HTML
    cancel: gr.Button
    resume: gr.Button
    timer: gr.Timer


class Watched(NamedTuple):
    """A run as one browser sees it."""

    status: JobStatus | None  # None where there is no run
    owned: bool

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return self.status is not None and self.status.state == "finished"

    @property
    def running(self) -> bool:
        """Whether a process is working on it now."""
        return self.status is not None and self.status.is_running

    def updates(self, nothing: str = "") -> list[Any]:
        """Return the updates of a `RunView`; `nothing` is what stands there where no run is."""
        if self.status is None:
            hidden = gr.update(visible=False)
            return [nothing, hidden, hidden, gr.Timer(active=False)]
        running, stopping = self.status.is_running, self.status.state == "cancelling"
        return [
            progress_html(self.status),
            gr.update(visible=self.owned and running, interactive=not stopping),
            gr.update(visible=self.owned and self.status.can_resume),
            # Goes on until the end: a late answer from before a resume must not be the last word.
            gr.Timer(active=not self.finished),
        ]


def find_run(backend: Backend, mine: Remembered | None) -> Watched:
    """Find the run that a browser remembers."""
    mine = mine or {}
    try:
        status = backend.store.status(str(mine.get("id", "")))
    except IPMergeError:
        return Watched(None, owned=False)
    return Watched(status, backend.store.holds_key(status.id, str(mine.get("key", ""))))


def off_at_once(button: gr.Button) -> None:
    """Turn a button off in the page when it is pressed; what answers turns it on again."""
    off = "() => ({ __type__: 'update', interactive: false })"
    button.click(None, None, button, js=off, queue=False, **QUIET)


def steer(
    app: gr.Blocks,
    backend: Backend,
    job: gr.BrowserState,
    view: RunView,
    watch: Callable[..., list[Any]],
    shown: Sequence[Any],
    *,
    queued: bool = False,
) -> None:
    """Wire the buttons and the timer of a run, and attach to it when the page loads.

    Args:
        app: the whole page.
        backend: where runs are kept.
        job: what the browser remembers of the run.
        view: its buttons and timer.
        watch: from `job` to updates of `shown`.
        shown: everything that shows the run.
        queued: let ticks wait in the queue, where others listen to a change of what they bring.
    """

    def stop(mine: Remembered) -> None:
        backend.store.cancel(mine["id"], mine["key"])

    def go_on(mine: Remembered) -> None:
        backend.store.resume(mine["id"], mine["key"])

    for button, act in ((view.cancel, stop), (view.resume, go_on)):
        pressed = button.click(told(act), job, None, queue=False, **QUIET)
        pressed.success(watch, job, shown, **QUIET)
    view.timer.tick(watch, job, shown, queue=queued, **QUIET)
    app.load(watch, job, shown, queue=False, **QUIET)
