"""Minimise a loss with AdamW; a run with a checkpoint continues where it was stopped.

In: parameters and the loss of a step by its number. Out: the trained parameters, and, if asked, a
safetensors file with them and the optimizer's moments. The data of a step must depend on its number
only, so that a continued run takes the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
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
        warm = min(1.0, (step + 1) / (_WARMUP * self.steps))
        return self.learning_rate * (warm * 0.5 * (1 + float(np.cos(np.pi * step / self.steps))))


def fit(
    label: str,
    parameters: Sequence[nn.Parameter],
    loss_of_step: Loss,
    schedule: Schedule,
    checkpoint: Path | None = None,
) -> None:
    """Train to the last step, from the checkpoint if there is one; prints the loss.

    Gradients are clipped at norm 1. The checkpoint stays; the caller deletes it with its results.
    """
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    first = _restore(parameters, optimizer, checkpoint) if checkpoint else 0
    every = EVERY if checkpoint else max(1, schedule.steps // 10)
    started, recent = time.monotonic(), []
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done = step + 1
        if done % every == 0 or done == schedule.steps:
            if checkpoint:
                _store(parameters, optimizer, done, checkpoint)
            left = (time.monotonic() - started) / (done - first) * (schedule.steps - done)
            line = f"{label} {done}/{schedule.steps}  loss {np.mean(recent):.4f}  {left:.0f} s left"
            print(line, flush=True)
            recent.clear()


def _store(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, step: int, path: Path
) -> None:
    """Write the parameters and moments after a step; the previous file stays until it is whole."""
    tensors = {f"{n}": parameter.detach().contiguous() for n, parameter in enumerate(parameters)}
    for n, parameter in enumerate(parameters):
        if state := optimizer.state.get(parameter):  # none without a gradient
            tensors |= {name: state[moment] for moment, name in _moments(n)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"step": str(step)})
    unfinished.replace(path)


def _restore(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, path: Path
) -> int:
    """Load a checkpoint; returns the number of steps that it has behind it, 0 without one."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file, torch.no_grad():
        step, known = int(file.metadata()["step"]), set(file.keys())
        for n, parameter in enumerate(parameters):
            parameter.copy_(file.get_tensor(f"{n}"))
            names = dict(_moments(n))
            if known.issuperset(names.values()):
                found = {
                    moment: file.get_tensor(name).to(parameter.device)
                    for moment, name in names.items()
                }
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **found}
    return step


def _moments(number: int) -> Iterator[tuple[str, str]]:
    """Yield the optimizer's moments of a parameter, with their names in the file."""
    return ((moment, f"{moment}:{number}") for moment in _MOMENTS)
