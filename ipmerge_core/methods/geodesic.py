"""Spherical merge methods: SLERP, NuSLERP, Multi-SLERP, the Karcher mean and Model Stock.

In: base, mllm and math matrices of one shape (m, n), as vectors from the origin (or from the base).
Out: the merged matrix in fp32, or fp64 for fp64 inputs. Angles and norms are computed in fp64.
Fine-tunes of one base are often so nearly parallel that the arc between weights is almost the
straight line; between task vectors it is not.
"""

from __future__ import annotations

import math as mathematics
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.methods.blocks import blockwise, blockwise_sum, inner_products
from ipmerge_core.methods.declarations import AffineUpdate, Matrix
from ipmerge_core.methods.elementwise import add_to_base_, changes_, weighted_sum_
from ipmerge_core.methods.ranges import Range
from ipmerge_core.methods.registry import Experts, as_list, merge_method

Step: TypeAlias = Annotated[float, Range(low=0, high=1, help="0 is the MLLM, 1 the expert")]
Turned: TypeAlias = Annotated[
    Literal["task_vectors", "weights"], Range(help="interpolate task vectors or weights")
]
Sliced: TypeAlias = Annotated[
    Literal["tensor", "row", "column"], Range(help="one angle per matrix, row or column")
]
MllmShare: TypeAlias = (
    Annotated[float, Range(low=0, high=1, help="share of the MLLM; none: equal shares")] | None
)
Averaged: TypeAlias = Annotated[
    Literal["all", "experts"],
    Range(help="average the MLLM and the experts, or add the average of the experts to the MLLM"),
]
Rows: TypeAlias = Annotated[Literal["tensor", "row"], Range(help="one angle per matrix or row")]
_NEARLY_STRAIGHT = "the arc is approximated by a straight line, as the models are nearly parallel"
_NEARLY_PARALLEL = 0.9995  # |cos| above which SLERP of weights is a straight line (mergekit)
_SMALLEST_SINE = 1e-4  # below it the coefficients diverge for nearly opposite directions
_BALANCED = 1e-8  # length of a mean of unit vectors below which it has no direction (mergekit)
_SINGULAR = 1e-6  # divisor of Model Stock (mergekit)
_STEPS, _TOLERANCE = 10, 1e-5  # of the Karcher iteration (mergekit)


def arc_coefficients(cosine: float, t: float) -> tuple[float, float]:
    """Return the coefficients of both ends at the fraction t of the arc between them."""
    theta = mathematics.acos(max(-1.0, min(1.0, cosine)))
    sine = mathematics.sin(theta)
    return mathematics.sin((1 - t) * theta) / sine, mathematics.sin(t * theta) / sine


def _chord(parameters: Mapping[str, Any]) -> AffineUpdate:
    """Return the straight line instead of the arc, with a relative error of (1 - t) w / 2."""
    t = parameters["t"]
    return AffineUpdate(-t, t, "select_only", approximate=_NEARLY_STRAIGHT)


@merge_method(
    label="SLERP",
    source="Shoemake 1985",
    formula="W = (sin((1 - t) w) W_v + sin(t w) W_e) / sin w, w = angle(W_v, W_e)",
    gain="t",
    affine=_chord,
    anchor="interp",
)
def slerp(base: Matrix, mllm: Matrix, math: Matrix, *, t: Step = 0.1) -> Matrix:
    """Interpolate along the great circle from the MLLM to the expert; the base is not used.

    Math:   w = arccos(<W_v, W_e> / (|W_v| |W_e|)) over the flattened matrices;
            W = (sin((1 - t) w) W_v + sin(t w) W_e) / sin w; a straight line if |cos w| > 0.9995.
    Shapes: all (m, n). t = 0 gives W_v bitwise.
    Source: K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; as in mergekit,
            whose "base model" is the end at t = 0.
    """
    cosine = float(_cosine(blockwise_sum(_products, mllm, math)))
    turned = abs(cosine) <= _NEARLY_PARALLEL  # false for NaN, which propagates to the result
    a, b = arc_coefficients(cosine, t) if turned else (1 - t, t)
    return blockwise(lambda W_v, W_e: W_v.mul_(a).add_(W_e.mul_(b)), mllm, math)


def _arc(parameters: Mapping[str, Any]) -> AffineUpdate | None:
    """Return the affine form for whole task vectors, whose angle an analysis contains."""
    if parameters["of"] == "weights":
        return _chord(parameters) if parameters["per"] == "tensor" else None
    if parameters["per"] != "tensor":
        return None
    a, b = _between(parameters["t"], parameters.get("cosine"))
    return AffineUpdate(a - 1.0, b, "select_only")


def _between(t: float, cosine: float | None) -> tuple[float, float]:
    """Return the coefficients on the arc, or on the straight line if the angle is degenerate."""
    sine = 0.0 if cosine is None else mathematics.sqrt(max(0.0, 1.0 - cosine * cosine))
    if cosine is None or sine < _SMALLEST_SINE:
        return 1.0 - t, t
    return arc_coefficients(cosine, t)


@merge_method(
    label="NuSLERP",
    source="mergekit, `nuslerp`",
    formula="W = W0 + (sin((1 - t) w) dW_v + sin(t w) dW_e) / sin w, w = angle(dW_v, dW_e)",
    affine=_arc,
    unknown="every row or column has its own angle, which requires reading the weights",
)
def nuslerp(
    base: Matrix,
    mllm: Matrix,
    math: Matrix,
    *,
    t: Step = 0.1,
    of: Turned = "task_vectors",
    per: Sliced = "tensor",
) -> Matrix:
    """Interpolate along the arc between task vectors, for the whole matrix or per slice.

    Math:   x = W_v - W0, y = W_e - W0 (or the weights themselves); w = angle(x, y);
            W = W0 + (sin((1 - t) w) x + sin(t w) y) / sin w; a straight line if sin w < 1e-4.
    Shapes: all (m, n). A row contains the n input weights of one output.
    Source: mergekit's nuslerp. Its `nuslerp_flatten` is per "tensor"; without it, its
            `nuslerp_row_wise` false is per "row" here and true is per "column", the reverse of its
            documentation. The guard on sin w is an addition: nearly opposite slices would diverge.
    """

    def ends(W0: Tensor, W_v: Tensor, W_e: Tensor) -> list[Tensor]:
        return [W_v, W_e] if of == "weights" else changes_(W0, W_v, W_e)

    dim = {"tensor": None, "row": 1, "column": 0}[per]

    def products(*models: Tensor) -> Tensor:
        x, y = ends(*models)
        return _products(x, y, dim)

    found = None
    if dim != 1:  # a block contains whole rows, but only parts of columns
        found = _slice_coefficients(blockwise_sum(products, base, mllm, math), t)

    def merge(W0: Tensor, W_v: Tensor, W_e: Tensor) -> Tensor:
        x, y = ends(W0, W_v, W_e)
        a, b = found or _slice_coefficients(_products(x, y, dim), t)
        moved = x.mul_(a.to(x)).add_(y.mul_(b.to(x)))
        return moved if of == "weights" else add_to_base_(W0, W_v, moved)

    return blockwise(merge, base, mllm, math)


def _products(x: Tensor, y: Tensor, dim: int | None = None) -> Tensor:
    """Compute <x, x>, <x, y>, <y, y> in fp64, over all elements or per row (1) or column (0)."""
    if dim is None:
        return inner_products(x, y)[[0, 0, 1], [0, 1, 1]]
    x, y = x.double(), y.double()
    return torch.stack([(a * b).sum(dim, keepdim=True) for a, b in ((x, x), (x, y), (y, y))])


def _cosine(products: Tensor) -> Tensor:
    """Compute the cosine from <x, x>, <x, y> and <y, y>; 1 if a norm is zero."""
    norms = (products[0] * products[2]).sqrt()
    return torch.where(norms > 0, products[1] / norms.masked_fill(norms == 0, 1), 1.0)


def _slice_coefficients(products: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return the coefficients of every slice, on the straight line if its angle is degenerate."""
    angle = _cosine(products).clamp(-1, 1).arccos()
    straight = angle.sin() < _SMALLEST_SINE
    sine = angle.sin().masked_fill(straight, 1)
    a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    b = torch.where(straight, t, (t * angle).sin() / sine)
    return a, b


def _shares(alpha: float | None, count: int) -> Tensor:
    """Return the MLLM's share and those of the experts, in fp64; equal for None."""
    own = 1 / count if alpha is None else alpha
    return torch.tensor([own] + [(1 - own) / (count - 1)] * (count - 1), dtype=torch.float64)


@merge_method(
    label="Multi-SLERP",
    source="mergekit, `multislerp`",
    formula="W = W0 + (sum_i a_i |dW_i|) u, u the direction of sum_i a_i dW_i / |dW_i|",
    several_experts=True,
    unknown="it depends on the angles between all task vectors",
)
def multislerp(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    alpha: MllmShare = None,
    of: Turned = "task_vectors",
) -> Matrix:
    """Average the directions of the task vectors, and their norms.

    Math:   x_i = W_i - W0 (or W_i), u_i = x_i / |x_i|, s = sum_i a_i u_i;
            W = W0 + (sum_i a_i |x_i|) s / |s|. Where |s| < 1e-8 (opposite directions that balance)
            W = W0 + sum_i a_i x_i.
    Shapes: all (m, n). alpha is the MLLM's share, the experts split the rest; none: equal shares.
            A task vector of zero has no direction and norm 0.
    Source: mergekit's multislerp, which then adds the mean of the u_i in the tangent space at s;
            for weights that sum to 1 this mean is zero. With opposite directions of more than two
            models it raises an error.
    """
    tuned = [mllm, *as_list(math)]

    def vectors(W0: Tensor, *models: Tensor) -> list[Tensor]:
        return list(models) if of == "weights" else changes_(W0, *models)

    def products(*models: Tensor) -> Tensor:
        return inner_products(*vectors(*models))

    gram = blockwise_sum(products, base, *tuned).cpu()
    shares, norms = _shares(alpha, len(tuned)), gram.diagonal().sqrt()
    directions = torch.where(norms > 0, shares / norms.masked_fill(norms == 0, 1), 0.0)
    directions = torch.where(norms.isnan(), norms, directions)
    size = float((directions @ gram @ directions).clamp(min=0).sqrt())
    length = float((shares * norms).sum())
    coefficients = shares if size < _BALANCED else length / size * directions

    def merge(W0: Tensor, W_v: Tensor, *experts: Tensor) -> Tensor:
        moved = weighted_sum_(vectors(W0, W_v, *experts), coefficients.tolist())
        return moved if of == "weights" else add_to_base_(W0, W_v, moved)

    return blockwise(merge, base, *tuned)


@merge_method(
    label="Model Stock",
    source="arXiv 2403.19522",
    formula="W = W0 + t sum_i dW_i / N, t = N c / (1 + (N - 1) c), c the mean cosine of the dW_i",
    several_experts=True,
    unknown="it depends on the angles between all task vectors",
)
def model_stock(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    models: Averaged = "all",
    per: Rows = "tensor",
) -> Matrix:
    """Move from the base towards the mean of the models, the further the more they agree.

    Math:   c = mean over pairs of cos(dW_i, dW_j), t = N c / (1 + (N - 1) c), 0 where the divisor
            is below 1e-6 (opposite task vectors);
            all: W = W0 + t mean_i dW_i over the MLLM and the experts;
            experts: W = W_v + t mean_k dM_k over the N experts only; t = 1 for one expert.
            The angle is that of the whole matrix, or of every row.
    Shapes: all (m, n).
    Source: Model Stock, arXiv 2403.19522, for models tuned on one task; as in mergekit
            (`model_stock`, whose `filter_wise` is per row). Where c is negative so is t, and the
            result lies on the other side of the base. `experts` is an addition: with `all`, an MLLM
            and an expert of another task are nearly orthogonal, so the result is close to the base.
    """
    tuned = [mllm, *as_list(math)]
    first = 0 if models == "all" else 1

    def products(W0: Tensor, *block: Tensor) -> Tensor:
        return inner_products(*changes_(W0, *block)[first:])

    whole = None if per == "row" else _stock_ratio(blockwise_sum(products, base, *tuned))

    def merge(W0: Tensor, W_v: Tensor, *experts: Tensor) -> Tensor:
        changes = torch.stack(changes_(W0, W_v, *experts)[first:])
        t = _stock_ratio(_row_products(changes))[:, None] if whole is None else whole
        mean = changes.mean(0) * t.to(changes)
        return W_v.add_(mean) if first else add_to_base_(W0, W_v, mean)

    return blockwise(merge, base, *tuned)


def _row_products(changes: Tensor) -> Tensor:
    """Compute <x_i, x_j> of every row in fp64. Shapes: changes (N, m, n), result (m, N, N)."""
    rows = changes.double().transpose(0, 1)
    return rows @ rows.transpose(1, 2)


def _stock_ratio(products: Tensor) -> Tensor:
    """Compute t from the inner products <dW_i, dW_j>; cosines with a zero vector are 0.

    Shapes: products (..., N, N), result (...).
    """
    count = products.shape[-1]
    if count == 1:
        return torch.ones_like(products[..., 0, 0])
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    sizes = norms[..., :, None] * norms[..., None, :]
    cosines = torch.where(sizes > 0, products / sizes.masked_fill(sizes == 0, 1), 0.0)
    cosines = torch.where(sizes.isnan(), sizes, cosines).clamp(-1, 1)
    pairs = count * (count - 1)
    total = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    c = total / pairs
    divisor = 1 + (count - 1) * c
    singular = divisor.abs() < _SINGULAR
    return torch.where(singular, 0.0, count * c / divisor.masked_fill(singular, 1))


def _mean(parameters: Mapping[str, Any]) -> AffineUpdate:
    experts, own = parameters["experts"], parameters["alpha"]
    other = 1.0 - (1 / (1 + experts) if own is None else own)
    shared = other / experts
    return AffineUpdate(-other, shared, "select_only", approximate=_NEARLY_STRAIGHT)


@merge_method(
    label="Karcher mean",
    source="Karcher 1977; mergekit, `karcher`",
    formula="W = (sum_i a_i |W_i|) u, u the mean of the directions W_i / |W_i| on the sphere",
    several_experts=True,
    affine=_mean,
    anchor="interp",
)
def karcher(
    base: Matrix,
    mllm: Matrix,
    math: Experts,
    *,
    alpha: MllmShare = None,
) -> Matrix:
    """Average the directions of the matrices on the sphere and their norms on the line.

    Math:   u_i = W_i / |W_i|; u minimises sum_i a_i angle(u, u_i)^2; from the normalised mean,
            T = sum_i a_i (theta_i / sin theta_i) (u_i - cos(theta_i) u),
            u <- cos|T| u + sin|T| T / |T| until |T| < 1e-5, at most 10 times;
            W = (sum_i a_i |W_i|) u. All u lie in the span of the u_i, so the iteration runs on
            coefficients and the inner products <u_i, u_j>.
    Shapes: all (m, n). alpha is the MLLM's share, the experts split the rest; none: equal shares.
    Source: Karcher, Comm. Pure Appl. Math. 30, 1977; as in mergekit (equal shares).
    """
    matrices = [mllm, *as_list(math)]
    shares = _shares(alpha, len(matrices))
    gram = blockwise_sum(inner_products, *matrices).cpu()
    norms = gram.diagonal().sqrt()
    alive = norms > 0
    safe = norms.masked_fill(~alive, 1)
    direction = _mean_direction(gram / torch.outer(safe, safe), shares * alive)
    length = float((shares * norms).sum())
    coefficients = [float(value) for value in length * direction / safe]

    return blockwise(lambda *parts: weighted_sum_(parts, coefficients), *matrices)


def _mean_direction(cosines: Tensor, shares: Tensor) -> Tensor:
    """Compute the coefficients c of the Karcher mean u = sum_i c_i u_i, given <u_i, u_j>."""

    def norm(c: Tensor) -> Tensor:
        return (c @ cosines @ c).clamp(min=0).sqrt()

    c = shares / norm(shares).clamp(min=1e-300)
    for _ in range(_STEPS):
        cosine = (cosines @ c).clamp(-1, 1)
        angle = cosine.arccos()
        pull = shares * torch.where(angle > 1e-12, angle / angle.sin().clamp(min=1e-12), 1.0)
        tangent = pull - (pull * cosine).sum() * c
        size = norm(tangent)
        if size < _TOLERANCE:
            break
        c = size.cos() * c + size.sin() / size * tangent
        c = c / norm(c)
    return c
