"""The version of a method changes with its results, so that plans and caches notice."""

from __future__ import annotations

import json

import pytest
from method_results import FILE, choices, result

from ipmerge_core.methods import METHODS

KNOWN = json.loads(FILE.read_text("utf-8"))


def test_every_method_and_choice_is_recorded() -> None:
    assert set(KNOWN) == set(choices())


@pytest.mark.parametrize("label", choices())
def test_a_version_has_one_result(label: str) -> None:
    name, parameters = choices()[label]
    assert KNOWN[label]["version"] == METHODS[name].version, "run python tests/method_results.py"
    found = result(name, parameters)
    assert found == pytest.approx(KNOWN[label]["change"], rel=1e-6, abs=1e-9), (
        f"{name} gives other weights than its version {METHODS[name].version}: increase `version` "
        f"in its @merge_method, then run python tests/method_results.py"
    )
