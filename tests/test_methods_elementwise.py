"""Linear, task arithmetic and layer swap against numbers computed independently in float64."""

from __future__ import annotations

import pytest
import torch
from small_matrices import W0, W_E, W_V, close, f64, merged_by

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS, linear, task_arithmetic

pytestmark = pytest.mark.shapes

UNDIVIDED = {"mllm_weight": 0.6, "math_weight": 0.6, "normalize": False}


def test_linear_matches_its_numbers():
    assert close(merged_by("linear", alpha=0.6), [[0.75, -0.9, 2.2], [1.375, 0.2125, -0.325]])
    half = [[0.6875, -0.8125, 2.21875], [1.4375, 0.1875, -0.40625]]
    assert close(merged_by("linear", alpha=0.5), half)
    weights = {"mllm_weight": 0.6, "math_weight": 0.6}
    assert close(merged_by("linear", **weights), half)
    undivided = [[0.825, -0.975, 2.6625], [1.725, 0.225, -0.4875]]
    assert close(merged_by("linear", normalize=False, **weights), undivided)


def test_two_weights_of_an_average_come_together_and_do_not_cancel():
    for given in ({"mllm_weight": 1.0}, {"math_weight": 1.0}):
        with pytest.raises(PlanError, match="expected both, or only alpha"):
            merged_by("linear", **given)
    opposite = {"mllm_weight": 0.5, "math_weight": -0.5}
    with pytest.raises(PlanError, match="sum to 0"):
        merged_by("linear", **opposite)
    apart = merged_by("linear", normalize=False, **opposite)
    assert close(apart, (0.5 * (W_V - W_E)).tolist())


def test_task_arithmetic_matches_its_numbers():
    merged = merged_by("task_arithmetic", mllm_weight=0.8, math_weight=0.4)
    assert close(merged, [[0.85, -0.95, 2.225], [1.3, 0.225, -0.175]])
    merged = merged_by("task_arithmetic", mllm_weight=0.6, math_weight=0.4)
    assert close(merged, [[0.75, -0.9, 2.2], [1.375, 0.2125, -0.325]])


def test_an_expert_with_a_parent_of_its_own_is_moved_to_the_common_base():
    parent = f64([[0.625, -1.0, 1.875], [1.5, 0.5, -0.75]])
    merged = task_arithmetic(W0, W_V, W_E - parent + W0, mllm_weight=1.0, math_weight=0.4)
    assert close(merged, [[0.9, -1.0, 2.3], [1.225, 0.1375, -0.025]])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_task_arithmetic_with_weights_of_sum_one_is_linear_whatever_the_base(alpha):
    generator = torch.Generator().manual_seed(0)
    base, other, mllm, math = torch.randn(4, 30, 20, generator=generator)
    weights = {"mllm_weight": alpha, "math_weight": 1 - alpha}
    merged = task_arithmetic(base, mllm, math, **weights)
    assert torch.allclose(merged, task_arithmetic(other, mllm, math, **weights), atol=2e-6)
    assert torch.allclose(merged, linear(base, mllm, math, alpha=alpha), atol=2e-6)


def test_the_expert_alone_is_the_expert():
    assert close(merged_by("task_arithmetic", mllm_weight=0.0, math_weight=1.0), W_E.tolist())
    assert close(merged_by("linear", alpha=0.0), W_E.tolist())


def test_several_experts_add_up():
    merged = METHODS["task_arithmetic"](W0, W_V, [W_E, W_V], math_weight=0.5)
    assert close(merged, (W_V + 0.5 * (W_E - W0) + 0.5 * (W_V - W0)).tolist())


def test_large_matrices_are_merged_in_blocks_to_the_same_values():
    generator = torch.Generator().manual_seed(1)
    base, mllm, math = torch.randn(3, 700, 500, generator=generator).bfloat16()
    merged = task_arithmetic(base, mllm, math)
    direct = mllm.float() + 0.3 * (math.float() - base.float())
    assert torch.allclose(merged, direct, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("model.layers.0.mlp.up_proj.weight", True),
        ("model.language_model.layers.5.self_attn.q_proj.weight", True),
        ("model.layers.6.mlp.up_proj.weight", False),
        ("model.layers.27.mlp.up_proj.weight", False),
        ("lm_head.weight", True),
    ],
)
def test_layer_swap_leaves_the_first_layers_and_averages_the_rest(name, kept):
    merged = merged_by("layer_swap", tensor_name=name)
    assert torch.equal(merged, W_V if kept else merged_by("linear", alpha=0.9))


def test_layer_swap_can_take_whole_layers_and_none_can_be_kept():
    merged = merged_by("layer_swap", alpha=0, last_kept_layer=-1, tensor_name="model.layers.0.x.w")
    assert close(merged, W_E.tolist())


def test_layer_swap_without_a_name_is_refused():
    with pytest.raises(PlanError, match="pass tensor_name"):
        merged_by("layer_swap")


def test_affine_declarations_give_the_change_exactly():
    assert METHODS["linear"].affine(METHODS["linear"].complete(UNDIVIDED)) is None
    for name, parameters in [
        ("linear", {"alpha": 0.7}),
        ("linear", {"mllm_weight": 3.0, "math_weight": 1.0}),
        ("breadcrumbs", {"density": 1.0, "mllm_weight": 0.8}),
        ("task_arithmetic", {"mllm_weight": 0.8, "math_weight": 0.4}),
    ]:
        update = METHODS[name].affine(METHODS[name].complete(parameters))
        change = update.mllm * (W_V - W0) + update.expert * (W_E - W0)
        assert close(merged_by(name, **parameters), (W_V + change).tolist())
