"""Task vectors, their singular value decompositions, and statistics of singular values.

In: weight matrices (m, n) in any float dtype. Out: a `Spectrum` (U, S, Vh), as `torch.linalg.svd`
returns them, `Vh` being V transposed. No IO, no global random state.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.errors import CheckpointError, PlanError, ShapeError
from ipmerge_core.runtime.devices import has_fp64
from ipmerge_core.spectral import svd_algorithms

SVD_METHODS = ("auto", "exact", "gram", "randomized")
EXISTS = 4.0  # a direction's singular value over the noise floor, at least; see `existing`
_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}
TOLERANCE = 2e-6  # of randomized: residual relative to S_1^2; fp32 products resolve about 3e-7


@dataclass(frozen=True)
class Spectrum:
    """A thin, possibly truncated singular value decomposition A = U diag(S) Vh.

    Shapes: U (m, r) or None if not requested, S (r,) descending, Vh (r, n) with orthonormal rows.
            `method` is the algorithm that was used; `error` (r,) bounds the absolute error of each
            singular value.
    """

    U: Float[Tensor, "m r"] | None
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    method: str = "exact"
    error: Float[Tensor, " r"] | None = None

    def matrix(self) -> Float[Tensor, "m n"]:
        """Multiply the factors: A, truncated to the kept triplets."""
        assert self.U is not None, "the spectrum was computed without U"
        return (self.U * self.S) @ self.Vh

    def leading(self, rank: int) -> Spectrum:
        """Keep the first `rank` triplets, or all if there are fewer."""
        return Spectrum(
            None if self.U is None else self.U[:, :rank],
            self.S[:rank],
            self.Vh[:rank],
            self.method,
            None if self.error is None else self.error[:rank],
        )

    def above(self, floor: float) -> Spectrum:
        """Keep the triplets with singular values above `floor` and above rounding; see `existing`.

        >>> svd(torch.diag(torch.tensor([3.0, 1.0, 1e-9]))).above(0.5).S
        tensor([3., 1.])
        """
        strongest = float(self.S[0]) if len(self.S) else 0.0
        return self.leading(int((max(floor, svd_algorithms.RESOLUTION * strongest) < self.S).sum()))


def as_float(tensor: Tensor) -> Tensor:
    """Convert to fp32, or leave in fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def task_vector(tuned: Float[Tensor, "m n"], base: Float[Tensor, "p q"]) -> Float[Tensor, "m n"]:
    """Compute dW = W - W0 in fp32, or in fp64 if either input is fp64.

    Raises: ShapeError for unequal shapes.
    """
    if tuned.shape != base.shape:
        raise ShapeError(
            f"The tuned matrix has shape {tuple(tuned.shape)} and its base {tuple(base.shape)}; "
            f"a task vector needs equal shapes: are both of one model family?"
        )
    return as_float(tuned) - as_float(base)


def svd(
    matrix: Float[Tensor, "m n"],
    *,
    method: str = "auto",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    vectors: str = "both",
    key: tuple[int, str] = (0, ""),
    tolerance: float | None = None,
    floor: float | None = None,
) -> Spectrum:
    """Compute A = U diag(S) Vh with fixed signs and descending singular values.

    The sign of a pair (u_i, v_i) is arbitrary; here the entry of v_i with the largest magnitude
    (the first one in a tie) is positive. Directions with S = 0 are arbitrary but orthonormal, so
    that a zero matrix has a spectrum too. The result depends only on the arguments.

    With p = min(m, n), and CPU time relative to fp32 `torch.linalg.svd`, measured on task vectors
    of width 1024 to 2048, square to 5:1 (`benchmarks/bench_spectrum.py`):

    method      answers                    error of S_i                      cost
    exact       all values, all vectors    about eps_64 S_1                  SVD in fp64, about 2
    gram        all values, all vectors    fp64: eps_64 S_1^2 / S_i          0.1 to 0.4; with
                                           fp32: eps_32 S_c^2 / S_i, c > 1   vectors 0.2 to 0.7
    randomized  the leading `rank`         residual_i / S_i                  0.02 to 0.1 for 8
    auto        randomized where 4 rank + 64 < p, else gram; exact below p = 32

    For an fp32 result, gram computes about c leading directions in fp64 and the rest in fp32, and
    uses fp64 throughout if this could change sum S by a relative 1e-4. Use dtype=torch.float64
    if the smallest singular values matter. If a residual of the randomized algorithm stays above
    `tolerance`, gram is used instead.

    Args:
        matrix: (m, n) in any float dtype.
        method: the algorithm; `Spectrum.method` is the one that was used.
        rank: keep only the leading triplets, at most p; None keeps all.
        dtype: of the result, fp32 (default; fp64 for fp64 input) or fp64.
        vectors: "right" skips computing U, which saves a matrix product.
        key: (seed, name) for the random start of randomized; no other random state is used.
        tolerance: for randomized: the largest acceptable residual
            ||A A^T u_i - S_i^2 u_i|| / S_1^2; None is the target: 2e-6 for fp32, which its products
            resolve, 1e-11 for fp64.
        floor: a singular value; the result must be accurate enough to decide which S exceed it (and
            4 eps_32 S_1), as `existing` requires.

    Raises:
        CheckpointError: the matrix contains NaN or infinity.
        PlanError: unknown method or vectors, a rank below 1, or an unsupported dtype.
    """
    if vectors not in ("both", "right"):
        raise PlanError(f"vectors is '{vectors}'; expected both or right.")
    work, dtype = _prepared(matrix, method, rank, dtype)
    p = min(work.shape)
    rank = p if rank is None else min(rank, p)
    route = _route(method, p, rank)
    left = vectors == "both"

    def run(A: Tensor) -> svd_algorithms.Factors:
        if route == "exact":
            return svd_algorithms.exact(A)
        if route == "gram":
            wide = dtype == torch.float64
            return svd_algorithms.gram(A, left=left, right=True, fp64=wide, key=key, floor=floor)
        goal = TOLERANCE if dtype == torch.float32 else 1e-11
        return svd_algorithms.randomized(
            A, rank, left=left, right=True, tolerance=goal, accepted=tolerance, key=key
        )

    return _signed(_run(run, work), rank, matrix.device, dtype, left=left)


def svd_of_product(
    left: Float[Tensor, "m r"],
    right: Float[Tensor, "r n"],
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    vectors: str = "both",
) -> Spectrum:
    """Compute the SVD of left @ right, with min(m, n, r) triplets; signs and order as `svd`.

    Takes r x r work instead of min(m, n) x min(m, n). Raises: as `svd`.
    """
    for factor in (left, right):
        if factor.numel():
            check_finite(factor)
    where = left.device if has_fp64(left.device) else torch.device("cpu")
    with svd_algorithms.full_precision:
        found = svd_algorithms.product(left.to(where), right.to(where))
    count = len(found.values) if rank is None else min(rank, len(found.values))
    return _signed(found, count, left.device, dtype, left=vectors == "both")


def _signed(
    found: svd_algorithms.Factors,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    left: bool,
) -> Spectrum:
    """Sort the triplets and fix their signs."""
    assert found.right is not None
    order = found.values.argsort(descending=True, stable=True)[:rank]  # rounding can swap ties
    Vh = found.right[order]
    sign = _signs(Vh)
    U = None if found.left is None or not left else found.left[:, order] * sign
    return Spectrum(
        None if U is None else U.to(device, dtype),
        found.values[order].to(device, dtype),
        (Vh * sign[:, None]).to(device, dtype),
        found.route,
        found.error[order].to(device, dtype),
    )


def singular_values(
    matrix: Float[Tensor, "m n"], *, method: str = "auto", dtype: torch.dtype | None = None
) -> Float[Tensor, " p"]:
    """Compute all singular values without vectors, in fp64, descending.

    Their sum is the nuclear norm. Error as for `svd` with gram: with dtype fp32 (the default for
    fp32 input) the sum is accurate to 1e-4 by its bound and to about 1e-7 as measured; with fp64
    every value is accurate to eps_64 S_1^2 / S_i. The cost is that of the product A A^T and of the
    eigenvalues of a (p, p) matrix, a third of that with vectors.

    Raises: as `svd`.
    """
    work, dtype = _prepared(matrix, method, None, dtype)
    if method == "exact":
        return svd_algorithms.exact(work).values.to(matrix.device)
    wide = dtype == torch.float64

    def run(A: Tensor) -> svd_algorithms.Factors:
        return svd_algorithms.gram(A, left=False, right=False, fp64=wide)

    return _run(run, work).values.to(matrix.device)


def _prepared(
    matrix: Tensor, method: str, rank: int | None, dtype: torch.dtype | None
) -> tuple[Tensor, torch.dtype]:
    """Validate the arguments; return the matrix in working precision, and the result dtype."""
    if method not in SVD_METHODS:
        raise PlanError(f"Unknown method '{method}' of svd. Available: {', '.join(SVD_METHODS)}.")
    if rank is not None and rank < 1:
        raise PlanError(f"The rank is {rank}; expected an integer >= 1, or none for all.")
    if dtype not in (None, torch.float32, torch.float64):
        raise PlanError(f"The dtype of a spectrum is {dtype}; expected torch.float32 or float64.")
    if matrix.numel() == 0:
        raise PlanError(f"The matrix has shape {tuple(matrix.shape)}; expected at least one entry.")
    work = as_float(matrix)
    check_finite(work)
    result = dtype or work.dtype
    return (work.double() if result == torch.float64 else work), result


def _route(method: str, p: int, rank: int) -> str:
    """Select the algorithm; randomized needs a basis smaller than the matrix."""
    leading = 4 * rank + 64 < p
    if method == "randomized" or (method == "auto" and leading):
        return "randomized" if leading else "gram"
    if method == "auto":
        return "exact" if p < 32 else "gram"
    return method


def _run(run: Callable[[Tensor], svd_algorithms.Factors], matrix: Tensor) -> svd_algorithms.Factors:
    """Run an algorithm on the matrix's device, or on the CPU if memory or fp64 is lacking."""
    with svd_algorithms.full_precision:
        if not has_fp64(matrix.device):
            return run(matrix.cpu())
        try:
            return run(matrix)
        except torch.OutOfMemoryError:
            shape = " x ".join(str(size) for size in matrix.shape)
            need = working_bytes(*matrix.shape) / 1e9
            warnings.warn(
                f"{matrix.device} has too little free memory for a {shape} matrix (about "
                f"{need:.1f} GB); falling back to the CPU, which is slower.",
                stacklevel=3,
            )
        torch.cuda.empty_cache()
        return run(matrix.cpu())


def working_bytes(m: int, n: int) -> int:
    """Estimate the memory that `svd` of an fp32 (m, n) matrix needs in addition to the matrix.

    The Gram matrix in fp64 with the eigensolver's copies, 6 x 8 p^2, one fp64 strip of the matrix
    and the long side's vectors in fp32.
    """
    p, q = min(m, n), max(m, n)
    return 48 * p * p + 8 * p * min(q, 2048) + 8 * p * q


def check_finite(matrix: Tensor) -> None:
    """Raise CheckpointError if the matrix contains NaN or infinity; the caller adds its name."""
    low, high = torch.aminmax(matrix)  # one fast pass; NaN propagates
    if not (torch.isfinite(low) and torch.isfinite(high)):
        wrong = int((~torch.isfinite(matrix)).sum())
        raise CheckpointError(
            f"{wrong} of {matrix.numel()} values are NaN or infinite; expected finite weights. "
            f"The file is damaged or the training diverged: use another copy."
        )


def _signs(Vh: Tensor) -> Tensor:
    """Return +1 or -1 per row, which makes the entry of largest magnitude positive."""
    top = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(top < 0, -1.0, 1.0).to(Vh)


# --- statistics of singular values ---


def stable_rank(spectrum: Spectrum) -> float:
    """Return the stable rank sum S^2 / S_1^2; 0 for a zero matrix."""
    S = spectrum.S.double()
    top = float(S[0]) if len(S) else 0.0
    return float((S / top).square().sum()) if top > 0 else 0.0


def effective_rank(spectrum: Spectrum) -> float:
    """Return exp of the entropy of p_i = S_i / sum S (Roy, Vetterli 2007); 0 for a zero matrix."""
    S = spectrum.S.double()
    total = float(S.sum())
    if total <= 0:
        return 0.0
    p = S / total
    return math.exp(float(-torch.special.xlogy(p, p).sum()))


def spectral_gap(spectrum: Spectrum) -> float:
    """Return (S_1 - S_2) / S_1, in [0, 1]: 1 for rank one, 0 for a tie or a zero matrix."""
    S = spectrum.S.double()
    if not len(S) or float(S[0]) <= 0:
        return 0.0
    return float((S[0] - S[1]) / S[0]) if len(S) > 1 else 1.0


# --- directions above the rounding noise ---


def noise_floor(tuned: Float[Tensor, "m n"], base: Float[Tensor, "m n"]) -> float:
    """Return the singular value of tuned - base that rounding of the stored weights can cause.

    Both files are rounded to the spacing of their dtype (ulp), so the difference contains
    independent errors of variance (ulp_tuned^2 + ulp_base^2) / 12 per element. The spectral norm of
    such noise is at most its largest row norm plus its largest column norm (the Marchenko-Pastur
    edge sigma (sqrt m + sqrt n) if all weights have the same spacing). For weights that were
    converted to a wider dtype after rounding, such as a bf16 model saved in fp32, the spacing is
    that of the narrowest dtype that represents them exactly.
    """
    return noise_floor_of(spacing_sums(tuned), spacing_sums(base))


def spacing_sums(weight: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """Return the sums of ulp^2 over every row and over every column, in fp64; see `noise_floor`."""
    squares = _spacing(weight).square_()
    return squares.sum(1, dtype=torch.float64), squares.sum(0, dtype=torch.float64)


def noise_floor_of(
    tuned: tuple[Float[Tensor, " m"], Float[Tensor, " n"]],
    base: tuple[Float[Tensor, " m"], Float[Tensor, " n"]],
) -> float:
    """Return `noise_floor` from the `spacing_sums` of both weights."""
    return sum(
        math.sqrt(float(torch.stack(both).sum(0).max()) / 12)
        for both in zip(tuned, base, strict=True)
    )


def existing(
    matrix: Float[Tensor, "m n"],
    noise: float,
    *,
    method: str = "auto",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    vectors: str = "both",
    key: tuple[int, str] = (0, ""),
) -> Spectrum:
    """Decompose a task vector and keep the directions that rounding cannot have caused.

    Math:   direction i exists iff S_i > max(c noise, 4 eps_32 S_1), c = `EXISTS` = 4.
            Changing every weight of both files by one unit in the last place causes noise of at
            most 3.6 times the edge that `noise_floor` computes for rounding, so that no such noise
            counts as a direction. The second bound is the resolution of the arithmetic; it is the
            same in fp32 and fp64, so that both find the same directions.
    Shapes: as `svd` with r <= min(m, n) directions; r = 0 for a zero matrix.
    Raises: as `svd`.
    """
    floor = EXISTS * noise
    found = svd(
        matrix, method=method, rank=rank, dtype=dtype, vectors=vectors, key=key, floor=floor
    )
    return found.above(floor)


def _spacing(weight: Tensor) -> Tensor:
    """Return the spacing (ulp) of the weights in the narrowest dtype that represents them."""
    info, size = torch.finfo(_held_by(weight)), as_float(weight)
    kind, exponent = _BITS[size.dtype]
    power = (size.view(kind) & exponent).view(size.dtype)  # 2^floor(log2 |w|)
    return power.clamp_(min=info.smallest_normal).mul_(info.eps)


def _held_by(weight: Tensor) -> torch.dtype:
    """Return the narrowest dtype that represents every value exactly."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype.itemsize > weight.dtype.itemsize or dtype == weight.dtype:
            break
        if _fits(weight.reshape(-1)[:4096], dtype) and _fits(weight, dtype):
            return dtype
    return weight.dtype


def _fits(weight: Tensor, dtype: torch.dtype) -> bool:
    return bool(weight.to(dtype).to(weight.dtype).equal(weight))
