"""LoRA adapters as models: the values are those that PEFT merges, read like any other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model
from peft_adapters import QV, edit_config, make_adapter
from safetensors.torch import load_file, save_file

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint, as_tensor
from ipmerge_core.models.opening import open_model
from ipmerge_core.models.writer import files_to_copy

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIONS = {
    "a list of names": {},
    "a pattern": {"target_modules": r".*\.layers\.[02]\.(self_attn\.q_proj|mlp\.up_proj)"},
    "a pattern with look-ahead": {"target_modules": r"^(?!.*lm_head).*self_attn\.(q|k)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": list(SEVEN), "exclude_modules": ["o_proj"]},
    "rslora": {"use_rslora": True, "r": 4},
    "ranks by pattern": {
        "target_modules": list(SEVEN),
        "rank_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"up_proj": 32, r"layers\.[01]\.self_attn\.v_proj": 1},
    },
    "rslora with ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 7}},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer by its pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "fan_in_fan_out, ignored for linear modules": {"fan_in_fan_out": True},
    "modules to save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "the output head": {"target_modules": ["lm_head", "q_proj"]},
    "dora": {"use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True, "target_modules": list(SEVEN)},
    "biases": {"bias": "all"},
    "gaussian start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_every_option_gives_the_weights_that_peft_merges(
    settings: dict[str, object], trio: Trio, tmp_path: Path
) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter", **settings)
    model = open_model(made.folder)
    assert model.tensors.keys() == made.merged.keys()
    base = load_file(trio.base / "model.safetensors")
    changed = 0
    for name, expected in made.merged.items():
        torch.testing.assert_close(model.read(name), expected, rtol=2e-6, atol=2e-7)
        changed += not torch.equal(expected, base[name])
    assert changed == len(model._changes) > 0
