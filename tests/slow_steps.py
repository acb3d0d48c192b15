"""The real runs and the real models, held or slowed down so that a browser test can step in.

A run stays where it is while `held` lasts, however slow the machine that the test is waiting for.
A question that starts with `Say:` is answered by its own text, piece by piece, so that a test
decides what the chat has to show; `Fail:` lets the merged side fail.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipmerge_core.adapters.columns import Row
from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.analysis.analyse import AnalysisStep
from ipmerge_core.analysis.analyse import iter_pack as quick_pack
from ipmerge_core.calibration.calibrate import CalibrationStep
from ipmerge_core.calibration.calibrate import iter_calibration_of as quick_calibration
from ipmerge_core.inference.streaming import RowState
from ipmerge_core.inference.thinking import split_reply
from ipmerge_core.merging.merge import MergeStep
from ipmerge_core.merging.merge import iter_merge as quick_merge
from ipmerge_core.runtime.host import home_folder

quick_stream = LiveModel.stream
HOLD = "hold"
REPEAT_SECONDS = 0.05
PIECE_SECONDS = 0.04
HELD_PIECES = 20
MATRIX_SECONDS = 0.5


@contextmanager
def held(home: Path) -> Iterator[None]:
    """Keep the runs and answers of the app with this home folder where they are, until the end.

    A run stays at its next step, an analysis at its next matrix, an answer after some words.
    """
    hold = home / HOLD
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


def are_held() -> bool:
    return (home_folder() / HOLD).exists()


def stay(step: Any) -> Iterator[Any]:
    """Yield a step, again and again while runs are held: so it can be watched and cancelled."""
    yield step
    while are_held():
        time.sleep(REPEAT_SECONDS)
        yield step


def slow_merge(plan, out, *, device="cpu", resume=True) -> Iterator[MergeStep]:
    is_preview = Path(out).parent.name == "previews"  # an answer waits for it
    for step in quick_merge(plan, out, device=device, resume=resume):
        yield from [step] if is_preview else stay(step)


def slow_calibration(**arguments) -> Iterator[CalibrationStep]:
    for step in quick_calibration(**arguments):
        yield from stay(step)


def slow_pack(*args, **options) -> Iterator[AnalysisStep]:
    for step in quick_pack(*args, **options):
        if not step.matrix:
            yield step
            continue
        yield from stay(step)
        time.sleep(MATRIX_SECONDS)


def slow_stream(live, rows, stops=()) -> Iterator[list[RowState]]:
    question = rows[0].messages[-1].text
    if question.startswith("Say:"):
        yield from said(question.removeprefix("Say:").strip(), rows, stops)
        return
    fails = question.startswith("Fail:")
    for states in quick_stream(live, rows, stops):
        yield [
            RowState("failed", note="This side failed, as the test wanted.")
            if fails and row.column.kind != "base"
            else state
            for row, state in zip(rows, states, strict=True)
        ]


def said(text: str, rows: list[Row], stops) -> Iterator[list[RowState]]:
    """Let every row say a text, piece by piece; what stands before `</think>` is its thinking."""
    pieces = re.findall(r"\S+\s*", text)
    spoken = ["" for _ in rows]
    states = [RowState() for _ in rows]
    for number, piece in enumerate(pieces):
        time.sleep(PIECE_SECONDS)
        while number >= HELD_PIECES and are_held() and not all_set(stops, rows):
            time.sleep(PIECE_SECONDS)
            yield (states := [stopped(s, stops, r) for s, r in zip(states, rows, strict=True)])
        for n, row in enumerate(rows):
            states[n] = stopped(states[n], stops, row)
            if states[n].state == "stopped":
                continue
            spoken[n] += piece
            reply = split_reply(spoken[n], opened="</think>" in text)
            kind = "thinking" if reply.is_thinking else "answering"
            ids = tuple(range(number + 1))
            states[n] = RowState(kind, reply, ids, seconds=PIECE_SECONDS * len(ids))
        yield list(states)
    yield [s if s.state == "stopped" else s._replace(state="finished") for s in states]


def stopped(state: RowState, stops, row: Row) -> RowState:
    return state._replace(state="stopped") if is_set(stops, row) else state


def is_set(stops, row: Row) -> bool:
    return any(event.is_set() for event in [*stops, *row.stops])


def all_set(stops, rows: list[Row]) -> bool:
    return all(is_set(stops, row) for row in rows)
