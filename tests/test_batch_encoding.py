"""One call of a processor for many conversations gives the tensors of one call for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_families import CHAT_FAMILIES
from chat_models import build_chat
from PIL import Image

from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.batch_encoding import encode_batch
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.wire import pack_many, unpack_many

DEMO = Path(__file__).parents[1] / "assets" / "demo"
TEXTS = ("What?", "How many dots do you see here?", "Name it.", "a " * 40, "Is <image> a word?")
FAMILIES = (
    "Qwen2.5-VL", "GLM-4.6V", "LLaVA-OneVision", "LLaVA-NeXT-Video", "InternVL", "SmolVLM2",
    "Gemma 4", "PaliGemma 2",
)  # fmt: skip


def asked(texts: Sequence[str], *sizes: tuple[int, int]) -> list[list[Message]]:
    """Conversations with one picture each, of these sizes in turn, or without pictures."""
    pictures = [(Image.effect_noise(size, 60).convert("RGB"),) for size in sizes] or [()]
    return [
        [Message("user", text, pictures[number % len(pictures)])]
        for number, text in enumerate(texts)
    ]


def assert_equal(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[name].dtype, name
                assert torch.equal(value, other[name]), name
            else:
                assert value == other[name], name


@pytest.fixture(scope="module")
def demo() -> ModelProcessor:
    return ModelProcessor(DEMO / "mllm", takes_images=True)


def counted(model: ModelProcessor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call from now on."""
    calls: list[int] = []
    call = model.call

    def count(texts: Sequence[str], images: Sequence[Any], **padding: Any) -> dict[str, Any]:
        calls.append(len(texts))
        return call(texts, images, **padding)

    monkeypatch.setattr(model, "call", count)
    monkeypatch.setattr(model, "exact_batches", {})
    return calls


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed
def test_a_batch_of_any_family_is_that_of_single_calls(name: str, tmp_path: Path) -> None:
    folder = build_chat(CHAT_FAMILIES[name], tmp_path / "model")
    model = ModelProcessor(folder, takes_images=True)
    for sizes in ([(90, 60)], [(90, 60), (40, 70), (600, 500)]):
        chats = asked(TEXTS * 2, *sizes)
        assert_equal(encode_batch(model, chats), [model.encode(each) for each in chats])


@pytest.mark.parametrize("name", ["math", "mllm"])
def test_texts_without_pictures_are_encoded_together(name: str) -> None:
    model = ModelProcessor(DEMO / name, takes_images=name == "mllm")
    chats = asked(TEXTS)
    assert_equal(encode_batch(model, chats), [model.encode(each) for each in chats])
    assert model.exact_batches == {(): True}


def test_pictures_of_one_size_take_one_call_and_two_to_compare(
    demo: ModelProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(demo, monkeypatch)
    chats = asked(TEXTS[:4] * 4, (128, 128))
    encode_batch(demo, chats)
    assert calls == [16, 1, 1]
    encode_batch(demo, chats)
    assert calls == [16, 1, 1, 16]


def test_control_tokens_and_large_pictures_take_calls_of_their_own(
    demo: ModelProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [*asked(TEXTS, (64, 64)), *asked(TEXTS[:1], (900, 900))]
    wanted = [demo.encode(each) for each in chats]
    calls = counted(demo, monkeypatch)
    assert_equal(encode_batch(demo, chats), wanted)
    assert sorted(calls) == [1, 1, 1, 1, 4]


def test_a_processor_that_changes_tensors_in_a_batch_is_called_one_at_a_time(
    demo: ModelProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = asked(TEXTS[:4], (64, 64))
    wanted = [demo.encode(each) for each in chats]
    call = demo.call

    def change(texts: Sequence[str], images: Sequence[Any], **padding: Any) -> dict[str, Any]:
        inputs = call(texts, images, **padding)
        shift = 1e-3 if len(texts) > 1 else 0.0
        return {**inputs, "pixel_values": inputs["pixel_values"] + shift}

    monkeypatch.setattr(demo, "call", change)
    monkeypatch.setattr(demo, "exact_batches", {})
    for _ in range(2):
        assert_equal(encode_batch(demo, chats), wanted)
    assert demo.exact_batches == {((64, 64),): False}


def test_a_failing_call_for_all_names_the_one_that_fails(
    demo: ModelProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = asked(TEXTS[:3], (64, 64))
    call = demo.call

    def fail(texts: Sequence[str], images: Sequence[Any], **padding: Any) -> dict[str, Any]:
        if any("Name it" in text for text in texts):
            raise ValueError("no name")
        return call(texts, images, **padding)

    monkeypatch.setattr(demo, "call", fail)
    monkeypatch.setattr(demo, "exact_batches", {})
    found = encode_batch(demo, chats)
    assert [isinstance(each, ModelLoadError) for each in found] == [False, False, True]
    assert "no name" in str(found[2])


def test_prompts_are_sent_as_they_are() -> None:
    prompts = [
        {"input_ids": torch.tensor([[1, 2, 3]]), "pixels": torch.rand(1, 3, 2), "sizes": [[2, 3]]},
        {},
        {"input_ids": torch.tensor([[4]]), "pixels": torch.rand(2, 1).half()},
        {"input_ids": torch.empty(1, 0, dtype=torch.int64), "flag": None},
    ]
    assert_equal(unpack_many(*pack_many(prompts)), prompts)
