"""A sample of `mutations.py`: damaged files of every kind end in a result or in one sentence."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path

import pytest
from mutated_files import CASES, Case
from mutations import attempt, damage, is_sentence, run_kind

from ipmerge_core.errors import IPMergeError

SAMPLE = 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged_files_end_in_a_sentence_and_leave_nothing(case: Case) -> None:
    results = run_kind(case, SAMPLE)
    assert not [result.message for result in results if result.outcome == "escaped"]
    assert any(result.outcome == "refused" for result in results) or case.name in TOLERANT


TOLERANT = ("job", "recorded answers", "unfinished merge", "manifest")  # of these some stay usable


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sound_files_are_accepted(case: Case, tmp_path: Path) -> None:
    """Otherwise the sample above would refuse for another reason than the damage."""
    if case.name == "unfinished calibration":
        return  # its models have no tokenizer
    case.prepare(tmp_path / "case")
    assert attempt(case, tmp_path / "case", random.Random(1)) == ("accepted", "")


@pytest.mark.parametrize("layout", ["json", "jsonl", "yaml", "gzip"])
def test_damages_differ_and_repeat_with_their_seed(layout: str) -> None:
    sound = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    sound = gzip.compress(sound) if layout == "gzip" else sound
    made = [damage(sound, layout, random.Random(seed)) for seed in range(60)]
    assert made == [damage(sound, layout, random.Random(seed)) for seed in range(60)]
    assert len(set(made)) > 40


def test_the_check_finds_tracebacks_texts_that_are_no_sentence_and_left_files(
    tmp_path: Path,
) -> None:
    def crash(_: Path) -> None:
        raise KeyError("x")

    def mumble(_: Path) -> None:
        raise IPMergeError("no")

    def litter(place: Path) -> None:
        (place / "half.json").write_text("{")
        raise IPMergeError("A sentence that is long enough, with a file that is left behind.")

    def prepare(place: Path) -> None:
        place.mkdir()
        (place / "a.json").write_text('{"a": 1}')

    for function, words in ((crash, "KeyError"), (mumble, "no"), (litter, "left ['half.json']")):
        case = Case("bad", prepare, ("a.json",), function=function)
        (result,) = run_kind(case, 1)
        assert result.outcome == "escaped"
        assert words in result.message
    assert not is_sentence("ipmerge: two lines of text that are long enough, \nand no more.")
    shutil.rmtree(tmp_path)
