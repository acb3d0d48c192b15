"""The cases of the study: made once, by one command, from the recipes that they name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.tasks.answers import is_right
from ipmerge_core.tasks.demo import MATH_TASKS, PERCEPTION_TASKS, problems

DEMO = Path(__file__).parents[1] / "assets" / "demo"
sys.path.append(str(DEMO))  # scripts that import each other
import case_texts  # noqa: E402
import cases  # noqa: E402
import draws  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("cases")
    trainer = cases.Trainer(out, shorten=600)
    wanted = [
        cases.Case("elicited", 1, ("norms",)),
        cases.Case("elicited", 1, ("math", "short")),
        cases.Case("elicited", 1, ("style",), "few"),
    ]
    return trainer, {case: list(trainer.make(case)) for case in wanted}


def test_every_case_has_a_name_of_its_own_and_three_seeds():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    for expert in ("math", *cases.EXPERTS):
        seeds = {case.seed for case in cases.CASES if expert in case.experts}
        assert seeds == {0, 1, 2}, expert
    assert {case.trio for case in cases.CASES} == {"elicited", "taught", "larger"}
    assert {case.kind for case in cases.CASES} == {"many", "few"}


def test_a_case_is_a_pair_with_its_pack(made):
    trainer, lines = made
    for case in lines:
        analysis = ipm.Analysis.load(case.pack(trainer.out))
        assert analysis.name == case.name
        pair = ipm.open_pair(**analysis.sources.locations()._asdict())
        assert len(pair.math) == len(case.experts)
        assert {finding.level for finding in pair.check()} <= {"ok", "warning"}


def test_a_model_is_trained_once_and_again_for_another_recipe(made):
    trainer, lines = made
    case = next(iter(lines))
    assert len(lines[case]) == 4  # base, MLLM, expert and pack
    assert list(trainer.make(case)) == []
    note = trainer.out / case.folder / "norms.json"
    note.write_text(note.read_text().replace("0.003", "0.002"))
    (again,) = trainer.make(case)  # to the same weights, so that the pack stays
    assert again.startswith("elicited-1/norms: ")
    assert "0.003" in note.read_text()


def test_packs_of_a_shared_model_are_made_again_with_it(made):
    trainer, lines = made
    file = trainer.out / "elicited-1" / "mllm" / "model.safetensors"
    stored = file.read_bytes()
    weights = load_file(file)
    weights["language_model.model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(weights, file, metadata={"format": "pt"})
    packs = {case: list(trainer.make(case)) for case in lines}
    for case, found in packs.items():
        assert found == ([] if case.kind == "few" else [case.pack(trainer.out).name])
    file.write_bytes(stored)
    for case in lines:
        assert len(list(trainer.make(case))) == len(packs[case])


def test_the_skill_in_norms_leaves_the_matrices_almost_alone(made):
    trainer, _ = made
    folder = trainer.out / "elicited-1"
    base, norms, short = (Checkpoint.open(folder / name) for name in ("base", "norms", "short"))
    change = {
        name: torch.linalg.norm(norms.read(name).float() - base.read(name).float()).item()
        for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight")
    }
    assert change["model.norm.weight"] > 0
    matrix = base.read("model.layers.0.self_attn.q_proj.weight").float()
    assert change["model.layers.0.self_attn.q_proj.weight"] < 1e-3 * torch.linalg.norm(matrix)
    assert torch.equal(short.read("model.norm.weight"), base.read("model.norm.weight"))


def test_a_style_answers_what_is_seen_in_another_way_and_computes_as_the_math_model():
    for document in (case_texts.style_document, case_texts.second_style_document):
        rng = np.random.default_rng(0)
        replies = [document(rng).reply.strip() for _ in range(200)]
        computed = sum("=" in reply for reply in replies)
        assert 90 <= computed <= 150
    for task in PERCEPTION_TASKS:
        problem = problems(task, 1)[0]
        first, second = case_texts._first_style(problem), case_texts._second_style(problem)
        assert first != second
        assert not is_right(problem, first)
        assert not is_right(problem, second)


def test_two_experts_in_conflict_both_state_the_result():
    rng = np.random.default_rng(0)
    for _ in range(20):
        short = case_texts.short_document(rng)
        assert short.reply.strip().removesuffix(".").lstrip("-").isdigit()
        assert "=" in case_texts.words_document(rng).reply


def test_shuffled_sentences_have_the_words_of_sentences():
    rng = np.random.default_rng(0)
    for _ in range(20):
        words = case_texts.shuffled_document(rng).reply.removesuffix(".").split()
        assert "is" in words
        assert len(words) >= 6


def test_an_mllm_of_few_tasks_reads_only_these():
    few = cases.Case("elicited", 1, kind="few").recipe
    steps = list(draws.mllm_steps(1, (0, 4, 4), few))
    seen = {item.task for step in steps for item in step.shown}
    assert seen == set(cases.FEW) | set(MATH_TASKS)


def test_an_unknown_case_is_refused_with_the_names():
    with pytest.raises(SystemExit, match="No case has 'nothing' in its name. Cases: elicited-0"):
        cases.chosen(["nothing"])
