"""Apply a rule to the gradients of a model, parameter by parameter, and measure the alignment.

In: a loaded model, its `ReasoningPrior`, the stored names of its tensors. Out: changed gradients.
By default the rule acts once per optimizer step on the accumulated gradient, averaged over the
processes; with `per_micro_batch` on the gradient of each backward pass, before accumulation and
averaging, as the authors' tensor hooks do. The adaptive rule is not linear, so both differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipmerge_core.errors import PairingError
from ipmerge_core.finetuning.matching import PriorEntry
from ipmerge_core.finetuning.prior import ReasoningPrior
from ipmerge_core.finetuning.rules import Rule, coefficient, measure, tilt_
from ipmerge_core.models.addresses import split_address

_MOST_COSINES = 4096  # that are kept before they are summed


class Guided(NamedTuple):
    """An entry of the prior in memory: `rows` is the part of a fused parameter, None for all."""

    number: int
    entry: PriorEntry
    name: str
    parameter: nn.Parameter
    rows: range | None
    strength: float

    def part(self, values: Tensor) -> Tensor:
        """Return the entry's part of a tensor with the shape of the parameter, as a view."""
        return values if self.rows is None else values[self.rows.start : self.rows.stop]


def find_guided(
    model: nn.Module,
    prior: ReasoningPrior,
    names: Mapping[str, str],
    strength_of: Callable[[str], float],
) -> list[Guided]:
    """Find the parameter of every entry, and check that all are there.

    Args:
        model: the loaded MLLM.
        prior: its prior.
        names: the parameter of each stored tensor, see `inference.module_names`.
        strength_of: the strength of an entry by its name in the common layout.

    Raises: PairingError for a parameter of another shape, such as the stack of a mixture.
    """
    found = []
    for number, entry in enumerate(prior.match.entries):
        address = split_address(entry.mllm)
        name = names.get(address.name, address.name)
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            parameter = None
        guided = parameter is not None and Guided(
            number, entry, name, parameter, address.rows, strength_of(entry.name)
        )
        if not guided or tuple(guided.part(guided.parameter).shape) != entry.shape:
            has = f"the shape {tuple(parameter.shape)}" if parameter is not None else "no parameter"
            raise PairingError(
                f"'{entry.mllm}' {entry.shape} of '{prior.match.mllm.id}' has {has} in memory "
                f"under '{name}'. DRIFT supports decoders whose matrices are separate or fused by "
                f"rows; of a mixture of experts, select other modules."
            )
        found.append(guided)
    assert len(found) == len(prior.match.entries), "every entry has a parameter"
    return found


class GradientGuide:
    """Tilts the gradients of the guided parameters.

    Args:
        guided: the entries in memory.
        prior: their priors.
        rule: the rule, or None to only measure the alignment (plain fine-tuning).
        loss_scale: returns the factor of the loss in fp16 training.
    """

    def __init__(
        self,
        guided: list[Guided],
        prior: ReasoningPrior,
        rule: Rule | None,
        loss_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.guided, self.prior, self.rule, self.loss_scale = guided, prior, rule, loss_scale
        self._cosines: list[Tensor] = []  # since the last sum
        self._sums: list[Tensor] = []
        self._count = 0
        self._norms: list[Tensor] = []
        self._handles: list[Any] = []

    def act_on_each_backward(self) -> None:
        """Act on the gradient of every backward pass from now on, until `release`."""
        by_parameter: dict[nn.Parameter, list[Guided]] = {}
        for guided in self.guided:
            by_parameter.setdefault(guided.parameter, []).append(guided)

        def hook_of(parts: list[Guided]) -> Callable[[Tensor], Tensor]:
            def hook(gradient: Tensor) -> Tensor:
                changed = gradient.clone()
                for guided in parts:
                    self._act(guided, changed)
                return changed

            return hook

        for parameter, parts in by_parameter.items():
            handle = parameter.register_hook(hook_of(parts))  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    def release(self) -> None:
        """Remove the hooks of `act_on_each_backward`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def act(self) -> None:
        """Act on the accumulated gradient of every guided parameter, once per optimizer step."""
        for guided in self.guided:
            if guided.parameter.grad is not None:
                self._act(guided, guided.parameter.grad)

    def take_cosine(self) -> float:
        """Return the mean of cos(g, D) over parameters and gradients since the last call.

        NaN if nothing was measured. Only this waits for the device.
        """
        self._sum_cosines()
        sums, count = self._sums, self._count
        self._sums, self._count = [], 0
        return float(torch.stack(sums).sum()) / count if count else math.nan

    def _sum_cosines(self) -> None:
        """Replace the cosines by their sum, so that few are kept however rarely they are logged."""
        if self._cosines:
            self._count += len(self._cosines)
            self._sums = [torch.stack([*self._sums, *self._cosines]).sum()]
            self._cosines = []

    @torch.no_grad()
    def _act(self, guided: Guided, whole: Tensor) -> None:
        gradient = guided.part(whole)
        prior = self.prior.get(guided.number)
        found = measure(gradient, prior, self._norm(guided.number, gradient.device))
        self._cosines.append(found.cosine)
        if len(self._cosines) >= _MOST_COSINES:
            self._sum_cosines()
        if self.rule is not None and guided.strength != 0:
            scale = self.loss_scale() if self.rule == "absolute" else 1.0
            tilt_(gradient, prior, coefficient(self.rule, found, guided.strength, scale=scale))

    def _norm(self, number: int, device: torch.device) -> Tensor:
        """Return ||D|| on the device of the gradient, copied there once."""
        if not self._norms or self._norms[0].device != device:
            self._norms = [torch.tensor(norm, device=device) for norm in self.prior.norms]
        return self._norms[number]


class Distances(NamedTuple):
    """How far training has moved the guided parameters.

    `to_start` is ||W - W_start||, `to_expert` is ||W - W_expert||, both relative to ||W_start||;
    `moved_cosine` is the cosine of W - W_start and D.
    """

    to_start: float
    to_expert: float
    moved_cosine: float


@torch.no_grad()
def measure_distances(guided: list[Guided], prior: ReasoningPrior) -> Distances:
    """Measure the current weights against those of the MLLM's and the expert's files.

    The files are read again, so that no copy of the start is kept in memory.
    """
    start2 = moved2 = apart2 = inner = prior2 = 0.0
    for number, values, start, expert in _pairs(guided, prior):
        moved, direction = values - start, prior.get(number).to("cpu", torch.float32)
        start2 += float(start.square().sum(dtype=torch.float64))
        moved2 += float(moved.square().sum(dtype=torch.float64))
        apart2 += float((values - expert).square().sum(dtype=torch.float64))
        inner += float((moved * direction).sum(dtype=torch.float64))
        prior2 += float(direction.square().sum(dtype=torch.float64))
    size = math.sqrt(start2) or 1.0
    product = math.sqrt(moved2) * math.sqrt(prior2)
    cosine = inner / product if product else 0.0
    return Distances(math.sqrt(moved2) / size, math.sqrt(apart2) / size, cosine)


def _pairs(
    guided: list[Guided], prior: ReasoningPrior
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield each entry's current weights, start and expert, in fp32 on the CPU."""
    match = prior.match
    for each in guided:
        values = each.part(each.parameter).detach().to("cpu", torch.float32)
        start = match.mllm.read(each.entry.mllm).float()
        expert = match.expert.read(each.entry.expert).float()
        yield each.number, values, start, expert
