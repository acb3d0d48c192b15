"""Laws that connect methods with each other and with their inputs, on generated matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from small_matrices import W0, W_E, W_V
from test_methods_contract import merge

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS, task_arithmetic

pytestmark = pytest.mark.shapes

some_cases = settings(deadline=None, max_examples=20)
shapes = some.tuples(some.integers(1, 12), some.integers(1, 12))
weights = some.floats(-1.5, 1.5)
DENSE: dict[str, dict[str, Any]] = {
    "ties": {"normalize": False},
    "dare_linear": {},
    "dare_ties": {"normalize": False},
    "della": {"elect": False, "scale": 1.0},
    "breadcrumbs": {},
}

# Parameters at which the result is the expert itself.
EXPERT_ALONE: dict[str, dict[str, Any]] = {
    "linear": {"alpha": 0},
    "layer_swap": {"alpha": 0, "last_kept_layer": -1},
    "task_arithmetic": {"mllm_weight": 0, "math_weight": 1},
    "ties": {"mllm_weight": 0, "math_weight": 1, "density": 1},
    "dare_linear": {"mllm_weight": 0, "math_weight": 1, "density": 1},
    "dare_ties": {"mllm_weight": 0, "math_weight": 1, "density": 1},
    "della": {"mllm_weight": 0, "math_weight": 1, "density": 1, "scale": 1},
    "breadcrumbs": {"mllm_weight": 0, "math_weight": 1, "density": 1},
    "fisher": {"alpha": 0},
    "regmean": {"alpha": 0},
    "tsv": {"mllm_weight": 0},
    "star": {"mllm_weight": 0, "eta": 1},
    "wudi": {"mllm_weight": 0},
    "slerp": {"t": 1},
    "nuslerp": {"t": 1},
    "karcher": {"alpha": 0},
    "multislerp": {"alpha": 0},
}


def draw(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=dtype)
    return [base, *(base + 0.1 * torch.randn(2, *shape, generator=generator, dtype=dtype))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("role", [0, 1, 2], ids=["base", "mllm", "math"])
@pytest.mark.parametrize(
    "name", [n for n, method in METHODS.items() if method.propagates_non_finite]
)
def test_what_is_not_finite_in_an_input_is_not_finite_in_the_result(name, role, bad):
    models = draw((300, 400), 0, torch.float32)
    models[role][7, 9] = bad
    if role == 0 and torch.equal(
        merge(name, torch.ones(300, 400), *models[1:]), merge(name, *models)
    ):
        return  # the base takes no part
    assert not merge(name, *models).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("gamma", [0.01, 0.5])
def test_dropped_outliers_that_are_not_finite_show_in_the_result(gamma, per, bad):
    models = draw((300, 400), 0, torch.float32)
    models[2][7, 9] = bad  # the largest, so among the outliers
    merged = merge("breadcrumbs", *models, density=0.5, gamma=gamma, per=per)
    assert not merged[7].isfinite().all()


@pytest.mark.parametrize("name", EXPERT_ALONE)
@some_cases
@given(shape=shapes, seed=some.integers(0, 99))
def test_the_expert_alone_is_the_expert(name, shape, seed):
    base, mllm, math = draw(shape, seed)
    merged = merge(name, base, mllm, math, **EXPERT_ALONE[name])
    assert torch.allclose(merged, math, rtol=0, atol=1e-9)


@some_cases
@given(shape=shapes, seed=some.integers(0, 99), own=weights)
def test_weights_that_add_up_to_one_make_the_base_cancel(shape, seed, own):
    base, mllm, math = draw(shape, seed, torch.float32)
    both = {"mllm_weight": own, "math_weight": 1 - own}
    elsewhere = base + 0.3
    for name, more in (("task_arithmetic", {}), ("dare_linear", {"density": 1.0})):
        one = METHODS[name](base, mllm, math, **both, **more)
        other = METHODS[name](elsewhere, mllm, math, **both, **more)
        assert float((one - other).abs().max()) <= 4e-6 * float(mllm.abs().max())


@pytest.mark.parametrize("name", ["metagpt", "nan"])
def test_found_coefficients_add_up_to_one_so_the_base_cancels(name):
    base, mllm, math = draw((7, 9), 1)
    found = {"statistic": (0.7, 0.3)}
    one, other = (METHODS[name](b, mllm, math, **found) for b in (base, base + 0.3))
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DENSE)
@some_cases
@given(shape=shapes, seed=some.integers(0, 99), own=some.floats(0, 1.5), other=some.floats(0, 1.5))
def test_with_nothing_dropped_and_no_conflict_it_is_task_arithmetic(name, shape, seed, own, other):
    base, mllm, _ = draw(shape, seed)
    math = base + 0.5 * (mllm - base)  # every sign agrees
    both = {"mllm_weight": own, "math_weight": other}
    merged = METHODS[name](base, mllm, math, **both, density=1.0, **DENSE[name])
    expected = task_arithmetic(base, mllm, math, **both)
    assert torch.allclose(merged, expected, rtol=0, atol=1e-9)


@some_cases
@given(shape=shapes, seed=some.integers(0, 99))
def test_a_sum_does_not_mind_whether_signs_agree_when_nothing_is_dropped(shape, seed):
    base, mllm, math = draw(shape, seed)
    both = {"mllm_weight": 0.8, "math_weight": 0.4}
    expected = task_arithmetic(base, mllm, math, **both)
    for name in ("dare_linear", "breadcrumbs"):
        merged = METHODS[name](base, mllm, math, **both, density=1.0)
        assert torch.allclose(merged, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["tsv", "wudi", "knots_ties"])
@some_cases
@given(shape=shapes, seed=some.integers(0, 99))
def test_one_task_vector_alone_is_taken_whole(name, shape, seed):
    base, mllm, _ = draw(shape, seed)
    more = {"density": 1.0} if name == "knots_ties" else {}
    assert torch.allclose(METHODS[name](base, mllm, base, **more), mllm, rtol=0, atol=1e-9)


WEIGHTED = [
    name
    for name, method in METHODS.items()
    if method.vectors and {"mllm_weight", "math_weight"} <= {p.name for p in method.parameters}
]


@pytest.mark.parametrize("name", WEIGHTED)
def test_norms_are_those_of_the_mllm_where_the_experts_have_no_weight(name):
    method = METHODS[name]
    assert method.vectors is not None
    for experts in (1, 3):
        alone = method.complete({"mllm_weight": 1.0, "math_weight": 0.0})
        assert method.vectors(alone, experts) == (1.0, 0.0)


@some_cases
@given(shape=shapes, seed=some.integers(0, 99), alpha=some.floats(0, 1))
def test_equal_measurements_average(shape, seed, alpha):
    base, mllm, math = draw(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    F = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    X = torch.randn(3 * shape[1], shape[1], generator=generator, dtype=torch.float64)
    G = X.T @ X / len(X)
    expected = alpha * mllm + (1 - alpha) * math
    for name, data in (("fisher", F), ("regmean", G)):
        kind = "fisher" if name == "fisher" else "gram"
        inputs = {f"mllm_{kind}": data, f"math_{kind}": data}
        merged = METHODS[name](base, mllm, math, alpha=alpha, **inputs)
        assert torch.allclose(merged, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_single_precision_is_as_good_as_it_can_be(name):
    exact = merge(name, W0, W_V, W_E)
    single = merge(name, W0.float(), W_V.float(), W_E.float())
    assert float((single.double() - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("frozen", ["mllm", "math", "both"])
@pytest.mark.parametrize("shape", [(6, 9), (1, 9), (9, 1), (1, 1)], ids=str)
def test_what_training_left_alone_is_legal_input(name, frozen, shape):
    base, mllm, math = draw(shape, 3, torch.float32)
    mllm = base if frozen in ("mllm", "both") else mllm
    math = base if frozen in ("math", "both") else math
    merged = merge(name, base, mllm, math)
    assert merged.shape == shape
    assert merged.isfinite().all()
    if frozen == "both":
        assert torch.allclose(merged, base, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_densities_and_gains_out_of_range_are_refused_with_what_is_legal(name):
    names = {p.name for p in METHODS[name].parameters}
    for parameter in {"density", "mllm_density", "math_density"} & names:
        for value in (0.0, -0.1, 1.0001, float("nan")):
            with pytest.raises(PlanError, match=rf"{parameter} is .*\(0, 1\]"):
                merge(name, W0, W_V, W_E, **{parameter: value})
    for parameter in {"mllm_weight", "math_weight", "scale", "lambda_"} & names:
        for value in (float("inf"), float("-inf"), float("nan")):
            with pytest.raises(PlanError, match="expected a finite number"):
                merge(name, W0, W_V, W_E, **{parameter: value})
