"""The demo task: procedurally generated drawings with a question and an answer.

In: a task name, a count, a seed, a split. Out: frozen `Problem`s, whose image is rendered on
access. Answers are computed from the drawn values and thus correct by construction. The three
splits use disjoint handwriting (scikit-learn's `load_digits`) and disjoint random streams; the test
split uses the last 497 digits. Shapes and dots have no handwriting, so that two streams can produce
the same image: training drawings can be excluded explicitly. Every problem also has a text-only
prompt, for text models. Scoring is in `scores`; no model is loaded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image, ImageDraw

from ipmerge_core.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Task: TypeAlias = Literal[
    "add", "sub", "mul", "area", "perimeter", "sides", "written", "shape", "dots"
]
Split: TypeAlias = Literal["train", "validation", "test"]

TASKS: tuple[Task, ...] = get_args(Task)
MATH_TASKS: tuple[Task, ...] = ("add", "sub", "mul", "area", "perimeter")
PERCEPTION_TASKS: tuple[Task, ...] = ("sides", "written", "shape", "dots")
SPLITS: tuple[Split, ...] = get_args(Split)
SHAPES = ("circle", "triangle", "square", "star", "diamond")

_CALCULATE = (
    "What is the result?",
    "Calculate this.",
    "What does it come to?",
    "Work it out.",
    "What is the answer?",
)
QUESTIONS: dict[Task, tuple[str, ...]] = {
    "add": _CALCULATE,
    "sub": _CALCULATE,
    "mul": _CALCULATE,
    "area": (
        "What is the area?",
        "Find the area.",
        "How much area does it cover?",
        "What is the area of this rectangle?",
    ),
    "perimeter": (
        "What is the perimeter?",
        "Find the perimeter.",
        "How long is its border?",
        "What is the perimeter of this rectangle?",
    ),
    "sides": (
        "What are the sides?",
        "How wide and how high is it?",
        "Name the sides.",
        "How long are the sides?",
    ),
    "written": ("What is written here?", "Read it out.", "What does it say?", "What do you read?"),
    "shape": ("What shape is this?", "Which shape do you see?", "Name the shape."),
    "dots": ("How many dots are there?", "Count the dots.", "How many dots do you see?"),
}

# Rows of load_digits, disjoint between the splits.
GLYPHS: dict[Split, range] = {
    "train": range(1100),
    "validation": range(1100, 1300),
    "test": range(1300, 1797),
}

IMAGE_SIZE = 128  # side length in pixels
CELL = 32  # drawings use a 4 x 4 grid of cells
_INK = 24  # grey level of lines and shapes; 255 is the background


@dataclass(frozen=True)
class Mark:
    """One drawn element: a digit, an operator, a dot or an outline, with its bounding box."""

    symbol: str
    box: tuple[int, int, int, int]
    glyph: int = -1  # row of load_digits, for a digit
    tilt: int = 0  # degrees, for a digit


Drawing: TypeAlias = tuple[Mark, ...]  # equal drawings render to identical pixels


@dataclass(frozen=True)
class Problem:
    """A drawing, a question about it and the correct answer.

    `words` describes the drawing in text, `calculation` is the expression of the answer (empty for
    a perception task), `worked` is the calculation with its steps.
    """

    task: Task
    question: str
    answer: str
    words: str
    marks: Drawing
    calculation: str = ""
    worked: str = ""

    @functools.cached_property
    def image(self) -> Image.Image:
        """The drawing, RGB, 128 x 128."""
        return draw(self.marks)

    @property
    def prompt(self) -> str:
        """The prompt for a vision-language model; `<image>` is the placeholder of the drawing."""
        return f"USER: <image>\n{self.question} ASSISTANT:"

    @property
    def text_prompt(self) -> str:
        """The prompt for a text model, with the drawing described in text."""
        return f"USER: {self.words}\n{self.question} ASSISTANT:"

    @property
    def is_math(self) -> bool:
        """Whether the answer must be computed rather than only read."""
        return self.task in MATH_TASKS


def problems(
    task: Task,
    n: int,
    seed: int = 0,
    split: Split = "test",
    *,
    without: Collection[Drawing] = frozenset(),
) -> list[Problem]:
    """Generate the first `n` problems of a task; problem i does not depend on `n`.

    Args:
        task: One of `TASKS`.
        n: Number of problems.
        seed: Seed of the random stream.
        split: Split that determines handwriting and random stream.
        without: Drawings to skip; the following problems of the stream replace them.

    Raises: RunError for an unknown task or split, a negative count, or if `without` leaves fewer
        than `n` among the first 10 `n` + 100 problems.

    >>> problem = problems("mul", 1, seed=3)[0]
    >>> problem.question, problem.calculation, problem.answer
    ('What does it come to?', '8*5', '40')
    """
    if task not in TASKS:
        raise RunError(f"Unknown demo task '{task}'. Available: {', '.join(TASKS)}.")
    if split not in SPLITS:
        raise RunError(f"Unknown split '{split}'. Available: {', '.join(SPLITS)}.")
    if n < 0:
        raise RunError(f"Got a count of {n} problems of '{task}'; expected 0 or more.")
    tried = 10 * n + 100
    stream = (make_problem(task, seed, split, index) for index in range(tried))
    found = list(itertools.islice((p for p in stream if p.marks not in without), n))
    if len(found) < n:
        raise RunError(
            f"Only {len(found)} of the first {tried} problems of '{task}' have a drawing that is "
            f"not excluded; expected {n}. Request fewer problems, or exclude fewer drawings."
        )
    return found


def make_problem(task: Task, seed: int, split: Split, index: int) -> Problem:
    """Generate problem number `index` of the stream given by task, seed and split."""
    rng = np.random.default_rng([seed, SPLITS.index(split), TASKS.index(task), index])
    question = QUESTIONS[task][rng.integers(len(QUESTIONS[task]))]
    return _MAKERS[task](task, question, rng, GLYPHS[split])


# --- problem content -------------------------------------------------------------------------


def _calculation(task: Task, question: str, rng: np.random.Generator, glyphs: range) -> Problem:
    kind = task if task != "written" else ("add", "sub", "mul")[rng.integers(3)]
    if kind == "mul":
        a, b = (int(value) for value in rng.integers(2, 10, size=2))
        sign, result = "*", a * b
    else:
        b = int(rng.integers(1, 10))
        a = int(rng.integers(1 if kind == "add" else max(b, 2), 13))
        sign, result = ("+", a + b) if kind == "add" else ("-", a - b)
    written = f"{a}{sign}{b}"
    marks = _row_of_marks(written, rng, glyphs)
    if task == "written":
        return Problem(task, question, written, written, marks)
    return Problem(task, question, str(result), written, marks, written, f"{written}={result}")


def _rectangle(task: Task, question: str, rng: np.random.Generator, glyphs: range) -> Problem:
    width, height = (int(value) for value in rng.integers(2, 10, size=2))
    words = (f"width {width}, height {height}", f"{width} wide, {height} high")[rng.integers(2)]
    marks = _labelled_rectangle(width, height, rng, glyphs)
    if task == "sides":
        return Problem(task, question, f"{width} wide and {height} high", words, marks)
    if task == "area":
        calculation, answer = f"{width}*{height}", str(width * height)
        worked = f"{calculation}={answer}"
    else:
        calculation, answer = f"{width}+{height}", str(2 * (width + height))
        worked = f"{calculation}={width + height}; {width + height}*2={answer}"
    return Problem(task, question, answer, words, marks, calculation, worked)


def _shape(task: Task, question: str, rng: np.random.Generator, _: range) -> Problem:
    shape = SHAPES[rng.integers(len(SHAPES))]
    side = int(rng.integers(44, 97))
    x, y = (int(value) for value in rng.integers(4, IMAGE_SIZE - side - 3, size=2))
    return Problem(task, question, shape, f"a {shape}", (Mark(shape, (x, y, x + side, y + side)),))


def _dots(task: Task, question: str, rng: np.random.Generator, _: range) -> Problem:
    count = int(rng.integers(1, 10))
    marks = []
    for cell in sorted(rng.choice(16, size=count, replace=False)):
        side = int(rng.integers(9, 15))
        x, y = (int(value) for value in rng.integers(4, CELL - side - 3, size=2))
        left, top = x + CELL * int(cell % 4), y + CELL * int(cell // 4)
        marks.append(Mark("dot", (left, top, left + side, top + side)))
    return Problem(task, question, str(count), " ".join("o" * count), tuple(marks))


_MAKERS: dict[Task, Callable[[Task, str, np.random.Generator, range], Problem]] = {
    "add": _calculation,
    "sub": _calculation,
    "mul": _calculation,
    "area": _rectangle,
    "perimeter": _rectangle,
    "sides": _rectangle,
    "written": _calculation,
    "shape": _shape,
    "dots": _dots,
}


# --- layout ----------------------------------------------------------------------------------


def _row_of_marks(written: str, rng: np.random.Generator, glyphs: range) -> Drawing:
    row = int(rng.integers(4))
    column = int(rng.integers(0, 5 - len(written)))
    return tuple(
        _symbol_in_cell(symbol, column + i, row, rng, glyphs) for i, symbol in enumerate(written)
    )


def _labelled_rectangle(
    width: int, height: int, rng: np.random.Generator, glyphs: range
) -> Drawing:
    scale = (2 * CELL - 6) / max(width, height)
    half_x, half_y = (max(8, round(side * scale / 2)) for side in (width, height))
    middle = IMAGE_SIZE // 2
    outline = Mark(
        "rectangle", (middle - half_x, middle - half_y, middle + half_x, middle + half_y)
    )
    row, column = (int(value) for value in rng.integers(1, 3, size=2))
    top_or_bottom, left_or_right = (int(value) * 3 for value in rng.integers(2, size=2))
    return (
        outline,
        _symbol_in_cell(str(width), column, top_or_bottom, rng, glyphs),
        _symbol_in_cell(str(height), left_or_right, row, rng, glyphs),
    )


def _symbol_in_cell(
    symbol: str, column: int, row: int, rng: np.random.Generator, glyphs: range
) -> Mark:
    is_digit = symbol.isdigit()
    side = int(rng.integers(24, 31)) if is_digit else int(rng.integers(12, 19))
    x, y = (int(value) for value in rng.integers(0, CELL - side + 1, size=2))
    left, top = x + CELL * column, y + CELL * row
    box = (left, top, left + side, top + side)
    if not is_digit:
        return Mark(symbol, box)
    rows = _rows_of_digit(int(symbol))
    rows = rows[(rows >= glyphs.start) & (rows < glyphs.stop)]
    return Mark(symbol, box, int(rows[rng.integers(len(rows))]), int(rng.integers(-8, 9)))


# --- drawing ---------------------------------------------------------------------------------


def draw(marks: Drawing) -> Image.Image:
    """Render the marks in dark grey on white."""
    page = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)
    pen = ImageDraw.Draw(page)
    for mark in marks:
        if mark.glyph >= 0:
            _draw_digit(page, mark)
        elif mark.symbol in {"+", "-", "*"}:
            _draw_operator(pen, mark)
        elif mark.symbol == "dot":
            pen.ellipse(mark.box, fill=_INK)
        else:
            _draw_outline(pen, mark)
    return page.convert("RGB")


def _draw_digit(page: Image.Image, mark: Mark) -> None:
    left, top, right, bottom = mark.box
    ink = _glyph(mark.glyph).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    ink = ink.rotate(mark.tilt, Image.Resampling.BILINEAR)
    page.paste(_INK, (left, top), ink)


def _draw_operator(pen: ImageDraw.ImageDraw, mark: Mark) -> None:
    left, top, right, bottom = mark.box
    middle_x, middle_y = (left + right) // 2, (top + bottom) // 2
    if mark.symbol == "*":
        pen.line((left, top, right, bottom), fill=_INK, width=3)
        pen.line((left, bottom, right, top), fill=_INK, width=3)
        return
    pen.line((left, middle_y, right, middle_y), fill=_INK, width=3)
    if mark.symbol == "+":
        pen.line((middle_x, top, middle_x, bottom), fill=_INK, width=3)


def _draw_outline(pen: ImageDraw.ImageDraw, mark: Mark) -> None:
    left, top, right, bottom = mark.box
    middle_x, middle_y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    if mark.symbol == "circle":
        pen.ellipse(mark.box, outline=_INK, width=3)
    elif mark.symbol in {"square", "rectangle"}:
        pen.rectangle(mark.box, outline=_INK, width=3)
    elif mark.symbol == "triangle":
        _draw_polygon(pen, [(middle_x, top), (right, bottom), (left, bottom)])
    elif mark.symbol == "diamond":
        _draw_polygon(
            pen, [(middle_x, top), (right, middle_y), (middle_x, bottom), (left, middle_y)]
        )
    else:
        _draw_polygon(pen, _star(middle_x, middle_y, radius))


def _draw_polygon(pen: ImageDraw.ImageDraw, corners: list[tuple[float, float]]) -> None:
    pen.line([*corners, corners[0]], fill=_INK, width=3, joint="curve")


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.42 * radius, radius)
    return [
        (float(x + r * np.cos(angle)), float(y + r * np.sin(angle)))
        for r, angle in zip(radii, angles, strict=True)
    ]


@functools.cache
def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    # Imported here because importing scikit-learn takes a second and only rendering needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


@functools.cache
def _glyph(row: int) -> Image.Image:
    return Image.fromarray((_digits()[0][row] * (255 / 16)).astype(np.uint8))  # values 0 to 16


@functools.cache
def _rows_of_digit(digit: int) -> NDArray[np.int64]:
    return np.flatnonzero(_digits()[1] == digit)
