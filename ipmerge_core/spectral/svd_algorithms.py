"""SVD algorithms, from which `spectrum.svd` selects: exact, gram and randomized.

In: a finite matrix A (m, n), p = min(m, n). Out: `Factors` in the algorithm's own precision,
descending, signs not fixed, each value with an error bound. Four algorithms:

    exact       LAPACK's or cuSOLVER's SVD in fp64: the reference in the tests
    gram        eigenvectors of A A^T or A^T A, whichever is smaller, accumulated in fp64
    randomized  leading directions only, block Krylov iteration with a start keyed by (seed, name)
    product     a matrix given as the product of two thin factors, from their QR decompositions

No global random state, no TF32, no IO.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Key = tuple[int, str]

_EPS32 = torch.finfo(torch.float32).eps
_EPS64 = torch.finfo(torch.float64).eps
_DENSE = 768  # below this width a full fp64 eigensolver costs no more than the mixed one
_STRIP = 2048  # columns converted to fp64 at a time, so that no fp64 copy of A is stored
_HEAD = 24  # leading directions computed before an fp32 eigensolver computes the rest
_BLOCK = 8  # Krylov vectors per step: fewer underuse a pass over A, more converge slower
_NUCLEAR = 1e-4  # allowed bound on the relative error of sum S; measured errors are 100 x smaller
# Smallest singular value relative to S_1 that is distinguished from zero in an fp32 result, in
# either precision: a Gram matrix in fp64 resolves a third of it, so that fp32 and fp64 find the
# same directions.
RESOLUTION = 4 * _EPS32


class Factors(NamedTuple):
    """A = left diag(values) right: (m, r), (r,), (r, n); `error` bounds |values - exact|."""

    left: Tensor | None
    values: Tensor
    right: Tensor | None
    error: Tensor
    route: str

    def leading(self, rank: int) -> Factors:
        """Keep the first `rank` triplets."""
        return Factors(
            None if self.left is None else self.left[:, :rank],
            self.values[:rank],
            None if self.right is None else self.right[:rank],
            self.error[:rank],
            self.route,
        )


class _Eigen(NamedTuple):
    """Eigenvalues, descending, with error bounds, and eigenvectors as rows (possibly fewer)."""

    values: Tensor
    slack: Tensor
    rows: Tensor | None
    n_head: int  # leading rows of fp64 quality


class _FullPrecision:
    """Disables TF32 and bf16 splitting of fp32 products while any thread is inside.

    The torch setting is global: the first thread to enter saves it, the last to leave restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = "highest"

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_float32_matmul_precision(self._before)


full_precision = _FullPrecision()


def exact(A: Tensor) -> Factors:
    """Compute the SVD in fp64. Error: a few eps_64 S_1 per value; cost: O(m n p), the slowest."""
    left, values, right = torch.linalg.svd(A.double(), full_matrices=False)
    error = torch.full_like(values, _EPS64 * max(A.shape) ** 0.5) * values[0]
    return Factors(left, values, right, error, "exact")


# --- products ---


def product(left: Tensor, right: Tensor) -> Factors:
    """Compute the SVD of left (m, r) times right (r, n) in fp64, without forming the product.

    Math:   left = Q_l R_l, right^T = Q_r R_r; the SVD of the small R_l R_r^T = U S V^T gives
            (Q_l U) S (Q_r V)^T.
    Error:  a few eps_64 S_1 per value. Cost: O((m + n) r^2 + r^3).
    """
    Q_l, R_l = torch.linalg.qr(left.double())
    Q_r, R_r = torch.linalg.qr(right.double().T)
    U, values, Vh = torch.linalg.svd(R_l @ R_r.T, full_matrices=False)
    error = torch.full_like(values, _EPS64 * max(len(left), right.shape[1]) ** 0.5)
    return Factors(Q_l @ U, values, Vh @ Q_r.T, error * values[:1].sum(), "product")


# --- gram ---


def gram(
    A: Tensor,
    *,
    left: bool,
    right: bool,
    fp64: bool,
    key: Key = (0, ""),
    floor: float | None = None,
) -> Factors:
    """Compute the SVD from an eigendecomposition of the smaller Gram matrix.

    Math:   B = A or A^T with p rows, G = B B^T = X diag(S^2) X^T, long side = B^T X / S.
    Error:  |dS_i| <= d / S_i where d bounds the eigenvalues' error. With `fp64` d is a few
            eps_64 S_1^2. Without, the leading directions are computed in fp64 and deflated to the
            level of the rest, which fp32 eigh solves, and d is a few eps_32 S_c^2 with S_c the
            last of those; if this could change sum S by a relative 1e-4, make the long side's
            vectors linearly dependent, or leave undecided which values exceed `floor`, fp64 is
            used instead.
    Cost:   2 m n p flops for G (half by symmetry), 4/3 p^3 for the values or about 9 p^3 with
            vectors, 2 m n p for the long side. Memory 8 p^2 bytes, several times.
    """
    B = A if A.shape[0] < A.shape[1] else A.T  # for a square matrix, the right side is needed
    scale = float(B.abs().max())
    if scale == 0:
        return _zero(A, left=left, right=right)
    G = _gram_matrix(B, scale)
    short_is_left = B is A
    wants_long = right if short_is_left else left
    cut = None if floor is None else floor / scale
    eigen = _eigen(G, vectors=left or right, fp64=fp64, safe_tail=wants_long, key=key, floor=cut)
    del G
    squares = eigen.values.clamp(min=0)
    values = squares.sqrt()
    null = squares <= eigen.slack.where(eigen.slack < 1e-10 * squares[0], 0.0)
    values = values.masked_fill(null, 0.0)
    error = _error(values, eigen.slack) * scale
    values = values * scale
    if eigen.rows is None:
        return Factors(None, values, None, error, "gram")
    short = _completed(eigen.rows, len(values), key)
    long = _long_side(B, short, values, eigen.n_head, key) if wants_long else None
    pair = (short, long) if short_is_left else (long, short)
    return Factors(
        pair[0].T if left and pair[0] is not None else None,
        values,
        pair[1] if right else None,
        error,
        "gram",
    )


def _gram_matrix(B: Tensor, scale: float) -> Tensor:
    """Compute B B^T / scale^2 in fp64: the lower triangle is multiplied, then mirrored."""
    p = B.shape[0]
    step = max(-(-p // 4), 128)
    sums = [B.new_zeros(p - i, min(step, p - i), dtype=torch.float64) for i in range(0, p, step)]
    for first in range(0, B.shape[1], _STRIP):
        D = B[:, first : first + _STRIP].to(torch.float64) / scale
        for number, known in enumerate(sums):
            i = number * step
            known.add_(D[i:] @ D[i : i + step].T)
    G = B.new_empty(p, p, dtype=torch.float64)
    for number, block in enumerate(sums):
        i = number * step
        G[i : i + step, i:] = block.T
        G[i:, i : i + step] = block
    return G


def _eigen(
    G: Tensor, *, vectors: bool, fp64: bool, safe_tail: bool, key: Key, floor: float | None
) -> _Eigen:
    p = len(G)
    if p < _DENSE:
        return _dense(G, vectors=vectors)
    trace = float(G.trace())
    found = krylov(lambda rows: rows @ G, start(p, _BLOCK, key, G), _HEAD, 1e-11, 4 * _HEAD)
    head = found.converged(1e-8)
    if trace - float(head.values.sum()) <= p * _EPS64 * trace:
        return _low_rank(head, p, trace)
    mixed = None if fp64 else _mixed(G, head, vectors=vectors)
    if mixed is not None and _is_good_enough(mixed, safe_tail=safe_tail and vectors, floor=floor):
        return mixed
    return _dense(G, vectors=vectors)


def _dense(G: Tensor, *, vectors: bool) -> _Eigen:
    if vectors:
        values, columns = torch.linalg.eigh(G)
        rows = columns.T.flip(0)
    else:
        values, rows = torch.linalg.eigvalsh(G), None
    values = values.flip(0)
    return _Eigen(values, _rounding64(values, len(G)), rows, 0)


def _low_rank(head: Krylov, p: int, trace: float) -> _Eigen:
    """Return the head, which accounts for the whole trace, padded with zero eigenvalues."""
    values = head.values.new_zeros(p)
    values[: len(head.values)] = head.values
    slack = torch.full_like(values, p * _EPS64 * trace)
    return _Eigen(values, slack, head.rows, len(head.values))


def _mixed(G: Tensor, head: Krylov, *, vectors: bool) -> _Eigen | None:
    """Solve in fp32 after deflating the known head of the spectrum to the level of the rest.

    With head eigenpairs (l_i, x_i), i = 1..c, accurate in fp64, G + X^T (M - L) X has the
    same eigenvectors and, for M_i in (1, 1.5] l_c, a norm of 1.5 l_c instead of l_1: the
    fp32 rounding is then relative to the rest of the spectrum instead of its largest value.
    Returns None if the head is incomplete: it missed copies of a multiple eigenvalue.
    """
    c = len(head.values)
    if c == 0:
        return None
    steps = torch.arange(c, 0, -1, dtype=G.dtype, device=G.device) / (2 * c)
    moved = 1 + steps
    unit = head.values[-1]
    lowered = (moved * unit - head.values)[:, None] * head.rows
    small = torch.addmm(G, head.rows.T, lowered).div_(unit).to(torch.float32)
    if vectors:
        values, columns = torch.linalg.eigh(small)
        known, rows = head.rows.to(columns), columns.T.flip(0)[c:]
        rows = torch.cat([known, rows - (rows @ known.T) @ known])
    else:
        values, rows = torch.linalg.eigvalsh(small), None
    values = values.flip(0)
    if not torch.allclose(values[:c].double(), moved, rtol=0, atol=1e-4):
        return None
    rest = values[c:].double() * unit
    # Measured errors against fp64 at widths 512 to 2048, in eps_32 S_c^2: below 3.5 with vectors;
    # without, up to 36 for the largest of the rest (0.8 sqrt p), below 5 after the first eighth.
    solver = 8 * unit + (0.0 if vectors else 1.5 * len(G) ** 0.5) * rest.clamp(min=0)
    slack = torch.cat([_rounding64(head.values, len(G)) + head.residuals, _EPS32 * solver])
    return _Eigen(torch.cat([head.values, rest]), slack, rows, c)


def _rounding64(values: Tensor, p: int) -> Tensor:
    """Bound the effect of fp64 rounding on the eigenvalues of a (p, p) matrix, (r,)."""
    return torch.full_like(values, 4 * _EPS64 * p**0.5) * values[0]


def _is_good_enough(eigen: _Eigen, *, safe_tail: bool, floor: float | None) -> bool:
    squares = eigen.values.clamp(min=0)
    values = squares.sqrt()
    if float(_error(values, eigen.slack).sum()) > _NUCLEAR * float(values.sum()):
        return False
    if floor is not None and not _resolves_floor(eigen, max(floor, RESOLUTION * float(values[0]))):
        return False
    return not safe_tail or float(eigen.slack[-1]) <= 1e-3 * float(squares[-1])


def _resolves_floor(eigen: _Eigen, floor: float) -> bool:
    """Return whether it is decided, up to a tenth of `floor`, which values exceed it."""
    uncertain = (eigen.values - floor**2).abs() <= eigen.slack
    return not bool((uncertain & (eigen.slack > 0.2 * floor**2)).any())


def _error(values: Tensor, slack: Tensor) -> Tensor:
    """Bound |S - S_true| given |S^2 - S_true^2| <= slack, both S >= 0."""
    squares = values.square()
    below = values - (squares - slack).clamp(min=0).sqrt()
    above = slack / ((squares + slack).sqrt() + values).clamp(min=1e-300)
    return torch.maximum(below, above)


def _long_side(B: Tensor, short: Tensor, values: Tensor, n_head: int, key: Key) -> Tensor:
    """Compute unit rows B^T x_i / S_i; arbitrary orthonormal rows where S_i is zero."""
    n_real = int((values > 0).sum())
    short = short.to(B.dtype) if short.dtype != torch.float64 else short
    rows = short[:n_real] @ B.to(short.dtype)
    head = rows[:n_head] / rows[:n_head].norm(dim=1, keepdim=True)
    rest = rows[n_head:] - (rows[n_head:] @ head.T) @ head
    rest = rest / rest.norm(dim=1, keepdim=True)
    return _completed(torch.cat([head, rest]), len(values), key)


def _completed(rows: Tensor, count: int, key: Key) -> Tensor:
    """Append arbitrary orthonormal rows, orthogonal to the given ones, up to `count`."""
    missing = count - len(rows)
    if missing <= 0:
        return rows
    more = start(rows.shape[1], missing, key, rows)
    for _ in range(2):
        more = more - (more @ rows.T) @ rows
        more = torch.linalg.qr(more.T).Q.T
    return torch.cat([rows, more])


def _zero(A: Tensor, *, left: bool, right: bool) -> Factors:
    m, n = A.shape
    p = min(m, n)
    zeros = torch.zeros(p, dtype=torch.float64, device=A.device)

    def unit(length: int) -> Tensor:
        return torch.eye(p, length, dtype=A.dtype, device=A.device)

    return Factors(unit(m).T if left else None, zeros, unit(n) if right else None, zeros, "gram")


# --- leading directions ---


class Krylov(NamedTuple):
    """Leading eigenpairs of a symmetric operator: values (k,), rows (k, p), residual norms (k,)."""

    values: Tensor
    rows: Tensor
    residuals: Tensor

    def converged(self, tolerance: float) -> Krylov:
        """Keep the leading pairs before the first whose residual exceeds tolerance * largest."""
        good = self.residuals <= tolerance * self.values[0]
        count = int(good.long().cumprod(0).sum())
        return Krylov(self.values[:count], self.rows[:count], self.residuals[:count])


def randomized(
    A: Tensor,
    rank: int,
    *,
    left: bool,
    right: bool,
    tolerance: float,
    key: Key,
    accepted: float | None = None,
) -> Factors:
    """Compute the leading `rank` triplets by block Krylov iteration on the smaller side.

    Error:  |dS_i| <= r_i / S_i with the residual norm r_i = ||A A^T u_i - S_i^2 u_i||. That no
            larger value was missed relies on the random start, which almost surely has a component
            in every direction. Directions are accurate to about r_i / (gap of S_i^2).
    Cost:   4 m n flops per basis vector, at most 3 rank + 64 of them; stops as soon as every
            residual is below tolerance * S_1^2. If one then exceeds accepted * S_1^2 (None:
            tolerance), as for a flat spectrum, leading directions may be missing and `gram` is
            used instead; likewise if ties fill a block, since a Krylov space contains no more
            copies of a singular value than its block has vectors.
    """
    B = A if A.shape[0] < A.shape[1] else A.T
    p = B.shape[0]
    block = min(max(_BLOCK, rank // 4), 64)  # a pass for 16 rows costs little more than for 8
    found = krylov(
        lambda rows: (rows @ B) @ B.T, start(p, block, key, A), rank, tolerance, 3 * rank + 64
    )
    bound = tolerance if accepted is None else accepted
    missed = float(found.residuals.max()) > bound * float(found.values[0])
    if missed or _may_hide_copies(found.values, block):
        whole = gram(A, left=left, right=right, fp64=A.dtype == torch.float64, key=key)
        return whole.leading(rank)
    long = found.rows @ B
    values = long.norm(dim=1)
    long = long / values.clamp(min=1e-300)[:, None]
    eps = torch.finfo(A.dtype).eps
    slack = found.residuals + 4 * eps * found.values[0]
    pair = (found.rows, long) if B is A else (long, found.rows)
    return Factors(
        pair[0].T if left else None,
        values.double(),
        pair[1] if right else None,
        _error(values.double(), slack),
        "randomized",
    )


def _may_hide_copies(squares: Tensor, block: int) -> bool:
    """Return whether a value other than the last occurs `block` times, so copies may be missing."""
    if len(squares) <= block:
        return False
    ties = squares[:-block] - squares[block - 1 : -1] <= 1e-5 * squares[:-block]
    return bool((ties & (squares[:-block] > 1e-10 * squares[0])).any())


def krylov(
    apply: Callable[[Tensor], Tensor],
    first: Tensor,
    count: int,
    tolerance: float,
    budget: int,
) -> Krylov:
    """Compute the leading `count` eigenpairs of a symmetric positive semidefinite operator.

    The operator is given by its product with rows. Rayleigh-Ritz on span{X, XG, XG^2, ...}, the
    basis kept orthonormal by projecting twice. Residuals need no product with G: the part of Q G
    outside the basis is the next block times R.
    Stops when all residuals are below tolerance * largest value, or at `budget` basis vectors.
    """
    p, block = first.shape[1], len(first)
    budget = min(max(budget, count + block), p - block)
    basis = first.new_empty(budget + block, p)
    images = torch.empty_like(basis)
    basis[:block] = torch.linalg.qr(first.T).Q.T
    size, next_check = block, count
    while True:
        last = slice(size - block, size)
        images[last] = apply(basis[last])
        fresh, R = _orthogonal_to(basis[:size], images[last])
        full = size + block > budget
        if size >= next_check or full:
            T = (basis[:size] @ images[:size].T).double()
            theta, Y = torch.linalg.eigh((T + T.T) / 2)
            theta, Y = theta.flip(0)[:count], Y.flip(1)[:, :count]
            residuals = (R.double() @ Y[last]).norm(dim=0)
            if full or float(residuals.max()) <= tolerance * float(theta[0]):
                return Krylov(theta, Y.T.to(basis) @ basis[:size], residuals)
            next_check = int(1.4 * size)
        basis[size : size + block] = fresh
        size += block


def _orthogonal_to(basis: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into a part in the basis and R^T Q; return the orthonormal rows Q, and R."""
    rows = rows - (rows @ basis.T) @ basis
    Q, R = torch.linalg.qr(rows.T)
    again = Q.T - (Q.T @ basis.T) @ basis
    Q, R2 = torch.linalg.qr(again.T)
    return Q.T, R2 @ R


def start(length: int, count: int, key: Key, like: Tensor) -> Tensor:
    """Return normal random rows (count, length) that depend only on (seed, name)."""
    digest = hashlib.sha256(f"{key[0]}:{key[1]}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(count, length, generator=generator, dtype=torch.float64).to(like)
