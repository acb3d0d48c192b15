"""Architectures, tokenizer and processor of the demo models, and their serialization.

In: a seed or a trained model. Out: fresh transformers models, and folders that load offline with
the Auto classes. The MLLM's tensors have the names of LLaVA checkpoints on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from texts import CELL_CHARACTERS, base_document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
PAD, BOS, EOS, IMAGE = range(4)
_GRID_ONLY = {"_"}  # typed grids are left out of the tokenizer's sample: each cell stays one token
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
VISION_SIZE, PATCH_SIZE = 64, 16
IMAGE_TOKENS = (VISION_SIZE // PATCH_SIZE) ** 2

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] != 'assistant' %}
        {{- 'USER: ' }}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] if part['type'] == 'image' %}
                {{- '<image>\\n' }}
            {%- endfor %}
            {%- for part in message['content'] if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endfor %}
        {%- endif %}
        {{- ' ' }}
    {%- else %}
        {{- 'ASSISTANT: ' }}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endfor %}
        {%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer, one token per digit, on a sample of the base's texts."""
    rng = np.random.default_rng(0)  # the same tokenizer for every training seed
    documents = (base_document(rng) for _ in range(6000))
    sample = (row.prompt + row.reply for row in documents if not set(row.prompt) & _GRID_ONLY)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )
    grid = "".join(CELL_CHARACTERS.values())
    assert len(wrapped(grid, add_special_tokens=False)["input_ids"]) == len(CELL_CHARACTERS)
    return wrapped


def new_processor(
    tokenizer: PreTrainedTokenizerFast, image_token: str = SPECIAL_TOKENS[IMAGE]
) -> LlavaProcessor:
    """Make the processor: 64 x 64 pixels, 16 image tokens."""
    size = {"height": VISION_SIZE, "width": VISION_SIZE}
    image_processor = CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=image_token,
        num_additional_image_tokens=1,
    )


class Size(NamedTuple):
    """The dimensions of a language model; an intermediate size is 2.75 times the width."""

    width: int
    layers: int
    heads: int


SMALL, LARGE = Size(128, 4, 4), Size(320, 8, 8)  # 0.9 and 10.4 million parameters


def language_config(size: Size = SMALL) -> LlamaConfig:
    """Return the configuration the three language models of a trio share."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def new_language_model(seed: int, size: Size = SMALL) -> LlamaForCausalLM:
    """Make an untrained language model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(language_config(size))


def new_mllm(
    base: LlamaForCausalLM, seed: int, image_token: int = IMAGE
) -> LlavaForConditionalGeneration:
    """Make an MLLM with an untrained tower and projector around a copy of the base."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=VISION_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=base.config,
        image_token_index=image_token,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        pad_token_id=base.config.pad_token_id,
        bos_token_id=base.config.bos_token_id,
        eos_token_id=base.config.eos_token_id,
    )
    mllm = LlavaForConditionalGeneration(config)
    mllm.model.language_model.load_state_dict(base.model.state_dict())
    mllm.lm_head.load_state_dict(base.lm_head.state_dict())
    return mllm


def save_language_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write a language model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_mllm(mllm: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the MLLM under the tensor names LLaVA checkpoints on the hub carry."""
    mllm.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    # A model made from a configuration is saved without this prefix of the hub's checkpoints.
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
