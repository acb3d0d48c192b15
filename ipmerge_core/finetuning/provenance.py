"""Read how a fine-tuned model was made from the manifest `ipmerge.json` in its folder. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from ipmerge_core.merging.provenance import LARGEST, MANIFEST
from ipmerge_core.runtime.atomic import FileVersion, version_of
from ipmerge_core.runtime.input_files import (
    Count,
    InvalidContentError,
    Name,
    Schema,
    parse_json,
    read_bounded,
)

FORMAT = "ipmerge-finetuning"


class FinetunedBy(NamedTuple):
    """How a model was fine-tuned: the rule, the optimizer steps, and its models' fingerprints."""

    rule: str
    steps: int
    mllm: str  # fingerprint
    math: str  # fingerprint


@dataclass(frozen=True)
class _Prior:
    rule: Name


@dataclass(frozen=True)
class _Settings:
    prior: _Prior


@dataclass(frozen=True)
class _Model:
    fingerprint: Name


@dataclass(frozen=True)
class _Models:
    mllm: _Model
    math: _Model


@dataclass(frozen=True)
class _Manifest:
    """The part of a manifest that identifies the model; the rest is for people."""

    format: Literal["ipmerge-finetuning"]
    settings: _Settings
    sources: _Models
    steps: Count


_MANIFEST = Schema[_Manifest](_Manifest)


def read_finetuning(folder: Path) -> FinetunedBy | None:
    """Read the manifest of a fine-tuned model; None for any other folder."""
    path = folder / MANIFEST
    try:
        return _read(path, version_of(path))
    except OSError:
        return None


@lru_cache(maxsize=256)
def _read(path: Path, _version: FileVersion) -> FinetunedBy | None:
    try:
        found = _MANIFEST.validate(parse_json(read_bounded(path, LARGEST), LARGEST))
    except (OSError, InvalidContentError):
        return None
    sources = found.sources
    return FinetunedBy(
        found.settings.prior.rule,
        found.steps,
        sources.mllm.fingerprint,
        sources.math.fingerprint,
    )
