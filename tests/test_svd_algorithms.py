"""Every route to singular values against their definition, the SVD in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ipmerge_core.spectral import svd_algorithms
from ipmerge_core.spectral.svd_algorithms import Factors

pytestmark = pytest.mark.shapes

WIDTH = 400
SHAPES = [(WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)]
KEY = (0, "test")


@pytest.fixture(autouse=True)
def mixed_precision_from_256(monkeypatch):
    """Let small matrices take the routes of large ones."""
    monkeypatch.setattr(svd_algorithms, "_DENSE", 256)


def planted(m: int, n: int, *, rank: int = 12, noise: float = 1e-3, seed: int = 0) -> Tensor:
    """Random weights' difference with `rank` directions above the bulk, like a task vector's."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q
    strength = 1e-3 * (m**0.5 + n**0.5) * torch.linspace(9, 1.5, rank)
    return (left * strength) @ right.T + noise * torch.randn(m, n, generator=generator)


def assert_agrees(found: Factors, A: Tensor, *, vector_error: float = 1e-6, top: int = 10) -> None:
    """Values within their own bounds, leading vectors right, factors orthonormal, signs aside."""
    truth = svd_algorithms.exact(A)
    count = len(found.values)
    off = (found.values - truth.values[:count]).abs()
    assert (off <= found.error + 1e-14 * truth.values[0]).all()
    for ours, theirs in ((found.left, truth.left), (found.right, truth.right)):
        if ours is None:
            continue
        assert theirs is not None
        rows = (ours.T if ours is found.left else ours).double()
        true = theirs.T if ours is found.left else theirs
        cosines = (rows[:top] * true[: min(top, count)]).sum(1).abs()
        assert (1 - cosines).max() < vector_error
        assert (rows @ rows.T - torch.eye(count)).abs().max() < 1e-4
    if found.left is not None and found.right is not None and count == min(A.shape):
        again = (found.left.double() * found.values) @ found.right.double()
        assert (again - A).norm() < 1e-5 * A.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fp64", [False, True])
def test_gram_agrees_with_the_definition_within_its_own_bounds(shape, fp64):
    A = planted(*shape)
    A = A.double() if fp64 else A
    found = svd_algorithms.gram(A, left=True, right=True, fp64=fp64)
    assert_agrees(found, A, vector_error=1e-12 if fp64 else 1e-6)
    if fp64:
        assert found.error.max() < 1e-8 * found.values[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 8])
def test_randomized_agrees_on_what_it_returns(shape, rank):
    A = planted(*shape)
    found = svd_algorithms.randomized(A, rank, left=True, right=True, tolerance=2e-6, key=KEY)
    assert found.route == "randomized"
    assert len(found.values) == rank
    assert_agrees(found, A)
    assert found.error.max() < 1e-4 * found.values[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_nuclear_norms_are_far_better_than_their_bound(shape):
    A = planted(*shape)
    truth = float(torch.linalg.svdvals(A.double()).sum())
    found = svd_algorithms.gram(A, left=False, right=False, fp64=False)
    assert found.left is None
    assert found.right is None
    assert float(found.error.sum()) < 1e-4 * truth
    assert float(found.values.sum()) == pytest.approx(truth, rel=2e-6)


def test_mixed_precision_only_runs_where_its_bound_allows():
    strength = torch.full((WIDTH,), 1e-3)
    strength[: WIDTH // 2] = 1.0
    basis = torch.linalg.qr(planted(WIDTH, WIDTH).double()).Q
    A = ((basis * strength) @ basis.T).float()
    found = svd_algorithms.gram(A, left=False, right=False, fp64=False)
    assert found.error[-1] < 1e-9  # fp32 would give 5e-4, half of the value itself
    torch.testing.assert_close(found.values, svd_algorithms.exact(A).values, rtol=0, atol=1e-9)


def test_a_low_rank_matrix_needs_no_dense_solver(monkeypatch):
    monkeypatch.setattr(svd_algorithms, "_dense", None)
    A = planted(WIDTH, 2 * WIDTH, noise=0.0).double()
    found = svd_algorithms.gram(A, left=True, right=True, fp64=True)
    assert int((found.values > 0).sum()) == 12
    assert_agrees(found, A)


def test_repeated_singular_values_are_all_found():
    rows = torch.linalg.qr(planted(2 * WIDTH, WIDTH)).Q.T
    strength = torch.full((WIDTH,), 0.1)
    strength[:40] = 1.0  # more copies than a Krylov block holds
    A = strength[:, None] * rows
    found = svd_algorithms.gram(A, left=False, right=True, fp64=False)
    torch.testing.assert_close(found.values.float(), strength, rtol=1e-4, atol=0)
    leading = svd_algorithms.randomized(A, 30, left=False, right=True, tolerance=2e-6, key=KEY)
    assert leading.route == "gram"
    torch.testing.assert_close(leading.values.float(), strength[:30], rtol=1e-4, atol=0)


def test_a_missed_head_is_noticed():
    A = torch.diag(torch.linspace(1, 2, WIDTH)).double()
    wrong = svd_algorithms.Krylov(
        torch.tensor([2.0], dtype=torch.float64),
        torch.eye(WIDTH, dtype=torch.float64)[:1],  # the weakest direction, not the strongest
        torch.zeros(1, dtype=torch.float64),
    )
    assert svd_algorithms._mixed(A @ A, wrong, vectors=False) is None
    none = svd_algorithms.Krylov(*(part[:0] for part in wrong))
    assert svd_algorithms._mixed(A @ A, none, vectors=False) is None


def test_no_route_changes_its_input():
    A = planted(WIDTH, WIDTH + 50).double()
    copy = A.clone()
    svd_algorithms.gram(A, left=True, right=True, fp64=True)
    svd_algorithms.randomized(A, 4, left=True, right=True, tolerance=1e-6, key=KEY)
    svd_algorithms.exact(A)
    assert torch.equal(A, copy)


def test_the_random_start_depends_on_seed_and_name_only():
    state = torch.random.get_rng_state()
    first = svd_algorithms.start(5, 3, (1, "a"), torch.empty(0))
    torch.rand(7)
    assert torch.equal(first, svd_algorithms.start(5, 3, (1, "a"), torch.empty(0)))
    assert not torch.equal(first, svd_algorithms.start(5, 3, (2, "a"), torch.empty(0)))
    assert not torch.equal(first, svd_algorithms.start(5, 3, (1, "b"), torch.empty(0)))
    torch.random.set_rng_state(state)
    svd_algorithms.randomized(planted(300, 200), 4, left=False, right=True, tolerance=1e-6, key=KEY)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tiny_numbers_and_huge_ones_do_not_leave_the_range():
    A = planted(60, 40)
    for scale in (1e-30, 1e30):
        found = svd_algorithms.gram(A * scale, left=False, right=True, fp64=False)
        torch.testing.assert_close(
            found.values / scale, svd_algorithms.exact(A).values, rtol=1e-5, atol=1e-9
        )


def test_products_run_in_full_precision_and_the_setting_comes_back():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with svd_algorithms.full_precision:
            with svd_algorithms.full_precision:  # as another thread would
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_every_device_gives_the_same_spectrum_where_the_matrix_lies(device):
    A = planted(WIDTH, 2 * WIDTH)
    there = svd_algorithms.gram(A.to(device), left=False, right=True, fp64=False)
    assert there.values.device.type == device
    truth = svd_algorithms.exact(A)
    torch.testing.assert_close(there.values.cpu(), truth.values, rtol=1e-5, atol=1e-7)
