"""Write tiny random vision-language models with processors, as the hub stores them.

Built from config classes, with a tokenizer of bytes made here. Also: which model types chat, and a
server whose processes have no torchvision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from chat_families import CHAT_FAMILIES, WITHOUT_PILLOW, ChatFamily
from families import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ipmerge_core.inference.processor_process import ProcessorServer

AUDIO = {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}
ENDS = ("start", "end")
NEEDS_TORCHVISION = "image part requires torchvision"
WORDS = 512  # rows of the embeddings: 256 bytes and at most as many special tokens


def write_package(name: str, site: Path, error: str) -> Path:
    """Write a package that raises an error when it is imported."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(f"raise {error}")
    return site


def server_without(package: str, site: Path, error: str) -> ProcessorServer:
    """Start a server in which a package is installed and raises an error when it is imported."""
    write_package(package, site, error)
    server = ProcessorServer()
    sys.path.insert(0, str(site))
    try:
        server.start()
    finally:
        sys.path.remove(str(site))
    return server


def server_without_torchvision(site: Path) -> ProcessorServer:
    """Start a server with a torchvision of another torch, whatever this environment has."""
    return server_without("torchvision", site, "RuntimeError('operator nms does not exist')")


def processor_family(model_type: str) -> ChatFamily:
    """Return a family of which only the processor is built, with the tokens of all families."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    known = [*CHAT_FAMILIES.values(), *WITHOUT_PILLOW.values()]
    tokens = {token: None for family in known for token in family.tokens}
    names = {
        name: token
        for family in known
        for name, token in family.tokenizer_settings.get("extra_special_tokens", {}).items()
    }
    names |= {f"{what}_{end}_token": "<image>" for what in ("video", "image") for end in ENDS}
    images = image_classes(model_type)
    return ChatFamily(
        PROCESSOR_MAPPING_NAMES[model_type], images.get("torchvision") or images.get("pil") or "",
        "<image>", tuple(tokens), model_type=model_type, video="VideoProcessor",
        processor_settings={"feature_extractor": AUDIO},
        tokenizer_settings={"extra_special_tokens": names},
    )  # fmt: skip


def image_classes(model_type: str) -> Mapping[str, str]:
    """The image processor classes of a model type, or of another one with the same processor."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    types = [model_type, *(key for key, each in PROCESSOR_MAPPING_NAMES.items() if each == name)]
    return next((found for t in types if (found := IMAGE_PROCESSOR_MAPPING_NAMES.get(t))), {})


def build_chat(family: ChatFamily, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model folder of a family: config, weights, tokenizer and processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(family, folder)
    _write_processor(family, folder)
    if family.config:
        _write_model(family, folder, ids, dtype)
    else:
        from transformers import AutoConfig

        config = AutoConfig.for_model(family.model_type)
        config.get_text_config().vocab_size = WORDS
        config.save_pretrained(folder)
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
        return NEEDS_TORCHVISION
    if "image_processor" not in kind.get_attributes():
        return "no image part"
    if torchvision:
        return "chats"
    needs = "torchvision" in vars(kind).get("__backends", ()) or "pil" not in image_classes(
        model_type
    )
    return NEEDS_TORCHVISION if needs else "chats"
