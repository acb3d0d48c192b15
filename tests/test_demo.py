"""The demo problems, and the demo trio that is shipped: it loads offline, reads and computes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.batched_answers import answer_all
from ipmerge_core.evaluation.scores import score
from ipmerge_core.tasks.answers import stated_result
from ipmerge_core.tasks.demo import (
    GLYPHS,
    MATH_TASKS,
    PERCEPTION_TASKS,
    QUESTIONS,
    SPLITS,
    TASKS,
    problems,
)

DEMO = Path(__file__).parents[1] / "assets" / "demo"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def mllm():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, report = AutoModelForImageTextToText.from_pretrained(
        DEMO / "mllm", local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(DEMO / "mllm", local_files_only=True)


def language_model(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(
        DEMO / name, local_files_only=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), AutoTokenizer.from_pretrained(DEMO / name, local_files_only=True)


# --- problems --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_problems_and_pixels(task):
    first, second = problems(task, 5, seed=7), problems(task, 8, seed=7)[:5]
    assert first == second
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert first != problems(task, 5, seed=8)


@pytest.mark.parametrize("task", ["add", "sub", "mul", "area", "perimeter", "sides", "written"])
def test_no_handwriting_is_shared_between_splits(task):
    shown = {
        split: {m.glyph for p in problems(task, 150, split=split) for m in p.marks if m.glyph >= 0}
        for split in SPLITS
    }
    for split, glyphs in shown.items():
        assert glyphs
        assert glyphs <= set(GLYPHS[split])
    assert not shown["train"] & shown["test"]
    assert not shown["validation"] & (shown["train"] | shown["test"])


def test_the_test_split_is_the_last_497_digits_and_the_splits_cover_all():
    assert len(GLYPHS["test"]) == 497
    rows = [row for glyphs in GLYPHS.values() for row in glyphs]
    assert sorted(rows) == list(range(1797))


@pytest.mark.parametrize("split", SPLITS)
def test_math_answers_equal_what_the_calculation_gives(split):
    for task in MATH_TASKS:
        for problem in problems(task, 60, seed=3, split=split):
            a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", problem.calculation).groups()
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            expected = 2 * value if task == "perimeter" else value
            assert problem.answer == str(expected)
            assert problem.worked.startswith(f"{problem.calculation}={value}")
            assert stated_result(problem.worked) == problem.answer
            assert problem.is_math


def test_perception_answers_equal_what_is_drawn():
    for problem in problems("dots", 40):
        assert problem.answer == str(len(problem.marks))
    for problem in problems("shape", 40):
        assert problem.answer == problem.marks[0].symbol
    for problem in problems("written", 40):
        assert problem.answer == "".join(mark.symbol for mark in problem.marks)
    for problem in problems("sides", 40):
        _, width, height = problem.marks
        assert problem.answer == f"{width.symbol} wide and {height.symbol} high"


@pytest.mark.parametrize("task", TASKS)
def test_marks_stay_on_the_page_and_leave_ink(task):
    for problem in problems(task, 40, seed=5):
        for mark in problem.marks:
            left, top, right, bottom = mark.box
            assert 0 <= left < right <= 128
            assert 0 <= top < bottom <= 128
        pixels = np.asarray(problem.image)
        assert pixels.shape == (128, 128, 3)
        assert pixels.min() < 100 < pixels.max() == 255


@pytest.mark.parametrize("task", TASKS)
def test_every_question_of_a_task_is_asked_and_prompts_hold_it(task):
    items = problems(task, 60)
    assert {item.question for item in items} == set(QUESTIONS[task])
    for item in items:
        assert item.prompt == f"USER: <image>\n{item.question} ASSISTANT:"
        assert item.text_prompt == f"USER: {item.words}\n{item.question} ASSISTANT:"


@pytest.mark.parametrize("task", ["dots", "area"])
def test_drawings_can_be_left_out_and_the_next_problems_take_their_place(task):
    stream = problems(task, 12, seed=2)
    left_out = {stream[0].marks, stream[3].marks, stream[4].marks}
    found = problems(task, 9, seed=2, without=left_out)
    assert found == [problem for problem in stream if problem.marks not in left_out]
    assert problems(task, 4, seed=2, without=left_out) == found[:4]


def test_leaving_out_too_many_drawings_is_refused_with_the_counts():
    class Everything(frozenset):
        def __contains__(self, _):
            return True

    with pytest.raises(RunError, match="Only 0 of the first 130 problems of 'dots'"):
        problems("dots", 3, without=Everything())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("multiply", 1), "Unknown demo task 'multiply'"),
        (("mul", -1), "Got a count of -1 problems"),
        (("mul", 1, 0, "dev"), "Unknown split 'dev'"),
    ],
)
def test_impossible_requests_are_refused_with_their_values(arguments, said):
    with pytest.raises(RunError, match=said):
        problems(*arguments)


# --- the trio --------------------------------------------------------------------------------


def test_every_shipped_file_is_below_the_size_limit_and_weights_are_safetensors():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 9.5 * MEGABYTE for path in files)
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
    for name in ("base", "math", "mllm"):
        assert (DEMO / name / "model.safetensors").is_file()


def test_the_mllm_carries_the_tensor_names_of_llava_on_the_hub():
    from safetensors import safe_open

    with safe_open(DEMO / "mllm" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names


def test_the_chat_template_gives_the_training_prompt(mllm):
    _, processor = mllm
    for problem in (problems(task, 1)[0] for task in TASKS):
        content = [
            {"type": "image", "image": problem.image},
            {"type": "text", "text": problem.question},
        ]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        trained = processor(text=problem.prompt, images=problem.image, return_tensors="pt")
        assert chat["input_ids"].tolist() == trained["input_ids"].tolist()
        assert (chat["pixel_values"] == trained["pixel_values"]).all()
        assert processor.tokenizer.decode(chat["input_ids"][0]).count("<s>") == 1


def test_the_chat_template_of_the_language_models_gives_the_training_prompt():
    _, tokenizer = language_model("math")
    problem = problems("area", 1)[0]
    message = {"role": "user", "content": f"{problem.words}\n{problem.question}"}
    chat = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert chat["input_ids"] == tokenizer(problem.text_prompt)["input_ids"]


def test_a_batch_answers_as_one_problem_at_a_time_does(mllm):
    model, processor = mllm
    items = [problem for task in TASKS for problem in problems(task, 2, seed=21)]
    together = answer_all(model, processor, items, batch_size=len(items))
    alone = answer_all(model, processor, items, batch_size=1)
    assert together == alone


def test_the_mllm_reads_drawings_and_states_no_result(mllm):
    model, processor = mllm
    seen = [problem for task in PERCEPTION_TASKS for problem in problems(task, 10, seed=11)]
    asked = [problem for task in MATH_TASKS for problem in problems(task, 8, seed=11)]
    assert score(seen, answer_all(model, processor, seen)).share >= 0.7
    assert score(asked, answer_all(model, processor, asked)).share <= 0.2


def test_the_math_model_computes_in_words_where_the_base_only_writes_down():
    asked = [problem for task in MATH_TASKS for problem in problems(task, 8, seed=11)]
    assert score(asked, answer_all(*language_model("math"), asked)).share >= 0.8
    assert score(asked, answer_all(*language_model("base"), asked)).share <= 0.2


def test_recorded_answers_are_complete_and_show_a_regression():
    recorded = json.loads((DEMO / "recorded.json").read_text())
    assert {"recorded", "machine", "trio", "plan", "examples"} <= set(recorded)
    for example in recorded["examples"]:
        assert (DEMO / example["image"]).is_file()
        assert {"task", "question", "reference", "base", "merged", "verdict"} <= set(example)
    assert "worse" in {example["verdict"] for example in recorded["examples"]}
