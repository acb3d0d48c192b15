"""Every method that mergekit has, too, against what mergekit 0.1.5 made of the same models.

Its results lie in `mergekit.safetensors`, recorded by `benchmarks/compare_mergekit.py`, whose pins
do not agree with ours. Where a mergekit is at hand (IPMERGE_MERGEKIT names its `mergekit-yaml`, or
it is on the PATH), it is asked again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from compare_mergekit import CHOICES, ROLES, merge, merge_by_mergekit, unflat, words_of

RECORD = Path(__file__).with_name("mergekit.safetensors")
PROGRAM = os.environ.get("IPMERGE_MERGEKIT") or shutil.which("mergekit-yaml")
NOT_LIMITED = ("sce", "karcher")  # mergekit merges norms and embeddings with them, too
every_choice = pytest.mark.parametrize("number", range(len(CHOICES)), ids=map(words_of, CHOICES))


def recorded(*names: str) -> list[dict[str, Any]]:
    with safe_open(RECORD, framework="pt") as file:
        return [unflat(file.get_tensor(name)) for name in names]


def models() -> dict[str, dict[str, Any]]:
    return dict(zip(ROLES, recorded(*ROLES), strict=True))


def assert_same(choice: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, weight in theirs.items():
        if "_proj" in name or choice["method"] not in NOT_LIMITED:
            apart = float((ours[name] - weight).abs().max())
            assert apart < 2e-6 * float(weight.abs().max()), name


def test_the_record_says_what_made_it() -> None:
    with safe_open(RECORD, framework="pt") as file:
        about = file.metadata()
    assert about["made_by"] == "mergekit 0.1.5"
    assert json.loads(about["choices"]) == json.loads(json.dumps(CHOICES))
    assert about["date"] >= "2026-11-27"


@every_choice
def test_a_plan_merges_to_what_mergekit_recorded(number: int, tmp_path: Path) -> None:
    (theirs,) = recorded(str(number))
    ours, _ = merge(CHOICES[number], models(), tmp_path)
    assert_same(CHOICES[number], ours, theirs)


@pytest.mark.skipif(PROGRAM is None, reason="IPMERGE_MERGEKIT names no mergekit-yaml")
@every_choice
def test_mergekit_still_agrees(number: int, tmp_path: Path) -> None:
    ours, recipe = merge(CHOICES[number], models(), tmp_path)
    theirs = merge_by_mergekit(str(PROGRAM), recipe, tmp_path)
    assert_same(CHOICES[number], ours, theirs)
