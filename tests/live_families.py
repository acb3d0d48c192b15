"""Live columns on tiny models of a family, next to the same merges loaded alone.

Used by test_live.py for a sample of the families, and by benchmarks/bench_chat.py for all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chat_families import CHAT_FAMILIES
from chat_models import build_chat
from PIL import Image
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.adapters.columns import Row
from ipmerge_core.adapters.factor_set import EXACT, FactorSet, iter_factor_set
from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.inference.generation import encode_messages, stream_states
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.streaming import RowState
from ipmerge_core.merging.in_memory import iter_merged_tensors
from ipmerge_core.methods.declarations import drained
from ipmerge_core.planning.plan import MergePlan

NOISE = Image.effect_noise((90, 60), 80).convert("RGB")
SHORT = GenerationSettings(max_new_tokens=10)
Ids = tuple[int, ...]


def last(states: Iterator[list[RowState]]) -> list[RowState]:
    """Return the final states of a stream."""
    *_, found = states
    assert all(state.is_over for state in found)
    return found


def alone(loaded: LoadedModel, messages: list[Message], settings: GenerationSettings) -> Ids:
    """The tokens of a model that nothing shares."""
    *_, state = stream_states(loaded, encode_messages(loaded, messages), settings)
    assert state.state == "finished", state.note
    return state.ids


def tensors_of(plan: MergePlan) -> dict[str, torch.Tensor]:
    """The tensors of a merge in memory."""
    steps = iter_merged_tensors(plan, force=True)
    return {step.name: step.tensor for step in steps if step.tensor is not None}


def perturbed(source: Path, out: Path, seed: int, scale: float) -> Path:
    """Copy a model with a low-rank change of every matrix of its language layers."""
    shutil.copytree(source, out)
    generator = torch.Generator().manual_seed(seed)
    for path in out.glob("*.safetensors"):
        weights = load_file(path)
        for name, value in sorted(weights.items()):
            if value.ndim >= 2 and "layers" in name and "vis" not in name:
                left = torch.randn(*value.shape[:-1], 3, generator=generator)
                right = torch.randn(*value.shape[:-2], 3, value.shape[-1], generator=generator)
                weights[name] = value + (scale * left @ right).to(value.dtype)
        save_file(weights, path, metadata={"format": "pt"})
    return out


class Compared(NamedTuple):
    """The states of several rows, and the tokens of their columns loaded alone."""

    states: list[RowState]
    expected: list[Ids]


def compare_family(name: str, folder: Path) -> Compared:
    """Answer with the base, a plan of factors and a plan of tensors, in prompts of two lengths."""
    mllm = build_chat(CHAT_FAMILIES[name], folder / "mllm")
    base = perturbed(mllm, folder / "base", 1, 0.01)
    pair = ipm.open_pair(mllm, perturbed(base, folder / "math", 2, 0.02), base)
    how: dict[str, Any] = {"similarity_threshold": 0.0, "lambda_": 8.0, "gamma_norm": "max"}
    plans = {
        "plan": ipm.make_plan(ipm.analyse(pair), exclude="[.]experts", **how),
        "tensors": ipm.make_plan(pair, method="task_arithmetic", math_weight=1.0),
    }
    live = LiveModel(load_model(mllm))
    factors: FactorSet = drained(iter_factor_set(plans["plan"], pair, tolerance=EXACT))
    live.add_factors(factors, pair)
    columns = {
        "base": live.base(),
        "plan": live.plan_column("plan", plans["plan"], factors),
        "tensors": live.tensor_column("tensors", pair.mllm, tensors_of(plans["tensors"])),
    }
    models = {"base": live.loaded}
    for key, plan in plans.items():
        ipm.merge(plan, folder / key, force=True)
        models[key] = load_model(folder / key)
    short = [Message("user", "What is it?", (NOISE,))]
    long = [*short, Message("assistant", "A box, and more."), Message("user", "Why?")]
    asked = [("base", short), ("plan", short), ("tensors", short), ("plan", long), ("base", long)]
    states = last(live.stream([Row(columns[key], messages, SHORT) for key, messages in asked]))
    return Compared(states, [alone(models[key], messages, SHORT) for key, messages in asked])
