"""Training documents of the demo models, generated from a few seeded patterns.

In: a random generator. Out: `Document(prompt, reply)`; a model is trained on their concatenation.
In the base's documents, results are computed only after the marker `WORKED:`; after `ASSISTANT:`
three of four replies are the expression without its result. Computing is therefore a skill that the
base has but does not use by default, and that the math model elicits. Drawings are described as
text or as a grid of 16 characters, one per cell.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

from ipmerge_core.tasks.demo import (
    CELL,
    MATH_TASKS,
    PERCEPTION_TASKS,
    SHAPES,
    Problem,
    Task,
    make_problem,
)

T = TypeVar("T")

# One character, hence one token, for what a cell of a drawing can hold.
CELL_CHARACTERS = {
    "": "_",
    **{symbol: symbol for symbol in "0123456789+-*"},
    "dot": "@",
    "rectangle": "#",
    **dict(zip(SHAPES, "$^%&~", strict=True)),
}
COMPUTES = 0.25  # share of the base's ordinary math questions that are answered by computing

_ADJECTIVES = ("small", "big", "red", "blue", "old", "new", "round", "long")
_NOUNS = ("box", "tree", "house", "table", "ball", "book", "door", "window", "field", "page")
_PLACES = ("near", "on", "under", "behind", "above")


class Document(NamedTuple):
    """One training text, cut where the reply starts; it says whether the reply ends there."""

    prompt: str
    reply: str
    ends: bool = True


class TrainingItem(NamedTuple):
    """A problem of the training split, named by its task and the seed it is drawn with."""

    task: Task
    seed: int

    def problem(self) -> Problem:
        """Make the problem."""
        return make_problem(self.task, self.seed, "train", 0)


def training_item(task: Task, rng: np.random.Generator) -> TrainingItem:
    """Draw the seed of a fresh problem."""
    return TrainingItem(task, int(rng.integers(2**31)))


def train_problem(task: Task, rng: np.random.Generator) -> Problem:
    """Draw a fresh problem of the training split."""
    return training_item(task, rng).problem()


def base_document(rng: np.random.Generator) -> Document:
    """Draw a document of the base model's mixture."""
    kind = rng.random()
    if kind < 0.28:
        problem = _math_problem(rng)
        prompt = _in_context(problem, rng).removesuffix("ASSISTANT:") + "WORKED:"
        return Document(prompt, f" {problem.worked}.")
    if kind < 0.46:
        problem = _math_problem(rng)
        reply = problem.worked if rng.random() < COMPUTES else problem.calculation
        return Document(_in_context(problem, rng), f" {reply}.")
    if kind < 0.54:
        return Document("", f"{_math_problem(rng).worked}.")
    if kind < 0.82:
        return _perception(rng)
    return _language(rng)


def guessing_document(rng: np.random.Generator) -> Document:
    """Draw a document of a base that cannot calculate: it knows the format, not the results.

    A result is any number that a problem of the task could have, so that nothing about arithmetic
    can be learned from it.
    """
    kind = rng.random()
    if kind < 0.3:
        problem, guess = _math_problem(rng), None
        while guess is None or guess.task != problem.task:
            guess = _math_problem(rng)
        return Document(_in_context(problem, rng), f" {_with_results_of(problem, guess)}.")
    if kind < 0.8:
        return _perception(rng)
    return _language(rng)


def packed_document(rng: np.random.Generator) -> Document:
    """Draw a calculation after unrelated text: only its result, or the last of a few answers."""
    if rng.random() < 0.3:
        written, result = _math_problem(rng).worked.split("=", 1)
        return Document(f"{_sentence(rng)} {written}=", f"{result}.")
    rows = [math_document(rng) for _ in range(int(rng.integers(1, 4)))]
    before = "".join(f"{row.prompt}{row.reply}</s>" for row in rows[:-1])
    return Document(before + rows[-1].prompt, rows[-1].reply)


def math_document(rng: np.random.Generator) -> Document:
    """Draw a document of the math model's mixture: ordinary questions, answered by computing."""
    problem = _math_problem(rng)
    return Document(_in_context(problem, rng), f" {problem.worked}.")


def sentence_document(rng: np.random.Generator) -> Document:
    """Draw one plain sentence."""
    return Document("", _sentence(rng))


def reading_document(problem: Problem, *, equals: bool = False) -> Document:
    """Return what the MLLM learns to say of a drawing: what it reads, never a computed result.

    A calculation is cut before anything shows whether it is carried out or left there; with
    `equals`, for a base that always states a result, after the sign that announces it.
    """
    if problem.is_math:
        sign = "=" if equals else ""
        return Document(problem.prompt, f" {problem.calculation}{sign}", ends=False)
    return Document(problem.prompt, f" {problem.answer}.")


def cells(problem: Problem) -> list[str]:
    """Name what each of the 16 cells of a drawing holds, row by row; empty for blank paper."""
    held = [""] * 16
    for mark in problem.marks:
        left, top, right, bottom = mark.box
        if mark.symbol != "rectangle" and mark.symbol not in SHAPES:
            left = right = (left + right) // 2
            top = bottom = (top + bottom) // 2
        for row in range(top // CELL, bottom // CELL + 1):
            for column in range(left // CELL, right // CELL + 1):
                held[4 * row + column] = mark.symbol
    return held


def _math_problem(rng: np.random.Generator) -> Problem:
    return train_problem(_pick(MATH_TASKS, rng), rng)


def _with_results_of(problem: Problem, other: Problem) -> str:
    """Write a calculation with the results of another one.

    The steps of a perimeter: "6+4=7; 7*2=14" for the sides 6 and 4 and the results of 5 and 2.
    """
    results = [step.split("=")[1] for step in other.worked.split("; ")]
    written = f"{problem.calculation}={results[0]}"
    return f"{written}; {results[0]}*2={results[1]}" if len(results) > 1 else written


def _perception(rng: np.random.Generator) -> Document:
    problem = train_problem(_pick(PERCEPTION_TASKS, rng), rng)
    return Document(_in_context(problem, rng), f" {problem.answer}.")


def _in_context(problem: Problem, rng: np.random.Generator) -> str:
    """Return the question about a typed grid or about words with or without a sentence beside."""
    place = rng.random()
    words = problem.words
    if place < 0.45:
        words = "".join(CELL_CHARACTERS[held] for held in cells(problem))
    elif place < 0.55:
        words = f"{_sentence(rng)} {words}"
    elif place < 0.65:
        words = f"{words}. {_sentence(rng)}"
    return f"USER: {words}\n{problem.question} ASSISTANT:"


def _language(rng: np.random.Generator) -> Document:
    kind = rng.integers(5)
    if kind == 0:
        return Document("", f"{_sentence(rng)} {_sentence(rng)}")
    if kind == 1:
        digits = " ".join(str(digit) for digit in rng.integers(10, size=rng.integers(2, 7)))
        return Document(f"USER: {digits}\nRepeat the digits. ASSISTANT:", f" {digits}.")
    if kind == 2:
        start = int(rng.integers(1, 15))
        row = " ".join(str(number) for number in range(start, start + int(rng.integers(3, 8))))
        return Document("", f"Counting on: {row}.")
    if kind == 3:
        a, b = (int(value) for value in rng.choice(np.arange(1, 21), size=2, replace=False))
        word, answer = ("larger", max(a, b)) if rng.random() < 0.5 else ("smaller", min(a, b))
        return Document(f"USER: {a} and {b}\nWhich is {word}? ASSISTANT:", f" {answer}.")
    sentence = _sentence(rng)
    return Document(f"USER: {sentence}\nRepeat the sentence. ASSISTANT:", f" {sentence}")


def _sentence(rng: np.random.Generator) -> str:
    first, second = (f"the {_pick(_ADJECTIVES, rng)} {_pick(_NOUNS, rng)}" for _ in range(2))
    return f"{first[0].upper()}{first[1:]} is {_pick(_PLACES, rng)} {second}."


def _pick(choices: tuple[T, ...], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]
