"""Estimate the memory of a run from headers, before anything is loaded.

In: the matched models and the settings. Out: bytes of weights, gradients, optimizer and prior, and
what is free on the device. Activations depend on the images and are not included.
"""

from __future__ import annotations

from typing import NamedTuple

import psutil
import torch

from ipmerge_core.errors import RunError
from ipmerge_core.finetuning.matching import PriorMatch
from ipmerge_core.finetuning.settings import DriftSettings
from ipmerge_core.finetuning.trainer import resolve_precision
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint
from ipmerge_core.runtime.devices import free_memory


class MemoryEstimate(NamedTuple):
    """Memory in bytes, without activations; `nbytes_prior` is part of `nbytes_host` or device."""

    n_trained: int
    n_frozen: int
    nbytes_weights: int
    nbytes_gradients: int
    nbytes_optimizer: int
    nbytes_prior: int
    nbytes_device: int  # needed on the device
    nbytes_device_free: int
    nbytes_host: int  # needed in CPU memory in addition, 0 if the device is the CPU
    nbytes_host_free: int
    precision: str

    def describe(self) -> str:
        """Describe the estimate in two sentences."""
        host = f" and {self.nbytes_host / 1e9:.2f} GB of CPU memory" if self.nbytes_host else ""
        return (
            f"Trains {self.n_trained:,} parameters in {self.precision}, {self.n_frozen:,} are "
            f"frozen. Needs {self.nbytes_device / 1e9:.2f} GB on the device (weights "
            f"{self.nbytes_weights / 1e9:.2f}, gradients {self.nbytes_gradients / 1e9:.2f}, Adam "
            f"{self.nbytes_optimizer / 1e9:.2f}, prior {self.nbytes_prior / 1e9:.2f}){host}, "
            f"without activations; {self.nbytes_device_free / 1e9:.2f} GB are free."
        )

    def refuse_too_large(self) -> None:
        """Raise RunError if the run does not fit into the free memory."""
        if self.nbytes_device > self.nbytes_device_free or self.nbytes_host > self.nbytes_host_free:
            raise RunError(
                f"{self.describe()} Use a larger device, --precision bf16, or --prior-on files; "
                f"--force starts it anyway."
            )


def estimate_memory(match: PriorMatch, settings: DriftSettings, device: str) -> MemoryEstimate:
    """Estimate the memory of a run on a torch device."""
    how = settings.training
    precision = resolve_precision(how.precision, device)
    n_all = match.mllm.numel
    n_trained = n_all if how.trained == "all" else match.language_numel
    width = 2 if precision == "bf16" else 4
    weights, gradients, optimizer = width * n_all, width * n_trained, 2 * width * n_trained
    prior = sum(
        entry.numel * _width(match.mllm, entry.mllm)
        for entry in match.entries
        if settings.prior.placement != "files"
    )
    on_cpu = device.partition(":")[0] == "cpu"
    apart = settings.prior.placement == "cpu" and not on_cpu
    free_host = psutil.virtual_memory().available
    free = free_memory(device) if torch.device(device).type == "cuda" else free_host
    return MemoryEstimate(
        n_trained,
        n_all - n_trained,
        weights,
        gradients,
        optimizer,
        prior,
        weights + gradients + optimizer + (0 if apart else prior),
        free,
        prior if apart else 0,
        free_host,
        precision,
    )


def _width(model: Checkpoint, address: str) -> int:
    return DTYPES[model.spec(address).dtype].itemsize
