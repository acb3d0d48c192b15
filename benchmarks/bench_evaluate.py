"""Measure `ipmerge evaluate` on the demo MLLM, and how its rules agree with the public rules.

    python benchmarks/bench_evaluate.py [--items 100] [--repeats 3]

Items per processor second of one thread, the processor's process included: one at a time with
`generate`, the batches of `generate`, and an evaluation with and without kept prompts and features.
All replies are compared. Then the agreement of the answer rules with the table of the tests, and
with the documented rules of MathVista and MMMU on shared cases, written here from their definition.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package, when it is not installed
sys.path.insert(0, str(ROOT / "tests"))  # the table of cases

import psutil  # noqa: E402
import torch  # noqa: E402
from report import machine, table  # noqa: E402
from test_judging import Case, cases  # noqa: E402

from ipmerge_core.evaluation.answering import Caches  # noqa: E402
from ipmerge_core.evaluation.evaluate import (  # noqa: E402
    BATCH_SIZE,
    EvaluationSettings,
    iter_evaluation,
)
from ipmerge_core.evaluation.replies import ReplyStore  # noqa: E402
from ipmerge_core.evaluation.subjects import subject_of_model  # noqa: E402
from ipmerge_core.inference.encoding import ModelProcessor  # noqa: E402
from ipmerge_core.inference.loading import LoadedModel, load_model  # noqa: E402
from ipmerge_core.methods.declarations import drained  # noqa: E402
from ipmerge_core.runtime.pipeline import keep_freed_memory  # noqa: E402
from ipmerge_core.tasks.demo import TASKS, Problem, problems  # noqa: E402
from ipmerge_core.tasks.judging import judge  # noqa: E402
from ipmerge_core.tasks.registry import find_task  # noqa: E402

MLLM = ROOT / "assets" / "demo" / "mllm"
TARGET = 400  # items per second
ALONE = 45  # items that are answered one at a time
LARGE = 150  # items of a large batch (`--batch-size 150`)


class Spent(NamedTuple):
    """Seconds of this process and its children: of the processors, as user, and on the clock."""

    processor: float
    user: float
    clock: float

    @classmethod
    def now(cls) -> Spent:
        """Return the seconds until now."""
        mine = psutil.Process()
        times = [mine.cpu_times(), *(child.cpu_times() for child in mine.children(recursive=True))]
        user = sum(each.user for each in times)
        return cls(user + sum(each.system for each in times), user, time.perf_counter())


def least(run: Callable[[], list[str]], repeats: int) -> tuple[Spent, list[str]]:
    """Return the least seconds of some repeats, and the replies."""
    spent, replies = [], []
    for _ in range(repeats):
        started = Spent.now()
        replies = run()
        spent.append(Spent(*(b - a for a, b in zip(started, Spent.now(), strict=True))))
    return Spent(*map(min, zip(*spent, strict=True))), replies


def by_generate(
    loaded: LoadedModel, processor: ModelProcessor, items: Sequence[Problem], size: int
) -> list[str]:
    """Answer with `generate` of transformers, in batches in the given order."""
    replies: list[str] = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        inputs = processor.processor(
            text=[problem.prompt for problem in part],
            images=[problem.image for problem in part],
            return_tensors="pt", padding=True, padding_side="left",
        )  # fmt: skip
        with torch.inference_mode():
            ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=20)
        new = ids[:, inputs["input_ids"].shape[1] :]
        replies += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def evaluated(
    loaded: LoadedModel, count: int, caches: Caches | None, batch_size: int = LARGE
) -> list[str]:
    """Answer as an evaluation does, into a store that is empty."""
    with tempfile.TemporaryDirectory() as folder:
        settings = EvaluationSettings(limit=count, batch_size=batch_size)
        subject = subject_of_model("mllm", loaded, "benchmark")
        steps = iter_evaluation(
            [subject], [find_task("demo")], settings, ReplyStore(folder), caches=caches
        )
        report: Any = drained(steps)
    return [reply.text for reply in report.replies["mllm"]["demo"]]


def print_speed(count: int, repeats: int) -> None:
    """Print items per processor second of each way, and whether the replies are the same."""
    loaded, processor = load_model(MLLM), ModelProcessor(MLLM, takes_images=True)
    items = [problem for task in TASKS for problem in problems(task, count)]
    for problem in items:
        _ = problem.image  # drawn before, as for a data set
    caches = Caches()
    few = items[:: max(1, len(items) // ALONE)]
    alone, _ = least(lambda: by_generate(loaded, processor, few, 1), 1)
    batched, wanted = least(lambda: by_generate(loaded, processor, items, LARGE), repeats)
    small, usual = least(lambda: evaluated(loaded, count, None, BATCH_SIZE), repeats)
    cold, first = least(lambda: evaluated(loaded, count, None), repeats)
    evaluated(loaded, count, caches)
    warm, again = least(lambda: evaluated(loaded, count, caches), repeats)
    rows = [
        ["generate, one at a time", len(few), alone, None],
        [f"generate, batches of {LARGE}", len(items), batched, wanted],
        [f"evaluate, batches of {BATCH_SIZE} (default), first model", len(items), small, usual],
        [f"evaluate, batches of {LARGE}, first model", len(items), cold, first],
        ["evaluate, next model (prompts and features kept)", len(items), warm, again],
    ]
    shown = [
        [
            name,
            f"{n}",
            *(f"{n / seconds:.0f}" for seconds in spent),
            "-" if texts is None else str(texts == wanted),
        ]
        for name, n, spent, texts in rows
    ]
    head = ["way", "items", "items per processor second", "per user second", "per second"]
    print(table([*head, "same replies"], shown))
    print(f"\nTarget: {TARGET} items per second; drawing the pictures is part of `evaluate`.\n")


# --- agreement -------------------------------------------------------------------------------


def mathvista_rule(case: Case, extracted: str) -> bool:
    """Judge an extracted answer by MathVista's documented rules, without its language model.

    A letter in brackets or alone is a choice; another text is the choice with the least edit
    distance; integers are truncated floats, floats are rounded to the precision of the task.
    """
    item = case.item
    if item.kind == "choice":
        letters = [chr(ord("A") + index) for index in range(len(item.choices))]
        bracketed = re.findall(r"\(([a-zA-Z])\)", extracted)
        text = bracketed[0].upper() if bracketed else extracted.strip()
        if text in letters:
            return text == item.answer
        distances = [edit_distance(text, choice) for choice in item.choices]
        return letters[distances.index(min(distances))] == item.answer
    try:
        value, wanted = float(extracted), float(item.answer)
    except ValueError:
        return False
    precision = item.precision or len(item.answer.partition(".")[2])  # it gives one for floats
    if precision:
        return round(value, precision) == wanted
    return str(int(value)) == item.answer


def needs_no_extraction(case: Case) -> bool:
    """Whether MathVista's rules apply to a reply without the extraction by a language model."""
    if case.item.kind == "choice":
        is_letter = re.fullmatch(r"\([a-zA-Z]\)|[A-Z]", case.reply) is not None
        return is_letter or case.reply in case.item.choices
    numbers = re.compile(r"-?[0-9]*\.?[0-9]+")
    return all(numbers.fullmatch(text) for text in (case.reply, case.item.answer))


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def mmmu_rule(case: Case) -> bool | None:
    """Judge a reply by MMMU's documented rules for choices; None where it guesses at random.

    Letters in brackets, else letters before a space, else letters before a full stop, else, in
    replies of more than five words, texts of choices; the last one counts.
    """
    text = case.reply
    for char in ",.!?;:'":
        text = text.strip(char)
    text = f" {text} "
    letters = [chr(ord("A") + index) for index in range(len(case.item.choices))]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            last = max(found, key=lambda letter: text.rfind(place.format(letter)))
            return last == case.item.answer
    if len(text.split()) > 5:
        choices = dict(zip(letters, case.item.choices, strict=True))
        found = [letter for letter in letters if choices[letter].lower() in text.lower()]
        if found:
            last = max(found, key=lambda letter: text.lower().rfind(choices[letter].lower()))
            return last == case.item.answer
    return None


def print_agreement() -> None:
    """Print how often the rules agree with the table and with the public rules."""
    every = cases()
    verdicts = [judge(case.item, case.reply) for case in every]
    ours = [verdict.outcome for verdict in verdicts]
    right = sum(verdict == case.verdict for verdict, case in zip(ours, every, strict=True))
    short = [
        (case, outcome == "right", mathvista_rule(case, case.reply))
        for case, outcome in zip(every, ours, strict=True)
        if case.item.kind in ("choice", "number") and needs_no_extraction(case)
    ]
    letters = [
        (case, outcome == "right", theirs)
        for case, outcome in zip(every, ours, strict=True)
        if case.item.kind == "choice" and (theirs := mmmu_rule(case)) is not None
    ]
    rows = [
        ["table of the tests", f"{len(every)}", f"{100 * right / len(every):.1f} %", "-", "-"],
        ["MathVista, replies that need no extraction", *agreement(short)],
        ["MMMU, choices it does not guess", *agreement(letters)],
    ]
    head = ["rules", "cases", "agreement", "right by ours only", "right by theirs only"]
    print(table(head, rows))
    print(
        "\nTheirs only: MathVista truncates integers, so that 42.5 is 42; MMMU takes the last "
        "letter in thinking parts and in hedges. Ours only: other notations of the same answer."
    )


def agreement(found: Sequence[tuple[Case, bool, bool]]) -> list[str]:
    """Return the number of cases, the share that agree, and the two kinds of differences."""
    same = sum(ours == theirs for _, ours, theirs in found)
    only = sum(ours and not theirs for _, ours, theirs in found)
    other = sum(theirs and not ours for _, ours, theirs in found)
    return [f"{len(found)}", f"{100 * same / len(found):.1f} %", f"{only}", f"{other}"]


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100, help="per skill of the demo task")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command line does
    started = time.perf_counter()
    print(machine(), end="\n\n")
    print_speed(options.items, options.repeats)
    print_agreement()
    print(f"\n{time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
