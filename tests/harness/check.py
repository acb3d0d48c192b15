"""Run a real lmms-eval on a tiny local task with the demo MLLM, through `ipmerge evaluate`.

    python tests/harness/check.py --python OTHER/bin/python

`make harness` makes the environment with lmms-eval first; it is never part of `make test`. The task
consists of drawings of the demo with their questions. The chat template of the demo writes the BOS
token, which the harness adds again and reports; without it in the template, as in those of the
published LLaVA models, the scores of both must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402

from ipmerge_core.cli import main  # noqa: E402
from ipmerge_core.tasks.demo import PERCEPTION_TASKS, problems  # noqa: E402

MLLM = ROOT / "assets" / "demo" / "mllm"
EACH = 3  # items per skill
BEGIN = "{{- bos_token }}\n"
TASK = """
task: ipmerge_demo
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 20
  do_sample: false
  temperature: 0
process_results: !function functions.compare
metric_list:
- metric: exact
  aggregation: mean
  higher_is_better: true
"""
FUNCTIONS = """
def pictures(doc):
    return [doc["image"].convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def compare(doc, results):
    return {"exact": float(results[0].strip().rstrip(".").lower() == doc["answer"].lower())}
"""


def write_task(folder: Path) -> None:
    """Write the data, the task and its functions, as a user of the harness does."""
    rows = [
        {"image": problem.image, "question": problem.question, "answer": problem.answer}
        for task in PERCEPTION_TASKS
        for problem in problems(task, EACH)
    ]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(folder / "test.parquet")
    (folder / "ipmerge_demo.yaml").write_text(TASK.format(file=folder / "test.parquet"))
    (folder / "functions.py").write_text(FUNCTIONS)


def output_of(*arguments: str) -> object:
    """Run a command with --json and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([*arguments, "--json"])
    assert code == 0, f"ipmerge {' '.join(arguments)} ended with exit code {code}"
    return json.loads(printed.getvalue())


def run() -> None:
    """Evaluate with the harness and with this package, and compare the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="Python of the environment with lmms-eval")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").mkdir()
        write_task(folder / "task")
        plain = Path(shutil.copytree(MLLM, folder / "plain"))
        template = (MLLM / "chat_template.jinja").read_text()
        assert template.startswith(BEGIN)
        (plain / "chat_template.jinja").write_text(template.removeprefix(BEGIN))
        common = ["evaluate", str(MLLM), str(plain), "--store", str(folder / "store")]
        theirs = output_of(
            *common, "--device", "cpu", "--harness", "lmms-eval",
            "--harness-python", options.python, "--harness-include", str(folder / "task"),
            "--tasks", "ipmerge_demo",
        )  # fmt: skip
        ours = output_of(
            *common, "--device", "cpu", "--tasks", "demo:perception", "--limit", str(EACH)
        )
    for model, result in zip((MLLM, plain), ours["results"], strict=True):
        (score,), whole = theirs[str(model)], result["parts"][0]
        values = {metric["name"]: metric["value"] for metric in score["metrics"]}
        print(
            f"{model.name}: lmms-eval {values['exact']:.3f} of {score['n']} samples, ipmerge "
            f"{whole['right']} of {whole['n']}. {score['note']}"
        )
        assert score["n"] == whole["n"]
        assert bool(score["note"]) == (model == MLLM)
        if not score["note"]:
            assert round(values["exact"] * score["n"]) == whole["right"], "the scores differ"


if __name__ == "__main__":
    run()
