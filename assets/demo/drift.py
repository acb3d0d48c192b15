"""Compare DRIFT with plain fine-tuning and merges on the demo models, and write docs/drift.md.

    python assets/demo/drift.py [--seeds 3] [--n 100] [--steps 16,24] [--page docs/drift.md]

In: the demo models. Out: tables on stdout, or in the part of the page after its mark. Every run
trains on image+math problems answered by their chain of thought; the seed determines which of them
and in what order. Scores are of the test draw, with other handwriting and without training
drawings. Nothing is tuned: one learning rate for all, and strength 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

import torch  # noqa: E402
from draws import evaluation_problems  # noqa: E402

from ipmerge_core.evaluation.batched_answers import answer_all  # noqa: E402
from ipmerge_core.evaluation.scores import Score, sign_test  # noqa: E402
from ipmerge_core.finetuning.baselines import BASELINES, iter_baselines  # noqa: E402
from ipmerge_core.finetuning.settings import (  # noqa: E402
    RULE_NAMES,
    DriftSettings,
    PriorSettings,
    TrainingSettings,
)
from ipmerge_core.finetuning.train import DriftRequest, DriftStep, iter_drift  # noqa: E402
from ipmerge_core.inference.encoding import ModelProcessor  # noqa: E402
from ipmerge_core.inference.loading import load_weights  # noqa: E402
from ipmerge_core.merging.merge import merge  # noqa: E402
from ipmerge_core.models.checkpoint import Checkpoint  # noqa: E402
from ipmerge_core.models.pairing import open_pair  # noqa: E402
from ipmerge_core.planning.plan import make_plan  # noqa: E402
from ipmerge_core.tasks.answers import is_right  # noqa: E402
from ipmerge_core.tasks.demo import MATH_TASKS, PERCEPTION_TASKS, TASKS  # noqa: E402

MARK = "<!-- measured by `python assets/demo/drift.py --page docs/drift.md` -->\n"
LEARNING_RATE, BATCH, ROWS = 1e-4, 8, 512
LABELS = {"none": "SFT", **{rule: f"DRIFT, {rule}" for rule in RULE_NAMES if rule != "none"}}
MERGED = "task-arithmetic"  # the merge that is fine-tuned


class Outcome(NamedTuple):
    """Correct or not, by problem, of each kind of task, and the last point of the curves."""

    math: list[bool]
    perception: list[bool]
    last: DriftStep | None = None


class Bench:
    """The evaluation problems, and a folder for the models."""

    def __init__(self, n: int, folder: Path) -> None:
        self.folder = folder
        self.problems = evaluation_problems(TASKS, n, "test")
        self.processor = ModelProcessor(HERE / "mllm", takes_images=True).processor

    def measure(self, model: Path, last: DriftStep | None = None) -> Outcome:
        """Answer all problems with a model."""
        loaded = load_weights(Checkpoint.open(model)).eval()
        loaded.generation_config.eos_token_id = self.processor.tokenizer.eos_token_id
        replies = answer_all(loaded, self.processor, self.problems)
        right = [is_right(p, r) for p, r in zip(self.problems, replies, strict=True)]
        found = {
            kind: [ok for p, ok in zip(self.problems, right, strict=True) if p.task in tasks]
            for kind, tasks in (("math", MATH_TASKS), ("perception", PERCEPTION_TASKS))
        }
        return Outcome(found["math"], found["perception"], last)

    def train(self, rule: str, steps: int, seed: int, start: Path) -> Outcome:
        """Fine-tune a model and measure the result."""
        out = self.folder / "tuned"
        settings = DriftSettings(
            PriorSettings(rule=rule),
            TrainingSettings(
                learning_rate=LEARNING_RATE,
                max_steps=steps,
                batch_size=BATCH,
                seed=seed,
                log_every=steps,
                save_every=steps,
            ),
        )
        request = DriftRequest(
            str(start), str(HERE / "math"), "demo", str(out), settings, None, ROWS
        )
        points = [s for s in iter_drift(request, device="cpu") if s.action == "trained"]
        found = self.measure(out, points[-1])
        shutil.rmtree(out)
        return found


def merges(bench: Bench) -> Iterator[tuple[str, Outcome]]:
    """Yield the merges of the paper's comparison, and task arithmetic with the demo's weights."""
    pair = open_pair(HERE / "mllm", HERE / "math", HERE / "base")
    for _ in iter_baselines(pair, bench.folder / "merge", list(BASELINES)):
        pass
    for name in BASELINES:
        yield f"{name}, the paper's parameters", bench.measure(bench.folder / f"merge-{name}")
    plan = make_plan(pair, method="task_arithmetic", math_weight=1.0)
    merge(plan, bench.folder / "arithmetic")
    yield "task-arithmetic, weights 1 and 1", bench.measure(bench.folder / "arithmetic")


def score(outcomes: Sequence[Sequence[bool]]) -> str:
    """Return the mean over seeds with the interval of its items, and the seeds' own values."""
    n = len(outcomes[0])
    mean = Score(round(sum(map(sum, outcomes)) / len(outcomes)), n)
    seeds = " ".join(f"{100 * sum(each) / n:.1f}" for each in outcomes)
    return f"{mean}" + (f"; seeds {seeds}" if len(outcomes) > 1 else "")


def row(label: str, steps: int | str, outcomes: Sequence[Outcome]) -> str:
    """Return one line of the table."""
    cells = [label, str(steps), *(score([getattr(o, k) for o in outcomes]) for k in _KINDS)]
    last = [outcome.last for outcome in outcomes if outcome.last is not None]
    for name, form in (("loss", ".3f"), ("to_start", ".2%"), ("to_expert", ".2%")):
        values = [getattr(step, name) for step in last]
        cells.append(f"{sum(values) / len(values):{form}}" if values else "")
    cosines = [step.moved_cosine for step in last]
    cells.append(f"{sum(cosines) / len(cosines):.2f}" if cosines else "")
    return f"| {' | '.join(cells)} |"


_KINDS = ("math", "perception")


def tables(bench: Bench, budgets: Sequence[int], seeds: int) -> Iterator[str]:
    """Yield Markdown line by line."""
    yield (
        "| model | steps | image+math, % | perception, % | loss | moved | to the expert "
        "| cos(change, D) |"
    )
    yield "|---" * 8 + "|"
    yield row("MLLM", 0, [bench.measure(HERE / "mllm")])
    for label, outcome in merges(bench):
        yield row(label, 0, [outcome])
    tests = []
    for steps in budgets:
        runs = {}
        for rule, label in LABELS.items():
            runs[label] = [bench.train(rule, steps, s, HERE / "mllm") for s in range(seeds)]
            yield row(label, steps, runs[label])
        start = bench.folder / f"merge-{MERGED}"
        after = [bench.train("none", steps, s, start) for s in range(seeds)]
        yield row(f"{MERGED}, then SFT", steps, after)
        tests += list(comparisons(steps, runs))
    yield ""
    yield (
        "Paired sign tests against SFT, over the items of all seeds (items only DRIFT gets / only "
        "SFT / p; the items of the seeds are the same problems, so p is optimistic):"
    )
    yield ""
    yield from tests


def comparisons(steps: int, runs: dict[str, list[Outcome]]) -> Iterator[str]:
    """Yield a line per rule with its paired tests against plain fine-tuning."""
    for label, outcomes in runs.items():
        if label == LABELS["none"]:
            continue
        parts = []
        for kind in _KINDS:
            ours, theirs = (
                [ok for outcome in each for ok in getattr(outcome, kind)]
                for each in (outcomes, runs[LABELS["none"]])
            )
            found = sign_test(ours, theirs)
            parts.append(f"{kind} {found.first_only} / {found.second_only} / {found.p_value:.2g}")
        yield f"* {label}, {steps} steps: {'; '.join(parts)}"


def main() -> None:
    """Parse the arguments, measure, print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=100, help="test problems of a task")
    parser.add_argument("--steps", default="16,24", help="optimizer steps, comma-separated")
    parser.add_argument("--page", type=Path, help="replace the measured part of this page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    budgets = [int(each) for each in arguments.steps.split(",")]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for line in tables(Bench(arguments.n, Path(folder)), budgets, arguments.seeds):
            print(line, flush=True)
            lines.append(line)
    head = (
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {os.cpu_count()} {platform.machine()} cores, "
        f"one thread, torch {torch.__version__}, {time.process_time() - started:.0f} processor "
        f"seconds: {arguments.n} test problems of each task, {arguments.seeds} seeds of the "
        f"training data, {BATCH} conversations per step, learning rate {LEARNING_RATE:g}, "
        f"strength 1, attention and MLP weights."
    )
    if arguments.page:
        text = arguments.page.read_text("utf-8")
        assert MARK in text, f"{arguments.page} has no line {MARK}"
        written = "\n".join([text.partition(MARK)[0] + MARK, head, "", *lines]) + "\n"
        arguments.page.write_text(written, "utf-8")
    else:
        print(f"\n{head}")


if __name__ == "__main__":
    main()
