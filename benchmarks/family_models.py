"""Tiny random models of the families that transformers has, each with its text model as the base.

Built from config classes, so that names and shapes are the library's own, and saved in its default
layout. The multimodal model's decoder holds the base's weights with small changes. Used by
`families.py`, which prints what can be done with each, and by tests/test_hybrids.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYES = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
CLIP = {**EYES, "model_type": "clip_vision_model"}
SIGLIP = {**EYES, "model_type": "siglip_vision_model", "vision_use_head": False}
SQUARE = {**EYES, "image_size": [28, 28], "patch_size": [14, 14]}
SAM = {**EYES, "output_channels": 16, "mlp_dim": 48, "global_attn_indexes": [0]}
GLM_EYES = {**QWEN_EYES, "model_type": "glm4v_vision"}
GLM_TEXT: dict[str, Any] = {"model_type": "glm4v_text"}
VQ: dict[str, Any] = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32}
JANUS_VQ: dict[str, Any] = {"embed_dim": 8, "base_channels": 32, "num_embeddings": 16}
EARS: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
    "output_dim": 64, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_mel_bins": 16,
}  # fmt: skip
GRANITE_EARS: dict[str, Any] = {
    "encoder_config": {
        "hidden_dim": 32, "num_layers": 1, "num_heads": 2, "dim_head": 16, "input_dim": 16,
        "output_dim": 16,
    },
    "projector_config": {
        **EYES, "model_type": "blip_2_qformer", "encoder_hidden_size": 32, "vocab_size": 96,
    },
    "downsample_rate": 5,
    "window_size": 15,
}  # fmt: skip
PIXTRAL = {**EYES, "model_type": "pixtral", "head_dim": 16}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}


TOWER = "text tower"  # a text model under the names of a multimodal one, beside one vision tensor


class Family(NamedTuple):
    """A family: its config class, that of its text model, and their fields.

    `text` are the text model's fields beside `TEXT`, `own` those of the text part of the multimodal
    model, `more` those of the outer config. `model` is the class of the multimodal model, by
    default the one for images and text.
    """

    config: str
    text_config: str
    eyes: Mapping[str, Any] | None = EYES  # None without a vision part
    text: Mapping[str, Any] = {}
    own: Mapping[str, Any] = {}
    more: Mapping[str, Any] = {}
    model: str = "AutoModelForImageTextToText"


HYBRIDS = {
    "qwen3_5": Family("Qwen3_5Config", "Qwen3_5TextConfig", QWEN_EYES, LINEAR),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeConfig", "Qwen3_5MoeTextConfig", QWEN_EYES,
        {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    "gemma4": Family(
        "Gemma4Config", "Gemma4TextConfig", EYES,
        {**SLIDING, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
    ),
    "gemma4_per_layer": Family(
        "Gemma4Config", "Gemma4TextConfig", EYES, {**SLIDING, **PER_LAYER, "global_head_dim": 16}
    ),
    "gemma4_moe": Family(
        "Gemma4Config", "Gemma4TextConfig", EYES,
        {
            **SLIDING, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
            "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "lfm2_vl": Family(
        "Lfm2VlConfig", "Lfm2Config", {**EYES, "model_type": "siglip2_vision_model"},
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
    "minicpmv4_6": Family("MiniCPMV4_6Config", "Qwen3_5TextConfig", EYES, LINEAR),
    "llama4": Family(
        "Llama4Config", "Llama4TextConfig",
        {**EYES, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
        {
            "num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2,
            "head_dim": 16,
        },
    ),
    "kimi_k25": Family("Kimi_K25Config", "DeepseekV3Config", EYES, {**ROUTED, **LATENT}),
    "glm4v_moe": Family(
        "Glm4vMoeConfig", "Glm4MoeConfig", QWEN_EYES, {**ROUTED, "head_dim": 16},
        {"rope_parameters": MROPE},
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeConfig", "Qwen3MoeConfig", QWEN_EYES,
        {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 1}, {"rope_parameters": MROPE},
    ),
    "qwen3_omni_moe_thinker": Family(
        "Qwen3OmniMoeThinkerConfig", "Qwen3MoeConfig", QWEN_EYES,
        {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 1}, {"rope_parameters": MROPE},
        {"audio_config": {**EARS, "downsample_hidden_size": 16}},
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "granite_hybrid": Family(
        TOWER, "GraniteMoeHybridConfig", text={
            "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4,
            "num_experts_per_tok": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
            "mamba_d_state": 16, "shared_intermediate_size": 48,
        },
    ),
    "nemotron_h": Family(
        TOWER, "NemotronHConfig", text={
            **ROUTED, "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1,
            "moe_shared_expert_intermediate_size": 24, "head_dim": 16,
        },
    ),
    "ernie4_5_moe": Family(
        TOWER, "Ernie4_5_MoeConfig",
        text={"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "gemma3n_text": Family(
        TOWER, "Gemma3nTextConfig", text={
            **SLIDING, **PER_LAYER, "laurel_rank": 8, "num_kv_shared_layers": 0,
            "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "qwen3_next": Family(
        TOWER, "Qwen3NextConfig",
        text={**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    "mixtral": Family(TOWER, "MixtralConfig", text={"num_local_experts": 4}),
    "gpt_oss": Family(TOWER, "GptOssConfig", text={"num_local_experts": 4, "head_dim": 16}),
    "falcon_h1": Family(
        TOWER, "FalconH1Config",
        text={"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
    "aria": Family(
        "AriaConfig", "AriaTextConfig", {**EYES, "model_type": "idefics3_vision"},
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
}  # fmt: skip


DENSE = {
    "aya_vision": Family("AyaVisionConfig", "Cohere2Config", SIGLIP, {"head_dim": 16}),
    "aya_vision_cohere1": Family("AyaVisionConfig", "CohereConfig", SIGLIP),
    "cohere2_vision": Family("Cohere2VisionConfig", "Cohere2Config", SIGLIP, {"head_dim": 16}),
    "deepseek_vl": Family("DeepseekVLConfig", "LlamaConfig", SIGLIP),
    "deepseek_vl_hybrid": Family(
        "DeepseekVLHybridConfig", "LlamaConfig", SIGLIP,
        more={"high_res_vision_config": SAM, "image_token_id": 3},
    ),
    "emu3": Family(
        "Emu3Config", "LlamaConfig", None, own={"model_type": "emu3_text_model"},
        more={"vq_config": VQ, "vocabulary_map": {"<image>": 3}},
    ),
    "exaone4_5": Family(
        "Exaone4_5_Config", "Exaone4Config", QWEN_EYES, {**SLIDING, "sliding_window": 32}
    ),
    "gemma3": Family(
        "Gemma3Config", "Gemma3TextConfig", SIGLIP, {"head_dim": 16},
        more={"mm_tokens_per_image": 4},
    ),
    "glm46v": Family("Glm46VConfig", "Glm4Config", GLM_EYES, {"head_dim": 16}, GLM_TEXT),
    "glm4v": Family(
        "Glm4vConfig", "Glm4Config", QWEN_EYES, {"head_dim": 16}, {"rope_parameters": MROPE}
    ),
    "got_ocr2": Family("GotOcr2Config", "Qwen2Config", SAM),
    "granite_speech": Family(
        "GraniteSpeechConfig", "GraniteConfig", None, more=GRANITE_EARS,
        model="GraniteSpeechForConditionalGeneration",
    ),
    "hunyuan_vl": Family("HunYuanVLConfig", "HunYuanDenseV1Config", EYES, {"head_dim": 16}),
    "idefics2": Family(
        "Idefics2Config", "MistralConfig", EYES, more={
            "perceiver_config": {
                "hidden_size": 64, "resampler_n_latents": 2, "resampler_depth": 1,
                "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1,
            }
        },
    ),
    "idefics3": Family("Idefics3Config", "LlamaConfig", EYES),
    "instructblip_vicuna": Family(
        "InstructBlipConfig", "LlamaConfig", EYES,
        more={"qformer_config": {**EYES, "vocab_size": 96, "encoder_hidden_size": 32}},
    ),
    "internvl_qwen2": Family("InternVLConfig", "Qwen2Config", SQUARE),
    "internvl_qwen3": Family("InternVLConfig", "Qwen3Config", SQUARE, {"head_dim": 16}),
    "janus": Family("JanusConfig", "LlamaConfig", EYES, more={"vq_config": JANUS_VQ}),
    "lighton_ocr": Family("LightOnOcrConfig", "Qwen3Config", PIXTRAL, {"head_dim": 16}),
    "llava_next": Family("LlavaNextConfig", "LlamaConfig", CLIP),
    "llava_next_video": Family("LlavaNextVideoConfig", "LlamaConfig", CLIP),
    "llava_onevision": Family("LlavaOnevisionConfig", "Qwen2Config", SIGLIP),
    "mistral3": Family("Mistral3Config", "MistralConfig", PIXTRAL, {"head_dim": 16}),
    "mistral3_ministral3": Family("Mistral3Config", "Ministral3Config", PIXTRAL, {"head_dim": 16}),
    "mllama": Family(
        "MllamaConfig", "LlamaConfig",
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14,
            "vision_output_dim": 64, "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
        },
        own={
            "model_type": "mllama_text_model", "num_hidden_layers": 6,
            "cross_attention_layers": [1, 3],
        },
    ),
    "ovis2": Family("Ovis2Config", "Qwen2Config", EYES, more={"visual_indicator_token_ids": [5]}),
    "paddleocr_vl": Family(
        "PaddleOCRVLConfig", "Ernie4_5Config", EYES, {"head_dim": 16}, {"rope_parameters": MROPE}
    ),
    "paligemma2": Family(
        "PaliGemmaConfig", "Gemma2Config", {**SIGLIP, "projection_dim": 64}, {"head_dim": 16},
        more={"projection_dim": 64},
    ),
    "pixtral_llava": Family("LlavaConfig", "MistralConfig", PIXTRAL, {"head_dim": 16}),
    "qwen2_5_omni_thinker": Family(
        "Qwen2_5OmniThinkerConfig", "Qwen2Config", QWEN_EYES, own={"rope_parameters": MROPE},
        more={"audio_config": EARS}, model="Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLConfig", "Qwen2Config", QWEN_EYES, own={"rope_parameters": MROPE}
    ),
    "qwen2_audio": Family(
        "Qwen2AudioConfig", "Qwen2Config", None, more={"audio_config": EARS},
        model="Qwen2AudioForConditionalGeneration",
    ),
    "qwen2_vl": Family(
        "Qwen2VLConfig", "Qwen2Config",
        {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        own={"rope_parameters": MROPE},
    ),
    "qwen3_vl": Family(
        "Qwen3VLConfig", "Qwen3Config", QWEN_EYES, {"head_dim": 16}, {"rope_parameters": MROPE}
    ),
    "smolvlm2": Family("SmolVLMConfig", "LlamaConfig", EYES),
    "video_llama_3": Family("VideoLlama3Config", "Qwen2Config", EYES),
    "video_llava": Family("VideoLlavaConfig", "LlamaConfig", CLIP),
    "vipllava": Family(
        "VipLlavaConfig", "LlamaConfig", CLIP, more={"vision_feature_layers": [-1]}
    ),
    "voxtral": Family(
        "VoxtralConfig", "LlamaConfig", None, {"head_dim": 16}, more={"audio_config": EARS},
        model="VoxtralForConditionalGeneration",
    ),
}  # fmt: skip
REFUSED = {
    "blip2_opt": Family(
        "Blip2Config", "OPTConfig", EYES, {"ffn_dim": 96, "word_embed_proj_dim": 64},
        more={"qformer_config": {**EYES, "vocab_size": 96, "encoder_hidden_size": 32}},
    ),
    "florence2": Family(
        "Florence2Config", "BartConfig", {"embed_dim": [16], "depths": [1], "num_heads": [2],
        "num_groups": [2], "patch_size": [4], "patch_stride": [4], "patch_padding": [0],
        "patch_prenorm": [False], "projection_dim": 64},
        {
            "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        },
    ),
    "fuyu": Family("FuyuConfig", "PersimmonConfig", None),
    "fast_vlm": Family("FastVlmConfig", "Qwen2Config", {"model_type": "timm_wrapper"}),
    "gemma3n": Family(
        "Gemma3nConfig", "Gemma3nTextConfig", {"model_type": "gemma3n_vision"},
        HYBRIDS["gemma3n_text"].text,
    ),
    "perception_lm": Family("PerceptionLMConfig", "LlamaConfig", {"model_type": "timm_wrapper"}),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeConfig", "Ernie4_5_MoeConfig", QWEN_EYES, HYBRIDS["ernie4_5_moe"].text,
        {"moe_intermediate_size": [24, 24]},
    ),
    "granite4_vision": Family("Granite4VisionConfig", "GraniteConfig", SIGLIP),
    "kosmos2_5": Family("Kosmos2_5Config", "Kosmos2_5TextConfig", EYES),
    "molmo2": Family(
        "Molmo2Config", "Qwen3Config", {**EYES, "image_size": [28, 28]}, {"head_dim": 16}
    ),
    "phi4_multimodal": Family("Phi4MultimodalConfig", "Phi3Config", EYES),
}  # fmt: skip
FAMILIES = {**DENSE, **HYBRIDS, **REFUSED}


def build(family: Family, folder: Path) -> dict[str, Path]:
    """Write the text base, an expert, and the multimodal model; return their folders by role."""
    import transformers

    torch.manual_seed(5)
    fields = {**TEXT, **family.text}
    text_class = getattr(transformers, family.text_config)
    base = transformers.AutoModelForCausalLM.from_config(text_class(**fields))
    folders = {role: folder / role for role in ("base", "math", "mllm")}
    quiet()
    base.save_pretrained(folders["base"])
    if family.config == TOWER:
        _change(base)
        base.save_pretrained(folders["mllm"])
        rename(folders["mllm"], TO_TOWER, {"model.vision_tower.weight": torch.ones(4, 4)})
        base = type(base).from_pretrained(folders["base"])
    else:
        model = _model(family, {**fields, **family.own}, text_class.model_type)
        plant(base, model)
        model.save_pretrained(folders["mllm"])
    _change(base)
    base.save_pretrained(folders["math"])
    return folders


TO_TOWER = (re.compile("^(model|backbone)\\."), r"\1.language_model.")
TO_TEXT = (re.compile("^(model|backbone)\\.language_model\\."), r"\1.")


def rename(folder: Path, how: tuple[re.Pattern[str], str], more: Mapping[str, Any]) -> None:
    """Rename the tensors of a model, leave out those of vision, and add others."""
    path, (pattern, name) = folder / "model.safetensors", how
    tensors = {n: t for n, t in load_file(path).items() if "vision_tower" not in n}
    named = {pattern.sub(name, old): tensor for old, tensor in tensors.items()}
    save_file({**named, **more}, path, metadata={"format": "pt"})


def _change(model: Any) -> None:  # noqa: ANN401
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))


def _model(family: Family, fields: dict[str, Any], model_type: str) -> Any:  # noqa: ANN401
    import transformers

    config_class = getattr(transformers, family.config)
    inner = config_class.sub_configs.get("text_config")
    if inner is None or inner.__name__ in ("AutoConfig", "PreTrainedConfig"):
        fields = {"model_type": model_type, **fields}
    more = dict(family.more) | ({"vision_config": dict(family.eyes)} if family.eyes else {})
    config = config_class(text_config=fields, **more)
    found = getattr(transformers, family.model)
    return found.from_config(config) if hasattr(found, "from_config") else found(config)


def plant(base: Any, model: Any) -> None:  # noqa: ANN401
    """Put the base's weights, slightly changed, into the decoder of the multimodal model."""
    decoder, source = decoder_of(model), decoder_of(base)
    crossed = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    places = [n for n in range(len(decoder.layers)) if n not in crossed]
    with torch.no_grad():
        for layer, place in zip(source.layers, places, strict=True):
            own = dict(decoder.layers[place].named_parameters())
            for name, parameter in layer.named_parameters():
                if name in own and own[name].shape == parameter.shape:
                    own[name].copy_(parameter + 0.001 * torch.randn_like(parameter))


def decoder_of(model: Any) -> Any:  # noqa: ANN401
    """Return the module with the text layers."""
    found = model.get_decoder()
    while not hasattr(found, "layers"):
        found = found.model if hasattr(found, "model") else found.decoder
    return found


def quiet() -> None:
    """Keep the library's progress bars and notes out of the output."""
    from transformers.utils import logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
