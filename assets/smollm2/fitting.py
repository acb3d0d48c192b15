"""Minimise a loss with AdamW, in steps that a stopped run continues.

In: named parameters and the loss of a step by its number. Out: the trained parameters, and a
safetensors file with them and the optimizer's moments while training is not finished. The data of
a step depend on its number only, so that a continued run takes the same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

EVERY = 20  # steps between checkpoints
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WARMUP = 0.05  # share of the steps

Loss = Callable[[int], Tensor]


class Schedule(NamedTuple):
    """The number of steps and the peak of the learning rate: 5 % warm-up, then a cosine to zero."""

    steps: int
    learning_rate: float

    def at(self, step: int) -> float:
        """Return the learning rate of a step.

        >>> Schedule(100, 1.0).at(0), round(Schedule(100, 1.0).at(50), 3)
        (0.2, 0.5)
        """
        warm = min(1.0, (step + 1) / max(1.0, _WARMUP * self.steps))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def fit(
    label: str,
    parameters: Mapping[str, nn.Parameter],
    loss_of_step: Loss,
    schedule: Schedule,
    checkpoint: Path,
) -> None:
    """Train to the last step, from the checkpoint if there is one; prints the loss.

    Gradients are clipped at norm 1. The checkpoint stays; the caller deletes it with its results.
    """
    trained = list(parameters.values())
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    first = _restore(parameters, optimizer, checkpoint)
    started, recent = time.monotonic(), []
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done = step + 1
        if done % EVERY == 0 or done == schedule.steps:
            _store(parameters, optimizer, done, checkpoint)
            left = (time.monotonic() - started) / (done - first) * (schedule.steps - done)
            mean = sum(recent) / len(recent)
            print(
                f"{label} {done}/{schedule.steps}  loss {mean:.4f}  {left:.0f} s left", flush=True
            )
            recent.clear()


def _store(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int, path: Path
) -> None:
    """Write the parameters and moments after a step; the previous file stays until it is whole."""
    tensors = {name: parameter.detach().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if state := optimizer.state.get(parameter):  # none without a gradient
            tensors |= {f"{moment}:{name}": state[moment] for moment in _MOMENTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"step": str(step)})
    unfinished.replace(path)


def _restore(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, path: Path
) -> int:
    """Load a checkpoint; returns the number of steps that it has behind it, 0 without one."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file, torch.no_grad():
        step, names = int(file.metadata()["step"]), set(file.keys())
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))
            if f"{_MOMENTS[0]}:{name}" in names:
                moments = {
                    moment: file.get_tensor(f"{moment}:{name}").to(parameter.device)
                    for moment in _MOMENTS
                }
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step
