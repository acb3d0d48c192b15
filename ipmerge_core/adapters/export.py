"""Export IP-Merging's update as a LoRA adapter in the PEFT format.

In: a plan of IP-Merging. Out: a folder (adapter_config.json, adapter_model.safetensors) that PEFT,
and servers with LoRA support, load on the MLLM; lambda is the adapter's scale and can be changed
after loading. The update P = rho dM V diag(gamma^2) V^T is numerically of low rank because gamma is
squared and sums to one. The rank of each matrix is determined from the residual and reported; in
the files all are padded with zeros to the largest, since PEFT cannot combine and save adapters with
different ranks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ipmerge_core.adapters.factors import (
    of_one_rank,
    reduce_rank,
    update_of,
    with_lambda,
)
from ipmerge_core.errors import PlanError
from ipmerge_core.inference.module_names import module_names
from ipmerge_core.merging.computing import find_updates
from ipmerge_core.merging.merge import reopen
from ipmerge_core.merging.model_card import front_matter, settings_table
from ipmerge_core.merging.parts import work_of
from ipmerge_core.methods import find_method
from ipmerge_core.models.matrix_kinds import is_expert
from ipmerge_core.models.pairing import TO_FORCE
from ipmerge_core.models.writer import check_output
from ipmerge_core.planning.description import facts_of
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.runtime.atomic import atomic_path, writing
from ipmerge_core.runtime.devices import resolve_device
from ipmerge_core.runtime.paths import resolve_path
from ipmerge_core.version import __version__

RESIDUAL = 1e-3  # Frobenius norm of what is left out, relative to the update's
MAX_RANK = 64
REPORT = "ipmerge-adapter.json"


@dataclass(frozen=True)
class AdapterStep:
    """Progress: the factors of one module were computed.

    `rank` is the number of kept directions, `needed` the number required for the tolerance;
    `residual` is that of the kept ones, relative to the update's Frobenius norm.
    """

    tensor: str
    module: str
    rank: int
    needed: int
    residual: float
    index: int
    total: int


def export_adapter(
    plan: MergePlan,
    out: str | Path,
    *,
    tolerance: float = RESIDUAL,
    max_rank: int = MAX_RANK,
    device: str = "cpu",
    force: bool = False,
    updates: str | Path | None = None,
) -> dict[str, Any]:
    """Write the update of a plan as a PEFT folder and return its report; see `iter_adapter`."""
    out = resolve_path(out)
    how: dict[str, Any] = {"tolerance": tolerance, "max_rank": max_rank, "device": device}
    how |= {"force": force, "updates": updates}
    for _ in iter_adapter(plan, out, **how):
        pass
    report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return report


def iter_adapter(
    plan: MergePlan,
    out: str | Path,
    *,
    tolerance: float = RESIDUAL,
    max_rank: int = MAX_RANK,
    device: str = "cpu",
    force: bool = False,
    updates: str | Path | None = None,
) -> Iterator[AdapterStep]:
    """Write the LoRA adapter of `plan` to the new folder `out`, yielding after each module.

    The MLLM with the adapter equals the merged model up to the residual and the rounding of the
    merged model to its stored dtype. Factors are fp32; the scale lora_alpha / r is lambda.

    Args:
        plan: a plan of IP-Merging with projection; its sources are opened again and compared.
        out: a folder that does not exist or is empty. It appears when the adapter is complete.
        tolerance: relative Frobenius residual that determines the rank of a matrix.
        max_rank: maximum rank. A matrix that needs more is truncated with a warning, and
            reported with its residual.
        device: a torch device name, or "auto".
        force: continue even if the sibling check refuses the models.
        updates: a folder of kept updates, which are used instead of decomposing again.

    Raises:
        PlanError: the method's change is not of low rank, no matrix is selected, or the device is
            not available.
        CheckpointError: `out` is not empty, or a source cannot be used.
        ModelLoadError: transformers cannot build the MLLM, to find the modules of the adapter.
        PairingError: a source differs from the one the plan was made for, or is written during
            the run, or the sibling check refuses the models.
        RunError: the output cannot be written.
    """
    where = torch.device(resolve_device(device))
    _check(plan, tolerance, max_rank)
    out = check_output(out)
    pair = reopen(plan)
    before = pair.stamps()
    pair.require_common_base(TO_FORCE, force=force)
    work = work_of(plan, pair)
    _refuse_experts(plan)
    modules = module_names(pair.mllm, work)
    store = find_updates(plan, pair, updates, where)
    unit = with_lambda(plan, 1.0)  # lambda itself is the adapter's scale
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    steps: list[AdapterStep] = []
    for index, (tensor, matrices) in enumerate(work.items(), 1):
        update = update_of(unit, pair, tensor, matrices, where, store)
        kept = reduce_rank(update, tolerance, max_rank)
        module = modules[tensor]
        step = AdapterStep(tensor, module, kept.rank, kept.needed, kept.residual, index, len(work))
        if kept.rank:
            factors[f"base_model.model.{module}"] = kept.A.cpu(), kept.B.cpu()
        steps.append(step)
        yield step
    how: dict[str, float | str] = {
        "tolerance": tolerance,
        "max_rank": max_rank,
        "device": str(where),
    }
    pair.check_unchanged(before)
    _write(plan, out, of_one_rank(factors), steps, how)
    _warn_of_cuts(steps, max_rank)


def _check(plan: MergePlan, tolerance: float, max_rank: int) -> None:
    projects = plan.parameters.get("ablation") == "none" or plan.parameters.get("math_energy") != 1
    if plan.method != "ip_merging" or not projects:
        label = find_method(plan.method).label
        ablation = plan.parameters.get("ablation", "none")
        what = label if ablation == "none" else f"{label} with ablation '{ablation}'"
        raise PlanError(
            f"The change of {what} has full rank and cannot be a LoRA adapter. Use IP-Merging "
            f"with projection, or write the merged model instead."
        )
    if plan.options.input_share < 1:
        raise PlanError(
            f"The plan has input_share {plan.options.input_share:g}, which rescales the columns of "
            f"the merged matrices and not of an update. Write the merged model instead."
        )
    if not 0 < tolerance < 1:
        raise PlanError(f"The tolerance is {tolerance}; expected a number in (0, 1).")
    if max_rank < 1:
        raise PlanError(f"max_rank is {max_rank}; expected an integer >= 1.")
    if not plan.selected:
        raise PlanError(
            f"The plan selects none of {len(plan.decisions)} matrices, so that the adapter would "
            f"be empty. Lower the similarity threshold ({plan.similarity_threshold})."
        )


def _refuse_experts(plan: MergePlan) -> None:
    """Raise PlanError for experts of a mixture, which PEFT's LoRA layers do not reach."""
    found = [decision.name for decision in plan.selected if is_expert(decision.module)]
    if found:
        raise PlanError(
            f"The plan merges {len(found)} matrices of experts, '{found[0]}' first, which "
            f"transformers holds in stacks that LoRA layers cannot change. Plan with "
            f"exclude='[.]experts', or write the merged model instead."
        )


def _warn_of_cuts(steps: Sequence[AdapterStep], max_rank: int) -> None:
    cut = [step for step in steps if step.needed > step.rank]
    if cut:
        worst = max(cut, key=lambda step: step.residual)
        warnings.warn(
            f"{len(cut)} of {len(steps)} matrices need a rank above max_rank = {max_rank} and were "
            f"truncated; '{worst.tensor}' needs {worst.needed} and has a residual of "
            f"{worst.residual:.1%}. Raise max_rank for a more accurate adapter.",
            stacklevel=3,
        )


# --- the folder ---


def _write(
    plan: MergePlan,
    out: Path,
    tensors: dict[str, Tensor],
    steps: Sequence[AdapterStep],
    how: Mapping[str, float | str],
) -> None:
    """Write to a temporary folder and rename it, so that a partial adapter is never loaded."""
    if not tensors:
        raise PlanError(
            "The update of every selected matrix is zero: the math models do not differ from "
            "their base there. Give fine-tuned models as math."
        )
    with writing(out), atomic_path(out) as partial:
        partial.mkdir(parents=True)
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        nbytes = (partial / "adapter_model.safetensors").stat().st_size
        documents = {
            "adapter_config.json": json.dumps(_config(plan, steps), indent=2, sort_keys=True),
            REPORT: json.dumps(_report(plan, steps, how, nbytes), indent=1) + "\n",
            "README.md": _card(plan, steps, nbytes),
        }
        for name, text in documents.items():
            (partial / name).write_text(text, encoding="utf-8")


def _config(plan: MergePlan, steps: Sequence[AdapterStep]) -> dict[str, Any]:
    """Return the PEFT configuration; the scale lora_alpha / r of every module is lambda."""
    from peft import LoraConfig

    ranks = {step.module: step.rank for step in steps if step.rank}
    gain = float(plan.parameters["lambda_"] or 0.0)
    largest = max(ranks.values())  # all factors are padded to it
    config = LoraConfig(
        base_model_name_or_path=plan.sources.mllm.id,
        revision=plan.sources.mllm.revision,
        inference_mode=True,
        r=largest,
        lora_alpha=gain * largest,
        target_modules=list(ranks),
    )
    return {**config.to_dict(), "target_modules": sorted(ranks)}  # PEFT keeps them as a set


def _report(
    plan: MergePlan, steps: Sequence[AdapterStep], how: Mapping[str, float | str], nbytes: int
) -> dict[str, Any]:
    return {
        "format": "ipmerge-adapter",
        "version": 1,
        "engine": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan": facts_of(plan),
        "sources": asdict(plan.sources),
        "scale": plan.parameters["lambda_"],
        **how,
        "nbytes": nbytes,
        "over_max_rank": [step.tensor for step in steps if step.needed > step.rank],
        "largest_residual": max(step.residual for step in steps),
        "matrices": {
            step.tensor: {
                "module": step.module,
                "rank": step.rank,
                "needed": step.needed,
                "residual": step.residual,
            }
            for step in steps
        },
    }


def _card(plan: MergePlan, steps: Sequence[AdapterStep], nbytes: int) -> str:
    ranks = [step.rank for step in steps]
    return "\n".join(
        [
            front_matter([plan.sources.mllm], library="peft", tags=["lora", "merge", "ipmerge"]),
            "# IP-Merging as a LoRA adapter",
            "",
            f"Made by IPMerge {__version__} from plan `{plan.hash}`: {len(steps)} matrices that "
            f"need rank {min(ranks)} to {max(ranks)} (stored with rank {max(ranks)}, padded with "
            f"zeros), {nbytes / 1e6:.1f} MB. Load it with PEFT on the MLLM "
            f"that it was made for; scaling the adapter by s scales lambda by s.",
            "",
            *settings_table(plan),
            "",
            f"`{REPORT}` lists the rank and the residual of every matrix. No benchmark was run.",
            "",
        ]
    )
