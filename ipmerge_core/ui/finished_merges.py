"""Find the finished merges that a user may use, described by the manifests in their folders.

In: a pair, the runs of a `Backend`, and the keys that a browser holds. Out: small plain values. On
a Space a user sees the runs whose keys the browser holds; elsewhere all runs of the machine. A
merge belongs to a pair if its models have the pair's fingerprints, whatever the pack's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.merging.provenance import Provenance, read_provenance
from ipmerge_core.ui.pairs import find_pack, list_packs
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from ipmerge_core.runtime.jobs import JobStatus
    from ipmerge_core.ui.backend import Backend

Keys = Mapping[str, str]  # run id -> key
REMEDY = "Choose another model, or merge again in the Merge tab."


class FinishedMerge(NamedTuple):
    """A finished run whose model still exists."""

    run: str
    folder: Path
    made: Provenance

    @property
    def label(self) -> str:
        """Folder, method and plan."""
        return f"{self.folder.name} · {method_label(self.made.method)} · plan {self.made.plan}"


def merges_of_pair(backend: Backend, pack_id: str, keys: Keys) -> list[FinishedMerge]:
    """List the merges of a pair that a user may use, newest first.

    Raises: PlanError for an unknown pair or one whose analysis has not finished.
    """
    sources = analysis_of(pack_id).sources
    visible = visible_statuses(backend, keys)
    writers = _last_writers(backend) if visible else {}
    found = [_opened(status) for status in visible if writers.get(_folder(status)) == status.id]
    return [merge for merge in found if merge and _same(merge.made.sources, sources)]


def find_merge(backend: Backend, pack_id: str, wanted: str, keys: Keys) -> FinishedMerge:
    """Find a finished merge of a pair by its run's id, or by the name of its folder.

    Raises:
        RunError: there is none that the user may use, its folder was deleted or replaced, or it was
            merged from another pair.
        PlanError: the pair is unknown.
    """
    status = _find_run(backend, wanted, keys)
    folder = _folder(status)
    if status.state != "finished":
        raise RunError(
            f"The run '{status.title}' is {status.state}; only the model of a finished merge can "
            f"answer. Choose another model, or complete this run in the Merge tab."
        )
    merge = _opened(status)
    if merge is None:
        raise RunError(
            f"The merged model '{folder.name}' no longer exists: its folder was deleted or moved. "
            f"{REMEDY}"
        )
    if _last_writers(backend).get(folder) != status.id:
        raise RunError(f"A later merge replaced the model in '{folder.name}'. {REMEDY}")
    if not _same(merge.made.sources, analysis_of(pack_id).sources):
        raise RunError(
            f"'{folder.name}' was merged from other models ({_names(merge.made.sources)}) than the "
            f"pair '{find_pack(pack_id).label}'. Select its pair, or choose another model."
        )
    return merge


def pair_of_merge(backend: Backend, run: str, keys: Keys, preferred: str) -> str:
    """Return the id of a pair that a finished merge belongs to, `preferred` if it does.

    Raises: RunError if the merge does not exist, or none of the analysed pairs has its models.
    """
    merge = _opened(_find_run(backend, run, keys))
    packs = sorted((entry.id for entry in list_packs()), key=lambda pack_id: pack_id != preferred)
    for pack_id in packs if merge else []:
        with contextlib.suppress(PlanError):  # a pack that cannot be read
            if merge and _same(merge.made.sources, analysis_of(pack_id).sources):
                return pack_id
    name = f"'{merge.folder.name}'" if merge else "This merge"
    raise RunError(
        f"{name} has no pair to be asked with: its folder was deleted, or the analysis of its "
        f"models was. {REMEDY}"
    )


def describe_lost(backend: Backend, run: str, keys: Keys) -> str:
    """Return a label for a merge that is selected but no longer exists."""
    names = (_folder(status).name for status in visible_statuses(backend, keys) if status.id == run)
    return f"{next(names, 'This merge')} · no longer available"


def method_label(name: str) -> str:
    """Return a method's label; the name of an unknown method."""
    from ipmerge_core.methods import METHODS

    return METHODS[name].label if name in METHODS else name


def describe_unmerged(source_id: str) -> str:
    """Return a label for a pair's vision-language model.

    >>> describe_unmerged("Qwen/Qwen2-VL-7B"), describe_unmerged("/models/mllm")
    ('Qwen/Qwen2-VL-7B, unmerged', 'mllm, unmerged')
    """
    return f"{_model_name(source_id)}, unmerged"


def visible_statuses(backend: Backend, keys: Keys) -> list[JobStatus]:
    """List the runs that a user may use, newest first."""
    if not backend.hosted:
        return backend.store.all()
    return sorted(_owned(backend, keys), key=lambda status: -status.started)


def _owned(backend: Backend, keys: Keys) -> Iterator[JobStatus]:
    for run, key in keys.items():
        with contextlib.suppress(RunError):  # a run that is no longer there
            if backend.store.holds_key(run, key):
                yield backend.store.status(run)


def _find_run(backend: Backend, wanted: str, keys: Keys) -> JobStatus:
    """Find a run by its id or the name of its folder; of that name, the newest finished one."""
    found = [
        status
        for status in visible_statuses(backend, keys)
        if wanted in (status.id, _folder(status).name)
    ]
    if not found or not wanted:
        raise RunError(
            f"There is no merge '{str(wanted)[:80]}' that this browser may use. {REMEDY}"
        )
    return next((status for status in found if status.state == "finished"), found[0])


def _last_writers(backend: Backend) -> dict[Path, str]:
    """Map each folder to the id of the last run that finished there."""
    finished = [status for status in backend.store.all() if status.state == "finished"]
    return {_folder(status): status.id for status in reversed(finished)}


def _folder(status: JobStatus) -> Path:
    return Path(str(status.arguments.get("out", "")))


def _opened(status: JobStatus) -> FinishedMerge | None:
    folder = _folder(status)
    made = read_provenance(folder)
    return FinishedMerge(status.id, folder, made) if made else None


def _same(first: Sources, second: Sources) -> bool:
    """Whether both are the same weights in the same roles, wherever they are stored."""
    return _fingerprints(first) == _fingerprints(second)


def _fingerprints(sources: Sources) -> tuple[str | None, ...]:
    named = [sources.base_mllm, sources.base, *sources.merged()]
    return tuple(source.fingerprint if source else None for source in named)


def _names(sources: Sources) -> str:
    return ", ".join(_model_name(source.id) for source in sources.all())


def _model_name(source_id: str) -> str:
    """Return a hub id unchanged, and the last part of a folder."""
    path = Path(source_id)
    return path.name if path.is_absolute() else str(path)
