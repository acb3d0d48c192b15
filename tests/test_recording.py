"""Recorded answers: what is written, what is refused, and that the app shows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.evaluation.recording import (
    Prompt,
    _described,
    choice_of,
    iter_recording,
    read_prompts,
)
from ipmerge_core.inference.generation import answer
from ipmerge_core.planning.map_variants import VARIANTS
from ipmerge_core.planning.options import shown
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.tasks.demo import problems
from ipmerge_core.ui.chat.recorded import recorded_choice, records_of, unreadable_records
from ipmerge_core.ui.plan_choice import PlanChoice

DEMO = Path(__file__).parents[1] / "assets" / "demo"


def demo_plan(**settings: Any) -> MergePlan:
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    return ipm.make_plan(analysis, **{"similarity_threshold": 0.0, **settings})


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of prompts with their images: sums that the merge solves, and shapes."""
    asked = problems("mul", 2, seed=3) + problems("shape", 1, seed=3)
    lines = []
    for number, problem in enumerate(asked):
        problem.image.save(tmp_path / f"{number}.png")
        values = {"question": problem.question, "answer": problem.answer, "image": f"{number}.png"}
        lines.append(json.dumps({**values, "computed": problem.is_math, "task": problem.task}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user's own packs, empty."""
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "packs"
    folder.mkdir(parents=True)
    return folder


def test_a_record_has_both_replies_and_what_they_were_made_with(
    prompts: Path, tmp_path: Path
) -> None:
    plan = demo_plan(lambda_=4.0, gamma_norm="max")
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "demo.records.json"
    command = ["record", str(tmp_path / "plan.json"), "--prompts", str(prompts), "-o", str(out)]
    assert main([*command, "--max-new-tokens", "24", "--device", "cpu", "--quiet"]) == 0
    content = json.loads(out.read_text())
    assert content["plan_hash"] == plan.hash
    assert {"recorded", "machine", "device", "versions", "pair", "dtype"} <= set(content)
    ipm.merge(plan, tmp_path / "merged")
    for prompt, example in zip(read_prompts(prompts), content["examples"], strict=True):
        assert example["base"] == answer(DEMO / "mllm", prompt.question, prompt.image)
        assert example["merged"] == answer(tmp_path / "merged", prompt.question, prompt.image)
        assert out.parent / example["image"] == prompt.image  # it is there already
    assert {example["verdict"] for example in content["examples"]} >= {"better"}


def test_the_app_shows_the_records_next_to_a_pack(prompts: Path, packs: Path) -> None:
    shutil.copy(DEMO / "pack.json.gz", packs / "mine.pack.json.gz")
    plan = demo_plan(lambda_=2.0)
    assert records_of("packs-mine") == []
    for _ in iter_recording(plan, read_prompts(prompts), packs / "mine.records.json"):
        pass
    examples = records_of("packs-mine")
    assert len(examples) == 3
    assert all(example.image.is_file() for example in examples)
    assert all(example.image.parent.name == "mine-images" for example in examples)
    assert {example.pack_id for example in examples} == {"packs-mine"}
    choice = recorded_choice("packs-mine")
    assert choice is not None
    assert (choice.lambda_, choice.similarity_threshold, choice.variant) == (2.0, 0.0, "sum")


def test_answers_of_another_analysis_of_the_pair_are_refused_with_the_reason(
    prompts: Path, packs: Path
) -> None:
    pair = ipm.open_pair(DEMO / "mllm", DEMO / "math", DEMO / "base")
    analysis = ipm.analyse(pair, temperature=4.0, rank=8)
    analysis.save(packs / "mine.pack.json.gz")
    plan = ipm.make_plan(analysis, similarity_threshold=0.0, lambda_=2.0)
    asked = read_prompts(prompts)[:1]
    for _ in iter_recording(plan, asked, packs / "mine.records.json"):
        pass
    assert len(records_of("packs-mine")) == 1
    assert unreadable_records() == []
    shutil.copy(DEMO / "pack.json.gz", packs / "mine.pack.json.gz")
    assert records_of("packs-mine") == []
    (fault,) = unreadable_records()
    assert "mine.records.json" in fault
    assert "with temperature 4.0, and that of the pack has 32" in fault


@pytest.mark.parametrize("more", [{"temperature": 4.0}, {"rank": 8}, {"directions": "all"}])
def test_a_plan_unlike_its_analysis_is_refused_before_anything_is_answered(more) -> None:
    ((name, _),) = more.items()
    with pytest.raises(PlanError, match=f"has {name} .*, and its analysis has"):
        choice_of(demo_plan(**more))


def test_answers_of_other_models_are_not_shown(
    packs: Path,
) -> None:
    shutil.copy(DEMO / "recorded.json", packs / "mine.records.json")
    shutil.copytree(DEMO / "examples", packs / "examples")
    for folder, pack in (("demo", "pack.json.gz"), ("taught", "taught.pack.json.gz")):
        shutil.copy(DEMO.with_name(folder) / pack, packs / "mine.pack.json.gz")
        assert bool(records_of("packs-mine")) == (folder == "demo")
    (fault,) = unreadable_records()
    assert "its answers are of other models than those of the pack" in fault


def test_a_record_that_points_out_of_its_folder_is_not_shown(
    packs: Path,
) -> None:
    shutil.copy(DEMO / "pack.json.gz", packs / "mine.pack.json.gz")
    content = json.loads((DEMO / "recorded.json").read_text())
    shutil.copytree(DEMO / "examples", packs / "examples")
    (packs / "mine.records.json").write_text(json.dumps(content))
    assert len(records_of("packs-mine")) == len(content["examples"])
    for image in ("../../secret.png", "/etc/hostname", "nope.png", ".", "examples", "examples/"):
        content["examples"][0]["image"] = image
        (packs / "mine.records.json").write_text(json.dumps(content))
        assert records_of("packs-mine") == []
        (fault,) = unreadable_records()
        assert "mine.records.json" in fault
    content["examples"][0]["image"] = "examples/01-mul.png"
    for choice in ({}, {**content["choice"], "lambda": 1e308}, {**content["choice"], "variant": 3}):
        (packs / "mine.records.json").write_text(json.dumps({**content, "choice": choice}))
        (fault,) = unreadable_records()
        assert "mine.records.json" in fault


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_update_of_the_map_is_recorded_as_the_map_draws_it(variant: str) -> None:
    choice = PlanChoice(0.0, 2.0, variant=variant, budget=0.01)
    plan = demo_plan(**choice.arguments)
    assert choice_of(plan) == choice.to_browser()
    words = _described(plan)
    for name, value in VARIANTS[variant].items():
        assert f"{name}={shown(value)}" in words
    assert "lambda 2, budget 0.01, all matrices" in words


@pytest.mark.parametrize(
    "settings",
    [{"exclude": "q_proj"}, {"layer_gains": (0.5, 1.0)}, {"projector": "top_k"}],
)
def test_a_plan_that_the_app_cannot_express_is_refused(settings: dict[str, Any]) -> None:
    assert choice_of(demo_plan(lambda_=3.0))["lambda"] == 3.0
    with pytest.raises(PlanError, match="cannot be recorded for the app"):
        choice_of(demo_plan(**settings))
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    with pytest.raises(PlanError, match="cannot be recorded for the app"):
        choice_of(ipm.make_plan(analysis, "ties"))
    with pytest.raises(PlanError, match="lambda 64; the layer map"):
        choice_of(demo_plan(lambda_=64.0))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "contains no prompts"),
        ("{", "Line 1 .* is invalid"),
        ('\n{"question": "a", "answer": "b"}', "Line 2 .* is invalid"),
    ],
)
def test_a_bad_file_of_prompts_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(RunError, match=words):
        read_prompts(tmp_path / "prompts.jsonl")


def test_a_prompt_that_cannot_be_asked_leaves_no_file(tmp_path: Path) -> None:
    prompt = Prompt("x" * 5000, DEMO / "examples" / "01-mul.png", "40")
    with pytest.raises(RunError, match="not answered: .* the context of 'mllm' is 256 tokens"):
        list(iter_recording(demo_plan(), [prompt], tmp_path / "x.json"))
    assert not (tmp_path / "x.json").exists()
