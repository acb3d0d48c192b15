"""Create the manifest `ipmerge.json`, which records how a merged model was made.

In: a plan, its opened models, and the results of a run. Out: a JSON object. No IO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from ipmerge_core.calibration.store import Measurements
from ipmerge_core.merging.parts import reason_to_copy, work_of
from ipmerge_core.models.pairing import Finding, ModelPair
from ipmerge_core.models.shared_tokens import ROWS
from ipmerge_core.planning.description import facts_of
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.version import __version__


def manifest_of(
    plan: MergePlan,
    pair: ModelPair,
    hashes: Mapping[str, str],
    *,
    files: Mapping[str, str],
    findings: Sequence[Finding],
    measurements: Measurements | None,
    attempts: Sequence[Mapping[str, Any]],
    statistic: Sequence[float] | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the manifest of a finished merge: request, results, and treatment of every tensor.

    Args:
        plan: the executed plan, described by `facts_of`.
        pair: its opened models.
        hashes: the SHA-256 of every tensor as read back.
        files: the SHA-256 of every other file, copied from the MLLM.
        findings: the results of the sibling check.
        measurements: the calibration of the plan.
        attempts: every process that worked on the run, see `attempt_of`, the last one that ended
            it; its device and number of processes are those of the manifest.
        statistic: the result of the first pass.
        seconds: duration of the last attempt.
    """
    merged = _merged(plan, pair)
    return {
        "format": "ipmerge-manifest",
        "version": 1,
        "engine": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": {**facts_of(plan), "statistic": statistic},
        "sources": asdict(plan.sources),
        "computed": remarks_of(pair),
        "calibration": _measured(measurements),
        "check": {
            "forced": any(finding.level == "refusal" for finding in findings),
            "findings": [finding._asdict() for finding in findings if finding.level != "ok"],
        },
        "versions": {"torch": torch.__version__},
        "device": attempts[-1]["device"],
        "processes": attempts[-1]["processes"],
        "attempts": list(attempts),
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
        "files": dict(files),
    }


def remarks_of(pair: ModelPair) -> dict[str, str]:
    """Describe the models whose values are computed while reading, such as adapters, by role."""
    return {role: model.remark.message for role, model in pair.roles() if model.remark is not None}


def attempt_of(device: str, processes: int, resumed: int) -> dict[str, Any]:
    """Describe a process that works on a run; `resumed` tensors were finished before it."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": __version__,
        "torch": torch.__version__,
        "device": device,
        "processes": processes,
        "resumed_tensors": resumed,
    }


def _measured(measurements: Measurements | None) -> dict[str, Any] | None:
    """Return where a calibration is and what it was made of, without the list of its files."""
    if measurements is None:
        return None
    models = [asdict(model) for model in measurements.models]
    for model in models:
        del model["places"]
    return {
        "folder": str(measurements.folder),
        "digest": measurements.digest,
        "kind": measurements.kind,
        "settings": measurements.settings,
        "models": models,
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
