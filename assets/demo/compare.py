"""Compare the two sets of demo models, and write the tables of docs/two-demos.md.

    python assets/demo/compare.py [--limit 40] [--write]

In: the packs and models of both recipes. Out: for each, the size and the rank of the task vectors,
sweeps of IP-Merging and of task arithmetic, and the ablation, evaluated in memory on the same items
of the demo task. Prints Markdown; with --write, replaces the tables of the page.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

import torch  # noqa: E402
from recipes import ELICITED, TAUGHT, Recipe  # noqa: E402

import ipmerge_core as ipm  # noqa: E402
from ipmerge_core.evaluation.evaluate import EvaluationSettings  # noqa: E402
from ipmerge_core.evaluation.points import Axis  # noqa: E402
from ipmerge_core.evaluation.report import Report  # noqa: E402
from ipmerge_core.evaluation.sweeps import Sweep, iter_ablation, iter_sweep  # noqa: E402
from ipmerge_core.methods.declarations import drained  # noqa: E402
from ipmerge_core.runtime.atomic import write_whole  # noqa: E402
from ipmerge_core.tasks.registry import find_tasks  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "two-demos.md"
START, END = "<!-- printed by `python assets/demo/compare.py --write` -->", "<!-- end -->"
GAINS = (1.0, 4.0, 8.0, 16.0)
WEIGHTS = (0.3, 0.5, 0.7, 1.0)
SWEEPS = {
    "IP-Merging, all matrices": (Axis("lambda_", GAINS), {"similarity_threshold": 0.0}),
    "IP-Merging, S >= 0.1": (Axis("lambda_", GAINS), {"similarity_threshold": 0.1}),
    '`gamma_norm="max"`, all matrices': (
        Axis("lambda_", GAINS),
        {"similarity_threshold": 0.0, "gamma_norm": "max"},
    ),
    "task arithmetic": (Axis("math_weight", WEIGHTS), {"method": "task_arithmetic"}),
}
ABLATED = {"similarity_threshold": 0.0, "lambda_": 8.0}


def tables(recipes: Sequence[Recipe], limit: int) -> Iterator[str]:
    """Yield all tables, line by line."""
    packs = {r.name: ipm.Analysis.load(r.folder / r.pack) for r in recipes}
    yield (
        f"Printed {datetime.date.today()} on {os.cpu_count()} {platform.machine()} cores, one "
        f"thread, torch {torch.__version__}; {limit} items of each of nine skills, "
        f"95 % intervals."
    )
    yield ""
    yield from vectors(packs)
    settings, tasks = EvaluationSettings(limit=limit), find_tasks(["demo"])
    for title, (axis, fixed) in SWEEPS.items():
        yield ""
        found = {
            name: drained(iter_sweep(analysis, [axis], tasks, settings, **fixed))
            for name, analysis in packs.items()
        }
        yield from sweep_table(title, axis, found)
    yield ""
    ablations = {
        name: drained(iter_ablation(analysis, tasks, settings, seeds=(0,), **ABLATED))
        for name, analysis in packs.items()
    }
    yield from ablation_table(ablations)


def vectors(packs: dict[str, ipm.Analysis]) -> Iterator[str]:
    """Yield the size and the rank of the task vectors."""
    yield f"| task vectors | {' | '.join(packs)} |"
    yield "|---" * (len(packs) + 1) + "|"
    yield row("norm of the math model's, % of the base", packs, math_norm)
    yield row("norm of the MLLM's, % of the base", packs, mllm_norm)
    yield row("norm ratio, math / MLLM", packs, lambda a: f"{math_size(a) / mllm_size(a):.2f}")
    yield row("effective rank of the math model's, median of 28 matrices", packs, rank)
    yield row("directions with 90 % of its energy, median", packs, energy)
    yield row("first similarity, median (largest)", packs, similarity)
    yield row("norm of IP-Merging's update at lambda 1, % of the math model's", packs, update)


def row(label: str, packs: dict[str, ipm.Analysis], of: object) -> str:
    """Return one line of a table; `of` describes an analysis."""
    assert callable(of)
    return f"| {label} | {' | '.join(of(analysis) for analysis in packs.values())} |"


def base_size(analysis: ipm.Analysis) -> float:
    """Return the norm of the base's matrices."""
    return float(sum(record.base_norm2 for record in analysis.records) ** 0.5)


def math_size(analysis: ipm.Analysis) -> float:
    """Return the norm of the math model's task vector."""
    return float(sum(record.math_norm2 for record in analysis.records) ** 0.5)


def mllm_size(analysis: ipm.Analysis) -> float:
    """Return the norm of the MLLM's task vector."""
    return float(sum(record.mllm_norm2 for record in analysis.records) ** 0.5)


def math_norm(analysis: ipm.Analysis) -> str:
    """Describe the norm of the math model's task vector."""
    return f"{100 * math_size(analysis) / base_size(analysis):.2f}"


def mllm_norm(analysis: ipm.Analysis) -> str:
    """Describe the norm of the MLLM's task vector."""
    return f"{100 * mllm_size(analysis) / base_size(analysis):.2f}"


def rank(analysis: ipm.Analysis) -> str:
    """Describe the effective rank of the math model's task vector."""
    found = [r.math_ranks["effective"] for r in analysis.records if r.math_ranks]
    return f"{statistics.median(found):.1f}"


def energy(analysis: ipm.Analysis) -> str:
    """Describe how many directions hold 90 % of the energy."""
    found = [r.math_ranks["energy"] for r in analysis.records if r.math_ranks]
    return f"{statistics.median(found):.0f}"


def similarity(analysis: ipm.Analysis) -> str:
    """Describe the similarities."""
    found = [record.similarity["first"] for record in analysis.records]
    return f"{statistics.median(found):.2f} ({max(found):.2f})"


def update(analysis: ipm.Analysis) -> str:
    """Describe the size of the update of IP-Merging."""
    size = sum(record.updates["sum"].norm2 for record in analysis.records) ** 0.5
    return f"{100 * size / math_size(analysis):.1f}"


def sweep_table(title: str, axis: Axis, found: dict[str, Sweep]) -> Iterator[str]:
    """Yield the scores of a sweep, a line per value."""
    name = axis.parameter.rstrip("_").replace("_", " ")
    heads = [f"{part}, {recipe}, %" for recipe in found for part in ("math", "perception")]
    yield f"| {title}: {name} | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    points = next(iter(found.values())).points
    for number, point in enumerate(points):
        label = "unmerged" if number == 0 else f"{axis.values[number - 1]:g}"
        yield f"| {label} | {' | '.join(cells(found, number))} |"
        assert all(sweep.points[number].values == point.values for sweep in found.values())


def ablation_table(found: dict[str, Sweep]) -> Iterator[str]:
    """Yield the scores of the ablation, a line per part."""
    heads = [f"{part}, {recipe}, %" for recipe in found for part in ("math", "perception")]
    settings = ", ".join(f"{name.rstrip('_')} {value:g}" for name, value in ABLATED.items())
    yield f"| ablation of IP-Merging ({settings}) | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for number, point in enumerate(next(iter(found.values())).points):
        label = point.label.partition(" (math weight")[0]
        yield f"| {label} | {' | '.join(cells(found, number))} |"


def cells(found: dict[str, Sweep], number: int) -> Iterator[str]:
    """Yield the math and the perception score of a point in every set."""
    for sweep in found.values():
        for part in ("math", "perception"):
            yield score(sweep.report, sweep.points[number].label, part)


def score(report: Report, subject: str, part: str) -> str:
    """Return a score with its interval."""
    found = report.result(subject, "demo").part(part)
    assert found is not None, "the demo task has both parts"
    return f"{100 * found.share:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def write(lines: Sequence[str]) -> None:
    """Replace the tables of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    write_whole(PAGE, f"{before}{START}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


def main() -> None:
    """Parse the arguments, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=40, help="items of each skill")
    parser.add_argument("--write", action="store_true", help="replace the tables of the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = list(tables((ELICITED, TAUGHT), arguments.limit))
    print("\n".join(lines))
    if arguments.write:
        write(lines)


if __name__ == "__main__":
    main()
