"""Delete a run together with what it wrote, if the app chose the place.

In: a run and its key. Out: the run's entry is gone, and its model, pack or calibration too if it is
in a folder of the app. What a user named by a path, replaced by something else, or merged into
again later is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ipmerge_core.analysis.partial import journal_of
from ipmerge_core.errors import RunError
from ipmerge_core.finetuning.provenance import read_finetuning
from ipmerge_core.finetuning.settings import training_folder
from ipmerge_core.merging.provenance import read_provenance
from ipmerge_core.runtime.job_lists import JobRequest, delete_job, describe_job
from ipmerge_core.runtime.jobs import JobStatus
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.pairs import packs_folder
from ipmerge_core.ui.runs import (
    ANALYSIS,
    CALIBRATION,
    EVALUATION,
    FINETUNING,
    MERGE,
    curves_folder,
    kind_of,
    results_folder,
    study_folder,
)


def own_output(
    backend: Backend, status: JobStatus, request: JobRequest, known: Sequence[JobStatus]
) -> list[Path]:
    """List the files and folders that this run wrote into a folder of the app.

    A place that one of the `known` runs wrote to later, or would write to when resumed, is not
    listed.
    """
    from ipmerge_core.models.writer import run_folders

    kind, out = kind_of(request), Path(str(status.arguments.get("out", "")))
    curves = _curves_of(status) if kind == FINETUNING else []
    folders = {
        MERGE: backend.models_folder,
        ANALYSIS: packs_folder(),
        CALIBRATION: backend.calibrations_folder,
        EVALUATION: results_folder(),
        FINETUNING: backend.models_folder,
    }
    ours = kind in folders and out.resolve().parent == folders[kind].resolve()
    if not ours or _has_another_run(known, status, out):
        return curves
    if kind == ANALYSIS:
        places = [out, journal_of(out)]
    elif kind == MERGE and status.state == "finished":
        places = [out] if _holds_plan(out, request.about.get("plan", "")) else []
    elif kind == FINETUNING:
        places = _trained(out) if status.state == "finished" else [training_folder(out)]
        places += [run_folders(out).run, *curves]
    else:
        places = [run_folders(out).run] if kind == MERGE else [out, study_folder(out)]
    return [place for place in places if place.exists() and not place.is_symlink()]


def _trained(out: Path) -> list[Path]:
    """Return the folder of a fine-tuned model, unless something else is there now."""
    return [out] if read_finetuning(out) is not None else []


def _curves_of(status: JobStatus) -> list[Path]:
    """Return the file of the curves of a fine-tuning, if it is where the app keeps them."""
    path = Path(str(status.arguments.get("curves", "")))
    return [path] if path.parent == curves_folder() and path.is_file() else []


def delete_run(backend: Backend, job: str, key: str) -> None:
    """Delete a run that is not in progress, and `own_output`.

    Raises: RunError for an unknown run, a wrong key, a run in progress, or if the entry is gone but
        a file could not be deleted.
    """
    status, request = backend.store.status(job), describe_job(backend.store, job)
    places = own_output(backend, status, request, backend.store.all())
    delete_job(backend.store, job, key)  # checks the key, and that it is not in progress
    for place in places:
        try:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        except OSError as error:
            raise RunError(
                f"The entry was deleted, but '{place.name}' could not be deleted completely "
                f"({error.strerror}). Delete the rest by hand."
            ) from error


def _has_another_run(known: Sequence[JobStatus], status: JobStatus, out: Path) -> bool:
    """Whether the place belongs to another run, too.

    A finished result is that of the run that finished last; unfinished work may be that of any run.
    """
    others = (other for other in known if other.id != status.id)
    same = [other for other in others if other.arguments.get("out") == str(out)]
    if status.state != "finished":
        return bool(same)
    later = (other for other in same if other.started > status.started)
    return any(other.is_running or other.state == "finished" for other in later)


def _holds_plan(folder: Path, plan: str) -> bool:
    made = read_provenance(folder)
    return made is not None and bool(plan) and made.plan == plan
