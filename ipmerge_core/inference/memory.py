"""How much memory a model takes when it is loaded, and in which precision it fits.

In: the headers of a model, a device and a requested precision. Out: the bytes of each precision,
the free memory, and the precision to load, or an error that names the sizes. Reads no weights.
"""

from __future__ import annotations

import gc
import importlib.util
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from ipmerge_core.errors import ModelLoadError, PlanError
from ipmerge_core.inference.precisions import PRECISIONS, QUANTISED, Precision
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint
from ipmerge_core.runtime.devices import free_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

_BYTES = {"bf16": 2.0, "fp16": 2.0, "8bit": 1.0, "4bit": 0.5625}  # NF4: 4 bits and its scales
_ROOM = 1.15  # of the weights: activations and the cache of a chat
_SMALL = 1 << 30  # bytes that are always there for them


class Fit(NamedTuple):
    """One way to load a model. `reason` is why it is not available here, "" if it is."""

    precision: Precision
    nbytes: int
    free: int
    reason: str

    @property
    def fits(self) -> bool:
        """Whether it is available, and leaves room for a conversation."""
        return not self.reason and _needed(self.nbytes) <= self.free


def loading_options(model: Checkpoint, device: str) -> list[Fit]:
    """List the ways to load a model on a device, the most exact first.

    Quantised are the matrices of linear layers; embeddings, norms and the head keep 16 bit, so that
    the size in 8 and 4 bit is a lower bound.
    """
    free = free_on(device)
    stored = Fit("stored", model.nbytes, free, _without_bf16(model, device))
    halves: tuple[Precision, ...] = ("bf16", "fp16")
    found = [stored]
    for name in halves:
        reason = "" if name == "fp16" or has_bf16(device) else f"{device} has no bf16"
        found.append(Fit(name, _size(model, name), free, reason))
    for name in QUANTISED:
        reason = why_not_quantised(device)
        found.append(Fit(name, _size(model, name), free, reason))
    return found


def choose_precision(model: Checkpoint, device: str, precision: Precision = "auto") -> Precision:
    """Return the precision to load: the given one, or the most exact that fits.

    "auto" never changes the values where the stored ones fit. It uses fp16 for bf16 weights on a
    device without bf16, which can overflow; the models of `docs/families.md` do not.

    Raises:
        PlanError: an unknown precision.
        ModelLoadError: it is not available on the device, or does not fit, or none fits.
    """
    if precision not in PRECISIONS:
        raise PlanError(f"The precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    options = loading_options(model, device)
    if precision == "auto":
        found = next((each for each in options if each.fits), None)
        if found is not None:
            return found.precision
        raise ModelLoadError(_too_large(model, device, options))
    (asked,) = (each for each in options if each.precision == precision)
    if asked.reason:
        raise ModelLoadError(f"'{model.id}' cannot be loaded as {precision}: {asked.reason}.")
    if not asked.fits:
        raise ModelLoadError(_too_large(model, device, options))
    return precision


def why_not_quantised(device: str) -> str:
    """Explain why 8 and 4 bit are not available on a device; "" if they are."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "it requires the library bitsandbytes, which is not installed"
    if torch.device(device).type != "cuda":
        return f"it requires a CUDA GPU, and the device is {device}"
    return ""


def has_bf16(device: str) -> bool:
    """Return whether a device computes in bf16."""
    return torch.device(device).type != "cuda" or torch.cuda.is_bf16_supported()


def free_on(device: str) -> int:
    """Return the free bytes of a device; of the machine for a device that shares its memory."""
    if torch.device(device).type == "cuda":
        return free_memory(device)
    return int(psutil.virtual_memory().available)


def release_memory() -> None:
    """Give the memory of models that nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _without_bf16(model: Checkpoint, device: str) -> str:
    uses = any(spec.dtype == "BF16" for spec in model.tensors.values())
    return f"{device} has no bf16" if uses and not has_bf16(device) else ""


def _size(model: Checkpoint, precision: str) -> int:
    """Return the bytes of a model's weights in a precision; never more than as stored."""
    total = 0.0
    for spec in model.tensors.values():
        own = DTYPES[spec.dtype].itemsize
        linear = len(spec.shape) > 1 and spec.name.endswith("weight") and "embed" not in spec.name
        wanted = _BYTES[precision] if linear else _BYTES["bf16"]
        total += spec.numel * min(own, wanted)
    return int(total)


def _needed(nbytes: int) -> int:
    return int(nbytes * _ROOM) if nbytes > _SMALL else nbytes


def _too_large(model: Checkpoint, device: str, options: Sequence[Fit]) -> str:
    sizes = ", ".join(f"{each.nbytes / 1e9:.1f} GB as {each.precision}" for each in options)
    free = options[0].free / 1e9
    others = [each for each in options if each.fits]
    if others:
        remedy = f"Load it as {others[0].precision}."
    elif any(each.reason for each in options if each.precision in QUANTISED):
        reason = next(each.reason for each in options if each.precision in QUANTISED)
        remedy = f"8 and 4 bit are not available: {reason}. Use a smaller model or another device."
    else:
        remedy = "Use a smaller model or another device."
    return f"'{model.id}' needs {sizes}, and {free:.1f} GB are free on {device}. {remedy}"
