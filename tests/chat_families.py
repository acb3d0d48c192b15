"""Tiny random vision-language models with processors, in the form in which the hub stores them.

Built from config classes, with a tokenizer of bytes made here. Used by test_chat_families.py (a
sample) and benchmarks/bench_chat_families.py (all), which print which families chat.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families import CLIP, EYES, MROPE, QWEN_EYES, SIGLIP, TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = 512  # rows of the embeddings: 256 bytes and at most as many special tokens
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
PATCHES = {
    "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84},
}  # fmt: skip
PATCHES_16 = {
    **PATCHES, "patch_size": 16, "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96},
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}  # fmt: skip
GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
GLM_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
}
GLM_ROPE = {**MROPE, "partial_rotary_factor": 1.0}
GLM_MARK = "<|begin_of_image|><|image|><|end_of_image|>"
GLM_EYES = {**QWEN_EYES, "image_size": 28, "patch_size": 14}
LLAVA_IDS = {"image_token_id": "<image>", "video_token_id": "<video>"}
LLAVA_INDICES = {"image_token_index": "<image>", "video_token_index": "<video>"}
SQUARE = {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}
DETAILED = {**SQUARE, "image_grid_pinpoints": [[28, 56], [56, 28]]}


class ChatFamily(NamedTuple):
    """A model with its processor: the classes by name, and what their files contain."""

    processor: str  # class name
    image: str  # class name of the image processor, as files name it
    mark: str  # what the chat template puts in place of an image
    tokens: tuple[str, ...]  # special tokens
    config: str = ""  # class name; none for a processor that is refused before the model is built
    text: Mapping[str, Any] = {}  # beside TEXT
    vision: Mapping[str, Any] = {}
    ids: Mapping[str, str] = {}  # keys of the config with the tokens whose ids they hold
    more: Mapping[str, Any] = {}
    image_settings: Mapping[str, Any] = {}
    video: str = ""  # class name of the video processor
    processor_settings: Mapping[str, Any] = {}
    tokenizer_settings: Mapping[str, Any] = {}
    model_type: str = ""


def _qwen(config: str, processor: str, **more: Any) -> ChatFamily:
    own = {"text": {"rope_parameters": MROPE}, "image_settings": PATCHES, **more}
    return ChatFamily(
        processor, "Qwen2VLImageProcessorFast", QWEN_MARK, QWEN_TOKENS, config,
        ids=QWEN_IDS, video="Qwen2VLVideoProcessor", **own,
    )  # fmt: skip


QWEN3_EYES = {**QWEN_EYES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
QWEN3_5_EYES = {**QWEN_EYES, "num_position_embeddings": 16}
CHAT_FAMILIES = {
    "Qwen2-VL": _qwen(
        "Qwen2VLConfig", "Qwen2VLProcessor",
        vision={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    ),
    "Qwen2.5-VL": _qwen(
        "Qwen2_5_VLConfig", "Qwen2_5_VLProcessor",
        vision={**QWEN_EYES, "fullatt_block_indexes": [0]},
    ),
    "Qwen3-VL": _qwen(
        "Qwen3VLConfig", "Qwen3VLProcessor", vision=QWEN3_EYES, image_settings=PATCHES_16,
        text={"rope_parameters": MROPE, "head_dim": 8},
    ),
    "Qwen3-VL, mixture of experts": _qwen(
        "Qwen3VLMoeConfig", "Qwen3VLProcessor", vision=QWEN3_EYES, image_settings=PATCHES_16,
        text={"rope_parameters": MROPE, "head_dim": 8, **EXPERTS},
    ),
    "Qwen3.5": _qwen(
        "Qwen3_5Config", "Qwen3VLProcessor", vision=QWEN3_5_EYES, image_settings=PATCHES_16,
        text={"rope_parameters": MROPE, **LINEAR},
    ),
    "Qwen3.5, mixture of experts": _qwen(
        "Qwen3_5MoeConfig", "Qwen3VLProcessor", vision=QWEN3_5_EYES, image_settings=PATCHES_16,
        text={
            "rope_parameters": MROPE, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16
        },
    ),
    "GLM-4V": ChatFamily(
        "Glm4vProcessor", "Glm4vImageProcessor", GLM_MARK, GLM_TOKENS, "Glm4vConfig",
        text={"rope_parameters": GLM_ROPE}, vision=GLM_EYES, ids=GLM_IDS, image_settings=PATCHES,
        video="Glm4vVideoProcessor",
    ),
    "GLM-4V, mixture of experts": ChatFamily(
        "Glm4vProcessor", "Glm4vImageProcessor", GLM_MARK, GLM_TOKENS, "Glm4vMoeConfig",
        text={
            "rope_parameters": GLM_ROPE, "n_routed_experts": 2, "num_experts_per_tok": 1,
            "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
            "head_dim": 8,
        },
        vision=GLM_EYES, ids=GLM_IDS, image_settings=PATCHES, video="Glm4vVideoProcessor",
    ),
    "GLM-4.6V": ChatFamily(
        "Glm46VProcessor", "Glm46VImageProcessor", GLM_MARK, GLM_TOKENS, "Glm46VConfig",
        text={"rope_parameters": GLM_ROPE, "model_type": "glm4v_text"},
        vision={**GLM_EYES, "model_type": "glm4v_vision"}, ids=GLM_IDS, image_settings=PATCHES,
        video="Glm46VVideoProcessor",
    ),
    "LLaVA-OneVision": ChatFamily(
        "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", "<image>",
        ("<image>", "<video>"), "LlavaOnevisionConfig", text={"model_type": "qwen2"},
        vision=SIGLIP, ids=LLAVA_INDICES, image_settings=DETAILED,
        more={"image_grid_pinpoints": DETAILED["image_grid_pinpoints"]},
        video="LlavaOnevisionVideoProcessor",
        processor_settings={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "LLaVA-NeXT-Video": ChatFamily(
        "LlavaNextVideoProcessor", "LlavaNextImageProcessor", "<image>", ("<image>", "<video>"),
        "LlavaNextVideoConfig", text={"model_type": "llama"}, vision=CLIP, ids=LLAVA_INDICES,
        image_settings={**DETAILED, "size": {"shortest_edge": 28}},
        more={"image_grid_pinpoints": DETAILED["image_grid_pinpoints"]},
        video="LlavaNextVideoVideoProcessor",
        processor_settings={
            "patch_size": 14, "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "InternVL": ChatFamily(
        "InternVLProcessor", "GotOcr2ImageProcessorFast", "<IMG_CONTEXT>",
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), "InternVLConfig",
        text={"model_type": "qwen2"},
        vision={**EYES, "image_size": [28, 28], "patch_size": [14, 14]},
        ids={"image_token_id": "<IMG_CONTEXT>"}, image_settings=SQUARE,
        video="InternVLVideoProcessor", processor_settings={"image_seq_length": 1},
        tokenizer_settings={
            "extra_special_tokens": {
                "start_image_token": "<img>", "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
            }
        },
    ),
    "SmolVLM2": ChatFamily(
        "SmolVLMProcessor", "SmolVLMImageProcessor", "<image>",
        (
            "<image>", "<video>", "<fake_token_around_image>", "<global-img>",
            "<end_of_utterance>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
        ),
        "SmolVLMConfig", text={"model_type": "llama"}, vision=EYES,
        ids={"image_token_id": "<image>"},
        image_settings={"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
        video="SmolVLMVideoProcessor", processor_settings={"image_seq_len": 1},
    ),
    "Gemma 4": ChatFamily(
        "Gemma4Processor", "Gemma4ImageProcessor", "<|image|>",
        ("<|image|>", "<|image>", "<image|>", "<|video|>", "<|audio|>", "<|audio>", "<audio|>"),
        "Gemma4Config",
        text={
            "head_dim": 8, "hidden_size_per_layer_input": 0, "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        vision={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
            "position_embedding_size": 256,
        },
        ids={"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"},
        more={"audio_config": None}, image_settings={"max_soft_tokens": 70},
        video="Gemma4VideoProcessor", processor_settings={"image_seq_length": 70},
        tokenizer_settings={
            "extra_special_tokens": {
                "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
                "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
            }
        },
    ),
    "Video-LLaVA": ChatFamily(
        "VideoLlavaProcessor", "VideoLlavaImageProcessor", "<image>", ("<image>", "<video>"),
        "VideoLlavaConfig", text={"model_type": "llama"}, vision=CLIP, ids=LLAVA_INDICES,
        image_settings={**SQUARE, "size": {"shortest_edge": 28}},
        video="VideoLlavaVideoProcessor",
    ),
    "VideoLLaMA 3": ChatFamily(
        "VideoLlama3Processor", "VideoLlama3ImageProcessor", "<|image_pad|>",
        ("<|image_pad|>", "<|video_pad|>"), "VideoLlama3Config", text={"model_type": "qwen2"},
        vision=EYES, ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        image_settings={**PATCHES, "temporal_patch_size": 1, "merge_size": 1},
        video="VideoLlama3VideoProcessor",
    ),
    "EXAONE 4.5": ChatFamily(
        "Exaone4_5_Processor", "Qwen2VLImageProcessor", "<|image_pad|>",
        ("<|image_pad|>", "<|video_pad|>"), "Exaone4_5_Config", text={"model_type": "exaone4"},
        vision={**QWEN_EYES, "fullatt_block_indexes": [0], "num_key_value_heads": 2},
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        image_settings=PATCHES, video="Qwen2VLVideoProcessor",
    ),
    "PaliGemma 2": ChatFamily(
        "PaliGemmaProcessor", "SiglipImageProcessor", "<image>", ("<image>",), "PaliGemmaConfig",
        text={"model_type": "gemma2", "head_dim": 8}, vision={**SIGLIP, "projection_dim": 32},
        ids={"image_token_id": "<image>"}, more={"projection_dim": 32},
        image_settings={"size": SQUARE["size"], "image_seq_length": 4},
    ),
    "MiniCPM-V 4.6": ChatFamily(
        "MiniCPMV4_6Processor", "MiniCPMV4_6ImageProcessor", "<|image_pad|>",
        (
            "<|image_pad|>", "<|video_pad|>", "<image>", "</image>", "<image_id>", "</image_id>",
            "<slice>", "</slice>",
        ),
        "MiniCPMV4_6Config",
        text={"model_type": "qwen3_5_text", "rope_parameters": MROPE, **LINEAR},
        vision={**EYES, "num_hidden_layers": 2, "insert_layer_id": 0},
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        more={"insert_layer_id": 0}, image_settings={"scale_resolution": 56, "max_slice_nums": 1},
        video="MiniCPMV4_6VideoProcessor",
        tokenizer_settings={
            "extra_special_tokens": {
                "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                "image_start_token": "<image>", "image_end_token": "</image>",
                "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
                "slice_start_token": "<slice>", "slice_end_token": "</slice>",
            }
        },
    ),
}  # fmt: skip

# Processors whose image part exists for torchvision only, or that have none, with their model type.
_LLAVA = ("<image>", ("<image>",))
WITHOUT_PILLOW = {
    "Mistral 3": ChatFamily(
        "PixtralProcessor", "PixtralImageProcessor", "[IMG]", ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        model_type="mistral3",
    ),
    "Pixtral": ChatFamily(
        "PixtralProcessor", "PixtralImageProcessor", "[IMG]", ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        model_type="llava",
    ),
    "Llama 4": ChatFamily(
        "Llama4Processor", "Llama4ImageProcessorFast", "<|image|>", ("<|image|>",),
        model_type="llama4",
    ),
    "Cohere2-Vision": ChatFamily(
        "Cohere2VisionProcessor", "Cohere2VisionImageProcessorFast", "<|IMG|>", ("<|IMG|>",),
        model_type="cohere2_vision",
    ),
    "LFM2-VL": ChatFamily(
        "Lfm2VlProcessor", "Lfm2VlImageProcessorFast", *_LLAVA, model_type="lfm2_vl"
    ),
    "PerceptionLM": ChatFamily(
        "PerceptionLMProcessor", "PerceptionLMImageProcessorFast", *_LLAVA,
        model_type="perception_lm", video="PerceptionLMVideoProcessor",
    ),
}  # fmt: skip
VIDEO_ONLY = {
    "InstructBLIP-Video": ChatFamily(
        "InstructBlipVideoProcessor", "InstructBlipVideoImageProcessor", "<video>", ("<video>",),
        model_type="instructblipvideo", video="InstructBlipVideoVideoProcessor",
    ),
}  # fmt: skip


def build_chat(family: ChatFamily, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model folder of a family: config, weights, tokenizer and processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(family, folder)
    _write_processor(family, folder)
    if family.config:
        _write_model(family, folder, ids, dtype)
    else:
        content = {"model_type": family.model_type, "text_config": {**TEXT, "vocab_size": WORDS}}
        (folder / "config.json").write_text(json.dumps(content))
    return folder


def _write_tokenizer(family: ChatFamily, folder: Path) -> dict[str, int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", *family.tokens]
    tokens = {token: n for n, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", **family.tokenizer_settings,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokens


def _write_processor(family: ChatFamily, folder: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{% if part.type == 'image' %}" + family.mark + "\n"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant:"
    )
    (folder / "chat_template.jinja").write_text(template)
    image = {"image_processor_type": family.image, **family.image_settings}
    own = {"processor_class": family.processor}
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, **own}))
    (folder / "processor_config.json").write_text(json.dumps({**family.processor_settings, **own}))
    if family.video:
        video = {**image, "video_processor_type": family.video}
        del video["image_processor_type"]
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


def _write_model(
    family: ChatFamily, folder: Path, ids: Mapping[str, int], dtype: torch.dtype
) -> None:
    import transformers

    torch.manual_seed(5)
    text = {**TEXT, "vocab_size": WORDS, "max_position_embeddings": 512, **family.text}
    config = getattr(transformers, family.config)(
        vision_config=dict(family.vision), text_config=text,
        **{key: ids[token] for key, token in family.ids.items()}, **family.more,
    )  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():  # zeros and ones would hide whether an image reaches the answer
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def chat_support(model_type: str, torchvision: bool = False) -> str:
    """Return "chats", or why models of a type cannot chat with or without torchvision.

    From the classes of transformers, without a model; the column of docs/families.md.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING_NAMES,
        processor_class_from_name,
    )

    from ipmerge_core.inference.processor_loading import processes_images

    assert model_type in CONFIG_MAPPING_NAMES, model_type
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "no class for text, or text with images"
        if not processes_images(model_type):
            return "chats"
    if name is None:
        return "as its processor files name a class"
    kind = processor_class_from_name(name)
    if getattr(kind, "is_dummy", False):  # stands for a class whose module needs torchvision
        return "image part requires torchvision"
    if "image_processor" not in kind.get_attributes():
        return "videos only"
    if torchvision:
        return "chats"
    # Another type with the same processor names the image processor that files name otherwise.
    types = [model_type, *(key for key, each in PROCESSOR_MAPPING_NAMES.items() if each == name)]
    images = next((found for t in types if (found := IMAGE_PROCESSOR_MAPPING_NAMES.get(t))), {})
    needs = "torchvision" in vars(kind).get("__backends", ()) or "pil" not in images
    return "image part requires torchvision" if needs else "chats"
