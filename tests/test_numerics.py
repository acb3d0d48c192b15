"""What a merge computes in the precision that merges run in: stored bf16, fp16, fp32, fp32 inside.

Every method against its fp64 definition (`method_definitions.py`) on the same stored numbers, on a
seeded sample of the grid that `benchmarks/bench_numerics.py` runs in full. A method without a
definition, or with a parameter that its definition does not know, fails here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pytest
import torch
from method_definitions import CHOOSERS, DEFINITIONS
from numeric_cases import (
    DTYPES,
    FEW,
    MOST_FLIPPED,
    Case,
    Finding,
    Stored,
    decided_otherwise,
    measure,
    merged,
    models,
    noise_between,
    nudged,
    sample,
    tolerance_of,
    truth,
    variants,
)

from ipmerge_core.methods import METHODS

pytestmark = pytest.mark.shapes

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


# --- noise as stored weights have it ---

STABLE = 20.0  # times the noise in the task vectors
LESS_STABLE = {"iso_cts": 40.0}  # makes a nearly square stack of directions orthogonal
TURNING = ("knots_ties",)  # elects in a basis that turns with the noise: moves by what it elects
MOST_DECIDED = 0.1  # share of elements that the noise may decide otherwise


def clear_cases(name: str) -> Iterator[tuple[Case, Stored, Stored]]:
    """Cases before and after the noise, in which no direction is as weak as it."""
    for case in sample(9, SMALL, 100 + list(METHODS).index(name)):
        if case.experts == 1 or METHODS[name].several_experts:
            before = models(case)
            after = nudged(before)
            if truth(name, before) is not None and truth(name, after) is not None:
                yield case, before, after


@pytest.mark.parametrize("name", [n for n in METHODS if n not in CHOOSERS and n not in TURNING])
def test_noise_in_the_files_moves_a_continuous_method_by_no_more_than_twenty_times(
    name: str,
) -> None:
    ratios = {
        str(case): change_between(name, before, after) / noise_between(before, after)
        for case, before, after in islice(clear_cases(name), 3 if name in FEW else None)
    }
    assert ratios
    assert max(ratios.values()) < LESS_STABLE.get(name, STABLE), ratios


def change_between(name: str, before: Stored, after: Stored) -> float:
    """How far the method's change of the MLLM moves, beyond what the precision of a merge is."""
    one, other = (
        merged(name, stored).double() - stored.mllm.double() for stored in (before, after)
    )
    precision = 2.0**-24 * float(after.mllm.double().norm()) + tolerance_of(name) * float(
        one.norm()
    )
    return max(0.0, float((other - one).norm()) - 2 * precision)


@pytest.mark.parametrize("name", CHOOSERS)
def test_noise_moves_only_elements_that_it_decides_otherwise(name: str) -> None:
    for case, before, after in clear_cases(name):
        moved = (merged(name, after) - merged(name, before)).abs()
        size = torch.stack([before.base, before.mllm, *before.experts]).abs().amax(0)
        unit = torch.nextafter(size, torch.full_like(size, torch.inf)) - size
        decided, drift = decided_otherwise(name, before, after)
        assert float(decided.double().mean()) < MOST_DECIDED, case
        assert bool((moved <= STABLE * unit.float() + 1.01 * drift)[~decided].all()), case


@pytest.mark.parametrize("name", TURNING)
def test_noise_moves_a_method_that_elects_in_a_turning_basis_as_its_definition_says(
    name: str,
) -> None:
    for case, *both in clear_cases(name):
        results = [merged(name, stored).double() for stored in both]
        truths = [truth(name, stored) for stored in both]
        unexplained = (results[1] - results[0]) - (truths[1] - truths[0])
        share = float(unexplained.norm() / (truths[0] - both[0].mllm.double()).norm())
        assert share < 2 * tolerance_of(name), case
