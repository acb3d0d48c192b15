"""The finished merges that a visitor may use, each described by the manifest in its folder.

In: a pair, the runs of a `Backend`, and the keys of runs that a browser holds. Out: small plain
values. On a Space a visitor sees the runs whose keys the browser holds; elsewhere all runs of the
machine. A merge belongs to a pair if it was made from models with the pair's fingerprints, whatever
the pack is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import RunError
from ipmerge_core.merging.provenance import Provenance, read_provenance
from ipmerge_core.ui.pairs import find_pack
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from ipmerge_core.runtime.jobs import JobStatus
    from ipmerge_core.ui.backend import Backend

Keys = Mapping[str, str]  # by a run's id, the key that its starter was given
REMEDY = "Choose another model, or merge again in the Merge tab."


class FinishedMerge(NamedTuple):
    """A finished run whose model is still in its folder."""

    run: str
    folder: Path
    made: Provenance

    @property
    def words(self) -> str:
        """Folder, method and plan, as people read them."""
        return f"{self.folder.name} · {method_label(self.made.method)} · plan {self.made.plan}"


def merges_of_pair(backend: Backend, pack_id: str, keys: Keys) -> list[FinishedMerge]:
    """List the merges of a pair that this visitor may use, the newest first.

    Raises: PlanError for an unknown pair, or one whose analysis is not finished.
    """
    sources = analysis_of(pack_id).sources
    visible = _visible(backend, keys)
    writers = _last_writers(backend) if visible else {}
    found = [_opened(status) for status in visible if writers.get(_folder(status)) == status.id]
    return [merge for merge in found if merge and _same(merge.made.sources, sources)]


def find_merge(backend: Backend, pack_id: str, wanted: str, keys: Keys) -> FinishedMerge:
    """Find a finished merge of a pair by its run's id, or by the name of its folder.

    Raises:
        RunError: there is none that this visitor may use, or its folder is gone or holds something
            else, or it was merged from another pair.
        PlanError: the pair is unknown.
    """
    status = _find_run(backend, wanted, keys)
    folder = _folder(status)
    if status.state != "finished":
        raise RunError(
            f"The run '{status.title}' is {status.state}; only a finished merge can answer. "
            f"Choose another model, or finish this run in the Merge tab."
        )
    merge = _opened(status)
    if merge is None:
        raise RunError(
            f"The merged model '{folder.name}' is gone: its folder was deleted, moved or emptied. "
            f"{REMEDY}"
        )
    if _last_writers(backend).get(folder) != status.id:
        raise RunError(f"A later merge replaced the model in '{folder.name}'. {REMEDY}")
    if not _same(merge.made.sources, analysis_of(pack_id).sources):
        raise RunError(
            f"'{folder.name}' was merged from other models ({_names(merge.made.sources)}) than the "
            f"pair '{find_pack(pack_id).label}'. Choose its pair, or another model."
        )
    return merge


def lost_words(backend: Backend, run: str, keys: Keys) -> str:
    """Name a merge that was chosen and can no longer be: by its folder, while its run is known."""
    names = (_folder(status).name for status in _visible(backend, keys) if status.id == run)
    return f"{next(names, 'This merge')} · no longer here"


def method_label(name: str) -> str:
    """Return a method's label; a method that is not known here keeps its name."""
    from ipmerge_core.methods import METHODS

    return METHODS[name].label if name in METHODS else name


def unmerged_words(source_id: str) -> str:
    """Name a pair's own vision-language model.

    >>> unmerged_words("Qwen/Qwen2-VL-7B"), unmerged_words("/models/mllm")
    ('Qwen/Qwen2-VL-7B, unmerged', 'mllm, unmerged')
    """
    return f"{_model_name(source_id)}, unmerged"


def _visible(backend: Backend, keys: Keys) -> list[JobStatus]:
    """List the runs that a visitor may use, the newest first."""
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
        status for status in _visible(backend, keys) if wanted in (status.id, _folder(status).name)
    ]
    if not found or not wanted:
        raise RunError(
            f"There is no merge '{str(wanted)[:80]}' that this browser may use. {REMEDY}"
        )
    return next((status for status in found if status.state == "finished"), found[0])


def _last_writers(backend: Backend) -> dict[Path, str]:
    """By folder, the id of the run that finished there last: what lies there now is its model."""
    finished = [status for status in backend.store.all() if status.state == "finished"]
    return {_folder(status): status.id for status in reversed(finished)}


def _folder(status: JobStatus) -> Path:
    return Path(str(status.arguments.get("out", "")))


def _opened(status: JobStatus) -> FinishedMerge | None:
    folder = _folder(status)
    made = read_provenance(folder)
    return FinishedMerge(status.id, folder, made) if made else None


def _same(first: Sources, second: Sources) -> bool:
    """Whether both name the same weights in the same roles, wherever these lie."""
    return _fingerprints(first) == _fingerprints(second)


def _fingerprints(sources: Sources) -> tuple[str | None, ...]:
    root = sources.base_mllm
    experts = [expert.fingerprint for expert in sources.math]
    own = root.fingerprint if root else None
    return (sources.mllm.fingerprint, sources.base.fingerprint, own, *experts)


def _names(sources: Sources) -> str:
    return ", ".join(_model_name(source.id) for source in sources.all())


def _model_name(source_id: str) -> str:
    """Return a hub id as it is, and of a folder the last part."""
    path = Path(source_id)
    return path.name if path.is_absolute() else str(path)
