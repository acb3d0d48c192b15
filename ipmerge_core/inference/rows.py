"""Generate the replies of several rows in one batch, each as if it were alone.

In: an encoded batch, and for every row its settings and its events to stop. Out: the tokens of each
row as they are generated. Sampling, the limits and the thinking budget are those of the row; a row
that has ended does not disturb the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ipmerge_core.inference.sampling import GenerationSettings, Sampler
from ipmerge_core.inference.thinking import ThinkingTokens

if TYPE_CHECKING:
    import torch

Ending = Literal["", "end", "length", "stopped"]  # "": it has not ended


@dataclass
class RowTokens:
    """The reply of one row so far: its token ids, without the one that ends it.

    `ended` is how it ended: by itself, by a limit, or by a stop. `opened` is whether the prompt
    ends within the thinking part. Written by the thread that generates; others only read.
    """

    settings: GenerationSettings
    stops: Sequence[threading.Event] = ()
    opened: bool = False
    ids: list[int] = field(default_factory=list)
    thinking: int = 0  # tokens of the thinking part
    ended: Ending = ""
    news: threading.Event = field(default_factory=threading.Event)  # set when anything changes
    started: float = 0.0  # seconds of the monotonic clock
    first: float = 0.0  # of the first token
    last: float = 0.0
    is_thinking: bool = field(init=False)

    def __post_init__(self) -> None:
        """Begin in the thinking part if the prompt has opened it."""
        self.is_thinking = self.opened

    @property
    def is_over_budget(self) -> bool:
        """Whether the next token must end the thinking part."""
        return self.is_thinking and self.thinking >= self.settings.max_thinking_tokens

    def take(self, token: int, eos: Sequence[int], marks: ThinkingTokens) -> None:
        """Append a token, or end the row."""
        self._take(token, eos, marks)
        self.news.set()

    def _take(self, token: int, eos: Sequence[int], marks: ThinkingTokens) -> None:
        if any(event.is_set() for event in self.stops):
            self.ended = "stopped"
            return
        if token in eos:
            self.ended = "end"
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if token in marks.start and not self.ids:
            self.is_thinking = True
        self.ids.append(token)
        if self.is_thinking:
            self.thinking += 1
        if token in marks.end:
            self.is_thinking = False
        if not self.is_thinking and len(self.ids) - self.thinking >= self.settings.max_new_tokens:
            self.ended = "length"


def generate_rows(
    model: Any,  # noqa: ANN401 (transformers models share no type that mypy can see)
    inputs: Mapping[str, Any],
    rows: Sequence[RowTokens],
    marks: ThinkingTokens,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Generate until every row has ended; fills `rows`.

    Args:
        model: a transformers model in evaluation mode.
        inputs: its inputs on its device, one batch with a line for each row.
        rows: what each row wants, and where its tokens go.
        marks: the tokens that mark a thinking part.
        between: called between two steps of the model.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    eos = _ids_of(model.generation_config.eos_token_id)
    started = time.perf_counter()
    for row in rows:
        row.started = started

    def stop(ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        for row, token in zip(rows, ids[:, -1].tolist(), strict=True):
            if not row.ended:
                row.take(int(token), eos, marks)
        between()
        return torch.tensor([bool(row.ended) for row in rows], device=ids.device)

    with torch.inference_mode():
        model.generate(
            **inputs,
            do_sample=False,  # the processor adds the sampling noise
            max_new_tokens=max(row.settings.most_tokens(marks) for row in rows),
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([_RowScores(rows, marks)]),
        )


class _RowScores:
    """Adds each row's own sampling noise, and ends its thinking part when the budget is used up."""

    def __init__(self, rows: Sequence[RowTokens], marks: ThinkingTokens) -> None:
        self.rows, self.marks = rows, marks
        self.samplers = [
            Sampler(row.settings) if row.settings.temperature else None for row in rows
        ]

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for number, (row, sampler) in enumerate(zip(self.rows, self.samplers, strict=True)):
            if row.ended:
                continue
            if row.is_over_budget and self.marks.end:
                scores[number] = float("-inf")
                scores[number, self.marks.end[0]] = 0.0
            elif sampler is not None:
                scores[number] = sampler(scores[number])
        return scores


def _ids_of(token: int | list[int] | None) -> list[int]:
    if token is None:
        return []
    return token if isinstance(token, list) else [token]
