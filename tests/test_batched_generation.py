"""Batched replies of several families equal those of `generate`, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_families import CHAT_FAMILIES
from chat_models import build_chat
from PIL import Image

from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.batched_generation import batches_exactly, generate_rows, join
from ipmerge_core.inference.image_features import FeatureCache, kept_features
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.processor_rows import decode_rows, encode_rows
from ipmerge_core.inference.prompts import Message

DEMO = Path(__file__).parents[1] / "assets" / "demo"
NOISE = Image.effect_noise((90, 60), 80).convert("RGB")
OTHER = Image.effect_noise((60, 90), 40).convert("RGB")
QUESTIONS = [("What is it?", NOISE), ("Say something longer about this, please.", OTHER)]
TOKENS = 6


def encoded(loaded: LoadedModel, questions: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    messages = [[_message(text, image)] for text, image in questions]
    found = encode_rows(loaded.processor, messages)
    assert all(isinstance(each, dict) for each in found), found
    return found


def _message(text: str, image: Any) -> Message:
    return Message("user", text, (image,))


def alone(loaded: LoadedModel, prompt: dict[str, Any]) -> list[int]:
    with torch.inference_mode():
        ids = loaded.model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)
    return ids[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "name", ["Qwen2.5-VL", "Qwen3-VL, mixture of experts", "LLaVA-OneVision", "Qwen3.5"]
)
@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed
def test_a_batch_gives_the_tokens_of_single_prompts(name: str, tmp_path: Path) -> None:
    loaded = load_model(build_chat(CHAT_FAMILIES[name], tmp_path / "model"))
    model, padding = loaded.model, loaded.model.generation_config.pad_token_id
    prompts = encoded(loaded, [*QUESTIONS, ("Hm", NOISE)])
    wanted = [alone(loaded, prompt) for prompt in prompts]
    model.generation_config.eos_token_id = [wanted[0][1]]  # so that rows end at different steps
    wanted = [alone(loaded, prompt) for prompt in prompts]
    assert min(map(len, wanted)) < TOKENS
    together = join(prompts, padding)
    assert [generate_rows(model, prompt, TOKENS)[0] for prompt in prompts] == wanted
    if together is None:  # other numbers of tiles
        assert not batches_exactly(model, prompts, padding)
        return
    assert batches_exactly(model, prompts, padding)
    with kept_features(model, FeatureCache()):
        for _ in range(2):
            assert generate_rows(model, together, TOKENS) == wanted


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(DEMO / "mllm")


def test_prompts_of_other_kinds_are_not_joined(demo: LoadedModel) -> None:
    first, second = encoded(demo, QUESTIONS)
    assert join([first, {**second, "more": 1}], 0) is None
    assert join([{**first, "more": 1}, {**second, "more": 1}], 0) is None
    assert join([first, {**second, "pixel_values": torch.zeros(1, 3, 8, 8)}], 0) is None
    lists = [{**first, "sizes": [1]}, {**second, "sizes": [2]}]
    assert join(lists, 0)["sizes"] == [1, 2]
    joined = join([first, second], 7)
    short = min(first, second, key=lambda prompt: prompt["input_ids"].shape[1])
    row = [first, second].index(short)
    padded = joined["input_ids"].shape[1] - short["input_ids"].shape[1]
    assert padded > 0
    assert joined["input_ids"][row, :padded].tolist() == [7] * padded
    assert joined["attention_mask"][row, :padded].sum() == 0


def test_a_family_that_ignores_the_padding_is_not_batched(demo: LoadedModel) -> None:
    """Without its mask, a padded row sees the padding."""
    prompts = encoded(demo, QUESTIONS)
    assert batches_exactly(demo.model, prompts, 0)
    blind = [{**prompt, "attention_mask": prompt["attention_mask"].bool()} for prompt in prompts]
    forward = demo.model.forward

    def without_mask(*arguments: Any, **inputs: Any) -> Any:
        mask = inputs["attention_mask"]
        return forward(*arguments, **{**inputs, "attention_mask": torch.ones_like(mask)})

    demo.model.forward = without_mask
    try:
        assert not batches_exactly(demo.model, blind, 0)
    finally:
        del demo.model.forward


def test_features_are_dropped_when_there_are_too_many(demo: LoadedModel) -> None:
    (prompt,) = encoded(demo, QUESTIONS[:1])
    size = 16 * demo.model.config.text_config.hidden_size * 4
    cache = FeatureCache(most_bytes=2 * size)
    with kept_features(demo.model, cache):
        for shade in (0.1, 0.2, 0.3, 0.3):
            pixels = torch.full_like(prompt["pixel_values"], shade)
            generate_rows(demo.model, {**prompt, "pixel_values": pixels}, 1)
    assert (cache.computed, cache.found) == (3, 1)
    assert cache.nbytes == 2 * size
    assert "get_image_features" not in vars(demo.model.model)


def test_an_error_of_one_prompt_is_its_own(demo: LoadedModel) -> None:
    long = "x " * 100_000
    found = encode_rows(
        demo.processor, [[_message("a", NOISE)], [_message(long, NOISE)], [_message("b", OTHER)]]
    )
    assert [isinstance(each, ModelLoadError) for each in found] == [False, True, False]
    assert "maximum" in str(found[1])
    rows = [[1, 2, 3], [], [5]]
    assert decode_rows(demo.processor, rows) == [demo.processor.decode(ids) for ids in rows]
