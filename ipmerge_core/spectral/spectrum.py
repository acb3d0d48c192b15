"""One matrix: its task vector, its singular value decomposition, and numbers read off the values.

In: weight matrices (m, n) in any float dtype. Out: a `Spectrum` (U, S, Vh), as `torch.linalg.svd`
returns them, `Vh` being V transposed. No IO, no global random state, no knowledge of models.
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
EXISTS = 4.0  # a direction's singular value stands this many noise floors high, see `existing`
_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}
TOLERANCE = 2e-6  # of randomized: residual relative to S_1^2; fp32 products resolve about 3e-7


@dataclass(frozen=True)
class Spectrum:
    """A thin, possibly truncated, singular value decomposition A = U diag(S) Vh.

    Shapes: U (m, r) or None where it was not asked for, S (r,) descending, Vh (r, n) with
    orthonormal rows. `method` names the route that was taken; `error` (r,) bounds the absolute
    error of each singular value.
    """

    U: Float[Tensor, "m r"] | None
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    method: str = "exact"
    error: Float[Tensor, " r"] | None = None

    def matrix(self) -> Float[Tensor, "m n"]:
        """Multiply the factors together: A, truncated to the kept triplets."""
        assert self.U is not None, "a spectrum without U cannot be multiplied out"
        return (self.U * self.S) @ self.Vh

    def leading(self, rank: int) -> Spectrum:
        """Keep the first `rank` triplets, or all where there are fewer."""
        return Spectrum(
            None if self.U is None else self.U[:, :rank],
            self.S[:rank],
            self.Vh[:rank],
            self.method,
            None if self.error is None else self.error[:rank],
        )

    def above(self, floor: float) -> Spectrum:
        """Keep the triplets that stand above a singular value and above rounding; see `existing`.

        >>> svd(torch.diag(torch.tensor([3.0, 1.0, 1e-9]))).above(0.5).S
        tensor([3., 1.])
        """
        strongest = float(self.S[0]) if len(self.S) else 0.0
        return self.leading(int((max(floor, svd_algorithms.RESOLUTION * strongest) < self.S).sum()))


def as_float(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32; fp64 is kept."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def task_vector(tuned: Float[Tensor, "m n"], base: Float[Tensor, "p q"]) -> Float[Tensor, "m n"]:
    """Return dW = W - W0 in fp32, or fp64 where either is stored so.

    Raises: ShapeError for unequal shapes.
    """
    if tuned.shape != base.shape:
        raise ShapeError(
            f"The tuned matrix has shape {tuple(tuned.shape)} and its base {tuple(base.shape)}; "
            f"a task vector needs equal shapes: are both from one family?"
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
    """Decompose a matrix into A = U diag(S) Vh, signs fixed, strongest direction first.

    The sign of a pair (u_i, v_i) is arbitrary; here the entry of v_i that is largest in magnitude
    (the first of equals) is positive. Directions whose S is zero are arbitrary but orthonormal, so
    a zero matrix has a spectrum too. The result depends on the arguments alone.

    With p = min(m, n), and processor time relative to fp32 `torch.linalg.svd` as measured on task
    vectors 1024 to 2048 wide, square to 5:1 (`benchmarks/bench_spectrum.py`):

    method      answers                    error of S_i                      cost
    exact       anything, to the last bit  about eps_64 S_1                  SVD in fp64, about 2
    gram        all values, all vectors    fp64: eps_64 S_1^2 / S_i          0.1 to 0.4; with
                                           fp32: eps_32 S_c^2 / S_i, c > 1   vectors 0.2 to 0.7
    randomized  the leading `rank`         residual_i / S_i                  0.02 to 0.1 for 8
    auto        randomized where 4 rank + 64 < p, else gram; exact below p = 32

    For an fp32 result, gram finds the leading c or so directions in fp64 and the rest in fp32, and
    takes fp64 throughout where that could change sum S by 1e-4 of itself. Ask for
    dtype=torch.float64 where the small end of the spectrum matters. A randomized result is never
    worse than asked for: where a residual stays above `tolerance`, gram takes over.

    Args:
        matrix: (m, n) in any float dtype.
        method: the route; `Spectrum.method` says which was taken.
        rank: keep the leading triplets only, at most p; None keeps all.
        dtype: of the result, fp32 (default; fp64 for fp64 input) or fp64.
        vectors: "right" leaves U out, which saves a product.
        key: (seed, name) of the random start of randomized; no other state is used.
        tolerance: of randomized: the largest residual ||A A^T u_i - S_i^2 u_i|| / S_1^2 that the
            caller can bear; None is what is aimed at: 2e-6 for fp32, which its products resolve,
            1e-11 for fp64.
        floor: a singular value; which S stand above it (and above 4 eps_32 S_1) must be certain,
            as `existing` needs it.

    Raises:
        CheckpointError: the matrix holds NaN or infinity.
        PlanError: unknown method or vectors, a rank below 1, or another dtype.
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


def _signed(
    found: svd_algorithms.Factors,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    left: bool,
) -> Spectrum:
    """Put the triplets in order and fix their signs."""
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
    """All singular values and no vectors, in fp64, descending; their sum is the nuclear norm.

    Error as `svd` by gram: with dtype fp32 (the default for fp32 input) the sum is right to 1e-4
    by its bound and about 1e-7 as measured; with fp64 every value is right to eps_64 S_1^2 / S_i.
    Costs the product A A^T and the eigenvalues of a (p, p) matrix, a third of what vectors cost.

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
    """Check the arguments; return the matrix in its working precision, and the result's dtype."""
    if method not in SVD_METHODS:
        raise PlanError(f"Unknown method '{method}' of svd. Available: {', '.join(SVD_METHODS)}.")
    if rank is not None and rank < 1:
        raise PlanError(f"The rank is {rank}; expected a whole number >= 1, or none for all.")
    if dtype not in (None, torch.float32, torch.float64):
        raise PlanError(f"The dtype of a spectrum is {dtype}; expected torch.float32 or float64.")
    if matrix.numel() == 0:
        raise PlanError(f"The matrix has shape {tuple(matrix.shape)}; expected at least one entry.")
    work = as_float(matrix)
    check_finite(work)
    result = dtype or work.dtype
    return (work.double() if result == torch.float64 else work), result


def _route(method: str, p: int, rank: int) -> str:
    """Name the route to take; a randomized one needs room for its basis."""
    leading = 4 * rank + 64 < p
    if method == "randomized" or (method == "auto" and leading):
        return "randomized" if leading else "gram"
    if method == "auto":
        return "exact" if p < 32 else "gram"
    return method


def _run(run: Callable[[Tensor], svd_algorithms.Factors], matrix: Tensor) -> svd_algorithms.Factors:
    """Run a route where the matrix lies; on the CPU when the device lacks memory or fp64."""
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
                f"{need:.1f} GB); decomposing it on the CPU, which is slower.",
                stacklevel=3,
            )
        torch.cuda.empty_cache()
        return run(matrix.cpu())


def working_bytes(m: int, n: int) -> int:
    """Estimate the memory that `svd` of an fp32 (m, n) matrix takes beside the matrix itself.

    The Gram matrix in fp64 with the eigensolver's copies, 6 x 8 p^2, one fp64 strip of the matrix
    and the long side's vectors in fp32.
    """
    p, q = min(m, n), max(m, n)
    return 48 * p * p + 8 * p * min(q, 2048) + 8 * p * q


def check_finite(matrix: Tensor) -> None:
    """Raise CheckpointError when the matrix holds NaN or infinity; the caller adds its name."""
    low, high = torch.aminmax(matrix)  # one quick pass; NaN wins
    if not (torch.isfinite(low) and torch.isfinite(high)):
        wrong = int((~torch.isfinite(matrix)).sum())
        raise CheckpointError(
            f"{wrong} of {matrix.numel()} values are NaN or infinite; expected finite weights. "
            f"The file is damaged or its training diverged: fetch or train it again."
        )


def _signs(Vh: Tensor) -> Tensor:
    """+1 or -1 for each row, so that its entry of largest magnitude becomes positive."""
    top = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(top < 0, -1.0, 1.0).to(Vh)


# --- numbers read off the values ---


def stable_rank(spectrum: Spectrum) -> float:
    """Return sum S^2 / S_1^2: how many directions as strong as the first; 0 for a zero matrix."""
    S = spectrum.S.double()
    top = float(S[0]) if len(S) else 0.0
    return float((S / top).square().sum()) if top > 0 else 0.0


def effective_rank(spectrum: Spectrum) -> float:
    """Return exp of the entropy of p_i = S_i / sum S (Roy, Vetterli 2007); 0 for a zero one."""
    S = spectrum.S.double()
    total = float(S.sum())
    if total <= 0:
        return 0.0
    p = S / total
    return math.exp(float(-torch.special.xlogy(p, p).sum()))


def energy_rank(spectrum: Spectrum, fraction: float = 0.9) -> int:
    """Least k with sum_{i<=k} S_i^2 >= fraction * sum S^2; 0 for a zero matrix."""
    if not 0 < fraction <= 1:
        raise PlanError(f"The energy fraction is {fraction}; expected a number in (0, 1].")
    energy = spectrum.S.double().square().cumsum(0)
    if not len(energy) or float(energy[-1]) <= 0:
        return 0
    reached = energy < fraction * energy[-1]
    return min(int(reached.sum()) + 1, len(energy))


def spectral_gap(spectrum: Spectrum) -> float:
    """(S_1 - S_2) / S_1, in [0, 1]: 1 for rank one, 0 for a tie and for a zero matrix."""
    S = spectrum.S.double()
    if not len(S) or float(S[0]) <= 0:
        return 0.0
    return float((S[0] - S[1]) / S[0]) if len(S) > 1 else 1.0


# --- which directions exist ---


def noise_floor(tuned: Float[Tensor, "m n"], base: Float[Tensor, "m n"]) -> float:
    """Singular value of tuned - base below which it may all be rounding of the stored files.

    Both files round to the spacing of their dtype (ulp), so the difference carries independent
    errors of variance (ulp_tuned^2 + ulp_base^2) / 12 per element. The norm of such noise is
    at most its largest row norm plus its largest column norm (Marchenko-Pastur's edge
    sigma (sqrt m + sqrt n) where all weights have one spacing). Weights that were widened after
    they had been rounded, as a bf16 model saved in fp32, count with the dtype that holds them.
    """
    squares = [_spacing(W).square_() for W in (tuned, base)]
    sums = [[square.sum(axis, dtype=torch.float64) for square in squares] for axis in (1, 0)]
    return sum(math.sqrt(float(torch.stack(both).sum(0).max()) / 12) for both in sums)


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
    """Decompose a task vector and keep the directions that rounding could not have made.

    Math:   direction i exists iff S_i > max(c noise, 4 eps_32 S_1), c = `EXISTS` = 4.
            Moving every weight of both files by one unit in the last place makes noise of at most
            3.6 times the edge that `noise_floor` computes for their rounding; so no such noise
            makes a direction. The second bound is what the arithmetic resolves; it is the same in
            fp32 and fp64, so that both find the same directions.
    Shapes: as `svd` with r <= min(m, n) directions; r = 0 for a zero matrix.
    Raises: as `svd`.
    """
    floor = EXISTS * noise
    found = svd(
        matrix, method=method, rank=rank, dtype=dtype, vectors=vectors, key=key, floor=floor
    )
    return found.above(floor)


def _spacing(weight: Tensor) -> Tensor:
    """Distance between neighbouring numbers of the dtype that holds the weights (ulp)."""
    info, size = torch.finfo(_held_by(weight)), as_float(weight)
    kind, exponent = _BITS[size.dtype]
    power = (size.view(kind) & exponent).view(size.dtype)  # 2^floor(log2 |w|)
    return power.clamp_(min=info.smallest_normal).mul_(info.eps)


def _held_by(weight: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every value exactly; it may be stored in a wider one."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype.itemsize > weight.dtype.itemsize or dtype == weight.dtype:
            break
        if _fits(weight.reshape(-1)[:4096], dtype) and _fits(weight, dtype):
            return dtype
    return weight.dtype


def _fits(weight: Tensor, dtype: torch.dtype) -> bool:
    return bool(weight.to(dtype).to(weight.dtype).equal(weight))
