"""Give Optuna's trials the points that a search wants: fixed ones, or those of its GP sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, GPSampler

from ipmerge_core.search.space import SearchSpace

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

    from ipmerge_core.search.space import Point

_MOST_DRAWS = 100  # uniform points tried in place of a known one


class Proposals(BaseSampler):
    """A sampler of fixed points, or of Gaussian process optimisation without known points."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._model: GPSampler | None = None
        self._random = np.random.default_rng(0)
        self._fixed: Point | None = None
        self._is_new: Callable[[Point], bool] = lambda _: True

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The ranges of the parameters as Optuna writes them."""
        return {axis.name: FloatDistribution(axis.low, axis.high) for axis in self.space.axes}

    def use_model(self, seed: int, worker: int) -> None:
        """Propose points by a Gaussian process from now on, differently for each worker."""
        own = int(np.random.default_rng([seed, worker]).integers(2**31))
        self._model = GPSampler(seed=own, n_startup_trials=1, warn_independent_sampling=False)
        self._random = np.random.default_rng([own, 1])

    def ask(self, study: Study, point: Point | None, is_new: Callable[[Point], bool]) -> Trial:
        """Return a trial at a fixed point, or for None at one that the model proposes."""
        self._fixed, self._is_new = point, is_new
        return study.ask(self.distributions)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the ranges of all parameters."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of the next trial."""
        if self._fixed is not None:
            return self.space.at(self._fixed)
        assert self._model is not None, "no point and no model"
        found = self._model.sample_relative(study, trial, dict(search_space))
        if found and self._is_new(self.space.point_of(found)):
            return self.space.at(self.space.point_of(found))
        for _ in range(_MOST_DRAWS):
            drawn = self._random.random(self.space.dimension)
            if self._is_new(drawn):
                break
        return self.space.at(drawn)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Reject a parameter outside the search space."""
        raise AssertionError(f"{param_name} is not in the search space")
