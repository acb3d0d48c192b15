"""Evaluations of the demo MLLM: resumed, split, shared and damaged ones give the same report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, text_weights, write_model

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.cli.evaluating import report_lines
from ipmerge_core.errors import CheckpointError, ModelLoadError, RunCancelled, RunError
from ipmerge_core.evaluation.answering import Caches, PromptCache
from ipmerge_core.evaluation.batched_answers import answer_all
from ipmerge_core.evaluation.evaluate import EvaluationSettings, EvaluationStep, iter_evaluation
from ipmerge_core.evaluation.replies import Reply, ReplyStore
from ipmerge_core.evaluation.report import Report
from ipmerge_core.evaluation.subjects import Subject, subject_of_folder, subject_of_model
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.planning.relocation import relocate
from ipmerge_core.tasks.demo import TASKS, problems
from ipmerge_core.tasks.items import Draw
from ipmerge_core.tasks.registry import find_task, find_tasks

ROOT = Path(__file__).parents[1]
MLLM = ROOT / "assets" / "demo" / "mllm"
FEW = EvaluationSettings(limit=2, batch_size=8)
ALL = replace(FEW, limit=None)
ODD = "\x00 \u2028 \U0001f600"  # a control character, a separator of lines, an emoji


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(MLLM)


@pytest.fixture
def store(tmp_path: Path) -> ReplyStore:
    return ReplyStore(tmp_path / "store")


def run(
    generator: Generator[EvaluationStep, None, Report | None],
) -> tuple[list[EvaluationStep], Report]:
    steps: list[EvaluationStep] = []
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as end:
            return steps, end.value


def without_times(report: Report) -> dict[str, Any]:
    """A report without what differs between two equal runs."""
    plain = json.loads(json.dumps(report.to_dict()))
    plain["created"] = ""
    plain["settings"] = {}
    for result in plain["results"]:
        result["length"]["seconds"] = 0
    return plain


def refusing(key: str) -> Subject:
    """A model whose loading is a failure of the test."""

    def load(_: str) -> contextlib.AbstractContextManager[LoadedModel]:
        raise AssertionError("the model was loaded")

    return Subject("mllm", key, load)


# --- replies -----------------------------------------------------------------------------------


def test_replies_equal_those_of_generate(loaded: LoadedModel, store: ReplyStore) -> None:
    """Batches, rows that leave them and kept features change no reply."""
    tasks = [find_task("demo")]
    _, report = run(iter_evaluation([subject_of_model("mllm", loaded, "k")], tasks, FEW, store))
    processor = ModelProcessor(MLLM, takes_images=True)
    items = [problem for task in TASKS for problem in problems(task, 2)]
    wanted = []
    for problem in items:
        inputs = processor.processor(text=problem.prompt, images=problem.image, return_tensors="pt")
        with torch.inference_mode():
            ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=20)
        new = ids[0, inputs["input_ids"].shape[1] :]
        wanted.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert [reply.text for reply in report.replies["mllm"]["demo"]] == wanted
    assert answer_all(loaded.model, processor.processor, items) == wanted
    assert report.results[0].facts["generation"] == "in batches"


def test_caches_are_shared_and_change_no_reply(loaded: LoadedModel, tmp_path: Path) -> None:
    caches, reports = Caches(), []
    for number in range(2):
        store = ReplyStore(tmp_path / str(number))
        subject = subject_of_model("mllm", loaded, "k")
        reports.append(
            run(iter_evaluation([subject], [find_task("demo")], FEW, store, caches=caches))
        )
    assert without_times(reports[0][1]) == without_times(reports[1][1])
    assert caches.features.computed == 18
    assert caches.features.found >= 18
    assert caches.prompts.nbytes > 0


def test_a_prompt_cache_stays_within_its_size() -> None:
    cache = PromptCache(100)
    for number in range(5):
        cache.put(("p", str(number)), {"input_ids": torch.zeros(10, dtype=torch.int32)})
    assert cache.nbytes == 80
    assert cache.get(("p", "0")) is None
    assert cache.get(("p", "4")) is not None
    cache.put(("p", "large"), {"input_ids": torch.zeros(1000)})
    assert cache.get(("p", "large")) is None


def test_a_batch_that_does_not_fit_is_halved(
    loaded: LoadedModel, store: ReplyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ipmerge_core.evaluation.answering as answering

    generate, sizes = answering.generate_rows, []

    def scarce(model: Any, inputs: Any, most: int) -> list[list[int]]:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("out of memory")
        return generate(model, inputs, most)

    monkeypatch.setattr(answering, "generate_rows", scarce)
    _, report = run(
        iter_evaluation([subject_of_model("mllm", loaded, "k")], [find_task("demo")], FEW, store)
    )
    assert report.results[0].length.replies == 18
    assert sizes[:2] == [8, 4]
    assert max(sizes[2:]) == 2


def test_a_model_whose_scores_batching_changes_answers_one_at_a_time(
    loaded: LoadedModel, store: ReplyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipmerge_core.evaluation.answering.batches_exactly", lambda *_: False)
    tasks = [find_task("demo:shape")]
    _, report = run(iter_evaluation([subject_of_model("mllm", loaded, "k")], tasks, FEW, store))
    assert report.results[0].facts["generation"] == "one at a time"
    assert report.results[0].length.replies == 2


# --- the store ---------------------------------------------------------------------------------


def test_nothing_is_answered_twice(loaded: LoadedModel, store: ReplyStore) -> None:
    subject = subject_of_model("mllm", loaded, "k")
    steps, first = run(iter_evaluation([subject], find_tasks(["demo:math"]), FEW, store))
    assert steps[-1].done == steps[-1].total == 18
    _, again = run(iter_evaluation([refusing("k")], find_tasks(["demo:math"]), FEW, store))
    assert without_times(again) == without_times(first)
    _, whole = run(iter_evaluation([refusing("k")], [find_task("demo")], FEW, store))
    assert whole.results[0].part("math").n == 10  # a part and the whole share their replies
    more = replace(FEW, limit=3)
    answered = [
        step for step in run(iter_evaluation([subject], [find_task("demo")], more, store))[0]
        if step.action == "answered"
    ]  # fmt: skip
    assert answered[-1].done - 18 == 9  # the larger limit contains the smaller one


@pytest.mark.parametrize("change", [{"max_new_tokens": 3}, {"seed": 1}, {"resume": False}], ids=str)
def test_other_settings_are_answered_anew(
    change: dict[str, Any], loaded: LoadedModel, store: ReplyStore
) -> None:
    tasks, subject = [find_task("demo:shape")], subject_of_model("mllm", loaded, "k")
    run(iter_evaluation([subject], tasks, FEW, store))
    other = replace(FEW, **change)
    with pytest.raises(AssertionError, match="was loaded"):
        run(iter_evaluation([refusing("k")], tasks, other, store))
    with pytest.raises(AssertionError, match="was loaded"):
        run(iter_evaluation([refusing("another")], tasks, FEW, store))
    run(iter_evaluation([subject], tasks, other, store))


def test_a_closed_run_keeps_what_it_has_answered(loaded: LoadedModel, store: ReplyStore) -> None:
    subject = subject_of_model("mllm", loaded, "k")
    generator = iter_evaluation([subject], [find_task("demo")], FEW, store)
    step = next(step for step in generator if step.action == "answered")
    generator.close()
    steps, report = run(iter_evaluation([subject], [find_task("demo")], FEW, store))
    assert steps[0] == EvaluationStep("resumed", "mllm", "", step.done, 18)
    assert report.results[0].length.replies == 18


def test_an_event_cancels(loaded: LoadedModel, store: ReplyStore) -> None:
    stop = threading.Event()
    subject = subject_of_model("mllm", loaded, "k")
    generator = iter_evaluation([subject], [find_task("demo")], FEW, store, stops=[stop])
    assert next(generator).action == "resumed"
    stop.set()
    with pytest.raises(RunCancelled, match=r"replies so far are kept|before the model answered"):
        run(generator)


def test_a_damaged_journal_loses_its_damaged_lines_only(store: ReplyStore) -> None:
    journal = store.journal("model", "demo", {"max_new_tokens": 3})
    assert journal.read() == {}
    journal.append([Reply("a", "1", 2, cut=False), Reply("b", "2", 2, cut=True)])
    with journal.path.open("ab") as file:
        file.write(b'{"item": "c", "text"')  # as a kill leaves it
    journal.append([Reply("d", ODD, 1, cut=False)])
    with journal.path.open("ab") as file:
        file.write(b'{"item": "e", "text": 5, "tokens": 1, "cut": false}\n\xff\xfe\n[]\n')
    found = journal.read()
    assert set(found) == {"a", "b", "d"}
    assert found["d"].text == ODD
    assert found["b"].cut
    assert store.journal("other", "demo", {"max_new_tokens": 3}).read() == {}


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal = ReplyStore(tmp_path / "file").journal("model", "demo", {})
    with pytest.raises(RunError, match="Cannot (write to|read the stored replies)"):
        journal.append([Reply("a", "1", 2, cut=False)])


KILLED = """
import os, signal, sys
from ipmerge_core.evaluation.evaluate import EvaluationSettings, iter_evaluation
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.subjects import subject_of_folder
from ipmerge_core.tasks.items import Draw
from ipmerge_core.tasks.registry import find_tasks
settings = EvaluationSettings(limit=2, batch_size=8)
subjects = [subject_of_folder(sys.argv[1])]
for step in iter_evaluation(subjects, find_tasks(["demo"]), settings, ReplyStore(sys.argv[2])):
    if step.action == "answered":
        print(step.done, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_no_item_is_repeated(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(MLLM), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    known = int(done.stdout)
    steps, report = run(
        iter_evaluation([subject_of_folder(MLLM)], [find_task("demo")], FEW, ReplyStore(tmp_path))
    )
    assert steps[0].done == known
    lines = [
        line for path in tmp_path.rglob("*.jsonl") for line in path.read_text("utf-8").splitlines()
    ]
    keys = [json.loads(line)["item"] for line in lines]
    assert len(keys) == len(set(keys)) == 18
    assert report.results[0].length.replies == 18


# --- subjects ----------------------------------------------------------------------------------


def test_the_key_of_a_model_is_its_content(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a", text_weights(), TEXT_CONFIG)
    same = write_model(tmp_path / "b", text_weights(), TEXT_CONFIG)
    (same / "README.md").write_text("a card")
    other = write_model(tmp_path / "c", text_weights(1), TEXT_CONFIG)
    tokenizer = write_model(tmp_path / "d", text_weights(), TEXT_CONFIG)
    (tokenizer / "tokenizer.json").write_text('{"a": 1}')
    keys = [subject_of_folder(path).key for path in (first, same, other, tokenizer)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        subject_of_folder(tmp_path / "none")


def test_a_text_model_is_refused_before_it_answers_pictures(store: ReplyStore) -> None:
    subject = subject_of_folder(ROOT / "assets" / "demo" / "math")
    with pytest.raises(ModelLoadError, match="is a text model, and the task has pictures"):
        run(iter_evaluation([subject], [find_task("demo:shape")], FEW, store))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["demo"]), "no model to evaluate"),
        ((["k"], []), "no task to evaluate"),
        ((["k", "k"], ["demo"]), "Two models are named 'mllm'"),
        ((["k"], ["demo", "demo"]), "Two tasks are named 'demo'"),
    ],
)
def test_nothing_and_duplicates_are_refused(
    arguments: tuple[list[str], list[str]], message: str, store: ReplyStore
) -> None:
    subjects = [refusing(key) for key in arguments[0]]
    with pytest.raises(RunError, match=message):
        run(iter_evaluation(subjects, [find_task(name) for name in arguments[1]], FEW, store))


@pytest.mark.parametrize(
    "values", [{"batch_size": 0}, {"batch_size": 10**9}, {"max_new_tokens": 0}, {"limit": 0},
               {"seed": -1}, {"max_new_tokens": 10**9}], ids=str
)  # fmt: skip
def test_settings_out_of_range_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(RunError, match="expected an integer"):
        EvaluationSettings(**values)


def test_an_adapter_answers_as_the_merged_folder(tmp_path: Path, store: ReplyStore) -> None:
    demo = ROOT / "assets" / "demo"
    pack = ipm.Analysis.load(demo / "pack.json.gz")
    places = {"mllm": demo / "mllm", "math": [demo / "math"], "base": demo / "base"}
    pack = replace(pack, sources=relocate(pack.sources, **places))
    plan = ipm.make_plan(pack, similarity="max", similarity_threshold=0.3, lambda_=4.0)
    ipm.merge(plan, tmp_path / "merged")
    ipm.export_adapter(plan, tmp_path / "adapter", tolerance=1e-4, max_rank=512)
    subjects = [
        subject_of_folder(tmp_path / "merged"),
        subject_of_folder(tmp_path / "adapter", base=demo / "mllm"),
    ]
    assert subjects[0].details["plan"] == plan.hash
    assert len({subject.key for subject in subjects}) == 2
    _, report = run(iter_evaluation(subjects, [find_task("demo")], FEW, store))
    texts = [[r.text for r in report.replies[s.name]["demo"]] for s in subjects]
    assert texts[0] == texts[1]
    assert all(comparison.test.p_value == 1 for comparison in report.comparisons)


# --- bad items ---------------------------------------------------------------------------------


@contextlib.contextmanager
def silent(loaded: LoadedModel) -> Iterator[None]:
    """A model that ends its reply at once."""
    head = loaded.model.get_output_embeddings()
    end = loaded.model.generation_config.eos_token_id[0]

    def answer_nothing(_module: Any, _inputs: Any, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros_like(scores)
        scores[..., end] = 1
        return scores

    hook = head.register_forward_hook(answer_nothing)
    try:
        yield
    finally:
        hook.remove()


def test_a_model_that_answers_nothing_is_counted(loaded: LoadedModel, store: ReplyStore) -> None:
    with silent(loaded):
        subject = subject_of_model("mllm", loaded, "silent")
        _, report = run(iter_evaluation([subject], [find_task("demo")], FEW, store))
    (result,) = report.results
    assert (result.length.empty, result.length.without_answer) == (18, 18)
    assert (result.part().right, result.part().n) == (0, 18)


def test_bad_items_are_counted_and_the_rest_is_evaluated(
    loaded: LoadedModel, store: ReplyStore, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    find_task("demo:shape").load(Draw(1)).items[0].pictures[0].source().save(tmp_path / "shape.png")
    lines = [
        {"question": "Name the shape.", "answer": "circle", "image": "shape.png"},
        {"question": "Name the shape.", "answer": "circle", "image": "broken.png"},
        {"question": "Name the shape.", "answer": "circle", "image": "none.png"},
        {"question": "Name the shape.", "image": "shape.png"},
        {"question": "x" * 200_000, "answer": "circle", "image": "shape.png"},
        {"question": "Nenne die Form.", "answer": ["Kreis", "Raute"], "image": "shape.png"},
        {"question": "Name the shape.", "answer": "square", "image": "shape.png"},
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, lines)))
    subject = subject_of_model("mllm", loaded, "k")
    _, report = run(iter_evaluation([subject], [find_task(f"jsonl:{task}")], ALL, store))
    facts, (result,) = report.tasks[0], report.results
    assert dict(facts.faults)["line 3"].startswith("Cannot read the picture")
    assert "the pictures of 'line 1'" in dict(facts.faults)["line 7"]
    assert dict(facts.faults)["line 4"] == "There is no reference answer."
    names = [item["id"] for item in facts.items]
    by_id = dict(zip(names, report.replies["mllm"][facts.name], strict=True))
    assert by_id["line 2"].outcome == by_id["line 5"].outcome == "missing"
    assert "not a readable image" in by_id["line 2"].reason
    assert "maximum" in by_id["line 5"].reason
    assert by_id["line 1"].counts
    assert by_id["line 6"].counts
    assert (result.part().n, result.part().missing) == (2, 2)
    path = tmp_path / "report.json"
    report.save(path)
    assert Report.load(path) == report
    shown = list(report_lines(report))
    assert any(line.startswith("  Item line 2 is not counted: 'broken.png' is") for line in shown)
    assert sum("is not counted" in line for line in shown) == result.part().missing


# --- the command -------------------------------------------------------------------------------


def evaluated(store: Path, *words: str) -> list[str]:
    return ["evaluate", "--store", str(store), "--quiet", "--limit", "2", str(MLLM), *words]


def test_the_command_prints_the_guard_with_a_math_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    assert main([*evaluated(tmp_path, "--tasks", "demo:math"), "-o", str(report)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("Demo, math") < shown.index("Demo, perception")
    for words in ("Small sample: 10 items", "Not the official number", "limit 20", "(pil)"):
        assert words in shown
    assert Report.load(report).tasks[1].name == "demo:perception"
    assert main([*evaluated(tmp_path, "--tasks", "demo:math", "--no-guard")]) == 0
    alone = capsys.readouterr().out
    assert "Demo, perception" not in alone
    assert "The perception guard 'demo:perception' was left out" in alone
    assert main([*evaluated(tmp_path, "--tasks", "demo:math", "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "ipmerge-evaluation"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "cooking"], "Unknown task 'cooking'"),
        (["--tasks", "demo", "--limit", "0"], "limit is 0"),
        (["--tasks", "demo", "--batch-size", "0"], "batch size is 0"),
        (["--tasks", "demo", "-o", "/nowhere/r.json"], "does not exist"),
        ([str(MLLM), "--tasks", "demo"], "given twice"),
        (["/nowhere", "--tasks", "demo"], "nowhere"),
        (["--tasks", "demo", "--no-guard"], "--no-guard has no effect"),
        (["--tasks", "demo", "--base", str(MLLM)], "--base has no effect"),
    ],
)
def test_a_bad_command_is_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*evaluated(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    reports = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        report = tmp_path / f"{len(reports)}.json"
        words = [*evaluated(tmp_path / f"store{len(reports)}", "--tasks", "demo:math")]
        command = [sys.executable, *launcher, "-m", "ipmerge_core", *words, "-o", str(report)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        reports.append(Report.load(report))
        assert done.stdout.count("Demo, math") == 1
    assert without_times(reports[0]) == without_times(reports[1])
    assert [report.settings["processes"] for report in reports] == [1, 2]


def test_reports_of_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text, message in (
        ("{}", "its format is not ipmerge-evaluation"),
        ('{"format": "ipmerge-evaluation", "version": 99}', "its version is 99"),
        ('{"format": "ipmerge-evaluation", "version": 1}', "is not an evaluation report"),
        ("[", "is not an evaluation report"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=message):
            Report.load(path)
