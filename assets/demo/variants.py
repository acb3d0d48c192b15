"""Merges of the demo models in memory, for comparing many updates of the decoder.

In: a folder with base, math and mllm. Out: replies of the MLLM with an update added. The updates
come from the package's own methods at gain 1; only the controls, which no user would want, are made
here. Writes no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ipmerge_core.evaluation.batched_answers import answer_all
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.loading import load_model
from ipmerge_core.methods import find_method
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.spectral.similarity import (
    corresponding_angles,
    importance,
    nuclear_ratio,
    projected_update,
    similarities,
)
from ipmerge_core.spectral.spectrum import svd, task_vector
from ipmerge_core.tasks.demo import Problem


class Matrices(NamedTuple):
    """One decoder matrix in the three models, in fp32."""

    base: Tensor
    mllm: Tensor
    math: Tensor


@dataclass(frozen=True)
class Variant:
    """A merge: the update of every matrix it touches, at gain 1."""

    label: str
    updates: dict[str, Tensor]

    def only(self, names: set[str], label: str) -> Variant:
        """Return the same merge with nothing but these matrices touched."""
        return Variant(label, {name: self.updates[name] for name in sorted(names)})


class Trio:
    """The three models of a folder, with the MLLM ready to answer."""

    def __init__(self, folder: Path) -> None:
        pair = open_pair(folder / "mllm", folder / "math", folder / "base")
        self.model = load_model(folder / "mllm").model
        self.processor = ModelProcessor(folder / "mllm", takes_images=True).processor
        self.matrices = {
            match.name: Matrices(
                pair.base.read_matrix(match.name),
                pair.mllm.read_matrix(match.mllm),
                pair.math[0].read_matrix(match.math[0]),
            )
            for match in pair.matrices
        }
        self.parameters = {
            name: self.model.get_parameter(name.replace("model.", "model.language_model.", 1))
            for name in self.matrices
        }
        self.math_norm = norm(task_vector(m.math, m.base) for m in self.matrices.values())

    def variant(self, label: str, method: str, **parameters: object) -> Variant:
        """Return the update that a method of the package makes at gain 1, on all matrices."""
        merge = find_method(method)
        return Variant(
            label,
            {name: merge(*m, **parameters) - m.mllm for name, m in self.matrices.items()},
        )

    def swapped(self) -> Variant:
        """Return the control that replaces the MLLM's decoder matrices with the math model's."""
        updates = {name: m.math - m.mllm for name, m in self.matrices.items()}
        return Variant("math LLM swapped in (control)", updates)

    def permuted(self, controlled: Variant, seed: int) -> Variant:
        """Return gamma_norm="max" with gamma permuted over directions, sized as another merge.

        A permuted gamma alone gives updates of other norms, and a smaller change can do less: each
        matrix's update is scaled to the norm that it has in `controlled`.
        """
        shuffle = torch.Generator().manual_seed(seed)
        updates = {}
        for name, like in controlled.updates.items():
            m = self.matrices[name]
            dM = task_vector(m.math, m.base)
            vision, expert = svd(task_vector(m.mllm, m.base)), svd(dM)
            gamma = importance(corresponding_angles(vision, expert), gamma_norm="max")
            gamma = gamma[torch.randperm(len(gamma), generator=shuffle)]
            update = projected_update(dM, vision, gamma, nuclear_ratio(vision, expert))
            updates[name] = sized_as(like, update)
        return Variant(f"control: gamma permuted, draw {seed}", updates)

    def random_direction(self, controlled: Variant, seed: int) -> Variant:
        """Return Gaussian noise, each matrix scaled to the norm of its update in `controlled`."""
        noise = torch.Generator().manual_seed(seed)
        updates = {
            name: sized_as(like, torch.randn(like.shape, generator=noise))
            for name, like in controlled.updates.items()
        }
        return Variant(f"control: random direction, draw {seed}", updates)

    def similarities(self) -> dict[str, dict[str, float]]:
        """Return each matrix's similarities, by kind."""
        found = {}
        for name, m in self.matrices.items():
            vision, expert = svd(task_vector(m.mllm, m.base)), svd(task_vector(m.math, m.base))
            found[name] = similarities(corresponding_angles(vision, expert), vision, expert)
        return found

    def answer(self, variant: Variant, gain: float, problems: list[Problem]) -> list[str]:
        """Answer with the MLLM plus `gain` times the variant's update."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                update = variant.updates.get(name)
                mllm = self.matrices[name].mllm
                parameter.copy_(mllm if update is None else mllm + gain * update)
        return answer_all(self.model, self.processor, problems)

    def relative_norm(self, variant: Variant, gain: float) -> float:
        """Return the size of the update over the size of the math task vector."""
        return gain * norm(variant.updates.values()) / self.math_norm


def sized_as(like: Tensor, update: Tensor) -> Tensor:
    """Return an update scaled to the Frobenius norm of another; zero stays zero."""
    return update * (norm([like]) / (norm([update]) or 1.0))


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Frobenius norm of all given tensors together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
