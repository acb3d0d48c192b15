"""An MLLM given as an adapter: its tensors are found in every layout, and the result loads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from family_layouts import FAMILIES, build
from peft_adapters import edit_config
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.errors import PairingError
from ipmerge_core.models.adapter_names import StoredNames
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.opening import open_model
from ipmerge_core.planning.plan import make_plan

PLACES = [
    ("LLaVA-1.5 (Vicuna)", "hub"),
    ("LLaVA-1.5 (Vicuna)", "nested"),
    ("LLaVA-1.5 (Vicuna)", "LLaVA repository"),
    ("Qwen2-VL", "hub"),
    ("Qwen2-VL", "modules"),
    ("Idefics3", "modules"),
    ("Gemma 3", "modules"),
]


TEXT_ONLY = r".*(language_model|text_model)\.layers.*\.(q_proj|v_proj)"


def adapted(
    folder: Path, out: Path, dtype: torch.dtype, targets: str | list[str] = TEXT_ONLY
) -> dict[str, torch.Tensor]:
    """Save an adapter of a multimodal model, and return what PEFT merges, by names in memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        config = LoraConfig(r=2, target_modules=targets)
        peft_model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, value in peft_model.named_parameters():
                if "lora_" in name:
                    value.copy_(0.03 * torch.randn(value.shape, generator=generator))
        peft_model.save_pretrained(out)
        merged = peft_model.merge_and_unload()
    return {name: value.detach().float() for name, value in merged.state_dict().items()}


def test_modules_of_the_vision_tower_are_found_too(tmp_path: Path) -> None:
    """As a plain list of names selects them; files have `vision_model`, memory has not."""
    mllm = Path(__file__).parents[1] / "assets" / "demo" / "mllm"
    merged = adapted(mllm, tmp_path / "adapter", torch.float32, ["q_proj", "v_proj"])
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(mllm))
    model = open_model(tmp_path / "adapter")
    names = StoredNames(model)
    wanted = {n: w for n, w in merged.items() if n.endswith(("q_proj.weight", "v_proj.weight"))}
    assert any("vision" in name for name in wanted)
    for name, weight in wanted.items():
        stored = names.find(name)
        assert stored is not None, name
        torch.testing.assert_close(model.read(stored), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "layout"), PLACES, ids="-".join)
def test_modules_are_found_under_the_names_of_every_layout(
    family: str, layout: str, tmp_path: Path
) -> None:
    folders = build(FAMILIES[family], tmp_path)
    loadable = "hub" if "hub" in folders else "modules"
    merged = adapted(folders[loadable], tmp_path / "adapter", torch.float32)
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(folders[layout]))
    model = open_model(tmp_path / "adapter")
    wanted = {n: w for n, w in merged.items() if n.endswith(("q_proj.weight", "v_proj.weight"))}
    text = [n for n in wanted if "language_model." in n or "text_model.layers" in n]
    assert len(model._changes) == 8 == len([n for n in text if "vision" not in n])
    pair = ipm.open_pair(model, folders["math"], folders["base"])
    for matrix in pair.matrices:
        if matrix.module in ("q", "v"):
            value = model.read(matrix.mllm)
            (same,) = [n for n, w in wanted.items() if w.shape == value.shape and close(w, value)]
            assert f"layers.{matrix.layer}." in same
            assert f".{matrix.module}_proj" in same


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_merge_of_an_adapted_mllm_keeps_its_change_and_loads(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    folders = build(FAMILIES["LLaVA-1.5 (Vicuna)"], tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folders["hub"], dtype=dtype)
    vlm = tmp_path / "vlm"
    model.save_pretrained(vlm, save_original_format=True)
    merged = adapted(vlm, tmp_path / "adapter", dtype)
    plan = make_plan(
        ipm.open_pair(tmp_path / "adapter", folders["math"], folders["base"]),
        method="task_arithmetic",
        include=r"layers\.0\.",
        math_weight=0.0,
    )
    out = tmp_path / "out"
    manifest = ipm.merge(plan, out)
    assert manifest["computed"]["mllm"].startswith("adapter of rank 2 on 8 matrices of 'vlm'")
    assert not list(out.glob("adapter*"))
    assert json.loads((out / "config.json").read_text())["model_type"] == "llava"
    before, after = Checkpoint.open(vlm), Checkpoint.open(out)
    assert after.tensors == before.tensors
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=dtype).state_dict()
    for name, value in merged.items():  # merged and copied tensors have the adapter's change
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(loaded[name].float(), value, rtol=2 * step, atol=1e-3 * step)
    changed = [n for n in before.tensors if not torch.equal(before.read(n), after.read(n))]
    assert len(changed) == 8


def test_weights_beside_an_adapter_are_used_and_the_result_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folders = build(FAMILIES["LLaVA-1.5 (Vicuna)"], tmp_path)
    adapted(folders["hub"], tmp_path / "adapter", torch.float32)
    for file in (tmp_path / "adapter").iterdir():
        file.rename(folders["hub"] / file.name)
    pair = ipm.open_pair(folders["hub"], folders["math"], folders["base"])
    found = {finding.subject: finding for finding in pair.check()}["mllm: adapter"]
    assert "contains both weights and a PEFT adapter" in found.message
    ipm.merge(make_plan(pair, method="task_arithmetic"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    plain = load_file(folders["hub"] / "model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert "lora" not in "".join(merged)
    stored = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert float((merged[name] - plain[stored]).norm()) < 0.1 * float(plain[stored].norm())


def test_an_adapted_mllm_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folders = build(FAMILIES["LLaVA-1.5 (Vicuna)"], tmp_path)
    adapted(folders["hub"], tmp_path / "adapter", torch.float32)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    head = "base_model.model.lm_head.weight"
    save_file({**load_file(path), head: torch.ones(99, 32)}, path)
    with pytest.raises(PairingError, match="has the shape .99, 32.*keeps the layout of its files"):
        ipm.open_pair(tmp_path / "adapter", folders["math"], folders["base"])
