"""fp8 weights are read as floats: every kind of scale, every role, and the merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, Weights, as_mllm, fine_tuned, text_weights, write_model
from families import FAMILIES, build, set_config
from safetensors.torch import load_file, save_file

import ipmerge_core
from ipmerge_core.cli import main
from ipmerge_core.errors import CheckpointError
from ipmerge_core.inference.loading import load_model
from ipmerge_core.models import checkpoint
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import LocalFiles, RemoteFiles
from ipmerge_core.models.pairing import open_pair

DEMO = Path(__file__).parents[1] / "assets" / "demo"
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


def test_the_check_says_what_is_dequantised_and_the_roles_may_mix(tmp_path: Path) -> None:
    trio = write_all(tmp_path, "block")
    pair = open_pair(trio.mllm, values_of(trio.math), trio.base)
    findings = {finding.subject: finding for finding in pair.check()}
    assert findings["mllm: fp8"].level == "ok"
    assert findings["mllm: fp8"].message.startswith(
        f"'{trio.mllm}' is stored in fp8 with scales per block of 8 x 6: 21 matrices are "
        f"dequantised while they are read, as BF16. The rounding to fp8 (up to 6 %"
    )
    assert "math: fp8" not in findings
    assert findings["dtype"].level == "warning"  # the rounding of fp8 is in the task vectors
    assert "math BF16" in findings["dtype"].message
    assert "mllm F8_E4M3" in findings["dtype"].message


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((6, 4, 8), (6, 1, 1)),  # per matrix of a stack
        ((6, 4, 8), (6,)),
        ((6, 4, 8), (6, 4, 1)),  # per row
        ((6, 4, 8), (6, 1, 8)),  # per column, as in Llama 4
        ((6, 4, 8), (1,)),
        ((4, 8), ()),
        ((4, 8), (4,)),
        ((4, 8), (4, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_of_a_stack_apply_to_their_matrix(
    shape: tuple[int, ...], scale: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = torch.randn(shape).to(dtype)
    scales = torch.rand(scale) + 0.5
    folder = write_model(tmp_path / "m", {}, {"torch_dtype": "float32"})
    stored = {"experts.down_proj": weight, "experts.down_proj_scale": scales.bfloat16()}
    save_file(stored, folder / "model.safetensors")
    model = Checkpoint.open(folder)
    factors = scales.bfloat16().float()
    if len(scale) == 1 and scale[0] > 1:
        factors = factors.reshape(-1, *(1 for _ in shape[1:]))
    expected = weight.float() * factors
    assert list(model.tensors) == ["experts.down_proj"]
    assert torch.equal(model.read("experts.down_proj"), expected)
    assert torch.equal(model.read("experts.down_proj[1:4]"), expected[1:4])


def test_a_model_on_the_hub_is_read_by_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    folder = write_fp8(tmp_path / "m", text_weights(), TEXT_CONFIG, "block")
    remote = RemoteFiles("org/m", "0" * 40, LocalFileSystem(), str(folder))
    monkeypatch.setattr(checkpoint, "find_files", lambda *_, **__: remote)
    model = Checkpoint.open("org/m")
    assert (model.id, model.files.revision, model.files.remote) == ("org/m", "0" * 40, True)
    values = Checkpoint(LocalFiles(values_of(folder)))
    assert all(torch.equal(model.read(name), values.read(name)) for name in values.tensors)
    assert model.files.stamp(model.shards[0]) is None
    assert model.content is None


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)])
def test_a_weight_without_elements_is_read(shape: tuple[int, int], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {}, {"dtype": "bfloat16"})
    stored = {"a": torch.ones(shape).to(E4M3), "a_scale": torch.ones(1), "b": torch.ones(2)}
    save_file(stored, folder / "model.safetensors")
    model = Checkpoint.open(folder)
    assert model.read("a").shape == shape
    assert torch.equal(model.read("b"), torch.ones(2))
    assert model.fingerprint


@pytest.mark.parametrize("part", ["text_config", None])
def test_settings_inside_the_config_of_a_part_count_too(part: str | None, tmp_path: Path) -> None:
    folder = write_fp8(tmp_path / "m", as_mllm(text_weights()), MLLM_CONFIG, "block")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (config[part] if part else config)["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    model = Checkpoint.open(folder)
    assert model.dequantised
    assert "quantization_config" not in json.dumps(model.config)


@pytest.mark.parametrize(
    ("dtype", "read", "written"),
    [
        ("float16", "F16", "float16"),
        ("float32", "F32", "float32"),
        ("float8_e4m3fn", "BF16", "bfloat16"),
        (None, "BF16", None),
        ([], "BF16", []),
    ],
)
def test_the_dtype_is_that_of_the_config_or_bf16(
    dtype: object, read: str, written: object, tmp_path: Path
) -> None:
    folder = write_fp8(tmp_path / "m", text_weights(), TEXT_CONFIG, "block")
    set_config(folder, dtype=dtype)
    model = Checkpoint.open(folder)
    assert model.spec("model.layers.0.self_attn.q_proj.weight").dtype == read
    assert model.spec("model.norm.weight").dtype == "BF16"  # as stored
    assert model.config["dtype"] == written


def damage(folder: Path, change: Callable[[Weights], object]) -> None:
    """Change the stored tensors, and the index to what is stored then."""
    index: dict[str, str] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights = load_file(shard)
        change(weights)
        save_file(weights, shard)
        index |= dict.fromkeys(weights, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


SCALE = "model.layers.0.self_attn.q_proj.weight_scale_inv"


def reshaped(weights: Weights) -> None:
    if SCALE in weights:
        weights[SCALE] = torch.ones(3, 2)


def of_bytes(weights: Weights) -> None:
    if SCALE in weights:
        weights[SCALE] = weights[SCALE].to(torch.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            reshaped,
            r"'model.layers.0.self_attn.q_proj.weight_scale_inv' of .* has the shape \(3, 2\), "
            r"which does not fit '.*q_proj.weight' \(16, 16\). Expected \(2, 3\) per block of "
            r"8 x 6. Do the weights",
        ),
        (of_bytes, r"weight_scale_inv' of .* is quantised \(U8\); expected scales in F32"),
        (lambda weights: weights.pop(SCALE, None), "is stored as F8_E4M3 without its scale"),
    ],
)
@pytest.mark.parametrize("role", ["base", "mllm", "math"])
def test_scales_that_do_not_fit_are_refused_in_every_role(
    change: Callable[[Weights], object],
    words: str,
    role: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {
        name: write_fp8(tmp_path / name, text_weights(), TEXT_CONFIG, "block")
        for name in ("base", "mllm", "math")
    }
    damage(folders[role], change)
    with pytest.raises(CheckpointError, match=words):
        open_pair(folders["mllm"], folders["math"], folders["base"])
    arguments = [text for name in folders for text in (f"--{name}", str(folders[name]))]
    assert main(["check", *arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [[128], [128, 0], "128x128", [128, 128, 128]])
def test_an_invalid_block_size_is_refused(size: object, tmp_path: Path) -> None:
    folder = write_fp8(tmp_path / "m", text_weights(), TEXT_CONFIG, "block")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config of .* has no valid block size"):
        Checkpoint.open(folder)


def test_other_weights_are_other_fingerprints(tmp_path: Path) -> None:
    folder = write_fp8(tmp_path / "m", text_weights(), TEXT_CONFIG, "block")
    before = Checkpoint.open(folder)
    scales = {name for name in load_file(next(folder.glob("*.safetensors"))) if "scale" in name}
    damage(folder, lambda weights: weights.update({n: 2 * weights[n] for n in scales & {*weights}}))
    after = Checkpoint.open(folder)
    assert before.fingerprint != after.fingerprint
    assert before.content != after.content


@pytest.mark.parametrize("kind", ["block", "tensor"])
def test_a_merge_of_fp8_files_loads_in_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folders = build(FAMILIES["Qwen2.5-VL"], tmp_path)
    mllm = folders["hub"]
    stored = load_file(mllm / "model.safetensors")
    vision = {name: stored.pop(name).bfloat16() for name in list(stored) if "visual" in name}
    save_file(vision | as_fp8(stored, kind)[0], mllm / "model.safetensors", {"format": "pt"})
    skip = ["visual", "model.visual", "lm_head"]
    set_config(
        mllm, quantization_config={**KINDS[kind], "modules_to_not_convert": skip}, dtype="bfloat16"
    )
    pair = open_pair(mllm, folders["math"], folders["base"])
    ipmerge_core.merge(
        ipmerge_core.make_plan(pair, method="task_arithmetic", math_weight=0.5), tmp_path / "out"
    )
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    layers = loaded.get_decoder().layers
    for matrix in pair.matrices:
        weights = pair.read(matrix)
        expected = (weights.mllm + 0.5 * (weights.math[0] - weights.base)).bfloat16()
        part = (
            layers[matrix.layer].self_attn if matrix.module in "qkvo" else layers[matrix.layer].mlp
        )
        found = getattr(part, f"{matrix.module}_proj").weight
        torch.testing.assert_close(found.data, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", ["block", "channel"])
def test_a_chat_runs_the_floats_that_are_merged(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "mllm"
    shutil.copytree(DEMO / "mllm", folder)
    stored = load_file(folder / "model.safetensors")
    vision = {name: stored.pop(name) for name in list(stored) if "vision" in name}
    save_file(vision | as_fp8(stored, kind)[0], folder / "model.safetensors", {"format": "pt"})
    set_config(folder, quantization_config=KINDS[kind])
    files = Checkpoint.open(folder)
    model = load_model(folder).model
    name = "layers.1.mlp.down_proj.weight"
    (stored_name,) = [tensor for tensor in files.tensors if tensor.endswith(name)]
    loaded = model.get_decoder().get_submodule(name.removesuffix(".weight")).weight
    assert torch.equal(loaded.data, files.read(stored_name))
    assert loaded.dtype == model.dtype == torch.float32  # the config's
