"""Tiny random models of every supported family, written in every name layout found in the wild.

Built from configs with transformers, so that names and shapes are the library's own; the text
weights are put into the multimodal model through its modules, so that a wrong match shows as a
distance. Used by test_families.py, which also makes docs/families.md from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

LAYERS = 4
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {**EYES, "model_type": "clip_vision_model"}
SIGLIP = {**EYES, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_EYES = {
    "depth": 1,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 24,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
Weights = dict[str, torch.Tensor]


class Family(NamedTuple):
    """A family: its config class and parts, the text model's class, and its name layouts."""

    config: str
    text_config: str
    vision: Mapping[str, Any]
    layouts: tuple[str, ...]
    text: Mapping[str, Any] = {}  # beside TEXT
    own_text: Mapping[str, Any] = {}  # of the text part of the multimodal model only
    more: Mapping[str, Any] = {}
    note: str = ""


NESTED = ("hub", "modules", "nested", "nested twice")
LLAVA = (*NESTED, "LLaVA repository")
FAMILIES = {
    "LLaVA-1.5 (Vicuna)": Family("LlavaConfig", "LlamaConfig", CLIP, LLAVA),
    "LLaVA-NeXT (Llama 3, Vicuna)": Family("LlavaNextConfig", "LlamaConfig", CLIP, LLAVA),
    "LLaVA-NeXT (Mistral)": Family("LlavaNextConfig", "MistralConfig", CLIP, LLAVA),
    "LLaVA-OneVision": Family(
        "LlavaOnevisionConfig", "Qwen2Config", SIGLIP, LLAVA, note="q, k, v biases kept"
    ),
    "Qwen2-VL": Family(
        "Qwen2VLConfig", "Qwen2Config",
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        ("hub", "modules"), own_text={"rope_parameters": MROPE}, note="q, k, v biases kept",
    ),
    "Qwen2-VL, tied head": Family(
        "Qwen2VLConfig", "Qwen2Config",
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        ("hub", "modules"), text={"tie_word_embeddings": True},
        own_text={"rope_parameters": MROPE}, more={"tie_word_embeddings": True},
        note="no lm_head on disk; embeddings kept",
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLConfig", "Qwen2Config", {**QWEN_EYES, "fullatt_block_indexes": [0]},
        ("hub", "modules"), own_text={"rope_parameters": MROPE}, note="q, k, v biases kept",
    ),
    "Qwen3-VL": Family(
        "Qwen3VLConfig", "Qwen3Config",
        {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        ("modules",), text={"head_dim": 8}, own_text={"rope_parameters": MROPE},
        note="q and k norms kept",
    ),
    "Qwen3-VL, mixture of experts": Family(
        "Qwen3VLMoeConfig", "Qwen3MoeConfig",
        {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        ("modules",),
        text={
            "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
            "decoder_sparse_step": 1,
        },
        own_text={"rope_parameters": MROPE},
        note="every expert is a matrix; router kept",
    ),
    "Idefics2": Family(
        "Idefics2Config", "MistralConfig", EYES, ("modules",), own_text={"model_type": "mistral"},
        more={
            "perceiver_config": {
                "hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1,
                "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1,
            }
        },
        note="q, k, v of the resampler are kept",
    ),
    "Idefics3": Family(
        "Idefics3Config", "LlamaConfig", EYES, ("modules",), own_text={"model_type": "llama"}
    ),
    "SmolVLM": Family(
        "SmolVLMConfig", "LlamaConfig", EYES, ("modules",), own_text={"model_type": "llama"}
    ),
    "InternVL": Family(
        "InternVLConfig", "Qwen2Config",
        {**EYES, "image_size": [28, 28], "patch_size": [14, 14]},
        (*NESTED, "InternVL repository"), own_text={"model_type": "qwen2"},
        note="q, k, v biases kept; the original layout with an InternLM2 text model is rejected",
    ),
    "Mllama (Llama 3.2 Vision)": Family(
        "MllamaConfig", "LlamaConfig",
        {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14,
            "vision_output_dim": 32, "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
        },
        ("hub", "modules"),
        own_text={
            "model_type": "mllama_text_model", "num_hidden_layers": LAYERS + 2,
            "cross_attention_layers": [1, 3],
        },
        note="cross-attention layers kept; text layer j is the j-th remaining one",
    ),
    "PaliGemma": Family(
        "PaliGemmaConfig", "GemmaConfig", {**SIGLIP, "projection_dim": 32}, NESTED,
        text={"head_dim": 8}, own_text={"model_type": "gemma"}, more={"projection_dim": 32},
        note="head tied to the embeddings",
    ),
    "Gemma 3": Family(
        "Gemma3Config", "Gemma3TextConfig", SIGLIP, NESTED, text={"head_dim": 8},
        more={"mm_tokens_per_image": 4}, note="q and k norms kept; head tied",
    ),
    "LLaVA with a fused text model (Phi-3)": Family(
        "LlavaConfig", "Phi3Config", CLIP, NESTED, own_text={"model_type": "phi3"},
        note="qkv_proj and gate_up_proj are merged by their rows",
    ),
}  # fmt: skip


def build(family: Family, folder: Path) -> dict[str, Path]:
    """Write a text base, an expert, and the multimodal model in each of its layouts."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(5)
    text_config = getattr(transformers, family.text_config)(**{**TEXT, **family.text})
    base = AutoModelForCausalLM.from_config(text_config)
    own = {**TEXT, **family.text, **family.own_text}
    if "model_type" in family.own_text or family.text_config.startswith(("Qwen", "Gemma3")):
        text: Any = own
    else:
        text = getattr(transformers, family.text_config)(**own)
    if family.config.startswith("LlavaOnevision"):
        text = getattr(transformers, family.text_config)(**own)
    config = getattr(transformers, family.config)(
        vision_config=dict(family.vision), text_config=text, **family.more
    )
    model = AutoModelForImageTextToText.from_config(config)
    _plant(base.model, model)
    folders = {"base": folder / "base", "math": folder / "math"}
    with _quiet():
        base.save_pretrained(folders["base"])
        for parameter in base.parameters():
            parameter.data += 0.001 * torch.randn_like(parameter)
        base.save_pretrained(folders["math"])
        for layout in family.layouts:
            folders[layout] = folder / layout
            model.save_pretrained(folders[layout], save_original_format=layout == "hub")
            if layout not in ("hub", "modules"):
                _rename(folders[layout], RENAMES[layout])
    return folders


def _plant(text: Any, model: Any) -> None:
    """Put the text model's weights, slightly changed, into the multimodal model's decoder."""
    decoder = model.get_decoder()
    crossed = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    places = [n for n in range(len(decoder.layers)) if n not in crossed]
    with torch.no_grad():
        for source, place in zip(text.layers, places, strict=True):
            own = dict(decoder.layers[place].named_parameters())
            for name, parameter in source.named_parameters():
                own[name].copy_(parameter + 0.001 * torch.randn_like(parameter))


def _nested(name: str) -> str:
    return re.sub(r"^model\.language_model\.", "model.language_model.model.", name)


def _nested_twice(name: str) -> str:
    name = re.sub(r"^model\.language_model\.", "language_model.model.model.", name)
    return re.sub(r"^lm_head", "language_model.lm_head", name)


def _llava_repository(name: str) -> str:
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
    name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    name = name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
    return name.replace("model.language_model.", "model.")


def _internvl_repository(name: str) -> str:
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    name = name.replace("model.vision_tower.encoder.layer.", "vision_model.encoder.layers.")
    name = name.replace("model.vision_tower.", "vision_model.")
    name = name.replace(".attention.projection_layer.", ".attn.proj.")
    return name.replace("model.multi_modal_projector.", "mlp1.")


RENAMES: dict[str, Callable[[str], str]] = {
    "nested": _nested,
    "nested twice": _nested_twice,
    "LLaVA repository": _llava_repository,
    "InternVL repository": _internvl_repository,
}


def _rename(folder: Path, rename: Callable[[str], str]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {rename(name): weight for name, weight in weights.items()}, folder / "model.safetensors"
    )


def rewrite(folder: Path, copy: Path, change: Callable[[Weights], Weights]) -> Path:
    """Copy a model with changed weights."""
    shutil.copytree(folder, copy)
    save_file(change(load_file(folder / "model.safetensors")), copy / "model.safetensors")
    return copy


def set_config(folder: Path, **values: Any) -> None:
    """Change top-level entries of a config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the library's progress bars out of the test log."""
    from transformers.utils import logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
