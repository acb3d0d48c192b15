"""Build the SmolLM2 trio: a base, a math model and an MLLM of 135 M parameters, and their pack.

    make demo-135m                        the same as
    python assets/smollm2/build.py [--source package|HUB_ID|FOLDER] [--seed 0] [--out FOLDER]
        [--stages base,math,mllm,pack] [--device auto] [--threads N]

In: SmolLM2-135M-Instruct, see `language_model`, and a seed. Out: three transformers folders and
the pack that the app opens. A stopped build continues: a stage that is complete is not repeated,
and training continues from its last checkpoint. Training runs in mixed precision (bfloat16 with
float32 weights); files are float32, because rounding would add noise to small updates.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from documents import (
    HERE,
    IGNORED,
    IMAGE_TOKEN,
    ChatDocument,
    cell_tokens,
    in_words,
    math_documents,
    reading_documents,
    text_batch,
    typed_batch,
)
from draws import WITHOUT_HANDWRITING, Draw, drawn
from fitting import Schedule, fit
from language_model import PACKAGED, LanguageModel, load_language_model, prepare_tokenizer
from models import new_mllm, new_processor, save_language_model, save_mllm
from packs import is_pack_of
from texts import CELL_CHARACTERS, cells
from torch import Tensor, nn
from train import pixels, projections
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from ipmerge_core.analysis.analyse import analyse
from ipmerge_core.errors import CheckpointError, IPMergeError, ModelLoadError
from ipmerge_core.evaluation.answering import Answerer, Caches
from ipmerge_core.evaluation.scores import Score
from ipmerge_core.inference.loading import load_model
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.runtime.devices import resolve_device
from ipmerge_core.tasks.answers import is_right
from ipmerge_core.tasks.demo import MATH_TASKS, TASKS, Drawing, Problem, make_problem
from ipmerge_core.tasks.demo_items import item_of

STAGES = ("base", "math", "mllm", "pack")
TITLE = "SmolLM2-135M trio"
PACK = "smollm2.pack.json.gz"
DONE = "build.json"  # of a stage's folder: what it was built from
LABELS = {"math": ("math",), "mllm": ("cells", "typed", "joint")}  # of a stage's trainings
MATH, CELLS, TYPED, JOINT = (
    Schedule(80, 1e-4),
    Schedule(1300, 2e-3),
    Schedule(240, 1e-4),
    Schedule(80, 5e-5),
)
ROWS = 16  # documents per step
LONGEST_REPLY = 40  # tokens
SHOWN = 96  # drawings per step of the tower alone


@dataclass(frozen=True)
class Build:
    """What a build is made from."""

    source: str
    seed: int
    out: Path
    device: str
    schedules: tuple[Schedule, Schedule, Schedule, Schedule] = (MATH, CELLS, TYPED, JOINT)

    def checkpoint(self, label: str) -> Path:
        """The file from which a training of this source, seed and schedule continues."""
        made_from = json.dumps([self.source, self.seed, self.schedules])
        digest = hashlib.sha256(made_from.encode()).hexdigest()[:8]
        return self.out / ".training" / digest / f"{label}.safetensors"

    def definition(self, stage: str) -> dict[str, Any]:
        """Return what a stage follows from, in JSON values."""
        math, *seeing = ([s.steps, s.learning_rate] for s in self.schedules)
        trained = {"math": [math], "mllm": seeing}.get(stage, [])
        return {"model": self.source, "seed": self.seed, "schedules": trained}

    def rng(self, stage: int, step: int) -> np.random.Generator:
        """The random numbers of a step, which do not depend on the steps before it."""
        return np.random.default_rng([self.seed, stage, step])


def iter_build(build: Build, stages: tuple[str, ...] = STAGES) -> Iterator[str]:
    """Build the stages that are not complete; yields a line after each.

    Raises: IPMergeError if the base cannot be loaded, the models do not match, or the folder has
        stages of another build.
    """
    for stage in STAGES[:-1]:
        check_stage(build, stage)
    makers: dict[str, Callable[[Build], dict[str, str]]] = {
        "base": make_base,
        "math": make_math,
        "mllm": make_mllm,
        "pack": make_pack,
    }
    for stage in stages:
        record = build.out / stage / DONE
        if record.is_file() or (stage == "pack" and has_pack(build)):
            yield f"{stage}: complete"
            continue
        started = time.monotonic()
        facts = makers[stage](build)
        if stage != "pack":
            write_record(record, {"made_from": build.definition(stage), **facts})
        remove_checkpoints(build, stage)
        described = ", ".join(f"{name} {value}" for name, value in facts.items())
        yield f"{stage}: built in {time.monotonic() - started:.0f} s ({described})"


def remove_checkpoints(build: Build, stage: str) -> None:
    """Remove the checkpoints of a stage that is complete, and their folder if it is empty."""
    for label in LABELS.get(stage, ()):
        path = build.checkpoint(label)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty, or not there
            path.parent.rmdir()
            path.parent.parent.rmdir()


def check_stage(build: Build, stage: str) -> None:
    """Check that a stage is not there from another build. Raises: CheckpointError."""
    record = build.out / stage / DONE
    if not record.is_file():
        return
    found = json.loads(record.read_text(encoding="utf-8")).get("made_from")
    if found != (wanted := build.definition(stage)):
        raise CheckpointError(
            f"'{record.parent}' was built from {found or 'what it does not tell'}, and this build "
            f"is of {wanted}. Choose another folder with --out, or delete this one."
        )


def make_base(build: Build) -> dict[str, str]:
    """Load the language model and write it with the trio's chat template."""
    found = load_language_model(build.source, build.out / ".cache")
    save_language_model(found.model, found.tokenizer, build.out / "base")
    return {"source": found.source}


def make_math(build: Build) -> dict[str, str]:
    """Fine-tune the projections of the base on answers that are computed."""
    model, tokenizer, _ = load_base(build)
    parameters = trainable(model, projections(model))

    def loss(step: int) -> Tensor:
        documents = math_documents(ROWS, build.rng(0, step))
        return reply_loss(model.model, model.lm_head, text_batch(documents, tokenizer))

    schedule = build.schedules[0]
    fit(
        "math",
        parameters,
        in_mixed_precision(loss, build.device),
        schedule,
        build.checkpoint("math"),
    )
    save_language_model(model.cpu(), tokenizer, build.out / "math")
    return {"steps": str(schedule.steps), "rows per step": str(ROWS)}


def make_mllm(build: Build) -> dict[str, str]:
    """Teach the base to see: the tower names cells, the language model reads, then both."""
    model, tokenizer, _ = load_base(build)
    mllm = new_mllm(model, build.seed, int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))
    mllm.to(build.device)
    language = projections(mllm.model.language_model)
    eyes = [*mllm.model.vision_tower.parameters(), *mllm.model.multi_modal_projector.parameters()]
    _, cells_schedule, typed, joint = build.schedules
    backbone = mllm.model.language_model

    def typed_loss(step: int) -> Tensor:
        documents = read_documents(build, 2, step)
        return reply_loss(backbone, mllm.lm_head, typed_batch(documents, tokenizer))

    def joint_loss(step: int) -> Tensor:
        documents = read_documents(build, 3, step)
        seen = pixels(row.problem for row in documents if row.problem)
        batch = text_batch(documents, tokenizer) | {"pixel_values": seen}
        return reply_loss(mllm.model, mllm.lm_head, batch)

    naming = naming_loss(mllm, tokenizer, build)
    fit("cells", trainable(mllm, eyes), naming, cells_schedule, build.checkpoint("cells"))
    for label, loss, parameters, schedule in (
        ("typed", typed_loss, language, typed),
        ("joint", joint_loss, [*eyes, *language], joint),
    ):
        mixed = in_mixed_precision(loss, build.device)
        fit(label, trainable(mllm, parameters), mixed, schedule, build.checkpoint(label))
    save_mllm(mllm.cpu(), new_processor(tokenizer, IMAGE_TOKEN), build.out / "mllm")
    steps = "+".join(str(schedule.steps) for schedule in build.schedules[1:])
    return {"steps": steps, "rows per step": str(ROWS)}


def make_pack(build: Build) -> dict[str, str]:
    """Analyse the trio and write its pack."""
    pair = open_pair(build.out / "mllm", build.out / "math", build.out / "base")
    found = replace(analyse(pair, device=build.device), name=TITLE)
    found.save(build.out / PACK)
    return {"matrices": str(len(found.records))}


def has_pack(build: Build) -> bool:
    """Return whether the pack is there and is that of these models, not the one that is shipped."""
    folders = (build.out / name for name in ("mllm", "base", "math"))
    return is_pack_of(build.out / PACK, *folders)


def word_scores(build: Build, n: int = 9) -> dict[str, Score]:
    """Ask the base and the math model `n` problems of each math task in words.

    Problems are of the test draw, of which only the handwriting is not seen in training.
    """
    asked = {
        f"{task}-{i}": problem
        for task in MATH_TASKS
        for i, problem in enumerate(drawn((task,), n, "test", frozenset()))
    }
    items = {
        key: replace(item_of(problem, key), question=in_words(problem), pictures=())
        for key, problem in asked.items()
    }
    found = {}
    for name in ("base", "math"):
        loaded = load_model(build.out / name, build.device)
        answers = Answerer(loaded, LONGEST_REPLY, ROWS, Caches()).answer(items)
        replies = [reply for part in answers for reply in part.replies]
        right = sum(is_right(asked[reply.item], reply.text) for reply in replies)
        found[name] = Score(right, len(replies))
        loaded.processor.close()
    return found


# --- what is shown ---


def shown_problems(build: Build, step: int) -> list[Problem]:
    """Return the drawings of a step of the tower alone."""
    rng = build.rng(1, step)
    tasks = [TASKS[int(index)] for index in rng.integers(len(TASKS), size=SHOWN)]
    return [make_problem(task, int(rng.integers(2**31)), "train", 0) for task in tasks]


def read_documents(build: Build, stage: int, step: int) -> list[ChatDocument]:
    """Return the drawings to read of a step: typed in stage 2, shown in stage 3."""
    return reading_documents(ROWS, build.rng(stage, step))


def evaluation_problems(build: Build, n: int, draw: Draw) -> list[Problem]:
    """Return `n` problems of each task of a draw, without training drawings."""
    return drawn(TASKS, n, draw, training_drawings(build))


@cache
def training_drawings(build: Build) -> frozenset[Drawing]:
    """Collect the training drawings without handwriting; the others cannot recur."""
    _, cells_schedule, typed, joint = build.schedules
    seen = [p for step in range(cells_schedule.steps) for p in shown_problems(build, step)]
    for stage, schedule in ((2, typed), (3, joint)):
        for step in range(schedule.steps):
            seen += [d.problem for d in read_documents(build, stage, step) if d.problem]
    return frozenset(p.marks for p in seen if p.task in WITHOUT_HANDWRITING)


# --- parts of a step -------------------------------------------------------------------------


def reply_loss(backbone: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the labelled tokens; logits are computed for these only."""
    device = next(head.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = inputs.pop("labels")[:, 1:]
    hidden = backbone(**inputs, use_cache=False).last_hidden_state[:, :-1]
    told = labels != IGNORED
    return nn.functional.cross_entropy(head(hidden[told]).float(), labels[told])


def naming_loss(
    mllm: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, build: Build
) -> Callable[[int], Tensor]:
    """Return the loss of the tower: each cell's feature is the embedding of its character.

    Math:   |f - e_c|^2 / s + cross-entropy of softmax(-8 |f - e|^2 / s), s the mean squared
            distance of the embeddings of two characters.
    """
    held_of = {held: index for index, held in enumerate(CELL_CHARACTERS)}
    targets = torch.tensor(list(cell_tokens(tokenizer).values()), device=build.device)
    names = mllm.get_input_embeddings()(targets).detach()
    scale = torch.pdist(names).square().mean()

    def loss(step: int) -> Tensor:
        seen = shown_problems(build, step)
        held = torch.tensor([held_of[cell] for problem in seen for cell in cells(problem)])
        shown = pixels(seen).to(build.device)
        features = mllm.model.vision_tower(shown).last_hidden_state[:, 1:]
        named = mllm.model.multi_modal_projector(features).flatten(0, 1)
        distances = torch.cdist(named, names).square() / scale
        held = held.to(build.device)
        off = distances.gather(1, held[:, None]).mean()
        return off + nn.functional.cross_entropy(-8 * distances, held)

    return loss


def in_mixed_precision(loss: Callable[[int], Tensor], device: str) -> Callable[[int], Tensor]:
    """Return a loss whose matrix products are in bfloat16."""

    def mixed(step: int) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return loss(step)

    return mixed


def trainable(model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Freeze all other parameters of a model."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


# --- files -----------------------------------------------------------------------------------


def load_base(build: Build) -> LanguageModel:
    """Load the base as it is stored, so that both fine-tunings start from its values.

    Raises: ModelLoadError if it has not been built.
    """
    folder = build.out / "base"
    if not (folder / DONE).is_file():
        raise ModelLoadError(f"There is no base in '{folder}'. Build it first: --stages base.")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    return LanguageModel(model.to(build.device), tokenizer, str(folder))


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Write what a stage was built from and with."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    made = {**facts, **versions, "machine": platform.machine()}
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=PACKAGED, help="package, a hub id or a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in order")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    build = Build(options.source, options.seed, options.out, str(resolve_device(options.device)))
    stages = tuple(options.stages.split(","))
    if unknown := set(stages) - set(STAGES):
        sys.exit(f"Unknown stages {sorted(unknown)}. Available: {', '.join(STAGES)}.")
    try:
        for line in iter_build(build, stages):
            print(line, flush=True)
        if {"base", "math"} <= set(stages):
            scores = ", ".join(f"{name} {score}" for name, score in word_scores(build).items())
            print(f"Right answers to problems in words, %: {scores}")
    except IPMergeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
