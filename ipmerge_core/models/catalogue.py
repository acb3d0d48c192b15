"""Catalogue of known models, pairs, presets and scenarios, with their sources.

In: `catalogue.json` in this folder, and `study_presets.json`, which the study of the variants
writes. Out: known models, pairs, presets and the tasks of scenarios as plain values, and the likely
base of a model. Every entry names its source; an unverified licence is None, and a preset records
whether it comes from a paper, its public code, this project, or its study. No network, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ipmerge_core.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class KnownModel:
    """A model on the hub. `sources` names where its parent and licence are documented."""

    id: str
    role: Literal["mllm", "base", "expert"]
    parent: str | None
    skill: str | None
    licence: str | None
    sources: dict[str, str | None]
    note: str = ""


@dataclass(frozen=True)
class KnownPair:
    """A published combination of models, with the base of each. Fields as in `open_pair`."""

    mllm: str
    math: tuple[str, ...]
    base: str
    base_mllm: str | None
    skill: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """A method with arguments of `make_plan`; `origin` is where their values come from."""

    name: str
    method: str
    arguments: dict[str, Any]
    origin: Literal["paper", "public code", "ours", "study"]
    source: str


@dataclass(frozen=True)
class Scenario:
    """What to evaluate when a skill is transferred: the skill itself and what it may cost.

    `tasks` are those of `ipmerge evaluate`, `harness` those of lmms-eval.
    """

    skill: str
    tasks: tuple[str, ...]
    harness: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Catalogue:
    """The contents of the catalogue."""

    models: dict[str, KnownModel]
    pairs: tuple[KnownPair, ...]
    presets: tuple[Preset, ...]
    scenarios: dict[str, Scenario]


@cache
def load_catalogue() -> Catalogue:
    """Read the catalogue shipped with the package."""
    content = _shipped("catalogue.json")
    presets = [*content["presets"], *_shipped("study_presets.json")]
    return Catalogue(
        models={entry["id"]: KnownModel(**entry) for entry in content["models"]},
        pairs=tuple(
            KnownPair(**{**entry, "math": tuple(entry["math"])}) for entry in content["pairs"]
        ),
        presets=tuple(Preset(**entry) for entry in presets),
        scenarios={
            entry["skill"]: Scenario(
                **{**entry, "tasks": tuple(entry["tasks"]), "harness": tuple(entry["harness"])}
            )
            for entry in content["scenarios"]
        },
    )


def _shipped(name: str) -> Any:  # noqa: ANN401 (JSON values)
    text = resources.files("ipmerge_core.models").joinpath(name).read_text(encoding="utf-8")
    return json.loads(text)


def skill_of(experts: Iterable[str]) -> str | None:
    """Return the skill of the first known expert among model ids; None if none is known.

    >>> skill_of(["somewhere/unknown", "elyza/Llama-3-ELYZA-JP-8B@main"])
    'language'
    """
    models = load_catalogue().models
    known = (models.get(name.partition("@")[0]) for name in experts)
    return next((model.skill for model in known if model and model.skill), None)


def scenario_of(skill: str | None) -> Scenario:
    """Return what to evaluate for a skill of a pair or an expert; of math if it is unknown.

    >>> scenario_of("language").harness[0]
    'cmmmu_val'
    """
    scenarios = load_catalogue().scenarios
    return scenarios.get(skill or "", scenarios["math"])


def find_model(name: str) -> KnownModel | None:
    """Find a model by hub id or repository name, case-insensitively.

    >>> find_model("qwen2-vl-7b-instruct").parent
    'Qwen/Qwen2-7B'
    """
    wanted = name.rstrip("/").rsplit("@", 1)[0].lower()
    models = load_catalogue().models.values()
    exact = [model for model in models if model.id.lower() == wanted]
    last = wanted.rsplit("/", 1)[-1]
    alike = [model for model in models if model.id.lower().rsplit("/", 1)[-1] == last]
    return next(iter(exact or alike), None)


def likely_base(model: Checkpoint) -> str | None:
    """Return the catalogued parent of a model, looked up by its id or folder, else by its config.

    A config's `_name_or_path` is the initial checkpoint of the training or the model's own name.
    """
    itself = find_model(model.id)
    if itself is not None and itself.parent is not None:
        return itself.parent
    inner = model.config.get("text_config")
    for config in (model.config, inner if isinstance(inner, dict) else {}):
        known = find_model(str(config.get("_name_or_path") or ""))
        if known is not None:
            return known.id if known.role == "base" else known.parent
    return None
