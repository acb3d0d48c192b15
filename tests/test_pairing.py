"""Models are matched by names and shapes, and strangers are told apart from siblings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model

from ipmerge_core.errors import CheckpointError, PairingError, ShapeError
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import MODULES, ModelPair, open_pair

MLLM_CONFIG = {"model_type": "llava", "text_config": TEXT_CONFIG}


def levels(pair: ModelPair) -> dict[str, str]:
    return {finding.subject: finding.level for finding in pair.check()}


def test_every_decoder_matrix_is_matched_in_order(trio: Trio) -> None:
    pair = open_pair(trio.mllm, [trio.math, trio.math_2], trio.base)
    assert len(pair.matrices) == LAYERS * len(MODULES)
    assert [(m.layer, m.module) for m in pair.matrices[:8]] == [
        *((0, module) for module in MODULES),
        (1, "q"),
    ]
    first = pair.matrices[0]
    assert first.mllm == "language_model." + first.name
    assert first.math == (first.name, first.name)
    assert pair.name == "mllm + math + math_2"


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model.", "", "model.text_"])
def test_the_name_layout_is_learned_from_names_and_shapes(
    prefix: str, trio: Trio, tmp_path: Path
) -> None:
    tuned = as_mllm(fine_tuned(text_weights(), 1), prefix)
    folder = write_model(tmp_path / "m", tuned, MLLM_CONFIG)
    pair = open_pair(folder, trio.math, trio.base)
    assert all(m.mllm == prefix + m.name for m in pair.matrices)


def test_every_tensor_that_is_kept_has_a_reason(trio: Trio) -> None:
    pair = open_pair(trio.mllm, trio.math, trio.base)
    matched = {matrix.mllm for matrix in pair.matrices}
    assert matched | set(pair.kept) == set(pair.mllm.tensors)
    assert not matched & set(pair.kept)
    reasons = pair.kept
    assert reasons["language_model.model.embed_tokens.weight"].startswith("vocabulary")
    assert reasons["language_model.lm_head.weight"].startswith("vocabulary")
    assert reasons["language_model.model.norm.weight"].startswith("norm")
    assert reasons["multi_modal_projector.linear_1.weight"] == "outside the language model"
    vision = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert reasons[vision] == "outside the language model"


def test_siblings_pass_the_check(trio: Trio) -> None:
    assert set(levels(open_pair(trio.mllm, trio.math, trio.base)).values()) == {"ok"}


def test_a_stranger_as_base_is_refused_with_its_distance(trio: Trio, tmp_path: Path) -> None:
    stranger = write_model(tmp_path / "stranger", text_weights(seed=5), TEXT_CONFIG)
    found = open_pair(trio.mllm, trio.math, stranger).check()
    refused = [finding for finding in found if finding.level == "refusal"]
    assert {finding.subject for finding in refused} == {
        "mllm: distance to its base",
        "math: distance to its base",
    }
    assert "near 1.4 for unrelated models" in refused[0].message
    assert "specify the model it was trained from" in refused[0].remedy


def test_a_far_fine_tune_is_a_warning(trio: Trio, tmp_path: Path) -> None:
    far = write_model(tmp_path / "far", fine_tuned(text_weights(), 2, scale=0.03), TEXT_CONFIG)
    assert levels(open_pair(trio.mllm, far, trio.base))["math: distance to its base"] == "warning"


def test_an_expert_that_is_the_base_is_refused(trio: Trio) -> None:
    found = open_pair(trio.mllm, trio.base, trio.base).check()
    assert any("its task vector is zero" in f.message for f in found if f.level == "refusal")


@pytest.mark.parametrize(
    ("change", "subject", "level"),
    [
        ({"rope_theta": 1e6}, "math: RoPE base frequency", "warning"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "math: RoPE base frequency", "warning"),
        ({"rms_norm_eps": 1e-5}, "math: norm epsilon", "warning"),
        ({"num_attention_heads": 8}, "math: attention heads", "refusal"),
        ({"vocab_size": 99}, "math: vocabulary size", "ok"),
    ],
)
def test_configs_that_differ_are_named(
    change: dict[str, object], subject: str, level: str, trio: Trio, tmp_path: Path
) -> None:
    expert = write_model(tmp_path / "e", fine_tuned(text_weights(), 2), {**TEXT_CONFIG, **change})
    assert levels(open_pair(trio.mllm, expert, trio.base))[subject] == level


def test_mixed_dtypes_are_a_warning(trio: Trio, tmp_path: Path) -> None:
    half = write_model(
        tmp_path / "half", fine_tuned(text_weights(), 2), TEXT_CONFIG, dtype=torch.bfloat16
    )
    assert levels(open_pair(trio.mllm, half, trio.base))["dtype"] == "warning"


def test_other_shapes_are_refused_with_both_shapes(trio: Trio, tmp_path: Path) -> None:
    weights = text_weights()
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = torch.zeros(30, 16)
    other = write_model(tmp_path / "other", weights, TEXT_CONFIG)
    with pytest.raises(ShapeError, match=r"up_proj.weight' has shape \(30, 16\) .* but \(24, 16\)"):
        open_pair(trio.mllm, other, trio.base)


def test_another_number_of_layers_is_refused(trio: Trio, tmp_path: Path) -> None:
    weights = {n: w for n, w in text_weights().items() if ".layers.2." not in n}
    shallow = write_model(tmp_path / "shallow", weights, TEXT_CONFIG)
    with pytest.raises(PairingError, match="has 2 decoder layers and the base .* has 3"):
        open_pair(trio.mllm, shallow, trio.base)


def test_a_hole_is_refused_by_name(trio: Trio, tmp_path: Path) -> None:
    weights = text_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    holed = write_model(tmp_path / "holed", weights, TEXT_CONFIG)
    expected = "Layer 1 of .*base' has 'mlp.up_proj.weight' but .*holed'"
    with pytest.raises(PairingError, match=expected):
        open_pair(trio.mllm, holed, trio.base)


def test_a_model_without_a_decoder_is_refused(trio: Trio, tmp_path: Path) -> None:
    empty = write_model(tmp_path / "empty", {"a": torch.zeros(2)}, TEXT_CONFIG)
    with pytest.raises(PairingError, match="The base .* has no decoder matrices"):
        open_pair(trio.mllm, trio.math, empty)
    with pytest.raises(PairingError, match="The math model .* has no decoder matrices"):
        open_pair(trio.mllm, empty, trio.base)


def test_no_expert_is_refused(trio: Trio) -> None:
    with pytest.raises(PairingError, match="No math model given"):
        open_pair(trio.mllm, [], trio.base)


def test_a_separate_base_for_the_mllm_is_its_reference(trio: Trio, tmp_path: Path) -> None:
    root_weights = fine_tuned(text_weights(), 8)
    root = write_model(tmp_path / "root", root_weights, TEXT_CONFIG)
    mllm = write_model(tmp_path / "m", as_mllm(fine_tuned(root_weights, 1)), MLLM_CONFIG)
    pair = open_pair(mllm, trio.math, trio.base, base_mllm=root)
    assert [role for role, _ in pair.roles()] == ["mllm", "base", "base of the mllm", "math"]
    assert set(levels(pair).values()) == {"ok"}


def test_config_of_the_outer_model_counts_where_the_inner_is_silent(
    trio: Trio, tmp_path: Path
) -> None:
    config = {**MLLM_CONFIG, "tie_word_embeddings": True}
    mllm = write_model(tmp_path / "m", as_mllm(fine_tuned(text_weights(), 1)), config)
    base_config = json.loads((trio.base / "config.json").read_text())
    base = write_model(
        tmp_path / "b", text_weights(), {**base_config, "tie_word_embeddings": False}
    )
    found = {finding.subject: finding for finding in open_pair(mllm, trio.math, base).check()}
    tied = found["mllm: tied embeddings"]  # a note: they are kept
    assert (tied.level, tied.message[:24]) == ("ok", "True, False in the base:")


def test_the_same_expert_twice_is_refused_under_any_name(trio: Trio, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trio.math, copy)
    for again in (trio.math, copy):
        pair = open_pair(trio.mllm, [trio.math, trio.math_2, again], trio.base)
        found = [finding for finding in pair.check() if finding.subject == "math 3: repeated"]
        assert [finding.level for finding in found] == ["refusal"]
        assert "has the same weights as math 1" in found[0].message
    fine = open_pair(trio.mllm, [trio.math, trio.math_2], trio.base).check()
    assert not [finding for finding in fine if "repeated" in finding.subject]


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_model_saved_from_zero_3_without_its_weights_is_named(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m", text_weights() | {name: torch.empty(0)}, dict(TEXT_CONFIG))
    with pytest.raises(CheckpointError, match=f"ZeRO-3 without its weights: '{name}'") as caught:
        Checkpoint.open(folder)
    assert "zero_to_fp32.py" in str(caught.value)
