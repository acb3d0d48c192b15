"""The chat on a Space that lends its GPU: one call for all columns, its cost, quota and end."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from test_zero_gpu import Lent

from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.streaming import RowState
from ipmerge_core.inference.thinking import Reply
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.active_requests import ActiveRequest
from ipmerge_core.ui.chat.answers import (
    Answers,
    Question,
    answer_question,
    gpu_seconds,
    serve_lent,
)
from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.columns import BASE, PLAN
from ipmerge_core.ui.chat.costs import gpu_line
from ipmerge_core.ui.chat.recorded import recorded_examples
from ipmerge_core.ui.chat.strip import GAINS
from ipmerge_core.ui.chat.sweeping import answer_strip
from ipmerge_core.ui.chosen_merge import ChosenMerge

CHOSEN = ChosenMerge("pack", by="explore")
HOW = GenerationSettings(max_new_tokens=8, max_thinking_tokens=16)


@pytest.fixture
def asked() -> Question:
    """The first recorded question."""
    from ipmerge_core.inference.images import open_image

    example = recorded_examples()[0]
    return Question(CHOSEN, example.reference.question, (open_image(example.image),), HOW)


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path))
    made = Backend()
    serve_lent(made)
    return made


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> Lent:
    """A Space with ZeroGPU whose library notes its calls."""
    stand_in, module = Lent(), ModuleType("spaces")
    module.GPU = stand_in.GPU
    monkeypatch.setitem(sys.modules, "spaces", module)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    return stand_in


def test_all_columns_are_one_call_that_answers_as_without_it(backend, lent, asked, monkeypatch):
    *_, found = answer_question(backend, asked)
    assert lent.calls == [gpu_seconds(Answers, asked, (0, 1))]
    assert lent.ended == 1
    *_, strip = answer_strip(backend, asked._replace(columns=(PLAN,)), ActiveRequest(len(GAINS)))
    assert (len(lent.calls), [side.state for side in strip]) == (2, ["finished"] * len(GAINS))
    assert strip[0].text == found[0].text  # lambda 0
    monkeypatch.delenv("SPACES_ZERO_GPU")
    *_, same = answer_question(backend, asked)
    assert [(s.text, s.source, s.plan) for s in found] == [(s.text, s.source, s.plan) for s in same]
    assert len(lent.calls) == 2


def test_a_question_can_be_handed_to_another_process(asked):
    again = pickle.loads(pickle.dumps(asked._replace(keys=dict(asked.keys))))
    assert (again.text, again.chosen, again.columns) == (asked.text, asked.chosen, (BASE, PLAN))


def test_a_used_up_quota_is_a_sentence_on_every_column_and_locks_nothing(backend, lent, asked):
    lent.error = Exception("You have exceeded your GPU quota (60s requested vs. 12s left).")
    *_, found = answer_question(backend, asked)
    for side in found:
        assert side.state == "failed"
        assert side.note.startswith("Your GPU time on this Space is used up: 60 s are needed")
    lent.error = None
    *_, found = answer_question(backend, asked, before=found, only=[0])
    assert [side.state for side in found] == ["finished", "failed"]


def test_stops_end_a_column_or_the_call(backend, lent, asked, monkeypatch):
    def endless(live: LiveModel, rows, stops=()) -> Iterator[list[RowState]]:
        number = 0
        while not any(stop.is_set() for stop in stops):
            number += 1
            yield [RowState("answering", Reply("", f"word{number}", False), (1,)) for _ in rows]
            time.sleep(0.01)

    monkeypatch.setattr(LiveModel, "stream", endless)
    request = ActiveRequest(2)
    stream = answer_question(backend, asked, request)
    seen = threading.Event()
    for sides in stream:
        if all(side.text for side in sides) and not seen.is_set():
            request.stops[0].set()
            seen.set()
        if sides[0].state == "stopped" and sides[1].state == "answering":
            break
    stream.close()  # the visitor leaves
    assert lent.ended == 1


def test_the_cost_is_stated_before_and_only_there(lent, asked, monkeypatch):
    seconds = gpu_seconds(Answers, asked, (0, 1))
    line = gpu_line(Held(CHOSEN, {}), HOW)
    assert line == f"A question holds the GPU for at most {seconds} seconds of your daily quota."
    own = asked._replace(columns=(BASE, "method:ties"))
    assert gpu_seconds(Answers, own, (0, 1)) > seconds
    monkeypatch.delenv("SPACES_ZERO_GPU")
    assert gpu_line(Held(CHOSEN, {}), HOW) == ""
