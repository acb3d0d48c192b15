"""Quantised weights are refused with the name of their format; no file of them is "damaged"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Weights, as_mllm, text_weights, write_model

from ipmerge_core.errors import CheckpointError, CorruptShardError, IPMergeError, PairingError
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import open_pair

PROJECTION = "_proj.weight"
Pack = Callable[[str, torch.Tensor], Weights]


def gptq(module: str, weight: torch.Tensor) -> Weights:
    packed = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
    return {
        f"{module}.qweight": packed,
        f"{module}.qzeros": torch.zeros(1, weight.shape[0] // 8, dtype=torch.int32),
        f"{module}.scales": torch.zeros(1, weight.shape[0], dtype=torch.float16),
        f"{module}.g_idx": torch.zeros(weight.shape[1], dtype=torch.int32),
    }


def awq(module: str, weight: torch.Tensor) -> Weights:
    found = gptq(module, weight)
    del found[f"{module}.g_idx"]
    return found


def packed(module: str, weight: torch.Tensor) -> Weights:
    return {
        f"{module}.weight_packed": torch.zeros(weight.shape[0], 2, dtype=torch.int32),
        f"{module}.weight_scale": torch.zeros(weight.shape[0], 1),
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }


def nvfp4(module: str, weight: torch.Tensor) -> Weights:
    rows, columns = weight.shape
    return {
        f"{module}.weight": torch.zeros(rows, columns // 2, dtype=torch.uint8),
        f"{module}.weight_scale": torch.zeros(rows, 1, dtype=torch.float8_e4m3fn),
        f"{module}.weight_scale_2": torch.ones(()),
        f"{module}.input_scale": torch.ones(()),
    }


def mxfp4(module: str, weight: torch.Tensor) -> Weights:
    return {
        f"{module}_blocks": torch.zeros(*weight.shape, 4, dtype=torch.uint8),
        f"{module}_scales": torch.zeros(*weight.shape, dtype=torch.uint8),
    }


def bnb_4bit(module: str, weight: torch.Tensor) -> Weights:
    return {
        f"{module}.weight": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        f"{module}.weight.absmax": torch.zeros(4, dtype=torch.uint8),
        f"{module}.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8),
    }


def bnb_8bit(module: str, weight: torch.Tensor) -> Weights:
    return {
        f"{module}.weight": torch.zeros(weight.shape, dtype=torch.int8),
        f"{module}.SCB": torch.zeros(weight.shape[0]),
    }


def quanto(module: str, weight: torch.Tensor) -> Weights:
    return {
        f"{module}.weight._data": torch.zeros(weight.shape, dtype=torch.int8),
        f"{module}.weight._scale": torch.zeros(weight.shape[0], 1),
    }


def torchao(module: str, weight: torch.Tensor) -> Weights:
    return {
        f"{module}._weight_qdata": torch.zeros(weight.shape, dtype=torch.int8),
        f"{module}._weight_scale": torch.zeros(weight.shape[0], 1),
    }


def fp8_alone(module: str, weight: torch.Tensor) -> Weights:
    return {f"{module}.weight": weight.to(torch.float8_e4m3fn)}


FORMATS: dict[str, tuple[Pack, dict[str, Any] | None, str]] = {
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4}, r"GPTQ, I32"),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4}, r"AWQ, I32"),
    "compressed-tensors": (
        packed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        r"compressed-tensors pack-quantized, I32",
    ),
    "bitsandbytes 4-bit": (
        bnb_4bit,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
        r"bitsandbytes 4-bit, U8",
    ),
    "bitsandbytes 8-bit": (
        bnb_8bit,
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        r"bitsandbytes 8-bit, ",
    ),
    "MXFP4": (mxfp4, {"quant_method": "mxfp4"}, r"MXFP4, U8"),
    "NVFP4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4"),
    "quanto": (quanto, {"quant_method": "quanto", "weights": "int8"}, "quanto, I8"),
    "torchao": (torchao, {"quant_method": "torchao"}, "torchao, I8"),
    "another": (bnb_8bit, {"quant_method": "a new\nmethod"}, r"'a new\\nmethod', "),
    "GPTQ without a config": (gptq, None, "GPTQ, I32"),
    "AWQ without a config": (awq, None, "AWQ, I32"),
    "NVFP4 without a config": (nvfp4, None, "NVFP4, "),
    "bitsandbytes without a config": (bnb_4bit, None, "bitsandbytes, U8"),
    "fp8 without scales": (fp8_alone, None, "fp8 without scales, F8_E4M3"),
    "fp8 declared, without scales": (fp8_alone, {"quant_method": "fp8"}, "fp8, F8_E4M3"),
}


def write_quantised(folder: Path, weights: Weights, config: dict[str, Any], name: str) -> Path:
    """Write a model whose decoder is quantised, and whose vision tower is not."""
    pack, settings, _ = FORMATS[name]
    stored: Weights = {}
    for tensor, weight in weights.items():
        if tensor.endswith(PROJECTION) and "vision" not in tensor:
            stored |= pack(tensor.removesuffix(".weight"), weight)
        else:
            stored[tensor] = weight
    folder = write_model(folder, {}, config)
    if settings is not None:
        text = json.dumps({**config, "quantization_config": settings})
        (folder / "config.json").write_text(text)
    from safetensors.torch import save_file

    save_file(stored, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("role", ["mllm", "math", "base"])
def test_a_quantised_model_is_refused_by_name_in_every_role(
    name: str, role: str, tmp_path: Path
) -> None:
    base = text_weights()
    models: dict[str, tuple[Weights, dict[str, Any]]] = {
        "mllm": (as_mllm(base), {"model_type": "llava", "text_config": TEXT_CONFIG}),
        "math": (base, TEXT_CONFIG),
        "base": (base, TEXT_CONFIG),
    }
    folders = {
        key: write_quantised(tmp_path / key, *model, name)
        if key == role
        else write_model(tmp_path / key, *model)
        for key, model in models.items()
    }
    words = rf"' of '.*{role}' is quantised \({FORMATS[name][2]}.*use the original float weights"
    with pytest.raises(PairingError, match=words):
        open_pair(folders["mllm"], folders["math"], folders["base"])


def test_a_stale_quantization_config_is_no_quantisation(tmp_path: Path) -> None:
    base, settings = text_weights(), {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {**TEXT_CONFIG, "quantization_config": settings}
    folders = [write_model(tmp_path / name, base, config) for name in ("mllm", "math", "base")]
    assert open_pair(*folders).matrices


# --- dtypes of the format ---


def write_dtype(folder: Path, dtype: str, bits: int, **config: Any) -> Path:
    """Write a model with one tensor of 8 x 8 in a dtype that torch or safetensors may not write."""
    folder = write_model(folder, {}, {**TEXT_CONFIG, **config})
    nbytes = 64 * bits // 8
    entry = {"dtype": dtype, "shape": [8, 8], "data_offsets": [0, nbytes]}
    header = json.dumps({"model.layers.0.self_attn.q_proj.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(nbytes)
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("F4", 4),
        ("F6_E2M3", 6),
        ("F6_E3M2", 6),
        ("F8_E8M0", 8),
        ("F8_E4M3FNUZ", 8),
        ("F8_E5M2FNUZ", 8),
        ("C64", 64),
    ],
)
def test_known_dtypes_are_not_supported_rather_than_damaged(
    dtype: str, bits: int, tmp_path: Path
) -> None:
    words = f"q_proj.weight' of '.*' is stored as {dtype}, which is not supported"
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(write_dtype(tmp_path / "m", dtype, bits))
    assert not isinstance(caught.value, CorruptShardError)
    settings = {"quant_method": "mxfp4"}
    with pytest.raises(CheckpointError, match=r"The model is quantised \(MXFP4, "):
        Checkpoint.open(write_dtype(tmp_path / "q", dtype, bits, quantization_config=settings))


def test_a_size_that_does_not_fit_is_damage_for_these_dtypes_too(tmp_path: Path) -> None:
    with pytest.raises(CorruptShardError, match="64 bytes; its shape and dtype require 32"):
        Checkpoint.open(write_dtype(tmp_path / "m", "F4", 8))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(IPMergeError, match="the unknown dtype 'F3'"):
        Checkpoint.open(write_dtype(tmp_path / "m", "F3", 8))
