"""Angles, similarities and IP-Merging's update: laws, and the formula written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_svd_algorithms import mixed_precision_from_256, planted  # noqa: F401

from ipmerge_core.errors import PlanError, ShapeError
from ipmerge_core.spectral import similarity as sim
from ipmerge_core.spectral.spectrum import Spectrum, svd

pytestmark = pytest.mark.shapes

SHAPES = [(12, 12), (20, 12), (12, 20), (1, 6), (6, 1)]


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def pair(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor, Spectrum, Spectrum]:
    """Two task vectors that share some directions, with their spectra."""
    dV = matrix(m, n)
    dM = 0.6 * dV + 0.8 * matrix(m, n, seed=1)
    return dV, dM, svd(dV), svd(dM)


def update_by_definition(
    dV: torch.Tensor, dM: torch.Tensor, *, temperature: float = 32.0, norm: str = "sum"
) -> torch.Tensor:
    """P as the paper writes it: in fp64, with n x n matrices and no short cuts."""
    dV, dM = dV.double(), dM.double()
    _, S_V, Vh_V = torch.linalg.svd(dV, full_matrices=False)
    _, S_M, Vh_M = torch.linalg.svd(dM, full_matrices=False)
    s = torch.stack([torch.dot(v, w).abs() for v, w in zip(Vh_V, Vh_M, strict=True)])
    gamma = torch.exp(temperature * s) / torch.exp(temperature * s).sum()
    if norm == "max":
        gamma = gamma / gamma.max()
    weighted = Vh_V.T @ torch.diag(gamma)
    return S_V.sum() / S_M.sum() * dM @ (weighted @ weighted.T)


# --- angles ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_task_vector_is_wholly_similar_to_itself(shape):
    a = svd(matrix(*shape))
    angles = sim.corresponding_angles(a, a)
    torch.testing.assert_close(angles, torch.ones(min(shape)))
    found = sim.similarities(angles, a, a)
    assert found == pytest.approx({"first": 1, "max": 1, "weighted": 1}, abs=1e-6)
    assert max(found.values()) <= 1


def test_similarity_is_unchanged_by_signs_and_scaling():
    _, dM, a, b = pair(20, 12)
    angles = sim.corresponding_angles(a, b)
    for factor in (-1.0, 3.0, -1e-4):
        other = svd(factor * dM)
        again = sim.corresponding_angles(a, other)
        torch.testing.assert_close(again, angles, rtol=1e-4, atol=1e-5)
        assert sim.similarities(again, a, other) == pytest.approx(
            sim.similarities(angles, a, b), abs=1e-5
        )
    flipped = Spectrum(a.U, a.S, -a.Vh)
    assert torch.equal(sim.corresponding_angles(flipped, b), angles)


def test_similarity_is_symmetric():
    _, _, a, b = pair(20, 12)
    assert torch.equal(sim.corresponding_angles(a, b), sim.corresponding_angles(b, a))


def test_angles_match_directions_by_index_not_by_likeness():
    a = svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    b = svd(torch.diag(torch.tensor([2.0, 3.0, 1.0])))
    assert sim.corresponding_angles(a, b).tolist() == [0, 0, 1]
    assert sim.principal_cosines(a, b, 2).tolist() == pytest.approx([1, 1])


def test_angles_stop_where_the_shorter_spectrum_does():
    _, _, a, b = pair(20, 12)
    short = svd(matrix(20, 12, seed=1), rank=3)
    assert sim.corresponding_angles(a, short).shape == (3,)
    assert sim.corresponding_angles(short, b).shape == (3,)


def test_a_zero_task_vector_is_similar_to_nothing():
    zero, other = svd(torch.zeros(6, 5)), svd(matrix(6, 5))
    for a, b in [(zero, other), (other, zero), (zero, zero)]:
        angles = sim.corresponding_angles(a, b)
        assert torch.count_nonzero(angles) == 0
        assert sim.similarities(angles, a, b) == {"first": 0, "max": 0, "weighted": 0}


def test_directions_without_strength_have_no_angle():
    rank_one = svd(torch.outer(matrix(6, 1)[:, 0], matrix(5, 1, seed=1)[:, 0]))
    angles = sim.corresponding_angles(rank_one, rank_one)
    torch.testing.assert_close(angles, torch.tensor([1.0, 0, 0, 0, 0]))


def test_weighted_similarity_follows_its_formula():
    _, _, a, b = pair(20, 12)
    angles = sim.corresponding_angles(a, b)
    expected = (a.S * b.S * angles).sum() / (a.S * b.S).sum()
    assert sim.similarity_of(angles, a, b, "weighted") == pytest.approx(float(expected), rel=1e-5)
    assert sim.similarity_of(angles, a, b, "first") == float(angles[0])
    assert sim.similarity_of(angles, a, b, "max") == float(angles.max())


def test_principal_cosines_are_those_of_the_subspaces():
    _, _, a, b = pair(20, 12)
    cosines = sim.principal_cosines(a, b, 5)
    assert (cosines.diff() <= 0).all()
    mix = torch.linalg.qr(matrix(5, 5)).Q
    turned = Spectrum(None, a.S[:5], mix @ a.Vh[:5])
    torch.testing.assert_close(sim.principal_cosines(turned, b, 5), cosines)
    torch.testing.assert_close(sim.principal_cosines(a, a, 5), torch.ones(5))
    torch.testing.assert_close(sim.principal_cosines(a, b, 1), sim.corresponding_angles(a, b)[:1])


@pytest.mark.parametrize("kind", ["first", "max", "weighted"])
def test_the_chance_level_is_what_unrelated_bases_show(kind):
    n, repeats = 64, 40
    found = [
        sim.similarities(sim.corresponding_angles(a, b), a, b)[kind]
        for a, b in (
            (svd(matrix(n, n, 2 * i)), svd(matrix(n, n, 2 * i + 1))) for i in range(repeats)
        )
    ]
    tolerance = 0.3 if kind == "first" else 0.1
    assert sim.chance_level(n, kind) == pytest.approx(sum(found) / repeats, rel=tolerance)


def test_the_chance_level_falls_with_width_and_rises_with_directions():
    assert sim.chance_level(4096, "first") == pytest.approx(0.8 / 64, rel=0.01)
    assert sim.chance_level(4096, "max", 64) < sim.chance_level(4096, "max")
    assert sim.chance_level(1, "first") < 1
    assert sim.chance_level(2, "max", 1000) == 1


# --- weights ---


def test_importance_sums_to_one_or_peaks_at_one():
    angles = torch.tensor([0.1, 0.9, 0.5])
    by_sum, by_max = sim.importance(angles), sim.importance(angles, gamma_norm="max")
    assert float(by_sum.sum()) == pytest.approx(1)
    assert float(by_max.max()) == 1
    torch.testing.assert_close(by_sum / by_sum.max(), by_max)
    assert float(by_sum[1] / by_sum[2]) == pytest.approx(math.exp(32 * 0.4), rel=1e-4)


def test_importance_at_high_temperature_does_not_overflow():
    assert sim.importance(torch.tensor([1.0, 0.2]), 1e6).tolist() == [1, 0]


def test_the_plain_projector_takes_the_first_directions():
    assert sim.top_k_importance(torch.zeros(4), 2).tolist() == [1, 1, 0, 0]
    assert sim.top_k_importance(torch.zeros(2), 9).tolist() == [1, 1]


def test_the_nuclear_ratio_brings_the_math_vector_to_the_same_strength():
    _, dM, a, b = pair(20, 12)
    rho = sim.nuclear_ratio(a, b)
    assert float(svd(rho * dM).S.sum()) == pytest.approx(float(a.S.sum()), rel=1e-5)
    zero = svd(torch.zeros(20, 12))
    assert sim.nuclear_ratio(a, zero) == 0
    assert sim.nuclear_ratio(zero, b) == 0


# --- the update ---


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    temperature=st.sampled_from([1.0, 8.0, 32.0, 100.0]),
    norm=st.sampled_from(["sum", "max"]),
    seed=st.integers(0, 99),
)
def test_the_update_is_the_formula_of_the_paper(m, n, temperature, norm, seed):
    dV = matrix(m, n, seed)
    dM = 0.6 * dV + 0.8 * matrix(m, n, seed + 1000)
    a, b = svd(dV), svd(dM)
    gamma = sim.importance(sim.corresponding_angles(a, b), temperature, norm)
    P = sim.projected_update(dM, a, gamma, sim.nuclear_ratio(a, b))
    truth = update_by_definition(dV, dM, temperature=temperature, norm=norm)
    assert (P - truth).norm() <= 1e-3 * truth.norm()


@pytest.mark.parametrize("shape", [(400, 400), (900, 400), (400, 900)], ids=str)
def test_the_update_stays_right_on_the_fast_route(shape):
    dV, dM = planted(*shape), 0.6 * planted(*shape) + 0.8 * planted(*shape, seed=1)
    a, b = svd(dV, vectors="right"), svd(dM, vectors="right")
    assert a.method == "gram"
    gamma = sim.importance(sim.corresponding_angles(a, b))
    P = sim.projected_update(dM, a, gamma, sim.nuclear_ratio(a, b))
    truth = update_by_definition(dV, dM)
    assert (P - truth).norm() <= 1e-3 * truth.norm()


def test_all_directions_at_full_weight_leave_the_math_vector_as_it_is():
    _, dM, a, _ = pair(20, 12)
    P = sim.projected_update(dM, a, torch.ones(12), 2.0)
    torch.testing.assert_close(P, 2 * dM)


def test_what_is_dropped_is_below_rounding():
    dV = planted(300, 200)
    dM = dV + 1e-3 * matrix(300, 200)
    a, b = svd(dV), svd(dM)
    for temperature in (4.0, 32.0, 200.0):
        gamma = sim.importance(sim.corresponding_angles(a, b), temperature)
        update = sim.update_factors(dM, a, gamma, 1.0)
        whole = dM.double() @ a.Vh.double().T @ torch.diag(gamma.double() ** 2) @ a.Vh.double()
        off = update.left.double() @ update.right.double() - whole
        assert off.norm() <= 1e-6 * whole.norm()
    assert update.right.shape[0] < 200


def test_norms_and_products_come_from_the_factors():
    dV, dM, a, b = pair(20, 12)
    gamma = sim.importance(sim.corresponding_angles(a, b), 8.0)
    one = sim.update_factors(dM, a, gamma, 1.5)
    other = sim.update_factors(matrix(20, 12, seed=5), a, gamma, 0.5).scaled(-3.0)
    P, Q = one.matrix().double(), other.matrix().double()
    assert one.norm2 == pytest.approx(float((P * P).sum()), rel=1e-6)
    assert one.inner(other) == pytest.approx(float((P * Q).sum()), rel=1e-5, abs=1e-8)
    assert one.inner_with(dV) == pytest.approx(float((dV.double() * P).sum()), rel=1e-5)


def test_truncation_keeps_the_strongest_directions_only():
    dV, dM, _, _ = pair(20, 12)
    leading = svd(dM, rank=3)
    torch.testing.assert_close(sim.truncated(dM, leading), leading.matrix(), rtol=0, atol=1e-5)
    gamma = sim.importance(sim.corresponding_angles(svd(dV, rank=3), leading))
    short = sim.projected_update(dM, svd(dV, rank=3), gamma, 1.0, math=leading)
    long = sim.projected_update(leading.matrix(), svd(dV, rank=3), gamma, 1.0)
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)


def test_zero_task_vectors_make_a_zero_update():
    dV, zero = matrix(6, 5), torch.zeros(6, 5)
    for mllm, math_vector in [(dV, zero), (zero, dV), (zero, zero)]:
        a, b = svd(mllm), svd(math_vector)
        gamma = sim.importance(sim.corresponding_angles(a, b))
        P = sim.projected_update(math_vector, a, gamma, sim.nuclear_ratio(a, b))
        assert P.shape == (6, 5)
        assert torch.count_nonzero(P) == 0


@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (450, 400), (400, 450)], ids=str)
def test_directions_that_the_mllm_does_not_use_never_enter(shape):
    dV, dM = planted(*shape, rank=4, noise=0.0), matrix(*shape)
    updates = []
    for method in ("exact", "gram"):
        a, b = svd(dV, method=method), svd(dM, method="exact")
        gamma = sim.importance(sim.corresponding_angles(a, b), 1.0)
        updates.append(sim.projected_update(dM, a, gamma, 1.0))
    assert (updates[0] - updates[1]).norm() <= 1e-4 * updates[0].norm()


# --- wrong input ---


def test_unequal_widths_are_refused_with_both_numbers():
    a, b = svd(matrix(4, 5)), svd(matrix(4, 6))
    for compare in (sim.corresponding_angles, lambda a, b: sim.principal_cosines(a, b, 2)):
        with pytest.raises(ShapeError, match="have 5 and 6 entries"):
            compare(a, b)
    with pytest.raises(ShapeError, match=r"shape \(4, 6\) and the MLLM's directions have 5"):
        sim.projected_update(matrix(4, 6), a, torch.ones(4), 1.0)


def test_unknown_names_and_impossible_numbers_are_refused():
    a = svd(matrix(4, 5))
    angles = torch.ones(4)
    for call, words in [
        (lambda: sim.similarity_of(angles, a, a, "mean"), "Unknown similarity 'mean'"),
        (lambda: sim.chance_level(8, "mean"), "Unknown similarity 'mean'"),
        (lambda: sim.principal_cosines(a, a, 5), "k is 5; expected 1 to 4"),
        (lambda: sim.importance(angles, 0.0), "temperature is 0.0; expected a number > 0"),
        (lambda: sim.importance(angles, math.inf), "temperature is inf"),
        (lambda: sim.importance(angles, 32.0, "mean"), "Unknown gamma_norm 'mean'"),
        (lambda: sim.top_k_importance(angles, 0), "top_k is 0"),
    ]:
        with pytest.raises(PlanError, match=words):
            call()
