"""Generate greedy replies of many prompts in batches; rows that have ended leave the batch.

In: a model of transformers and encoded prompts, each a batch of one. Out: the new token ids of each
prompt. The decoding loop replaces that of `generate` through its `custom_generate` argument, so
that the preparation of inputs and of the cache is that of transformers, for every family. Prompts
whose tensors cannot be joined are answered one at a time. Knows neither chat templates nor text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Inputs: TypeAlias = Mapping[str, Any]  # what a processor returns

_LEAVING = 8  # rows leave once one in this many has ended; each time the cache is copied
_CACHES = ("cache", "past_key_values")  # its name depends on the version of transformers
_PER_TOKEN = ("attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids")
_OF_GENERATE = ("stopping_criteria", "generation_config", "synced_gpus", "streamer")
# The largest difference of scores with and without a batch, relative to the largest score.
_TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


def generate_rows(
    model: Any,  # noqa: ANN401 (transformers models share no type that mypy can see)
    inputs: Inputs,
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the new tokens of each row, without padding; the token that ends a reply is included.

    Args:
        model: a model in evaluation mode, with the ids of its special tokens in its
            generation_config.
        inputs: the inputs of a batch, padded on the left, on its device.
        max_new_tokens: maximum length of a reply; a row of this length may be cut off.
    """
    return _decoded(model, inputs, max_new_tokens).tokens


def join(prompts: Sequence[Inputs], padding: int) -> dict[str, Any] | None:
    """Join encoded prompts to one batch, padded on the left; None if their tensors do not fit.

    Tensors with the shape of the tokens are padded, others are concatenated along their first
    dimension, as are lists.
    """
    import torch

    first = prompts[0]
    if any(prompt.keys() != first.keys() for prompt in prompts):
        return None
    shapes = [prompt["input_ids"].shape for prompt in prompts]
    longest = max(shape[1] for shape in shapes)
    joined: dict[str, Any] = {}
    for name in first:
        values: list[Any] = [prompt[name] for prompt in prompts]
        if all(isinstance(value, list) for value in values):
            joined[name] = [part for value in values for part in value]
        elif not all(isinstance(value, torch.Tensor) for value in values):
            return None
        elif all(value.shape == shape for value, shape in zip(values, shapes, strict=True)):
            fill = padding if name == "input_ids" else 0
            joined[name] = torch.cat([_padded(value, longest, fill) for value in values])
        elif len({value.shape[1:] for value in values}) == 1:
            joined[name] = torch.cat(values)
        else:
            return None
    return joined


def batches_exactly(
    model: Any,  # noqa: ANN401
    prompts: Sequence[Inputs],
    padding: int,
) -> bool:
    """Whether a model scores two steps of these prompts in a batch as it does one at a time.

    Batching changes the rounding, so that the scores are compared with a tolerance that depends on
    the dtype of the weights. A family whose positions or masks ignore the padding differs by more.
    """
    joined = join(prompts, padding)
    if joined is None:
        return False
    together = _decoded(model, joined, 2, scores=True)
    tolerance = _TOLERANCE.get(str(model.dtype).removeprefix("torch."), 0.1)
    for row, prompt in enumerate(prompts):
        alone = _decoded(model, prompt, 2, scores=True)
        for one, other in zip(alone.scores, together.scores, strict=False):
            if row < len(other):  # rows may have left after the first step
                largest = float(one[0].abs().max())
                if float((one[0] - other[row]).abs().max()) > tolerance * largest:
                    return False
            if int(one[0].argmax()) != int(other[min(row, len(other) - 1)].argmax()):
                break  # within the tolerance: the next step has another token
    return True


def _padded(value: Tensor, length: int, fill: int) -> Tensor:
    import torch

    return torch.nn.functional.pad(value, (length - value.shape[1], 0), value=fill)


def _decoded(
    model: Any,  # noqa: ANN401
    inputs: Inputs,
    max_new_tokens: int,
    *,
    scores: bool = False,
) -> _Rows:
    import torch

    rows = _Rows(model, max_new_tokens, keeps_scores=scores)
    with torch.inference_mode():
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            custom_generate=rows.decode,
        )
    return rows


class _Rows:
    """The rows of one batch: the tokens of all, and which are still generated."""

    def __init__(self, model: Any, most: int, *, keeps_scores: bool) -> None:  # noqa: ANN401
        eos = model.generation_config.eos_token_id
        self.ends = [eos] if isinstance(eos, int) else list(eos or [])
        self.most, self.keeps_scores = most, keeps_scores
        self.tokens: list[list[int]] = []
        self.scores: list[Tensor] = []

    def decode(
        self,
        model: Any,  # noqa: ANN401
        input_ids: Tensor,
        *,
        logits_processor: Any = None,  # noqa: ANN401 (greedy decoding has none)
        **state: Any,  # noqa: ANN401
    ) -> Tensor:
        """Generate until every row has ended; called by `generate` with the prepared inputs."""
        import torch

        state = {name: value for name, value in state.items() if name not in _OF_GENERATE}
        self.tokens = [[] for _ in range(len(input_ids))]
        living = torch.arange(len(input_ids))  # the rows that are still in the batch
        ends = torch.tensor(self.ends)
        prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **state)
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(self.most):
            outputs = model(**prepared, return_dict=True)
            state = model._update_model_kwargs_for_generation(outputs, state)
            scores = outputs.logits[:, -1]
            del outputs  # of a long prompt they are large
            chosen = scores.argmax(-1)
            if self.keeps_scores:
                self.scores.append(scores.float().cpu())
            ended |= self._append(living, ended, chosen.cpu(), ends)
            if bool(ended.all()):
                break
            input_ids = torch.cat([input_ids, chosen[:, None].to(input_ids.device)], dim=1)
            if int(ended.sum()) * _LEAVING >= len(ended) and self._shrinks(state):
                keep = (~ended).nonzero()[:, 0]
                living, ended = living[keep], ended[keep]
                input_ids, state = _kept(model, input_ids, state, keep.to(input_ids.device))
            prepared = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1, **state
            )
        return input_ids

    def _shrinks(self, state: Mapping[str, Any]) -> bool:
        """Whether rows can leave: not from caches of linear attention, which keep one state."""
        cache = next((state[name] for name in _CACHES if state.get(name) is not None), None)
        layers = getattr(cache, "layers", None)
        selectable = layers and all(hasattr(layer, "batch_select_indices") for layer in layers)
        return bool(selectable) and not self.keeps_scores

    def _append(self, living: Tensor, ended: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
        """Append tokens to the rows that have not ended; return which end with them."""
        import torch

        for row, token, done in zip(living.tolist(), chosen.tolist(), ended.tolist(), strict=True):
            if not done:
                self.tokens[row].append(token)
        return torch.isin(chosen, ends)


def _kept(
    model: Any,  # noqa: ANN401
    input_ids: Tensor,
    state: Mapping[str, Any],
    keep: Tensor,
) -> tuple[Tensor, dict[str, Any]]:
    """Select rows of everything that the next step uses; pixels have been used."""
    import torch

    found: dict[str, Any] = {}
    for name, value in state.items():
        if name in _CACHES:
            value.batch_select_indices(keep)
            found[name] = value
        elif name in _PER_TOKEN:
            rows_last = value is not None and value.dim() == 3  # positions in several dimensions
            found[name] = value if value is None else value[:, keep] if rows_last else value[keep]
        elif not isinstance(value, torch.Tensor):
            found[name] = value
    for module in (model, getattr(model, "model", model)):
        deltas = getattr(module, "rope_deltas", None)  # of positions in several dimensions
        if isinstance(deltas, torch.Tensor) and len(deltas) == len(input_ids):
            module.rope_deltas = deltas[keep]
    return input_ids[keep], found
