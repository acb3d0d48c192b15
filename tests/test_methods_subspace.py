"""TSV, Iso and KnOTS against numbers and against slow definitions in float64."""

from __future__ import annotations

import pytest
import torch
from method_definitions import defined
from small_matrices import W0, W_E, W_V, close, f64, merged_by

from ipmerge_core.methods import METHODS, task_arithmetic
from ipmerge_core.methods.subspace import orthogonalised_pair, polar
from ipmerge_core.spectral.spectrum import svd

pytestmark = pytest.mark.shapes

A45 = f64([[0.7 * (i + 1) * (j + 2) for j in range(5)] for i in range(4)]).sin()
B45 = 0.5 * f64([[0.9 * (i + 2) * (j + 1) for j in range(5)] for i in range(4)]).cos()
ZERO = torch.zeros(4, 5, dtype=torch.float64)

TWO_BY_THREE = [
    (
        "tsv",
        {},
        [
            [-0.08551375640708528, 0.7305114586719613, 0.1554598883983938],
            [-0.49166822255077824, -0.19142719187951565, 0.6764890579397543],
        ],
    ),
    (
        "iso_c",
        {},
        [
            [0.43056795603287584, 0.43056795603287584, 0.30713834764831843],
            [-0.21717960838455735, -0.21717960838455727, 0.6089150429449554],
        ],
    ),
    (
        "iso_cts",
        {"common_fraction": 0.8},
        [
            [0.43056795603287584, 0.43056795603287584, 0.30713834764831843],
            [-0.21717960838455735, -0.21717960838455727, 0.6089150429449554],
        ],
    ),
    (
        "iso_cts",
        {"common_fraction": 0.0},
        [
            [-0.08874527192529116, 0.783216186756262, 0.1625767930991782],
            [-0.4607718305466064, -0.18376330549482806, 0.6337624948424061],
        ],
    ),
    (
        "knots_ties",
        {"density": 0.5},
        [[0.4478868094553948, 0.625, 0.125], [-0.4293616560010377, -0.1875, 0.75]],
    ),
    (
        "knots_ties",
        {"density": 1.0},
        [
            [0.5064569322188801, 0.625, -0.033047784902697525],
            [-0.36826447825518693, -0.1875, 0.5851331164947092],
        ],
    ),
]
FOUR_BY_FIVE = [
    (
        "tsv",
        {},
        [
            [-0.0918210142, -0.4837303187, 1.0278239538, -0.2085006540, -0.7330278818],
            [-0.3995560975, -0.9505338627, -0.5288277425, 0.6165014049, 1.0820352808],
            [-0.4860261129, 0.9386904697, 0.5072711458, -0.9216719742, -0.0079084126],
            [-0.1588584401, 0.9055394555, -0.9320030475, 1.1026601320, -1.0784504080],
        ],
    ),
    (
        "iso_c",
        {},
        [
            [0.6965313757, 0.2357035208, 1.2123822810, 0.4990488325, -0.6294922100],
            [-0.0698540573, -0.4346483607, 0.2134963112, 1.1302910317, 1.0672187236],
            [-1.2066587967, 0.3064067301, 0.9368817975, -0.3918085145, 0.2733516627],
            [-0.7937104992, 0.3099296534, -0.4597933132, 0.9795414306, -0.8711768077],
        ],
    ),
    (
        "iso_cts",
        {"common_fraction": 0.5},
        [
            [0.3458049112, -0.0976448621, 1.4344567790, 0.5868519106, -0.6171306191],
            [-0.3903826756, -0.7330156970, 0.0979040722, 1.0136354523, 1.0887031228],
            [-1.3669022272, 0.2370847113, 0.7100117259, -0.6595498346, 0.2197127176],
            [-0.8495202107, 0.3071015302, -0.5651422358, 0.9517622722, -0.9331634716],
        ],
    ),
]


@pytest.mark.parametrize(("name", "parameters", "expected"), TWO_BY_THREE)
def test_two_by_three_matches_its_numbers(name, parameters, expected):
    assert close(merged_by(name, **parameters) - W0, expected, 1e-9)


@pytest.mark.parametrize(("name", "parameters", "expected"), FOUR_BY_FIVE)
def test_four_by_five_matches_its_numbers(name, parameters, expected):
    assert close(METHODS[name](ZERO, A45, B45, **parameters), expected, 1e-9)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (W_V - W0, [0.8581007191083504, 0.546643765047889]),
        (W_E - W0, [0.7515384108093175, 0.20164019212003723]),
        (W_V + W_E - 2 * W0, [0.8342069799545996, 0.5297746828558594]),
        (A45, [2.1298325697237033, 2.1185035393961824, 1.4970566107039411, 0.004948912935439116]),
        (B45, [1.2897017215328765, 0.6346478264140464, 0.038768909348958526, 0.02440647350217481]),
        (
            A45 + B45,
            [2.5019318801334, 2.1501641082099936, 1.7270545021616954, 0.1396139102760625],
        ),
    ],
)
def test_singular_values_match_their_numbers(matrix, expected):
    assert svd(matrix).S.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_task_vector_in_its_own_knots_is_itself():
    merged = METHODS["knots_ties"](ZERO, A45, ZERO, density=1)
    assert torch.allclose(merged, A45, atol=1e-12)
    half = METHODS["knots_ties"](ZERO, A45, B45, mllm_density=1, math_density=0.5, density=0.1)
    assert not torch.allclose(half, METHODS["knots_ties"](ZERO, A45, B45, density=0.5))


def drawn(shape, experts, seed):
    """A base, an MLLM and experts in fp64."""
    generator = torch.Generator().manual_seed(seed)
    base, *taus = torch.randn(2 + experts, *shape, generator=generator, dtype=torch.float64)
    mllm, *others = (base + tau for tau in taus)
    return base, mllm, others


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("tsv", {"scale": 0.7}),
        ("iso_c", {"mllm_weight": 0.9, "math_weight": 0.4, "scale": 0.7}),
        ("iso_cts", {"common_fraction": 0.6}),
        ("knots_ties", {"density": 0.3, "scale": 0.7, "math_weight": 0.5, "normalize": True}),
        ("knots_ties", {"density": 0.3, "scale": 0.7, "math_weight": 0.5, "normalize": False}),
    ],
)
def test_in_float64_a_method_is_its_definition(name, choice, experts, shape):
    models = drawn(shape, experts, 5)
    merged = METHODS[name](*models, **choice)
    assert torch.allclose(merged, defined(name, *models, **choice), atol=1e-8)


def test_the_polar_factor_of_two_bases_needs_only_their_overlap():
    generator = torch.Generator().manual_seed(1)
    A, B = torch.linalg.qr(torch.randn(2, 40, 9, generator=generator, dtype=torch.float64)).Q
    first, second = orthogonalised_pair(A, B)
    both = torch.cat([first, second], dim=1)
    assert torch.allclose(both, polar(torch.cat([A, B], dim=1)), atol=1e-12)
    assert torch.allclose(both.T @ both, torch.eye(18, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_models_with_one_task_vector_share_its_directions(dtype):
    generator = torch.Generator().manual_seed(2)
    base, tau = torch.randn(2, 10, 14, generator=generator).to(dtype)
    merged = METHODS["tsv"](base, base + tau, base + tau)
    U, S, Vh = torch.linalg.svd(tau, full_matrices=False)
    top_half = (U[:, :5] * S[:5]) @ Vh[:5]
    assert torch.allclose(merged, base + top_half, atol=1e-4)


def test_a_task_vector_alone_is_kept_whole():
    for weights in ({}, {"math_weight": 0.0}):
        math = ZERO if not weights else B45
        assert torch.equal(METHODS["tsv"](ZERO, A45, math, **weights), A45)


def test_one_row_gets_the_mean_of_the_task_vectors():
    merged = METHODS["tsv"](ZERO[:1], A45[:1], B45[:1])
    assert torch.allclose(merged, (A45[:1] + B45[:1]) / 2)


def test_tsv_weights_scale_the_singular_values():
    found = [METHODS["tsv"](ZERO, A45, B45, math_weight=w) for w in (0.5, 1.0, 1.5)]
    assert torch.allclose(found[1] - found[0], found[2] - found[1], atol=1e-12)


def test_iso_c_levels_the_spectrum_of_the_sum_and_keeps_its_rank():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 3, generator=generator), torch.randn(3, 7, generator=generator)
    base = torch.zeros(9, 7)
    merged = METHODS["iso_c"](base, left @ right, base)
    S = torch.linalg.svdvals(merged)
    expected = torch.linalg.svdvals(left @ right)[:3].mean()
    assert torch.allclose(S[:3], expected.expand(3), rtol=1e-4)
    assert float(S[3:].max()) < 1e-4


def test_iso_cts_with_everything_common_is_iso_c():
    merged = METHODS["iso_cts"](ZERO, A45, B45, common_fraction=1.0)
    assert torch.allclose(merged, METHODS["iso_c"](ZERO, A45, B45), atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8)])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("normalize", [True, False, "count"])
@pytest.mark.parametrize("trim", ["exact", "official"])
def test_knots_matches_its_definition_in_float64(shape, experts, normalize, trim):
    generator = torch.Generator().manual_seed(6)
    base, *taus = torch.randn(2 + experts, *shape, generator=generator, dtype=torch.float64)
    choice = {"density": 0.3, "scale": 0.7, "math_weight": 0.5, "normalize": normalize}
    models = base, base + taus[0], [base + t for t in taus[1:]]
    merged = METHODS["knots_ties"](*models, trim=trim, **choice)
    U, S, Vh = torch.linalg.svd(torch.cat(taus, dim=1), full_matrices=False)
    kept = 1e-5 * S[0] < S
    parts = []
    for P in (S[kept, None] * Vh[kept]).split(shape[1], dim=1):
        order = P.abs().flatten().argsort(descending=True, stable=True)
        trimmed = torch.zeros(P.numel(), dtype=torch.float64)
        most = order[: int(0.3 * P.numel()) + (trim == "official")]
        trimmed[most] = P.flatten()[most]
        parts.append(trimmed.view(P.shape))
    elected = sum(parts).sign()
    top, bottom = torch.zeros_like(elected), torch.zeros_like(elected)
    for weight, part in zip([1.0] + [0.5] * experts, parts, strict=True):
        agrees = (part.sign() == elected) & (part != 0)
        top += weight * part * agrees
        bottom += (1 if normalize == "count" else weight) * agrees
    delta = top / bottom.where(bottom > 0, 1) if normalize else top
    assert torch.allclose(merged, base + 0.7 * U[:, kept] @ delta, atol=1e-8)


def test_knots_with_full_density_and_no_normalisation_is_task_arithmetic_where_signs_agree():
    positive = ZERO + 1
    merged = METHODS["knots_ties"](ZERO, positive, 2 * positive, density=1, normalize=False)
    expected = task_arithmetic(ZERO, positive, 2 * positive, math_weight=1.0)
    assert torch.allclose(merged, expected, atol=1e-9)


def test_small_task_vectors_survive_the_relative_cutoff():
    small = METHODS["knots_ties"](ZERO, 1e-6 * A45, 1e-6 * B45, density=0.5)
    large = METHODS["knots_ties"](ZERO, A45, B45, density=0.5)
    assert torch.allclose(1e6 * small, large, atol=1e-9)
