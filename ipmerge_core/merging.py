"""The driver that makes a model: read, apply the plan's method, write, one tensor at a time.

In: a `MergePlan`. Out: a folder with the MLLM's files, names, order, shapes and dtypes, in which
the selected matrices are replaced and every other byte is the MLLM's, plus a manifest
`ipmerge.json` and a model card. `iter_merge` is a generator that yields a step per tensor: closing
it stops the run and leaves what was finished for a resume.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ipmerge_core.card import write_card
from ipmerge_core.checkpoint import DTYPES, Checkpoint, TensorSpec, tensor_bytes
from ipmerge_core.errors import CheckpointError, IPMergeError, PairingError, RunError
from ipmerge_core.methods import find_method
from ipmerge_core.pairing import MatrixMatch, ModelPair, open_pair
from ipmerge_core.plan import MergePlan
from ipmerge_core.version import __version__
from ipmerge_core.writer import CheckpointWriter, check_output, in_file_order, layout_bytes

MANIFEST = "ipmerge.json"


class MergeStep(NamedTuple):
    """One tensor is finished. Sizes in bytes."""

    tensor: str
    index: int
    total: int
    nbytes_done: int
    nbytes_total: int
    action: Literal["merged", "copied", "resumed"]


class Estimate(NamedTuple):
    """What a merge will need, before it starts. Sizes in bytes."""

    nbytes_read: int
    nbytes_written: int
    nbytes_free: int
    n_merged: int
    n_copied: int
    largest_matrix: int  # working memory is a few times this size


def merge(
    plan: MergePlan, out: str | Path, *, device: str = "cpu", resume: bool = True
) -> dict[str, Any]:
    """Carry out a plan and return the manifest; see `iter_merge`."""
    for _ in iter_merge(plan, out, device=device, resume=resume):
        pass
    manifest: dict[str, Any] = json.loads((Path(out).expanduser() / MANIFEST).read_text("utf-8"))
    return manifest


def iter_merge(
    plan: MergePlan, out: str | Path, *, device: str = "cpu", resume: bool = True
) -> Iterator[MergeStep]:
    """Write the merged model of `plan` to the new folder `out`, yielding after each tensor.

    Selected matrices are read in their stored dtype, merged in fp32 (fp64 where stored so) and cast
    once, to nearest even. Everything else is copied as bytes. Two runs of one plan give the same
    bytes on one device type.

    Args:
        plan: what to do; its sources are opened again and compared by fingerprint.
        out: a folder that does not exist or is empty. It appears when the model is whole.
        device: where the matrices are merged, as torch names it.
        resume: go on with an unfinished run of the same plan.

    Raises:
        CheckpointError: `out` is not empty, or a source cannot be read.
        PairingError: a source is not the one the plan was made for.
        RunError: the target cannot be written, or another run is writing there.
    """
    out = check_output(out)
    pair = reopen(plan)
    _check_space(pair, out)
    started = time.perf_counter()
    writer = CheckpointWriter(pair.mllm, out, plan.digest, resume=resume)
    with writer, torch.inference_mode():
        try:
            actions: dict[str, str] = {}
            for step in _write_tensors(plan, pair, writer, torch.device(device)):
                actions[step.tensor] = step.action
                yield step
        except RunError:  # the target failed, not the input: finished tensors are worth keeping
            raise
        except IPMergeError:
            writer.discard()
            raise
        manifest = _manifest(plan, pair, writer.done, device, time.perf_counter() - started)
        writer.finish(
            {MANIFEST: json.dumps(manifest, indent=1) + "\n", "README.md": write_card(plan)}
        )


def reopen(plan: MergePlan) -> ModelPair:
    """Open the plan's models again and make sure that they are the same.

    Raises: PairingError when a model's weights are not those the plan was made for.
    """
    sources = plan.sources
    pair = open_pair(
        sources.mllm.location,
        [expert.location for expert in sources.math],
        sources.base.location,
        base_mllm=sources.base_mllm.location if sources.base_mllm else None,
    )
    now = [model.fingerprint for _, model in pair.roles()]
    for source, fingerprint in zip(sources.all(), now, strict=True):
        if source.fingerprint != fingerprint:
            raise PairingError(
                f"'{source.id}' holds other weights than when the plan was made (fingerprint "
                f"{fingerprint[:8]}, then {source.fingerprint[:8]}). Analyse the pair again and "
                f"make a new plan."
            )
    return pair


def estimate(plan: MergePlan, out: str | Path) -> Estimate:
    """Work out bytes and memory from headers alone. Raises: as `iter_merge`, before any work."""
    out, pair = check_output(out), reopen(plan)
    by_name = {matrix.name: matrix for matrix in pair.matrices}
    chosen = [by_name[decision.name] for decision in plan.selected]
    experts = sum(len(decision.experts) for decision in plan.selected)
    itemsize = plan.totals.decoder_itemsize
    touched = sum(decision.numel * itemsize for decision in plan.selected)
    return Estimate(
        nbytes_read=pair.mllm.nbytes + touched * (1 + experts // max(len(chosen), 1)),
        nbytes_written=layout_bytes(pair.mllm),
        nbytes_free=shutil.disk_usage(_existing_parent(out)).free,
        n_merged=len(chosen),
        n_copied=len(pair.mllm.tensors) - len(chosen),
        largest_matrix=4 * max((d.numel for d in plan.selected), default=0),
    )


def merge_matrix(
    plan: MergePlan,
    pair: ModelPair,
    matrix: MatrixMatch,
    experts: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Merge one matrix; (m, n) in fp32 or better, on `device`.

    An expert whose base is not the MLLM's base is first moved to it: W_e - W0 + W0_mllm. Then one
    base serves both, and no method needs to know.
    """
    root = pair.base_mllm.read_matrix(matrix.base_mllm).to(device)
    mllm = pair.mllm.read_matrix(matrix.mllm).to(device)
    base = root
    if pair.base_mllm is not pair.base:
        base = pair.base.read_matrix(matrix.name).to(device)
    tuned = [pair.math[k].read_matrix(matrix.math[k]).to(device) for k in experts]
    if base is not root:
        tuned = [(expert.float() - base.float()) + root.float() for expert in tuned]
    return find_method(plan.method)(root, mllm, tuned, **plan.parameters)


def _write_tensors(
    plan: MergePlan, pair: ModelPair, writer: CheckpointWriter, device: torch.device
) -> Iterator[MergeStep]:
    by_name = {matrix.name: matrix for matrix in pair.matrices}
    work = {by_name[d.name].mllm: (by_name[d.name], d.experts) for d in plan.selected}
    specs = in_file_order(pair.mllm)
    nbytes_done, nbytes_total = 0, pair.mllm.nbytes
    for index, spec in enumerate(specs, 1):
        action: Literal["merged", "copied", "resumed"] = "resumed"
        if spec.name not in writer.done:
            if spec.name in work:
                merged = merge_matrix(plan, pair, *work[spec.name], device)
                writer.write(spec.name, _stored(merged, spec, pair.mllm))
                action = "merged"
            else:
                writer.write(spec.name, pair.mllm.read_bytes(spec.name))
                action = "copied"
        nbytes_done += spec.nbytes
        yield MergeStep(spec.name, index, len(specs), nbytes_done, nbytes_total, action)


def _stored(merged: Tensor, spec: TensorSpec, mllm: Checkpoint) -> bytes:
    """Cast a merged matrix to its stored dtype, once, and refuse what does not fit it."""
    cast = merged.to(DTYPES[spec.dtype])
    if not torch.isfinite(cast).all():
        raise CheckpointError(
            f"The merged '{spec.name}' of '{mllm.id}' does not fit {spec.dtype}: some values are "
            f"infinite or NaN. Use smaller gains."
        )
    return tensor_bytes(cast)


def _check_space(pair: ModelPair, out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        return  # a resume: its files already take their place
    need, free = layout_bytes(pair.mllm), shutil.disk_usage(_existing_parent(out)).free
    if need > free:
        raise RunError(
            f"The merged model needs {need / 1e9:.2f} GB at '{out.parent}' and {free / 1e9:.2f} GB "
            f"are free. Free some space or choose another output folder."
        )


def _existing_parent(out: Path) -> Path:
    return next(folder for folder in (out, *out.parents) if folder.exists())


def _manifest(
    plan: MergePlan, pair: ModelPair, done: Mapping[str, str], device: str, seconds: float
) -> dict[str, Any]:
    experts = {d.name: list(d.experts) for d in plan.selected}
    merged = {
        matrix.mllm: experts[matrix.name] for matrix in pair.matrices if matrix.name in experts
    }
    return {
        "format": "ipmerge-manifest",
        "version": 1,
        "engine": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": {
            "hash": plan.hash,
            "method": plan.method,
            "parameters": dict(plan.parameters),
            "similarity": plan.similarity,
            "similarity_threshold": plan.similarity_threshold,
            "overrides": dict(plan.overrides),
        },
        "sources": asdict(plan.sources),
        "versions": {"torch": torch.__version__},
        "device": device,
        "seconds": round(seconds, 3),
        "nbytes": pair.mllm.nbytes,
        "n_merged": len(merged),
        "tensors": {
            name: {"sha256": done[name]}
            | (
                {"action": "merged", "experts": merged[name]}
                if name in merged
                else {"action": "copied", "reason": pair.kept.get(name, "not selected")}
            )
            for name in pair.mllm.tensors
        },
    }
