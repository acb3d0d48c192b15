"""Spectra of all kinds of matrices: laws, edge cases, errors, and the numbers read off them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_svd_algorithms import mixed_precision_from_256, planted  # noqa: F401

from ipmerge_core.errors import CheckpointError, PlanError, ShapeError
from ipmerge_core.spectral import spectrum as sp
from ipmerge_core.spectral import svd_algorithms
from ipmerge_core.spectral.protection import energy_rank

pytestmark = pytest.mark.shapes


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def assert_decomposes(found: sp.Spectrum, A: torch.Tensor) -> None:
    """U diag(S) Vh is A, the factors are orthonormal, S descends and the signs are fixed."""
    r = min(A.shape)
    assert found.U is not None
    scale = float(A.double().norm()) + 1e-30
    assert (found.matrix() - A).norm() <= 1e-5 * scale
    for rows in (found.U.T, found.Vh):
        torch.testing.assert_close(rows @ rows.T, torch.eye(r), rtol=0, atol=1e-5)
    assert (found.S.diff() <= 0).all()
    assert (found.S >= 0).all()
    largest = found.Vh.gather(1, found.Vh.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


SHAPES = [(1, 1), (1, 9), (9, 1), (5, 5), (40, 40), (64, 33), (33, 64), (450, 400), (400, 450)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", sp.SVD_METHODS)
def test_every_method_decomposes_every_shape(shape, method):
    A = matrix(*shape)
    assert_decomposes(sp.svd(A, method=method), A)


@pytest.mark.parametrize("method", sp.SVD_METHODS)
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (450, 400), (400, 450)], ids=str)
def test_a_zero_matrix_has_zero_values_and_unit_directions(method, shape):
    found = sp.svd(torch.zeros(shape), method=method)
    assert_decomposes(found, torch.zeros(shape))
    assert torch.count_nonzero(found.S) == 0


@pytest.mark.parametrize("method", sp.SVD_METHODS)
@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (450, 400), (400, 450)], ids=str)
def test_a_rank_one_matrix_has_one_value_and_orthonormal_directions(method, shape):
    A = torch.outer(matrix(shape[0], 1)[:, 0], matrix(shape[1], 1, seed=1)[:, 0])
    found = sp.svd(A, method=method)
    assert_decomposes(found, A)
    assert found.S[1] < 1e-6 * found.S[0]


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 50),
    n=st.integers(1, 50),
    rank=st.integers(1, 50),
    seed=st.integers(0, 99),
    method=st.sampled_from(["exact", "gram"]),
)
def test_routes_agree_on_matrices_of_any_rank(m, n, rank, seed, method):
    A = matrix(m, rank, seed) @ matrix(rank, n, seed + 1)
    found = sp.svd(A, method=method)
    assert_decomposes(found, A)
    truth = torch.linalg.svdvals(A.double())
    torch.testing.assert_close(found.S.double(), truth, rtol=1e-5, atol=1e-6 * float(truth[0]))


@pytest.mark.parametrize(("method", "rank"), [("gram", None), ("randomized", 6), ("auto", 6)])
def test_two_runs_give_the_same_bits(method, rank):
    A = planted(450, 400)
    first, second = (sp.svd(A, method=method, rank=rank) for _ in range(2))
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.Vh, second.Vh)


def test_a_sign_flip_of_the_matrix_flips_only_the_left_side():
    A = matrix(30, 20)
    one, other = sp.svd(A), sp.svd(-A)
    torch.testing.assert_close(one.Vh, other.Vh)
    torch.testing.assert_close(one.U, -other.U)


def test_the_right_side_alone_is_the_same_as_with_the_left():
    for shape in [(450, 400), (400, 450), (20, 20)]:
        A = planted(*shape)
        both, right = sp.svd(A), sp.svd(A, vectors="right")
        assert right.U is None
        torch.testing.assert_close(both.S, right.S, rtol=1e-4, atol=1e-5 * float(both.S[0]))
        torch.testing.assert_close(both.Vh[:8], right.Vh[:8], rtol=0, atol=1e-5)


def test_auto_chooses_by_the_question():
    small, large = matrix(20, 20), planted(450, 400)
    assert sp.svd(small).method == "exact"
    assert sp.svd(large).method == "gram"
    assert sp.svd(large, rank=8).method == "randomized"
    assert sp.svd(large, rank=300).method == "gram"
    assert sp.svd(large, method="exact").method == "exact"


@pytest.mark.parametrize("method", sp.SVD_METHODS)
def test_rank_keeps_the_leading_triplets_and_may_exceed_what_there_is(method):
    A = planted(450, 400)
    whole = sp.svd(A, method="exact")
    some = sp.svd(A, method=method, rank=8)
    assert some.Vh.shape == (8, 400)
    torch.testing.assert_close(some.S, whole.S[:8], rtol=1e-5, atol=0)
    torch.testing.assert_close(some.Vh, whole.Vh[:8], rtol=0, atol=1e-4)
    assert len(sp.svd(matrix(6, 4), method=method, rank=1000).S) == 4


def test_the_error_estimate_of_a_poorly_separated_direction_is_larger():
    A = planted(450, 400)
    found = sp.svd(A, method="randomized", rank=60)
    truth = torch.linalg.svdvals(A.double())[:60]
    assert found.error is not None
    assert ((found.S.double() - truth).abs() <= found.error.double() + 1e-6 * truth[0]).all()
    assert found.error[-1] > found.error[0]


def test_the_dtype_of_the_result_follows_the_input_or_the_wish():
    A = planted(450, 400)
    assert sp.svd(A.bfloat16()).S.dtype == torch.float32
    assert sp.svd(A.double()).S.dtype == torch.float64
    wished = sp.svd(A, dtype=torch.float64)
    truth = torch.linalg.svdvals(A.double())
    torch.testing.assert_close(wished.S, truth, rtol=1e-9, atol=0)
    fine = sp.svd(A, method="randomized", rank=4, dtype=torch.float64)
    torch.testing.assert_close(fine.S, truth[:4], rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["auto", "exact", "gram"])
def test_singular_values_alone_agree_with_the_definition(method):
    for shape in [(450, 400), (400, 450), (8, 5)]:
        A = planted(*shape, rank=4)
        truth = torch.linalg.svdvals(A.double())
        values = sp.singular_values(A, method=method)
        assert values.dtype == torch.float64
        assert float(values.sum()) == pytest.approx(float(truth.sum()), rel=1e-5)
        fine = sp.singular_values(A, method=method, dtype=torch.float64)
        torch.testing.assert_close(fine, truth, rtol=1e-8, atol=0)


# --- wrong input ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted(bad):
    A = matrix(6, 5)
    A[1, 2] = A[3, 3] = bad
    with pytest.raises(CheckpointError, match="2 of 30 values are NaN or infinite"):
        sp.svd(A)
    with pytest.raises(CheckpointError, match="2 of 30"):
        sp.singular_values(A)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "lanczos"}, "Unknown method 'lanczos' of svd. Available: auto, exact"),
        ({"rank": 0}, "rank is 0; expected an integer >= 1"),
        ({"rank": -3}, "rank is -3"),
        ({"dtype": torch.float16}, "float16; expected"),
        ({"vectors": "left"}, "vectors is 'left'; expected both or right"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_words(arguments, words):
    with pytest.raises(PlanError, match=words):
        sp.svd(matrix(4, 4), **arguments)


def test_an_empty_matrix_is_refused():
    with pytest.raises(PlanError, match=r"shape \(0, 4\)"):
        sp.svd(torch.zeros(0, 4))


def test_lack_of_memory_falls_back_to_the_cpu_with_a_warning(monkeypatch):
    A, calls = planted(450, 400), []
    real = svd_algorithms.gram

    def short_of_memory(matrix, **options):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(matrix, **options)

    monkeypatch.setattr(svd_algorithms, "gram", short_of_memory)
    with pytest.warns(UserWarning, match="too little free memory for a 450 x 400 matrix"):
        found = sp.svd(A)
    assert_decomposes(found, A)


def test_a_device_without_float64_is_served_by_the_cpu(monkeypatch):
    monkeypatch.setattr(sp, "has_fp64", lambda device: False)
    A = planted(450, 400)
    assert_decomposes(sp.svd(A), A)


def test_the_memory_estimate_grows_with_the_smaller_side():
    assert sp.working_bytes(4096, 4096) == sp.working_bytes(4096, 4096)
    assert sp.working_bytes(18944, 3584) == sp.working_bytes(3584, 18944)
    assert 1e9 < sp.working_bytes(4096, 11008) < 2e9


# --- task vectors ---


def test_a_task_vector_is_the_difference_in_float32_or_better():
    W, W0 = matrix(4, 3).bfloat16(), matrix(4, 3, seed=1).bfloat16()
    change = sp.task_vector(W, W0)
    assert change.dtype == torch.float32
    assert torch.equal(change, W.float() - W0.float())
    assert sp.task_vector(W.double(), W0).dtype == torch.float64


def test_a_task_vector_of_unequal_shapes_names_both():
    with pytest.raises(ShapeError, match=r"\(4, 3\) and its base \(3, 4\)"):
        sp.task_vector(matrix(4, 3), matrix(3, 4))


# --- numbers read off the values ---


def with_values(*values: float) -> sp.Spectrum:
    return sp.svd(torch.diag(torch.tensor(values)), method="exact")


def test_ranks_of_equal_values_count_them():
    equal = with_values(2.0, 2.0, 2.0, 0.0)
    assert sp.stable_rank(equal) == pytest.approx(3)
    assert sp.effective_rank(equal) == pytest.approx(3)
    assert energy_rank(equal.S, 0.5) == 2
    assert energy_rank(equal.S, 1.0) == 3
    assert sp.spectral_gap(equal) == pytest.approx(0)


def test_ranks_of_unequal_values_follow_their_formulas():
    found = with_values(3.0, 1.0)
    assert sp.stable_rank(found) == pytest.approx(10 / 9)
    assert sp.effective_rank(found) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert energy_rank(found.S, 0.9) == 1
    assert energy_rank(found.S, 0.95) == 2
    assert sp.spectral_gap(found) == pytest.approx(2 / 3)


def test_ranks_of_a_zero_matrix_are_zero():
    zero = sp.svd(torch.zeros(3, 4))
    ranks = (sp.stable_rank, sp.effective_rank, sp.spectral_gap)
    assert [rank(zero) for rank in ranks] == [0, 0, 0]
    assert energy_rank(zero.S, 0.9) == energy_rank(zero.S, 1.0) == 0


def test_one_value_has_the_whole_gap():
    assert sp.spectral_gap(with_values(4.0)) == 1


def test_an_energy_fraction_outside_its_range_is_refused():
    with pytest.raises(PlanError, match=r"is 1.5; expected a number in \[0, 1\]"):
        energy_rank(with_values(1.0).S, 1.5)


# --- the noise floor ---


@pytest.mark.parametrize("shape", [(300, 300), (200, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_floor_is_the_norm_of_simulated_rounding(shape, dtype):
    base, tuned = 0.02 * matrix(*shape), 0.02 * matrix(*shape, seed=1)
    stored = tuned.to(dtype), base.to(dtype)
    noise = (stored[0].float() - tuned) - (stored[1].float() - base)
    norm = float(torch.linalg.matrix_norm(noise, 2))
    floor = sp.noise_floor(*stored)
    assert floor is not None
    assert norm < floor < 1.35 * norm


def test_with_one_spacing_the_floor_is_the_marchenko_pastur_edge():
    m, n = 50, 80
    W = torch.full((m, n), 0.02, dtype=torch.bfloat16)  # ulp 2^-13
    edge = math.sqrt(2 / 12) * 2**-13 * (math.sqrt(m) + math.sqrt(n))
    assert sp.noise_floor(W, W) == pytest.approx(edge)


def test_every_dtype_makes_noise_and_two_files_more_than_one():
    W = matrix(4, 4)
    both, one = sp.noise_floor(W.bfloat16(), W.bfloat16()), sp.noise_floor(W.bfloat16(), W)
    assert both == pytest.approx(math.sqrt(2) * one)
    assert sp.noise_floor(W, W) == pytest.approx(both / 2**16, rel=0.5)  # 24 bits for 8
    assert sp.noise_floor(matrix(4, 4).double() / 3, W.double() / 7) < 1e-14
    assert sp.noise_floor(torch.zeros(3, 3, dtype=torch.bfloat16), torch.zeros(3, 3)) < 1e-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_were_widened_keep_the_noise_of_the_dtype_that_holds_them(dtype):
    base, tuned = matrix(20, 30).to(dtype), matrix(20, 30, seed=1).to(dtype)
    stored = sp.noise_floor(tuned, base)
    for wide in (torch.float32, torch.float64):
        assert sp.noise_floor(tuned.to(wide), base.to(wide)) == pytest.approx(stored, rel=1e-9)


def low_rank_pair(m, n, rank, dtype):
    """Base and tuned as stored, whose difference has that rank but for rounding."""
    base = 0.02 * matrix(m, n)
    factors = matrix(m, rank, seed=1) @ matrix(rank, n, seed=2)
    return base.to(dtype), (base.to(dtype).double() + 0.003 * factors.double()).to(dtype)


def moved(weight, seed):
    """Every weight moved by up to one unit in its last place, as a file can hold it."""
    generator = torch.Generator().manual_seed(seed)
    step = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1
    return (weight.double() + step * sp._spacing(weight).double()).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (300, 100), (80, 400)], ids=str)
def test_the_directions_of_a_low_rank_change_are_those_that_exist(shape, dtype):
    base, tuned = low_rank_pair(*shape, 12, dtype)
    for seed in (None, 0, 1):
        pair = (tuned, base) if seed is None else (moved(tuned, seed), moved(base, 2 + seed))
        noise = sp.noise_floor(*pair)
        for wide in (torch.float32, torch.float64):
            change = sp.task_vector(*(weight.to(wide) for weight in pair))
            assert len(sp.existing(change, noise).S) == 12


def test_more_directions_than_the_fp32_solver_tells_from_zero_are_counted_in_fp64():
    # 64 directions leave a tail that fp32 eigenvalues drown in their own rounding.
    base, tuned = low_rank_pair(800, 800, 64, torch.float32)
    found = sp.existing(sp.task_vector(tuned, base), sp.noise_floor(tuned, base), vectors="right")
    assert len(found.S) == 64


def test_all_directions_of_a_full_rank_change_exist():
    base, change = 0.02 * matrix(90, 120), 0.002 * matrix(90, 120, seed=1)
    tuned = base + change
    found = sp.existing(sp.task_vector(tuned, base), sp.noise_floor(tuned, base))
    assert torch.equal(found.S, sp.svd(sp.task_vector(tuned, base)).S)
    assert len(sp.existing(torch.zeros(5, 4), 0.0).S) == 0


@pytest.mark.parametrize("method", ["auto", "randomized"])
def test_a_flat_spectrum_is_not_left_to_an_unfinished_iteration(method):
    A = matrix(400, 300)  # leading directions stand too close for the basis that is allowed
    found = sp.svd(A, method=method, rank=20)
    true = torch.linalg.svdvals(A.double())[:20]
    assert found.method == "gram"
    assert (found.S.double() - true).abs().max() < 1e-5 * true[0]
    loose = sp.svd(A, method=method, rank=20, tolerance=0.2)
    assert loose.method == "randomized"
    assert (loose.S.double() - true).abs().max() < 0.05 * true[0]


def test_nothing_here_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.noise_floor(matrix(5, 4).bfloat16(), matrix(5, 4).bfloat16())
