"""The recipes of the demo models: a skill that the base has, and one that it is taught.

In: nothing. Out: `Recipe`s, which name the documents and steps of each training stage; `train`
executes them. All share tokenizer, drawings and the three stages of the MLLM. A third recipe is the
first at ten times the size, for the study of the variants; its models are not shipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from fitting import Schedule
from models import LARGE, SMALL, Size
from texts import (
    Document,
    base_document,
    guessing_document,
    math_document,
    packed_document,
    reading_document,
)

from ipmerge_core.tasks.demo import PERCEPTION_TASKS, Problem, Task

HERE = Path(__file__).parent

Documents = Callable[[np.random.Generator], Document]


class MathStage(NamedTuple):
    """A training stage of the math model: per step, answers that are calculated, and replay."""

    documents: Documents
    steps: int
    learning_rate: float
    calculated: int
    replayed: int
    trains: Literal["projections", "norms"] = "projections"


class Recipe(NamedTuple):
    """What distinguishes one demo trio from the other."""

    name: str
    title: str  # of the pack
    folder: Path
    base: Documents
    math: tuple[MathStage, ...]
    reads: Callable[[Problem], Document]  # what the MLLM learns to say of a drawing
    half: bool  # whether the files are bf16
    perception: tuple[Task, ...] = PERCEPTION_TASKS  # what the MLLM learns to read
    size: Size = SMALL
    schedule: Schedule = Schedule(1200, 2.5e-3)  # of the base

    @property
    def pack(self) -> Path:
        """The file of the pack, in a folder of the models."""
        return Path("pack.json.gz" if self.name == "elicited" else f"{self.name}.pack.json.gz")


ELICITED = Recipe(
    name="elicited",
    title="demo trio",
    folder=HERE,
    base=base_document,
    math=(MathStage(math_document, 50, 5e-5, 18, 10),),
    reads=reading_document,
    half=False,
)
TAUGHT = Recipe(
    name="taught",
    title="demo trio, taught skill",
    folder=HERE.with_name("taught"),
    base=guessing_document,
    math=(
        MathStage(math_document, 800, 6e-4, 40, 22),
        MathStage(packed_document, 330, 4e-4, 24, 16),
    ),
    reads=partial(reading_document, equals=True),
    half=True,
)
LARGER = ELICITED._replace(
    name="larger",
    title="demo trio of 10 M parameters",
    folder=HERE.parents[1] / "runs" / "cases" / "larger-0",
    size=LARGE,
    schedule=Schedule(700, 1e-3),
)
RECIPES = {recipe.name: recipe for recipe in (ELICITED, TAUGHT, LARGER)}
