"""Every setting that shapes a forward pass is compared, whatever its name, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models import siblings
from ipmerge_core.models.forward_settings import NOT_SET, forward_differences
from ipmerge_core.models.pairing import open_pair

GRANITE = {
    "model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625, "logits_scaling": 8.0,
}  # fmt: skip
GEMMA = {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 224}
PHI = {"model_type": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.75}
QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}


def model(config: dict[str, object], name: str = "m") -> SimpleNamespace:
    return SimpleNamespace(id=name, config=config)


def differences(ours: dict[str, object], theirs: dict[str, object]) -> dict[str, tuple]:
    found = forward_differences(model(ours), model(theirs))
    return {each.key: (each.ours, each.theirs) for each in found}


def inside(config: dict[str, object], **outer: object) -> dict[str, object]:
    return {"model_type": "llava", "text_config": config, **outer}


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (TEXT_CONFIG, "rope_theta", 5e5),
        (TEXT_CONFIG, "rms_norm_eps", 1e-5),
        (TEXT_CONFIG, "hidden_act", "gelu"),
        (TEXT_CONFIG, "attention_bias", True),
        (TEXT_CONFIG, "num_key_value_heads", 4),
        (TEXT_CONFIG, "a_setting_of_tomorrow", 0.5),
        (TEXT_CONFIG, "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        (GRANITE, "embedding_multiplier", 6.0),
        (GRANITE, "residual_multiplier", 0.5),
        (GRANITE, "attention_multiplier", 0.5),
        (GRANITE, "logits_scaling", 4.0),
        (GEMMA, "attn_logit_softcapping", 30.0),
        (GEMMA, "final_logit_softcapping", None),
        (GEMMA, "query_pre_attn_scalar", 256),
        (GEMMA, "sliding_window", 64),
        (PHI, "partial_rotary_factor", 0.5),
        (QWEN, "sliding_window", 128),
        (QWEN, "use_sliding_window", False),
        ({"model_type": "cohere"}, "use_qk_norm", True),
        ({"model_type": "mistral"}, "sliding_window", None),
        ({"model_type": "nobody_knows", "alpha": 1.0}, "alpha", 2.0),
        ({"model_type": "nobody_knows", "alpha": 1.0}, "beta", 2.0),
    ],
)
@pytest.mark.parametrize("wrap", [dict, inside])
def test_a_setting_that_differs_is_found_with_both_values(base, key, value, wrap):
    found = differences(wrap({**base, key: value}), base)
    shown = "sliding_window" if key == "use_sliding_window" else key
    if found.keys() - {"layer_types", "max_window_layers"} != {shown}:
        assert key == "layer_types"
        assert found.keys() == {key}
    ours, theirs = found[shown]
    assert ours == (None if key == "use_sliding_window" else value)
    if key in base and key != "use_sliding_window":
        assert theirs == base[key]


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type", "factor"}),
        ({"rope_scaling": SCALED}, set(SCALED)),
        ({"rope_parameters": {**SCALED, "rope_theta": 10000.0}}, set(SCALED)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope_theta"}),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, set()),
        ({"rope_scaling": None}, set()),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         {"partial_rotary_factor"}),
    ],
)  # fmt: skip
def test_rope_is_compared_however_it_is_nested(change, keys):
    config = {**TEXT_CONFIG, **change}
    assert differences(config, TEXT_CONFIG).keys() >= keys
    assert not differences(config, TEXT_CONFIG).keys() - keys - {"beta_fast", "beta_slow"}
    assert differences(inside(config), TEXT_CONFIG).keys() >= keys
    assert not differences(config, config)


def test_one_rope_in_two_notations_is_the_same():
    old = {**TEXT_CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {key: value for key, value in TEXT_CONFIG.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert not differences(old, new)
    assert not differences(new, inside(old))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["X"]), ("torch_dtype", "float16"), ("dtype", "bfloat16"),
        ("transformers_version", "4.1"), ("use_cache", False), ("attention_dropout", 0.1),
        ("initializer_range", 0.5), ("bos_token_id", 7), ("eos_token_id", [1, 2]),
        ("image_token_index", 5), ("max_position_embeddings", 99), ("temperature", 0.2),
        ("num_beams", 4), ("router_aux_loss_coef", 0.1), ("mm_hidden_size", 5),
        ("auto_map", {"AutoModel": "x.Y"}), ("vision_config", {"model_type": "clip"}),
        ("_name_or_path", "x"), ("id2label", {"0": "a"}), ("pretraining_tp", 2),
        ("attention_bias", False), ("mlp_bias", False), ("head_dim", 4), ("head_dim", None),
        ("tie_word_embeddings", False), ("layer_types", ["full_attention"] * 3),
        ("unsloth_version", "1"), ("max_window_layers", 9), ("a_multiplier", 1.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [dict, inside])
def test_what_does_not_shape_a_forward_pass_is_not_reported(key, value, wrap):
    assert not differences(wrap({**TEXT_CONFIG, key: value}), TEXT_CONFIG)
    assert not differences(TEXT_CONFIG, {**TEXT_CONFIG, key: value})


def test_a_setting_that_one_config_omits_has_the_default_of_its_type():
    assert not differences({"model_type": "llama"}, {"model_type": "llama", "rms_norm_eps": 1e-6})
    found = differences({"model_type": "qwen2"}, {"model_type": "qwen2", "rms_norm_eps": 1e-5})
    assert found == {"rms_norm_eps": (1e-6, 1e-5)}
    flat = {"model_type": "qwen2_vl", "rms_norm_eps": 1e-6, "hidden_size": 64, "vocab_size": 9}
    found = differences(flat, {"model_type": "qwen2", "rms_norm_eps": 1e-6, "vocab_size": 9})
    assert "rms_norm_eps" not in found
    assert found.pop("rope_theta") == (1e6, 1e4)
    assert found.keys() <= {"num_attention_heads", "num_key_value_heads", "head_dim"}


def test_types_with_other_settings_are_compared_too():
    found = differences({**TEXT_CONFIG, **GRANITE}, TEXT_CONFIG)
    assert found["embedding_multiplier"] == (12.0, NOT_SET)
    assert found["logits_scaling"] == (8.0, NOT_SET)


def test_a_config_of_unknown_type_with_other_parts_is_compared_where_both_have_a_value():
    mixed = {**TEXT_CONFIG, "model_type": "llava_own", "mm_vision_tower": "clip", "select": 3}
    assert not differences(mixed, TEXT_CONFIG)
    assert differences({**mixed, "rms_norm_eps": 1e-4}, TEXT_CONFIG) == {
        "rms_norm_eps": (1e-4, 1e-6)
    }


@pytest.mark.parametrize(
    "bad", [{"hidden_size": "x"}, {"rope_scaling": [1]}, {"num_attention_heads": 0}]
)
def test_a_config_that_its_type_rejects_is_one_sentence(bad, trio: Trio, tmp_path: Path):
    with pytest.raises(CheckpointError, match="config.json of 'm' is not valid for its type"):
        differences({**TEXT_CONFIG, **bad, "more": 2}, TEXT_CONFIG)
    config = {**TEXT_CONFIG, **bad, "more": 2}
    expert = write_model(tmp_path / "e", fine_tuned(text_weights(), 2), config)
    found = {f.subject: f for f in open_pair(trio.mllm, expert, trio.base).check()}
    assert found["math: config"].level == "warning"
    assert "were not compared" in found["math: config"].remedy


def test_the_check_reports_a_setting_by_its_key_with_both_values(trio: Trio, tmp_path: Path):
    expert = write_model(
        tmp_path / "e", fine_tuned(text_weights(), 2), {**TEXT_CONFIG, "a_multiplier": 0.22}
    )
    found = {f.subject: f for f in open_pair(trio.mllm, expert, trio.base).check()}
    assert found["math: a_multiplier"].level == "warning"
    assert found["math: a_multiplier"].message == "0.22, but not set in the base."


def test_the_demo_and_configs_of_one_version_need_no_transformers():
    """Comparing them takes milliseconds; transformers' classes take seconds to import."""
    import subprocess
    import sys

    demo = Path(__file__).parents[1] / "assets" / "demo"
    code = (
        "import sys; from ipmerge_core.models.checkpoint import Checkpoint as C\n"
        "from ipmerge_core.models.forward_settings import forward_differences as f\n"
        f"d = {str(demo)!r}\n"
        "print([f(C.open(d + '/' + m), C.open(d + '/base')) for m in ('mllm', 'math')],\n"
        "      'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[[], []] False"


def test_the_labels_are_of_settings_that_are_compared():
    assert set(siblings._LABELS) > siblings._MUST_AGREE
    config = {**TEXT_CONFIG, **dict.fromkeys(siblings._LABELS, 77)}
    assert forward_differences(model(config), model({**config, "rms_norm_eps": 1}))


def test_the_language_model_of_an_omni_model_is_inside_its_thinker() -> None:
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        "text_config": {**QWEN, "rope_theta": 5e5},
        "audio_config": {"model_type": "qwen2_5_omni_audio_encoder", "hidden_act": "gelu"},
    }
    omni = {
        "model_type": "qwen2_5_omni",
        "thinker_config": thinker,
        "talker_config": {"model_type": "qwen2_5_omni_talker", "rope_theta": 1.0},
    }
    assert differences(omni, {**QWEN, "rope_theta": 5e5}) == {}
    assert differences(omni, {**QWEN, "rope_theta": 1e6}) == {"rope_theta": (5e5, 1e6)}
