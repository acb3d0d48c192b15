"""Show a long run in a tab: progress with time left, Cancel, Resume, found again after a reload.

In: the visitor's secret, the id of a run that the browser remembers, and the server's runs. Out: a
`RunView`, which lays itself out and wires itself, and a `RunPoll`, which updates all of them with
one request. The state is read from the run's folder every time, never kept in the page. The id
gives read access; the buttons require the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError
from ipmerge_core.runtime.host import home_folder
from ipmerge_core.runtime.job_lists import JobRequest, jobs_with_keys, keys_of_owner
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.format import progress_html

if TYPE_CHECKING:
    from gradio.events import Dependency

MERGE, ANALYSIS, CALIBRATION, EVALUATION = "merge", "analysis", "calibration", "evaluation"
FINETUNING = "drift"
_KINDS = {"iter_merge": MERGE, "iter_pack": ANALYSIS, "iter_calibration_of": CALIBRATION}
# In the page: ask for the state of all runs at once; see `run_list`.
POKE = "() => { document.querySelector('#run-list .rl')?.parentNode.ipmerge?.ask(); }"
Remembered = dict[str, str]  # a run's id and key, and whatever else the browser keeps with them
Updates = dict[Any, Any]  # component -> its new value or `gr.update`
Listener = Callable[..., Any]  # an event such as `app.load`, `button.click` or `dependency.then`


def results_folder() -> Path:
    """Return the folder of the results of evaluations."""
    return home_folder() / "results"


def curves_folder() -> Path:
    """Return the folder of the curves of fine-tunings."""
    return home_folder() / "curves"


def study_folder(result: Path) -> Path:
    """Return the folder of the evaluations of a search, next to its result."""
    return result.with_suffix(".study")


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


def find_run(backend: Backend, remembered: Remembered | None, visitor: str = "") -> RunState:
    """Find the run that a browser remembers; its key is remembered too, or derived."""
    remembered = remembered or {}
    try:
        status = backend.store.status(str(remembered.get("id", "")))
        keys = (str(remembered.get("key", "")), backend.store.key_of(status.id, visitor))
        held = [key for key in keys if backend.store.holds_key(status.id, key)]
    except (IPMergeError, OSError):  # not a run, or deleted meanwhile
        return RunState(None)
    return RunState(status, next(iter(held), ""))


def kind_of(request: JobRequest) -> str:
    """Return the kind of a run, such as MERGE; those of older versions by their target."""
    return request.about.get("kind") or _KINDS.get(request.target, "run")


def own_running(backend: Backend, visitor: str, kind: str) -> Iterator[RunState]:
    """Yield the runs of a kind that a visitor started and that are in progress."""
    keys = keys_of_owner(backend.store, visitor)
    for status, request, key in jobs_with_keys(backend.store, keys):
        if status.is_running and kind_of(request) == kind:
            yield RunState(status, key)


def remembered_run(name: str) -> gr.BrowserState:
    """Create the browser state that keeps a run's id and key across reloads.

    Create it outside of all tabs: the contents of a tab do not exist before the tab is opened.
    """
    return gr.BrowserState({}, storage_key=f"ipmerge.{name}.v1", secret=f"ipmerge-{name}")


def disable_on_click(button: gr.Button) -> None:
    """Disable a button in the page as soon as it is clicked; the handler's answer enables it."""
    off = "() => ({ __type__: 'update', interactive: false })"
    button.click(None, None, button, js=off, queue=False, **QUIET)


def _no_extras(_: RunState, __: str) -> Updates:
    return {}


class Watched(NamedTuple):
    """A view of a run, as a poll updates it."""

    memory: gr.BrowserState
    attach: Callable[[Remembered | None, str], Remembered] | None
    watch: Callable[[Remembered | None, str], Updates]
    outputs: list[Any]


class RunPoll:
    """Everything that follows runs, updated by one event of the page.

    Create it in a block that is always visible, before the views are wired.

    Args:
        visitor: holds the secret of the browser, from which the keys of its runs derive.
    """

    def __init__(self, visitor: gr.Textbox) -> None:
        self.visitor = visitor
        self.views: list[Watched] = []

    @property
    def memories(self) -> list[gr.BrowserState]:
        """What the browser remembers of each view, inputs of the event."""
        return [view.memory for view in self.views]

    @property
    def outputs(self) -> list[Any]:
        """The components that the event updates."""
        return [*self.memories, *(output for view in self.views for output in view.outputs)]

    def updates(
        self, visitor: str, memories: Sequence[Remembered | None], *, first: bool
    ) -> Updates:
        """Return the updates of all views; `first` is the first event of a page."""
        found: Updates = {}
        for view, memory in zip(self.views, memories, strict=True):
            mine = memory
            if first and view.attach is not None:
                mine = view.attach(memory, visitor)
                found[view.memory] = mine
            found |= view.watch(mine, visitor)
        return found


class RunView:
    """The components that show one run, and what keeps them up to date.

    The constructor lays them out in the open block.

    Args:
        name: the run's name in element ids: `{name}-run`, `cancel-{name}`, `resume-{name}`.
        empty: HTML shown while there is no run; without it the view is hidden until there is one.
        status_id: element id of the progress, `{name}-status` by default.
    """

    def __init__(self, name: str, *, empty: str = "", status_id: str = "") -> None:
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
        self._watch: dict[str, Any] = {}

    def updates(self, run: RunState) -> Updates:
        """Return the updates of the view's own components."""
        if run.status is None:
            return {
                self.column: gr.update(visible=bool(self.empty)),
                self.progress: self.empty,
                self.cancel: gr.update(visible=False),
                self.resume: gr.update(visible=False),
            }
        stopping = run.status.state == "cancelling"
        return {
            self.column: gr.update(visible=True),
            self.progress: progress_html(run.status),
            self.cancel: gr.update(visible=run.owned and run.running, interactive=not stopping),
            self.resume: gr.update(visible=run.owned and run.resumable),
        }

    def wire(
        self,
        backend: Backend,
        memory: gr.BrowserState,
        poll: RunPoll,
        *,
        attach: Callable[[Remembered | None, str], Remembered] | None = None,
        extras: Callable[[RunState, str], Updates] = _no_extras,
        outputs: Sequence[Any] = (),
    ) -> None:
        """Wire the buttons, and let the poll update the view.

        Args:
            backend: the app's runs.
            memory: what the browser remembers of the run, see `remembered_run`.
            poll: updates the view while a run is in progress.
            attach: chooses the run that a page shows at first; by default the remembered one.
            extras: the updates of further components for a state of the run and the visitor.
            outputs: these components.
        """

        def watch(remembered: Remembered | None, visitor: str) -> Updates:
            run = find_run(backend, remembered, visitor)
            return {**self.updates(run), **extras(run, visitor)}

        def cancel(remembered: Remembered, visitor: str) -> None:
            run = find_run(backend, remembered, visitor)
            backend.store.cancel(remembered["id"], run.key)

        def resume(remembered: Remembered, visitor: str) -> None:
            run = find_run(backend, remembered, visitor)
            backend.store.resume(remembered["id"], run.key)

        own = [self.column, self.progress, self.cancel, self.resume]
        asked = [memory, poll.visitor]
        self._watch = {"fn": watch, "inputs": asked, "outputs": [*own, *outputs], **QUIET}
        poll.views.append(Watched(memory, attach, watch, [*own, *outputs]))
        for button, act in ((self.cancel, cancel), (self.resume, resume)):
            # Queued, because the page shows errors of queued events only.
            self.follow(button.click(show_errors(act), asked, None, **QUIET).success)

    def follow(self, listener: Listener) -> Dependency:
        """Show the remembered run after an event, as `start.click(...).success`; wire it first."""
        shown: Dependency = listener(**self._watch, queue=False)
        shown.then(None, None, None, js=POKE, queue=False, **QUIET)
        return shown
