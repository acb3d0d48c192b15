"""Keep the features of images, which models with the same vision tower share.

In: a loaded model and a cache. Out: a context in which its images are encoded once. It works for
families whose features are one tensor per image, in the order of the pixel values; for others
nothing is kept, and nothing changes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 1 << 30


class FeatureCache:
    """An LRU cache of image features of bounded size, by vision tower and pixels."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self.found = self.computed = 0
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def get(self, key: tuple[str, str]) -> Tensor | None:
        """Return kept features."""
        if key in self._kept:
            self._kept.move_to_end(key)
            self.found += 1
        return self._kept.get(key)

    def put(self, key: tuple[str, str], features: Tensor) -> None:
        """Keep features; the least recently used ones are dropped."""
        self.computed += 1
        size = features.nbytes
        if size > self.most_bytes or key in self._kept:
            return
        while self.nbytes + size > self.most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[key] = features.clone()  # not a view of the whole batch
        self.nbytes += size


@contextlib.contextmanager
def kept_features(model: Any, cache: FeatureCache) -> Iterator[None]:  # noqa: ANN401
    """Look up images of a model in the cache inside the block; other models are unchanged."""
    inner = getattr(model, "model", model)
    original = getattr(inner, "get_image_features", None)
    if original is None or "get_image_features" in vars(inner):
        yield
        return
    inner.get_image_features = _Features(original, cache, tower_key(inner))
    try:
        yield
    finally:
        del inner.get_image_features


def tower_key(inner: Any) -> str:  # noqa: ANN401
    """Return a hash of the weights that are not the decoder's, and of their dtypes."""
    decoder = getattr(inner, "language_model", None)
    own = set() if decoder is None else {id(weight) for weight in decoder.parameters()}
    digest = xxh3_128()
    for name, weight in inner.named_parameters():
        if id(weight) not in own:
            import torch

            digest.update(f"{name}{weight.dtype}{tuple(weight.shape)}{weight.device.type}".encode())
            flat = weight.detach().contiguous().flatten().view(torch.uint8)
            digest.update(flat.cpu().numpy().data)
    return digest.hexdigest()


class _Features:
    """Replaces `get_image_features` of one model."""

    def __init__(self, original: Callable[..., Any], cache: FeatureCache, tower: str) -> None:
        self.original, self.cache, self.tower = original, cache, tower
        self.__signature__ = inspect.signature(original)  # which transformers reads
        self.supported = True

    def __call__(self, pixel_values: Tensor, *more: Any, **how: Any) -> Any:  # noqa: ANN401
        """Return the features of images, computing only those that are not kept."""
        import torch

        tensors = any(isinstance(value, torch.Tensor) for value in how.values())
        if not self.supported or more or tensors:  # such as sizes of images
            return self.original(pixel_values, *more, **how)
        settings = repr(sorted((name, str(value)) for name, value in how.items()))
        keys = [
            (self.tower + settings, xxh3_128(row.cpu().numpy().tobytes()).hexdigest())
            for row in pixel_values.float()
        ]
        known = [self.cache.get(key) for key in keys]
        missing = [index for index, features in enumerate(known) if features is None]
        output = None
        if missing or not keys:
            output = self.original(pixel_values=pixel_values[missing], **how)
            features = getattr(output, "pooler_output", None)
            if features is None or len(features) != len(missing):
                self.supported = False
                whole = len(missing) == len(keys)
                return output if whole else self.original(pixel_values=pixel_values, **how)
            for index, each in zip(missing, features, strict=True):
                known[index] = each
                self.cache.put(keys[index], each)
        return self._output(known, output)

    @staticmethod
    def _output(features: list[Any], output: Any) -> Any:  # noqa: ANN401
        import torch
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        stacked = output is not None and isinstance(output.pooler_output, torch.Tensor)
        return BaseModelOutputWithPooling(
            pooler_output=torch.stack(features) if stacked else features
        )
