"""Live columns: every row says what its column would say alone, from one copy of the weights."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_families import CHAT_FAMILIES
from chat_models import build_chat
from live_families import NOISE, SHORT, alone, compare_family, last, perturbed, tensors_of

import ipmerge_core as ipm
from ipmerge_core.adapters.columns import Column, Row, why_not_factors
from ipmerge_core.adapters.factor_set import EXACT, FactorSet, iter_factor_set
from ipmerge_core.adapters.first_difference import continued, first_difference, shared_text
from ipmerge_core.adapters.live import LiveModel
from ipmerge_core.errors import PlanError, RunCancelled
from ipmerge_core.inference.generation import encode_messages
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.inference.shared_weights import SwappedWeights, swapped, weights_in_memory
from ipmerge_core.inference.streaming import RowState
from ipmerge_core.merging.in_memory import changed_tensors, iter_merged_tensors
from ipmerge_core.methods.declarations import drained
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan, reopen
from ipmerge_core.tasks.demo import problems

DEMO = Path(__file__).parents[1] / "assets" / "demo"
GAINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0)


class Demo:
    """The demo trio: a live model, two plans, and the same merges loaded from folders."""

    def __init__(self, folder: Path) -> None:
        analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
        make = partial(ipm.make_plan, analysis, similarity_threshold=0.0, gamma_norm="max")
        self.plan, self.unit = make(lambda_=4.0), make(lambda_=1.0)
        self.selective = ipm.make_plan(
            analysis, similarity_threshold=0.3, lambda_=8.0, gamma_norm="max"
        )
        self.full_rank = ipm.make_plan(analysis, method="task_arithmetic", math_weight=1.0)
        self.pair: ModelPair = reopen(self.plan)
        self.loaded = load_model(DEMO / "mllm")
        self.live = LiveModel(self.loaded)
        self.factors: FactorSet = drained(
            iter_factor_set(self.plan, self.pair, tolerance=EXACT, updates=folder / "updates")
        )
        self.live.add_factors(self.factors, self.pair)
        tensors = tensors_of(self.full_rank)
        self.tensors = self.live.tensor_column("task arithmetic", self.pair.mllm, tensors)
        self.folders = {}
        for plan in (self.plan, self.selective, self.full_rank):
            self.folders[plan.hash] = folder / plan.hash
            ipm.merge(plan, folder / plan.hash)

    def column(self, plan: MergePlan, name: str = "plan") -> Column:
        return self.live.plan_column(name, plan, self.factors)

    def merged(self, plan: MergePlan) -> LoadedModel:
        return load_model(self.folders[plan.hash])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo(tmp_path_factory.mktemp("live"))


def questions(count: int = 3) -> list[list[Message]]:
    asked = problems("mul", count, seed=3) + problems("sides", count, seed=3)
    return [[Message("user", each.question, (each.image,))] for each in asked]


# --- each row alone ---


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_row_says_what_its_column_says_alone(demo: Demo, temperature: float) -> None:
    settings = GenerationSettings(temperature, 24, seed=5)
    merged = {plan.hash: demo.merged(plan) for plan in (demo.plan, demo.selective, demo.full_rank)}
    differ = 0
    for messages in questions():
        columns = [
            demo.live.base(), demo.column(demo.plan), demo.column(demo.selective), demo.tensors
        ]  # fmt: skip
        found = last(demo.live.stream([Row(column, messages, settings) for column in columns]))
        models = [demo.loaded, *merged.values()]
        expected = [alone(model, messages, settings) for model in models]
        assert [state.ids for state in found] == expected
        assert [state.is_batched for state in found] == [True, True, True, False]
        differ += len(set(expected)) > 1
    assert differ, "the columns never differ, so that the test shows nothing"


def test_rows_of_different_lengths_share_a_batch_and_stay_exact(demo: Demo) -> None:
    first, second = questions(1)
    longer = [*first, Message("assistant", "An answer."), Message("user", "Why is that so?")]
    rows = [
        Row(demo.live.base(), first, SHORT), Row(demo.column(demo.plan), longer, SHORT),
        Row(demo.column(demo.plan), second, GenerationSettings(2.0, 10, seed=3)),
    ]  # fmt: skip
    found = last(demo.live.stream(rows))
    merged = demo.merged(demo.plan)
    assert [state.ids for state in found] == [
        alone(demo.loaded, first, SHORT),
        alone(merged, longer, SHORT),
        alone(merged, second, rows[2].settings),
    ]
    assert all(state.is_batched for state in found)


def test_a_strip_of_gains_is_the_plan_with_each_lambda(demo: Demo) -> None:
    messages = questions(1)[0]
    settings = GenerationSettings(max_new_tokens=12)
    found = last(demo.live.strip(demo.column(demo.unit), GAINS, messages, settings))
    assert all(state.is_batched for state in found)
    assert found[0].ids == alone(demo.loaded, messages, settings)
    assert found[GAINS.index(4.0)].ids == alone(demo.merged(demo.plan), messages, settings)
    with pytest.raises(PlanError, match="not a column of factors"):
        demo.live.strip(demo.tensors, GAINS, messages)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-VL",  # positions that a module keeps between steps
        "Qwen3-VL, mixture of experts",  # stacks of experts, built from one file tensor each
        "GLM-4V",  # fused gate and up
        "LLaVA-OneVision",  # several crops per image
        "Gemma 4",
        "MiniCPM-V 4.6",  # cannot run a batch of images: every row alone
    ],
)
def test_rows_are_exact_in_every_family(name: str, tmp_path: Path) -> None:
    found = compare_family(name, tmp_path)
    assert [state.note for state in found.states] == [""] * len(found.states)
    assert [state.ids for state in found.states] == found.expected
    assert len(set(found.expected)) > 2


def test_bf16_rows_are_those_of_the_batch_of_the_same_column(tmp_path: Path) -> None:
    """In bf16 a batch may round differently; the columns still differ as their models do."""
    mllm = build_chat(CHAT_FAMILIES["Qwen2.5-VL"], tmp_path / "mllm", torch.bfloat16)
    base = perturbed(mllm, tmp_path / "base", 1, 0.02)
    pair = ipm.open_pair(mllm, perturbed(base, tmp_path / "math", 2, 0.05), base)
    plan = ipm.make_plan(ipm.analyse(pair), similarity_threshold=0.0, lambda_=8.0, gamma_norm="max")
    live = LiveModel(load_model(mllm))
    factors: FactorSet = drained(iter_factor_set(plan, pair))
    live.add_factors(factors, pair)
    column = live.plan_column("plan", plan, factors)
    messages = [Message("user", "What is it?", (NOISE,))]
    found = last(live.stream([Row(live.base(), messages, SHORT), Row(column, messages, SHORT)]))
    assert found[0].ids == alone(live.loaded, messages, SHORT)
    assert found[1].ids != found[0].ids


# --- streams ---


def test_a_stopped_row_leaves_without_disturbing_the_others(demo: Demo) -> None:
    messages = questions(1)[1]
    settings = GenerationSettings(2.0, 40, seed=2)
    stop, column = threading.Event(), demo.column(demo.plan)
    rows = [Row(demo.live.base(), messages, settings, [stop]), Row(column, messages, settings)]
    slow = demo.loaded.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        for states in demo.live.stream(rows):
            if states[0].ids:
                stop.set()
    finally:
        slow.remove()
    assert [state.state for state in states] == ["stopped", "finished"]
    assert states[1].ids == alone(demo.merged(demo.plan), messages, settings)
    whole = alone(demo.loaded, messages, settings)
    assert 0 < len(states[0].ids) < len(whole)
    assert whole[: len(states[0].ids)] == states[0].ids


def test_a_row_stopped_while_it_waits_leaves_the_others_waiting(demo: Demo) -> None:
    stop, messages = threading.Event(), questions(1)[0]
    rows = [Row(demo.live.base(), messages, SHORT, [stop]), Row(demo.live.base(), messages, SHORT)]
    with demo.loaded.turns.taken():  # another conversation has the model
        stream = demo.live.stream(rows)
        states = next(stream)
        stop.set()
        assert [state.state for state in states] == ["waiting", "waiting"]
    found = last(stream)
    assert [state.state for state in found] == ["stopped", "finished"]
    assert found[1].ids == alone(demo.loaded, messages, SHORT)


def test_a_model_with_other_weights_for_a_while(demo: Demo) -> None:
    messages = questions(1)[0]
    plan = demo.full_rank
    weights = SwappedWeights(demo.loaded, weights_in_memory(demo.pair.mllm, tensors_of(plan)))
    before = alone(demo.loaded, messages, SHORT)
    with swapped(demo.loaded, weights) as merged:
        assert alone(merged, messages, SHORT) == alone(demo.merged(plan), messages, SHORT)
        stop = threading.Event()
        stop.set()
        with pytest.raises(RunCancelled), swapped(demo.loaded, weights, [stop]):
            pass
    assert alone(demo.loaded, messages, SHORT) == before


def test_a_visitor_who_leaves_stops_the_model(demo: Demo) -> None:
    before = threading.active_count()
    settings = GenerationSettings(5.0, 400, seed=1)
    rows = [Row(c, questions(1)[0], settings) for c in (demo.live.base(), demo.tensors)]
    stream = demo.live.stream(rows)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert last(demo.live.stream([Row(demo.live.base(), questions(1)[0], SHORT)]))[0].ids


def test_conversations_in_several_threads_take_turns_on_one_model(demo: Demo) -> None:
    asked = questions(2)
    settings = GenerationSettings(1.0, 24, seed=7)
    columns = [demo.live.base(), demo.column(demo.plan), demo.tensors]
    found: dict[int, list[RowState]] = {}

    def ask(number: int) -> None:
        rows = [Row(column, asked[number], settings) for column in columns]
        found[number] = last(demo.live.stream(rows))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    models = [demo.loaded, demo.merged(demo.plan), demo.merged(demo.full_rank)]
    for number, messages in enumerate(asked):
        expected = [alone(model, messages, settings) for model in models]
        assert [state.ids for state in found[number]] == expected


def test_a_row_that_cannot_be_asked_fails_alone(demo: Demo) -> None:
    messages = questions(1)[0]
    bad = [Message("user", "x" * 100_000)]
    rows = [Row(demo.live.base(), bad, SHORT), Row(demo.column(demo.plan), messages, SHORT)]
    found = last(demo.live.stream(rows))
    assert [state.state for state in found] == ["failed", "finished"]
    assert "100000 characters; the maximum is" in found[0].note
    assert found[1].ids == alone(demo.merged(demo.plan), messages, SHORT)


def test_a_column_that_fails_in_the_model_fails_alone(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    assert demo.tensors.weights is not None
    monkeypatch.setattr(demo.tensors.weights, "install", broken)
    rows = [Row(c, questions(1)[0], SHORT) for c in (demo.live.base(), demo.tensors)]
    found = last(demo.live.stream(rows))
    assert [state.state for state in found] == ["finished", "failed"]
    assert "no such kernel" in found[1].note


def test_rows_that_do_not_fit_together_are_answered_one_by_one(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, sizes = demo.loaded.model.generate, []

    def small(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(demo.loaded.model, "generate", small)
    messages = questions(1)[0]
    rows = [Row(c, messages, SHORT) for c in (demo.live.base(), demo.column(demo.plan))]
    found = last(demo.live.stream(rows))
    assert sizes == [2, 1, 1]
    assert [state.is_batched for state in found] == [False, False]
    monkeypatch.undo()
    assert [s.ids for s in found] == [s.ids for s in last(demo.live.stream(rows))]


def test_a_row_that_does_not_fit_alone_says_what_helps(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(demo.loaded.model, "generate", full)
    (state,) = last(demo.live.stream([Row(demo.live.base(), questions(1)[0], SHORT)]))
    assert "ran out of memory" in state.note
    assert "8 or 4 bit" in state.note


def test_a_state_tells_tokens_speed_and_what_ended_it(demo: Demo) -> None:
    messages = questions(1)[1]
    rows = [Row(demo.live.base(), messages, GenerationSettings(max_new_tokens=2))]
    (cut,) = last(demo.live.stream(rows))
    assert (cut.is_cut, len(cut.ids)) == (True, 2)
    (whole,) = last(demo.live.stream([Row(demo.live.base(), messages, SHORT)]))
    assert not whole.is_cut
    assert whole.tokens_per_second > 0
    assert 0 < whole.first_seconds <= whole.seconds


# --- the first difference ---


def test_the_first_difference_and_what_each_column_would_have_said(demo: Demo) -> None:
    messages = questions(1)[0]
    rows = [Row(c, messages, SHORT) for c in (demo.live.base(), demo.column(demo.plan))]
    a, b = last(demo.live.stream(rows))
    place = first_difference(a.ids, b.ids)
    assert place is not None
    shared = shared_text(demo.loaded, a.ids, place)
    assert a.text.startswith(shared)
    assert b.text.startswith(shared)
    left, right = demo.live.next_tokens(rows, a.ids[:place], top=4)
    ends = demo.loaded.model.generation_config.eos_token_id
    for state, choices in ((a, left), (b, right)):
        said = state.ids[place] if place < len(state.ids) else ends[0]
        assert choices[0].token == said
        chances = [choice.probability for choice in choices]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1 + 1e-9
    assert first_difference(a.ids, a.ids) is None


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Gemma 4", "GLM-4V"])
def test_a_continued_prompt_is_what_generation_continues(name: str, tmp_path: Path) -> None:
    live = LiveModel(load_model(build_chat(CHAT_FAMILIES[name], tmp_path / "model")))
    messages = [Message("user", "What is it?", (NOISE,))]
    (state,) = last(live.stream([Row(live.base(), messages, SHORT)]))
    for place in (0, 3, 6):
        ((best, *_),) = live.next_tokens([Row(live.base(), messages)], state.ids[:place], top=2)
        assert best.token == state.ids[place]
    inputs = encode_messages(live.loaded, messages)
    assert continued(inputs, [])["input_ids"].equal(inputs["input_ids"])


# --- what cannot be a column ---


def test_a_plan_without_factors_says_why(demo: Demo) -> None:
    assert why_not_factors(demo.plan) == ""
    assert "has no factors" in why_not_factors(demo.full_rank)
    with pytest.raises(PlanError, match="has no factors"):
        demo.live.plan_column("x", demo.full_rank, demo.factors)
    with pytest.raises(PlanError, match="has no factors"):
        drained(iter_factor_set(demo.full_rank, demo.pair))


def test_a_plan_of_another_model_is_refused(demo: Demo, tmp_path: Path) -> None:
    other = LiveModel(load_model(perturbed(DEMO / "mllm", tmp_path / "other", 1, 0.01)))
    for attempt in (
        lambda: other.add_factors(demo.factors, demo.pair),
        lambda: other.plan_column("x", demo.plan, demo.factors),
        lambda: other.tensor_column("x", demo.pair.mllm, {}),
    ):
        with pytest.raises(PlanError, match="whose weights are not those of the loaded 'other'"):
            attempt()


def test_factors_that_were_released_are_an_error_of_the_row(demo: Demo) -> None:
    live = LiveModel(demo.loaded)
    live.add_factors(demo.factors, demo.pair)
    column = live.plan_column("plan", demo.plan, demo.factors)
    live.drop_factors(demo.factors)
    (state,) = last(live.stream([Row(column, questions(1)[0], SHORT)]))
    assert state.state == "failed"
    assert "were released" in state.note


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tolerance": 1.0}, "tolerance is 1.0"), ({"max_rank": 0}, "max_rank is 0")],
)
def test_options_of_factors_out_of_range_are_refused(
    demo: Demo, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        drained(iter_factor_set(demo.plan, demo.pair, **options))


def test_a_finished_folder_shares_all_that_is_equal(demo: Demo) -> None:
    folder = demo.folders[demo.selective.hash]
    steps = list(changed_tensors(folder, demo.pair.mllm))
    changed = {step.name: step.tensor for step in steps if step.tensor is not None}
    assert len(changed) == len(demo.selective.selected)
    column = demo.live.tensor_column("folder", demo.pair.mllm, changed)
    assert column.nbytes == sum(value.nbytes for value in changed.values())
    messages = questions(1)[0]
    (state,) = last(demo.live.stream([Row(column, messages, SHORT)]))
    assert state.ids == alone(demo.merged(demo.selective), messages, SHORT)


def test_preparing_can_be_stopped_and_resumed(demo: Demo, tmp_path: Path) -> None:
    stop = threading.Event()
    steps = iter_factor_set(demo.plan, demo.pair, updates=tmp_path, stops=[stop])
    assert [next(steps).action for _ in range(5)] == ["decomposed"] * 5
    stop.set()
    with pytest.raises(RunCancelled):
        next(steps)
    steps.close()
    actions = [s.action for s in iter_factor_set(demo.plan, demo.pair, updates=tmp_path)]
    assert actions[:5] == ["kept"] * 5
    assert actions[-1] == "decomposed"
    with pytest.raises(RunCancelled):
        list(iter_merged_tensors(demo.full_rank, stops=[stop]))


def test_a_layer_that_the_model_never_calls_is_an_error(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ipmerge_core.adapters.hooks.FactorHooks.watch", lambda *_: None
    )  # as if a layer used its weight without a call
    live = LiveModel(demo.loaded)
    live.add_factors(demo.factors, demo.pair)
    column = live.plan_column("plan", demo.plan, demo.factors)
    (state,) = last(live.stream([Row(column, questions(1)[0], SHORT)]))
    assert state.state == "failed"
    assert "does not call its layer" in state.note
