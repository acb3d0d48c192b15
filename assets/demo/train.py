"""Train a demo trio from scratch: base, math and mllm, as folders.

    python assets/demo/train.py [--recipe elicited|taught] [--seed 0] [--out FOLDER]
        [--stages base,math,mllm,pack]

In: a recipe and a seed. Out: three transformers folders that load offline, and their pack, the
analysis that the app opens. One thread, so that a seed gives the same files on the same machine.
What each recipe teaches, and what it never does: see `recipes`, `texts` and README.md here.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # the package, when it is not installed

from draws import MLLM_STEPS, mllm_steps  # noqa: E402
from fitting import Schedule, fit  # noqa: E402
from models import (  # noqa: E402
    BOS,
    EOS,
    IMAGE_TOKENS,
    PAD,
    VISION_SIZE,
    new_language_model,
    new_mllm,
    new_processor,
    new_tokenizer,
    save_language_model,
    save_mllm,
)
from PIL import Image  # noqa: E402
from recipes import ELICITED, RECIPES, MathStage, Recipe  # noqa: E402
from texts import CELL_CHARACTERS, Document, cells  # noqa: E402
from transformers import (  # noqa: E402
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ipmerge_core.analysis.analyse import analyse  # noqa: E402
from ipmerge_core.models.pairing import open_pair  # noqa: E402
from ipmerge_core.tasks.demo import Problem  # noqa: E402

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORED = -100  # the label transformers leaves out of the loss

Batch = dict[str, Tensor]


def train_base(
    seed: int, tokenizer: PreTrainedTokenizerFast, recipe: Recipe = ELICITED
) -> LlamaForCausalLM:
    """Train the base on its mixture; every token counts."""
    model = new_language_model(seed, recipe.size)
    rng = np.random.default_rng([seed, 1])

    def loss(_: int) -> Tensor:
        documents = [recipe.base(rng) for _ in range(64)]
        return model(**text_batch(documents, tokenizer), use_cache=False).loss

    fit("base", list(model.parameters()), loss, recipe.schedule)
    return model


def train_math(
    base: LlamaForCausalLM,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe = ELICITED,
) -> LlamaForCausalLM:
    """Fine-tune the projections, or norms, on calculated answers, with replay of base documents."""
    model = copy.deepcopy(base)
    rng = np.random.default_rng([seed, 2])
    for stage in recipe.math:

        def loss(_: int, stage: MathStage = stage) -> Tensor:
            answered = [stage.documents(rng) for _ in range(stage.calculated)]
            computed = model(**text_batch(answered, tokenizer, reply_only=True), use_cache=False)
            if not stage.replayed:
                return computed.loss
            replay = text_batch([recipe.base(rng) for _ in range(stage.replayed)], tokenizer)
            return 0.7 * computed.loss + 0.3 * model(**replay, use_cache=False).loss

        schedule = Schedule(stage.steps, stage.learning_rate)
        fit("math", TRAINED[stage.trains](model), loss, schedule)
    return model


def train_mllm(
    base: LlamaForCausalLM,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    counts: tuple[int, int, int] = MLLM_STEPS,
    recipe: Recipe = ELICITED,
) -> LlavaForConditionalGeneration:
    """Teach the base to see: tower and projector first, then its own projections a little."""
    mllm = new_mllm(base, seed)
    steps = mllm_steps(seed, counts, recipe)
    eyes = [*mllm.model.vision_tower.parameters(), *mllm.model.multi_modal_projector.parameters()]
    mllm.requires_grad_(False)
    for parameter in eyes:
        parameter.requires_grad_(True)
    characters = list(CELL_CHARACTERS.values())
    targets = tokenizer(characters, add_special_tokens=False)["input_ids"]
    names = mllm.get_input_embeddings()(torch.tensor(targets)).squeeze(1)
    scale = torch.pdist(names).square().mean()

    def naming_loss(_: int) -> Tensor:
        seen = next(steps).problems()
        held = torch.tensor([list(CELL_CHARACTERS).index(c) for p in seen for c in cells(p)])
        features = mllm.model.vision_tower(pixels(seen)).last_hidden_state[:, 1:]
        named = mllm.model.multi_modal_projector(features).flatten(0, 1)
        distances = torch.cdist(named, names).square() / scale
        off = distances.gather(1, held[:, None]).mean()
        return off + nn.functional.cross_entropy(-8 * distances, held)

    def reading_loss(_: int) -> Tensor:
        seen = image_batch(next(steps).problems(), tokenizer, recipe)
        return mllm(**seen, use_cache=False).loss

    def joint_loss(_: int) -> Tensor:
        step = next(steps)
        replay = text_batch(step.replay, tokenizer)
        seen = image_batch(step.problems(), tokenizer, recipe)
        return 0.8 * mllm(**seen, use_cache=False).loss + 0.2 * mllm(**replay, use_cache=False).loss

    fit("cells", eyes, naming_loss, Schedule(counts[0], 2e-3))
    fit("eyes", eyes, reading_loss, Schedule(counts[1], 1e-3))
    tuned = projections(mllm.model.language_model)
    for parameter in tuned:
        parameter.requires_grad_(True)
    fit("mllm", [*eyes, *tuned], joint_loss, Schedule(counts[2], 3e-4))
    return mllm


# --- parts of a step -------------------------------------------------------------------------


def projections(model: nn.Module) -> list[nn.Parameter]:
    """Return the seven projection matrices of every block, the only ones fine-tuning moves."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-2] in PROJECTIONS
    ]


def norms(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of every norm, which decoder merges keep unless they are asked to."""
    return [p for name, p in model.named_parameters() if name.split(".")[-2].endswith("norm")]


TRAINED = {"projections": projections, "norms": norms}


def text_batch(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, *, reply_only: bool = False
) -> Batch:
    """Tokenize documents into one right-padded batch with labels."""
    rows = list(documents)
    prompts = tokenizer([row.prompt for row in rows], add_special_tokens=False)["input_ids"]
    replies = tokenizer([row.reply for row in rows], add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True)) + 2
    ids = torch.full((len(rows), width), PAD)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        row = torch.tensor([BOS, *prompt, *reply, *([EOS] if rows[i].ends else [])])
        ids[i, : len(row)] = row
        labels[i, : len(row)] = row
        if reply_only:
            labels[i, : len(prompt) + 1] = IGNORED
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def image_batch(seen: list[Problem], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Batch:
    """Put drawings and what is to be read of them into one batch; only the reply counts."""
    documents = (recipe.reads(problem) for problem in seen)
    expanded = (
        row._replace(prompt=row.prompt.replace("<image>", "<image>" * IMAGE_TOKENS))
        for row in documents
    )
    batch = text_batch(expanded, tokenizer, reply_only=True)
    return {**batch, "pixel_values": pixels(seen)}


def pixels(seen: Iterable[Problem]) -> Tensor:
    """Do what the image processor does, in one go: 64 x 64, values in [-1, 1]."""
    small = [
        np.asarray(problem.image.resize((VISION_SIZE, VISION_SIZE), Image.Resampling.BICUBIC))
        for problem in seen
    ]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def run(recipe: Recipe, seed: int, out: Path, stages: list[str]) -> Iterator[str]:
    """Train and write the requested stages, yielding a line after each."""
    torch.set_num_threads(1)
    tokenizer = new_tokenizer()
    started = time.process_time()
    for stage in stages:
        if stage == "base":
            base = train_base(seed, tokenizer, recipe)
            save_language_model(stored(base, recipe), tokenizer, out / "base")
        elif stage == "math":
            math = train_math(load_base(out), seed, tokenizer, recipe)
            save_language_model(stored(math, recipe), tokenizer, out / "math")
        elif stage == "mllm":
            mllm = train_mllm(load_base(out), seed, tokenizer, recipe=recipe)
            save_mllm(stored(mllm, recipe), new_processor(tokenizer), out / "mllm")
        elif stage == "pack":
            pair = open_pair(out / "mllm", out / "math", out / "base")
            replace(analyse(pair), name=recipe.title).save(out / recipe.pack)
        yield f"{stage} written to {out} after {time.process_time() - started:.0f} CPU s"


def load_base(out: Path) -> LlamaForCausalLM:
    """Load the base as it is stored, in fp32, so that both fine-tunings start from its values."""
    return LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)


def stored(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Return a model in the dtype of the recipe's files."""
    return model.to(torch.bfloat16) if recipe.half else model


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=tuple(RECIPES), default=ELICITED.name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="by default the folder of the recipe")
    parser.add_argument("--stages", default="base,math,mllm,pack", help="comma-separated, in order")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    out = arguments.out or recipe.folder
    for line in run(recipe, arguments.seed, out, arguments.stages.split(",")):
        print(line, flush=True)


if __name__ == "__main__":
    main()
