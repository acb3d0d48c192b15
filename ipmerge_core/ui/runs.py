"""Show a long run in a tab: progress with time left, Cancel, Resume, found again after a reload.

In: the id and key that the browser remembers, and the server's runs. Out: a `RunView`, which lays
itself out and wires itself. The state is read from the run's folder every time, never kept in the
page. The id gives read access; the buttons require the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.format import progress_html

if TYPE_CHECKING:
    from gradio.events import Dependency

POLL_SECONDS = 0.5
Remembered = dict[str, str]  # a run's id and key, and whatever else the browser keeps with them
Updates = dict[Any, Any]  # component -> its new value or `gr.update`
Listener = Callable[..., Any]  # an event such as `app.load`, `button.click` or `dependency.then`


class RunState(NamedTuple):
    """A run as one browser sees it."""

    status: JobStatus | None  # None if there is no run
    key: str = ""  # empty unless this browser holds the run's key

    @property
    def owned(self) -> bool:
        """Whether this browser may cancel, resume and download."""
        return bool(self.key)

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self.status is not None and self.status.state == "finished"

    @property
    def running(self) -> bool:
        """Whether a process is working on it now."""
        return self.status is not None and self.status.is_running

    @property
    def resumable(self) -> bool:
        """Whether it stopped before its end and can continue."""
        return self.status is not None and self.status.can_resume

    @property
    def out(self) -> str:
        """The file or folder that the run writes; empty if there is no run."""
        return str(self.status.arguments.get("out", "")) if self.status else ""


def find_run(backend: Backend, remembered: Remembered | None) -> RunState:
    """Find the run that a browser remembers."""
    remembered = remembered or {}
    try:
        status = backend.store.status(str(remembered.get("id", "")))
    except IPMergeError:
        return RunState(None)
    key = str(remembered.get("key", ""))
    return RunState(status, key if backend.store.holds_key(status.id, key) else "")


def remembered_run(name: str) -> gr.BrowserState:
    """Create the browser state that keeps a run's id and key across reloads.

    Create it outside of all tabs: the contents of a tab do not exist before the tab is opened.
    """
    return gr.BrowserState({}, storage_key=f"ipmerge.{name}.v1", secret=f"ipmerge-{name}")


def disable_on_click(button: gr.Button) -> None:
    """Disable a button in the page as soon as it is clicked; the handler's answer enables it."""
    off = "() => ({ __type__: 'update', interactive: false })"
    button.click(None, None, button, js=off, queue=False, **QUIET)


def _no_extras(_: RunState) -> Updates:
    return {}


class RunView:
    """The components that show one run, and what keeps them up to date.

    The constructor lays them out in the open block. Call `wire` in a block that is always visible:
    a hidden timer does not tick.

    Args:
        name: the run's name in element ids: `{name}-run`, `cancel-{name}`, `resume-{name}`.
        empty: HTML shown while there is no run; without it the view is hidden until there is one.
        status_id: element id of the progress, `{name}-status` by default.
        poll_seconds: time between two updates.
    """

    def __init__(
        self, name: str, *, empty: str = "", status_id: str = "", poll_seconds: float = POLL_SECONDS
    ) -> None:
        self.empty = empty
        with gr.Column(
            visible=bool(empty), elem_id=f"{name}-run", elem_classes="run"
        ) as self.column:
            self.progress = gr.HTML(
                empty, elem_id=status_id or f"{name}-status", elem_classes="run-status"
            )
            with gr.Row(elem_classes="run-row") as self.buttons:
                self.cancel = gr.Button(
                    "Cancel", size="sm", visible=False, elem_id=f"cancel-{name}"
                )
                self.resume = gr.Button(
                    "Resume", size="sm", visible=False, elem_id=f"resume-{name}"
                )
        self.timer = gr.Timer(poll_seconds, active=False, render=False)
        self._watch: dict[str, Any] = {}

    def updates(self, run: RunState) -> Updates:
        """Return the updates of the view's own components."""
        if run.status is None:
            return {
                self.column: gr.update(visible=bool(self.empty)),
                self.progress: self.empty,
                self.cancel: gr.update(visible=False),
                self.resume: gr.update(visible=False),
                self.timer: gr.Timer(active=False),
            }
        stopping = run.status.state == "cancelling"
        return {
            self.column: gr.update(visible=True),
            self.progress: progress_html(run.status),
            self.cancel: gr.update(visible=run.owned and run.running, interactive=not stopping),
            self.resume: gr.update(visible=run.owned and run.resumable),
            # Keep polling until the end: an update from before a resume may arrive after it.
            self.timer: gr.Timer(active=not run.finished),
        }

    def wire(
        self,
        backend: Backend,
        memory: gr.BrowserState,
        attach_on: Sequence[Listener],
        *,
        attach: Callable[[Remembered | None], Remembered] | None = None,
        extras: Callable[[RunState], Updates] = _no_extras,
        outputs: Sequence[Any] = (),
        queued: bool = False,
    ) -> None:
        """Wire the buttons and the timer, and show the remembered run when the page is loaded.

        Args:
            backend: the app's runs.
            memory: what the browser remembers of the run, see `remembered_run`.
            attach_on: the events that show the run again, such as `app.load`.
            attach: chooses the run to show at these events; by default the remembered one.
            extras: the updates of further components for a state of the run.
            outputs: these components.
            queued: send updates through the queue. Gradio starts `change` listeners of `outputs`
                only then.
        """

        def watch(remembered: Remembered | None) -> Updates:
            run = find_run(backend, remembered)
            return {**self.updates(run), **extras(run)}

        def cancel(remembered: Remembered) -> None:
            backend.store.cancel(remembered["id"], remembered["key"])

        def resume(remembered: Remembered) -> None:
            backend.store.resume(remembered["id"], remembered["key"])

        own = [self.column, self.progress, self.cancel, self.resume, self.timer]
        self._watch = {
            "fn": watch, "inputs": memory, "outputs": [*own, *outputs], **QUIET
        }  # fmt: skip
        for event in attach_on:
            found = event(attach, memory, memory, queue=False, **QUIET).then if attach else event
            self.follow(found, queue=False)
        for button, act in ((self.cancel, cancel), (self.resume, resume)):
            self.follow(button.click(show_errors(act), memory, None, queue=False, **QUIET).success)
        self.timer.render()  # type: ignore[no-untyped-call]
        self.follow(self.timer.tick, queue=queued)

    def follow(self, listener: Listener, *, queue: bool = True) -> Dependency:
        """Show the remembered run after an event, as `start.click(...).success`; wire it first."""
        shown: Dependency = listener(**self._watch, queue=queue)
        return shown
