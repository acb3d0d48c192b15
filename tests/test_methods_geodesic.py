"""SLERP, NuSLERP and the Karcher mean against numbers computed independently in float64."""

from __future__ import annotations

import pytest
import torch
from method_definitions import defined
from small_matrices import W0, W_E, W_V, close, f64, merged_by

from ipmerge_core.methods import METHODS, linear

pytestmark = pytest.mark.shapes

SLERP = [
    [0.7729107125461704, -0.9272204999515041, 2.2716078309818197],
    [1.420861336973232, 0.2188324947441398, -0.33728838633714225],
]


def test_slerp_matches_its_numbers():
    assert close(merged_by("slerp", t=0.4), SLERP)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"of": "weights"}, SLERP),
        (
            {},
            [
                [0.9148638087453147, -0.7623188630952752, 2.3757294774113955],
                [1.3124946549069536, 0.16585121348063092, -0.028790277709276446],
            ],
        ),
        (
            {"per": "row"},
            [
                [0.9218132129236192, -0.7561391113794175, 2.383366772448],
                [1.2924498801282938, 0.14907890664915066, 0.07163857973181365],
            ],
        ),
        (
            {"per": "column"},
            [
                [1.3719678464333946, 6.552320767525933, 2.28960879455836],
                [1.152702756553089, -2.2737876643122426, -0.17190711365901534],
            ],
        ),
    ],
)
def test_nuslerp_matches_its_numbers(parameters, expected):
    assert close(merged_by("nuslerp", t=0.4, **parameters), expected, 1e-11)


def test_the_ends_of_the_arc_are_the_models():
    for name in ("slerp", "nuslerp"):
        assert torch.equal(merged_by(name, t=0), W_V)
        assert close(merged_by(name, t=1), W_E.tolist())


def test_light_fine_tunes_are_so_close_that_slerp_is_linear():
    generator = torch.Generator().manual_seed(0)
    base, a, b = torch.randn(3, 60, 50, generator=generator)
    mllm, math = base + 0.01 * a, base + 0.01 * b
    merged = METHODS["slerp"](base, mllm, math, t=0.3)
    assert torch.allclose(merged, linear(base, mllm, math, alpha=0.7), atol=1e-6)
    on_task_vectors = METHODS["nuslerp"](base, mllm, math, t=0.3)
    assert not torch.allclose(on_task_vectors, merged, atol=1e-4)


def test_opposite_weights_are_walked_through_the_middle():
    merged = METHODS["slerp"](W0, W_V, -W_V, t=0.25)
    assert close(merged, (0.5 * W_V).tolist())


def test_opposite_and_zero_task_vectors_are_walked_in_a_straight_line():
    zero, one = f64([[0.0, 0.0]]), f64([[1.0, 2.0]])
    for per in ("tensor", "row", "column"):
        nuslerp = METHODS["nuslerp"]
        assert close(nuslerp(zero, one, -one, t=0.25, per=per), [[0.5, 1.0]])
        assert close(nuslerp(zero, one, zero, t=0.25, per=per), [[0.75, 1.5]])
    assert close(METHODS["slerp"](zero, one, zero, t=0.25), [[0.75, 1.5]])


def test_karcher_matches_its_numbers():
    expected = [
        [0.7194582487950107, -0.8520812095432583, 2.2925880021392295],
        [1.4786465504432087, 0.1972731019023129, -0.4094272125710438],
    ]
    assert close(merged_by("karcher"), expected)


def test_karcher_of_several_matches_the_iteration_on_whole_vectors():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64) + 1
    merged = METHODS["karcher"](matrices[0], matrices[0], list(matrices[1:]))
    expected = defined("karcher", matrices[0], matrices[0], list(matrices[1:]))
    assert torch.allclose(merged, expected, atol=1e-12)
    assert abs(float(merged.norm()) - float(matrices.flatten(1).norm(dim=1).mean())) < 1e-9


def test_karcher_shares_and_zero_matrices():
    assert close(merged_by("karcher", alpha=1.0), W_V.tolist())
    assert close(merged_by("karcher", alpha=0.0), W_E.tolist())
    zero = torch.zeros_like(W_V)
    assert close(METHODS["karcher"](W0, W_V, zero), (0.5 * W_V).tolist())
    assert close(METHODS["karcher"](zero, zero, zero), zero.tolist())
    assert close(METHODS["karcher"](W0, W_V, W_V), W_V.tolist())
