"""The demo problems as a task: image+math and perception, any number, reproducible by a seed."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipmerge_core.tasks.demo import (
    MATH_TASKS,
    PERCEPTION_TASKS,
    TASKS,
    Drawing,
    Problem,
    Split,
    Task,
    draw,
    problems,
)
from ipmerge_core.tasks.items import Draw, Group, Item, ItemSet, unknown_part
from ipmerge_core.tasks.items import Task as EvaluationTask

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "demo"
PER_SKILL = 100  # by default
PARTS: dict[str, tuple[Task, ...]] = {
    "math": MATH_TASKS,
    "perception": PERCEPTION_TASKS,
    **{task: (task,) for task in TASKS},
}
_LONGEST_REPLY = 20  # tokens; the longest correct answer of the demo has 18
_SPLIT: Split = "test"


@dataclass(frozen=True)
class DrawnPicture:
    """The picture of a demo problem, rendered when it is needed."""

    marks: Drawing

    def key(self) -> str:
        """Return a hash of the drawing; equal drawings have equal pixels."""
        return hashlib.sha256(repr(self.marks).encode()).hexdigest()

    def source(self) -> Image:
        """Render the drawing."""
        return draw(self.marks)


def demo_task(part: str = "") -> EvaluationTask:
    """Return the whole demo task, or one of `PARTS`. Raises: RunError for another part."""
    if part and part not in PARTS:
        raise unknown_part(NAME, part, list(PARTS))
    skills = PARTS[part] if part else TASKS
    groups = {_group(skill) for skill in skills}
    group: Group = groups.pop() if len(groups) == 1 else "other"
    return EvaluationTask(
        name=f"{NAME}:{part}" if part else NAME,
        label=f"Demo, {part}" if part else "Demo",
        group=group,
        source=f"generated drawings, split {_SPLIT}",
        prompt="the question alone",
        max_new_tokens=_LONGEST_REPLY,
        load=functools.partial(_load, skills),
        guard=f"{NAME}:perception",
        unofficial="A task of this project, made for its demo models.",
    )


def _group(skill: Task) -> Group:
    return "math" if skill in MATH_TASKS else "perception"


def _load(skills: tuple[Task, ...], draw: Draw) -> ItemSet:
    """Generate the first problems of each skill's stream."""
    count = PER_SKILL if draw.limit is None else draw.limit
    return ItemSet(
        tuple(
            item_of(problem, f"{skill}-{draw.seed}-{number}")
            for skill in skills
            for number, problem in enumerate(problems(skill, count, draw.seed, _SPLIT))
        )
    )


def item_of(problem: Problem, name: str) -> Item:
    """Return a problem as an item of a task."""
    return Item(
        id=name,
        question=problem.question,
        answers=(problem.answer,),
        kind="stated" if problem.is_math else "whole",
        pictures=(DrawnPicture(problem.marks),),
        skill=problem.task,
        group=_group(problem.task),
        shown=problem.question,
    )
