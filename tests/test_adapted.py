"""LoRA adapters as models: the values are those that PEFT merges, read like any other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from conftest import TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model
from peft_adapters import edit_config, make_adapter
from safetensors.torch import load_file, save_file

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.adapted import AdaptedCheckpoint
from ipmerge_core.models.adapter_config import AdapterConfig
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint, as_tensor
from ipmerge_core.models.files import LocalFiles, RemoteFiles
from ipmerge_core.models.opening import _base_of, open_model
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.models.writer import files_to_copy

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OPTIONS = {
    "a list of names": {},
    "a pattern": {"target_modules": r".*\.layers\.[02]\.(self_attn\.q_proj|mlp\.up_proj)"},
    "a pattern with look-ahead": {"target_modules": r"^(?!.*lm_head).*self_attn\.(q|k)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": list(SEVEN), "exclude_modules": ["o_proj"]},
    "excluded by a pattern": {"target_modules": list(SEVEN), "exclude_modules": r".*mlp\..*"},
    "excluded with look-ahead": {
        "target_modules": list(SEVEN),
        "exclude_modules": r"(?!.*self_attn).*\.up_proj",
    },
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


def test_weights_stored_transposed_are_changed_as_peft_does(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    names = ["c_attn", "c_proj"]  # c_proj of the attention is square
    made = make_adapter(
        tmp_path / "base", tmp_path / "adapter", target_modules=names, fan_in_fan_out=True
    )
    model = open_model(made.folder)
    for name in model._changes:
        torch.testing.assert_close(model.read(name), made.merged[name], rtol=2e-6, atol=2e-7)
    assert len(model._changes) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_rows_and_bytes_are_those_of_the_whole_tensor(
    dtype: torch.dtype, settings: dict[str, object], tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", text_weights(), TEXT_CONFIG, dtype=dtype)
    made = make_adapter(base, tmp_path / "a", dtype=dtype, target_modules=list(SEVEN), **settings)
    model, stored = open_model(made.folder), Checkpoint.open(base)
    assert model.tensors == stored.tensors
    name = "model.layers.1.mlp.down_proj.weight"
    whole, spec = model.read(name), model.spec(name)
    assert whole.dtype == torch.float32
    assert model.read_size(name) == whole.nbytes
    assert model.read_size("model.norm.weight") == model.spec("model.norm.weight").nbytes
    torch.testing.assert_close(model.read(f"{name}[3:7]"), whole[3:7])
    rounded = whole.to(DTYPES[spec.dtype])
    for data in (
        model.read_bytes(name),
        bytearray(b"".join(model.iter_bytes(name, step=100))),  # cuts inside a row
    ):
        torch.testing.assert_close(as_tensor(data, spec.dtype).reshape(spec.shape), rounded)
    assert model.read_bytes(name, 5, 5) == b""
    rows = as_tensor(model.read_bytes(f"{name}[3:7]"), spec.dtype).reshape(4, -1)
    torch.testing.assert_close(rows, rounded[3:7])


def test_a_base_in_fp64_is_changed_in_fp64(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", text_weights(), TEXT_CONFIG, dtype=torch.float64)
    made = make_adapter(base, tmp_path / "adapter", base_dtype=torch.float64)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert open_model(made.folder).read(name).dtype == torch.float64


def test_the_factors_of_a_matrix_give_its_change(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    base = Checkpoint.open(trio.base)
    model = open_model(made.folder, base=base)
    name = "model.layers.0.mlp.down_proj.weight"
    for address in (name, f"{name}[2:9]"):
        left, right, scale = model.factors(address, base)
        change = model.read(address) - base.read(address)
        torch.testing.assert_close(scale * left @ right, change, rtol=1e-4, atol=1e-6)
    assert model.factors("model.layers.0.self_attn.k_proj.weight", base) is None
    assert model.factors(name, Checkpoint.open(trio.math)) is None  # relative to another base


def test_dora_and_replaced_weights_have_no_factors(trio: Trio, tmp_path: Path) -> None:
    base = Checkpoint.open(trio.base)
    made = make_adapter(trio.base, tmp_path / "dora", use_dora=True)
    model = open_model(made.folder, base=base)
    assert model.factors("model.layers.0.self_attn.q_proj.weight", base) is None
    assert "DoRA adapter of rank 2 on 6 matrices" in model.remark.message


def test_the_identity_covers_the_adapter_its_configuration_and_its_base(
    own_trio: Trio, tmp_path: Path
) -> None:
    made = make_adapter(own_trio.base, tmp_path / "adapter")

    def identity(base: Path = own_trio.base) -> tuple[str, str | None]:
        model = open_model(made.folder, base=base)
        return model.fingerprint, model.content

    first = identity()
    assert identity() == first
    assert identity(own_trio.math) != first
    edit_config(made.folder, lora_alpha=5)
    second = identity()
    assert second[0] != first[0]
    weights = load_file(made.folder / "adapter_model.safetensors")
    key = next(iter(weights))
    save_file({**weights, key: weights[key] + 1}, made.folder / "adapter_model.safetensors")
    assert identity()[0] != second[0]
    assert identity()[1] != second[1]


def test_files_are_those_of_the_base_with_the_tokenizer_of_the_adapter(
    trio: Trio, tmp_path: Path
) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter")
    model = open_model(made.folder)
    assert files_to_copy(model) == files_to_copy(Checkpoint.open(trio.base))
    before = model.other_files
    (made.folder / "tokenizer.json").write_text('{"own": 1}')
    (made.folder / "trainer_state.json").write_text("{}")
    model = open_model(made.folder)
    assert files_to_copy(model) == ["config.json", "tokenizer.json"]
    assert model.files.read("tokenizer.json") == b'{"own": 1}'
    assert model.other_files != before
    with pytest.raises(CheckpointError, match="is a PEFT adapter .*merge_and_unload"):
        model.files.local_folder()


def test_the_base_is_the_named_one_unless_another_is_given(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter")
    assert open_model(made.folder).base.id == str(trio.base)
    given = open_model(made.folder, base=trio.math)
    assert given.base.id == str(trio.math)
    assert "It was trained on 'base'." in given.remark.message
    assert given.remark.remedy.startswith("Use that model as base")
    assert open_model(made.folder).remark.remedy == ""


def test_embeddings_of_another_size_are_those_of_the_adapter(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter", modules_to_save=["lm_head"])
    path = made.folder / "adapter_model.safetensors"
    weights = load_file(path)
    head = "base_model.model.lm_head.weight"
    save_file({**weights, head: torch.ones(23, 16)}, path)
    model = open_model(made.folder)
    assert model.spec("lm_head.weight").shape == (23, 16)
    assert torch.equal(model.read("lm_head.weight[21:23]"), torch.ones(2, 16))
    assert len(model.read_bytes("lm_head.weight")) == 23 * 16 * 4


def test_an_adapter_on_the_hub_is_pinned_and_read_by_ranges(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter")
    system, sha = fsspec.filesystem("file"), "0" * 40

    def opened(adapter_sha: str) -> AdaptedCheckpoint:
        base = Checkpoint(RemoteFiles("org/base", sha, system, str(trio.base)))
        files = RemoteFiles("org/adapter", adapter_sha, system, str(made.folder))
        return AdaptedCheckpoint(files, AdapterConfig.read(files), base)

    model = opened(sha)
    assert model.files.remote
    assert (model.id, model.files.revision, model.content) == ("org/adapter", sha, None)
    assert opened("1" * 40).fingerprint != model.fingerprint == opened(sha).fingerprint
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(model.read(name), made.merged[name], rtol=2e-6, atol=2e-7)
    levels = {f.subject: f.level for f in open_pair(trio.mllm, model, model.base).check()}
    assert "refusal" not in levels.values()  # not taken for the files of its base


def test_a_layer_without_its_factors_is_a_warning(
    trio: Trio, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1.self_attn.q" not in k}, path)
    remark = open_model(folder).remark
    assert "no factors for 1 weights" in remark.message
    assert "'model.layers.1.self_attn.q_proj.weight' first" in remark.message
    assert remark.remedy.startswith("Was it saved")
    edit_config(folder, target_modules=r"model\.layers\.([^1]\..*|1\.self_attn\.v)_proj")
    assert "no factors" not in open_model(folder).remark.message


def test_layers_that_are_not_to_be_adapted_are_not_missing(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter", layers_to_transform=[1])
    assert "no factors" not in open_model(made.folder).remark.message


# --- bad input ---


def lacks_a_target(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    renamed = {k.replace("v_proj", "w_proj"): v for k, v in load_file(path).items()}
    save_file(renamed, path)
    edit_config(folder, target_modules=["q_proj", "w_proj"])


def has_other_shapes(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    wider = {k: torch.ones(len(v), 99) if "lora_A" in k else v for k, v in load_file(path).items()}
    save_file(wider, path)


def has_half_a_pair(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "q_proj.lora_B" not in k}, path)


def has_no_factors(folder: Path) -> None:
    save_file(
        {"base_model.model.lm_head.weight": torch.ones(20, 16)},
        folder / "adapter_model.safetensors",
    )


def has_foreign_names(folder: Path) -> None:
    save_file({"q_proj.lora_A.weight": torch.ones(2, 16)}, folder / "adapter_model.safetensors")


def has_only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def has_no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def set_config(**changes: object) -> object:
    return lambda folder: edit_config(folder, **changes)


DAMAGE = {
    "a target that the base lacks": (
        lacks_a_target,
        "changes 'model.layers.0.self_attn.w_proj.weight', which its base .*base' does not have. "
        "Use the model that it was trained on, '.*base', as base.",
    ),
    "another base": (
        has_other_shapes,
        r"changes 'model.layers.0.self_attn.[qv]_proj.weight' as a tensor of shape \(\d+, 99\); "
        r"in its base '.*base' it has the shape \(\d+, 16\). Use the model that it was trained on",
    ),
    "half a pair": (has_half_a_pair, "has no lora_B for 'model.layers.0.self_attn.q_proj'"),
    "no factors": (has_no_factors, "has no LoRA factors .lora_A, lora_B. in its 1 tensors"),
    "foreign names": (has_foreign_names, "expected names that start with 'base_model.model.'"),
    "only pickle": (has_only_pickle, "only as pickle .'adapter_model.bin'.*load it with PEFT"),
    "no weights": (has_no_weights, "has no 'adapter_model.safetensors'"),
    "another type": (set_config(peft_type="IA3"), "of type 'IA3'; expected 'LORA'"),
    "no type": (set_config(peft_type=None), "of type None; expected 'LORA'"),
    "a wrong rank": (set_config(r=3), r"expected the rank 3 of its configuration"),
    "no rank": (set_config(r=0), "'r' is 0"),
    "a rank of text": (set_config(r="2"), "'r' is '2'"),
    "infinite alpha": (set_config(lora_alpha=1e300), "'lora_alpha' is 1e"),
    "an invalid pattern of targets": (
        set_config(target_modules="model.(layers.*"),
        "damaged: its pattern 'model.*' is not a valid regular",
    ),
    "an invalid pattern of exceptions": (
        set_config(exclude_modules="*_proj"),
        "damaged: its pattern '.*_proj' is not a valid regular",
    ),
    "a wrong pattern": (
        set_config(rank_pattern={"(": 2}),
        "its pattern .* is not a valid regular",
    ),
    "other targets": (
        set_config(target_modules=["q_proj"]),
        "has factors for 'model.layers.0.self_attn.v_proj', which its configuration does not",
    ),
    "other layers": (set_config(layers_to_transform=[0]), "'model.layers.1.self_attn.q_proj'"),
    "magnitudes without dora": (set_config(use_dora=True), "has no lora_magnitude"),
    "a start that moves the base": (
        set_config(init_lora_weights="pissa_niter_4"),
        "initialised with 'pissa_niter_4'.*path_initial_model_for_weight_conversion",
    ),
    "an unsupported option": (set_config(lora_bias=True), "uses 'lora_bias' .True.*not supported"),
    "an unknown option": (set_config(use_telepathy=1), "uses 'use_telepathy' .1.*not supported"),
    "layer replication": (set_config(layer_replication=[[0, 2]]), "uses 'layer_replication'"),
    "too many patterns": (
        set_config(rank_pattern={f"layer{n}": 2 for n in range(2000)}),
        "'rank_pattern' is .*1024",
    ),
    "no base": (set_config(base_model_name_or_path=None), "names no base"),
    "a base that does not exist": (
        set_config(base_model_name_or_path="/nowhere/base"),
        "The model folder '/nowhere/base' does not exist",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_an_adapter_that_cannot_be_applied_is_refused_in_one_sentence(
    damage: object, message: str, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def adapter(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid adapter, to be copied and damaged."""
    return make_adapter(trio.base, tmp_path_factory.mktemp("valid") / "adapter").folder


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    edit_config(folder, base_model_name_or_path=str(folder))
    with pytest.raises(CheckpointError, match="no config.json.*It is a PEFT adapter"):
        open_model(folder)


def test_a_quantised_base_is_refused_by_name(adapter: Path, tmp_path: Path) -> None:
    weights = fine_tuned(text_weights(), 2)
    folder = write_model(tmp_path / "base", weights, TEXT_CONFIG)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**stored, name: torch.ones(128, 1, dtype=torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="stored as U8, that is, quantised"):
        open_model(adapter, base=folder)


def test_the_base_of_an_adapter_from_the_hub_is_on_the_hub(adapter: Path) -> None:
    files = LocalFiles(adapter, id="org/adapter", revision="0" * 40)
    with pytest.raises(CheckpointError, match="which is not a hub id"):
        _base_of(files, AdapterConfig.read(files), hub_only=False)
