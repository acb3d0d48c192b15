"""The chat on a Space that lends its GPU: one call for all columns, its cost, quota and end."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from second_process import SecondProcess
from test_zero_gpu import Lent

from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.streaming import RowState
from ipmerge_core.inference.thinking import Reply
from ipmerge_core.runtime.zero_gpu import is_zero_gpu
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.active_requests import ActiveRequest
from ipmerge_core.ui.chat.answers import (
    Answers,
    answer_question,
    gpu_seconds,
)
from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.columns import BASE, PLAN
from ipmerge_core.ui.chat.costs import gpu_line
from ipmerge_core.ui.chat.differences import _choices, _Compared, _lent_choices
from ipmerge_core.ui.chat.question import Question, pack_question
from ipmerge_core.ui.chat.recorded import recorded_examples
from ipmerge_core.ui.chat.strip import GAINS
from ipmerge_core.ui.chat.sweeping import answer_strip
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.lending import LentHost, serve_lent
from ipmerge_core.ui.live_answers import AskedColumn, answer_columns

CHOSEN = ChosenMerge("pack", by="explore")
HOW = GenerationSettings(max_new_tokens=8, max_thinking_tokens=16)


def endless(live: LiveModel, rows, stops=()) -> Iterator[list[RowState]]:
    number = 0
    while not any(stop.is_set() for stop in stops):
        number += 1
        yield [RowState("answering", Reply("", f"word{number}", False), (1,)) for _ in rows]
        time.sleep(0.01)


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


def test_a_question_is_packed_into_plain_values_and_back(asked):
    before = ((Message("system", "Be brief."), Message("user", "What?", asked.images)), ())
    packed = pack_question(asked._replace(before=before))
    again = pickle.loads(pickle.dumps(packed)).unpack()
    assert (again.text, again.chosen, again.columns) == (asked.text, asked.chosen, (BASE, PLAN))
    assert [m.text for m in again.before[0]] == ["Be brief.", "What?"]
    for found in (again.images[0], again.before[0][1].images[0]):
        assert found.tobytes() == asked.images[0].tobytes()
    noise = Image.effect_noise((1000, 1000), 0).convert("RGB")
    assert len(pickle.dumps(pack_question(asked._replace(images=(noise,))))) < 50_000


# --- a real second process -------------------------------------------------------------------


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SecondProcess]:
    """Return a function that makes this a Space with ZeroGPU whose calls are other processes."""

    def lend(method: str) -> SecondProcess:
        made, module = SecondProcess(method), ModuleType("spaces")
        module.GPU = made.GPU  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "spaces", module)
        monkeypatch.setenv("SPACES_ZERO_GPU", "true")
        return made

    return lend


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_answers_as_this_one_does(backend, second, asked, method, monkeypatch):
    process = second(method)
    *_, found = answer_question(backend, asked)
    assert [side.state for side in found] == ["finished", "finished"], found
    assert (process.ended, process.durations) == ([True], [gpu_seconds(Answers, asked, (0, 1))])
    assert process.sent[0] < 10_000, "an image of the demo and no weights"
    assert backend._models is None, "the models are those of the other process"
    monkeypatch.delenv("SPACES_ZERO_GPU")
    *_, same = answer_question(backend, asked)
    assert [(s.text, s.source, s.plan, s.ids) for s in found] == [
        (s.text, s.source, s.plan, s.ids) for s in same
    ]


def test_the_api_and_the_token_probabilities_are_other_processes_too(
    backend, second, asked, monkeypatch
):
    columns = [AskedColumn(BASE), AskedColumn("plan", plan=CHOSEN.make_plan())]
    conversation = [Message("user", asked.text, asked.images)]

    def answers() -> list[tuple[str, str, int]]:
        *_, last = answer_columns(backend, "pack", columns, conversation, HOW)
        return [(each.state, each.text, each.tokens) for each in last]

    def probabilities() -> object:
        compared = _Compared((0, 1), tuple(named), sides[0].ids, 1)
        if is_zero_gpu():
            return next(_lent_choices(LentHost.of(backend), pack_question(asked), compared))
        return _choices(backend, asked, compared)

    *_, sides = answer_question(backend, asked)
    named = [(side.name, side.source, side.plan) for side in sides]
    expected = answers(), probabilities()
    assert [state for state, *_ in expected[0]] == ["finished", "finished"]
    process = second("fork")
    backend._models = backend._live = None
    assert (answers(), probabilities()) == expected
    assert len(process.durations) == 2
    assert backend._models is None, "the models are those of the other processes"


def test_stops_and_a_visitor_who_leaves_end_the_other_process(
    backend, second, asked, monkeypatch, tmp_path
):
    monkeypatch.setattr(LiveModel, "stream", endless)
    process, request, states = second("fork"), ActiveRequest(2), []
    stream = answer_question(backend, asked, request)
    for sides in stream:
        states.append([side.state for side in sides])
        if all(side.text for side in sides):
            request.stops[0].set()
        if states[-1] == ["stopped", "answering"]:
            break
    stream.close()  # the visitor leaves
    assert states[-1] == ["stopped", "answering"]
    assert process.ended == [True], "it ended by itself, not by force"


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
