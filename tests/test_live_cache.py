"""Live columns in the app: prepared once, shared by plans, limited in number, and over HTTP."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ipmerge_core as ipm
from ipmerge_core.adapters import live_cache
from ipmerge_core.adapters.columns import Row
from ipmerge_core.adapters.live_cache import LiveCache
from ipmerge_core.errors import IPMergeError, PlanError, RunCancelled, RunError
from ipmerge_core.inference.generation import answer
from ipmerge_core.inference.loading import ModelCache
from ipmerge_core.inference.prompts import Message
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.tasks.demo import Problem, problems
from ipmerge_core.ui import api
from ipmerge_core.ui.backend import Backend

DEMO = Path(__file__).parents[1] / "assets" / "demo"
SHORT = GenerationSettings(max_new_tokens=24)


def demo_plan(**settings: Any) -> MergePlan:
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    own = {"similarity_threshold": 0.0} if settings.get("method") is None else {}
    return ipm.make_plan(analysis, **{**own, **settings})


@pytest.fixture(scope="module")
def asked() -> Problem:
    return problems("mul", 1, seed=3)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LiveCache:
    return LiveCache(ModelCache(2), tmp_path_factory.mktemp("updates"))


def test_every_plan_of_a_variant_shares_one_set_of_factors(cache: LiveCache) -> None:
    live = cache.model(DEMO / "mllm")
    assert cache.model(DEMO / "mllm") is live
    first, second = demo_plan(lambda_=1.0), demo_plan(lambda_=4.0, similarity_threshold=0.3)
    assert not cache.cost(live, first).is_ready
    words: list[str] = []
    column = cache.column(live, first, "first", words.append)
    assert words[-1] == "preparing factors: 28 of 28 matrices"
    words.clear()
    other = cache.column(live, second, "second", words.append)
    assert not words, "prepared again"
    assert other.factors is column.factors
    assert cache.cost(live, second).is_ready
    assert len(other.gains) == len(second.selected)


def test_other_methods_become_tensors_whose_size_is_known_before(cache: LiveCache) -> None:
    live, plan = cache.model(DEMO / "mllm"), demo_plan(method="ties")
    cost = cache.cost(live, plan)
    assert (cost.kind, cost.is_ready) == ("tensors", False)
    assert "has full rank" in cost.why
    column = cache.column(live, plan, "TIES")
    assert column.nbytes == cost.nbytes
    again = cache.column(live, plan, "again")
    assert again.weights is column.weights
    assert again.name == "again"


def test_a_finished_folder_is_a_column_and_a_model_of_another_shape_is_not(
    cache: LiveCache, tmp_path: Path, asked: Problem
) -> None:
    live, plan = cache.model(DEMO / "mllm"), demo_plan(lambda_=4.0, gamma_norm="max")
    ipm.merge(plan, tmp_path / "merged")
    column = cache.folder_column(live, tmp_path / "merged", "folder")
    assert cache.folder_column(live, tmp_path / "merged", "x").weights is column.weights
    *_, (state,) = live.stream([Row(column, [Message("user", asked.question, (asked.image,))])])
    assert state.text == answer(tmp_path / "merged", asked.question, asked.image)
    with pytest.raises(IPMergeError, match="does not have the tensors of"):
        cache.folder_column(live, DEMO / "math", "math")


def test_only_a_few_columns_of_tensors_are_kept(cache: LiveCache) -> None:
    live = cache.model(DEMO / "mllm")
    plans = [demo_plan(method="task_arithmetic", math_weight=w) for w in (0.1, 0.2, 0.3, 0.4)]
    for plan in plans:
        cache.column(live, plan, "x")
    ready = [cache.cost(live, plan).is_ready for plan in plans]
    assert ready == [False, True, True, True]


def test_too_little_memory_is_a_sentence_with_the_sizes(
    cache: LiveCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_cache, "_HEADROOM", 1e9)
    with pytest.raises(RunError, match=r"take 0.0 GB and .* GB are free on cpu. Merge fewer"):
        cache.column(cache.model(DEMO / "mllm"), demo_plan(method="linear"), "x")


def test_waiting_for_another_column_can_be_stopped(cache: LiveCache) -> None:
    live, stop = cache.model(DEMO / "mllm"), threading.Event()
    stop.set()
    with cache._alone(()), pytest.raises(RunCancelled):
        cache.column(live, demo_plan(lambda_=9.0), "x", stops=[stop])


# --- over HTTP ---


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPMERGE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("SPACE_ID", raising=False)
        found = {each.__name__: each for each in api._answers(Backend(device="cpu"))}
        yield found["answer"]


def encoded(problem: Problem) -> str:
    buffer = io.BytesIO()
    problem.image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_the_endpoint_answers_with_any_columns(
    endpoint: Callable[..., Any], asked: Problem, tmp_path: Path
) -> None:
    columns = [
        {"model": "base"},
        {"model": "plan", "similarity_threshold": 0.0, "lambda_": 4.0, "variant": "max"},
        {"model": "plan", "method": "task_arithmetic", "parameters": {"math_weight": 1.0}},
    ]
    *_, last = endpoint("pack", asked.question, columns, [encoded(asked)], max_new_tokens=24)
    plans = [
        demo_plan(lambda_=4.0, gamma_norm="max"),
        demo_plan(method="task_arithmetic", math_weight=1.0),
    ]
    folders = [DEMO / "mllm"]
    for plan in plans:
        ipm.merge(plan, tmp_path / plan.hash)
        folders.append(tmp_path / plan.hash)
    expected = [answer(f, asked.question, asked.image, max_new_tokens=24) for f in folders]
    assert [each["text"] for each in last["columns"]] == expected
    assert [each["state"] for each in last["columns"]] == ["finished"] * 3
    assert last["columns"][1]["label"] == f"plan {plans[0].hash}"


def test_the_endpoint_takes_history_and_several_images(
    endpoint: Callable[..., Any], asked: Problem
) -> None:
    history = [{"role": "user", "text": "Hello."}, {"role": "assistant", "text": "Hello!"}]
    how = {"history": history, "system": "Be brief.", "max_new_tokens": 3}
    *_, last = endpoint("pack", "What is it?", [{"model": "base"}], [encoded(asked)] * 2, **how)
    (found,) = last["columns"]
    assert found["state"] in ("finished", "failed")
    assert found["text"] or "image" in found["note"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"columns": ["base"]}, "A column must be an object"),
        ({"columns": [{"model": "base", "lambda_": 2}]}, "'base' has no value 'lambda_'"),
        ({"columns": [{"model": "plan", "lamda": 2}]}, "'plan' has no value 'lamda'"),
        ({"columns": [{"model": "nothing"}]}, "nothing"),
        ({"columns": [{"model": "base"}] * 9}, "9 columns were requested; expected 1 to 8"),
        ({"images": "x"}, "must be lists"),
        ({"images": ["x"] * 9}, "9 images"),
        ({"history": [{"role": "tool", "text": "x"}]}, '"role", user or assistant'),
        ({"max_thinking_tokens": -1}, "thinking tokens is -1"),
    ],
)
def test_bad_requests_are_one_sentence(
    endpoint: Callable[..., Any], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises((PlanError, RunError), match=words):
        list(endpoint("pack", "What is it?", **arguments))


def test_a_column_that_cannot_be_prepared_fails_alone(
    endpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RunError("There is no memory for it.")

    monkeypatch.setattr(LiveCache, "column", broken)
    columns = [{"model": "plan"}, {"model": "base"}]
    *_, last = endpoint("pack", "What is it?", columns, max_new_tokens=3)
    assert [each["state"] for each in last["columns"]] == ["failed", "finished"]
    assert last["columns"][0]["note"] == "There is no memory for it."
    assert torch.is_inference_mode_enabled() is False
