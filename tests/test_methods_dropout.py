"""DARE, DELLA and breadcrumbs against independent numbers, and their randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_matrices import W0, W_E, W_V, close, f64, merged_by

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS, dropout, task_arithmetic
from ipmerge_core.methods.dropout import Drop, bound_of, draw, generator_for, keep_chances
from ipmerge_core.methods.selection import ascending_order, by_rank

pytestmark = pytest.mark.shapes

WEIGHTS = {"mllm_weight": 0.8, "math_weight": 0.4}
NAME = "model.layers.0.self_attn.q_proj.weight"
MASKS = {"vlm": [1, 0, 1, 0, 1, 1], "expert": [0, 1, 1, 1, 1, 0]}


@pytest.fixture
def given_masks(monkeypatch):
    """Draws that keep exactly what the masks keep."""
    monkeypatch.setattr(dropout, "generator_for", lambda seed, name, role: MASKS[role])
    monkeypatch.setattr(dropout, "draw", lambda mask, size, bound: np.array(mask)[:size] > 0)


def dropped(tuned, density, rescale="none", *, base=W0, role="vlm", name=NAME, seed=0, window=0.0):
    """What is left of a task vector of one block."""
    drop = Drop(base, tuned, density, rescale, (seed, name, role), window)
    return drop(tuned - base)


@pytest.mark.parametrize("chance", [1e-9, 0.1, 0.3, 0.5, 1 - 1e-9, 2**-53])
def test_one_chance_for_all_draws_what_uniforms_below_it_would(chance):
    drawn = draw(generator_for(3, NAME, "vlm"), 20_000, bound_of(chance))
    assert (drawn == (generator_for(3, NAME, "vlm").random(20_000) < chance)).all()


def test_chances_of_their_own_draw_what_uniforms_below_them_would():
    chances = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    chances[:2] = torch.tensor([0.0, 1.0])  # 1 is what fp32 makes of a chance just below it
    drawn = draw(generator_for(3, NAME, "vlm"), 20_000, bound_of(chances))
    assert (drawn == (generator_for(3, NAME, "vlm").random(20_000) < chances.numpy())).all()


def test_uniforms_are_keyed_by_seed_tensor_and_role():
    drawn = generator_for(0, NAME, "vlm").random(6)
    expected = [0.43790932, 0.03086863, 0.52143371, 0.01885556, 0.87593446, 0.92218374]
    assert np.allclose(drawn, expected, atol=5e-9)
    assert (drawn < 0.5).tolist() == [True, True, False, True, False, False]
    expert = generator_for(0, NAME, "expert").random(6) < 0.5
    assert expert.tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("name", "rescale", "expected"),
    [
        (
            "dare_linear",
            "inverse_density",
            [[7 / 6, -0.5833333333333333, 2.375], [5 / 3, 0.20833333333333334, 0.25]],
        ),
        (
            "dare_linear",
            "l1",
            [
                [1.0739130434782609, -0.7159090909090908, 2.2855237154150196],
                [1.6136363636363638, 0.23651185770750988, 0.11086956521739122],
            ],
        ),
        (
            "dare_ties",
            "inverse_density",
            [[7 / 6, -0.5833333333333333, 2.375], [5 / 3, 0.125, 0.25]],
        ),
        (
            "dare_ties",
            "l1",
            [
                [1.0739130434782609, -0.7159090909090908, 2.2855237154150196],
                [1.6136363636363638, 0.16477272727272727, 0.11086956521739122],
            ],
        ),
    ],
)
@pytest.mark.usefixtures("given_masks")
def test_dare_matches_its_numbers(name, rescale, expected):
    assert close(merged_by(name, density=0.6, rescale=rescale, **WEIGHTS), expected)


@pytest.mark.parametrize(
    ("rescale", "mllm", "math"),
    [
        (
            "inverse_density",
            [[0.8333333333333334, 0, 0.20833333333333334], [0, 0.10416666666666667, 1.25]],
            [[0, 1.0416666666666667, 0.5208333333333334], [0.4166666666666667, -0.3125, 0]],
        ),
        (
            "l1",
            [
                [0.717391304347826, 0, 0.1793478260869565],
                [0, 0.08967391304347826, 1.076086956521739],
            ],
            [
                [0, 0.7102272727272728, 0.3551136363636364],
                [0.2840909090909091, -0.21306818181818182, 0],
            ],
        ),
    ],
)
@pytest.mark.usefixtures("given_masks")
def test_what_dare_keeps_of_each_model_matches_its_numbers(rescale, mllm, math):
    for role, tuned, expected in (("vlm", W_V, mllm), ("expert", W_E, math)):
        assert close(dropped(tuned, 0.6, rescale, role=role), expected)


def test_sums_of_magnitudes_beyond_fp16_are_taken_in_fp64():
    tau = torch.full((300, 400), 2.0, dtype=torch.float16)  # their sum is above 65504
    merged = METHODS["dare_linear"](0 * tau, tau, tau, rescale="l1", tensor_name="x")
    assert merged.isfinite().all()
    assert float(merged.mean()) == pytest.approx(2 + 0.3 * 2, rel=1e-3)


@pytest.mark.usefixtures("given_masks")
def test_dropping_without_rescaling_only_drops():
    assert close(dropped(W_V, 0.6), [[0.5, 0, 0.125], [0, 0.0625, 0.75]])


def test_l1_rescaling_leaves_alone_what_has_no_mass(monkeypatch):
    zero, ones = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(dropped(zero, 0.5, "l1", base=zero), zero)
    monkeypatch.setattr(dropout, "draw", lambda generator, size, bound: np.zeros(size, bool))
    assert torch.equal(dropped(ones, 0.5, "l1", base=zero), zero)


def test_dare_is_unbiased_and_keeps_the_asked_share():
    generator = torch.Generator().manual_seed(0)
    tau = torch.randn(500, 400, generator=generator)
    kept = dropped(tau, 0.3, "inverse_density", base=torch.zeros_like(tau), seed=7)
    share = float(kept.count_nonzero()) / tau.numel()
    assert abs(share - 0.3) < 0.004  # four standard errors
    assert torch.allclose(kept[kept != 0], tau[kept != 0] / 0.3)
    ratio = float((kept * tau).sum() / (tau * tau).sum())
    assert abs(ratio - 1) < 0.02


def test_what_a_lower_density_keeps_a_higher_one_keeps_too():
    zero, ones = torch.zeros(100, 100), torch.ones(100, 100)
    masks = [dropped(ones, density, base=zero) > 0 for density in (0.2, 0.4, 0.9)]
    assert (masks[0] <= masks[1]).all()
    assert (masks[1] <= masks[2]).all()


def test_the_l1_ratio_is_of_the_same_drops(monkeypatch):
    monkeypatch.setattr("ipmerge_core.methods.blocks._CPU_BLOCK", 77)  # some blocks
    base, tuned = (
        torch.zeros(40, 50),
        torch.randn(40, 50, generator=torch.Generator().manual_seed(0)),
    )
    merged = METHODS["dare_linear"](base, tuned, base, density=0.3, rescale="l1", tensor_name="a")
    assert float(merged.abs().sum()) == pytest.approx(float(tuned.abs().sum()), rel=1e-5)
    plain = METHODS["dare_linear"](base, tuned, base, density=0.3, rescale="none", tensor_name="a")
    assert torch.equal(merged != 0, plain != 0)


@pytest.mark.parametrize("name", ["della", "breadcrumbs"])
def test_what_looks_at_whole_rows_does_not_depend_on_block_size(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base, tuned, math = torch.randn(3, 40, 50, generator=generator)
    choice = {"per": "row"} if name == "breadcrumbs" else {"rescale": "l1", "tensor_name": "a"}
    first = METHODS[name](base, tuned, math, **choice)
    for size in (77, 1):
        monkeypatch.setattr("ipmerge_core.methods.blocks._CPU_BLOCK", size)
        assert torch.allclose(first, METHODS[name](base, tuned, math, **choice), rtol=1e-6)


def test_masks_do_not_depend_on_block_size_but_on_seed_name_and_role(monkeypatch):
    base = torch.zeros(40, 50)
    ones = torch.ones(40, 50)

    def merged(**parameters):
        return METHODS["dare_linear"](base, ones, 2 * ones, math_weight=1, **parameters)

    first = merged(tensor_name="a")
    assert not torch.equal(first, merged(tensor_name="b"))
    assert not torch.equal(first, merged(tensor_name="a", seed=1))
    kinds = first.unique().tolist()
    assert kinds == [0, 2, 4, 6]  # the two models drop independently
    monkeypatch.setattr("ipmerge_core.methods.blocks._CPU_BLOCK", 77)
    assert torch.equal(first, merged(tensor_name="a"))


def test_density_one_is_task_arithmetic():
    expected = task_arithmetic(W0, W_V, W_E, **WEIGHTS)
    for name in ("dare_linear", "breadcrumbs"):
        merged = merged_by(name, density=1, **WEIGHTS)
        assert torch.allclose(merged, expected, rtol=0, atol=1e-12)


def test_dropping_the_expert_only_leaves_the_mllm_whole():
    merged = METHODS["dare_linear"](W0, W_V, W0, mllm_density=1, density=0.5)
    assert torch.equal(merged, W_V)


@pytest.mark.usefixtures("given_masks")
def test_della_keeps_by_rank_with_its_numbers():
    q = keep_chances(3, 0.6, 0.15, torch.float64)
    ranked = by_rank(ascending_order(W_V - W0), q)
    assert close(ranked, [[0.75, 0.6, 0.45], [0.6, 0.45, 0.75]])
    kept = dropped(W_V, 0.6, "inverse_density", window=0.15)
    assert close(kept, [[2 / 3, 0, 0.2777777777777778], [0, 0.1388888888888889, 1]])
    kept = dropped(W_V, 0.6, "l1", window=0.15)
    expected = [
        [0.717391304347826, 0, 0.1793478260869565],
        [0, 0.08967391304347826, 1.076086956521739],
    ]
    assert close(kept, expected)


def test_della_without_a_window_is_dare():
    parameters = {**WEIGHTS, "density": 0.6, "seed": 3, "tensor_name": NAME}
    plain = merged_by("della", epsilon=0, elect=False, scale=1, **parameters)
    assert close(plain, merged_by("dare_linear", **parameters).tolist())
    elected = merged_by("della", epsilon=0, normalize=False, scale=1, **parameters)
    assert close(elected, merged_by("dare_ties", **parameters).tolist())


def test_della_keeps_large_elements_more_often():
    tau = torch.linspace(-1, 1, 400).repeat(500, 1)
    kept = dropped(tau, 0.5, base=torch.zeros_like(tau), window=0.3)
    share = (kept != 0).double().mean(0)
    assert abs(float(share[0]) - 0.8) < 0.08
    assert abs(float(share[200]) - 0.2) < 0.08


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, 0.5)])
def test_della_refuses_chances_outside_the_open_unit_interval(density, epsilon):
    with pytest.raises(PlanError, match="Choose a smaller epsilon"):
        merged_by("della", density=density, epsilon=epsilon)


def test_a_density_of_its_own_is_checked_too_and_one_keeps_all():
    with pytest.raises(PlanError, match="Choose a smaller epsilon"):
        merged_by("della", math_density=0.1)
    kept = merged_by("della", mllm_density=1, math_weight=0, elect=False, scale=1)
    assert torch.equal(kept, W_V)
    kept = merged_by("breadcrumbs", mllm_density=1, math_weight=0, density=0.2)
    assert torch.equal(kept, W_V)


def test_one_column_has_no_ranks():
    ones, zero = torch.ones(4000, 1), torch.zeros(4000, 1)
    kept = dropped(ones, 0.5, "inverse_density", base=zero, window=0.15)
    assert kept.unique().tolist() == [0, 2]
    assert torch.equal(kept, dropped(ones, 0.5, "inverse_density", base=zero))


def crumbs(tau, **choice):
    """What breadcrumbs keeps of a task vector."""
    zero = torch.zeros_like(tau)
    return METHODS["breadcrumbs"](zero, tau, zero, **choice)


def test_breadcrumbs_matches_its_numbers():
    kept = crumbs(W_V - W0, density=0.5, gamma=0.2)
    assert close(kept, [[0.5, -0.25, 0], [-0.375, 0, 0]])
    kept = crumbs(W_E - W0, density=0.5, gamma=0.2)
    assert close(kept, [[0, 0, 0.3125], [0.25, -0.1875, 0]])
    merged = merged_by("breadcrumbs", density=0.5, gamma=0.2, **WEIGHTS)
    assert close(merged, [[0.9, -1.2, 2.125], [1.3, 0.175, -0.75]])


def test_breadcrumbs_keeps_what_is_asked_where_no_outlier_fits():
    tau = f64([[0.5, -0.25, 0.125], [-0.375, 0.0625, 0.75]])
    kept = crumbs(tau, density=0.5, gamma=0.01)  # int(0.01 * 6) = 0 outliers
    assert close(kept, [[0.5, 0, 0], [-0.375, 0, 0.75]])
    kept = crumbs(tau, density=0.9, gamma=0.5)  # more than there are: the smallest stay
    assert int(kept.count_nonzero()) == int(0.9 * 6)
    assert float(kept[1, 2]) == 0


def test_breadcrumbs_can_rank_within_rows():
    tau = f64([[0.5, -0.25, 0.125], [-0.375, 0.0625, 0.75]])
    kept = crumbs(tau, density=0.34, gamma=0.34, per="row")  # of three: one outlier, one kept
    assert close(kept, [[0, -0.25, 0], [-0.375, 0, 0]])
    assert merged_by("breadcrumbs", per="row").isfinite().all()
