"""Checkpoints are read by header, one tensor at a time, and every lie in a file is found."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, text_weights, write_model
from safetensors.torch import load_file, save_file

from ipmerge_core.errors import CheckpointError, CorruptShardError, MissingTensorError
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint, tensor_bytes


def rewrite_header(file: Path, change: object) -> None:
    """Let `change` edit a shard's parsed header, and write the file anew around it."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    raw = (text if isinstance(text, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def write_index(folder: Path, weight_map: dict[str, object]) -> None:
    """Call the weights a shard, and let an index speak for them."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def weights_file(own_trio: Trio) -> Path:
    return own_trio.base / "model.safetensors"


def test_every_tensor_reads_as_the_safetensors_library_reads_it(trio: Trio) -> None:
    expected = load_file(trio.mllm / "model.safetensors")
    model = Checkpoint.open(trio.mllm)
    assert set(model.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(model.read(name), tensor)
        assert model.read_bytes(name) == tensor_bytes(tensor)


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_every_dtype_survives_reading(code: str, tmp_path: Path) -> None:
    dtype = DTYPES[code]
    values = torch.arange(6).reshape(2, 3)
    tensor = (values % 2 == 1) if dtype is torch.bool else values.to(dtype)
    folder = write_model(tmp_path / "m", {}, TEXT_CONFIG)
    parts = {"a": tensor, "scalar": tensor[0, 0].clone(), "none": tensor[:0].clone()}
    save_file(parts, folder / "model.safetensors")
    model = Checkpoint.open(folder)
    assert model.spec("a").dtype == code
    for name in ("a", "scalar", "none"):
        expected = load_file(folder / "model.safetensors")[name]
        found = model.read(name)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert tensor_bytes(found) == tensor_bytes(expected)


def test_a_sharded_model_is_the_same_model(tmp_path: Path) -> None:
    weights = text_weights()
    one = Checkpoint.open(write_model(tmp_path / "one", weights, TEXT_CONFIG))
    many = Checkpoint.open(write_model(tmp_path / "many", weights, TEXT_CONFIG, shards=3))
    assert len(many.shards) == 3
    assert set(one.tensors) == set(many.tensors)
    assert (one.numel, one.nbytes) == (many.numel, many.nbytes)
    assert all(one.read_bytes(name) == many.read_bytes(name) for name in one.tensors)


def test_the_fingerprint_knows_the_weights_and_not_the_place(
    own_trio: Trio, tmp_path: Path
) -> None:
    before = Checkpoint.open(own_trio.base).fingerprint
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in own_trio.base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert Checkpoint.open(copy).fingerprint == before
    assert Checkpoint.open(own_trio.math).fingerprint != before


def test_an_unknown_tensor_is_refused_by_name(trio: Trio) -> None:
    with pytest.raises(MissingTensorError, match="no tensor 'model.nothing'"):
        Checkpoint.open(trio.base).read("model.nothing")


def test_non_finite_values_are_counted(own_trio: Trio, weights_file: Path) -> None:
    weights = load_file(weights_file)
    weights["model.norm.weight"][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_file(weights, weights_file)
    model = Checkpoint.open(own_trio.base)
    assert model.read("model.norm.weight").isnan().any()
    with pytest.raises(CheckpointError, match="'model.norm.weight' .* 3 NaN or infinite"):
        model.read_matrix("model.norm.weight")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="The model folder '.*nowhere' does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "README.md").write_text("Run make.")
    with pytest.raises(CheckpointError, match=r"See '.*README\.md'\."):
        Checkpoint.open(tmp_path / "nowhere")


def test_pickled_weights_are_refused_with_the_remedy(own_trio: Trio, weights_file: Path) -> None:
    weights_file.rename(own_trio.base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pickle .*Convert it to safetensors"):
        Checkpoint.open(own_trio.base)


def test_a_folder_without_weights_is_refused(own_trio: Trio, weights_file: Path) -> None:
    weights_file.unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        Checkpoint.open(own_trio.base)


def test_a_truncated_file_is_refused(own_trio: Trio, weights_file: Path) -> None:
    weights_file.write_bytes(weights_file.read_bytes()[:-7])
    with pytest.raises(CorruptShardError, match="damaged or incomplete: its tensors end at byte"):
        Checkpoint.open(own_trio.base)


def test_a_file_that_shrinks_during_the_run_is_noticed(own_trio: Trio, weights_file: Path) -> None:
    model = Checkpoint.open(own_trio.base)
    last = max(model.tensors.values(), key=lambda spec: spec.stop)
    weights_file.write_bytes(weights_file.read_bytes()[: last.start + 1])
    with pytest.raises(CorruptShardError, match="modified during the run"):
        model.read(last.name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda header: "[1, 2]",
            "header cannot be read .its content is .1, 2.; expected an object",
        ),
        (lambda header: "{" + "x" * 50, "header cannot be read"),
        (lambda header: '{"a": 1, "a": 2}', "it has the key 'a' twice"),
        (lambda header: header.update(a={"dtype": "F32"}), "'a.shape' is missing"),
        (
            lambda header: header["model.norm.weight"].update(dtype="F12"),
            "'model.norm.weight' has the unknown dtype 'F12'",
        ),
        (
            lambda header: header["model.norm.weight"].update(shape=[-16]),
            r"'model.norm.weight.shape\[0\]' is -16; expected greater than or equal to 0",
        ),
        (
            lambda header: header["model.norm.weight"].update(shape=[1] * 300_000),
            "'model.norm.weight.shape' is .*at most 16 items",
        ),
        (
            lambda header: header["model.norm.weight"].update(dtype=["F32"]),
            r"'model.norm.weight.dtype' is \['F32'\]; expected a valid string",
        ),
        (
            lambda header: header["model.norm.weight"].update(shape=[17]),
            "has 64 bytes; its shape and dtype require 68",
        ),
        (
            lambda header: header.pop("model.norm.weight"),
            "overlaps another tensor or leaves a gap|end at byte",
        ),
        (
            lambda header: header.update(twice=header["model.norm.weight"]),
            "overlaps another tensor",
        ),
    ],
)
def test_a_header_that_lies_is_refused(
    own_trio: Trio, weights_file: Path, damage: object, words: str
) -> None:
    rewrite_header(weights_file, damage)
    with pytest.raises(CorruptShardError, match=words):
        Checkpoint.open(own_trio.base)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**62) + b"{}"])
def test_an_impossible_header_length_is_refused(
    own_trio: Trio, weights_file: Path, content: bytes
) -> None:
    weights_file.write_bytes(content)
    with pytest.raises(CorruptShardError, match="damaged or incomplete"):
        Checkpoint.open(own_trio.base)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "a\\b.safetensors", 7])
def test_an_index_may_name_only_bare_files(own_trio: Trio, shard: object) -> None:
    write_index(own_trio.base, {"model.norm.weight": shard})
    with pytest.raises(CheckpointError, match="only bare file names|expected a valid string"):
        Checkpoint.open(own_trio.base)


def test_an_index_that_misplaces_a_tensor_is_refused(own_trio: Trio) -> None:
    write_index(own_trio.base, {"model.nothing": "part.safetensors"})
    with pytest.raises(MissingTensorError, match="but it is in no shard"):
        Checkpoint.open(own_trio.base)


def test_an_index_that_names_a_missing_shard_is_refused(own_trio: Trio) -> None:
    write_index(own_trio.base, {"model.norm.weight": "model-2.safetensors"})
    with pytest.raises(MissingTensorError, match="lacks the shard 'model-2.safetensors'"):
        Checkpoint.open(own_trio.base)


@pytest.mark.parametrize("content", ["not json", "[]"])
def test_a_broken_config_is_refused(own_trio: Trio, content: str) -> None:
    (own_trio.base / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"'config.json' of .* is damaged: it"):
        Checkpoint.open(own_trio.base)


def test_several_files_without_an_index_are_refused(own_trio: Trio, weights_file: Path) -> None:
    for number in (1, 2):
        (own_trio.base / f"part{number}.safetensors").write_bytes(weights_file.read_bytes())
    weights_file.unlink()
    with pytest.raises(CheckpointError, match="2 safetensors files and no model.safetensors.index"):
        Checkpoint.open(own_trio.base)


def test_one_file_of_another_name_is_taken(own_trio: Trio, weights_file: Path) -> None:
    weights_file.rename(own_trio.base / "weights.safetensors")
    assert Checkpoint.open(own_trio.base).shards == ["weights.safetensors"]


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", text_weights(), TEXT_CONFIG, shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(CorruptShardError, match="each tensor must be in exactly one shard"):
        Checkpoint.open(folder)
