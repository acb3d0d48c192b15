"""The box of a search: ranges from users, the unit cube, the grid."""

from __future__ import annotations

import numpy as np
import pytest

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS
from ipmerge_core.search.space import THRESHOLD, key_of, space_of


def test_the_usual_spaces_are_those_of_the_cross_modal_study() -> None:
    counts = {name: len(space_of(METHODS[name]).grid()) for name in
              ("task_arithmetic", "ties", "dare_linear", "ip_merging")}  # fmt: skip
    assert counts == {"task_arithmetic": 25, "ties": 100, "dare_linear": 100, "ip_merging": 25}
    assert space_of(METHODS["ip_merging"]).names == ("lambda_", THRESHOLD)


def test_a_point_and_its_parameters_are_one() -> None:
    space = space_of(METHODS["ties"], ["math-weight=-1:3", "density=0.2,0.5,1"])
    assert space.at([0.25, 0.5]) == {"math_weight": 0.0, "density": 0.6}
    point = space.point_of({"math_weight": 1.0, "density": 1.0})
    np.testing.assert_allclose(point, [0.5, 1.0])
    assert key_of(space.point_of(space.at([1 / 3, 2 / 3]))) == key_of([1 / 3, 2 / 3])
    assert space_of(METHODS["ip_merging"], ["lambda=0:8"]).names == ("lambda_",)


def test_integers_are_rounded() -> None:
    space = space_of(METHODS["ip_merging"], ["top_k=1:9"])
    assert space.at([0.45]) == {"top_k": 5.0}


REFUSED = {
    "a parameter that the method lacks": ("density=0:1", "has no parameter 'density'.*mllm_weight"),
    "no range": ("math_weight", "is not a range; expected NAME=LOW:HIGH"),
    "words": ("math_weight=low:high", "'low:high' of 'math_weight' is not made of numbers"),
    "reversed": ("math_weight=1:0", "are 1, 0; expected at least two, in increasing order"),
    "an unordered list": ("math_weight=0,2,1", "are 0, 2, 1; expected"),
    "one value": ("math_weight=0.3", "at least two"),
    "three ends": ("math_weight=0:1:2", "has 3 ends; expected 2"),
    "infinite": ("math_weight=0:inf", "finite values"),
    "nan": ("math_weight=nan,1", "finite values"),
    "too many": (f"math_weight={','.join(map(str, range(200)))}", "up to 100 finite values"),
    "a threshold where nothing is selected": (
        "similarity_threshold=0:1",
        "has no parameter 'similarity_threshold'",
    ),
    "hostile": ("=" * 5000, "is not a range"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_a_range_that_is_not_valid_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        space_of(METHODS["task_arithmetic"], [text])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_values_outside_a_parameters_bounds_are_refused() -> None:
    with pytest.raises(PlanError, match="density is 2"):
        space_of(METHODS["ties"], ["density=0.5,2"])
    with pytest.raises(PlanError, match=r"expected values in \[0, 1\]"):
        space_of(METHODS["ip_merging"], ["similarity_threshold=0:2"])


def test_a_choice_cannot_be_searched() -> None:
    with pytest.raises(PlanError, match="'projector' is not a number"):
        space_of(METHODS["ip_merging"], ["projector=0:1"])


def test_a_range_given_twice_is_refused() -> None:
    with pytest.raises(PlanError, match="given twice"):
        space_of(METHODS["ties"], ["density=0.2,0.4", "density=0.2:1"])


def test_a_grid_needs_values() -> None:
    with pytest.raises(PlanError, match="needs values for 'math_weight'"):
        space_of(METHODS["task_arithmetic"], ["math_weight=0:1"]).grid()


def test_a_method_without_numbers_has_no_usual_space() -> None:
    with pytest.raises(PlanError, match="has no usual search space"):
        space_of(METHODS["slerp"])
