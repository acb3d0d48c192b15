"""Estimate disk space, memory and time of a merge or an analysis from headers.

In: a pair, and the plan of a merge or the options of an analysis. Out: an `Estimate`, which
includes a cheaper alternative if there is one, or an `AnalysisEstimate`. Times are rough: they use
the rates of a typical machine, listed below.
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
from ipmerge_core.merging.parts import Chosen, chosen, input_sizes, work_of
from ipmerge_core.methods import find_method
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.models.writer import layout_bytes, place_of
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.runtime.devices import is_cpu

DISK_RATE, HUB_RATE = 300e6, 50e6  # bytes per second
ELEMENT_RATE = 300e6  # elements per second that an elementwise method merges on one CPU core
SVD_RATE = 8e9 / 20  # m n min(m, n) per second on one core: 20 operations each at 8 GFLOP/s
# Per task vector on one core, as printed by benchmarks/bench_analysis.py.
ANALYSIS_RATE = 3e9  # m n min(m, n) per second, exact
QUICK_RATE = 6e6  # elements per second, leading directions only
# Rates of one H200, as printed in benchmarks/README.md; other GPUs can differ by several times.
GPU_DECOMPOSING_RATE = 1.7e12  # m n min(m, n) per second, exact analyses and merges
GPU_QUICK_RATE = 3e9  # elements per second, leading directions only
# Floating point operations per second of one step of an iterative method; rough.
CPU_STEP_RATE, GPU_STEP_RATE = 8e9, 1e13
RECORD_BYTES = 1400  # per record of a pack, gzipped


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
    seconds = _seconds(plan, need, merged)
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
    if place_of(out).run.exists():
        return  # a resume: the files already have their full size
    need, free = layout_bytes(pair.mllm), shutil.disk_usage(existing_parent(out)).free
    if need > free:
        raise RunError(
            f"The merged model needs {need / 1e9:.2f} GB in '{out.parent}', but only "
            f"{free / 1e9:.2f} GB are free. Free some space or choose another output folder."
        )


def existing_parent(out: Path) -> Path:
    """Return the closest existing parent of `out`, or `out` itself."""
    return next(folder for folder in (out, *out.parents) if folder.exists())


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


def _seconds(plan: MergePlan, need: Estimate, merged: list[Chosen]) -> float:
    moved = (need.nbytes_read + need.nbytes_written) / DISK_RATE + need.nbytes_fetched / HUB_RATE
    method, on_cpu = find_method(plan.method), is_cpu(need.device)
    if method.matrixwise:
        work = sum(merging_cost(matrix.shape) * (1 + len(experts)) for matrix, experts in merged)
        seconds = work / (SVD_RATE if on_cpu else GPU_DECOMPOSING_RATE)
        operations = _step_operations(plan, merged) if method.stepwise else 0.0
        return moved + seconds + operations / (CPU_STEP_RATE if on_cpu else GPU_STEP_RATE)
    if on_cpu:
        return moved + sum(prod(matrix.shape) for matrix, _ in merged) / ELEMENT_RATE
    return moved  # a GPU merges elements faster than they are read


def _step_operations(plan: MergePlan, merged: list[Chosen]) -> float:
    """Count the floating point operations of an iterative method."""
    steps = float(plan.parameters.get("iterations") or 0)
    return steps * sum(
        2.0 * m * n * min(n, 2 * (1 + len(experts)) * m)
        for (m, n), experts in ((matrix.shape, experts) for matrix, experts in merged)
    )


def _advice(plan: MergePlan, pair: ModelPair, need: Estimate, seconds: float) -> str:
    """Return a cheaper alternative, if there is one."""
    if need.nbytes_written > need.nbytes_free:
        return (
            f"The result needs {need.nbytes_written / 1e9:.1f} GB and {need.nbytes_free / 1e9:.1f} "
            f"GB are free. Save the plan and run `ipmerge merge plan.json -o FOLDER` on a machine "
            f"with more disk space."
        )
    if need.nbytes_fetched:
        return (
            f"The merge downloads {need.nbytes_fetched / 1e9:.1f} GB and stores only the result. "
            f"Downloading the complete repositories needs {need.nbytes_whole / 1e9:.1f} GB of disk "
            f"space, and is faster from the second merge of this pair on."
        )
    method = find_method(plan.method)
    if is_cpu(need.device) and method.matrixwise and seconds > 1800 and need.n_merged:
        return (
            f"{method.label} decomposes every selected matrix, which is many times faster on a "
            f"GPU, or on several devices with `torchrun --nproc_per_node N -m ipmerge_core merge`."
        )
    return ""
