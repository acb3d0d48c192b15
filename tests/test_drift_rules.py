"""The three gradient rules against the paper's formulas in float64, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.finetuning.rules import RULES, coefficient, measure, tilt, tilt_

# The published examples: alpha = -1, i.e. strength 1, with the norms of one tensor.
G = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # ||g|| = 5
D = torch.tensor([[6.0, 0.0], [0.0, -8.0]], dtype=torch.float64)  # ||D|| = 10, <g, D> = -14


def by_definition(g: Tensor, d: Tensor, rule: str, alpha: float) -> Tensor:
    """The paper's equations, one number at a time; its sign, alpha = -1."""
    gs, ds = g.flatten().tolist(), d.flatten().tolist()
    g_norm, d_norm = (math.sqrt(math.fsum(x * x for x in values)) for values in (gs, ds))
    cosine = math.fsum(a * b for a, b in zip(gs, ds, strict=True)) / (g_norm * d_norm)
    factor = {
        "absolute": alpha,
        "grad_norm": alpha * g_norm / d_norm,
        "adaptive": alpha * (1 + cosine) / 2 * g_norm / d_norm,
    }[rule]
    moved = [a + factor * b for a, b in zip(gs, ds, strict=True)]
    return torch.tensor(moved, dtype=torch.float64).reshape(g.shape)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("absolute", [[-3.0, 0.0], [0.0, 12.0]]),
        ("grad_norm", [[0.0, 0.0], [0.0, 8.0]]),
        ("adaptive", [[3 - 0.36 * 3, 0.0], [0.0, 4 + 0.36 * 4]]),  # cos = -0.28
    ],
)
def test_each_rule_gives_the_value_computed_by_hand(rule, expected):
    torch.testing.assert_close(tilt(G, D, rule), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0, 0.0])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(7,), (5, 3), (1, 1), (2, 3, 4)])
def test_each_rule_equals_its_definition_in_float64(rule, shape, strength):
    generator = torch.Generator().manual_seed(len(shape))
    g, d = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    found = tilt(g, d, rule, strength)
    torch.testing.assert_close(found, by_definition(g, d, rule, -strength), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_positive_strength_moves_the_parameter_toward_the_expert(rule):
    weight, expert = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    d = expert - weight
    g = torch.randn(6, 4).double()
    g -= (g * d).sum() / d.square().sum() * d  # orthogonal, so that SGD alone keeps the distance
    step = weight - 0.01 * tilt(g, d, rule)
    plain = weight - 0.01 * g
    assert (step - expert).norm() < (plain - expert).norm()


def test_orthogonal_gradients_progress_by_one_norm_and_by_half_of_it():
    g, d = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0])
    progress = {rule: float(-tilt(g, d, rule)[1]) for rule in ("grad_norm", "adaptive")}
    assert progress == {"grad_norm": 2.0, "adaptive": 1.0}


def test_adaptive_pushes_most_against_a_gradient_that_leads_away_and_not_at_all_toward():
    d = torch.tensor([1.0, 2.0])
    away = coefficient("adaptive", measure(3 * d, d), 1.0)  # SGD subtracts it: away from D
    toward = coefficient("adaptive", measure(-3 * d, d), 1.0)
    torch.testing.assert_close(away, torch.tensor(3.0))
    torch.testing.assert_close(toward, torch.tensor(0.0))


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_and_zero_priors_are_finite(rule):
    zero, some = torch.zeros(4), torch.ones(4)
    assert torch.equal(tilt(some, zero, rule), some)
    assert torch.equal(tilt(zero, zero, rule), zero)
    expected = -some if rule == "absolute" else zero
    assert torch.equal(tilt(zero, some, rule), expected)


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**16])
@pytest.mark.parametrize("rule", RULES)
def test_a_scaled_gradient_is_tilted_as_the_unscaled_one(rule, factor):
    """The gradients of a loss that fp16 training scales are divided by the factor afterwards."""
    found = measure(factor * G, D)
    scaled = factor * G - coefficient(rule, found, 1.0, scale=factor) * D
    torch.testing.assert_close(scaled / factor, tilt(G, D, rule), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_is_close_and_keeps_its_dtype_and_its_memory(rule, dtype):
    g, d = G.to(dtype), D.to(dtype)
    found = tilt(g, d, rule)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), tilt(G, D, rule), rtol=2e-2, atol=2e-2)
    kept = g.data_ptr()
    tilt_(g, d, coefficient(rule, measure(g, d), 1.0))
    assert g.data_ptr() == kept
    assert torch.equal(g, found)


def test_large_low_precision_gradients_do_not_overflow_the_norm():
    g = torch.full((300,), 300.0, dtype=torch.float16)  # sum of squares 2.7e7
    assert torch.isfinite(tilt(g, torch.ones(300, dtype=torch.float16), "adaptive")).all()


def test_an_unknown_rule_is_named_instead_of_replaced():
    """The authors' code falls back to grad_norm."""
    with pytest.raises(PlanError, match=r"'adaptive_cosine'.*adaptive, grad_norm, absolute"):
        tilt(G, D, "adaptive_cosine")
