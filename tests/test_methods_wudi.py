"""WUDI-Merging against numbers, against autograd and torch's Adam, and its closed form."""

from __future__ import annotations

import pytest
import torch
from method_definitions import defined
from small_matrices import W0, W_E, W_V, close, merged_by

from ipmerge_core.methods import METHODS

pytestmark = pytest.mark.shapes


def loss_of(X, taus):
    return sum((((X - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in taus)


def test_wudi_matches_its_numbers():
    delta = merged_by("wudi") - W0
    expected = [
        [0.37799105538754635, 0.3779993105721217, 0.4345127768354086],
        [-0.12804671085982716, -0.12799553003130715, 0.684516520689656],
    ]
    assert close(delta, expected, 1e-9)
    taus = [W_V - W0, W_E - W0]
    assert float(loss_of(sum(taus), taus)) == pytest.approx(0.48429891965916005)
    assert float(loss_of(delta, taus)) == pytest.approx(0.47954931335757534)


def test_the_closed_form_matches_its_numbers_and_is_the_minimum():
    delta = merged_by("wudi", closed_form=True) - W0
    expected = [
        [0.7978591477192493, 0.8958877630278211, 0.218396942522243],
        [-0.57265564318246, -0.7581727289577748, 0.6882530054017798],
    ]
    assert close(delta, expected, 1e-9)
    taus = [W_V - W0, W_E - W0]
    assert float(loss_of(delta, taus)) == pytest.approx(0.11973130670985735)
    point = delta.clone().requires_grad_()
    loss_of(point, taus).backward()
    assert float(point.grad.abs().max()) < 1e-9


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 40)])  # the last has 2 T m < n
@pytest.mark.parametrize("experts", [1, 2])
def test_the_steps_are_those_of_torch_adam_on_the_loss(shape, experts):
    generator = torch.Generator().manual_seed(0)
    taus = 0.01 * torch.randn(1 + experts, *shape, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(taus[0])
    merged = METHODS["wudi"](
        zero, taus[0], list(taus[1:]), iterations=40, learning_rate=1e-4, scale=0.5
    )
    X = taus.sum(0).clone().requires_grad_()
    adam = torch.optim.Adam([X], lr=1e-4)
    for _ in range(40):
        adam.zero_grad()
        loss_of(X, taus).backward()
        adam.step()
    assert torch.allclose(merged, 0.5 * X.detach(), atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (12, 12)])
def test_the_closed_form_is_the_pseudo_inverse_solution(shape):
    generator = torch.Generator().manual_seed(1)
    taus = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(taus[0])
    merged = METHODS["wudi"](zero, *taus, closed_form=True)
    expected = defined("wudi", zero, taus[0], [taus[1]], closed_form=True)
    assert torch.allclose(merged, expected, atol=1e-8)


def test_no_steps_give_the_sum_and_one_model_alone_is_kept_whole():
    assert close(merged_by("wudi", iterations=0), (W_V + W_E - W0).tolist())
    assert torch.equal(METHODS["wudi"](W0, W_V, W0), W_V)


def test_weights_scale_the_task_vectors_before_they_meet():
    scaled = merged_by("wudi", mllm_weight=0.5, math_weight=2.0, closed_form=True)
    expected = METHODS["wudi"](W0, W0 + 0.5 * (W_V - W0), W0 + 2 * (W_E - W0), closed_form=True)
    assert torch.allclose(scaled - W0, expected - W0, atol=1e-12)
    assert torch.equal(merged_by("wudi", math_weight=0.0), W_V)


def test_it_tells_how_far_it_is_and_returns_the_same():
    shares: list[float] = []
    merged = merged_by("wudi", iterations=4, report=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert torch.equal(merged, merged_by("wudi", iterations=4))


def test_small_task_vectors_converge_to_the_minimum():
    generator = torch.Generator().manual_seed(0)
    taus = 1e-4 * torch.randn(2, 32, 48, generator=generator)
    zero = torch.zeros(32, 48)
    found = METHODS["wudi"](zero, *taus)
    least = METHODS["wudi"](zero, *taus, closed_form=True)
    start = float(loss_of(taus.sum(0), taus))
    assert float(loss_of(least, taus)) <= float(loss_of(found, taus)) < 0.3 * start
