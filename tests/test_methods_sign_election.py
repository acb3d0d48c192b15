"""TIES and SCE against numbers computed independently, and exact selection by magnitude."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from method_definitions import defined, whole_model
from small_matrices import W0, W_E, W_V, close, f64, merged_by

from ipmerge_core.methods import METHODS, task_arithmetic
from ipmerge_core.methods.blocks import TaskVectors
from ipmerge_core.methods.selection import ascending_order, by_rank, keep_largest_, kth_largest

pytestmark = pytest.mark.shapes

WEIGHTS = {"mllm_weight": 0.8, "math_weight": 0.4}
PAPER = {"mllm_weight": 1, "math_weight": 1, "normalize": True, "election": "majority"}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (
            {**WEIGHTS, "density": 0.5, "normalize": True},
            [[1, -0.375, 2.3125], [1.125, 0.25, 0]],
        ),
        ({**WEIGHTS, "density": 0.5}, [[0.9, -0.75, 2.125], [1.2, 0.25, -0.15]]),
        (
            {**WEIGHTS, "density": 1, "normalize": True},
            [[1, -0.375, 2.1875], [1.125, 0.0625, 0]],
        ),
        ({**PAPER, "density": 0.5}, [[1, -0.375, 2.3125], [1.125, 0.25, 0]]),
        ({**PAPER, "density": 1}, [[1, -0.375, 2.21875], [1.125, 0.0625, 0]]),
        (
            {**PAPER, "density": 0.5, "trim": "official"},
            [[1, -0.375, 2.3125], [1.125, 0.0625, 0]],
        ),
    ],
)
def test_ties_matches_its_numbers(parameters, expected):
    assert close(merged_by("ties", **parameters), expected)


def test_the_trim_keeps_exactly_the_largest_half():
    kept = keep_largest_((W_V - W0).clone(), 3), keep_largest_((W_E - W0).clone(), 3)
    assert close(kept[0], [[0.5, 0, 0], [-0.375, 0, 0.75]])
    assert close(kept[1], [[0, 0.625, 0.3125], [0.25, 0, 0]])


def test_weights_that_cancel_divide_nothing():
    opposite = {"mllm_weight": 1.0, "math_weight": -1.0, "density": 1.0, "normalize": True}
    assert merged_by("ties", **opposite).isfinite().all()
    same = METHODS["ties"](W0, W_V, W_V, **opposite)
    assert same.isfinite().all()


def test_a_tied_sign_is_positive_when_weighted_and_the_majority_sign_in_the_paper():
    tau_1, tau_2 = f64([[0.5, -0.25, -0.25]]), f64([[-0.5, -0.25, -0.5]])
    ties, zero = METHODS["ties"], torch.zeros_like(tau_1)
    weighted = {**PAPER, "election": "weighted"}
    assert close(ties(zero, tau_1, tau_2, density=1, **weighted), [[0.5, -0.25, -0.375]])
    assert close(ties(zero, tau_1, tau_2, density=1, **PAPER), [[-0.5, -0.25, -0.375]])
    # Where the majority itself is tied, an element without a sign is dropped.
    tau_1, tau_2 = f64([[0.5, 1, -1]]), f64([[-0.5, 1, -1]])
    assert close(ties(zero, tau_1, tau_2, density=1, **PAPER), [[0, 1, -1]])


def test_normalized_ties_depends_on_the_ratio_of_the_weights_only():
    first = merged_by("ties", mllm_weight=0.8, math_weight=0.4, density=0.5, normalize=True)
    second = merged_by("ties", mllm_weight=0.2, math_weight=0.1, density=0.5, normalize=True)
    assert torch.equal(first, second)


def test_ties_without_trim_and_without_conflict_is_task_arithmetic():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=generator)
    change = 0.1 * torch.randn(20, 30, generator=generator)
    mllm, math = base + change, base + 0.5 * change
    merged = METHODS["ties"](base, mllm, math, density=1, **WEIGHTS)
    assert torch.allclose(merged, task_arithmetic(base, mllm, math, **WEIGHTS), atol=1e-6)


def test_densities_can_be_set_per_model():
    merged = merged_by("ties", density=0.5, mllm_density=1, math_weight=0)
    assert torch.equal(merged, W_V)
    both = merged_by("ties", density=0.1, mllm_density=0.5, math_density=0.5)
    assert torch.equal(both, merged_by("ties", density=0.5))


def test_three_models_elect_together():
    zero = torch.zeros(1, 2, dtype=torch.float64)
    vectors = [f64([[0.5, -0.1]]), f64([[-0.3, -0.2]]), f64([[-0.3, 0.4]])]
    merged = METHODS["ties"](
        zero, vectors[0], vectors[1:], density=1, math_weight=1, normalize=False
    )
    assert close(merged, [[-0.6, 0.4]])


def test_whole_model_ties_trims_all_matrices_by_one_exact_threshold():
    generator = torch.Generator().manual_seed(3)
    sizes = [(40, 30), (50, 30), (7, 9)]
    matrices = []
    for number, shape in enumerate(sizes):
        base = torch.randn(shape, generator=generator)
        tuned = base + 0.1 * (number + 1) * torch.randn(2, *shape, generator=generator)
        matrices.append((base, tuned[0], [tuned[1]], {}))
    ties = METHODS["ties"]
    parameters = ties.complete({"density": 0.25, "scope": "model"})
    thresholds = ties.statistic.over(lambda: matrices, parameters)
    for model, threshold in enumerate(thresholds):
        changes = torch.cat([((m, *e)[model] - b).abs().flatten() for b, m, e, _ in matrices]).sort(
            descending=True
        )
        assert threshold == float(changes.values[int(0.25 * changes.values.numel()) - 1])
    stored = [(base, mllm, *experts) for base, mllm, experts, _ in matrices]
    truth = whole_model("ties", stored, parameters)
    assert thresholds == pytest.approx(truth, rel=1e-6)
    merged = ties(*matrices[0][:3], statistic=thresholds, **parameters)
    expected = defined("ties", *matrices[0][:3], statistic=truth, **parameters)
    assert torch.allclose(merged.double(), expected, atol=1e-6)


def test_whole_model_ties_without_a_statistic_uses_the_matrix_at_hand():
    assert torch.equal(merged_by("ties", scope="model"), merged_by("ties", scope="tensor"))


def test_sce_matches_its_numbers():
    assert close(merged_by("sce"), [[1, -0.375, 2.1941964285714284], [1.125, 0.0625, 0]])
    assert close(merged_by("sce", select_topk=0.4), [[0.5, -0.375, 2], [1.5, 0.25, 0]])


def test_sce_of_nothing_selected_is_the_base():
    assert close(merged_by("sce", select_topk=0), W0.tolist())


def test_sce_weights_shift_the_mean_towards_a_model():
    assert close(merged_by("sce", math_weight=0.0)[:, :1], [[1], [1.125]])
    shifted = merged_by("sce", math_weight=1e9)
    assert abs(float(shifted[0, 2]) - float(W_E[0, 2])) < 1e-6


# --- exact selection ---


def slow_keep(values, count):
    """Order by (-|x|, place) and keep the first."""
    flat = values.flatten()
    order = sorted(range(flat.numel()), key=lambda i: (-abs(float(flat[i])), i))
    kept = torch.zeros_like(flat)
    kept[order[:count]] = flat[order[:count]]
    return kept.view(values.shape)


@given(some.lists(some.integers(-3, 3), min_size=1, max_size=30), some.integers(0, 31))
def test_keeping_the_largest_is_exact_and_equal_ones_go_by_place(numbers, count):
    values = torch.tensor(numbers, dtype=torch.float32) / 4
    assert torch.equal(keep_largest_(values.clone(), count), slow_keep(values, count))


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "constant", "mostly zero", "striped"])
@pytest.mark.parametrize("share", [1e-5, 0.2, 0.5, 0.999])
def test_selection_in_large_tensors_is_exact(kind, share):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 512, generator=generator) * 1e-3
    if kind == "bfloat16":
        values = values.bfloat16().float()
    if kind == "constant":
        values = torch.full((400, 512), -0.5)
    if kind == "mostly zero":
        values[torch.rand(400, 512, generator=generator) < 0.95] = 0
    if kind == "striped":  # the sample sees a few columns only
        values = values * torch.arange(512)
    count = max(1, int(share * values.numel()))
    kept = keep_largest_(values.clone(), count)
    order = values.abs().flatten().sort(descending=True, stable=True).indices[:count]
    expected = torch.zeros(values.numel()).index_copy(0, order, values.flatten()[order])
    assert torch.equal(kept, expected.view(400, 512))
    (((threshold, above),),) = kth_largest(TaskVectors([values]), [[count]])
    assert threshold == float(values.abs().flatten()[order[-1]])
    assert above == int((values.abs() > threshold).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_ranks_agree_with_a_stable_sort(dtype):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(20, 33, generator=generator) * 4).round().to(dtype)
    order = values.abs().argsort(dim=1, stable=True)
    assert torch.equal(ascending_order(values), order)
    assert torch.equal(by_rank(order, torch.arange(33)), order.argsort(dim=1))


@pytest.mark.parametrize("kind", ["normal", "bfloat16"])
def test_one_search_finds_the_thresholds_of_several_vectors(kind):
    generator = torch.Generator().manual_seed(0)
    base, *tuned = torch.randn(3, 400, 512, generator=generator) * 1e-3
    if kind == "bfloat16":
        base, tuned = base.bfloat16(), [matrix.bfloat16() for matrix in tuned]
    wanted = [[1, 204_800, 90_000], []]
    found = kth_largest(TaskVectors(tuned, base), wanted)
    ordered = (tuned[0].float() - base.float()).abs().flatten().sort(descending=True).values
    assert [threshold for threshold, _ in found[0]] == [float(ordered[k - 1]) for k in wanted[0]]
    assert [above for _, above in found[0]] == [int((ordered > t).sum()) for t, _ in found[0]]
    assert found[1] == []
