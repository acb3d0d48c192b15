"""Models to evaluate: folders, adapters on a base, or any model in memory.

In: a path, or a function that makes a model available. Out: a `Subject` with a key that identifies
its content, so that stored replies are found again wherever the model is.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import CheckpointError

if TYPE_CHECKING:
    from ipmerge_core.inference.loading import LoadedModel
    from ipmerge_core.models.checkpoint import Checkpoint

# Files that do not change an answer.
_OTHERS = ("README.md", "ipmerge.json", "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes")


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        name: how it is shown; unique in an evaluation.
        key: identifies its weights, its processor and its prompt format by content.
        loaded: returns a context in which the model is in memory on a device. A context that only
            exchanges the weights of a shared model is entered once per evaluation.
        details: JSON values for reports, such as its folder and the hash of its plan.
    """

    name: str
    key: str
    loaded: Callable[[str], AbstractContextManager[LoadedModel]] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict, hash=False)


def subject_of_folder(
    folder: str | Path, name: str = "", *, base: str | Path | None = None
) -> Subject:
    """Return a model folder, or a PEFT adapter whose base is found, as a subject.

    The headers and samples of the weights are read now, the model is loaded when it is evaluated.

    Args:
        folder: a model in the transformers layout, or an adapter folder.
        name: how it is shown; the name of the folder by default.
        base: the folder of the model that an adapter changes; by default the one it names.

    Raises: CheckpointError if it is not a model.
    """
    from ipmerge_core.models.opening import open_model
    from ipmerge_core.runtime.paths import resolve_path

    path = resolve_path(folder)
    model = open_model(path, base=base)
    if model.files.revision is not None:
        raise CheckpointError(f"'{folder}' is not a folder. Download the model first.")
    details: dict[str, Any] = {"folder": str(folder), "fingerprint": model.fingerprint}
    if plan := _plan_of(path):
        details["plan"] = plan
    return Subject(name or path.name, content_key(model), partial(_load, path, base), details)


def subject_of_model(
    name: str, loaded: LoadedModel, key: str, details: dict[str, Any] | None = None
) -> Subject:
    """Return a model in memory as a subject; `key` must identify its present weights."""
    return Subject(name, key, lambda _: contextlib.nullcontext(loaded), details or {})


def content_key(model: Checkpoint) -> str:
    """Return a hash of what determines the answers of a stored model.

    It covers the weights (their fingerprint and the samples of `content`) and all other files but
    model cards, licences and the manifest of a merge.
    """
    digest = hashlib.sha256(f"{model.fingerprint}|{model.content}".encode())
    for name in sorted(model.files.names()):
        if model.weights.is_copied(name) and name not in _OTHERS:
            known = model.files.content_id(name)
            part = known.encode() if known else hashlib.sha256(model.files.read(name)).digest()
            digest.update(name.encode() + b"\0" + part)
    return digest.hexdigest()


@contextlib.contextmanager
def _load(path: Path, base: str | Path | None, device: str) -> Iterator[LoadedModel]:
    from ipmerge_core.inference.adapted_loading import load_with_adapter

    loaded = load_with_adapter(path, device, base=base)
    try:
        yield loaded
    finally:
        loaded.processor.close()


def _plan_of(folder: Path) -> str | None:
    """Return the hash of the plan of a merged folder; None for another model."""
    from ipmerge_core.merging.provenance import read_provenance

    found = read_provenance(folder)
    return found.plan if found else None


def processor_key(folder: Path) -> str:
    """Return a hash of the files that determine how a model's prompts are encoded."""
    from ipmerge_core.models.checkpoint import Checkpoint

    model = Checkpoint.open(folder)
    digest = hashlib.sha256()
    for name in sorted(model.files.names()):
        if model.weights.is_copied(name) and name not in (*_OTHERS, model.weights.index):
            digest.update(name.encode() + b"\0" + hashlib.sha256(model.files.read(name)).digest())
    return digest.hexdigest()
