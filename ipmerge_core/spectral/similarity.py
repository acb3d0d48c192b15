"""Similarity of the right singular vectors of two spectra, and IP-Merging's projected update.

In: the spectra of an MLLM's and a math model's task vectors for one matrix. Out: corresponding
angles, their summaries, and the projected update, as a matrix or as factors. Source: IP-Merging,
arXiv 2510.14387. No IO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.errors import PlanError, ShapeError
from ipmerge_core.spectral.kinds import SIMILARITIES, TEMPERATURE
from ipmerge_core.spectral.spectrum import Spectrum, as_float

_EPS = torch.finfo(torch.float32).eps


def corresponding_angles(a: Spectrum, b: Spectrum) -> Float[Tensor, " r"]:
    """Compute the alignment of index-matched right singular vectors, strongest direction first.

    A direction whose singular value is at the rounding level (eps_fp32 of the largest) is
    meaningless and gets 0, so that a zero task vector has similarity 0 to any other.

    Math:   s_i = |<v_a,i, v_b,i>|, i = 1..min(r_a, r_b).
    Shapes: Vh (r, n) with orthonormal rows in both. Result (r,), in [0, 1].
    Raises: ShapeError if n differs.
    Source: IP-Merging, arXiv 2510.14387, Definition 1; absolute value because singular vectors
            have no sign.

    >>> from ipmerge_core.spectral.spectrum import svd
    >>> corresponding_angles(svd(torch.eye(3)), svd(torch.eye(3)))
    tensor([1., 1., 1.])
    """
    _check_width(a, b)
    r = min(len(a.S), len(b.S))
    cosines = (a.Vh[:r] * b.Vh[:r]).sum(1).abs().clamp(max=1.0)
    meant = _is_meant(a)[:r] & _is_meant(b)[:r]
    return torch.where(meant, cosines, torch.zeros_like(cosines))


def similarities(angles: Float[Tensor, " r"], a: Spectrum, b: Spectrum) -> dict[str, float]:
    """Return all three summaries of `similarity_of`, by name."""
    return {kind: similarity_of(angles, a, b, kind) for kind in SIMILARITIES}


def similarity_of(angles: Float[Tensor, " r"], a: Spectrum, b: Spectrum, kind: str) -> float:
    """Reduce corresponding angles to one number in [0, 1].

    Math:   first     s_1
            max       max_i s_i
            weighted  sum_i S_a,i S_b,i s_i / sum_i S_a,i S_b,i, 0 if the denominator is 0
    Raises: PlanError for another kind.
    """
    if kind in SIMILARITIES and not len(angles):
        return 0.0  # no direction in common
    if kind == "first":
        return float(angles[0])
    if kind == "max":
        return float(angles.max())
    if kind == "weighted":
        weights = a.S[: len(angles)].double() * b.S[: len(angles)].double()
        total = float(weights.sum())
        mean = float(weights @ angles.double()) / total if total > 0 else 0.0
        return min(mean, 1.0)
    raise PlanError(f"Unknown similarity '{kind}'. Available: {', '.join(SIMILARITIES)}.")


def principal_cosines(a: Spectrum, b: Spectrum, k: int) -> Float[Tensor, " k"]:
    """Compute the cosines of the principal angles between the leading k directions, descending.

    Math:   singular values of V_a,k^T V_b,k; unlike corresponding angles they do not depend on
            the order of directions inside the two subspaces.
    Shapes: result (k,), in [0, 1].
    Raises: ShapeError if n differs, PlanError if k is not in 1..min(r_a, r_b).
    """
    _check_width(a, b)
    if not 1 <= k <= min(len(a.S), len(b.S)):
        raise PlanError(
            f"k is {k}; expected 1 to {min(len(a.S), len(b.S))}, the number of directions in both."
        )
    cosines: Tensor = torch.linalg.svdvals(a.Vh[:k] @ b.Vh[:k].T)
    return cosines.clamp(max=1.0)


def chance_level(n: int, kind: str, r: int | None = None) -> float:
    """Compute the expected similarity of two unrelated bases of r directions in n dimensions.

    Math:   the entries of a random direction are approximately normal with variance 1 / n, so
            first, weighted  E|z| / sqrt n = sqrt(2 / (pi n))
            max              median of the maximum of r of them: erf(x / sqrt 2) = 2^(-1/r)
    Raises: PlanError for another kind.
    """
    if kind in ("first", "weighted"):
        return min(math.sqrt(2 / (math.pi * n)), 1.0)
    if kind != "max":
        raise PlanError(f"Unknown similarity '{kind}'. Available: {', '.join(SIMILARITIES)}.")
    share = torch.tensor(0.5 ** (1 / (r or n)), dtype=torch.float64)
    return min(math.sqrt(2 / n) * float(torch.erfinv(share)), 1.0)


# --- the update ---


def nuclear_ratio(mllm: Spectrum, math: Spectrum) -> float:
    """Return rho = sum S_mllm / sum S_math, which rescales dM to the nuclear norm of dV.

    0 if the math task vector is zero.
    """
    total = float(math.S.double().sum())
    return float(mllm.S.double().sum()) / total if total > 0 else 0.0


def importance(
    angles: Float[Tensor, " r"],
    temperature: float = TEMPERATURE,
    gamma_norm: str = "sum",
) -> Float[Tensor, " r"]:
    """Compute the weight of each direction in the projection.

    Math:   gamma = softmax(tau s), sum gamma = 1 (the paper); "max" divides by max gamma, so
            that the best-aligned direction has weight 1.
    Raises: PlanError for a temperature that is not a positive number, or an unknown norm.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise PlanError(f"The temperature is {temperature}; expected a number > 0, such as 32.")
    if gamma_norm not in ("sum", "max"):
        raise PlanError(f"Unknown gamma_norm '{gamma_norm}'. Available: sum, max.")
    gamma = torch.softmax(temperature * angles.double(), dim=0)
    if not len(gamma):
        return angles
    return (gamma / gamma.max() if gamma_norm == "max" else gamma).to(angles.dtype)


def top_k_importance(angles: Float[Tensor, " r"], k: int) -> Float[Tensor, " r"]:
    """Return the weights of the projector on the first k directions: 1 for those, else 0."""
    if k < 1:
        raise PlanError(f"top_k is {k}; expected an integer >= 1.")
    return (torch.arange(len(angles), device=angles.device) < k).to(angles.dtype)


def strengths(gamma: Float[Tensor, " r"], mllm: Spectrum) -> Float[Tensor, " r"]:
    """Return diag(gamma^2) of the projector, 0 for arbitrary directions in which dV is zero."""
    return gamma.square() * _is_meant(mllm)[: len(gamma)]


@dataclass(frozen=True)
class Update:
    """A matrix kept as the product of two thin factors, P = gain left @ right.

    Norms and inner products are computed from the factors in fp64, without forming P.
    """

    left: Float[Tensor, "m q"]
    right: Float[Tensor, "q n"]
    gain: float = 1.0

    def matrix(self) -> Float[Tensor, "m n"]:
        """Form P; the gain is applied to the product, which is rounded once more."""
        product = self.left @ self.right
        return product if self.gain == 1.0 else self.gain * product

    def scaled(self, factor: float) -> Update:
        """Return factor * P, with the same factors."""
        return replace(self, gain=self.gain * factor)

    @property
    def norm2(self) -> float:
        """||P||_F^2."""
        return self.inner(self)

    def inner(self, other: Update) -> float:
        """<P, Q> = <left_P^T left_Q, right_P right_Q^T>."""
        lefts = self.left.double().T @ other.left.double()
        product = float((lefts * (self.right.double() @ other.right.double().T)).sum())
        return self.gain * other.gain * product

    def inner_with(self, matrix: Float[Tensor, "m n"]) -> float:
        """<A, P> = <A right^T, left> for a dense matrix A."""
        product = (as_float(matrix) @ self.right.T).double() * self.left.double()
        return self.gain * float(product.sum())


def update_factors(
    math_task_vector: Float[Tensor, "m n"],
    mllm: Spectrum,
    gamma: Float[Tensor, " r"],
    rho: float,
    *,
    math: Spectrum | None = None,
) -> Update:
    """Compute IP-Merging's update as factors, without forming an n x n matrix.

    Directions are dropped only if together they change P by less than fp32 rounding:
    since ||dM V_D diag(gamma_D^2)||_F <= ||dM||_F max gamma_D^2, the set D is dropped when
    ||dM||_F max gamma_D^2 <= eps_fp32 / 2 ||dM V_K diag(gamma_K^2)||_F for the kept set K.
    Directions in which dV is zero are arbitrary and excluded from the projector.

    Math:   P = rho dM V_V diag(gamma^2) V_V^T = left right, with
            left (m, q) = rho dM V_K diag(gamma_K^2), right (q, n) = V_K^T.

    Args:
        math_task_vector: dM (m, n).
        mllm: spectrum of the MLLM's task vector, for V_V.
        gamma: one weight per direction, at most as many as `mllm` has.
        rho: the rescaling, `nuclear_ratio`.
        math: if given, dM is first truncated to the directions of this spectrum.
    """
    _check_matrix(math_task_vector, mllm)
    dM = as_float(math_task_vector)
    strength = strengths(gamma.to(dM), mllm)
    order = torch.argsort(strength, descending=True, stable=True)
    size = float(dM.double().norm())
    kept = 0
    left = dM.new_empty(dM.shape[0], 0)
    while True:
        more = order[kept : max(2 * kept, 32)]
        left = torch.cat([left, _apply(dM, mllm.Vh[more].to(dM), math) * strength[more]], dim=1)
        kept += len(more)
        rest = float(strength[order[kept]]) if kept < len(order) else 0.0
        if size * rest <= 0.5 * _EPS * float(left.double().norm()):
            break
    return Update(left * rho, mllm.Vh[order[:kept]].to(dM))


def projected_update(
    math_task_vector: Float[Tensor, "m n"],
    mllm: Spectrum,
    gamma: Float[Tensor, " r"],
    rho: float,
    *,
    math: Spectrum | None = None,
) -> Float[Tensor, "m n"]:
    """Compute P = rho dM V_V diag(gamma^2) V_V^T; arguments and bounds as in `update_factors`."""
    return update_factors(math_task_vector, mllm, gamma, rho, math=math).matrix()


def truncated(matrix: Float[Tensor, "m n"], spectrum: Spectrum) -> Float[Tensor, "m n"]:
    """Return A V V^T, the projection on the spectrum's right singular vectors; U is not needed."""
    _check_matrix(matrix, spectrum)
    A = as_float(matrix)
    basis = spectrum.Vh.to(A)
    return (A @ basis.T) @ basis


def _apply(dM: Tensor, directions: Tensor, math: Spectrum | None) -> Tensor:
    """Return dM @ directions^T, with dM truncated to the directions of `math` if given."""
    if math is not None:
        basis = math.Vh.to(dM)
        directions = (directions @ basis.T) @ basis
    return dM @ directions.T


def _is_meant(spectrum: Spectrum) -> Tensor:
    """Return a mask of the directions above fp32 rounding; the others are arbitrary."""
    return spectrum.S.gt(_EPS * float(spectrum.S[:1].sum()))


def _check_width(a: Spectrum, b: Spectrum) -> None:
    if a.Vh.shape[1] != b.Vh.shape[1]:
        raise ShapeError(
            f"The right singular vectors have {a.Vh.shape[1]} and {b.Vh.shape[1]} entries; "
            f"expected matrices with equal numbers of columns."
        )


def _check_matrix(matrix: Tensor, spectrum: Spectrum) -> None:
    if matrix.shape[1] != spectrum.Vh.shape[1]:
        raise ShapeError(
            f"The math task vector has shape {tuple(matrix.shape)} and the MLLM's directions have "
            f"{spectrum.Vh.shape[1]} entries; expected as many columns as entries."
        )
