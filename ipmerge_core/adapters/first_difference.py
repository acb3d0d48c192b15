"""Where two replies begin to differ, and the likely next tokens of each column there.

In: the tokens of two replies. Out: the place of the first difference; and, on request, the
probabilities of the next token of several columns after the tokens that they share.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ipmerge_core.errors import RunCancelled, explained
from ipmerge_core.inference.generation import encode_messages, on_device
from ipmerge_core.inference.streaming import decode_reply, failed_generation

if TYPE_CHECKING:
    from ipmerge_core.adapters.columns import Row
    from ipmerge_core.adapters.live import LiveModel
    from ipmerge_core.inference.loading import LoadedModel


class TokenChoice(NamedTuple):
    """A token that a column may generate next, and its probability."""

    token: int
    text: str
    probability: float


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the index of the first token that differs; None if both replies are equal.

    >>> first_difference([5, 6, 7], [5, 6]), first_difference([5, 6], [5, 6])
    (2, None)
    """
    pairs = enumerate(zip_longest(a, b))
    return next((index for index, (x, y) in pairs if x != y), None)


def shared_text(loaded: LoadedModel, ids: Sequence[int], count: int) -> str:
    """Return the text of the first tokens of a reply, without its thinking part.

    The answers of both replies begin with it, up to a character that is split between tokens.
    """
    found = decode_reply(
        loaded.processor, ids[:count], loaded.processor.thinking, opened=False, ended=False
    )
    return found.answer


def next_choices(
    live: LiveModel,
    rows: Sequence[Row],
    prefix: Sequence[int],
    top: int,
    stops: Sequence[threading.Event] = (),
) -> list[list[TokenChoice]]:
    """Compute the most likely next tokens of each row after `prefix`; see `LiveModel`."""
    encoded = [continued(encode_messages(live.loaded, row.messages, stops), prefix) for row in rows]
    found: list[list[TokenChoice]] = [[] for _ in rows]
    for numbers, inputs in live.groups(rows, encoded):
        scores = _scores(live, [rows[n] for n in numbers], inputs, stops)
        for number, line in zip(numbers, scores, strict=True):
            found[number] = _choices(live.loaded, line, top)
    return found


def continued(inputs: Mapping[str, Any], prefix: Sequence[int]) -> dict[str, Any]:
    """Append the tokens of a reply to an encoded prompt, as generation does one by one."""
    if not prefix:
        return dict(inputs)
    ids: Tensor = inputs["input_ids"]
    more = torch.tensor([list(prefix)], dtype=ids.dtype)
    longer = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape and "pixel" not in name:
            last = value[:, -1:].expand(-1, len(prefix), *value.shape[2:])
            longer[name] = torch.cat([value, more if name == "input_ids" else last], dim=1)
    return longer


def _scores(
    live: LiveModel,
    rows: Sequence[Row],
    inputs: Mapping[str, Any],
    stops: Sequence[threading.Event],
) -> Tensor:
    """Run the model once and return the logits of the next token, (rows, vocabulary), in fp32."""
    model = live.loaded.model
    install, remove = live.installed([row.column for row in rows])
    with live.loaded.turns.taken(stops) as mine:
        if not mine:
            raise RunCancelled("Stopped while another question was being answered.")
        install()
        try:
            failed = partial(failed_generation, live.loaded.folder.name)
            with torch.inference_mode(), explained(failed):
                found = model.generate(
                    **on_device(inputs, model.device),
                    do_sample=False,
                    max_new_tokens=1,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
        finally:
            remove()
    logits: Tensor = found.logits[0]
    return logits.float().cpu()


def _choices(loaded: LoadedModel, scores: Tensor, top: int) -> list[TokenChoice]:
    probabilities = torch.softmax(scores.double(), dim=-1)
    best = probabilities.topk(min(top, len(probabilities)))
    return [
        TokenChoice(token, loaded.processor.decode([token], skip_special_tokens=False), value)
        for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
