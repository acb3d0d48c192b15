"""Task vectors given as factors are decomposed like the matrix, and cut at their rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ipmerge_core.methods import METHODS
from ipmerge_core.spectral import spectrum
from ipmerge_core.spectral.low_rank import LowRank, sum_of

pytestmark = pytest.mark.shapes

SHAPES = [(40, 24, 3), (24, 40, 3), (16, 16, 1), (12, 9, 20), (5, 60, 4)]
SUBSPACE = ("ip_merging", "tsv", "iso_c", "iso_cts", "knots_ties")


def factors(m: int, n: int, r: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, r + 1).pow(-1.0)
    left = torch.randn(m, r, generator=generator) * decay
    return left.to(dtype), torch.randn(r, n, generator=generator).to(dtype)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_spectrum_is_that_of_the_product(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    left, right = factors(m, n, r, dtype=dtype)
    known = LowRank.of(left, right, 0.7)
    exact = spectrum.svd(0.7 * left.double() @ right.double(), method="exact")
    count = min(m, n, r)
    found = known.spectrum(dtype=torch.float64)
    assert len(found.S) == count
    torch.testing.assert_close(found.S, exact.S[:count], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.matrix(), exact.matrix(), rtol=1e-5, atol=1e-6)
    strong = exact.S[:count] > 1e-3 * exact.S[0]
    torch.testing.assert_close(found.Vh[strong], exact.Vh[:count][strong], rtol=1e-4, atol=1e-5)
    eye = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(found.Vh @ found.Vh.T, eye, rtol=0, atol=1e-10)
    assert known.spectrum(vectors="right", rank=1).U is None
    assert len(known.spectrum(rank=1).S) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_bounds_the_effect_of_rounding_the_factors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    right = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    rounded = LowRank.of(left.to(dtype), right.to(dtype), 2.0)
    off = torch.linalg.matrix_norm(rounded.matrix().double() - 2 * left @ right, ord=2)
    assert off <= rounded.noise <= 30 * off


def test_a_direction_below_the_rounding_of_the_factors_does_not_exist() -> None:
    left, right = factors(60, 40, 3, dtype=torch.bfloat16)
    left[:, 2] *= 1e-4
    known = LowRank.of(left, right, 1.0)
    assert len(known.spectrum().S) == 3
    assert len(known.existing().S) == 2
    assert len(known.existing(noise=0.0).S) == 3


def test_zero_factors_have_no_directions() -> None:
    left, right = factors(8, 6, 2)
    known = LowRank.of(torch.zeros_like(left), right, 1.0)
    assert len(known.existing().S) == 0
    assert not known.matrix().any()


def test_sums_and_rests_stay_factors() -> None:
    one, two = (LowRank.of(*factors(20, 14, 3, seed=seed), 1.0) for seed in (1, 2))
    total = sum_of([one.scaled(2.0), two.scaled(-1.0)])
    torch.testing.assert_close(total.matrix(), 2 * one.matrix() - two.matrix())
    assert total.noise == pytest.approx(2 * one.noise + two.noise)
    U = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(3))).Q
    rest = one.matrix() - U @ (U.T @ one.matrix())
    torch.testing.assert_close(one.without(U).matrix().float(), rest, rtol=1e-4, atol=1e-5)


def test_values_that_are_not_finite_are_refused() -> None:
    left, right = factors(8, 6, 2)
    left[0, 0] = torch.nan
    with pytest.raises(spectrum.CheckpointError, match="1 of 16 values are NaN or infinite"):
        LowRank(left, right).spectrum()


def models(seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor], list[LowRank | None]]:
    """A base, an MLLM of full rank and two experts of rank 3 in fp32."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.1 * torch.randn(30, 22, generator=generator)
    mllm = base + 0.01 * torch.randn(30, 22, generator=generator)
    known = [LowRank.of(*factors(30, 22, 3, seed=seed), 0.01) for seed in (1, 2)]
    return base, mllm, [base + change.matrix() for change in known], [None, *known]


@pytest.mark.parametrize("name", SUBSPACE)
@pytest.mark.parametrize("mllm_is_adapted", [False, True])
def test_methods_give_the_same_with_factors_and_without(name: str, mllm_is_adapted: bool) -> None:
    base, mllm, experts, known = models()
    if mllm_is_adapted:  # every task vector is of low rank, so that most singular values are zero
        mllm, known[0] = experts.pop(), known.pop()
        assert known[0] is not None
    method = METHODS[name]
    plain = method(base, mllm, experts)
    assert plain.isfinite().all()
    if "low_rank" in method.inputs:
        quick = method(base, mllm, experts, low_rank=known)
        torch.testing.assert_close(quick, plain, rtol=1e-4, atol=2e-6)


def test_knots_uses_no_more_directions_than_the_task_vectors_have() -> None:
    base, _, (mllm, expert), _ = models()
    method = METHODS["knots_ties"]
    merged = method(base, mllm, [expert], density=1.0, normalize="none")
    assert merged.isfinite().all()
    assert int((torch.linalg.svdvals((merged - base).double()) > 1e-6).sum()) <= 6
    # The trim keeps a share of the elements: directions of rounding would add to their number.
    sparse = [method(base, mllm, [expert], cutoff=each, density=0.3) for each in (1e-6, 1e-5)]
    torch.testing.assert_close(*sparse, rtol=1e-5, atol=1e-7)
