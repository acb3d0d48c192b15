"""All singular values of a weight matrix, in fp32, at a fraction of the cost of a decomposition.

In: a weight matrix (m, n). Out: its min(m, n) singular values, accurate enough to plot them. Task
vectors, on whose values decisions depend, are decomposed by `spectrum.svd` instead.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ipmerge_core.spectral.spectrum import as_float, check_finite
from ipmerge_core.spectral.svd_algorithms import Key, full_precision, krylov, start

_HEAD = 8  # leading directions that are deflated if they converge
_BUDGET = 32  # Krylov vectors: four passes over the matrix
_CONVERGED = 1e-6  # residual relative to S_1^2, which fp32 products resolve
_SQUARABLE = (1e-12, 1e12)  # sizes of entries whose squared sums fp32 represents
_STRIPS = 4  # of the Gram matrix, of which only the lower triangle is computed


def weight_values(weight: Float[Tensor, "m n"], *, key: Key = (0, "")) -> Float[Tensor, " p"]:
    """Compute all singular values, descending, in fp64 from fp32 arithmetic.

    Math:   the leading pairs (S_i, x_i) that converge within a few Krylov steps are deflated from
            B = A or A^T with p = min(m, n) rows: B' = B - X^T X B. The other values are the square
            roots of the eigenvalues of B' B'^T.
    Error:  |dS_i| <= about 10 eps_32 S_c^2 / S_i, S_c the first value that was not deflated: below
            0.1 % for S_i > S_c / 30, as for nearly all values of trained weights.
    Cost:   m n p flops for the Gram matrix and 4/3 p^3 for the eigenvalues, in fp32.
    Raises: CheckpointError if the weight contains NaN or infinity.
    """
    A = as_float(weight)
    check_finite(A)
    B = A if A.shape[0] <= A.shape[1] else A.T
    p, scale = B.shape[0], max(abs(float(end)) for end in torch.aminmax(B))
    if scale == 0:
        return B.new_zeros(p, dtype=torch.float64)
    if not _SQUARABLE[0] < scale < _SQUARABLE[1]:
        return scale * weight_values(B / scale, key=key)
    with full_precision:
        head = _deflated(B, key) if p > 4 * _HEAD else B.new_empty(0, p)
        images = head @ B
        rest = torch.addmm(B, head.T, images, alpha=-1) if len(head) else B
        squares = torch.linalg.eigvalsh(_lower_gram(rest)).double()
    found = torch.cat([images.double().norm(dim=1), squares[len(head) :].clamp(min=0).sqrt()])
    return found.sort(descending=True).values


def _deflated(B: Tensor, key: Key) -> Tensor:
    """Return the leading left singular vectors that converge, as rows (k, p)."""
    first = start(B.shape[0], _HEAD, key, B)
    found = krylov(lambda rows: (rows @ B) @ B.T, first, _HEAD, _CONVERGED, _BUDGET)
    return found.converged(_CONVERGED).rows


def _lower_gram(B: Tensor) -> Tensor:
    """Compute B B^T; above the diagonal only the blocks that contain it are filled."""
    p = len(B)
    step = -(-p // _STRIPS)
    G = B.new_zeros(p, p)
    for first in range(0, p, step):
        G[first:, first : first + step] = B[first:] @ B[first : first + step].T
    return G
