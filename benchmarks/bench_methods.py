"""Evaluate every merge method on the demo models: accuracy, time, memory, change per layer.

    python benchmarks/bench_methods.py [--n 300] [--methods ties,tsv] [--samples 200]

Each method merges the models into a folder with default parameters in a separate process, with
`ipmerge merge`; the folder is then loaded and evaluated on the test draw of the demo problems
without training drawings. Additional rows have other settings, listed with the name. Intervals are
95 % Wilson intervals over all tasks of a kind. Seconds are those of the merge, memory is the peak
above that of a process that only imports torch. Methods that need data are calibrated first, which
is timed separately: the math model on text-only math problems, the MLLM on perception problems, so
that no image+math item is used; a second row also calibrates the MLLM on image+math problems with
answers, which no other method uses. The table compares defaults, not tuned settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed
sys.path.append(str(Path(__file__).parents[1] / "assets" / "demo"))

from draws import evaluation_problems
from report import machine, table

import ipmerge_core as ipm
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.evaluation.batched_answers import answer_all
from ipmerge_core.evaluation.scores import Score
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.loading import load_model
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.tasks.answers import is_right
from ipmerge_core.tasks.demo import MATH_TASKS, PERCEPTION_TASKS

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "assets" / "demo"
BETWEEN = (
    "import resource, subprocess, sys\n"
    "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode\n"
    "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


class Run(NamedTuple):
    """One row: a method, settings other than its defaults, and the MLLM's calibration samples."""

    method: str
    settings: Mapping[str, Any] = {}
    samples: str = "demo:perception"

    @property
    def name(self) -> str:
        """The method with its non-default settings."""
        extras = ", ".join(f"{key.rstrip('_')}={value}" for key, value in self.settings.items())
        if ipm.METHODS[self.method].data is not None:
            extras = SAMPLES[self.samples] + (f", {extras}" if extras else "")
        return f"`{self.method}` {extras}".strip()


SAMPLES = {
    "demo:perception": "MLLM calibrated on perception",
    "demo": "MLLM calibrated on perception and image+math with answers",
}
MORE = [
    Run("ip_merging", {"lambda_": 8.0}),
    Run("ip_merging", {"gamma_norm": "max", "lambda_": 4.0}),
    Run("linear", {"alpha": 0.5}),
    Run("task_arithmetic", {"math_weight": 1.0}),
    Run("layer_swap", {"last_kept_layer": 1, "alpha": 0.5}),
    Run("ties", {"math_weight": 1.0, "mllm_density": 1.0, "math_density": 0.5}),
    Run("ties", {"math_weight": 1.0, "density": 0.5, "anchor": "inject"}),
    Run("dare_linear", {"math_weight": 1.0, "mllm_density": 1.0, "math_density": 0.5}),
    Run("fisher", samples="demo"),
    Run("regmean", samples="demo"),
    Run("wudi", {"closed_form": True}),
]  # settings that the defaults do not cover on these models
HEAD = ("method", "image+math, %", "perception, %", "s", "MB", "change per layer, %")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=300, help="test problems of each task")
    parser.add_argument("--methods", default=",".join(ipm.METHODS), help="comma-separated")
    parser.add_argument("--samples", type=int, default=200, help="of each model's calibration")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; {arguments.n} problems of each task\n", flush=True)
    pair = ipm.open_pair(DEMO / "mllm", DEMO / "math", DEMO / "base")
    analysis = Analysis.load(DEMO / "pack.json.gz")
    chosen = arguments.methods.split(",")
    runs = [Run(name) for name in chosen] + [run for run in MORE if run.method in chosen]
    rows = [["none (the MLLM)", *scores(DEMO / "mllm", arguments.n), "", "", ""]]
    calibrations = []
    with tempfile.TemporaryDirectory() as folder:
        idle = peak_of(["-c", "import torch"])[1]
        for number, run in enumerate(runs):
            out = Path(folder) / str(number)
            settings = dict(run.settings)
            if ipm.METHODS[run.method].data is not None:
                settings["calibration"] = out.with_suffix(".calibration")
                calibrations.append(calibrate(run, arguments.samples, settings["calibration"]))
            seconds, peak = merge(plan_for(run.method, pair, analysis, settings), out)
            change = " ".join(f"{100 * share:.2f}" for share in change_per_layer(pair, out))
            memory = f"{(peak - idle) / 1e6:.0f}"
            found = scores(out, arguments.n)
            rows.append([run.name, *found, f"{seconds:.2f}", memory, change])
            print(f"{len(rows)}/{1 + len(runs)} {rows[-1]}", file=sys.stderr, flush=True)
    print(table(HEAD, rows))
    print("\n" + "\n".join(calibrations))
    print(f"\nWhole run: {sum(os.times()[:4]):.0f} processor seconds.")


def plan_for(name: str, pair: ModelPair, analysis: Analysis, more: Mapping[str, Any]) -> MergePlan:
    """Make a plan with the method's defaults but for these settings, on all matrices."""
    if ipm.METHODS[name].needs_analysis:
        return ipm.make_plan(analysis, name, similarity_threshold=0.0, **more)
    return ipm.make_plan(pair, name, **more)


def calibrate(run: Run, samples: int, out: Path) -> str:
    """Measure the models on demo problems, in a process of its own; return a line about it."""
    kind = str(ipm.METHODS[run.method].data)
    models = [f"--{role}={DEMO / role}" for role in ("mllm", "math", "base")]
    sources = [f"--mllm-samples={run.samples}", "--math-samples=demo:math"]
    options = ["--kind", kind, "--limit", str(samples), "-o", str(out), "--quiet"]
    started = perf_counter()
    code, _ = peak_of(["-m", "ipmerge_core", "calibrate", *models, *sources, *options])
    if code:
        raise SystemExit(f"the calibration {kind} failed")
    size = sum(file.stat().st_size for file in out.iterdir())
    return (
        f"* Calibration `{kind}`: {samples} demo problems of the training split for each model "
        f"(MLLM {run.samples}, math model demo:math), {perf_counter() - started:.0f} s with "
        f"imports, {size / 1e6:.1f} MB."
    )


def merge(plan: MergePlan, out: Path) -> tuple[float, int]:
    """Merge in a process of its own; return the merge's seconds and the process' peak bytes."""
    path = out.with_suffix(".plan.json")
    plan.save(path)
    command = ["-m", "ipmerge_core", "merge", str(path), "-o", str(out), "--quiet"]
    code, peak = peak_of(command)
    if code:
        raise SystemExit(f"the merge of {plan.method} failed")
    manifest = json.loads((out / "ipmerge.json").read_text())
    return float(manifest["seconds"]), peak


def peak_of(command: list[str]) -> tuple[int, int]:
    """Run Python with these arguments; return its exit code and its peak resident bytes.

    A small process stands between: what a parent holds counts as its child's peak.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    between = [sys.executable, "-c", BETWEEN, sys.executable, *command]
    said = subprocess.run(between, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    code, peak = said.stdout.split()
    return int(code), int(peak) * 1024


def scores(folder: Path, n: int) -> list[str]:
    """Ask a model the test draw; return image+math and perception."""
    loaded = load_model(folder)
    processor = ModelProcessor(folder, takes_images=loaded.takes_images).processor
    cells = []
    for tasks in (MATH_TASKS, PERCEPTION_TASKS):
        asked = evaluation_problems(tasks, n, "test")
        replies = answer_all(loaded.model, processor, asked)
        right = sum(is_right(p, reply) for p, reply in zip(asked, replies, strict=True))
        cells.append(str(Score(right, len(asked))))
    return cells


def change_per_layer(pair: ModelPair, out: Path) -> list[float]:
    """Measure ||W_merged - W_mllm|| / ||W_mllm|| over the matrices of each layer."""
    merged = Checkpoint.open(out)
    sums: dict[int, list[float]] = {}
    for matrix in pair.matrices:
        before = pair.mllm.read(matrix.mllm).double()
        after = merged.read(matrix.mllm).double()
        layer = sums.setdefault(matrix.layer, [0.0, 0.0])
        layer[0] += float((after - before).square().sum())
        layer[1] += float(before.square().sum())
    return [(change / norm) ** 0.5 for change, norm in sums.values()]


if __name__ == "__main__":
    main()
