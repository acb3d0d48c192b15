"""Measure the demo trio and print its table as Markdown.

    python assets/demo/evaluate.py [--trio assets/demo] [--n 300] [--permutations 5]

In: a trained trio. Out: on stdout, the table of assets/demo/README.md with 95 % Wilson intervals.
Gains are chosen on a validation draw (most image+math right, perception at most 2 points below the
MLLM's), scores are of a test draw with other handwriting.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

import torch  # noqa: E402
from variants import Trio, Variant  # noqa: E402

from ipmerge_core.evaluate import (  # noqa: E402
    MATH_TASKS,
    PERCEPTION_TASKS,
    TASKS,
    Problem,
    Score,
    is_right,
    problems,
    sign_test,
)

GAINS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)
WEIGHTS = (0.3, 0.5, 0.7, 1.0, 1.5)
CONTROL_GAINS = (4.0, 8.0, 16.0, 32.0)
THRESHOLDS = {"first": (0.0, 0.1, 0.2, 0.3), "max": (0.3,)}
ABLATION_THRESHOLDS = {"first": (0.1, 0.2), "max": (0.3,)}
ABLATION_GAINS = (0.5, 1.0, 2.0)
ALLOWED_LOSS = 0.02  # of perception, when a gain is chosen
VALIDATION_SEED, TEST_SEED = 1, 2


class Result(NamedTuple):
    """One merge at one gain, measured: right or wrong for every problem of a draw."""

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
    """A trio and the two draws it is measured on."""

    def __init__(self, trio: Trio, n_validation: int, n_test: int) -> None:
        self.trio = trio
        self.draws = {
            split: [p for task in TASKS for p in problems(task, n, seed, split)]
            for split, n, seed in (
                ("validation", n_validation, VALIDATION_SEED),
                ("test", n_test, TEST_SEED),
            )
        }
        self.start = self.measure(Variant("MLLM", {}), 0.0, "validation")

    def measure(self, variant: Variant, gain: float, split: str) -> Result:
        """Answer a draw and compare."""
        asked: list[Problem] = self.draws[split]
        outcomes: dict[str, list[bool]] = {task: [] for task in TASKS}
        replies = self.trio.answer(variant, gain, asked)
        for problem, reply in zip(asked, replies, strict=True):
            outcomes[problem.task].append(is_right(problem, reply))
        return Result(variant, gain, outcomes)

    def sweep(self, variant: Variant, gains: Iterable[float]) -> list[Result]:
        """Measure several gains on the validation draw."""
        return [self.measure(variant, gain, "validation") for gain in gains]

    def choose(self, results: Iterable[Result]) -> Result:
        """Return the best math among those that keep perception; of equals the first."""
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


def measure_all(trio: Trio, n_validation: int, n_test: int, permutations: int) -> Iterator[str]:
    """Run everything, yielding Markdown line by line."""
    bench = Bench(trio, n_validation, n_test)
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
    controls = [trio.permuted(seed) for seed in range(permutations)]
    same_gain = [bench.measure(control, best_max.gain, "test") for control in controls]
    own_gain = [
        bench.test(bench.choose(bench.sweep(control, CONTROL_GAINS))) for control in controls
    ]
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
    yield control_row("same gain", same_gain)
    yield control_row("gain chosen for each", own_gain)
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


def control_row(how: str, draws: Sequence[Result]) -> str:
    """Return one line for all permutations together, with the worst draw named."""
    math = sum((draw.math for draw in draws), Score(0, 0))
    perception = sum((draw.perception for draw in draws), Score(0, 0))
    gains = ", ".join(sorted({f"{draw.gain:g}" for draw in draws}))
    highest = 100 * max(draw.math.share for draw in draws)
    return (
        f"| control: gamma permuted, {how}, {len(draws)} draws | {gains} "
        f"| {len(draws[0].variant.updates)} | | {math}, highest draw {highest:.1f} "
        f"| {perception} |"
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


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trio", type=Path, default=HERE)
    parser.add_argument("--n", type=int, default=300, help="test problems of each task")
    parser.add_argument("--n-validation", type=int, default=100)
    parser.add_argument("--permutations", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    trio = Trio(arguments.trio)
    lines = list(measure_all(trio, arguments.n_validation, arguments.n, arguments.permutations))
    print(
        f"Measured {datetime.date.today()} on {os.cpu_count()} {platform.machine()} cores, one "
        f"thread, torch {torch.__version__}, {time.perf_counter() - started:.0f} s: "
        f"{arguments.n} problems of each task (test), {arguments.n_validation} (validation)."
    )
    print()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
