"""Add tokens such as `<think>` to an MLLM before it is trained.

In: a model folder and tokens. Out: a model folder with them in its tokenizer, and with as many rows
of the embeddings and the output head as the tokenizer has tokens: new rows are the mean of the
others. Unchanged files are hard links to those of the original, or copies.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ipmerge_core.errors import ModelLoadError, PairingError, explained, first_line
from ipmerge_core.finetuning.matching import PriorMatch
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.decoders import output_head
from ipmerge_core.models.writer import files_to_copy
from ipmerge_core.runtime.atomic import atomic_path, writing

_INNER = ("text_config", "llm_config", "language_config")


def missing_tokens(processor: ModelProcessor, tokens: Sequence[str]) -> list[str]:
    """Return the tokens that are not in the vocabulary of a processor yet."""
    known = processor.tokenizer.get_vocab()
    return [token for token in dict.fromkeys(tokens) if token not in known]


def add_tokens(processor: ModelProcessor, tokens: Sequence[str]) -> int:
    """Add tokens to a tokenizer in memory and return its size.

    They are no special tokens, so that answers show them.
    """
    from transformers import AddedToken

    def failed(error: Exception) -> ModelLoadError:
        return ModelLoadError(
            f"Cannot add {', '.join(map(repr, tokens))} to the tokenizer of '{processor.name}' "
            f"({first_line(error)})."
        )

    with explained(failed):
        added = [AddedToken(token, special=False, normalized=False) for token in tokens]
        processor.tokenizer.add_tokens(added)
        return len(processor.tokenizer)


def write_with_tokens(mllm: Checkpoint, prefix: str, tokens: Sequence[str], out: Path) -> Path:
    """Write a model folder with more tokens, and return it.

    Args:
        mllm: the original model, in a local folder.
        prefix: of its language model, see `PriorMatch`.
        tokens: the new tokens.
        out: the folder to write; it must not exist.

    Raises: RunError if the disk is full; ModelLoadError if the tokenizer cannot be changed.
    """
    source = Path(mllm.id).expanduser().resolve()
    processor = ModelProcessor(source, takes_images=True)
    size = add_tokens(processor, tokens)
    with writing(out), atomic_path(out) as folder:
        folder.mkdir()
        for name in (*files_to_copy(mllm), *mllm.shards):
            _link(source / name, folder / name)
        _write_tokenizer(processor, folder)
        grown = _grown(mllm, prefix, size)
        for shard in sorted({mllm.spec(name).shard for name in grown}):
            _write_shard(mllm, shard, grown, folder)
        if grown:
            config = json.dumps(_with_vocabulary(mllm.config, size), indent=2) + "\n"
            _replace(folder / "config.json", config)
    return out


def _link(path: Path, target: Path) -> None:
    """Link a file, or copy it where the disk has no links or it is on another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def _write_tokenizer(processor: ModelProcessor, folder: Path) -> None:
    """Write the tokenizer's own files in place of their links, and no other."""
    apart = folder / "tokenizer"
    processor.tokenizer.save_pretrained(apart)
    for path in apart.iterdir():
        if path.name != "chat_template.jinja":  # that of the model stays as it is
            (folder / path.name).unlink(missing_ok=True)
            path.replace(folder / path.name)
    shutil.rmtree(apart)


def refuse_resized(match: PriorMatch, processor: ModelProcessor, tokens: Sequence[str]) -> None:
    """Raise PairingError if the prior acts on a matrix that new tokens add rows to."""
    resized = _too_short(match.mllm, match.prefix, len(processor.tokenizer) + len(tokens))
    found = next((e.mllm for e in match.entries if e.mllm in resized), None) if tokens else None
    if found is not None:
        raise PairingError(
            f"The added tokens {', '.join(map(repr, tokens))} add rows to '{found}' of the mllm "
            f"'{match.mllm.id}', for which the expert has no counterpart. Leave embed and head out "
            f"of the modules, or add no tokens."
        )


def _too_short(mllm: Checkpoint, prefix: str, size: int) -> list[str]:
    """Return the names of the embeddings and the output head that have fewer than `size` rows."""
    names = dict.fromkeys((f"{prefix}embed_tokens.weight", output_head(mllm)))
    known = [name for name in names if name is not None and name in mllm.tensors]
    return [name for name in known if mllm.spec(name).shape[0] < size]


def _grown(mllm: Checkpoint, prefix: str, size: int) -> dict[str, Tensor]:
    """Return the embeddings and the output head with `size` rows, where they have fewer."""
    found = {}
    for name in _too_short(mllm, prefix, size):
        rows = mllm.read_matrix(name)
        mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
        found[name] = torch.cat([rows, mean.expand(size - len(rows), -1)])
    return found


def _write_shard(mllm: Checkpoint, shard: str, grown: dict[str, Tensor], folder: Path) -> None:
    """Write a shard with its grown tensors, in place of its link."""
    own = [spec.name for spec in mllm.tensors.values() if spec.shard == shard]
    tensors = {name: grown[name] if name in grown else mllm.read(name) for name in own}
    (folder / shard).unlink()
    save_file(tensors, folder / shard, metadata={"format": "pt"})


def _with_vocabulary(config: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a config with another size of the vocabulary, wherever it has one."""
    changed = dict(config)
    inner = [name for name in _INNER if isinstance(changed.get(name), dict)]
    for name in inner:
        changed[name] = {**changed[name], "vocab_size": size}
    if "vocab_size" in changed or not inner:
        changed["vocab_size"] = size
    return changed


def _replace(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, encoding="utf-8")
