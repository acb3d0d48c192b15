"""Answer the items of a task with one model, in batches, and describe what was not answered.

In: a `LoadedModel` and items. Out: a stream of `Answers`: replies, and the reasons for items that
have none (a picture that cannot be opened, a prompt that is too long). Encoded prompts and image
features are kept for the next model with the same processor or vision tower. Knows no store and no
scores.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import ModelLoadError, RunCancelled, RunError, explained, first_line
from ipmerge_core.evaluation.replies import Reply
from ipmerge_core.inference.batched_generation import batches_exactly, generate_rows, join
from ipmerge_core.inference.generation import _refuse_unknown_tokens, on_device
from ipmerge_core.inference.image_features import FeatureCache, kept_features
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.processor_rows import decode_rows, encode_rows
from ipmerge_core.inference.prompts import Message

if TYPE_CHECKING:
    from PIL.Image import Image

    from ipmerge_core.inference.loading import LoadedModel
    from ipmerge_core.tasks.items import Item, Picture

_WINDOW = 4  # batches whose prompts are encoded together and sorted by length
_PER_REQUEST = 32  # prompts, for the limits of the processor's process
_MOST_PROMPT_BYTES = 1 << 29


class Answers(NamedTuple):
    """What one batch gave: replies, and by item key the reasons for items without one."""

    replies: list[Reply]
    faults: dict[str, str]


class PromptCache:
    """An LRU cache of encoded prompts of bounded size, by processor and item."""

    def __init__(self, most_bytes: int = _MOST_PROMPT_BYTES) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._kept: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()

    def get(self, key: tuple[str, str]) -> dict[str, Any] | None:
        """Return a kept prompt."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: tuple[str, str], prompt: dict[str, Any]) -> None:
        """Keep a prompt; the least recently used ones are dropped."""
        size = _nbytes(prompt)
        if size > self.most_bytes or key in self._kept:
            return
        while self.nbytes + size > self.most_bytes:
            self.nbytes -= _nbytes(self._kept.popitem(last=False)[1])
        self._kept[key] = prompt
        self.nbytes += size


@dataclass
class Caches:
    """What several models share: encoded prompts, image features, and how they are answered.

    Pass one object to the evaluations of a sweep. `ways` describes by model how its prompts are
    answered: in batches, or one at a time because batching would change its scores.
    """

    features: FeatureCache = field(default_factory=FeatureCache)
    prompts: PromptCache = field(default_factory=PromptCache)
    ways: dict[str, str] = field(default_factory=dict)


BATCHED = "in batches"
SINGLE = "one at a time"


class Answerer:
    """One model with what it needs to answer items.

    Args:
        loaded: the model.
        max_new_tokens: maximum length of a reply.
        batch_size: prompts per batch; halved when memory is exhausted.
        caches: shared between models.
        stops: events that cancel.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        max_new_tokens: int,
        batch_size: int,
        caches: Caches,
        stops: Sequence[threading.Event] = (),
    ) -> None:
        from ipmerge_core.evaluation.subjects import processor_key

        self.loaded, self.max_new_tokens, self.batch_size = loaded, max_new_tokens, batch_size
        self.caches, self.stops = caches, stops
        self._processor = processor_key(loaded.folder)

    def answer(self, items: Mapping[str, Item]) -> Iterator[Answers]:
        """Answer items by key, longest prompts of a window first; replies come in any order.

        Raises:
            ModelLoadError: the model fails, or is a text model and an item has pictures.
            RunCancelled: one of the events was set.
        """
        self._refuse_pictures(items.values())
        size, pairs = self.batch_size * _WINDOW, list(items.items())
        windows = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        kept = kept_features(self.loaded.model, self.caches.features)
        with ThreadPoolExecutor(1) as threads, kept:
            ahead = threads.submit(self._encode, windows[0]) if windows else None
            for number in range(len(windows)):
                assert ahead is not None
                prompts, faults = ahead.result()
                if number + 1 < len(windows):
                    ahead = threads.submit(self._encode, windows[number + 1])
                if faults:
                    yield Answers([], faults)
                yield from self._answer_window(prompts)

    def _refuse_pictures(self, items: Iterable[Item]) -> None:
        if not self.loaded.takes_images and any(item.pictures for item in items):
            raise ModelLoadError(
                f"'{self.loaded.folder.name}' is a text model, and the task has pictures. Evaluate "
                f"a vision-language model."
            )

    def _answer_window(self, prompts: dict[str, dict[str, Any]]) -> Iterator[Answers]:
        keys = sorted(prompts, key=lambda key: (-prompts[key]["input_ids"].shape[1], key))
        start = 0
        while start < len(keys):
            self._check()
            chosen = keys[start : start + self._size_for(keys, prompts)]
            replies = self._generate(chosen, [prompts[key] for key in chosen])
            if replies is None:
                self.batch_size = max(1, self.batch_size // 2)
                continue
            yield Answers(replies, {})
            start += len(chosen)

    def _size_for(self, keys: Sequence[str], prompts: dict[str, dict[str, Any]]) -> int:
        """Return the size of batches of this model: one, if batching would change its scores."""
        if self.batch_size == 1 or len(keys) == 1:
            return 1
        kind = type(self.loaded.model).__name__
        if kind not in self.caches.ways:
            probes = [prompts[keys[0]], prompts[keys[-1]]]
            model = self.loaded.model
            with explained(self._failed):
                placed = [on_device(probe, model.device) for probe in probes]
                exact = batches_exactly(model, placed, self._padding)
            self.caches.ways[kind] = BATCHED if exact else SINGLE
        return self.batch_size if self.caches.ways[kind] == BATCHED else 1

    @property
    def way(self) -> str:
        """How prompts are answered."""
        known = self.caches.ways.get(type(self.loaded.model).__name__, BATCHED)
        return SINGLE if self.batch_size == 1 else known

    @property
    def _padding(self) -> int:
        return int(self.loaded.model.generation_config.pad_token_id or 0)

    def _generate(
        self, keys: Sequence[str], prompts: Sequence[dict[str, Any]]
    ) -> list[Reply] | None:
        """Answer one batch; None if it does not fit into memory and a smaller one may."""
        import torch

        started = time.perf_counter()
        model = self.loaded.model
        batch = join(prompts, self._padding)
        with explained(self._failed):
            try:
                if batch is None:  # tensors of other shapes, such as numbers of tiles
                    rows = [
                        generate_rows(model, on_device(prompt, model.device), self.max_new_tokens)[
                            0
                        ]
                        for prompt in prompts
                    ]
                else:
                    batch = on_device(batch, model.device)
                    rows = generate_rows(model, batch, self.max_new_tokens)
            except torch.OutOfMemoryError:
                if len(keys) == 1:
                    raise
                return None
        seconds = (time.perf_counter() - started) / len(keys)
        texts = decode_rows(self.loaded.processor, rows, self.stops)
        ends = model.generation_config.eos_token_id or []
        return [
            Reply(key, text.strip(), len(ids), _is_cut(ids, ends, self.max_new_tokens), seconds)
            for key, text, ids in zip(keys, texts, rows, strict=True)
        ]

    def _encode(
        self, items: Sequence[tuple[str, Item]]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Encode items by key, and describe those that cannot be encoded."""
        prompts: dict[str, dict[str, Any]] = {}
        faults: dict[str, str] = {}
        new: list[tuple[str, list[Message]]] = []
        for key, item in items:
            if kept := self.caches.prompts.get((self._processor, key)):
                prompts[key] = kept
                continue
            try:
                new.append((key, [_message(item)]))
            except RunError as error:
                faults[key] = str(error)
        for start in range(0, len(new), _PER_REQUEST):
            self._check()
            part = new[start : start + _PER_REQUEST]
            found = encode_rows(self.loaded.processor, [each for _, each in part], self.stops)
            for (key, _), prompt in zip(part, found, strict=True):
                try:
                    if isinstance(prompt, ModelLoadError):
                        raise prompt
                    _refuse_unknown_tokens(self.loaded, prompt["input_ids"])
                except ModelLoadError as error:
                    faults[key] = str(error)
                    continue
                prompts[key] = prompt
                self.caches.prompts.put((self._processor, key), prompt)
        return prompts, faults

    def _check(self) -> None:
        if any(event.is_set() for event in self.stops):
            raise RunCancelled("The evaluation was cancelled; the replies so far are kept.")

    def _failed(self, error: Exception) -> ModelLoadError:
        return ModelLoadError(
            f"'{self.loaded.folder.name}' failed while generating ({first_line(error)}). A smaller "
            f"--batch-size may help."
        )


def _message(item: Item) -> Message:
    """Return the message of an item. Raises: RunError if a picture cannot be opened."""
    if not item.question.strip():
        raise RunError("The question is empty.")
    return Message("user", item.question.strip(), tuple(map(_opened, item.pictures)))


def _opened(picture: Picture) -> Image:
    from PIL import Image

    source = picture.source()
    return source if isinstance(source, Image.Image) else open_image(source)


def _is_cut(ids: Sequence[int], ends: int | Sequence[int], most: int) -> bool:
    ends = [ends] if isinstance(ends, int) else ends
    return len(ids) >= most and ids[-1] not in ends


def _nbytes(prompt: dict[str, Any]) -> int:
    return sum(getattr(value, "nbytes", 64) for value in prompt.values())
