"""The three gradient rules of DRIFT: how a gradient is tilted along the reasoning prior.

In: the gradient g and the prior D of one parameter, of one shape. Out: the tilted gradient
g - c D; the rules differ in c. An optimizer subtracts the gradient, so a positive `strength` moves
the parameter along D, toward the expert; strength 1 is alpha = -1 in the paper. No IO, no models.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError

Rule: TypeAlias = Literal["adaptive", "grad_norm", "absolute"]
RULES: tuple[Rule, ...] = get_args(Rule)  # the first is the paper's default


class Alignment(NamedTuple):
    """<g, D>, ||g|| and ||D|| of one parameter, as scalars on its device, in fp32 or fp64."""

    inner: Tensor
    gradient_norm: Tensor
    prior_norm: Tensor

    @property
    def cosine(self) -> Tensor:
        """Return cos(g, D) over the flattened tensors, in [-1, 1]; 0 if one of them is zero."""
        product = self.gradient_norm * self.prior_norm
        cosine = self.inner / torch.where(product > 0, product, torch.ones_like(product))
        return cosine.clamp(-1.0, 1.0)


def measure(gradient: Tensor, prior: Tensor, prior_norm: Tensor | None = None) -> Alignment:
    """Measure a gradient and the prior of its parameter; sums are at least fp32.

    Args:
        gradient: g, of any shape.
        prior: D, of the same shape and device.
        prior_norm: ||D|| as a scalar tensor, if it is known.
    """
    g = _flat(gradient)
    d = _flat(prior).to(g.dtype)
    norm = torch.linalg.vector_norm(d) if prior_norm is None else prior_norm
    return Alignment(torch.dot(g, d), torch.linalg.vector_norm(g), norm.to(g))


def coefficient(rule: Rule, found: Alignment, strength: float, *, scale: float = 1.0) -> Tensor:
    """Return c, with which a rule turns g into g - c D.

    Math:   absolute   c = s
            grad_norm  c = s ||g|| / ||D||
            adaptive   c = s (1 + cos(g, D)) / 2 ||g|| / ||D||
            Norms are Frobenius norms of one tensor; s is the strength, and c = 0 where D = 0.
    Source: DRIFT, arXiv 2510.15050, with s = -alpha. Its code has grad_norm as the default of its
            class, and adaptive in the published configuration; the paper's results are adaptive.

    Args:
        rule: one of `RULES`.
        found: the measured gradient and prior.
        strength: s; 1 in the paper, negative moves away from the expert.
        scale: the factor that the gradient was multiplied by to avoid underflow (fp16). Only the
            absolute rule depends on it: the others are homogeneous in g.

    Raises: PlanError for an unknown rule.

    >>> g, d = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0])
    >>> [float(coefficient(rule, measure(g, d), 1.0)) for rule in RULES]
    [0.25, 0.5, 1.0]
    """
    zero = torch.zeros_like(found.prior_norm)
    if rule == "absolute":
        return torch.where(found.prior_norm > 0, zero + strength * scale, zero)
    if rule not in RULES:
        raise PlanError(f"Unknown rule '{rule!s:.80}'. Available: {', '.join(RULES)}.")
    safe = torch.where(found.prior_norm > 0, found.prior_norm, torch.ones_like(zero))
    ratio = torch.where(found.prior_norm > 0, strength * found.gradient_norm / safe, zero)
    return ratio * (1 + found.cosine) / 2 if rule == "adaptive" else ratio


def tilt(gradient: Tensor, prior: Tensor, rule: Rule, strength: float = 1.0) -> Tensor:
    """Return the gradient of one parameter, tilted by a rule.

    Math:   g - c D, with c of `coefficient`.
    Shapes: any, equal for both; the result has that shape and the gradient's dtype.

    >>> tilt(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0]), "grad_norm")
    tensor([-2.,  2.])
    """
    c = coefficient(rule, measure(gradient, prior), strength)
    return torch.addcmul(gradient, prior.to(gradient), c.to(gradient), value=-1.0)


def tilt_(gradient: Tensor, prior: Tensor, c: Tensor) -> None:
    """Replace a gradient by g - c D in its own memory, without waiting for the device."""
    gradient.addcmul_(prior.to(gradient), c.to(gradient), value=-1.0)


def _flat(values: Tensor) -> Tensor:
    """View a tensor as a vector of at least fp32."""
    flat = values.detach().reshape(-1)
    return flat if flat.dtype == torch.float64 else flat.float()
