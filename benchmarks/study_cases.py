"""The cases of the variants study: those of `make cases`, and the SmolLM2 trio of `make demo-135m`.

In: nothing, or the models on disk. Out: `StudyCase`s, each with its pack, its problems, the rows
that it is asked for, and how many problems of each task. A language model of 135 M parameters
answers slowly, so that its case has nine named rows at three gains.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

ASSETS = Path(__file__).parents[1] / "assets"
sys.path[:0] = [str(ASSETS.parent), str(ASSETS / "demo"), str(ASSETS / "smollm2")]

import build  # noqa: E402
from cases import CASES, OUT  # noqa: E402
from draws import Draw  # noqa: E402
from study_rows import BASELINE, Row  # noqa: E402

from ipmerge_core.tasks.demo import Problem  # noqa: E402

__all__ = ["OUT", "Draw", "SmolLM2Case", "StudyCase", "available", "counts_of", "rows_of"]
NAMED = (
    BASELINE, f"{BASELINE}, upper half", "IP-Merging", "gamma max", "complement 0.8", "protect",
    "budget of protect", "TIES", "RegMean",
)  # fmt: skip
COUNTS: Mapping[Draw, int] = {"validation": 10, "test": 34}  # 306 test problems


class StudyCase(Protocol):
    """A pair of the study, its training seed, and its problems."""

    @property
    def name(self) -> str:
        """Name of the case, unique."""

    @property
    def facts(self) -> dict[str, object]:
        """The trio, the seed, the experts and the kind of MLLM."""

    def pack(self, out: Path, /) -> Path:
        """Path of the pack, in the folder of `make cases` or elsewhere."""

    def problems(self, count: int, draw: Draw, /) -> list[Problem]:
        """Draw problems of each task, without drawings of the training."""


class SmolLM2Case(NamedTuple):
    """The trio on SmolLM2-135M."""

    trio: str = "smollm2"
    seed: int = 0
    experts: tuple[str, ...] = ("math",)
    kind: str = "many"

    @property
    def name(self) -> str:
        """Name of the case."""
        return f"{self.trio}-{self.seed}-math"

    @property
    def facts(self) -> dict[str, object]:
        """What distinguishes the case, in JSON values."""
        return {**self._asdict(), "experts": list(self.experts)}

    def pack(self, _: Path) -> Path:
        """Path of the pack, beside the models."""
        return ASSETS / "smollm2" / build.PACK

    def problems(self, count: int, draw: Draw) -> list[Problem]:
        """Draw problems of each task, without drawings of the training."""
        made = build.Build(build.PACKAGED, self.seed, ASSETS / "smollm2", "cpu")
        return build.evaluation_problems(made, count, draw)


SMOLLM2 = SmolLM2Case()


def available(out: Path) -> list[StudyCase]:
    """Return the cases whose models have been trained."""
    models = SMOLLM2.pack(out).with_name("mllm")
    slow = [SMOLLM2] if SMOLLM2.pack(out).is_file() and models.is_dir() else []
    return [*(case for case in CASES if case.pack(out).is_file()), *slow]


def rows_of(case: StudyCase, table: Sequence[Row]) -> list[Row]:
    """Return the rows that a case is asked for: all, or those named with every second gain."""
    if case is not SMOLLM2:
        return list(table)
    return [row._replace(gains=row.gains[::2]) for row in table if row.label in NAMED]


def counts_of(case: StudyCase, counts: Mapping[Draw, int]) -> Mapping[Draw, int]:
    """Return the problems per task of each draw of a case: those asked for, or fewer."""
    if case is not SMOLLM2:
        return counts
    return {draw: min(count, COUNTS[draw]) for draw, count in counts.items()}
