"""Record answers of an MLLM and of two merges, which the app shows as examples.

    python assets/demo/record.py --lambda 4 --math-weight 1 [--recipe taught] [--seed 0]

In: trained models with their pack, and the training seed. Out: the file of records next to the pack
and the images in examples/. `record_examples` does it for any trio that answers these problems. To
choose the problems, the merges are written to disk and loaded again; the replies of the chosen ones
are recorded as by `ipmerge record`. Of the problems of a draw the first of each task is used, and
the first few that become wrong with a merge. Training drawings are excluded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

import torch  # noqa: E402
from draws import DRAWS, PER_TASK, evaluation_problems  # noqa: E402
from recipes import ELICITED, RECIPES  # noqa: E402

import ipmerge_core as ipm  # noqa: E402
from ipmerge_core.evaluation.answering import Answerer, Caches  # noqa: E402
from ipmerge_core.evaluation.batched_answers import LONGEST_REPLY  # noqa: E402
from ipmerge_core.evaluation.recording import Prompt, iter_recording  # noqa: E402
from ipmerge_core.inference.loading import load_model  # noqa: E402
from ipmerge_core.inference.sampling import GenerationSettings  # noqa: E402
from ipmerge_core.tasks.answers import is_right  # noqa: E402
from ipmerge_core.tasks.demo import MATH_TASKS, TASKS, Problem  # noqa: E402
from ipmerge_core.tasks.demo_items import item_of  # noqa: E402
from ipmerge_core.ui.chat.recorded import records_name  # noqa: E402

BATCH = 64
FIRST_SHOWN = ("mul", "area", "perimeter", "add", "sub", "sides", "shape", "dots")


class Recorded(NamedTuple):
    """A trio whose answers are recorded, and the two merges: one of the map, and one beside it."""

    pack: Path  # beside the folder of the MLLM
    records: str  # name of the file
    asked: list[Problem]  # of the draw "recorded"
    merged: Mapping[str, Any]  # arguments of IP-Merging, on all matrices
    math_weight: float  # of task arithmetic

    @property
    def folder(self) -> Path:
        """The folder of the trio."""
        return self.pack.parent


def record_examples(what: Recorded) -> None:
    """Merge, ask, choose, draw the pictures and write the records."""
    out, chosen = what.folder, plans(what)
    rows = pick(collect(what, chosen))
    (out / "examples").mkdir(exist_ok=True)
    for old in (out / "examples").glob("*.png"):  # only now, so that a stopped run loses nothing
        old.unlink()
    prompts = [draw(number, problem, out) for number, (problem, _) in enumerate(rows, 1)]
    path = out / what.records
    for step in iter_recording(
        chosen["merged"], prompts, path, settings=GenerationSettings(max_new_tokens=LONGEST_REPLY)
    ):
        print(f"{step.number} of {step.total}: {step.what}")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["trio"] = f"assets/{out.name}, problems of seed {DRAWS['recorded'][1]}, greedy decoding"
    content["task_arithmetic_plan"] = (
        f"Task arithmetic, math_weight {what.math_weight:g} (plan {chosen['task_arithmetic'].hash})"
    )
    for example, (_, replies) in zip(content["examples"], rows, strict=True):
        example["task_arithmetic"] = replies["task_arithmetic"]
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {path} with {len(rows)} examples.")


def plans(what: Recorded) -> dict[str, ipm.MergePlan]:
    """Return the two merges that are shown."""
    analysis = ipm.Analysis.load(what.pack)
    return {
        "merged": ipm.make_plan(analysis, similarity_threshold=0.0, **what.merged),
        "task_arithmetic": ipm.make_plan(
            analysis, method="task_arithmetic", math_weight=what.math_weight
        ),
    }


def collect(
    what: Recorded, chosen: dict[str, ipm.MergePlan]
) -> list[tuple[Problem, dict[str, str]]]:
    """Answer the problems with the MLLM and with every merge."""
    replies = {"base": ask(what.folder / "mllm", what.asked)}
    for name, plan in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            ipm.merge(plan, Path(folder) / "model")
            replies[name] = ask(Path(folder) / "model", what.asked)
    return [
        (problem, {name: given[i] for name, given in replies.items()})
        for i, problem in enumerate(what.asked)
    ]


def ask(folder: Path, asked: list[Problem]) -> list[str]:
    """Answer with the model in a folder."""
    loaded = load_model(folder)
    answerer = Answerer(loaded, LONGEST_REPLY, BATCH, Caches())
    items = {f"{number}": item_of(problem, f"{number}") for number, problem in enumerate(asked)}
    found = {reply.item: reply.text for part in answerer.answer(items) for reply in part.replies}
    loaded.processor.close()
    return [found[key] for key in items]


def verdict(problem: Problem, before: str, after: str) -> str:
    """Describe the effect of the merge on one answer."""
    was, now = is_right(problem, before), is_right(problem, after)
    if was == now:
        return "both right" if now else "both wrong"
    return "better" if now else "worse"


def pick(
    collected: list[tuple[Problem, dict[str, str]]], regressions: int = 2
) -> list[tuple[Problem, dict[str, str]]]:
    """Take the first problem of each shown task, then the first the merge makes worse."""
    first = [next(row for row in collected if row[0].task == task) for task in FIRST_SHOWN]
    worse = [
        row
        for row in collected
        if verdict(row[0], row[1]["base"], row[1]["merged"]) == "worse" and row not in first
    ]
    missed = [
        row
        for row in collected
        if row[0].task in MATH_TASKS and not is_right(row[0], row[1]["merged"])
    ]
    chosen = [*first, *worse[:regressions]]
    return [*chosen, *[row for row in missed if row not in chosen][:1]]


def draw(number: int, problem: Problem, out: Path) -> Prompt:
    """Write one picture and return its prompt."""
    picture = out / "examples" / f"{number:02d}-{problem.task}.png"
    problem.image.convert("L").save(picture, optimize=True)
    return Prompt(problem.question, picture, problem.answer, problem.is_math, problem.task)


def main() -> None:
    """Parse the arguments and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default=ELICITED.name)
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--lambda", dest="lambda_", type=float, required=True)
    parser.add_argument("--math-weight", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe, seed = RECIPES[arguments.recipe], arguments.seed
    asked = evaluation_problems(TASKS, PER_TASK["recorded"], "recorded", seed, recipe)
    records = "recorded.json" if recipe is ELICITED else records_name(recipe.pack.name)
    merged = {"gamma_norm": "max", "lambda_": arguments.lambda_}
    weight = arguments.math_weight
    record_examples(Recorded(recipe.folder / recipe.pack, records, asked, merged, weight))


if __name__ == "__main__":
    main()
