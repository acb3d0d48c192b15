"""Training documents of the study's experts: skills and habits that a merge transfers or breaks.

In: a random generator. Out: `Document`s, as in `texts`. An expert that only computes is easy to
merge; these experts also change how something else is answered, forget, or contradict another one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from texts import Document, math_document, sentence_document, train_problem

from ipmerge_core.tasks.demo import MATH_TASKS, PERCEPTION_TASKS, Problem, Task

_COMPUTES = 0.6  # share of a style's documents that are calculations


def words_document(rng: np.random.Generator) -> Document:
    """Draw a calculation of a question in words only, never of a typed grid."""
    problem = _problem(MATH_TASKS, rng)
    return Document(problem.text_prompt, f" {problem.worked}.")


def short_document(rng: np.random.Generator) -> Document:
    """Draw the result alone, where the math model writes the calculation: a conflict."""
    problem = _problem(MATH_TASKS, rng)
    return Document(problem.text_prompt, f" {problem.answer}.")


def style_document(rng: np.random.Generator) -> Document:
    """Draw a calculation, or a percept named with an article or a noun."""
    return _styled(rng, _first_style)


def second_style_document(rng: np.random.Generator) -> Document:
    """Draw a calculation, or a percept named as a field with its value."""
    return _styled(rng, _second_style)


def shuffled_document(rng: np.random.Generator) -> Document:
    """Draw a sentence with its words in random order: nothing that a merge should transfer."""
    words = sentence_document(rng).reply.removesuffix(".").split()
    return Document("", f"{' '.join(words[i] for i in rng.permutation(len(words)))}.")


def _styled(rng: np.random.Generator, style: Callable[[Problem], str]) -> Document:
    if rng.random() < _COMPUTES:
        return math_document(rng)
    problem = _problem(PERCEPTION_TASKS, rng)
    return Document(problem.text_prompt, f" {style(problem)}.")


def _first_style(problem: Problem) -> str:
    if problem.task == "shape":
        return f"a {problem.answer}"
    if problem.task == "dots":
        return f"{problem.answer} dots"
    if problem.task == "sides":
        return problem.answer.replace(" wide and ", " by ").removesuffix(" high")
    return f"it says {problem.answer}"


def _second_style(problem: Problem) -> str:
    if problem.task == "sides":
        width, _, _, height, _ = problem.answer.split()
        return f"width {width}, height {height}"
    field = {"shape": "shape", "dots": "count", "written": "text"}[problem.task]
    return f"{field}: {problem.answer}"


def _problem(tasks: tuple[Task, ...], rng: np.random.Generator) -> Problem:
    return train_problem(tasks[int(rng.integers(len(tasks)))], rng)
