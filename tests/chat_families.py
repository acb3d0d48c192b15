"""The classes, settings and special tokens of tiny models with processors, by family.

`chat_models.py` writes them; test_chat_families.py uses a sample, and
benchmarks/bench_chat_families.py all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from families import CLIP, EYES, MROPE, QWEN_EYES, SIGLIP

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

# Processors whose image part exists for torchvision only, or that have none.
PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
PIXTRAL_NAMES = {
    "extra_special_tokens": {
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
}
PIXTRAL = {"size": {"longest_edge": 84}, "patch_size": {"height": 14, "width": 14}}
PIXTRAL_EYES = {**EYES, "model_type": "pixtral", "image_size": 112}
WITHOUT_PILLOW = {
    "Mistral 3": ChatFamily(
        "PixtralProcessor", "PixtralImageProcessor", "[IMG]", PIXTRAL_TOKENS, "Mistral3Config",
        text={"model_type": "mistral"}, vision=PIXTRAL_EYES, ids={"image_token_id": "[IMG]"},
        image_settings=PIXTRAL, processor_settings={"patch_size": 14, "spatial_merge_size": 2},
        tokenizer_settings=PIXTRAL_NAMES,
    ),
    "Pixtral": ChatFamily(
        "PixtralProcessor", "PixtralImageProcessor", "[IMG]", PIXTRAL_TOKENS, "LlavaConfig",
        text={"model_type": "mistral"}, vision=PIXTRAL_EYES, ids={"image_token_id": "[IMG]"},
        more={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
        image_settings=PIXTRAL, processor_settings={"patch_size": 14, "spatial_merge_size": 1},
        tokenizer_settings=PIXTRAL_NAMES,
    ),
    "Llama 4": ChatFamily(
        "Llama4Processor", "Llama4ImageProcessorFast", "<|image|>",
        (
            "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
            "<|tile_y_separator|>",
        ),
        "Llama4Config", text={"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        vision={
            **EYES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5, "intermediate_size": 64,
        },
        ids={"image_token_id": "<|patch|>"},
        image_settings={"size": {"height": 28, "width": 28}, "max_patches": 4},
        processor_settings={"patch_size": 14, "pixel_shuffle_ratio": 0.5},
    ),
    "Cohere2-Vision": ChatFamily(
        "Cohere2VisionProcessor", "Cohere2VisionImageProcessorFast", "<|IMG|>",
        ("<|IMG|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"),
        "Cohere2VisionConfig", text={"model_type": "cohere2", "head_dim": 8},
        vision=SIGLIP, ids={"image_token_id": "<|IMG|>"},
        more={"downsample_factor": 2, "alignment_intermediate_size": 32},
        image_settings={"size": {"height": 28, "width": 28}, "patch_size": 1, "max_patches": 2},
        tokenizer_settings={
            "extra_special_tokens": {
                "image_token": "<|IMG|>", "boi_token": "<|START_OF_IMG|>",
                "eoi_token": "<|END_OF_IMG|>", "img_line_break_token": "<|IMG_LINE_BREAK|>",
            }
        },
    ),
    "LFM2-VL": ChatFamily(
        "Lfm2VlProcessor", "Lfm2VlImageProcessor", "<image>",
        ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"), "Lfm2VlConfig",
        text={"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2},
        vision={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "patch_size": 16, "num_patches": 256,
            "vision_use_head": False,
        },
        ids={"image_token_id": "<image>"}, more={"projector_hidden_size": 32},
        image_settings={"do_image_splitting": False},
    ),
    "PerceptionLM": ChatFamily(
        "PerceptionLMProcessor", "PerceptionLMImageProcessorFast", "<|image|>", ("<|image|>",),
        model_type="perception_lm", video="PerceptionLMVideoProcessor",
        tokenizer_settings={
            "extra_special_tokens": {"image_token": "<|image|>", "video_token": "<|image|>"}
        },
    ),
}  # fmt: skip
VIDEO_ONLY = {
    "InstructBLIP-Video": ChatFamily(
        "InstructBlipVideoProcessor", "InstructBlipVideoImageProcessor", "<video>", ("<video>",),
        model_type="instructblipvideo", video="InstructBlipVideoVideoProcessor",
    ),
}  # fmt: skip
