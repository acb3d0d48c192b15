"""Optional declarations of a merge method: its affine preview and its first pass.

In: plain numbers, and for a first pass a sequence of matrices. Out: the change of weights as a sum
of measured directions (`AffineUpdate`), or numbers of the whole model (`Statistic`). Declared by
methods and used by drivers; no IO.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

from jaxtyping import Float
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.spectral.kinds import Anchor

Matrix: TypeAlias = Float[Tensor, "m n"]
ParameterValue: TypeAlias = float | int | bool | str | None
_Result = TypeVar("_Result")
_Step = TypeVar("_Step")
_Mapped = TypeVar("_Mapped")


class AffineUpdate(NamedTuple):
    """The change U = W_merged - W_mllm as a sum of directions with known inner products.

    Math:   U = mllm * dV + expert * sum_k w_k X_k, where X_k is the expert's update called
            `direction` in a `LayerRecord` ("select_only" is the expert's task vector itself) and
            w_k its share, by default 1. Random drops add a part of expected squared norm
            mllm_noise * ||dV||^2 + expert_noise * sum_k w_k^2 ||X_k||^2.

    With a `budget` > 0 the experts' part is rescaled to that size, relative to the weights: it is
    multiplied by budget ||W_mllm|| / ||sum_k w_k X_k||, or by 0 where that sum is zero.

    `approximate` states why and how closely the form is approximate; empty if it is exact.
    `measured_with` names the analysis options that the inner products of `direction` depend on; the
    method must use the same values.
    """

    mllm: float
    expert: float
    direction: str
    shares: tuple[float, ...] = ()
    mllm_noise: float = 0.0
    expert_noise: float = 0.0
    approximate: str = ""
    measured_with: tuple[str, ...] = ()
    budget: float = 0.0

    def scaled(self, factor: float) -> AffineUpdate:
        """Return the change multiplied by a factor; squared norms grow with its square."""
        return self._replace(
            mllm=factor * self.mllm,
            expert=factor * self.expert,
            mllm_noise=factor**2 * self.mllm_noise,
            expert_noise=factor**2 * self.expert_noise,
        )

    def from_anchor(self, anchor: Anchor, experts: int) -> AffineUpdate | None:
        """Rewrite for an anchor on one base; None if the change is not of this form.

        Math:   inject has dV = 0;  interp has dV = 0 and dM_k - dV in place of every dM_k.
        """
        if anchor in ("two_base", "root"):
            return self
        if anchor == "inject":
            return self._replace(mllm=0.0, mllm_noise=0.0)
        if self.expert_noise or self.direction != "select_only":
            return None
        moved = self.expert * (sum(self.shares) if self.shares else experts)
        return self._replace(mllm=-moved, mllm_noise=0.0)


def drained(steps: Generator[object, None, _Result]) -> _Result:
    """Run a generator to its end and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast("_Result", end.value)


def relayed(
    steps: Generator[_Step, None, _Result], convert: Callable[[_Step], _Mapped]
) -> Generator[_Mapped, None, _Result]:
    """Map the steps of a generator with a function, and return its result."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return cast("_Result", end.value)
        yield convert(step)


Models: TypeAlias = tuple[Matrix, Matrix, Sequence[Matrix], Mapping[str, Any]]


@dataclass(frozen=True)
class Statistic:
    """Numbers of the whole model that a method receives as `statistic=` when merging a matrix.

    `measure(base, mllm, experts, previous, **parameters)` returns a vector per matrix, or for some
    of its rows; the vectors are summed. `combine(total, previous, **parameters)` converts the sum
    to plain numbers that a plan file can store. With two `passes`, `previous` is the combined
    result of the first. Without a statistic a method uses the current matrix.
    """

    measure: Callable[..., Tensor]
    combine: Callable[..., tuple[float, ...]]
    passes: int = 1
    # With these parameters `measure` returns the squared norms of the task vectors, which an
    # analysis also contains, relative to each model's own base for any anchor.
    of_norms: Callable[[Mapping[str, Any]], bool] = lambda parameters: False
    from_own_base: bool = False
    # Numbers of every model that a calibration supplies instead.
    calibrated: Callable[[Mapping[str, Any]], tuple[Literal["norm", "mean"], ...]] = (
        lambda parameters: ()
    )

    def over(
        self,
        matrices: Callable[[], Iterable[Models]],
        parameters: Mapping[str, ParameterValue],
        *,
        apply: Callable[..., Iterable[Tensor]] = map,
    ) -> tuple[float, ...]:
        """Run all passes and return the result; see `steps`."""
        return drained(self.steps(matrices, parameters, apply=apply))

    def steps(
        self,
        matrices: Callable[[], Iterable[Models]],
        parameters: Mapping[str, ParameterValue],
        *,
        apply: Callable[..., Iterable[Tensor]] = map,
    ) -> Generator[None, None, tuple[float, ...]]:
        """Run all passes over every matrix, or pieces of its rows, which are read again each time.

        Yields after each. `apply(function, items)` maps the measurement over the items in order,
        possibly in threads.
        """
        found: tuple[float, ...] = ()
        for _ in range(self.passes):

            def measured(models: Models, previous: tuple[float, ...] = found) -> Tensor:
                base, mllm, experts, inputs = models
                return self.measure(base, mllm, experts, previous, **parameters, **inputs)

            total: Tensor | None = None
            for vector in apply(measured, matrices()):
                total = vector if total is None else total + vector
                yield
            if total is None:
                raise PlanError("There are no matrices to measure: the plan merges none.")
            found = self.combine(total, found, **parameters)
        return found
