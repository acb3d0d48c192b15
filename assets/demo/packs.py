"""Tell whether a pack is an analysis of models on disk, or of others that they have replaced.

In: the file of a pack and the folders of its models. Out: a truth value. Weights that are trained
again, on another machine or with another recipe, differ at least in their last digits.
"""

from __future__ import annotations

from pathlib import Path

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.models.checkpoint import Checkpoint


def is_pack_of(pack: Path, mllm: Path, base: Path, *experts: Path) -> bool:
    """Return whether a pack is there and is that of these models."""
    if not pack.is_file():
        return False
    sources = Analysis.load(pack).sources
    folders = (mllm, base, *experts)
    if len(folders) != len(sources.all()):
        return False
    found = (
        (Checkpoint.open(folder), source)
        for folder, source in zip(folders, sources.all(), strict=True)
    )
    return not any(source.differs_from(model.fingerprint, model.content) for model, source in found)
