"""Models as files hold them, and how far a merge of them is from its definition.

A case is a base and two or three tuned matrices in a stored dtype, with singular values that stand
clear of the rounding of that dtype: what exists is then no matter of opinion. `measure` merges them
as a merge does, in fp32, and compares with `method_definitions` in fp64 on the same stored numbers.
Used by `test_numerics.py`, `test_gpu.py` and `benchmarks/bench_numerics.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from method_definitions import CHOOSERS, Noise, coefficients, defined
from torch import Tensor

from ipmerge_core.methods import METHODS

NAME = "model.layers.7.mlp.up_proj.weight"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = ("full", "low", "mixed")  # mixed: the MLLM's change is full, the experts' are low
RELATIONS = ("random", "aligned")
SQUARE, TALL, WIDE = (256, 256), (688, 256), (256, 688)
SHAPES = [(64, 64), SQUARE, TALL, WIDE, (64, 512), (512, 64), (512, 512), (1024, 128), (128, 1024)]
LARGE = [(1024, 1024), (1024, 640), (640, 1024)]
TOLERANCE = 1e-4  # relative error of the change, beyond the rounding of the result
MOST_FLIPPED = 2e-3  # share of elements; exact ties of stored numbers go by the last bit of fp32
LOOSER = {"wudi": 1e-3}  # 300 steps of Adam, which divides by gradients near zero
FEW = ("wudi",)  # takes seconds a case: fewer and smaller ones in the suite
_DEVIATION = 0.02  # of the base's weights
_STRONGEST = 40.0  # singular values of a change, in units of bf16's rounding noise
_WEAKEST = {False: 6.0, True: 12.0}  # of a full change, of a low one
_COMMON = 0.75  # cosine of directions that aligned models share, on either side
_LOW = 16  # a change is low with this rank, or a sixteenth of the full one


@dataclass(frozen=True)
class Case:
    """One combination of what the grid varies."""

    dtype: str = "bf16"
    experts: int = 1
    shape: tuple[int, int] = SQUARE
    rank: str = "full"
    relation: str = "random"
    seed: int = 0

    def __str__(self) -> str:
        m, n = self.shape
        return f"{self.dtype}-T{1 + self.experts}-{m}x{n}-{self.rank}-{self.relation}-{self.seed}"


class Stored(NamedTuple):
    """Matrices in their stored dtype, and the singular value above which a direction exists."""

    base: Tensor
    mllm: Tensor
    experts: list[Tensor]
    noise: float

    def to(self, device: str) -> Stored:
        """The same matrices on a device."""
        experts = [expert.to(device) for expert in self.experts]
        return self._replace(base=self.base.to(device), mllm=self.mllm.to(device), experts=experts)


class Finding(NamedTuple):
    """How far a merge is from its definition, relative to the change of the MLLM.

    `error` is ||W - W_def||_F / ||W_def - W_v||_F, `stored` what of it a result in fp32 cannot
    avoid, `flipped` the share of elements that a threshold or an election decided otherwise, which
    `error` leaves out.
    """

    error: float
    stored: float
    flipped: float

    @property
    def excess(self) -> float:
        """The error beyond twice the rounding of the result."""
        return max(0.0, self.error - 2 * self.stored)


def grid(shapes: list[tuple[int, int]], seeds: int = 1) -> Iterator[Case]:
    """Every combination."""
    for values in itertools.product(DTYPES, (1, 2), shapes, RANKS, RELATIONS, range(seeds)):
        yield Case(*values)


def sample(count: int, shapes: list[tuple[int, int]], seed: int) -> list[Case]:
    """A few cases in which every value of every axis comes up as often as any other."""
    generator = np.random.default_rng(seed)

    def column(values: Any) -> list[Any]:
        rounds = -(-count // len(values))
        return [values[i] for _ in range(rounds) for i in generator.permutation(len(values))]

    axes = (list(DTYPES), (1, 2), shapes, RANKS, RELATIONS)
    rows = zip(*map(column, axes), strict=False)
    return [Case(*row, seed=seed + number) for number, row in enumerate(rows)][:count]


def variants(name: str) -> list[dict[str, Any]]:
    """The defaults, and every other choice that a method offers, one at a time."""
    found: list[dict[str, Any]] = [{}]
    for parameter in METHODS[name].parameters:
        others: tuple[Any, ...] = ()
        if parameter.kind == "choice":
            others = parameter.choices
        if parameter.kind == "bool":
            others = (True, False)
        found += [{parameter.name: value} for value in others if value != parameter.default]
    return found + _NUMBERS.get(name, [])


_NUMBERS: dict[str, list[dict[str, Any]]] = {
    "ip_merging": [
        {"rank": 24},
        {"projector": "top_k", "top_k": 8},
        {"lambda_": 8.0},
        {"projector": "complement", "energy": 0.9},
        {"projector": "complement", "energy": 0.25, "rank": 24},
        {"projector": "protect", "rank": 24},
        {"projector": "off_inputs", "beta": 8.0},
        {"projector": "input_filter", "beta": 0.1, "rank": 24},
        {"math_energy": 0.5},
        {"math_energy": 0.8, "ablation": "select_only"},
        {"math_energy": 0.6, "ablation": "rescale_only"},
        {"math_energy": 0.7, "projector": "complement"},
        {"math_energy": 0.7, "projector": "protect"},
        {"math_energy": 0.9, "projector": "input_filter"},
        {"budget": 0.02},
        {"budget": 0.05, "projector": "complement"},
        {"output_budget": 0.05, "ablation": "select_only"},
    ],
    "linear": [{"mllm_weight": 0.7, "math_weight": 0.6}],
    "layer_swap": [{"last_kept_layer": 7}],
    "ties": [{"mllm_weight": 0.8, "math_weight": 0.4, "density": 0.5, "normalize": True}],
    "sce": [{"select_topk": 0.4}],
    "dare_linear": [{"mllm_density": 1.0, "math_density": 0.2}],
    "tsv": [{"mllm_weight": 0.8, "math_weight": 0.4, "scale": 0.7}],
    "star": [{"eta": 1.0}, {"eta": 0.8, "combine": "sum", "math_weight": 0.5}],
    "iso_c": [{"mllm_weight": 0.8, "math_weight": 0.6, "scale": 0.7}],
    "iso_cts": [{"common_fraction": 0.0}, {"common_fraction": 1.0}],
    "knots_ties": [{"density": 1.0, "normalize": False}],
    "wudi": [
        {"closed_form": True, "spectral_filter": "swudi", "start": "mean"},
        {"closed_form": True, "spectral_filter": "swudi", "kept": 0.2},
        {"closed_form": True, "spectral_filter": "aswudi"},
    ],
    "multislerp": [{"alpha": 0.7}, {"of": "weights", "alpha": 0.9}],
    "model_stock": [{"models": "experts", "per": "row"}],
    "ram": [{"boost": 0.1}, {"epsilon": 1e-3, "boost": 1.0, "boost_cap": 0.9}],
    "regmean": [{"off_diagonal": 0.0}, {"alpha": 0.8}],
}  # what no list of choices can say


def task_vectors(stored: Stored) -> list[Tensor]:
    """Changes of all models, in fp64."""
    base = stored.base.double()
    return [matrix.double() - base for matrix in (stored.mllm, *stored.experts)]


def noise_between(a: Stored, b: Stored) -> float:
    """Norm of what moved in the task vectors of the model in which most moved."""
    pairs = zip(task_vectors(a), task_vectors(b), strict=True)
    return max(float((x - y).norm()) for x, y in pairs)


def conditioning(name: str, case: Case, **parameters: Any) -> float | None:
    """How far the definition's change moves, relative to itself, per relative noise in the inputs.

    The noise is that of `nudged`, relative to the MLLM's task vector; the move is counted without
    elements that were decided otherwise. None where the method does not take the case.
    """
    if case.experts > 1 and not METHODS[name].several_experts:
        return None
    first = models(case)
    second = nudged(first)
    before, after = truth(name, first, **parameters), truth(name, second, **parameters)
    if before is None or after is None:
        return None
    change = before - first.mllm.double()
    moved = after - second.mllm.double() - change
    if name in CHOOSERS:
        moved = moved.masked_fill(decided_otherwise(name, first, second, **parameters)[0], 0)
    noise = noise_between(first, second) / float(task_vectors(first)[0].norm())
    return float(moved.norm() / change.norm()) / noise


def decided_otherwise(name: str, a: Stored, b: Stored, **parameters: Any) -> tuple[Tensor, Tensor]:
    """Elements in which another set of models takes part, by the definition; and the drift.

    The drift is what slowly changing weights, as those of DELLA's ranks, move an element by.
    """
    one, other = (
        torch.stack(coefficients(name, s.base, s.mllm, s.experts, tensor_name=NAME, **parameters))
        for s in (a, b)
    )
    apart = (one - other).abs()
    decided = (apart > 0.05 * torch.maximum(one.abs(), other.abs())).any(0)
    return decided, (apart * torch.stack(task_vectors(b)).abs()).sum(0)


def tolerance_of(name: str) -> float:
    """How far a method may be from its definition."""
    return LOOSER.get(name, TOLERANCE)


# --- models ---


@lru_cache(maxsize=8)
def models(case: Case) -> Stored:
    """Draw a case."""
    generator = torch.Generator().manual_seed(1000 * case.seed + 17 * sum(case.shape))
    low = {"full": (False, False), "low": (True, True), "mixed": (False, True)}[case.rank]
    lows = low[:1] + low[1:] * case.experts
    return drawn(case.shape, DTYPES[case.dtype], lows, case.relation == "aligned", generator)


def drawn(
    shape: tuple[int, int],
    dtype: torch.dtype,
    low: Sequence[bool],
    aligned: bool,
    generator: torch.Generator,
    strength: float = 1.0,
) -> Stored:
    """Draw a base and its fine-tunes, each with a change of full or of low rank."""
    m, n = shape
    base = (_DEVIATION * _normal(generator, m, n)).to(dtype)
    unit, own = edge(base.bfloat16()), edge(base)
    shared = _frame(generator, m, min(m, n)), _frame(generator, n, min(m, n))
    tuned = []
    for thin in low:
        count = min(_LOW, min(m, n) // 16) if thin else min(m, n)
        S = strength * unit * torch.from_numpy(np.geomspace(_STRONGEST, _WEAKEST[thin], count))
        frames = [_frame(generator, size, count) for size in (m, n)]
        if aligned:
            frames = [_turned(f, s) for f, s in zip(frames, shared, strict=True)]
        tuned.append((base.double() + (frames[0] * S) @ frames[1].T).to(dtype))
    return Stored(base, tuned[0], tuned[1:], (1.2 * _WEAKEST[False]) ** 0.5 * own)


def edge(base: Tensor) -> float:
    """Largest singular value to expect of the rounding of two files like this one."""
    up = torch.nextafter(base.abs(), torch.full_like(base, torch.inf)).double()
    spacing = up - base.abs().double()
    m, n = base.shape
    return float((2 * spacing.square().mean() / 12).sqrt()) * (m**0.5 + n**0.5)


def nudged(stored: Stored, seed: int = 0) -> Stored:
    """Move one weight in 24 of every model to a neighbour in its dtype, up or down.

    So much that the changes hold as much noise again as the rounding of the files left in them.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(W: Tensor) -> Tensor:
        drawn = torch.rand(W.shape, generator=generator)
        up = torch.nextafter(W, torch.full_like(W, torch.inf))
        down = torch.nextafter(W, torch.full_like(W, -torch.inf))
        return torch.where(drawn < 1 / 48, up, torch.where(drawn > 47 / 48, down, W))

    base, mllm, experts, noise = stored
    return Stored(moved(base), moved(mllm), [moved(expert) for expert in experts], noise)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _frame(generator: torch.Generator, size: int, count: int) -> Tensor:
    return torch.linalg.qr(_normal(generator, size, count)).Q


def _turned(own: Tensor, shared: Tensor) -> Tensor:
    """Turn the leading quarter of some directions towards shared ones; orthonormal again."""
    count = max(1, own.shape[1] // 4)
    lead = _COMMON**0.5 * shared[:, :count] + (1 - _COMMON) ** 0.5 * own[:, :count]
    return torch.linalg.qr(torch.cat([lead, own[:, count:]], dim=1)).Q


def inputs(name: str, stored: Stored, parameters: dict[str, Any]) -> dict[str, Any]:
    """Calibration data, fp32 as a calibration leaves it, where a method needs some."""
    kind = METHODS[name].data_for(parameters)
    if kind is None:
        return {}
    generator = torch.Generator().manual_seed(5)
    m, n = stored.base.shape

    def gram() -> Tensor:
        x = torch.randn(3 * n, n, generator=generator) * torch.linspace(0.3, 3, n)
        return (x.T @ x / len(x)).to(stored.base.device)

    def information() -> Tensor:  # heavy-tailed, about 1e-6, as on a model of some size
        return (1e-6 * torch.randn(m, n, generator=generator).pow(4)).to(stored.base.device)

    draw = gram if kind == "gram" else information
    return {f"mllm_{kind}": draw(), f"math_{kind}": [draw() for _ in stored.experts]}


# --- comparisons ---


def merged(name: str, stored: Stored, **parameters: Any) -> Tensor:
    """Merge as a merge does: stored matrices in, fp32 out."""
    base, mllm, experts, _ = stored
    own = inputs(name, stored, parameters)
    return METHODS[name](base, mllm, experts, tensor_name=NAME, **own, **parameters)


def truth(name: str, stored: Stored, **parameters: Any) -> Tensor | None:
    """The definition on the same stored numbers, in fp64; None where it hangs on an opinion.

    That is where a singular value that the method looks at lies about as high as the noise: sums of
    square changes, say, whose spectrum reaches down to 0 without a gap.
    """
    base, mllm, experts, floor = stored
    noise = Noise(floor)
    given = {**inputs(name, stored, parameters), **parameters, "tensor_name": NAME, "noise": noise}
    found = defined(name, base, mllm, experts, **given)
    return found if noise.clear else None


def measure(name: str, case: Case, device: str = "cpu", **parameters: Any) -> Finding | None:
    """Compare a merge with its definition; None where the method does not take the case."""
    if case.experts > 1 and not METHODS[name].several_experts:
        return None
    stored = models(case)
    expected = truth(name, stored, **parameters)
    if expected is None:
        return None
    found = merged(name, stored.to(device), **parameters).cpu()
    return compare(name, stored, found, expected)


def compare(name: str, stored: Stored, found: Tensor, expected: Tensor) -> Finding:
    """Measure how far a result is from what is expected."""
    apart = found.double() - expected
    change = expected - stored.mllm.double()
    size = float(change.norm())
    flipped = flips(apart, change) if name in CHOOSERS else None
    if flipped is not None:
        apart = apart.masked_fill(flipped, 0)
    rounding = float((expected.float().double() - expected).norm())
    if size == 0:  # a kept layer
        return Finding(float(apart.norm()), rounding, 0.0)
    share = float(flipped.double().mean()) if flipped is not None else 0.0
    return Finding(float(apart.norm()) / size, rounding / size, share)


def flips(apart: Tensor, change: Tensor) -> Tensor:
    """Elements that are off by what only another choice explains: 1e-3 of a usual change."""
    return apart.abs() > 1e-3 * float(change.square().mean().sqrt())
