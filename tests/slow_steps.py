"""The real merge and the real models, slowed down so that a browser test can step in between.

A question that starts with `Say:` is answered by its own text, so that a test decides what the chat
has to show; `Fail:` lets the merged side fail.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from ipmerge_core.analysis.analyse import AnalysisStep
from ipmerge_core.analysis.analyse import iter_pack as quick_pack
from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.generation import stream_answer as quick_answer
from ipmerge_core.merging.merge import MergeStep
from ipmerge_core.merging.merge import iter_merge as quick_merge

STEP_SECONDS = 0.06
PIECE_SECONDS = 0.04
MATRIX_SECONDS = 0.5


def slow_merge(plan, out, *, device="cpu", resume=True) -> Iterator[MergeStep]:
    for step in quick_merge(plan, out, device=device, resume=resume):
        if step.action != "resumed":
            time.sleep(STEP_SECONDS)
        yield step


def slow_pack(*args, **options) -> Iterator[AnalysisStep]:
    for step in quick_pack(*args, **options):
        yield step
        if step.matrix:
            time.sleep(MATRIX_SECONDS)


def slow_answer(loaded, question, image=None, settings=None, cancelled=None) -> Iterator[str]:
    if question.startswith("Say:"):
        pieces = iter(re.findall(r"\S+\s*", question.removeprefix("Say:").strip()))
    elif question.startswith("Fail:") and (loaded.folder / "ipmerge.json").exists():
        raise ModelLoadError("This side failed, as the test wanted.")
    else:
        pieces = quick_answer(loaded, question, image, settings, cancelled)
    for piece in pieces:
        if cancelled.is_set():
            return
        time.sleep(PIECE_SECONDS)
        yield piece
