"""Match the rows of the embedding and the output head by token string.

In: a `ModelPair` and the tokenizer.json of its models. Out: `MatrixMatch`es over runs of rows of
the input embedding and the output head. Rows are matched by token string, not by index, because
fine-tuned models insert tokens that shift the others. Rows of tokens that only the MLLM has and
padding rows are in no run, so that a merge copies them. No weights are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ipmerge_core.errors import PlanError, ShapeError
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.decoders import Decoder, output_head, text_config
from ipmerge_core.models.pairing import MatrixMatch, ModelPair
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    Count,
    InvalidContentError,
    Name,
    Schema,
    parse_json,
)

ROWS = "vocabulary"  # the module of such a match; its rows are merged one by one
TOKENIZER = "tokenizer.json"
_LARGEST = 128 * MEGABYTE  # the largest vocabularies take a third of it
_BLOCK = 1024  # maximum rows of a run, which bounds memory for any vocabulary


class SharedTokens(NamedTuple):
    """Summary of a match stored in a plan: number of merged rows, and a hash of them."""

    rows: Count
    digest: Name


def shared_tokens(pair: ModelPair) -> SharedTokens:
    """Count and identify the rows shared by all models. Raises: as `shared_rows`."""
    runs = shared_rows(pair)
    named = [[run.mllm, run.name, run.base_mllm, *run.math] for run in runs]
    digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    return SharedTokens(sum(run.shape[0] for run in runs), digest)


@lru_cache(maxsize=1)  # called several times per merge; reading a tokenizer takes a second
def shared_rows(pair: ModelPair) -> tuple[MatrixMatch, ...]:
    """Match the rows of the embedding and the head by token, as runs of consecutive rows.

    A tied head that is not stored is not matched separately; if the MLLM stores both, both get
    the same rows.

    Raises:
        PlanError: a model has no tokenizer.json, or the models share no token.
        ShapeError: the rows differ in length.
    """
    models = [model for model, _ in pair.sides]
    ids = _common_ids([read_tokens(model) for model in models])
    if not ids:
        raise PlanError(
            f"The tokenizers of '{pair.mllm.id}' and '{pair.base.id}' have no token in common, so "
            f"no embedding rows can be merged. Keep the embeddings."
        )
    last = max(matrix.layer for matrix in pair.matrices)
    embeddings = [_embedding(model, decoder) for model, decoder in pair.sides]
    heads = [  # a model that stores none uses its embedding
        output_head(model) or name for (model, _), name in zip(pair.sides, embeddings, strict=True)
    ]
    own = heads[1]  # the MLLM's
    runs = list(_runs(models, embeddings, ids, layer=0))
    if own == embeddings[1]:
        return tuple(runs)
    if text_config(pair.mllm).get("tie_word_embeddings"):
        twins = [own if side == 1 else name for side, name in enumerate(embeddings)]
        return (*runs, *_runs(models, twins, ids, layer=0))
    return (*runs, *_runs(models, heads, ids, layer=last))


def read_tokens(model: Checkpoint) -> dict[str, int]:
    """Read the row index of every token from tokenizer.json. Raises: PlanError."""
    if TOKENIZER not in model.files.names():
        raise PlanError(
            f"'{model.id}' has no {TOKENIZER}, which is needed to match embedding rows by token. "
            f"Save its tokenizer into the folder with transformers (AutoTokenizer, "
            f"save_pretrained), or keep the embeddings."
        )
    try:
        if model.files.size(TOKENIZER) > _LARGEST:
            raise InvalidContentError(f"it has more than {_LARGEST} bytes")
        content = parse_json(model.files.read(TOKENIZER), _LARGEST, foreign=True)
        tokenizer = _TOKENIZER.validate(content)
    except InvalidContentError as error:
        raise PlanError(
            f"'{TOKENIZER}' of '{model.id}' cannot be read as a tokenizer: {error}. Save it again "
            f"with transformers, or keep the embeddings."
        ) from error
    rows: dict[str, int] = {}
    for row, token in sorted(_tokens_by_row(tokenizer).items()):
        rows.setdefault(token, row)
    return rows


@dataclass(frozen=True)
class _Model:
    """The vocabulary: the row of each token, or in Unigram models tokens with their scores."""

    vocab: dict[str, Count] | list[tuple[str, float]]


@dataclass(frozen=True)
class _AddedToken:
    id: Count
    content: str


@dataclass(frozen=True)
class _Tokenizer:
    """The part of tokenizer.json that maps tokens to rows."""

    model: _Model
    added_tokens: tuple[_AddedToken, ...] | None = None


_TOKENIZER = Schema[_Tokenizer](_Tokenizer)


def _tokens_by_row(tokenizer: _Tokenizer) -> dict[int, str]:
    """Map rows to tokens; an added token overrides the vocabulary's token in its row."""
    vocabulary = tokenizer.model.vocab
    pairs = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((entry[0], row) for row, entry in enumerate(vocabulary))
    )
    by_row = {row: token for token, row in pairs}
    return by_row | {added.id: added.content for added in tokenizer.added_tokens or ()}


def _common_ids(vocabularies: Sequence[dict[str, int]]) -> list[tuple[int, ...]]:
    """Return the rows of the shared tokens, one tuple per token, ordered by the MLLM's row."""
    shared = set(vocabularies[0]).intersection(*vocabularies[1:])
    rows = (tuple(vocabulary[token] for vocabulary in vocabularies) for token in shared)
    return sorted(rows, key=lambda row: row[1])


def _embedding(model: Checkpoint, decoder: Decoder) -> str:
    name = f"{decoder.prefix}embed_tokens.weight"
    if name not in model.tensors:
        raise PlanError(
            f"'{model.id}' has no '{name}', so its embeddings cannot be matched. Keep them."
        )
    return name


def _runs(
    models: Sequence[Checkpoint], names: Sequence[str], ids: list[tuple[int, ...]], layer: int
) -> Iterator[MatrixMatch]:
    """Split the tokens into runs of rows that are consecutive in every model."""
    shapes = [model.spec(name).shape for model, name in zip(models, names, strict=True)]
    width = shapes[0][-1]
    for model, name, shape in zip(models, names, shapes, strict=True):
        if len(shape) != 2 or shape[1] != width:
            raise ShapeError(
                f"'{name}' of '{model.id}' has shape {shape}; expected rows of {width}, as in "
                f"'{models[0].id}'. Keep the embeddings."
            )
    stored = [row for row in ids if all(r < shape[0] for r, shape in zip(row, shapes, strict=True))]
    start = 0
    for stop in range(1, len(stored) + 1):
        if (
            stop < len(stored)
            and stop - start < _BLOCK
            and _follows(stored[stop - 1], stored[stop])
        ):
            continue
        count = stop - start
        base, mllm, own, *math = (
            f"{name}[{first}:{first + count}]"
            for name, first in zip(names, stored[start], strict=True)
        )
        yield MatrixMatch(base, layer, ROWS, (count, width), mllm, own, tuple(math))
        start = stop


def _follows(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return all(b + 1 == a for b, a in zip(before, after, strict=True))
