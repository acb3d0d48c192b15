"""RAM, Multi-SLERP, Model Stock, STAR and the filters of WUDI against numbers of other programs.

The numbers of the first three are what the functions of mergekit 0.1.5 compute in fp64 from the
same matrices (`ram_merge`, `ramplus_tl_merge`, `multislerp`, `model_stock_merge_method`), those of
STAR what its authors' function computes (`star` at commit e6bfcf7 of IBM/STAR, averaged as there);
those of the filters are of an eigendecomposition by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from small_matrices import W0, W_E, W_V, close, f64

from ipmerge_core.methods import METHODS

pytestmark = pytest.mark.shapes

# Task vectors with zeros, as reinforcement learning leaves them.
A = W0 + f64([[0.5, 0.0, 0.125], [-0.375, 0.0, 0.0]])
B = W0 + f64([[0.0, 0.625, 0.3125], [0.25, 0.0, 0.0]])
C = W0 + f64([[0.125, -0.5, 0.0], [0.0, 0.25, 0.5]])


def merged(name, models, **parameters):
    return METHODS[name](W0, models[0], models[1:], **parameters)


@pytest.mark.parametrize(
    ("models", "parameters", "expected"),
    [
        ([W_V, W_E], {}, [[0.6875, -0.8125, 2.21875], [1.4375, 0.1875, -0.40625]]),
        ([A, B], {}, [[1.0, -0.375, 2.21875], [1.4375, 0.25, -0.75]]),
        (
            [A, B],
            {"boost": 0.5, "boost_cap": 0.9},
            [[1.225, -0.09375, 2.21875], [1.4375, 0.25, -0.75]],
        ),
        ([A, B, C], {}, [[0.8125, -0.9375, 2.21875], [1.4375, 0.5, -0.25]]),
        (
            [A, B, C],
            {"boost": 0.5, "boost_cap": 0.9},
            [[0.8125, -0.9375, 2.21875], [1.4375, 0.6125, -0.025]],
        ),
    ],
)
def test_ram_matches_its_numbers(models, parameters, expected):
    assert close(merged("ram", models, **parameters), expected, 1e-7)  # mergekit has an fp32 factor


def test_ram_ignores_changes_up_to_epsilon():
    assert close(merged("ram", [A, B], epsilon=1.0), W0.tolist())
    kept = merged("ram", [A, B], epsilon=0.4)
    assert close(kept - W0, [[0.5, 0.625, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("models", "of", "expected"),
    [
        (
            [W_V, W_E],
            "weights",
            [
                [0.7194582487655606, -0.8520812095023721, 2.292588002142506],
                [1.478646550467788, 0.19727310189073347, -0.4094272126063491],
            ],
        ),
        (
            [W_V, W_E],
            "task_vectors",
            [
                [0.7755933313592664, -0.5355282807888163, 2.436951234717538],
                [1.4606017750613327, 0.10042271548104759, -0.20277258409647425],
            ],
        ),
        (
            [A, B, C],
            "task_vectors",
            [
                [1.0411478725151573, -0.9423813221360321, 2.253916166951581],
                [1.2378018071840178, 0.3526512684466372, -0.5446974631067256],
            ],
        ),
    ],
)
def test_multislerp_matches_its_numbers(models, of, expected):
    found = merged("multislerp", models, alpha=0.5, of=of)
    assert close(found, expected, 3e-9)  # mergekit adds 1e-8 to every norm


def test_multislerp_of_opposite_changes_is_their_mean():
    found = METHODS["multislerp"](W0, A, 2 * W0 - A, alpha=0.5)
    assert close(found, W0.tolist(), 1e-12)
    assert close(METHODS["multislerp"](W0, A, W0, alpha=0.5), (W0 + (A - W0) / 2).tolist())


@pytest.mark.parametrize(
    ("models", "per", "expected"),
    [
        (
            [W_V, W_E],
            "tensor",
            [
                [0.22911459044034843, -1.270885409559652, 1.6839670221804068],
                [1.590295136519884, 0.34029513651988397, -1.2466232508593618],
            ],
        ),
        (
            [W_V, W_E],
            "row",
            [
                [0.2030782238767328, -1.2969217761232668, 1.6535912611895212],
                [1.6646943237927094, 0.4146943237927092, -1.655818780859901],
            ],
        ),
        (
            [A, B, C],
            "row",
            [[0.3322418207181499, -1.0335516358563699, 1.882569274502705], [1.625, 0.0, -1.25]],
        ),
    ],
)
def test_model_stock_matches_its_numbers(models, per, expected):
    assert close(merged("model_stock", models, per=per), expected)


def test_model_stock_of_the_experts_is_added_to_the_mllm():
    one = METHODS["model_stock"](W0, A, B, models="experts")
    assert close(one, (A + B - W0).tolist())
    same = METHODS["model_stock"](W0, A, [B, B], models="experts")
    assert close(same, (A + B - W0).tolist())
    opposite = METHODS["model_stock"](W0, A, [B, 2 * W0 - B], models="experts")
    assert close(opposite, A.tolist())


@pytest.mark.parametrize(
    ("models", "eta", "expected"),
    [
        (
            [W_V, W_E],
            0.4,
            [
                [0.48328287556930594, -0.6381001656502465, 2.041233864667844],
                [1.1551276487669642, 0.2080582454787937, -0.2709186756885693],
            ],
        ),
        (
            [W_V, W_E],
            0.7,
            [
                [0.6291368699799684, -0.7366048802992227, 2.250346956015113],
                [1.3563237219175122, 0.14042194336217587, -0.44311136499686116],
            ],
        ),
        (
            [A, B, C],
            0.4,
            [
                [0.716334610421334, -0.893991859060855, 2.0390777626595975],
                [1.3307156866732122, 0.4631042170370212, -0.6118383065234222],
            ],
        ),
        (
            [A, B, C],
            0.7,
            [
                [0.7304092553389462, -0.8837977340833404, 2.1720631719555237],
                [1.3639620389971936, 0.3333333333333333, -0.605409255338946],
            ],
        ),
    ],
)
def test_star_matches_its_numbers(models, eta, expected):
    assert close(merged("star", models, eta=eta), expected)


def test_the_filters_of_wudi_follow_the_strength_of_each_direction():
    zero = torch.zeros(2, 2, dtype=torch.float64)
    tau, other = f64([[2.0, 0.0], [0.0, 0.0]]), f64([[0.0, 0.0], [1.0, 1e-2]])
    solved = METHODS["wudi"](zero, tau, other, closed_form=True)
    kept_one = METHODS["wudi"](
        zero, tau, other, closed_form=True, spectral_filter="swudi", kept=0.5
    )
    grams = [x.T @ x / x.square().sum() for x in (tau, other)]
    e, V = torch.linalg.eigh(sum(grams))
    f = f64([0.0, 1 - math.exp(-300 * float(e[1]))])
    X0 = tau + other
    assert close(kept_one, (X0 + (solved - X0) @ V @ torch.diag(f) @ V.T).tolist(), 1e-9)
    whole = METHODS["wudi"](zero, tau, tau, closed_form=True, spectral_filter="aswudi")
    assert close(whole, tau.tolist())
