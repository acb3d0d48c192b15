"""fp8 weights are read as floats: every kind of scale, every role, and the merged model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, Weights, as_mllm, fine_tuned, text_weights, write_model
from safetensors.torch import load_file, save_file

import ipmerge_core
from ipmerge_core.cli import main
from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import open_pair

E4M3 = torch.float8_e4m3fn
BLOCK = (8, 6)  # does not divide every matrix of the tiny model
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GROUP = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
KINDS: dict[str, dict[str, Any]] = {
    "block": {**FP8, "weight_block_size": list(BLOCK)},
    "tensor": {**FP8, "weight_block_size": None},
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": GROUP},
    },
    "group": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {**GROUP["weights"], "group_size": 4}}},
    },
}
NAMES = {"block": "_scale_inv", "tensor": "_scale_inv", "channel": "_scale", "group": "_scale"}


def quantise(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the fp8 weight, its scales, and the product, computed with whole matrices."""
    height, width = weight.shape
    rows, columns = {
        "block": BLOCK,
        "tensor": (height, width),
        "channel": (1, width),
        "group": (1, 4),
    }[kind]
    grid = -(-height // rows), -(-width // columns)
    padded = torch.zeros(grid[0] * rows, grid[1] * columns)
    padded[:height, :width] = weight
    blocks = padded.reshape(grid[0], rows, grid[1], columns)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448
    whole = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:height, :width]
    stored = (weight / whole).to(E4M3)
    return stored, scales.squeeze() if kind == "tensor" else scales, stored.float() * whole


def as_fp8(weights: Weights, kind: str) -> tuple[Weights, Weights]:
    """Quantise the decoder's matrices; return the stored tensors and their values."""
    stored, values = {}, {}
    for name, weight in weights.items():
        if ".layers." not in name or weight.ndim < 2 or "vision" in name:
            stored[name] = values[name] = weight.bfloat16()
            continue
        stored[name], stored[name + NAMES[kind]], exact = quantise(weight, kind)
        values[name] = exact.bfloat16()
        if kind == "tensor":
            stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(1.0)
    return stored, values


def write_fp8(folder: Path, weights: Weights, config: dict[str, Any], kind: str) -> Path:
    """Write a sharded fp8 model as its publishers do; its values stand beside it, in bf16."""
    stored, values = as_fp8(weights, kind)
    config = {**config, "dtype": "bfloat16"}
    write_model(folder.with_name(folder.name + "_values"), values, config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    config["quantization_config"] = KINDS[kind]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text("{}")
    index: dict[str, str] = {}
    for number in range(2):
        shard = f"model-{number + 1:05}-of-00002.safetensors"
        part = {name: stored[name].contiguous() for name in list(stored)[number::2]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


MLLM_CONFIG = {"model_type": "llava", "text_config": TEXT_CONFIG}


def write_all(folder: Path, kind: str) -> Trio:
    base = text_weights()
    return Trio(
        write_fp8(folder / "base", base, TEXT_CONFIG, kind),
        write_fp8(folder / "mllm", as_mllm(fine_tuned(base, 1, 0.02)), MLLM_CONFIG, kind),
        write_fp8(folder / "math", fine_tuned(base, 2, 0.02), TEXT_CONFIG, kind),
        folder,
    )


def values_of(folder: Path) -> Path:
    return folder.with_name(folder.name + "_values")


@pytest.mark.parametrize("kind", KINDS)
def test_every_door_reads_the_product_of_weight_and_scale(kind: str, tmp_path: Path) -> None:
    folder = write_all(tmp_path, kind).mllm
    model, values = Checkpoint.open(folder), Checkpoint.open(values_of(folder))
    assert set(model.tensors) == set(values.tensors)
    assert "quantization_config" not in model.config
    for name, spec in values.tensors.items():
        assert (model.spec(name).dtype, model.spec(name).shape) == (spec.dtype, spec.shape)
        expected = values.read(name)
        assert torch.equal(model.read(name), expected)
        assert model.read_bytes(name) == values.read_bytes(name)
        assert b"".join(model.iter_bytes(name, 7)) == values.read_bytes(name)
        if len(spec.shape) == 2:
            assert torch.equal(model.read(f"{name}[3:8]"), expected[3:8])
    assert model.nbytes == values.nbytes


def test_only_the_requested_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Checkpoint.open(write_all(tmp_path, "block").base)
    stored, reads = model.files._files, []  # type: ignore[attr-defined]
    real = stored.read_into
    monkeypatch.setattr(
        stored,
        "read_into",
        lambda memory, *place: (reads.append(len(memory)), real(memory, *place)),
    )
    model.read("model.layers.0.mlp.down_proj.weight[2:4]")
    assert reads == [2 * 24, 4 * 4]  # two rows in fp8, and the scales of their row of blocks


def merge(method: str, folders: Sequence[Path], out: Path) -> None:
    base, mllm, math = folders
    plan = ipmerge_core.make_plan(ipmerge_core.analyse(open_pair(mllm, math, base)), method=method)
    ipmerge_core.merge(plan, out)


@pytest.mark.parametrize("kind", ["block", "channel"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ip_merging"])
def test_a_merge_of_fp8_models_is_that_of_their_values(
    kind: str, method: str, tmp_path: Path
) -> None:
    trio, out = write_all(tmp_path, kind), tmp_path / "out"
    merge(method, trio[:3], out)
    merge(method, [values_of(folder) for folder in trio[:3]], tmp_path / "expected")
    merged: Weights = {}
    for shard in sorted(out.glob("*.safetensors")):
        merged |= load_file(shard)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (out / "hf_quant_config.json").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(merged)
    total = sum(tensor.nbytes for tensor in merged.values())
    assert index["metadata"]["total_size"] == total
