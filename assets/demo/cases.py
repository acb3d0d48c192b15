"""Train the cases of the study: seeds of both trios, experts that are hard to merge, two MLLMs.

    python assets/demo/cases.py [--out runs/cases] [--only elicited-0] [--list] [--shorten 1]

In: the list of cases below. Out: in the folder, the models of every trio and seed, and a pack per
case, which the study reads. Each model takes seconds (an expert) to minutes (a base, an MLLM) on
one thread and is trained once: what is there and was made by the same recipe is kept. Models of
seed 0 that the repository contains are copied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

import torch  # noqa: E402
from case_texts import (  # noqa: E402
    second_style_document,
    short_document,
    shuffled_document,
    style_document,
    words_document,
)
from draws import MLLM_STEPS, Draw, evaluation_problems  # noqa: E402
from models import new_processor, new_tokenizer, save_language_model, save_mllm  # noqa: E402
from packs import is_pack_of  # noqa: E402
from recipes import ELICITED, RECIPES, MathStage, Recipe  # noqa: E402
from texts import base_document, math_document  # noqa: E402
from train import load_base, stored, train_base, train_math, train_mllm  # noqa: E402

from ipmerge_core.analysis.analyse import analyse  # noqa: E402
from ipmerge_core.models.pairing import open_pair  # noqa: E402
from ipmerge_core.runtime.atomic import atomic_path, write_whole  # noqa: E402
from ipmerge_core.tasks.demo import MATH_TASKS, Problem, Task  # noqa: E402

OUT = HERE.parents[1] / "runs" / "cases"
SEEDS = (0, 1, 2)
FEW: tuple[Task, ...] = ("sides", "shape")  # what an MLLM of few picture tasks learns to read
_OWN = ELICITED.math[0]
EXPERTS: dict[str, tuple[MathStage, ...]] = {
    "over": (MathStage(words_document, 200, 3e-4, 28, 0),),
    "style": (MathStage(style_document, 120, 1.5e-4, 18, 10),),
    "style_b": (MathStage(second_style_document, 150, 2e-4, 18, 10),),
    "irr": (_OWN, MathStage(shuffled_document, 200, 3e-4, 28, 0)),
    # The projections change a little and to no purpose, since an expert without any change of its
    # matrices is refused.
    "norms": (
        MathStage(math_document, 200, 3e-3, 18, 10, trains="norms"),
        MathStage(base_document, 10, 1e-5, 18, 0),
    ),
    "short": (MathStage(short_document, 50, 5e-5, 18, 10),),
}
Kind = Literal["many", "few"]


class Case(NamedTuple):
    """A pair of the study: the trio and its training seed, its experts, and the kind of MLLM."""

    trio: str
    seed: int
    experts: tuple[str, ...] = ("math",)
    kind: Kind = "many"

    @property
    def name(self) -> str:
        """Name of the case and of its pack, such as `elicited-0-style`."""
        ending = "-few" if self.kind == "few" else ""
        return f"{self.trio}-{self.seed}-{'+'.join(self.experts)}{ending}"

    @property
    def recipe(self) -> Recipe:
        """The recipe of the trio, with what this kind of MLLM learns to read."""
        own = RECIPES[self.trio]
        return own._replace(perception=FEW) if self.kind == "few" else own

    @property
    def facts(self) -> dict[str, object]:
        """What distinguishes the case, in JSON values."""
        return {**self._asdict(), "experts": list(self.experts)}

    def problems(self, count: int, draw: Draw) -> list[Problem]:
        """Draw problems of each task: mathematics, and what this MLLM has learned to read."""
        tasks = (*MATH_TASKS, *self.recipe.perception)
        return evaluation_problems(tasks, count, draw, self.seed, self.recipe)

    @property
    def folder(self) -> str:
        """Folder of the models, shared by the cases of a trio and seed."""
        return f"{self.trio}-{self.seed}"

    @property
    def mllm(self) -> str:
        """Folder of the MLLM inside it."""
        return "mllm-few" if self.kind == "few" else "mllm"

    def pack(self, out: Path) -> Path:
        """Path of the pack."""
        return out / f"{self.name}.pack.json.gz"


def all_cases() -> Iterator[Case]:
    """Yield every case of the study."""
    for seed in SEEDS:
        yield Case("elicited", seed)
        yield Case("taught", seed)
        for expert in ("over", "style", "style_b", "irr", "norms"):
            yield Case("elicited", seed, (expert,))
        yield Case("elicited", seed, ("math", "short"))
        for expert in ("math", "style"):
            yield Case("elicited", seed, (expert,), "few")
    yield Case("larger", 0)


CASES = tuple(all_cases())


class Trainer:
    """Trains the models that cases need, each once.

    Args:
        out: the folder of all cases.
        shorten: divides all numbers of steps, for tests.
    """

    def __init__(self, out: Path, shorten: int = 1) -> None:
        self.out, self.shorten = out, shorten
        self.tokenizer = new_tokenizer()

    def make(self, case: Case) -> Iterator[str]:
        """Train what a case needs and analyse the pair, yielding a line after each part."""
        for name in ("base", case.mllm, *case.experts):
            started = time.process_time()
            if self._model(case, name):
                yield f"{case.folder}/{name}: {time.process_time() - started:.0f} CPU s"
        pack, folder = case.pack(self.out), self.out / case.folder
        experts = [folder / name for name in case.experts]
        if not is_pack_of(pack, folder / case.mllm, folder / "base", *experts):
            pair = open_pair(folder / case.mllm, experts, folder / "base")
            replace(analyse(pair), name=case.name).save(pack)
            yield f"{pack.name}"

    def _model(self, case: Case, name: str) -> bool:
        """Train or copy a model unless it is there; returns whether it was not."""
        target, note = self.out / case.folder / name, self.out / case.folder / f"{name}.json"
        definition = json.dumps(self._definition(case, name), indent=1)
        if target.is_dir() and note.is_file() and note.read_text() == definition:
            return False
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shipped = RECIPES[case.trio].folder / name
        with atomic_path(target) as folder:
            if case.seed == 0 and self.shorten == 1 and shipped.is_dir():
                shutil.copytree(shipped, folder)
            else:
                self._train(case, name, folder)
        write_whole(note, definition)
        return True

    def _train(self, case: Case, name: str, folder: Path) -> None:
        recipe, where = case.recipe, self.out / case.folder
        if name == "base":
            base = train_base(case.seed, self.tokenizer, self._shortened(recipe))
            save_language_model(stored(base, recipe), self.tokenizer, folder)
        elif name == case.mllm:
            mllm = train_mllm(load_base(where), case.seed, self.tokenizer, self._counts(), recipe)
            save_mllm(stored(mllm, recipe), new_processor(self.tokenizer), folder)
        else:
            own = recipe._replace(math=self._stages(case, name))
            expert = train_math(load_base(where), case.seed, self.tokenizer, own)
            save_language_model(stored(expert, recipe), self.tokenizer, folder)

    def _shortened(self, recipe: Recipe) -> Recipe:
        steps = max(1, recipe.schedule.steps // self.shorten)
        return recipe._replace(schedule=recipe.schedule._replace(steps=steps))

    def _counts(self) -> tuple[int, int, int]:
        first, second, third = (max(1, count // self.shorten) for count in MLLM_STEPS)
        return first, second, third

    def _stages(self, case: Case, name: str) -> tuple[MathStage, ...]:
        stages = case.recipe.math if name == "math" else EXPERTS[name]
        return tuple(s._replace(steps=max(1, s.steps // self.shorten)) for s in stages)

    def _definition(self, case: Case, name: str) -> dict[str, object]:
        """Return what a model follows from, in JSON, so that another recipe is trained again."""
        recipe = case.recipe
        steps, rate = self._shortened(recipe).schedule
        common = {"seed": case.seed, "base": _named(recipe.base), "size": recipe.size}
        common |= {"steps": steps, "learning_rate": rate}
        if name == "base":
            return common
        if name == case.mllm:
            return {**common, "mllm": self._counts(), "reads": recipe.perception}
        stages = [[_named(s.documents), *s[1:]] for s in self._stages(case, name)]
        return {**common, "stages": stages}


def _named(documents: object) -> str:
    inner = documents.func if isinstance(documents, partial) else documents
    return str(getattr(inner, "__name__", inner))


def chosen(patterns: list[str]) -> list[Case]:
    """Return the cases whose names contain one of the patterns, all without patterns."""
    found = [c for c in CASES if not patterns or any(p in c.name for p in patterns)]
    if not found:
        raise SystemExit(
            f"No case has '{patterns[0]}' in its name. Cases: {', '.join(c.name for c in CASES)}."
        )
    return found


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of cases")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--shorten", type=int, default=1, help="divide all steps, to try it out")
    arguments = parser.parse_args()
    cases = chosen(arguments.only)
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return
    torch.set_num_threads(1)
    trainer = Trainer(arguments.out, arguments.shorten)
    for case in cases:
        for line in trainer.make(case):
            print(line, flush=True)


if __name__ == "__main__":
    main()
