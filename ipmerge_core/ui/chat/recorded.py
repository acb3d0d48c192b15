"""Recorded answers: what both models said when somebody ran them, shown at once and labelled so.

In: `recorded.json` beside the demo trio, and its pictures. Out: examples with a question, the right
answer, both replies, what gave them and when. Runs nothing.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ipmerge_core.tasks.answers import is_right
from ipmerge_core.ui.finished_merges import unmerged_words
from ipmerge_core.ui.pairs import DEMO, read_pack_file

OUTCOMES = ("fixed", "broken", "both right", "both wrong")


class Reference(NamedTuple):
    """A question whose right answer is known. `is_math`: only the stated result counts."""

    question: str
    image: str  # file name
    answer: str
    is_math: bool


class Example(NamedTuple):
    """One recorded pair of answers."""

    reference: Reference
    image: Path
    base: str
    merged: str
    plan: str  # hash and settings, in words
    recorded: str  # date
    base_model: str  # what answered on the base's side, in words
    pair: str  # the name of the pair that was asked

    @property
    def outcome(self) -> str:
        """Say what the merge did here: fixed, broken, both right or both wrong."""
        right = (is_right(self.reference, self.base), is_right(self.reference, self.merged))
        return {
            (False, True): "fixed",
            (True, False): "broken",
            (True, True): "both right",
            (False, False): "both wrong",
        }[right]


def recorded_examples(folder: Path = DEMO) -> list[Example]:
    """Read the recorded answers; none where the file is missing."""
    path = folder / "recorded.json"
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else []


@lru_cache(maxsize=4)
def _read(path: Path, _modified: int) -> list[Example]:
    content = json.loads(path.read_text("utf-8"))
    pack = read_pack_file(path.with_name("pack.json.gz"))
    examples = [
        Example(
            reference=Reference(
                question=entry["question"],
                image=Path(entry["image"]).name,
                answer=entry["answer"],
                is_math=entry["computed"],
            ),
            image=path.parent / entry["image"],
            base=entry["base"],
            merged=entry["merged"],
            plan=content["plan"],
            recorded=content["recorded"],
            base_model=unmerged_words(pack["sources"]["mllm"]["id"]),
            pair=pack["name"],
        )
        for entry in content["examples"]
    ]
    # What the merge changed comes first, for better and for worse.
    return sorted(examples, key=lambda example: OUTCOMES.index(example.outcome))
