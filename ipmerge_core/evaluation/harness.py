"""Run an installed evaluation harness on a model folder, and write configurations for another.

In: a model or adapter folder, task names of the harness, and the Python of the environment that
lmms-eval is installed in. Out: its scores per task and metric, with the answers that its judge did
not give counted as missing. For VLMEvalKit, a configuration file. Neither is a dependency: the
harness is another program, with its own versions of everything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ipmerge_core.errors import ModelLoadError, RunError
from ipmerge_core.runtime.input_files import MEGABYTE, FileKind, InvalidContentError, parse_json

LMMS_EVAL, VLMEVALKIT = "lmms-eval", "vlmevalkit"
HARNESSES = (LMMS_EVAL, VLMEVALKIT)
_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY", "AZURE_OPENAI_API_KEY")
# Tasks of lmms-eval that a language model judges or extracts, by the start of their names.
_JUDGED = (
    "mathvista", "mathverse", "mathvision", "mia_bench", "wildvision", "mmmu_val_reasoning",
    "mmvet", "llava_in_the_wild", "llava_bench", "hallusion_bench", "mmbench", "dynamath",
    "olympiadbench", "live_bench",
)  # fmt: skip
# Names of lmms-eval's models for types of transformers.
_LMMS_MODELS = {
    "llava": "llava_hf", "llava_next": "llava_hf", "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl",
    "idefics2": "idefics2", "internvl": "internvl_hf", "gemma3": "gemma3",
}  # fmt: skip
# Classes of VLMEvalKit for types of transformers, and of its data sets.
_KIT_MODELS = {
    "llava_next": "LLaVA_Next", "llava_onevision": "LLaVA_OneVision_HF", "qwen2_vl": "Qwen2VLChat",
    "qwen2_5_vl": "Qwen2VLChat", "qwen3_vl": "Qwen3VLChat", "idefics2": "IDEFICS2",
}  # fmt: skip
_KIT_DATA = {
    "MathVista_MINI": "MathVista", "MathVerse_MINI": "MathVerse",
    "MathVerse_MINI_Vision_Only": "MathVerse", "MathVision": "MathVision",
    "MathVision_MINI": "MathVision", "MMMU_DEV_VAL": "MMMUDataset", "MMStar": "ImageMCQDataset",
    "CMMMU_VAL": "CMMMU", "MMBench_DEV_EN": "ImageMCQDataset",
}  # fmt: skip
_RESULTS = FileKind(
    "a result of lmms-eval", "Check the version of lmms-eval.", RunError, largest=512 * MEGABYTE,
    foreign=True,
)  # fmt: skip
_LONGEST_LINE = 64 * MEGABYTE
_TAIL = 3000  # characters of the output that an error may need
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TASK = re.compile(r"[A-Za-z0-9_.-]{1,200}")


@dataclass(frozen=True)
class Metric:
    """One metric of a task, as the harness reports it."""

    name: str
    value: float
    error: float | None


@dataclass(frozen=True)
class HarnessScore:
    """The metrics of one task; `missing` counts samples without an answer of the judge.

    `note` names what distinguishes its prompts from those of this package.
    """

    task: str
    metrics: tuple[Metric, ...]
    n: int
    missing: int
    note: str = ""


@dataclass(frozen=True)
class HarnessRun:
    """What is run: a model, tasks and limits, and where the results are written.

    Attributes:
        model: a folder of a model or an adapter; an adapter is folded into its base first.
        tasks: names of tasks of the harness.
        python: the interpreter of the environment with the harness.
        output: the folder of its results.
        name: the harness's name of the model class; by default that of the model type.
        base: the base of an adapter.
        limit: items per task.
        batch_size: of the harness.
        device: a torch device name.
        include: a folder with further tasks.
    """

    model: Path
    tasks: tuple[str, ...]
    python: str
    output: Path
    name: str = ""
    base: str = ""
    limit: int | None = None
    batch_size: int = 1
    device: str = "cpu"
    include: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)

    def check(self) -> None:
        """Check what would fail hours later: names, the interpreter, keys of judges.

        Raises: RunError.
        """
        odd = next((task for task in self.tasks if not _TASK.fullmatch(task)), None)
        if odd is not None or not self.tasks:
            raise RunError(
                f"'{(odd or '')[:80]}' is not the name of a task of {LMMS_EVAL}. Expected names "
                f"such as mmmu_val."
            )
        if shutil.which(self.python) is None:
            raise RunError(
                f"The Python of the harness, '{self.python[:200]}', does not exist. Install "
                f"{LMMS_EVAL} in an environment of its own and pass its interpreter with "
                f"--harness-python."
            )
        judged = judged_tasks(self.tasks)
        if judged and not any(self.environment.get(key) for key in _KEYS):
            raise RunError(
                f"A language model judges {', '.join(judged)}, and none of {', '.join(_KEYS)} is "
                f"set, so that its answers would be missing. Set a key, or choose tasks that are "
                f"judged by rules, such as mmmu_val."
            )

    def command(self, model_type: str) -> list[str]:
        """Return the command line. Raises: RunError if the model class is not known."""
        name = self.name or _LMMS_MODELS.get(model_type)
        if not name:
            raise RunError(
                f"{LMMS_EVAL} has no known model class for the type '{model_type[:80]}'. Specify "
                f"its name with --harness-model."
            )
        arguments = {"pretrained": str(self.model), "device_map": self.device}
        if "," in str(self.model):
            raise RunError(
                f"The path '{str(self.model)[:200]}' contains a comma, which separates the model "
                f"arguments of {LMMS_EVAL}. Rename the folder."
            )
        command = [
            self.python, "-m", "lmms_eval",
            "--model", name,
            "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()),
            "--tasks", ",".join(self.tasks),
            "--batch_size", str(self.batch_size),
            "--device", self.device,
            "--output_path", str(self.output),
            "--log_samples",
        ]  # fmt: skip
        command += ["--limit", str(self.limit)] if self.limit is not None else []
        return command + (["--include_path", self.include] if self.include else [])


def judged_tasks(tasks: Sequence[str]) -> list[str]:
    """Return the tasks that a language model judges.

    >>> judged_tasks(["mmmu_val", "mia_bench", "mathvista_testmini_cot"])
    ['mia_bench', 'mathvista_testmini_cot']
    """
    return [task for task in tasks if task.startswith(_JUDGED)]


def run_lmms_eval(run: HarnessRun) -> list[HarnessScore]:
    """Run lmms-eval and return its scores; its own progress goes to stderr.

    Raises: RunError if it cannot be started, fails, or writes no results.
    """
    from ipmerge_core.models.adapted import AdaptedCheckpoint
    from ipmerge_core.models.folding import fold
    from ipmerge_core.models.opening import open_model

    run.check()
    model = open_model(run.model, base=run.base or None)
    run.output.mkdir(parents=True, exist_ok=True)
    if isinstance(model, AdaptedCheckpoint):
        whole = fold(model, run.output / f"folded-{model.fingerprint[:16]}")
        run = replace(run, model=whole)
    command = run.command(str(model.config.get("model_type")))
    own = {key: value for key, value in run.environment.items() if key != "PYTHONPATH"}
    with (run.output / "lmms-eval.log").open("wb") as log:
        done = subprocess.run(  # noqa: S603 (the interpreter that the user has named)
            command, env=own, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RunError(
            f"{LMMS_EVAL} ended with exit code {done.returncode}: {_reason(run.output)} Its output "
            f"is in '{run.output / 'lmms-eval.log'}'."
        )
    found = list(read_results(run.output))
    if not found:
        raise RunError(
            f"{LMMS_EVAL} wrote no results to '{run.output}': {_reason(run.output)} Its output is "
            f"in '{run.output / 'lmms-eval.log'}'."
        )
    note = _prompt_note(run.model)
    return [replace(score, note=note) for score in found]


def _prompt_note(model: Path) -> str:
    """Describe a BOS token that the harness adds twice; empty if it does not.

    Its classes render the chat template and encode the text, where a tokenizer adds the token.
    """
    from ipmerge_core.inference.processor_process import RemoteProcessor

    processor = RemoteProcessor(model, takes_images=True)
    try:
        twice = processor.begins_twice()
    except ModelLoadError:  # a processor that this environment cannot load
        return ""
    finally:
        processor.close()
    if not twice:
        return ""
    return (
        f"The chat template of '{model.name}' writes the BOS token, which its tokenizer adds again "
        f"when {LMMS_EVAL} encodes the rendered text: these prompts begin with two, those of this "
        f"package with one. Compare the score with others of {LMMS_EVAL} only."
    )


def _reason(output: Path) -> str:
    """Return the last error in the harness's output, or its last line."""
    with (output / "lmms-eval.log").open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - _TAIL))
        lines = log.read().decode("utf-8", "replace").split("\n")
    said = [_COLOUR.sub("", line).strip() for line in lines]
    errors = [line for line in said if "error" in line.lower()]
    last = next(iter(errors[-1:] or [line for line in said[::-1] if line]), "no output")
    return last[-300:].rstrip(".") + "."


def read_results(output: Path) -> Iterator[HarnessScore]:
    """Yield the scores in the newest results file of an output folder of lmms-eval.

    Raises: RunError if it is damaged.
    """
    files = sorted(output.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return
    content = _RESULTS.content(files[-1])
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise _RESULTS.refusal(files[-1], "it has no results")
    for task, values in results.items():
        if isinstance(values, dict):
            n, missing = _samples(output, str(task))
            yield HarnessScore(str(task), tuple(_metrics(values)), n, missing)


def _metrics(values: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the numbers among the results of a task; keys are "metric,filter"."""
    for key, value in values.items():
        name, comma, rest = key.partition(",")
        if not comma or name.endswith("_stderr") or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            error = values.get(f"{name}_stderr,{rest}")
            known = isinstance(error, int | float)  # otherwise "N/A"
            yield Metric(name, float(value), error if known else None)


def _samples(output: Path, task: str) -> tuple[int, int]:
    """Count the samples of a task, and those whose judge gave no answer.

    Judges of lmms-eval return an empty text when a request has failed, which it counts as 0.
    """
    files = sorted(output.rglob(f"*_samples_{task}.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        return 0, 0
    n = missing = 0
    with files[-1].open("rb") as file:
        while line := file.readline(_LONGEST_LINE + 1):
            try:
                sample = parse_json(line, _LONGEST_LINE, foreign=True)
            except InvalidContentError:
                continue
            n += 1
            missing += isinstance(sample, dict) and bool(judged_tasks([task])) and _lacks(sample)
    return n, missing


_JUDGEMENTS = ("extraction", "judgement", "judge", "review", "gpt_eval", "eval_answer", "content")


def _lacks(sample: Mapping[str, Any]) -> bool:
    """Whether a field of a sample that holds the judge's answer is empty."""
    for value in sample.values():
        if isinstance(value, dict):
            found = [value[name] for name in _JUDGEMENTS if name in value]
            if any(each is None or each == "" for each in found):
                return True
    return False


def kit_config(
    models: Sequence[tuple[str, Path, str]], tasks: Sequence[str], model_class: str = ""
) -> dict[str, Any]:
    """Return a configuration of VLMEvalKit for `run.py --config`.

    Args:
        models: names, folders and model types.
        tasks: names of its data sets.
        model_class: the class of its models; by default that of the model type.

    Raises: RunError for a data set or a model type without a known class.
    """
    unknown = [task for task in tasks if task not in _KIT_DATA]
    if unknown or not tasks:
        raise RunError(
            f"No class of VLMEvalKit is known for the data set '{''.join(unknown[:1])[:80]}'. "
            f"Known: {', '.join(_KIT_DATA)}."
        )
    entries = {}
    for name, folder, model_type in models:
        found = model_class or _KIT_MODELS.get(model_type)
        if not found:
            raise RunError(
                f"No class of VLMEvalKit is known for the type '{model_type[:80]}' of '{name}'. "
                f"Specify it with --harness-model."
            )
        entries[name] = {"class": found, "model_path": str(folder)}
    data = {task: {"class": _KIT_DATA[task], "dataset": task} for task in tasks}
    return {"model": entries, "data": data}


def score_lines(scores: Sequence[HarnessScore]) -> Iterator[str]:
    """Yield the scores as lines."""
    for score in scores:
        for metric in score.metrics:
            error = f" +- {metric.error:.4g}" if metric.error is not None else ""
            yield f"{score.task}  {metric.name}  {metric.value:.4g}{error}  n={score.n}"
        if score.missing:
            yield (
                f"{score.task}: the judge gave no answer for {score.missing} of {score.n} samples. "
                f"The harness counts them as 0, so that this score is too low."
            )
    yield from dict.fromkeys(score.note for score in scores if score.note)


def as_values(scores: Sequence[HarnessScore]) -> list[dict[str, Any]]:
    """Return the scores as JSON values."""
    found: list[dict[str, Any]] = json.loads(json.dumps([asdict(score) for score in scores]))
    return found
