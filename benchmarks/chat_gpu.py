"""Measure milliseconds per token and memory of models of 7e9 parameters with random weights.

In: a device and a config. Out: a table for the base alone, the base and a merge in one batch with
factors of rank 16 on every matrix, and two separate models. Used by `bench_chat.py`.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from report import table
from torch import nn

from ipmerge_core.adapters.hooks import Additions, FactorHooks, stack_on

RANK, PROMPT, TOKENS = 16, 600, 64
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32064,
}  # fmt: skip
QWEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0
    },
}  # fmt: skip


class Shape(NamedTuple):
    """A model to build: the class of its config, and its text part."""

    name: str
    config: str
    text: dict[str, Any]


SHAPES = (
    Shape("LLaVA-1.5-7B", "LlavaConfig", LLAMA),
    Shape("Qwen2.5-VL-7B", "Qwen2_5_VLConfig", QWEN),
)


def print_gpu() -> None:
    """Print the table for every shape on the CUDA GPU."""
    for shape in SHAPES:
        print(f"{shape.name}, random weights in bf16, {PROMPT} + {TOKENS} tokens, rank {RANK}:\n")
        print(table(["run", "ms per token", "GB"], measure(shape, "cuda", PROMPT, TOKENS)), "\n")
        torch.cuda.empty_cache()


def measure(shape: Shape, device: str, prompt: int, tokens: int) -> list[list[str]]:
    """Return the rows of the table of one model."""
    model = build(shape, device)
    alone = per_token(model, device, 1, prompt, tokens)
    rows = [["base alone", f"{alone:.2f}", held(device)]]
    hooks = FactorHooks(model)
    hooks.installed = with_factors(model, hooks)
    both = per_token(model, device, 2, prompt, tokens)
    rows.append(["base and merged in one batch", f"{both:.2f} ({both / alone:.2f})", held(device)])
    hooks.installed = Additions()
    second = build(shape, device)
    pair = alone + per_token(second, device, 1, prompt, tokens)
    rows.append(["two models, one after the other", f"{pair:.2f}", held(device)])
    return rows


def build(shape: Shape, device: str) -> Any:  # noqa: ANN401
    """Build a model with random weights on the device."""
    import transformers

    config = getattr(transformers, shape.config)(text_config=shape.text)
    with torch.device(device):
        kind = transformers.AutoModelForImageTextToText
        return kind.from_config(config, dtype=torch.bfloat16).eval()


def with_factors(model: nn.Module, hooks: FactorHooks) -> Additions:
    """Put random factors on every linear layer of the language model; the first row has none."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model.layers" in name
    }
    active = {}
    for name, module in modules.items():
        hooks.watch(name)
        weight = module.weight
        A = 1e-3 * torch.randn(RANK, weight.shape[1])
        B = 1e-3 * torch.randn(weight.shape[0], RANK)
        active[name] = [stack_on(weight.device, weight.dtype, A, B, gains=(0.0, 1.0))]
    return Additions(active, set())


def per_token(model: Any, device: str, rows: int, prompt: int, tokens: int) -> float:  # noqa: ANN401
    """Return milliseconds per generated token of a batch, without the prompt."""
    ids = torch.randint(10, 1000, (rows, prompt), device=device)
    mask = torch.ones_like(ids)

    def seconds(count: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=count,
                max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds(2)
    short, long = (min(seconds(count) for _ in range(3)) for count in (2, tokens))
    return 1000 * (long - short) / (tokens - 2)


def held(device: str) -> str:
    """Return the memory that tensors take on a GPU."""
    return f"{torch.cuda.memory_allocated() / 1e9:.2f}" if device == "cuda" else "-"
