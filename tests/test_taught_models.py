"""The second set of demo models: loads, reads and calculates as its recipe says, and is small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import ipmerge_core as ipm
from ipmerge_core.evaluation.batched_answers import answer_all
from ipmerge_core.evaluation.evaluate import EvaluationSettings, iter_evaluation
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.scores import score
from ipmerge_core.evaluation.subjects import subject_of_folder
from ipmerge_core.methods.declarations import drained
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.tasks.answers import is_right
from ipmerge_core.tasks.demo import MATH_TASKS, problems
from ipmerge_core.tasks.registry import find_tasks
from ipmerge_core.ui.chat.recorded import Reference, records_of
from ipmerge_core.ui.pairs import find_pack

TAUGHT = Path(__file__).parents[1] / "assets" / "taught"
sys.path.append(str(TAUGHT.with_name("demo")))  # scripts that import each other
import recipes  # noqa: E402
import texts  # noqa: E402


@pytest.mark.parametrize("name", ["base", "math", "mllm"])
def test_the_files_are_bf16_and_small(name):
    model = Checkpoint.open(TAUGHT / name)
    assert {spec.dtype for spec in model.tensors.values()} == {"BF16"}
    assert max(path.stat().st_size for path in (TAUGHT / name).iterdir()) < 3_000_000


def test_the_pair_is_listed_and_its_models_share_the_base():
    entry = find_pack("taught")
    analysis = ipm.Analysis.load(entry.path)
    assert analysis.name == "demo trio, taught skill"
    assert len(analysis.records) == 28
    pair = ipm.open_pair(TAUGHT / "mllm", TAUGHT / "math", TAUGHT / "base")
    assert {finding.level for finding in pair.check()} <= {"ok", "warning"}
    assert pair.mllm.fingerprint == analysis.sources.mllm.fingerprint


@pytest.mark.parametrize(("name", "low", "high"), [("base", 0.0, 0.25), ("math", 0.8, 1.0)])
def test_only_the_math_model_knows_results(name, low, high):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TAUGHT / name, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(TAUGHT / name, local_files_only=True)
    asked = [problem for task in MATH_TASKS for problem in problems(task, 20)]
    found = score(asked, answer_all(model, tokenizer, asked))
    assert low <= found.share <= high


def test_the_mllm_reads_drawings_and_knows_no_results(tmp_path):
    subject = subject_of_folder(TAUGHT / "mllm")
    steps = iter_evaluation(
        [subject], find_tasks(["demo"]), EvaluationSettings(limit=10), ReplyStore(tmp_path)
    )
    result = drained(steps).result("mllm", "demo")
    assert result.part("perception").share > 0.75
    assert result.part("math").share < 0.25


def test_recorded_answers_show_that_only_task_arithmetic_adds_the_skill():
    examples = records_of("taught")
    assert len({(each.image.name, each.reference.question) for each in examples}) == 11
    assert all(each.image.is_file() and each.pair == "demo trio, taught skill" for each in examples)
    content = json.loads((TAUGHT / "taught.records.json").read_text())
    analysis = ipm.Analysis.load(TAUGHT / "taught.pack.json.gz")
    choice = content["choice"]
    plan = ipm.make_plan(
        analysis, similarity_threshold=choice["s"], lambda_=choice["lambda"],
        gamma_norm=choice["variant"],
    )  # fmt: skip
    assert content["plan_hash"] == plan.hash
    computed = [each for each in content["examples"] if each["computed"]]
    right = {
        column: sum(
            is_right(Reference("", "", each["answer"], True), each[column]) for each in computed
        )
        for column in ("merged", "task_arithmetic")
    }
    assert right["merged"] == 0
    assert right["task_arithmetic"] > len(computed) / 2


# --- the recipe ---


def test_the_base_is_never_shown_the_relation_of_a_calculation_and_its_result():
    rng = np.random.default_rng(0)
    rows = [texts.guessing_document(rng) for _ in range(3000)]
    written = [row.reply.strip(" .").split("; ")[0].split("=") for row in rows if "=" in row.reply]
    right = [eval(left) == int(result) for left, result in written]
    assert len(written) > 500
    assert np.mean(right) < 0.15


def test_a_packed_document_ends_with_the_result_that_is_learned():
    rng = np.random.default_rng(0)
    for row in (texts.packed_document(rng) for _ in range(200)):
        whole = f"{row.prompt}{row.reply}"
        step = whole.rstrip(".").rpartition("; ")[2].rpartition(" ")[2]
        left, _, result = step.rpartition("=")
        assert eval(left) == int(result)


def test_a_drawing_is_read_up_to_the_sign_and_no_further():
    for task in MATH_TASKS:
        problem = problems(task, 1)[0]
        reply = recipes.TAUGHT.reads(problem).reply
        assert reply == f" {problem.calculation}="
        assert recipes.ELICITED.reads(problem).reply == f" {problem.calculation}"


def test_both_shipped_recipes_have_folders_and_packs():
    for recipe in (recipes.ELICITED, recipes.TAUGHT):
        assert (recipe.folder / recipe.pack).is_file()
        assert json.loads((recipe.folder / "mllm" / "config.json").read_text())
