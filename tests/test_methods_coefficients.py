"""MetaGPT and NAN: coefficients from norms, per matrix and for a whole model."""

from __future__ import annotations

import pytest
import torch
from small_matrices import W0, W_E, W_V, close, merged_by

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS, task_arithmetic
from ipmerge_core.methods.coefficients import metagpt_coefficients, nan_coefficients, squared_norms

pytestmark = pytest.mark.shapes


def test_metagpt_matches_its_numbers():
    squares = squared_norms(W0, W_V, [W_E])
    assert squares.tolist() == [1.03515625, 0.60546875]
    assert metagpt_coefficients(squares) == pytest.approx((0.6309523809523809, 0.36904761904761907))
    expected = [
        [0.7693452380952381, -0.9270833333333333, 2.1941964285714284],
        [1.3556547619047619, 0.22023809523809523, -0.29985119047619047],
    ]
    assert close(merged_by("metagpt"), expected)


@pytest.mark.parametrize(
    ("norm_of", "expected"),
    [
        (
            "weights",
            [
                [0.6955304311328738, -0.8237426035860234, 2.216340870660138],
                [1.4294695688671262, 0.1907121724531495, -0.395810439527264],
            ],
        ),
        (
            "tau",
            [
                [0.6458504658813207, -0.7541906522338488, 2.231244860235604],
                [1.4791495341186793, 0.17084018635252823, -0.4603943943542832],
            ],
        ),
    ],
)
def test_nan_matches_its_numbers(norm_of, expected):
    assert close(merged_by("nan", norm_of=norm_of), expected)


def test_nan_weighs_by_inverse_norms():
    found = nan_coefficients(squared_norms(W0, W_V, [W_E], norm_of="weights"))
    assert found == pytest.approx((0.5128486898125981, 0.487151310187402), abs=1e-12)
    found = nan_coefficients(squared_norms(W0, W_V, [W_E]))
    assert found == pytest.approx((0.43336074541011305, 0.5666392545898871), abs=1e-12)


def test_metagpt_shares_equally_where_nothing_changed():
    assert metagpt_coefficients([0.0, 0.0]) == (0.5, 0.5)


def test_nan_averages_models_of_equal_norm():
    merged = METHODS["nan"](W0, W0 + 0.1, W0 - 0.1, norm_of="tau")
    assert close(merged, W0.tolist())


@pytest.mark.parametrize(("norm_of", "expected"), [("tau", W0), ("weights", W_V)])
def test_a_norm_of_zero_takes_all_the_weight(norm_of, expected):
    zero = torch.zeros_like(W0)
    base, math = (W0, W0) if norm_of == "tau" else (zero, zero)
    merged = METHODS["nan"](base, W_V, math, norm_of=norm_of)
    assert close(merged, expected.tolist() if norm_of == "tau" else zero.tolist())


def test_nan_of_three_models_is_scaled_unless_told_otherwise():
    squares = torch.ones(3, dtype=torch.float64)
    assert nan_coefficients(squares) == pytest.approx((0.5, 0.5, 0.5))
    assert nan_coefficients(squares, global_scale="1") == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    merged = METHODS["nan"](W0, W_V, [W_E, W_E], norm_of="tau", statistic=(0.5, 0.5, 0.5))
    assert close(merged, (W0 + 0.5 * (W_V - W0) + (W_E - W0)).tolist())


@pytest.mark.parametrize("name", ["metagpt", "nan"])
def test_the_whole_model_pass_adds_squares_over_matrices(name):
    method = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    matrices = [
        (*torch.randn(2, *shape, generator=generator), [torch.randn(shape, generator=generator)])
        for shape in [(5, 4), (3, 7)]
    ]
    parameters = method.complete({})
    found = method.statistic.over(lambda: [(*m, {}) for m in matrices], parameters)
    of = (lambda m, b: m) if name == "nan" else (lambda m, b: m - b)
    squares = [
        sum(float((of((m, *e)[model], b).double() ** 2).sum()) for b, m, e in matrices)
        for model in (0, 1)
    ]
    rule = metagpt_coefficients if name == "metagpt" else nan_coefficients
    assert found == pytest.approx(rule(torch.tensor(squares, dtype=torch.float64)))
    base, mllm, experts = matrices[0]
    merged = method(base, mllm, experts, statistic=found)
    weights = {"mllm_weight": found[0], "math_weight": found[1]}
    assert torch.allclose(merged, task_arithmetic(base, mllm, experts, **weights), atol=1e-6)
    local = method(base, mllm, experts, statistic=found, scope="tensor")
    assert torch.equal(local, method(base, mllm, experts))


def test_the_preview_is_exact_once_the_model_is_measured():
    for name in ("metagpt", "nan"):
        method = METHODS[name]
        parameters = method.complete({})
        assert method.affine(parameters) is None
        update = method.affine({**parameters, "statistic": (0.7, 0.3)})
        change = update.mllm * (W_V - W0) + update.expert * update.shares[0] * (W_E - W0)
        merged = method(W0, W_V, W_E, statistic=(0.7, 0.3))
        assert close(merged, (W_V + change).tolist())


def test_nothing_to_measure_is_said():
    method = METHODS["metagpt"]
    with pytest.raises(PlanError, match="no matrices to measure"):
        method.statistic.over(list, method.complete({}))
