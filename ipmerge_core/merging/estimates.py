"""Estimate disk space, memory and time of a merge or an analysis from headers.

In: a pair, and the plan of a merge or the options of an analysis. Out: an `Estimate`, which
includes a cheaper alternative if there is one, or an `AnalysisEstimate`. The command line, the app
and its API all show this estimate. Times are approximate, from the measured rates below.
"""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from typing import NamedTuple

import psutil

from ipmerge_core.analysis.analyse import comparing_cost, working_set
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.errors import RunError
from ipmerge_core.merging.parts import EXTRAS, Chosen, chosen, input_sizes, work_of
from ipmerge_core.merging.whole_model import is_due
from ipmerge_core.methods import find_method
from ipmerge_core.models.pairing import MatrixMatch, ModelPair
from ipmerge_core.models.shared_tokens import ROWS
from ipmerge_core.models.writer import check_output, layout_bytes, run_folders
from ipmerge_core.planning.plan import MergePlan, reopen
from ipmerge_core.runtime.devices import is_cpu, resolve_device
from ipmerge_core.runtime.paths import existing_parent

# Bytes per second. Between a SATA disk (0.5 GB/s) and files in memory (2 GB/s, bench_merge.py).
DISK_RATE, HUB_RATE = 1e9, 50e6
TENSOR_SECONDS = 5e-4  # to open, write and read back one stored tensor


class Rate(NamedTuple):
    """What a method takes on one CPU core: seconds per matrix, and its work per second.

    The work of every task vector is m n elements, times min(m, n) where the method is matrixwise.
    """

    per_matrix: float
    work: float


# As benchmarks/bench_estimates.py prints them: one core of a 2-core x86_64 machine, torch 2.13.
RATES = {
    "ip_merging": Rate(3.8e-3, 3.2e9),
    "linear": Rate(4.1e-5, 2.9e9),
    "task_arithmetic": Rate(2.7e-5, 1.6e9),
    "layer_swap": Rate(2.8e-5, 2.3e9),
    "ties": Rate(1.2e-3, 1.8e8),
    "sce": Rate(8.6e-5, 3.3e8),
    "dare_linear": Rate(2.0e-4, 1.7e8),
    "dare_ties": Rate(1.9e-4, 1.5e8),
    "della": Rate(0.0, 3.3e7),
    "breadcrumbs": Rate(1.7e-3, 2.1e8),
    "fisher": Rate(4.7e-5, 2.7e8),
    "regmean": Rate(1.2e-3, 6.5e9),
    "tsv": Rate(7.6e-3, 2.7e9),
    "iso_c": Rate(2.6e-3, 5.8e9),
    "iso_cts": Rate(1.1e-2, 9.7e8),
    "knots_ties": Rate(7.0e-3, 3.2e9),
    "wudi": Rate(9.0e-3, 1.5e9),  # its closed form
    "metagpt": Rate(1.0e-4, 4.9e8),
    "nan": Rate(1.3e-4, 7.2e8),
    "slerp": Rate(1.6e-4, 6.0e8),
    "nuslerp": Rate(2.7e-4, 2.7e8),
    "karcher": Rate(2.2e-4, 6.6e8),
    "multislerp": Rate(2.2e-4, 6.6e8),
    "model_stock": Rate(2.2e-4, 6.6e8),
    "ram": Rate(1.9e-4, 1.5e8),
    "star": Rate(4.1e-3, 3.4e9),
}
STEP_RATE = Rate(2.0e-4, 5.2e10)  # of one step of an iterated method; work is `step_cost`
# Per task vector on one core, as printed by benchmarks/bench_analysis.py.
ANALYSIS_RATE = 3e9  # m n min(m, n) per second, exact
QUICK_RATE = 6e6  # elements per second, leading directions only
# Rates of one H200, as printed in benchmarks/README.md; other GPUs can differ by several times.
GPU_DECOMPOSING_RATE = 1.7e12  # m n min(m, n) per second, exact analyses and merges
GPU_QUICK_RATE = 3e9  # elements per second, leading directions only
GPU_STEP_RATE = 1e13  # operations per second of an iterated method; rough, not measured
RECORD_BYTES = 1400  # per record of a pack, gzipped
LONG = 600  # seconds from which on faster ways are named


class Estimate(NamedTuple):
    """Estimated resources of a merge. Sizes in bytes, time in seconds."""

    nbytes_read: int
    nbytes_written: int
    nbytes_free: int
    n_merged: int
    n_copied: int
    largest_matrix: int  # one merged matrix in fp32; working memory is a few times this size
    nbytes_memory: int = 0  # peak, excluding the interpreter
    nbytes_fetched: int = 0  # downloaded
    nbytes_whole: int = 0  # size of the complete repositories
    seconds: float = 0.0  # rough, on the device; for a CPU, on one core
    advice: str = ""
    device: str = "cpu"


def estimate_merge(plan: MergePlan, out: str | Path, *, device: str = "cpu") -> Estimate:
    """Estimate bytes, memory and time from headers. Raises: as `iter_merge` before any work.

    The sibling check, which reads a few rows, is not run: see `require_common_base`.
    """
    device = resolve_device(device)
    return estimate_pair(plan, reopen(plan), check_output(out), device)


def estimate_pair(plan: MergePlan, pair: ModelPair, out: Path, device: str = "cpu") -> Estimate:
    """Estimate disk space, memory and time of a plan's merge on a torch device."""
    merged = chosen(plan, pair)
    held = [input_sizes(pair, matrix, experts) for matrix, experts in merged]
    outside = pair.mllm.nbytes - sum(pair.mllm.spec(matrix.mllm).nbytes for matrix, _ in merged)
    largest = 4 * max((prod(matrix.shape) for matrix, _ in merged), default=0)
    remote = {role: model for role, model in pair.roles() if model.files.remote}
    need = Estimate(
        nbytes_read=outside + sum(sum(sizes) for sizes in held),
        nbytes_written=layout_bytes(pair.mllm),
        nbytes_free=shutil.disk_usage(existing_parent(out)).free,
        n_merged=len(merged),
        n_copied=len(pair.mllm.tensors) - len(work_of(plan, pair)),
        largest_matrix=largest,
        nbytes_memory=2 * max((sum(sizes) for sizes in held), default=0) + 3 * largest + (1 << 28),
        nbytes_fetched=_fetched(pair, held, outside),
        nbytes_whole=sum(model.nbytes for model in remote.values()),
        device=device,
    )
    seconds = _seconds(plan, pair, need, merged)
    return need._replace(seconds=seconds, advice=_advice(plan, pair, need, seconds))


class AnalysisEstimate(NamedTuple):
    """Estimated resources of an analysis. Sizes in bytes, time in seconds."""

    n_matrices: int
    nbytes_read: int
    nbytes_fetched: int  # downloaded
    nbytes_memory: int  # largest matrix and read-ahead, excluding the interpreter
    nbytes_memory_free: int
    nbytes_written: int
    seconds: float  # rough, on the device; for a CPU, on one core
    device: str = "cpu"


def estimate_analysis(pair: ModelPair, options: Options, device: str = "cpu") -> AnalysisEstimate:
    """Estimate downloads, memory and time of an analysis on a torch device.

    Only decoder matrices are read.
    """
    on_cpu = is_cpu(device)
    experts = range(len(pair.math))
    held = [input_sizes(pair, matrix, experts) for matrix in pair.matrices]
    nbytes_read, fetched = sum(sum(sizes) for sizes in held), _fetched(pair, held, 0)
    task_vectors = 1 + len(pair.math)
    if options.quick:
        work = sum(prod(matrix.shape) for matrix in pair.matrices)
        rate = QUICK_RATE if on_cpu else GPU_QUICK_RATE
    else:
        work = sum(comparing_cost(matrix.shape) for matrix in pair.matrices)
        rate = ANALYSIS_RATE if on_cpu else GPU_DECOMPOSING_RATE
    seconds = task_vectors * work / rate
    moved = (nbytes_read - fetched) / DISK_RATE + fetched / HUB_RATE
    return AnalysisEstimate(
        n_matrices=len(pair.matrices),
        nbytes_read=nbytes_read,
        nbytes_fetched=fetched,
        nbytes_memory=max(working_set(pair, matrix, options) for matrix in pair.matrices)
        + 2 * max(sum(sizes) for sizes in held),
        nbytes_memory_free=psutil.virtual_memory().available,
        nbytes_written=RECORD_BYTES * len(pair.matrices) * len(pair.math),
        seconds=max(seconds, moved),  # the next matrix is read while one is decomposed
        device=device,
    )


def merging_cost(shape: tuple[int, ...]) -> float:
    """Return the relative cost of merging one matrix, m n min(m, n), for load balancing."""
    return float(prod(shape) * min(shape, default=0))


def check_space(pair: ModelPair, out: Path) -> None:
    """Check that the result fits on the disk. Raises: RunError."""
    if run_folders(out).run.exists():
        return  # a resume: the files already have their full size
    need, free = layout_bytes(pair.mllm), shutil.disk_usage(existing_parent(out)).free
    if need > free:
        raise RunError(
            f"The merged model needs {need / 1e9:.2f} GB in '{out.parent}', but only "
            f"{free / 1e9:.2f} GB are free. Free some space or choose another output folder."
        )


def _fetched(pair: ModelPair, held: list[list[int]], outside: int) -> int:
    """Return the bytes to download: only the required tensors of hub models."""
    mllm, own, base, math = (sum(sizes[i] for sizes in held) for i in range(4))
    hub = {role: model.files.remote for role, model in pair.roles()}
    experts_on_hub = any(value for role, value in hub.items() if role.startswith("math"))
    return (
        (outside + mllm) * hub["mllm"]
        + base * hub["base"]
        + own * hub.get("base of the mllm", False)
        + math * experts_on_hub
    )


def _seconds(plan: MergePlan, pair: ModelPair, need: Estimate, merged: list[Chosen]) -> float:
    moved = (need.nbytes_read + need.nbytes_written) / DISK_RATE + need.nbytes_fetched / HUB_RATE
    moved += TENSOR_SECONDS * len(pair.mllm.tensors)
    if is_cpu(need.device):
        return moved + sum(_seconds_of(plan, *each) for each in merged) + _first_pass(plan, merged)
    method = find_method(plan.method)
    if not method.matrixwise:
        return moved  # a GPU merges elements faster than they are read
    costs = [(matrix.shape, 1 + len(experts)) for matrix, experts in merged]
    if (steps := _steps(plan)) is not None:
        return moved + steps * sum(step_cost(*cost) for cost in costs) / GPU_STEP_RATE
    return moved + sum(merging_cost(s) * count for s, count in costs) / GPU_DECOMPOSING_RATE


def _seconds_of(plan: MergePlan, matrix: MatrixMatch, experts: tuple[int, ...]) -> float:
    """Seconds that merging one matrix takes on one CPU core."""
    method, count = find_method(plan.method), 1 + len(experts)
    if matrix.module in EXTRAS and method.vectors is not None:
        method = find_method("task_arithmetic")
    elif (steps := _steps(plan)) is not None:
        cost = STEP_RATE.per_matrix + step_cost(matrix.shape, count) / STEP_RATE.work
        return steps * cost
    calls = matrix.shape[0] if matrix.module == ROWS else 1  # rows are merged one by one
    work = merging_cost(matrix.shape) if method.matrixwise else prod(matrix.shape)
    rate = RATES[method.name]
    return calls * rate.per_matrix + count * work / rate.work


def _steps(plan: MergePlan) -> int | None:
    """Count the steps of an iterated method; None for others, and for a closed form."""
    steps = plan.parameters.get("iterations")
    return None if steps is None or plan.parameters.get("closed_form") else int(steps)


def step_cost(shape: tuple[int, ...], models: int) -> float:
    """Floating point operations of one step of an iterated method on one matrix."""
    m, n = shape
    return 2.0 * m * n * min(n, 2 * models * m)


def _first_pass(plan: MergePlan, merged: list[Chosen]) -> float:
    """Seconds of the passes over all matrices that come before the merge."""
    statistic = find_method(plan.method).statistic
    if statistic is None or not is_due(plan):
        return 0.0
    elements = sum(prod(matrix.shape) * (1 + len(experts)) for matrix, experts in merged)
    return statistic.passes * elements / RATES[plan.method].work


def _advice(plan: MergePlan, pair: ModelPair, need: Estimate, seconds: float) -> str:
    """Name the cheaper ways, where there are some."""
    if need.nbytes_written > need.nbytes_free:
        return (
            f"The result needs {need.nbytes_written / 1e9:.1f} GB and {need.nbytes_free / 1e9:.1f} "
            f"GB are free. Save the plan and run `ipmerge merge plan.json -o FOLDER` on a machine "
            f"with more disk space."
        )
    advice = []
    if need.nbytes_fetched:
        advice.append(
            f"The merge downloads {need.nbytes_fetched / 1e9:.1f} GB and stores only the result. "
            f"Downloading the complete repositories needs {need.nbytes_whole / 1e9:.1f} GB of disk "
            f"space, and is faster from the second merge of this pair on."
        )
    method = find_method(plan.method)
    if is_cpu(need.device) and method.matrixwise and seconds > LONG and need.n_merged:
        advice.append(
            f"{method.label} decomposes or iterates on every selected matrix: it is faster on a "
            f"GPU, or under `torchrun --nproc_per_node N -m ipmerge_core merge` on several cores "
            f"or devices."
        )
    return " ".join(advice)
