"""Training documents of the SmolLM2 trio, in the chat format of the model.

In: a random generator. Out: documents, and batches of token ids. The math model learns to answer
questions about numbers in words with the calculation and its result; the MLLM learns to read
drawings, and never sees a result beside one. A typed grid has a character, one token, for each of
the 16 cells of a drawing, in the place of the image's tokens, so that reading can be learned
without a tower.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.with_name("demo"))]  # the package; its generators

from texts import CELL_CHARACTERS, cells, train_problem  # noqa: E402

from ipmerge_core.tasks.demo import (  # noqa: E402
    MATH_TASKS,
    PERCEPTION_TASKS,
    Problem,
    Task,
)

IMAGE_TOKEN = "<file_sep>"  # of the vocabulary, not used by the chat format
IMAGE_TOKENS = 16
IGNORED = -100  # the label that losses leave out
MATH_SHARE = 0.35  # of the drawings that are read
CHAT_TEMPLATE = (
    """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] if part['type'] == 'image' %}
            {{- 'IMAGE\\n' }}
        {%- endfor %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
).replace("IMAGE", IMAGE_TOKEN)


class ChatDocument(NamedTuple):
    """A question and its reply; `problem` is drawn in the place of the image, if there is one.

    A reply that does not end teaches nothing about what follows it.
    """

    question: str
    reply: str
    problem: Problem | None = None
    ends: bool = True


def math_documents(count: int, rng: np.random.Generator) -> list[ChatDocument]:
    """Draw questions about numbers in words, answered by computing."""
    problems = [train_problem(_pick(MATH_TASKS, rng), rng) for _ in range(count)]
    return [ChatDocument(in_words(p), f"{p.worked}.") for p in problems]


def in_words(problem: Problem) -> str:
    """Return the question about a drawing that is described in words."""
    return f"{problem.words}\n{problem.question}"


def reading_documents(count: int, rng: np.random.Generator) -> list[ChatDocument]:
    """Draw drawings to read: what is perceived, or the calculation without its result."""
    is_math = rng.random(count) < MATH_SHARE
    tasks = [_pick(MATH_TASKS if math else PERCEPTION_TASKS, rng) for math in is_math]
    return [reading_document(train_problem(task, rng)) for task in tasks]


def reading_document(problem: Problem) -> ChatDocument:
    """Return what the MLLM learns to say of a drawing.

    >>> from ipmerge_core.tasks.demo import problems
    >>> reading_document(problems("mul", 1, seed=3)[0])[1::2]
    ('8*5', False)
    """
    if problem.is_math:
        return ChatDocument(problem.question, problem.calculation, problem, ends=False)
    return ChatDocument(problem.question, f"{problem.answer}.", problem)


def text_batch(
    documents: Sequence[ChatDocument], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Tensor]:
    """Tokenize documents into one right-padded batch; only the replies have labels.

    The image's tokens of documents with a problem are the placeholder.
    """
    image = f"{IMAGE_TOKEN * IMAGE_TOKENS}\n"
    prompts = [
        f"<|im_start|>user\n{image if row.problem else ''}{row.question}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for row in documents
    ]
    replies = [row.reply + ("<|im_end|>" if row.ends else "") for row in documents]
    asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    told = tokenizer(replies, add_special_tokens=False)["input_ids"]
    width = max(len(a) + len(t) for a, t in zip(asked, told, strict=True))
    ids = torch.full((len(documents), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (prompt, reply) in enumerate(zip(asked, told, strict=True)):
        length = len(prompt) + len(reply)
        ids[row, :length] = torch.tensor([*prompt, *reply])
        labels[row, len(prompt) : length] = torch.tensor(reply)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def typed_batch(
    documents: Sequence[ChatDocument], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Tensor]:
    """Make a batch of drawings to read that has characters in the place of the image's tokens."""
    batch = text_batch(documents, tokenizer)
    typed = cell_tokens(tokenizer)
    places = batch["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    held = [typed[cell] for row in documents if row.problem for cell in cells(row.problem)]
    batch["input_ids"][places] = torch.tensor(held)
    return batch


def cell_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the token of the character of each kind of cell."""
    return {
        held: int(tokenizer.convert_tokens_to_ids(character))
        for held, character in CELL_CHARACTERS.items()
    }


def _pick(tasks: Sequence[Task], rng: np.random.Generator) -> Task:
    return tasks[int(rng.integers(len(tasks)))]
