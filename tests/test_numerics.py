"""What a merge computes in the precision that merges run in: stored bf16, fp16, fp32, fp32 inside.

Every method against its fp64 definition (`method_definitions.py`) on the same stored numbers, on a
seeded sample of the grid that `benchmarks/bench_numerics.py` runs in full. A method without a
definition, or with a parameter that its definition does not know, fails here.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from method_definitions import DEFINITIONS
from numeric_cases import (
    FEW,
    MOST_FLIPPED,
    Case,
    measure,
    sample,
    tolerance_of,
    variants,
)

from ipmerge_core.methods import METHODS

SHAPES = [(64, 64), (256, 256), (688, 256), (256, 512)]
SMALL = [(64, 64), (96, 64), (64, 160)]
CASES = {
    name: sample(3, SMALL, seed) if name in FEW else sample(6, SHAPES, seed)
    for seed, name in enumerate(METHODS)
}
VARIANTS = [(name, variant) for name in METHODS for variant in variants(name)[1:]]
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
def test_every_method_has_a_definition_that_knows_all_of_its_parameters(name: str) -> None:
    assert name in DEFINITIONS, f"write the definition of {name} in tests/method_definitions.py"
    known = inspect.signature(DEFINITIONS[name]).parameters
    assert {parameter.name for parameter in METHODS[name].parameters} <= set(known)


def assert_defined(name: str, case: Case, **parameters: Any) -> None:
    finding = measure(name, case, **parameters)
    if finding is not None:
        assert finding.excess <= tolerance_of(name), finding
        assert finding.flipped <= MOST_FLIPPED, finding


@pytest.mark.parametrize(
    ("name", "case"), [(n, c) for n, cases in CASES.items() for c in cases], ids=str
)
def test_a_merge_in_fp32_is_the_definition_in_fp64(name: str, case: Case) -> None:
    assert_defined(name, case)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_every_choice_of_a_method_is_its_definition(name: str, variant: dict[str, Any]) -> None:
    case = Case("bf16", 1, SMALL[1], "full", "aligned", seed=len(str(variant)))
    assert_defined(name, case, **variant)
