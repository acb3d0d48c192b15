"""Describe the runs of a visitor as rows of plain JSON, those in progress first.

In: the server's runs, and the keys that a browser holds. Out: one mapping per run: kind, state,
progress with time left, facts such as folder, method and plan, and the actions that are possible.
On a Space a visitor sees their own runs; elsewhere all runs of the machine, those of others without
the actions that need a key. Reads small files only, and does not import torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.merging.provenance import MANIFEST
from ipmerge_core.runtime.job_lists import (
    JobRequest,
    describe_job,
    jobs_with_keys,
    keys_of_owner,
)
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import public_text
from ipmerge_core.ui.format import STATE_LABELS, format_device, progress_of, stage_of
from ipmerge_core.ui.merge.download import download_link
from ipmerge_core.ui.pairs import SKIP_ALL, find_partial, id_of
from ipmerge_core.ui.run_list.deletion import own_output
from ipmerge_core.ui.runs import (
    ANALYSIS,
    CALIBRATION,
    EVALUATION,
    FINETUNING,
    MERGE,
    kind_of,
)

Json = dict[str, Any]
Keys = Mapping[str, str]  # run id -> key
MOST_LISTED = 30
STARTED = {
    MERGE: "Merge",
    ANALYSIS: "Analysis",
    CALIBRATION: "Calibration",
    EVALUATION: "Evaluation",
    FINETUNING: "Fine-tuning",
}


WRITTEN = {
    MERGE: "the model",
    ANALYSIS: "the pair",
    CALIBRATION: "the calibration",
    EVALUATION: "the result",
    FINETUNING: "the model",
}


class Run(NamedTuple):
    """A run in the list: its status, what it was started with, and its key or ""."""

    status: JobStatus
    request: JobRequest
    key: str

    @property
    def kind(self) -> str:
        """The kind of the run, a key of STARTED."""
        return kind_of(self.request)

    @property
    def out(self) -> Path:
        """The file or folder that the run writes."""
        return Path(str(self.status.arguments.get("out", "")))


def keys_held(backend: Backend, visitor: str, remembered: Keys) -> dict[str, str]:
    """Return the keys of a visitor's runs: derived from the secret, or remembered and right."""
    held = {status.id: key for status, _, key in jobs_with_keys(backend.store, remembered)}
    return held | keys_of_owner(backend.store, visitor)


def visible_runs(backend: Backend, keys: Keys) -> list[Run]:
    """List the runs that a visitor may see: in progress first, then the newest."""
    runs = [Run(*found) for found in jobs_with_keys(backend.store, keys)]
    others = [] if backend.hosted else backend.store.all()
    for status in others:
        with contextlib.suppress(RunError):  # deleted meanwhile
            if status.id not in keys:
                runs.append(Run(status, describe_job(backend.store, status.id), ""))
    return sorted(runs, key=lambda run: (not run.status.is_running, -run.status.started))


def describe_runs(backend: Backend, keys: Keys) -> Json:
    """Return the rows, and how many older runs are left out."""
    runs = visible_runs(backend, keys)
    newest: dict[Path, str] = {}  # folder -> the run that finished there last
    for run in sorted(runs, key=lambda run: -run.status.started):
        if run.status.state == "finished":
            newest.setdefault(run.out, run.status.id)
    statuses = [run.status for run in runs]
    rows = [_row(backend, run, newest, statuses) for run in runs[:MOST_LISTED]]
    return {"runs": rows, "more": max(0, len(runs) - MOST_LISTED)}


def _row(
    backend: Backend, run: Run, newest: Mapping[Path, str], known: Sequence[JobStatus]
) -> Json:
    status = run.status
    share, words = progress_of(status)
    if status.is_running and (stage := stage_of(status)):
        words.append(stage)
    replaced = status.state == "finished" and newest.get(run.out) != status.id
    label = "finished; replaced by a later run" if replaced else STATE_LABELS[status.state]
    link = _download(run, replaced=replaced)
    return {
        "id": status.id,
        "kind": STARTED.get(run.kind, "Run"),
        "name": _name(run),
        "state": status.state,
        "label": label,
        "running": status.is_running,
        "share": round(share, 4),
        "words": " · ".join(words),
        "error": public_text(status.error),
        "facts": [list(fact) for fact in _facts(backend, run)],
        "actions": _actions(run, replaced=replaced),
        "download": link,
        "deletes": _deletes(backend, run, known),
    }


def _name(run: Run) -> str:
    """Return the name of the folder, or of the pair that an analysis makes."""
    if run.kind == ANALYSIS:
        return id_of(run.out).partition("-")[2]
    if run.kind == EVALUATION:
        return run.status.title
    return run.out.name or run.status.title


def _facts(backend: Backend, run: Run) -> Iterator[tuple[str, str]]:
    about = run.request.about
    for label, name in (("Pair", "pair"), ("Method", "method"), ("Samples", "samples")):
        if about.get(name):
            yield label, about[name]
    if about.get("plan"):
        yield "Plan", about["plan"]
    if device := str(run.status.arguments.get("device", "")):
        yield "Device", format_device(device)
    if run.out.name and run.kind != EVALUATION:
        yield (
            ("File" if run.kind == ANALYSIS else "Folder"),
            (run.out.name if backend.hosted else str(run.out)),
        )
    started = datetime.fromtimestamp(run.status.started, UTC)
    yield "Started", started.isoformat(timespec="seconds")
    if not run.key:
        yield "Started by", "another browser or program"


def _actions(run: Run, *, replaced: bool) -> list[str]:
    """List what the visitor can do with a run, in the order of the buttons."""
    status, owned = run.status, bool(run.key)
    gone = status.state == "finished" and not run.out.exists()
    is_merged = status.state == "finished" and (run.out / MANIFEST).is_file()
    possible = {
        "show": not gone and (run.kind != ANALYSIS or _has_pack(run)),
        "try": run.kind in (MERGE, FINETUNING) and is_merged and not replaced,
        "cancel": owned and status.state == "running",
        "resume": owned and status.can_resume,
        "delete": owned and not status.is_running,
    }
    return [name for name, is_possible in possible.items() if is_possible]


def _has_pack(run: Run) -> bool:
    return run.out.is_file() or find_partial(id_of(run.out), SKIP_ALL) is not None


def _download(run: Run, *, replaced: bool) -> str:
    ready = run.kind == MERGE and run.status.state == "finished" and not replaced
    if not (ready and run.key and (run.out / MANIFEST).is_file()):
        return ""
    return download_link(run.status.id, run.key)


def _deletes(backend: Backend, run: Run, known: Sequence[JobStatus]) -> str:
    """Describe what deleting a run deletes."""
    own = own_output(backend, run.status, run.request, known)
    name = run.out.name
    if not own:
        kept = f" '{name}' is kept." if name and run.out.exists() else ""
        return f"Delete this entry?{kept}"
    what = WRITTEN[run.kind]
    if run.status.state != "finished":
        what = f"the unfinished work of {what}"
    return f"Delete this entry and {what} '{name}'? This cannot be undone."
