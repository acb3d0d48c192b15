"""The weights of a folder are those that transformers loads, and a merge leaves no others there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, Weights, fine_tuned, text_weights, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ipmerge_core as ipm
from ipmerge_core.errors import CheckpointError, MissingTensorError, ModelLoadError
from ipmerge_core.inference.loading import load_model
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.siblings import Finding
from ipmerge_core.models.writer import files_to_copy

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RIGHT, OTHER = fine_tuned(text_weights(), 1), fine_tuned(text_weights(), 5)
CONFIG = {**TEXT_CONFIG, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}


def single(folder: Path, weights: Weights = RIGHT, name: str = SINGLE) -> None:
    save_file(weights, folder / name, metadata={"format": "pt"})


def sharded(
    folder: Path, weights: Weights, kept: int = 3, suffix: str = "", index: str = INDEX
) -> list[str]:
    """Write three shards, or fewer, with an index of all; return the names of the shards."""
    shards = [f"model-{number:05}-of-00003{suffix}.safetensors" for number in (1, 2, 3)]
    parts = [dict(list(weights.items())[number::3]) for number in range(3)]
    for shard, part in list(zip(shards, parts, strict=True))[:kept]:
        save_file(part, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(content))
    return shards


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def single_beside_left_over_shards(folder: Path) -> None:
    single(folder)
    sharded(folder, OTHER)


def single_beside_an_index_without_its_shards(folder: Path) -> None:
    single(folder)
    sharded(folder, OTHER, kept=0)


def single_beside_an_index_with_some_shards(folder: Path) -> None:
    single(folder)
    sharded(folder, OTHER, kept=2)


def single_beside_an_unreadable_index(folder: Path) -> None:
    single(folder)
    (folder / INDEX).write_text("{")


def shards_beside_one_that_no_index_names(folder: Path) -> None:
    sharded(folder, RIGHT)
    single(folder, OTHER, "model-00004-of-00004.safetensors")


def an_index_that_lists_some_of_the_tensors(folder: Path) -> None:
    sharded(folder, RIGHT)
    edit(folder / INDEX, lambda content: content["weight_map"].pop("model.norm.weight"))
    edit(folder / INDEX, lambda content: content["weight_map"].pop("lm_head.weight"))


def single_beside_pickles(folder: Path) -> None:
    single(folder)
    torch.save(OTHER, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "b.bin"}}))


def shards_beside_pickles(folder: Path) -> None:
    sharded(folder, RIGHT)
    torch.save(OTHER, folder / "pytorch_model.bin")


def single_beside_a_variant(folder: Path) -> None:
    single(folder)
    single(folder, OTHER, "model.fp16.safetensors")


def shards_beside_a_variant(folder: Path) -> None:
    sharded(folder, RIGHT)
    sharded(folder, OTHER, suffix=".fp16", index="model.safetensors.index.fp16.json")


def single_beside_consolidated(folder: Path) -> None:
    single(folder)
    single(folder, OTHER, "consolidated.safetensors")


def shards_beside_consolidated_shards(folder: Path) -> None:
    sharded(folder, RIGHT)
    single(folder, OTHER, "consolidated-00001-of-00001.safetensors")
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))


def single_beside_an_adapter_without_config(folder: Path) -> None:
    single(folder)
    single(folder, {"lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors")


def single_beside_a_sub_folder(folder: Path) -> None:
    single(folder)
    (folder / "checkpoint-500").mkdir()
    sharded(folder / "checkpoint-500", OTHER)


def shards_beside_a_single_in_a_sub_folder(folder: Path) -> None:
    sharded(folder, RIGHT)
    (folder / "old").mkdir()
    single(folder / "old", OTHER)


def a_file_that_the_config_names(folder: Path) -> None:
    single(folder, OTHER)
    sharded(folder, OTHER)
    single(folder, name="chosen.safetensors")
    edit(folder / "config.json", lambda c: c.update(transformers_weights="chosen.safetensors"))


def an_index_that_the_config_names(folder: Path) -> None:
    single(folder, OTHER)
    name = "chosen.safetensors.index.json"
    sharded(folder, RIGHT, index=name)
    edit(folder / "config.json", lambda c: c.update(transformers_weights=name))


LAYOUTS = [
    single,
    lambda folder: sharded(folder, RIGHT),
    single_beside_left_over_shards,
    single_beside_an_index_without_its_shards,
    single_beside_an_index_with_some_shards,
    single_beside_an_unreadable_index,
    shards_beside_one_that_no_index_names,
    an_index_that_lists_some_of_the_tensors,
    single_beside_pickles,
    shards_beside_pickles,
    single_beside_a_variant,
    shards_beside_a_variant,
    single_beside_consolidated,
    shards_beside_consolidated_shards,
    single_beside_an_adapter_without_config,
    single_beside_a_sub_folder,
    shards_beside_a_single_in_a_sub_folder,
    a_file_that_the_config_names,
    an_index_that_the_config_names,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that has no weights yet."""
    path = write_model(tmp_path / "model", text_weights(), CONFIG)
    (path / SINGLE).unlink()
    return path


def loaded(folder: Path) -> Weights:
    """Load a folder with transformers, whole, and return its tensors."""
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return dict(model.state_dict())


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checks(folder: Path, tmp_path: Path) -> dict[str, Finding]:
    base = write_model(tmp_path / "base", text_weights(), CONFIG)
    math = write_model(tmp_path / "math", fine_tuned(text_weights(), 2), CONFIG)
    return {found.subject: found for found in ipm.open_pair(folder, math, base).check()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_that_transformers_loads(
    layout: Callable[[Path], object], folder: Path
) -> None:
    layout(folder)
    model = Checkpoint.open(folder)
    read = {name: model.read(name) for name in model.tensors}
    assert same(loaded(folder), RIGHT)
    assert same(read, RIGHT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merge_reads_and_leaves_one_set_of_weights(
    layout: Callable[[Path], object], folder: Path, tmp_path: Path
) -> None:
    layout(folder)
    base = write_model(tmp_path / "base", text_weights(), CONFIG)
    experts = fine_tuned(text_weights(), 2)
    math = write_model(tmp_path / "math", experts, CONFIG)
    plan = ipm.make_plan(
        ipm.open_pair(folder, math, base), method="task_arithmetic", math_weight=0.5
    )
    out = tmp_path / "out"
    ipm.merge(plan, out)
    for name, merged in loaded(out).items():
        expected = RIGHT[name] + 0.5 * (experts[name] - text_weights()[name])
        torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)
    weights = Checkpoint.open(out).weights
    assert not weights.unused
    others = {"config.json", "tokenizer.json", "README.md", "ipmerge.json"}
    expected_files = {*weights.shards, weights.index, *others} - {None}
    assert {path.name for path in out.iterdir()} == expected_files


def test_the_fingerprint_is_that_of_the_weights_in_use(folder: Path, tmp_path: Path) -> None:
    single(folder)
    alone = Checkpoint.open(folder).fingerprint
    sharded(folder, OTHER)
    assert Checkpoint.open(folder).fingerprint == alone
    (folder / SINGLE).unlink()
    assert Checkpoint.open(folder).fingerprint != alone


@pytest.mark.parametrize(
    ("layout", "read", "beside"),
    [
        (single_beside_left_over_shards, SINGLE, "'model-00001-of-00003.safetensors' and 3 more"),
        (single_beside_an_index_without_its_shards, SINGLE, f"'{INDEX}'."),
        (shards_beside_one_that_no_index_names, INDEX, "'model-00004-of-00004.safetensors'."),
        (a_file_that_the_config_names, "chosen.safetensors", "'model-00001-of-00003"),
    ],
)
def test_what_is_not_read_is_named(
    layout: Callable[[Path], object], read: str, beside: str, folder: Path, tmp_path: Path
) -> None:
    layout(folder)
    found = checks(folder, tmp_path)["mllm: weight files"]
    assert found.level == "warning"
    assert f"is read from '{read}', as in transformers" in found.message
    assert beside in found.message


@pytest.mark.parametrize(
    "layout",
    [single, single_beside_a_variant, shards_beside_a_variant, single_beside_consolidated,
     shards_beside_consolidated_shards, single_beside_pickles],
)  # fmt: skip
def test_known_second_copies_are_no_warning(
    layout: Callable[[Path], object], folder: Path, tmp_path: Path
) -> None:
    layout(folder)
    assert not any(subject.endswith("weight files") for subject in checks(folder, tmp_path))


def test_an_adapter_beside_the_weights_is_named_and_not_taken_along(
    folder: Path, tmp_path: Path
) -> None:
    single(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    single(folder, {"lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors")
    found = checks(folder, tmp_path)["mllm: adapter"]
    assert found.level == "warning"
    assert "'adapter_config.json'" in found.message
    plan = ipm.make_plan(
        ipm.open_pair(folder, tmp_path / "math", tmp_path / "base"), method="linear"
    )
    ipm.merge(plan, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    with pytest.raises(
        ModelLoadError, match="contains both weights and a PEFT adapter .*merge_and_unload"
    ):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "weights.safetensors"])
def test_the_only_file_under_another_name_is_merged_into_one_that_loads(
    name: str, folder: Path, tmp_path: Path
) -> None:
    single(folder, name=name)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        loaded(folder)
    assert Checkpoint.open(folder).shards == [name]
    base = write_model(tmp_path / "base", text_weights(), CONFIG)
    plan = ipm.make_plan(
        ipm.open_pair(folder, base, base), method="task_arithmetic", math_weight=1.0
    )
    # The expert is its own base, so that the MLLM's weights are kept; the sibling check refuses it.
    steps = ipm.iter_merge(plan, tmp_path / "out", force=True)
    for _ in range(5):
        next(steps)
    steps.close()
    actions = [step.action for step in ipm.iter_merge(plan, tmp_path / "out", force=True)]
    assert "resumed" in actions
    assert same(loaded(tmp_path / "out"), RIGHT)
    assert (tmp_path / "out" / SINGLE).read_bytes() == (folder / name).read_bytes()


def pickle_and_another_file(folder: Path) -> None:
    torch.save(OTHER, folder / "pytorch_model.bin")
    single(folder, name="weights.safetensors")


def pickle_and_adapter(folder: Path) -> None:
    torch.save(OTHER, folder / "pytorch_model.bin")
    single(folder, {"lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors")


def indexed_pickles_and_another_file(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    single(folder, name="weights.safetensors")


def distributed_beside_single(folder: Path) -> None:
    single(folder)
    single(folder, OTHER, "shard-00000-model-00001-of-00001.safetensors")


def one_shard_without_index(folder: Path) -> None:
    sharded(folder, RIGHT, kept=1)
    (folder / INDEX).unlink()


def shards_of_a_variant(folder: Path) -> None:
    sharded(folder, RIGHT, suffix=".fp16", index="model.safetensors.index.fp16.json")


def missing_file_of_the_config(folder: Path) -> None:
    single(folder)
    edit(folder / "config.json", lambda c: c.update(transformers_weights="chosen.safetensors"))


def pickle_of_the_config(folder: Path) -> None:
    single(folder)
    edit(folder / "config.json", lambda c: c.update(transformers_weights="chosen.bin"))


def file_of_the_config_outside(folder: Path) -> None:
    single(folder)
    shutil.copy(folder / SINGLE, folder.parent / SINGLE)
    edit(folder / "config.json", lambda c: c.update(transformers_weights="../model.safetensors"))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            pickle_and_another_file,
            "'pytorch_model.bin' and 'weights.safetensors', and transformers",
        ),
        (pickle_and_adapter, "only as pickle .'pytorch_model.bin'"),
        (indexed_pickles_and_another_file, "'pytorch_model.bin.index.json' and 'weights."),
        (
            distributed_beside_single,
            "distributed checkpoint .'shard-00000-model.* in preference",
        ),
        (one_shard_without_index, "has 1 safetensors file and no model.safetensors.index.json"),
        (shards_of_a_variant, "only as a variant .'model.safetensors.index.fp16.json'"),
        (lambda f: single(f, name="consolidated.safetensors"), "layout .* .'consolidated.safe"),
        (lambda f: (f / "q4.gguf").touch(), "no safetensors weights .* 'q4.gguf' is a GGUF file"),
        (missing_file_of_the_config, "lacks 'chosen.safetensors', which its config names"),
        (pickle_of_the_config, "names 'chosen.bin' as its weights"),
        (file_of_the_config_outside, "names '../model.safetensors' as its weights"),
        (lambda f: sharded(f, RIGHT, kept=2), "lacks the shard 'model-00003-of-00003"),
    ],
)
def test_a_folder_from_which_transformers_loads_something_else_is_refused(
    layout: Callable[[Path], object], words: str, folder: Path
) -> None:
    layout(folder)
    with pytest.raises((CheckpointError, MissingTensorError), match=words):
        Checkpoint.open(folder)


def test_a_folder_with_a_gguf_file_alone_is_told_what_to_use(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").touch()
    with pytest.raises(CheckpointError, match=r"no config.json.*is a GGUF file.*converted from"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model-Q4_K_M.gguf"])
def test_a_file_is_told_to_be_given_as_its_folder(file: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    words = (
        rf"{file}' is a file\. .*: give '{tmp_path}' if it is one\. .* such as GGUF, are not read"
    )
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path / file)


@pytest.mark.parametrize("place", ["run/checkpoint-{}", "models--a--b/snapshots/{}"])
def test_the_parent_of_models_names_the_last_written(place: str, tmp_path: Path) -> None:
    for step in (1000, 500):
        model = write_model(tmp_path / place.format(step), text_weights(), CONFIG)
        os.utime(model, (step, step))
    parent = tmp_path / place.partition("/")[0]
    with pytest.raises(CheckpointError, match=r"It contains 2 model folders: .*'.*/(ch.*-)?1000'"):
        Checkpoint.open(parent)


@pytest.mark.parametrize("has_config", [True, False])
def test_consolidated_weights_alone_name_the_layout_to_use(
    has_config: bool, tmp_path: Path
) -> None:
    single(tmp_path, name="consolidated.safetensors")
    (tmp_path / ("config.json" if has_config else "params.json")).write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"'consolidated\.safetensors'.* in the transformers layout"
    ):
        Checkpoint.open(tmp_path)


def test_the_state_of_a_training_run_is_not_part_of_a_model(folder: Path, tmp_path: Path) -> None:
    names = [
        "trainer_state.json", "trainer_log.jsonl", "optimizer.pt", "optimizer.bin", "scheduler.pt",
        "rng_state.pth", "rng_state_0.pth", "training_args.bin", "latest", "scaler.pt",
        "random_states_0.pkl",
    ]  # fmt: skip
    for name in names:
        (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match="has no safetensors weights"):  # and no pickles
        Checkpoint.open(folder)
    single(folder)
    copied = files_to_copy(Checkpoint.open(folder))
    assert "config.json" in copied
    assert not set(copied) & set(names)


def test_two_shards_with_one_tensor_are_still_refused_by_both_names(folder: Path) -> None:
    first, second, _ = sharded(folder, RIGHT)
    save_file(load_file(folder / first) | load_file(folder / second), folder / second)
    with pytest.raises(CheckpointError, match=f"is in both '{first}' and '{second}'"):
        Checkpoint.open(folder)
