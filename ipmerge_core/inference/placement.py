"""Where and in which precision transformers puts the weights of a model, and how far it is.

In: a model, a device and a precision. Out: the options of `from_pretrained`. Several GPUs are used
with accelerate's device map if the model does not fit into one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ipmerge_core.inference.memory import choose_precision, free_on, loading_options
from ipmerge_core.inference.precisions import QUANTISED, Precision
from ipmerge_core.models.checkpoint import Checkpoint

_DTYPES: dict[str, Any] = {"stored": "auto", "bf16": torch.bfloat16, "fp16": torch.float16}
_reporting = threading.Lock()  # transformers has one progress bar for the process


class Placement(NamedTuple):
    """How a model is loaded; `device_map` is None for a device that the model is moved to."""

    precision: Precision
    device_map: Any

    def options(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`."""
        found: dict[str, Any] = {"dtype": _DTYPES.get(self.precision, torch.bfloat16)}
        if self.device_map is not None:
            found["device_map"] = self.device_map
        if self.precision in QUANTISED:
            found["quantization_config"] = _quantisation(self.precision)
        return found


def placement(model: Checkpoint, device: str, precision: Precision) -> Placement:
    """Choose how to load a model. Raises: as `choose_precision`."""
    if device == "cuda" and _spreads(model):
        return Placement("stored" if precision == "auto" else precision, "auto")
    chosen = choose_precision(model, device, precision)
    return Placement(chosen, {"": device} if chosen in QUANTISED else None)


def _spreads(model: Checkpoint) -> bool:
    """Whether a model fits into all GPUs together, and into none alone."""
    count = torch.cuda.device_count()
    if count < 2 or loading_options(model, "cuda:0")[0].fits:
        return False
    return sum(free_on(f"cuda:{index}") for index in range(count)) > 1.2 * model.nbytes


def _quantisation(precision: Precision) -> Any:  # noqa: ANN401
    from transformers import BitsAndBytesConfig

    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


@contextmanager
def reported_loading(
    progress: Callable[[float], object], stops: Sequence[threading.Event]
) -> Iterator[None]:
    """Report the share of weights that transformers has loaded; `stops` end it.

    Inside, a set event raises CancelledError.
    """
    from transformers.utils import logging

    def bar(_factory: object, args: tuple[Any, ...], options: dict[str, Any]) -> _Bar:
        return _Bar(progress, stops, *args, **options)

    with _reporting:
        before = logging.set_tqdm_hook(bar)
        try:
            yield
        finally:
            logging.set_tqdm_hook(before)


class _Bar:
    """What transformers uses of a progress bar."""

    def __init__(
        self,
        progress: Callable[[float], object],
        stops: Sequence[threading.Event],
        iterable: Any = None,  # noqa: ANN401
        *_: object,
        total: int | None = None,
        **__: object,
    ) -> None:
        self._progress, self._stops, self._iterable = progress, stops, iterable
        self._total = total or (len(iterable) if hasattr(iterable, "__len__") else 0)
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for each in self._iterable or ():
            yield each
            self.update(1)

    def update(self, count: int = 1) -> None:
        """Report more of the weights. Raises: CancelledError if an event was set."""
        if any(event.is_set() for event in self._stops):
            raise CancelledError
        self._done += count
        if self._total:
            self._progress(min(self._done / self._total, 1.0))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is shown, so that nothing is closed."""

    def close(self) -> None:
        """See `__exit__`."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None  # set_description and others, which show something
