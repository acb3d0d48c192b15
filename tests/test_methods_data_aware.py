"""Fisher merging and RegMean against numbers computed independently in float64."""

from __future__ import annotations

import pytest
import torch
from small_matrices import W0, W_E, W_V, close, f64, merged_by

from ipmerge_core.errors import PlanError, ShapeError
from ipmerge_core.methods import METHODS

pytestmark = pytest.mark.shapes

FISHER = {
    "mllm_fisher": f64([[1, 4, 0], [2, 0.5, 1]]),
    "math_fisher": f64([[0.75, 0.25, 0], [0.5, 0.125, 1.75]]),
}
X_V = f64([[1, 0, 2], [0, 1, 1], [1, 1, 0], [2, 1, 1]])
X_E = f64([[0, 2, 1], [1, 0, 1], [1, 1, 3], [0, 1, 0]])
GRAMS = {"mllm_gram": X_V.T @ X_V / 4, "math_gram": X_E.T @ X_E / 4}


def test_grams_are_means_over_tokens():
    assert close(GRAMS["mllm_gram"], [[1.5, 0.75, 1], [0.75, 0.75, 0.5], [1, 0.5, 1.5]])
    assert close(GRAMS["math_gram"], [[0.5, 0.25, 1], [0.25, 1.5, 1.25], [1, 1.25, 2.75]])


def test_fisher_matches_its_numbers():
    expected = [
        [0.7321428061225073, -1.1985292301038917, 2.21875],
        [1.25000014999988, 0.262499760000768, -0.5170453739670008],
    ]
    absolute = {"floor": 1e-6, "floor_is": "absolute", **FISHER}
    assert close(merged_by("fisher", scope="none", **absolute), expected)
    by_norm = [
        [0.5998745010855872, -1.1370106988154933, 2.2569022157975835],
        [1.3576856032931162, 0.21942549578081882, -0.6547869750497827],
    ]
    assert close(merged_by("fisher", scope="tensor", **absolute), by_norm)
    assert close(merged_by("fisher", **absolute), by_norm)  # no statistic: this matrix


def test_fisher_norms_and_means_of_the_whole_model_are_one_pass():
    fisher = METHODS["fisher"]
    matrices = [(W0, W_V, [W_E], FISHER), (W0, W_V, [W_E], FISHER)]
    found = fisher.statistic.over(lambda: matrices, fisher.complete({}))
    norms = 2**0.5 * 4.716990566028302, 2**0.5 * 1.9882467150733583
    assert found == pytest.approx((*norms, 8.5 / 6, 3.375 / 6))
    merged = merged_by("fisher", statistic=found, **FISHER)
    # two equal matrices: the mean stays, the norm and what the floor is beside it do not
    assert torch.allclose(merged, merged_by("fisher", **FISHER), atol=1e-3)


def test_equal_information_gives_the_weighted_mean():
    same = {"mllm_fisher": FISHER["mllm_fisher"], "math_fisher": FISHER["mllm_fisher"]}
    assert close(merged_by("fisher", **same), ((W_V + W_E) / 2).tolist())
    merged = merged_by("fisher", alpha=0.8, **same)
    assert close(merged, (0.8 * W_V + 0.2 * W_E).tolist())


@pytest.mark.parametrize("floor", [0, 1e-6])
def test_no_information_gives_the_weighted_mean(floor):
    nothing = {"mllm_fisher": 0 * W0, "math_fisher": 0 * W0}
    for scope in ("none", "tensor"):
        merged = merged_by("fisher", alpha=0.75, floor=floor, scope=scope, **nothing)
        assert close(merged, (0.75 * W_V + 0.25 * W_E).tolist())


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (
            {"off_diagonal": 1.0},
            [
                [0.5347222222222217, -0.5520833333333336, 2.288194444444445],
                [1.5034722222222225, -0.02083333333333329, -0.4930555555555557],
            ],
        ),
        (
            {"off_diagonal": 0.9},
            [
                [0.5944894377801214, -0.5719527199226647, 2.2660575402056424],
                [1.4665255075138413, 0.009925081290095793, -0.4920742156604272],
            ],
        ),
        (
            {"off_diagonal": 0.1},
            [
                [0.8231261261930222, -0.6643994297255553, 2.241563452932557],
                [1.298051314799414, 0.14034840204348342, -0.5194373490158807],
            ],
        ),
        (
            {"off_diagonal": 0.0},
            [
                [0.84375, -0.6666666666666666, 2.2463235294117645],
                [1.28125, 0.14583333333333331, -0.5257352941176471],
            ],
        ),
        (
            {"off_diagonal": 0.9, "alpha": 0.8},
            [
                [0.7618437006630879, -0.8503162824965792, 2.2210146826649826],
                [1.3268853804862644, 0.09037917061361976, -0.25278923271234605],
            ],
        ),
    ],
)
def test_regmean_matches_its_numbers(parameters, expected):
    assert close(merged_by("regmean", **parameters, **GRAMS), expected, 1e-9)


def test_diagonals_stand_for_grams_without_products():
    diagonals = {name: gram.diagonal() for name, gram in GRAMS.items()}
    merged = merged_by("regmean", **diagonals)
    assert close(merged, merged_by("regmean", off_diagonal=0, **GRAMS).tolist())
    mixed = {"mllm_gram": GRAMS["mllm_gram"], "math_gram": diagonals["math_gram"]}
    full = {"mllm_gram": GRAMS["mllm_gram"], "math_gram": torch.diag(diagonals["math_gram"])}
    assert close(merged_by("regmean", **mixed), merged_by("regmean", **full).tolist())


def test_equal_grams_give_the_plain_mean():
    gram = GRAMS["mllm_gram"]
    merged = merged_by("regmean", mllm_gram=gram, math_gram=gram)
    assert close(merged, ((W_V + W_E) / 2).tolist())


def test_an_expert_that_saw_nothing_changes_nothing():
    merged = merged_by("regmean", mllm_gram=GRAMS["mllm_gram"], math_gram=0 * GRAMS["math_gram"])
    assert close(merged, W_V.tolist(), 1e-9)


def test_the_result_is_least_squares_on_the_models_own_inputs():
    merged = merged_by("regmean", off_diagonal=1.0, **GRAMS)
    point = merged.clone().requires_grad_()
    loss = sum(((X @ (point - W).T) ** 2).sum() for X, W in ((X_V, W_V), (X_E, W_E)))
    loss.backward()
    assert float(point.grad.abs().max()) < 1e-12


def test_inputs_no_model_has_seen_get_the_mean():
    generator = torch.Generator().manual_seed(0)
    mllm, math = torch.randn(2, 5, 12, generator=generator)
    inputs = torch.randn(2, 8, 12, generator=generator)
    inputs[:, :, 9:] = 0  # and only eight samples for the rest: singular Gram matrices
    grams = [X.T @ X / 8 for X in inputs]
    merged = METHODS["regmean"](
        mllm, mllm, math, off_diagonal=1, mllm_gram=grams[0], math_gram=grams[1]
    )
    assert torch.allclose(merged[:, 9:], (mllm + math)[:, 9:] / 2, atol=1e-6)
    assert float(merged.abs().max()) < 30
    nothing = torch.zeros(12, 12)
    merged = METHODS["regmean"](mllm, mllm, math, mllm_gram=nothing, math_gram=nothing)
    assert torch.allclose(merged, (mllm + math) / 2)


def test_grams_that_are_none_are_refused():
    with pytest.raises(PlanError, match="not positive semidefinite"):
        merged_by(
            "regmean",
            mllm_gram=f64([[1, 5, 0], [5, 1, 0], [0, 0, 1]]),
            math_gram=f64([[1, 5, 0], [5, 1, 0], [0, 0, 1]]),
        )


def test_missing_too_few_and_misshapen_data_are_refused_in_words():
    with pytest.raises(PlanError, match="Gram matrix of every model and got none for the MLLM"):
        merged_by("regmean")
    with pytest.raises(PlanError, match="none for the math model"):
        merged_by("fisher", mllm_fisher=FISHER["mllm_fisher"])
    with pytest.raises(PlanError, match="of 1 math models; expected 2"):
        METHODS["regmean"](W0, W_V, [W_E, W_E], **GRAMS)
    with pytest.raises(ShapeError, match=r"shape \(3, 3\); expected \(2, 3\)"):
        merged_by("fisher", mllm_fisher=X_V.T @ X_V, math_fisher=X_V.T @ X_V)


def test_several_experts_share_what_the_mllm_leaves():
    grams = {"mllm_gram": GRAMS["mllm_gram"], "math_gram": [GRAMS["math_gram"]] * 2}
    twice = METHODS["regmean"](W0, W_V, [W_E, W_E], **grams)
    assert torch.allclose(twice, merged_by("regmean", **GRAMS), atol=1e-12)
    data = {"mllm_fisher": FISHER["mllm_fisher"], "math_fisher": [FISHER["math_fisher"]] * 2}
    twice = METHODS["fisher"](W0, W_V, [W_E, W_E], **data)
    assert torch.allclose(twice, merged_by("fisher", **FISHER), atol=1e-12)
