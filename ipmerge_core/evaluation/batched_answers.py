"""Generate greedy answers in left-padded batches.

In: a loaded model, its processor (or tokenizer, for a text model), problems. Out: decoded replies
in order, equal to those without batching. Prompts are defined by the problems. Does not load models
or score answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ipmerge_core.inference.batched_generation import generate_rows
from ipmerge_core.tasks.demo import Problem

LONGEST_REPLY = 20  # tokens; the longest correct answer of the demo has 18


def answer_all(
    model: Any,  # noqa: ANN401 (transformers models share no type that mypy can see)
    processor: Any,  # noqa: ANN401
    problems: Sequence[Problem],
    *,
    batch_size: int = 150,
    max_new_tokens: int = LONGEST_REPLY,
) -> list[str]:
    """Answer each problem greedily, from its drawing if `processor` takes images, else from text.

    Args:
        model: A causal language model or an image-text-to-text model, in evaluation mode.
        processor: Its processor or its tokenizer.
        problems: The problems.
        batch_size: Problems per batch; the replies do not depend on it.
        max_new_tokens: Maximum length of a reply.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    replies: list[str] = []
    for chunk in _chunks(problems, batch_size):
        inputs = _inputs(processor, chunk).to(model.device)
        rows = generate_rows(model, inputs, max_new_tokens)
        decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
        replies.extend(reply.strip() for reply in decoded)
    return replies


def _chunks(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def _inputs(processor: Any, chunk: Sequence[Problem]) -> Any:  # noqa: ANN401
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    if hasattr(processor, "image_processor"):
        return processor(
            text=[problem.prompt for problem in chunk],
            images=[problem.image for problem in chunk],
            **options,
        )
    tokens = processor([problem.text_prompt for problem in chunk], **options)
    tokens.pop("token_type_ids", None)
    return tokens
