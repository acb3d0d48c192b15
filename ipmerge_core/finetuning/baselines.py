"""The merges that the paper compares DRIFT with, with its parameters and its code's definitions.

In: a matched pair with a base. Out: a model folder per baseline, written by the merge engine. As in
the authors' code (VLM_Merging), norms and biases are merged too. Plain fine-tuning, the other
baseline, is a run with the rule "none".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.errors import PlanError
from ipmerge_core.merging.merge import iter_merge
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.models.writer import check_output
from ipmerge_core.planning.options import PlanOptions
from ipmerge_core.planning.plan import make_plan
from ipmerge_core.runtime.paths import resolve_path

PAPER_LAYERS = 28  # of its main pair, in which layer swap keeps layers 0 to 5
PAPER_KEPT = 5
ALL = "all"


class Baseline(NamedTuple):
    """A merge method with the parameters of DRIFT's Table 9."""

    method: str
    parameters: Mapping[str, Any]


_SPARSE = {"mllm_weight": 1.6, "math_weight": 0.2, "density": 0.2}
_AUTHORS = {"normalize": "count", "election": "unweighted"}  # as in VLM_Merging
BASELINES = {
    "task-arithmetic": Baseline("task_arithmetic", {"mllm_weight": 0.9, "math_weight": 0.1}),
    "layer-swap": Baseline("layer_swap", {"alpha": 0.9, "last_kept_layer": PAPER_KEPT}),
    "ties": Baseline("ties", _SPARSE | _AUTHORS),
    "dare-ties": Baseline("dare_ties", _SPARSE | _AUTHORS | {"rescale": "none"}),
    "dare-linear": Baseline("dare_linear", _SPARSE | {"rescale": "none"}),
}


class BaselineStep(NamedTuple):
    """A tensor of a baseline that was written."""

    baseline: str
    out: str
    done: int
    total: int


def find_baselines(names: Sequence[str]) -> list[str]:
    """Return the names of baselines, "all" resolved. Raises: PlanError for an unknown one."""
    unknown = next((name for name in names if name not in BASELINES and name != ALL), None)
    if unknown is not None:
        raise PlanError(
            f"Unknown baseline '{unknown[:80]}'. Available: {', '.join((*BASELINES, ALL))}."
        )
    return [name for name in BASELINES if name in names or ALL in names]


def parameters_of(name: str, layers: int) -> dict[str, Any]:
    """Return the parameters of a baseline for a decoder of some depth.

    Layer swap keeps the same share of layers as in the paper, at least the first.

    >>> parameters_of("layer-swap", 28)["last_kept_layer"]
    5
    >>> parameters_of("layer-swap", 4)["last_kept_layer"]
    0
    """
    parameters = dict(BASELINES[name].parameters)
    if "last_kept_layer" in parameters:
        kept = round((PAPER_KEPT + 1) * layers / PAPER_LAYERS)
        parameters["last_kept_layer"] = max(kept, 1) - 1
    return parameters


def baseline_folder(out: str | Path, name: str) -> Path:
    """Return the folder of a baseline: next to the result of the run, with its name added."""
    path = resolve_path(out)
    return path.parent / f"{path.name}-{name}"


def check_baselines(pair: ModelPair, out: str | Path, names: Sequence[str]) -> None:
    """Check the output folders before any work. Raises: CheckpointError, PairingError."""
    pair.require_common_base()
    for name in names:
        check_output(baseline_folder(out, name))


def iter_baselines(
    pair: ModelPair, out: str | Path, names: Sequence[str], device: str = "cpu"
) -> Iterator[BaselineStep]:
    """Write the baselines and yield a step per tensor; finished ones are skipped.

    Raises: as `iter_merge`.
    """
    layers = 1 + max(matrix.layer for matrix in pair.matrices)
    for name in names:
        plan = make_plan(
            pair,
            method=BASELINES[name].method,
            options=PlanOptions(norms="merge"),
            **parameters_of(name, layers),
        )
        folder = baseline_folder(out, name)
        for step in iter_merge(plan, folder, device=device):
            yield BaselineStep(name, str(folder), step.nbytes_done, step.nbytes_total)
