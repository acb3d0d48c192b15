"""What a merge computes in the precision that merges run in: stored bf16, fp16, fp32, fp32 inside.

Every method against its fp64 definition (`method_definitions.py`) on the same stored numbers, on a
seeded sample of the grid that `benchmarks/bench_numerics.py` runs in full. A method without a
definition, or with a parameter that its definition does not know, fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
from method_definitions import DEFINITIONS
from numeric_cases import (
    DTYPES,
    FEW,
    MOST_FLIPPED,
    Case,
    Finding,
    measure,
    sample,
    tolerance_of,
    variants,
)

from ipmerge_core.methods import METHODS

SHAPES = [(64, 64), (256, 256), (688, 256), (256, 512)]
SMALL = [(64, 64), (96, 64), (64, 160)]
VARIANTS = [(name, variant) for name in METHODS for variant in variants(name)[1:]]
every_method = pytest.mark.parametrize("name", METHODS)


def cases_of(name: str) -> list[Case]:
    """A sample of the grid of the method's own."""
    seed = list(METHODS).index(name)
    return sample(3, SMALL, seed) if name in FEW else sample(9, SHAPES, seed)


def assert_defined(name: str, findings: Mapping[Case, Finding]) -> None:
    """Nothing is further from the definition than it may be."""
    wrong = [
        f"{name} {case}: {finding}"
        for case, finding in findings.items()
        if finding.excess > tolerance_of(name) or finding.flipped > MOST_FLIPPED
    ]
    assert not wrong, "\n".join(wrong)


@every_method
def test_every_method_has_a_definition_that_knows_all_of_its_parameters(name: str) -> None:
    assert name in DEFINITIONS, f"write the definition of {name} in tests/method_definitions.py"
    known = inspect.signature(DEFINITIONS[name]).parameters
    assert {parameter.name for parameter in METHODS[name].parameters} <= set(known)


@every_method
def test_a_merge_in_fp32_is_the_definition_in_fp64(name: str) -> None:
    found = {case: measure(name, case) for case in cases_of(name)}
    clear = {case: finding for case, finding in found.items() if finding is not None}
    assert len(clear) >= 3
    assert_defined(name, clear)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_every_choice_of_a_method_is_its_definition(name: str, variant: dict[str, Any]) -> None:
    for dtype in DTYPES:  # the first in which no direction is as weak as the noise
        case = Case(dtype, 1, SMALL[1], "full", "aligned", seed=len(str(variant)))
        finding = measure(name, case, **variant)
        if finding is not None:
            return assert_defined(name, {case: finding})
    raise AssertionError("no case is clear")
