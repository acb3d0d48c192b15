"""Create the manifest `ipmerge.json`, which records how a merged model was made.

In: a plan, its opened models, and the results of a run. Out: a JSON object. No IO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from ipmerge_core.merging.parts import reason_to_copy, work_of
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.models.shared_tokens import ROWS
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.version import __version__


def manifest_of(
    plan: MergePlan,
    pair: ModelPair,
    hashes: Mapping[str, str],
    *,
    statistic: Sequence[float] | None,
    device: str,
    processes: int,
    seconds: float,
) -> dict[str, Any]:
    """Return the manifest of a finished merge: request, results, and treatment of every tensor.

    `hashes` are the SHA-256 of every tensor as read back, `statistic` is the result of the first
    pass.
    """
    merged = _merged(plan, pair)
    return {
        "format": "ipmerge-manifest",
        "version": 1,
        "engine": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": {
            "hash": plan.hash,
            "digest": plan.digest,
            "method": plan.method,
            "parameters": dict(plan.parameters),
            "similarity": plan.similarity,
            "similarity_threshold": plan.similarity_threshold,
            **plan.options.to_dict(),
            "statistic": statistic,
        },
        "sources": asdict(plan.sources),
        "versions": {"torch": torch.__version__},
        "device": device,
        "processes": processes,
        "seconds": round(seconds, 3),
        "nbytes": pair.mllm.nbytes,
        "n_merged": len(plan.selected),
        "audit": {
            "tensors": len(hashes),
            "equal_to_the_mllm": len(hashes) - len(merged),
            "checked": "names, shapes, dtypes, offsets, finite values, and every hash read back",
        },
        "tensors": {
            name: {"sha256": hashes[name]}
            | merged.get(name, {"action": "copied", "reason": reason_to_copy(plan, pair, name)})
            for name in pair.mllm.tensors
        },
    }


def _merged(plan: MergePlan, pair: ModelPair) -> dict[str, dict[str, Any]]:
    """Return the merged experts by stored tensor; for a fused tensor, by matrix."""
    merged: dict[str, dict[str, Any]] = {}
    for name, found in work_of(plan, pair).items():
        matrix, experts = found[0]
        entry: dict[str, Any] = {"action": "merged", "experts": list(experts)}
        if matrix.module == ROWS:  # thousands of runs: record the number of rows
            entry["rows"] = sum(run.shape[0] for run, _ in found)
        elif len(found) > 1 or matrix.mllm != name:
            entry["experts"] = {part.mllm: list(own) for part, own in found}
        merged[name] = entry
    return merged
