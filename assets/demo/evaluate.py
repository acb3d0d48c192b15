"""Evaluate the demo models and print the tables as Markdown.

    python assets/demo/evaluate.py [--trio assets/demo] [--seed 0] [--n 300] [--controls 5]

In: trained models and their training seed. Out: on stdout, the tables of
assets/demo/README.md with 95 % Wilson intervals. Gains are chosen on a validation draw (most
image+math correct, perception at most 2 points below the MLLM's), scores are of a test draw with
other handwriting; both exclude training drawings. A control changes every matrix by the same norm
as the merge it controls.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

import torch  # noqa: E402
from draws import PER_TASK, Draw, evaluation_problems, recurring  # noqa: E402
from variants import Trio, Variant, norm  # noqa: E402

from ipmerge_core.evaluation.batched_answers import answer_all  # noqa: E402
from ipmerge_core.evaluation.scores import Score, score, sign_test  # noqa: E402
from ipmerge_core.inference.encoding import ModelProcessor  # noqa: E402
from ipmerge_core.inference.loading import load_model  # noqa: E402
from ipmerge_core.tasks.answers import is_right  # noqa: E402
from ipmerge_core.tasks.demo import MATH_TASKS, PERCEPTION_TASKS, TASKS, Problem  # noqa: E402

GAINS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)
WEIGHTS = (0.3, 0.5, 0.7, 1.0, 1.5)
THRESHOLDS = {"first": (0.0, 0.1, 0.2, 0.3), "max": (0.3,)}
ABLATION_THRESHOLDS = {"first": (0.1, 0.2), "max": (0.3,)}
ABLATION_GAINS = (0.5, 1.0, 2.0)
ALLOWED_LOSS = 0.02  # of perception, when a gain is chosen


class Result(NamedTuple):
    """Result of one merge at one gain: correct or not for every problem of a draw."""

    variant: Variant
    gain: float
    outcomes: dict[str, list[bool]]

    def pooled(self, tasks: Sequence[str]) -> Score:
        """Count over several tasks."""
        right = sum(sum(self.outcomes[task]) for task in tasks)
        return Score(right, sum(len(self.outcomes[task]) for task in tasks))

    @property
    def math(self) -> Score:
        """Score of image+math."""
        return self.pooled(MATH_TASKS)

    @property
    def perception(self) -> Score:
        """Score of perception."""
        return self.pooled(PERCEPTION_TASKS)


class Bench:
    """The models and the two draws they are evaluated on."""

    def __init__(self, trio: Trio, counts: Mapping[Draw, int], training_seed: int) -> None:
        self.trio = trio
        self.draws = {
            draw: evaluation_problems(TASKS, n, draw, training_seed) for draw, n in counts.items()
        }
        self.start = self.measure(Variant("MLLM", {}), 0.0, "validation")

    def measure(self, variant: Variant, gain: float, draw: Draw) -> Result:
        """Answer a draw and compare."""
        asked: list[Problem] = self.draws[draw]
        outcomes: dict[str, list[bool]] = {task: [] for task in TASKS}
        replies = self.trio.answer(variant, gain, asked)
        for problem, reply in zip(asked, replies, strict=True):
            outcomes[problem.task].append(is_right(problem, reply))
        return Result(variant, gain, outcomes)

    def sweep(self, variant: Variant, gains: Iterable[float]) -> list[Result]:
        """Measure several gains on the validation draw."""
        return [self.measure(variant, gain, "validation") for gain in gains]

    def choose(self, results: Iterable[Result]) -> Result:
        """Return the best math result among those that keep perception; the first in a tie."""
        lowest = self.start.perception.share - ALLOWED_LOSS
        keeping = [result for result in results if result.perception.share >= lowest]
        return max(keeping or [self.start], key=lambda result: result.math.share)

    def test(self, chosen: Result) -> Result:
        """Measure a chosen merge on the test draw."""
        return self.measure(chosen.variant, chosen.gain, "test")


def selections(
    bench: Bench, variant: Variant, thresholds: Mapping[str, Sequence[float]]
) -> Iterator[Variant]:
    """Yield the variant restricted to the matrices each threshold selects, each set once."""
    similarity = bench.trio.similarities()
    seen: set[frozenset[str]] = set()
    for kind, values in thresholds.items():
        for threshold in values:
            names = frozenset(n for n, found in similarity.items() if found[kind] >= threshold)
            if names and names not in seen:
                seen.add(names)
                label = f"{variant.label}, {kind} S >= {threshold:g}"
                yield variant.only(set(names), label if threshold else variant.label)


def controls(bench: Bench, controlled: Result, draws: int) -> Iterator[str]:
    """Yield the rows of the controls, with the same norm as the merge they control."""
    for name, make in (
        ("gamma permuted", bench.trio.permuted),
        ("random direction", bench.trio.random_direction),
    ):
        made = [make(controlled.variant, seed) for seed in range(draws)]
        same = [bench.measure(control, controlled.gain, "test") for control in made]
        own = [bench.test(bench.choose(bench.sweep(control, GAINS))) for control in made]
        yield control_row(bench.trio, f"{name}, same gain", same)
        yield control_row(bench.trio, f"{name}, gain chosen for each", own)


def measure_all(bench: Bench, control_draws: int) -> Iterator[str]:
    """Run everything, yielding Markdown line by line."""
    trio = bench.trio
    exact = trio.variant("IP-Merging", "ip_merging", lambda_=1.0)
    gamma_max = trio.variant('`gamma_norm="max"`', "ip_merging", lambda_=1.0, gamma_norm="max")
    arithmetic = trio.variant("task arithmetic", "task_arithmetic", math_weight=1.0)
    rescaled = trio.variant(
        "ablation: rescale only", "ip_merging", lambda_=1.0, ablation="rescale_only"
    )
    selected = trio.variant(
        "ablation: select only", "ip_merging", lambda_=1.0, ablation="select_only"
    )
    exact_sweep = {
        variant.label: bench.sweep(variant, GAINS)
        for variant in selections(bench, exact, THRESHOLDS)
    }
    mllm = bench.measure(Variant("MLLM", {}), 0.0, "test")
    task_arithmetic = bench.test(bench.choose(bench.sweep(arithmetic, WEIGHTS)))
    max_sweep = bench.sweep(gamma_max, GAINS)
    best_max = bench.choose(max_sweep)
    tested_max = bench.test(best_max)
    ablations = [
        bench.test(
            bench.choose(
                result
                for chosen in selections(bench, variant, ABLATION_THRESHOLDS)
                for result in bench.sweep(chosen, ABLATION_GAINS)
            )
        )
        for variant in (selected, rescaled)
    ]
    best_exact = bench.choose(result for row in exact_sweep.values() for result in row)
    rows = [
        mllm,
        bench.measure(trio.swapped(), 1.0, "test"),
        task_arithmetic,
        bench.measure(exact, 1.0, "test"),
        bench.test(best_exact),
        tested_max,
        *ablations,
    ]
    yield from main_table(trio, rows)
    yield from controls(bench, tested_max, control_draws)
    yield ""
    yield from task_table([mllm, task_arithmetic, rows[4], tested_max])
    yield ""
    yield from comparisons(mllm, task_arithmetic, tested_max)
    yield ""
    yield from sweep_table(bench.start, exact_sweep, max_sweep)


def main_table(trio: Trio, rows: Iterable[Result]) -> Iterator[str]:
    """Yield a line per merge."""
    yield "| merge | gain | matrices | update / dM | image+math, % | perception, % |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        size = trio.relative_norm(row.variant, row.gain)
        yield (
            f"| {row.variant.label} | {row.gain:g} | {len(row.variant.updates)} | {size:.2f} "
            f"| {row.math} | {row.perception} |"
        )


def control_row(trio: Trio, name: str, draws: Sequence[Result]) -> str:
    """Return one line for all draws of a control together, with the highest named."""
    math = sum((draw.math for draw in draws), Score(0, 0))
    perception = sum((draw.perception for draw in draws), Score(0, 0))
    gains = ", ".join(f"{gain:g}" for gain in sorted({draw.gain for draw in draws}))
    sizes = sorted(
        {f"{trio.relative_norm(draw.variant, draw.gain):.2f}" for draw in draws}, key=float
    )
    highest = 100 * max(draw.math.share for draw in draws)
    return (
        f"| control: {name}, {len(draws)} draws | {gains} | {len(draws[0].variant.updates)} "
        f"| {', '.join(sizes)} | {math}, highest draw {highest:.1f} | {perception} |"
    )


def task_table(rows: Iterable[Result]) -> Iterator[str]:
    """Yield a line per task."""
    rows = list(rows)
    yield "| task, % | " + " | ".join(row.variant.label for row in rows) + " |"
    yield "|---" * (len(rows) + 1) + "|"
    for task in TASKS:
        yield f"| {task} | " + " | ".join(str(row.pooled([task])) for row in rows) + " |"


def sweep_table(
    start: Result, exact: dict[str, list[Result]], gamma_max: list[Result]
) -> Iterator[str]:
    """Yield math / perception on the validation draw for every gain."""
    yield (
        f"| image+math / perception, % (MLLM {_both(start)}) | "
        + " | ".join(f"lambda {gain:g}" for gain in GAINS)
        + " |"
    )
    yield "|---" * (len(GAINS) + 1) + "|"
    for label, results in [*exact.items(), (gamma_max[0].variant.label, gamma_max)]:
        count = len(results[0].variant.updates)
        yield f"| {label} ({count}) | " + " | ".join(_both(result) for result in results) + " |"


def _both(result: Result) -> str:
    return f"{100 * result.math.share:.1f} / {100 * result.perception.share:.1f}"


def comparisons(mllm: Result, arithmetic: Result, gamma_max: Result) -> Iterator[str]:
    """Yield the paired tests."""
    yield "Paired sign tests on the test draw (items only the first gets / only the second / p):"
    for label, first, second, tasks in (
        ("gamma max against task arithmetic, image+math", gamma_max, arithmetic, MATH_TASKS),
        ("gamma max against the MLLM, perception", gamma_max, mllm, PERCEPTION_TASKS),
        ("task arithmetic against the MLLM, perception", arithmetic, mllm, PERCEPTION_TASKS),
    ):
        a, b = ([x for task in tasks for x in row.outcomes[task]] for row in (first, second))
        result = sign_test(a, b)
        yield f"* {label}: {result.first_only} / {result.second_only} / {result.p_value:.2g}"


class Worked(Problem):
    """A text-only problem that requests a worked solution, in the format of the base's training."""

    @property
    def text_prompt(self) -> str:
        """The text-only question, with the marker WORKED instead of ASSISTANT."""
        return super().text_prompt.removesuffix("ASSISTANT:") + "WORKED:"


def words_table(folder: Path, asked: Sequence[Problem]) -> Iterator[str]:
    """Yield the results of both language models on the text-only math problems of a draw."""
    asked = [problem for problem in asked if problem.is_math]
    worked = [Worked(*(getattr(p, field.name) for field in fields(p))) for p in asked]
    yield "| text-only math, % | correct |"
    yield "|---|---|"
    for label, name, problems in (
        ("base, answer", "base", asked),
        ("base, WORKED solution", "base", worked),
        ("math model, answer", "math", asked),
    ):
        loaded = load_model(folder / name)
        tokenizer = ModelProcessor(folder / name, takes_images=False).tokenizer
        replies = answer_all(loaded.model, tokenizer, problems)
        yield f"| {label} | {score(problems, replies)} |"


def task_vectors(trio: Trio) -> str:
    """Report the norms of both task vectors relative to the base's matrices."""
    base = norm(m.base for m in trio.matrices.values())
    vision = norm(m.mllm - m.base for m in trio.matrices.values())
    return (
        f"Task vectors over the {len(trio.matrices)} matrices: ||dM|| is "
        f"{100 * trio.math_norm / base:.2f} % of ||W0||, ||dV|| is {100 * vision / base:.2f} %."
    )


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trio", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--n", type=int, default=PER_TASK["test"], help="test problems of a task")
    parser.add_argument("--n-validation", type=int, default=PER_TASK["validation"])
    parser.add_argument("--controls", type=int, default=5, help="draws of each control")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    counts: dict[Draw, int] = {"validation": arguments.n_validation, "test": arguments.n}
    bench = Bench(Trio(arguments.trio), counts, arguments.seed)
    lines = [task_vectors(bench.trio), ""]
    lines += [*words_table(arguments.trio, bench.draws["test"]), ""]
    lines += measure_all(bench, arguments.controls)
    skipped = {
        draw: sum(recurring(task, n, draw, arguments.seed) for task in TASKS)
        for draw, n in counts.items()
    }
    print(
        f"Measured {datetime.date.today()} on {os.cpu_count()} {platform.machine()} cores, one "
        f"thread, torch {torch.__version__}, {time.process_time() - started:.0f} processor "
        f"seconds: {counts['test']} problems of each task (test), {counts['validation']} "
        f"(validation); {skipped['test']} and {skipped['validation']} with a training drawing "
        f"are replaced by the next ones of their stream."
    )
    print()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
