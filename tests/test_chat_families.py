"""Families whose processor has a video part chat without torchvision, and others say what lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chat_families import CHAT_FAMILIES, VIDEO_ONLY, WITHOUT_PILLOW, ChatFamily
from chat_models import (
    build_chat,
    chat_support,
    server_without,
    server_without_torchvision,
    write_package,
)
from PIL import Image

from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.generation import answer
from ipmerge_core.inference.loading import load_model
from ipmerge_core.inference.processor_loading import VideoSettings
from ipmerge_core.inference.processor_process import ProcessorServer, RemoteProcessor
from ipmerge_core.inference.prompts import Message
from ipmerge_core.runtime.imports import find_torchvision

DEMO = Path(__file__).parents[1] / "assets" / "demo"
SAMPLE = [
    ("Qwen2.5-VL", torch.bfloat16),
    ("LLaVA-OneVision", torch.float32),
    ("InternVL", torch.bfloat16),
]
NOISE, WHITE = Image.effect_noise((90, 60), 80), Image.new("RGB", (90, 60), "white")
ASKED = [Message("user", "What is it?", (NOISE,))]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessorServer]:
    """A server whose torchvision is installed for another torch."""
    server = server_without_torchvision(tmp_path_factory.mktemp("site"))
    yield server
    server.close()


def processor_of(
    family: ChatFamily, folder: Path, server: ProcessorServer | None = None
) -> RemoteProcessor:
    return RemoteProcessor(build_chat(family, folder), takes_images=True, server=server)


@pytest.mark.parametrize(("name", "dtype"), SAMPLE)
def test_a_family_with_a_video_part_answers_with_an_image_without_torchvision(
    name: str, dtype: torch.dtype, broken: ProcessorServer, tmp_path: Path
) -> None:
    folder = build_chat(CHAT_FAMILIES[name], tmp_path / "model", dtype)
    processor = RemoteProcessor(folder, takes_images=True, server=broken)
    loaded = load_model(folder)
    assert next(loaded.model.parameters()).dtype == dtype
    logits = []
    for image in (NOISE, WHITE):
        inputs = processor.encode([Message("user", "What is it?", (image,))])
        with torch.inference_mode():
            logits.append(loaded.model(**inputs).logits[0, -1])
    assert not torch.equal(*logits)
    assert processor.image_processor is not None
    assert processor.image_processor.endswith("ImageProcessorPil (pil)")
    assert isinstance(answer(loaded, "What is it?", NOISE, max_new_tokens=2), str)
    assert loaded.processor.image_processor is not None


@pytest.mark.parametrize("name", WITHOUT_PILLOW)
def test_a_family_whose_image_part_needs_torchvision_names_it(
    name: str, broken: ProcessorServer, tmp_path: Path
) -> None:
    processor = processor_of(WITHOUT_PILLOW[name], tmp_path / "model", broken)
    with pytest.raises(ModelLoadError, match=r"'model' requires torchvision, which cannot") as told:
        processor.load()
    assert "(RuntimeError: operator nms does not exist)" in str(told.value)
    assert f"pip install torchvision torch=={torch.__version__.partition('+')[0]}" in str(
        told.value
    )
    assert ("whl/cpu" in str(told.value)) == torch.__version__.endswith("+cpu")


def test_a_processor_without_an_image_part_is_refused(
    broken: ProcessorServer, tmp_path: Path
) -> None:
    (family,) = VIDEO_ONLY.values()
    with pytest.raises(ModelLoadError, match="has no image processor: its parts are video_"):
        processor_of(family, tmp_path / "model", broken).load()


def test_a_processor_that_needs_an_image_asks_for_one(tmp_path: Path) -> None:
    processor = processor_of(CHAT_FAMILIES["PaliGemma 2"], tmp_path / "model")
    with pytest.raises(ModelLoadError, match="without an image .ValueError.* Attach an image"):
        processor.encode([Message("user", "What is it?")])
    assert "pixel_values" in processor.encode(ASKED)  # the process stays


def test_a_torchvision_for_another_torch_does_not_stop_the_chat(tmp_path: Path) -> None:
    site = write_package("torchvision", tmp_path, "RuntimeError('operator nms does not exist')")
    code = (
        "from ipmerge_core.inference.generation import answer\n"
        "from ipmerge_core.models.checkpoint import Checkpoint\n"
        "from ipmerge_core.models.forward_settings import forward_differences\n"
        f"demo = {str(DEMO)!r}\n"
        "mllm, base = (Checkpoint.open(f'{demo}/{name}') for name in ('mllm', 'base'))\n"
        "list(forward_differences(mllm, base))\n"
        "print(repr(answer(f'{demo}/mllm', 'What is it?', max_new_tokens=2)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout
    assert printed.strip().startswith(("'", '"'))


@pytest.mark.parametrize("model_type", ["qwen2_audio", "voxtral", "qwen2_5_omni", "clip"])
def test_a_model_of_other_inputs_is_refused_in_a_sentence(model_type: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO / "math", tmp_path / "math"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ModelLoadError, match=f"cannot chat: .* its type '{model_type}'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("processor_config.json", "[]", "is not a processor or tokenizer configuration"),
        ("processor_config.json", "{", "is not a processor or tokenizer configuration"),
        ("video_preprocessor_config.json", "[1]", "is not a processor or tokenizer configuration"),
        (
            "processor_config.json",
            '{"processor_class": "AutoModel"}',
            "is 'AutoModel', which is not",
        ),
        ("processor_config.json", '{"processor_class": "NoProcessor"}', "is 'NoProcessor', which"),
        ("processor_config.json", '{"processor_class": 7}', "is 7, which is not a processor"),
        ("preprocessor_config.json", "{}", None),  # the model type names the image processor
        ("preprocessor_config.json", '{"size": "\ud800"}', "Cannot load|is not a processor"),
    ],
)
def test_damaged_processor_files_are_errors_of_one_sentence(
    file: str, content: str, words: str | None, broken: ProcessorServer, tmp_path: Path
) -> None:
    processor = processor_of(CHAT_FAMILIES["Qwen2.5-VL"], tmp_path / "model", broken)
    (tmp_path / "model" / file).write_text(content, encoding="utf-8", errors="surrogatepass")
    if words is None:
        processor.load()
        return
    with pytest.raises(ModelLoadError, match=words):
        processor.load()


def test_a_missing_library_of_a_processor_is_named(tmp_path: Path) -> None:
    server = server_without("num2words", tmp_path / "site", "ImportError('num2words is not here')")
    processor = processor_of(CHAT_FAMILIES["SmolVLM2"], tmp_path / "model", server)
    with pytest.raises(ModelLoadError, match="requires a library .*num2words.* Install it"):
        processor.load()
    server.close()


def test_the_image_processor_stays_for_a_conversation(
    broken: ProcessorServer, tmp_path: Path
) -> None:
    processor = processor_of(CHAT_FAMILIES["Qwen2.5-VL"], tmp_path / "model", broken)
    processor.load()
    assert processor.image_processor == "Qwen2VLImageProcessorPil (pil)"
    processor.close()
    processor.image_processor = "Qwen2VLImageProcessor (torchvision)"
    with pytest.raises(ModelLoadError, match="Start the app again"):
        processor.encode(ASKED)


@pytest.mark.skipif(not find_torchvision().works, reason="needs a torchvision that works")
@pytest.mark.parametrize(("name", "dtype"), SAMPLE)
def test_both_image_processors_give_the_same_tokens_and_shapes(
    name: str, dtype: torch.dtype, broken: ProcessorServer, tmp_path: Path
) -> None:
    family = CHAT_FAMILIES[name]
    pillow = processor_of(family, tmp_path / "model", broken)
    torchvision = processor_of(family, tmp_path / "model")
    left, right = pillow.encode(ASKED), torchvision.encode(ASKED)
    assert str(torchvision.image_processor).endswith("(torchvision)")
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.shape == right[key].shape
        assert value.is_floating_point() or torch.equal(value, right[key])


def test_a_video_setting_that_no_file_has_is_none_and_no_method() -> None:
    settings = VideoSettings({"merge_size": 2, "__class__": "x"})
    assert (settings.merge_size, settings.downsample_mode) == (2, None)
    assert json.loads(json.dumps(settings))["merge_size"] == 2
    with pytest.raises(AttributeError):
        _ = settings.__deepcopy__


def test_what_chats_follows_from_the_classes() -> None:
    assert chat_support("qwen2_5_vl") == chat_support("glm4v_moe") == "chats"
    assert chat_support("llama") == "chats"
    for model_type in ("llama4", "mistral3", "phi4_multimodal", "kimi_k25"):
        assert chat_support(model_type) == "image part requires torchvision"
    assert chat_support("instructblipvideo") == "no image part"
    assert chat_support("qwen2_audio") == "no class for text, or text with images"
