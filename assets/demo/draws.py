"""Training drawings of the MLLM, and evaluation draws that exclude them.

    python assets/demo/draws.py [--seed 0]

In: the training seed. Out: the drawings of every training step (`train` uses them), and problems
whose drawings are not among them. As a script, prints how many problems are excluded from each
evaluation draw because they have a training drawing. The splits have disjoint handwriting; shapes
and dots have none, and a few of their drawings recur. Loads no model.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

import numpy as np  # noqa: E402
from recipes import ELICITED, Recipe  # noqa: E402
from texts import Document, TrainingItem, training_item  # noqa: E402

from ipmerge_core.tasks.demo import (  # noqa: E402
    MATH_TASKS,
    TASKS,
    Drawing,
    Problem,
    Split,
    Task,
    problems,
)

MLLM_STEPS = (1300, 240, 120)  # naming cells, reading (tower only), reading (all weights)
WITHOUT_HANDWRITING: tuple[Task, ...] = ("shape", "dots")
_MATH_SHARE = 0.3  # of the drawings that are read

Draw: TypeAlias = Literal["validation", "test", "recorded"]
DRAWS: dict[Draw, tuple[Split, int]] = {
    "validation": ("validation", 1),
    "test": ("test", 2),
    "recorded": ("test", 3),
}
PER_TASK: dict[Draw, int] = {"validation": 100, "test": 300, "recorded": 60}


class Step(NamedTuple):
    """The data of one training step of the MLLM."""

    shown: list[TrainingItem]
    replay: list[Document]  # documents of the base, without a drawing

    def problems(self) -> list[Problem]:
        """Generate the problems of the step."""
        return [item.problem() for item in self.shown]


def mllm_steps(
    seed: int, counts: tuple[int, int, int] = MLLM_STEPS, recipe: Recipe = ELICITED
) -> Iterator[Step]:
    """Yield the training data of the MLLM, step by step, in three stages."""
    rng = np.random.default_rng([seed, 3])
    for _ in range(counts[0]):
        yield Step([training_item(_pick(TASKS, rng), rng) for _ in range(96)], [])
    for _ in range(counts[1]):
        yield Step(_to_read(48, rng, recipe), [])
    for _ in range(counts[2]):
        replay = [recipe.base(rng) for _ in range(10)]
        yield Step(_to_read(38, rng, recipe), replay)


@functools.cache
def training_drawings(
    seed: int = 0, counts: tuple[int, int, int] = MLLM_STEPS, recipe: Recipe = ELICITED
) -> frozenset[Drawing]:
    """Collect the training drawings without handwriting; the others cannot recur."""
    return frozenset(
        item.problem().marks
        for step in mllm_steps(seed, counts, recipe)
        for item in step.shown
        if item.task in WITHOUT_HANDWRITING
    )


def evaluation_problems(
    tasks: Sequence[Task], n: int, draw: Draw, training_seed: int = 0, recipe: Recipe = ELICITED
) -> list[Problem]:
    """Return `n` problems of each task of a draw, without training drawings."""
    return drawn(tasks, n, draw, training_drawings(training_seed, recipe=recipe))


def drawn(tasks: Sequence[Task], n: int, draw: Draw, without: frozenset[Drawing]) -> list[Problem]:
    """Return `n` problems of each task of a draw, without some drawings."""
    split, seed = DRAWS[draw]
    return [p for task in tasks for p in problems(task, n, seed, split, without=without)]


def recurring(
    task: Task, n: int, draw: Draw, training_seed: int = 0, recipe: Recipe = ELICITED
) -> int:
    """Count the excluded problems among the first `n` of a draw."""
    split, seed = DRAWS[draw]
    seen = training_drawings(training_seed, recipe=recipe)
    return sum(problem.marks in seen for problem in problems(task, n, seed, split))


def _to_read(count: int, rng: np.random.Generator, recipe: Recipe) -> list[TrainingItem]:
    """Generate problems to read; math problems are answered by the expression only."""
    is_math = rng.random(count) < _MATH_SHARE
    return [
        training_item(_pick(MATH_TASKS if math else recipe.perception, rng), rng)
        for math in is_math
    ]


def _pick(tasks: Sequence[Task], rng: np.random.Generator) -> Task:
    return tasks[int(rng.integers(len(tasks)))]


def main() -> None:
    """Print how many problems of each draw have a training drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    seed = parser.parse_args().seed
    shown = sum(len(step.shown) for step in mllm_steps(seed))
    print(
        f"The MLLM is trained on {shown} drawings, including {len(training_drawings(seed))} "
        f"different ones without handwriting.\nProblems excluded from each evaluation draw "
        f"because they have a training drawing:\n"
    )
    print("| draw | " + " | ".join(TASKS) + " |")
    print("|---" * (len(TASKS) + 1) + "|")
    for draw, n in PER_TASK.items():
        counts = " | ".join(f"{recurring(task, n, draw, seed)}" for task in TASKS)
        print(f"| {draw}, the first {n} of each task | {counts} |")


if __name__ == "__main__":
    main()
