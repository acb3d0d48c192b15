"""Seeded tiny models on disk, made in milliseconds, and run-time checks of shape annotations."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

# Before torch is loaded: with several threads in each of several workers, decompositions take tens
# of times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from beartype import BeartypeConf, beartype
from browser_fixtures import (  # noqa: F401
    app_url,
    chromium,
    chromium_page,
    explore_url,
    firefox,
    new_page,
    playwright_driver,
    profiles,
)
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in mypy

# The shape and type annotations of these are checked at every call made by a test marked `shapes`.
# In the others the checks are off: they make the merge of a tiny model 3 to 4 times as slow.
MATHEMATICAL = ("spectral", "methods")
for _room in MATHEMATICAL:
    install_import_hook(f"ipmerge_core.{_room}", "conftest.typechecked")
jaxtyping_config.update("jaxtyping_disable", True)

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

HIDDEN, FEED, LAYERS, VOCABULARY = 16, 24, 3, 20
TEXT_CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "hidden_act": "silu",
}
Weights = dict[str, torch.Tensor]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses a browser, whose driver leaves an event loop in its thread."""
    for item in items:
        if "playwright_driver" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Check shapes in the tests marked `shapes` and in the fixtures that they set up."""
    jaxtyping_config.update("jaxtyping_disable", item.get_closest_marker("shapes") is None)
    try:
        return (yield)
    finally:
        jaxtyping_config.update("jaxtyping_disable", True)


class Trio(NamedTuple):
    """Folders of a base, an MLLM and math experts that descend from it."""

    base: Path
    mllm: Path
    math: Path
    math_2: Path


def matrix_shapes() -> dict[str, tuple[int, int]]:
    """Shapes of one block's seven matrices."""
    return {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FEED, HIDDEN),
        "mlp.up_proj": (FEED, HIDDEN),
        "mlp.down_proj": (HIDDEN, FEED),
    }


def text_weights(seed: int = 0) -> Weights:
    """Make a random Llama-like text model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    weights = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for module, shape in matrix_shapes().items():
            weights[f"model.layers.{layer}.{module}.weight"] = normal(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN)
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = normal(VOCABULARY, HIDDEN)
    return weights


def fine_tuned(weights: Weights, seed: int, scale: float = 0.004) -> Weights:
    """Add a small change with a strong shared direction and a random rest to every matrix."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)
    tuned = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 2 and ".layers." in name:
            right = torch.randn(weight.shape[1], generator=shared)
            right = right + 0.5 * torch.randn(weight.shape[1], generator=generator)
            left = torch.randn(weight.shape[0], generator=generator)
            noise = torch.randn(weight.shape, generator=generator)
            change = 0.5 * torch.outer(left, right) + 0.3 * noise
            tuned[name] = weight + scale * change
    return tuned


def as_mllm(weights: Weights, prefix: str = "language_model.") -> Weights:
    """Put a text model's weights under an MLLM's names, beside a vision tower and a projector."""
    generator = torch.Generator().manual_seed(7)
    vision = {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (16, 8),
        "multi_modal_projector.linear_1.weight": (HIDDEN, 8),
    }
    towers = {name: torch.randn(*shape, generator=generator) for name, shape in vision.items()}
    return towers | {prefix + name: weight for name, weight in weights.items()}


def write_model(
    folder: Path,
    weights: Weights,
    config: dict[str, object],
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Path:
    """Write a model folder as transformers lays it out, in one file or in several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    stored = {name: weight.to(dtype).contiguous() for name, weight in weights.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = list(stored)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_trio(folder: Path, **options: object) -> Trio:
    """Write a base, an MLLM and two math experts."""
    base = text_weights()
    mllm_config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    return Trio(
        base=write_model(folder / "base", base, TEXT_CONFIG, **options),
        mllm=write_model(folder / "mllm", as_mllm(fine_tuned(base, 1)), mllm_config, **options),
        math=write_model(folder / "math", fine_tuned(base, 2), TEXT_CONFIG, **options),
        math_2=write_model(folder / "math_2", fine_tuned(base, 3), TEXT_CONFIG, **options),
    )


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """A tiny trio in fp32; tests only read it."""
    return write_trio(tmp_path_factory.mktemp("trio"))


@pytest.fixture
def own_trio(tmp_path: Path) -> Trio:
    """A tiny trio in fp32 that the test may damage."""
    return write_trio(tmp_path / "trio")
