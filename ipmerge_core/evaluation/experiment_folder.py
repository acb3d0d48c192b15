"""The folder of an experiment: its files, its models by commit, and its set of prompts.

In: a folder and the models of an experiment. Out: the paths of what it contains, and the models as
the first run found them: a hub id stands for the commit of that run, so that a later run continues
with the same weights after the repository has changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipmerge_core.analysis.records import Analysis, Sources
from ipmerge_core.errors import PlanError
from ipmerge_core.evaluation.recording import Prompt, read_prompts
from ipmerge_core.evaluation.result_files import ResultFile
from ipmerge_core.runtime.atomic import write_whole, writing
from ipmerge_core.runtime.paths import output_folder
from ipmerge_core.tasks.demo import TASKS, problems

if TYPE_CHECKING:
    from ipmerge_core.models.checkpoint import Checkpoint
    from ipmerge_core.models.pairing import ModelPair

_SEED = 2  # of the built-in prompts


@dataclass(frozen=True)
class Models:
    """The models of an experiment, as folders or hub ids."""

    mllm: str
    math: tuple[str, ...]
    base: str | None = None
    base_mllm: str | None = None

    def open(self) -> ModelPair:
        """Open the pair by its headers. Raises: as `open_pair`."""
        from ipmerge_core.models.pairing import open_pair

        return open_pair(self.mllm, self.math, self.base, base_mllm=self.base_mllm)


@dataclass(frozen=True)
class State(ResultFile):
    """What an experiment has fixed at its first run: the models, and the commits found then."""

    FORMAT = "ipmerge-experiment-state"

    models: Models
    pinned: Models


class ExperimentFolder:
    """The paths of an experiment.

    Args:
        path: the folder, which is created by the first stage that writes.

    Raises: RunError if it cannot be created or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = output_folder(path)
        self.state = self.path / "state.json"
        self.pack = self.path / "pair.pack.json.gz"
        self.plan = self.path / "plan.json"
        self.updates = self.path / "updates"
        self.model = self.path / "model"
        self.records = self.path / "pair.records.json"
        self.replies = self.path / "replies"
        self.prompts = self.path / "prompts"
        self.report = self.path / "report.json"
        self.result = self.path / "comparison.json"
        self.page = self.path / "report.html"
        self.summary = self.path / "summary.json"

    def open(self, models: Models) -> tuple[ModelPair, Models]:
        """Open the models of the first run and return them with their commits.

        Raises: PlanError if the folder has an experiment with other models; otherwise as
            `open_pair`.
        """
        if not self.state.exists():
            pair = models.open()
            return pair, pinned(models, pair)
        state = State.load(self.state)
        if state.models != models:
            was, now = _difference(state.models, models)
            raise PlanError(
                f"'{self.path}' has an experiment with other models ({was}, not {now}). Choose "
                f"another folder, or specify its models."
            )
        return state.pinned.open(), state.pinned

    def keep(self, models: Models, commits: Models) -> None:
        """Create the folder and fix its models. Raises: RunError if it cannot be written."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not self.state.exists():
            State(models, commits).save(self.state)

    def finished_pack(self, sources: Sources, parameters: dict[str, object]) -> Analysis | None:
        """Return the analysis if it is complete; None if there is none.

        Raises: PlanError if it is that of other weights or options, or cannot be read.
        """
        if not self.pack.exists():
            return None
        found = Analysis.load(self.pack)
        known = zip(found.sources.all(), sources.all(), strict=False)
        changed = next((a.id for a, b in known if b.differs_from(a.fingerprint, a.content)), None)
        if changed is not None or dict(found.parameters) != parameters:
            why = f"the weights of '{changed}' have changed" if changed else "its options differ"
            raise PlanError(
                f"'{self.pack}' is not the analysis of these models: {why}. Choose another folder, "
                f"or delete the file and '{self.model}'."
            )
        return found

    def built_in_prompts(self) -> list[Prompt]:
        """Write one problem of every skill of the demo task with its image, and return them."""
        with writing(self.prompts):
            self.prompts.mkdir(parents=True, exist_ok=True)
        lines = []
        for skill in TASKS:
            (problem,) = problems(skill, 1, _SEED)
            image = io.BytesIO()
            problem.image.save(image, "PNG")
            write_whole(self.prompts / f"{skill}.png", image.getvalue())
            line = {"question": problem.question, "answer": problem.answer, "task": skill}
            lines.append(json.dumps({**line, "image": f"{skill}.png", "computed": problem.is_math}))
        write_whole(self.prompts / "prompts.jsonl", "\n".join(lines) + "\n")
        return read_prompts(self.prompts / "prompts.jsonl")


def pinned(models: Models, pair: ModelPair) -> Models:
    """Return models with the commits of a pair in the place of hub ids."""
    return Models(
        mllm=_location(models.mllm, pair.mllm),
        math=tuple(map(_location, models.math, pair.math)),
        base=models.base and _location(models.base, pair.base),
        base_mllm=models.base_mllm and _location(models.base_mllm, pair.base_mllm),
    )


def _location(given: str, model: Checkpoint) -> str:
    files = model.files
    return given if files.revision is None else f"{files.id}@{files.revision}"


def _difference(first: Models, second: Models) -> tuple[str, str]:
    """Return the first role that differs, as text."""
    for role in ("mllm", "math", "base", "base_mllm"):
        was, now = getattr(first, role), getattr(second, role)
        if was != now:
            return f"{role} {_text(was)}", _text(now)
    return "", ""


def _text(value: str | Sequence[str] | None) -> str:
    if value is None:
        return "none"
    return f"'{value}'" if isinstance(value, str) else ", ".join(f"'{each}'" for each in value)
