"""Tiny LoRA adapters made by PEFT itself, beside the weights that PEFT merges them to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import Weights

QV = ("q_proj", "v_proj")


class Made(NamedTuple):
    """An adapter's folder, and the weights of its base after `merge_and_unload`."""

    folder: Path
    merged: Weights


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 1,
    strength: float = 0.05,
    base_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Made:
    """Save an adapter with random factors, of the given `LoraConfig` settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated names, and options without effect
        return _make(base, folder, seed, strength, base_dtype, dtype, settings)


def _make(
    base: Path,
    folder: Path,
    seed: int,
    strength: float,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> Made:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=base_dtype)
    config = LoraConfig(**{"target_modules": list(QV), "r": 2, "lora_alpha": 4, **settings})
    adapted = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if not value.requires_grad:
                continue
            noise = strength * torch.randn(value.shape, generator=generator)
            if "lora_magnitude" in name or "lora_" not in name:
                noise = value + noise
            value.copy_(noise)
            value.data = value.data.to(dtype)
    adapted.save_pretrained(folder)
    merged = {k: v.detach().clone() for k, v in adapted.merge_and_unload().state_dict().items()}
    return Made(folder, merged)


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
