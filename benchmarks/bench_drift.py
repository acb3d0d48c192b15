"""Print the figures of DRIFT fine-tuning: cost of the rule, copies of the prior, resume, processes.

    python benchmarks/bench_drift.py [--steps 40]

The cost is measured in one process: forward, backward and AdamW of the demo MLLM and of a LLaVA
with wider layers, with the rule in every second step; the least of each is compared, since other
work only adds. Resume and two processes are whole runs of `ipmerge drift` on the demo models,
compared by the change of the weights: ||a - b|| / ||a||, the largest of any tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

import torch
from report import machine, table
from safetensors.torch import load_file
from torch import nn

from ipmerge_core.finetuning.conversations import load_conversations
from ipmerge_core.finetuning.examples import Encoder, collate
from ipmerge_core.finetuning.guidance import GradientGuide, find_guided
from ipmerge_core.finetuning.matching import match_prior
from ipmerge_core.finetuning.prior import PLACEMENTS, Placement, ReasoningPrior
from ipmerge_core.finetuning.rules import RULES, Rule
from ipmerge_core.finetuning.scope import Scope
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.loading import load_weights
from ipmerge_core.inference.module_names import parameter_names
from ipmerge_core.models.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "assets" / "demo"
COMMAND = [
    sys.executable, "-m", "ipmerge_core", "drift", "--mllm", str(DEMO / "mllm"), "--math",
    str(DEMO / "math"), "--data", "demo", "--limit", "64", "--batch-size", "2", "--learning-rate",
    "1e-4", "--device", "cpu", "--quiet",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WIDTH, LAYERS = 512, 4  # of the wider model


class Bench(NamedTuple):
    """A model with its prior and one batch."""

    model: Any
    guide: GradientGuide
    batch: dict[str, torch.Tensor]

    @property
    def tokens(self) -> int:
        """Number of tokens of the batch."""
        return int(self.batch["attention_mask"].sum())


def wider(folder: Path) -> tuple[Path, Path]:
    """Write a random LLaVA with wider layers, with the demo's processor, and its expert."""
    from transformers import AutoConfig, AutoModelForImageTextToText, LlamaForCausalLM

    config = AutoConfig.from_pretrained(DEMO / "mllm")
    text = config.text_config
    text.hidden_size, text.intermediate_size = WIDTH, 4 * WIDTH
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = LAYERS, 8, 8
    text.head_dim = WIDTH // 8
    torch.manual_seed(0)
    mllm = AutoModelForImageTextToText.from_config(config)
    mllm.save_pretrained(folder / "mllm")
    for path in (DEMO / "mllm").iterdir():
        if "token" in path.name or "processor" in path.name or "template" in path.name:
            (folder / "mllm" / path.name).write_bytes(path.read_bytes())
    expert = LlamaForCausalLM(text)
    expert.model.load_state_dict(mllm.model.language_model.state_dict())
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    expert.save_pretrained(folder / "math")
    return folder / "mllm", folder / "math"


def bench_of(mllm: Path, math: Path, placement: Placement, rule: Rule, batch_size: int) -> Bench:
    """Load a model with its prior, and encode one batch of the demo problems."""
    source = Checkpoint.open(mllm)
    model = load_weights(source).float().requires_grad_(False)
    model.get_decoder().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    prior = ReasoningPrior(match_prior(source, Checkpoint.open(math), Scope()), placement).compute()
    guided = find_guided(model, prior, parameter_names(model, list(source.tensors)), lambda _: 1.0)
    encoder = Encoder(ModelProcessor(mllm, takes_images=True))
    rows = load_conversations("demo", batch_size).conversations
    batch = collate([encoder.encode(row) for row in rows], 0)
    return Bench(model, GradientGuide(guided, prior, rule), batch)


def cost(bench: Bench, steps: int) -> tuple[float, float]:
    """Return the least seconds of a step without the rule, and of the rule alone."""
    trained = [p for p in bench.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    plain, rule = [], []
    for number in range(steps):
        started = perf_counter()
        bench.model(**bench.batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        between = perf_counter()
        if number % 2:
            bench.guide.act()
            bench.guide.take_cosine()
        acted = perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        ended = perf_counter()
        plain.append(ended - acted + between - started)
        rule += [acted - between] if number % 2 else []
    return min(plain), min(rule)


def costs(steps: int, folder: Path) -> Iterator[list[str]]:
    """Yield a row per model, placement and rule."""
    wide = wider(folder)
    for label, models, size in (
        ("demo MLLM", (DEMO / "mllm", DEMO / "math"), 8),
        (f"{LAYERS} layers of width {WIDTH}", wide, 16),
    ):
        for placement in PLACEMENTS:
            for rule in RULES if placement == "device" else RULES[:1]:
                bench = bench_of(*models, placement, rule, size)
                step, acted = cost(bench, steps)
                match = bench.guide.prior.match
                whole = sum(
                    entry.numel * bench.guide.prior.match.mllm.read(entry.mllm).itemsize
                    for entry in match.entries
                )
                yield [
                    label, f"{match.numel / 1e6:.1f} M", str(bench.tokens),
                    {"device": "resident"}.get(placement, placement), rule, f"{1e3 * step:.1f}",
                    f"{1e3 * acted:.2f}", f"{acted / step:.1%}",
                    f"{bench.guide.prior.nbytes / whole:.0f}",
                ]  # fmt: skip


def difference(first: Path, second: Path) -> float:
    """Return the largest relative difference of the changes of any tensor."""
    start, ours, theirs = (
        load_file(f / "model.safetensors") for f in (DEMO / "mllm", first, second)
    )
    return max(
        float((ours[n] - theirs[n]).norm() / (ours[n] - start[n]).norm())
        for n in ours
        if not torch.equal(ours[n], start[n])
    )


def losses(folder: Path) -> list[float]:
    """Return the loss curve of a result."""
    history = json.loads((folder / "ipmerge.json").read_text("utf-8"))["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def resumed(folder: Path) -> list[str]:
    """Kill a run after its first checkpoint, resume it, and compare it with a whole one."""
    words = ["--max-steps", "12", "--save-every", "4"]
    whole, killed = folder / "whole", folder / "killed"
    subprocess.run([*COMMAND, *words, "-o", str(whole)], check=True, stdout=subprocess.DEVNULL)
    running = subprocess.Popen([*COMMAND, *words, "-o", str(killed)], stdout=subprocess.DEVNULL)
    mark = folder / "killed.training" / "checkpoint-4" / "ipmerge-complete.json"
    while not mark.exists() and running.poll() is None:
        pass
    running.send_signal(signal.SIGKILL)
    running.wait()
    died = not killed.exists()
    subprocess.run([*COMMAND, *words, "-o", str(killed)], check=True, stdout=subprocess.DEVNULL)
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses(whole), losses(killed), strict=True))
    how = "killed after its first checkpoint and resumed" if died else "NOT KILLED IN TIME"
    return [how, f"{apart:.1e}", f"{difference(whole, killed):.1e}"]


def processes(folder: Path) -> Iterator[list[str]]:
    """Yield a row per mode: two processes against one with doubled accumulation."""
    for rule in RULES:
        for mode in ([], ["--per-micro-batch"]):
            name = rule + "".join(mode)
            one, two = folder / f"one-{name}", folder / f"two-{name}"
            words = ["--max-steps", "4", "--rule", rule, *mode]
            for launcher, parts, out in ((COMMAND[:1], "4", one), (TORCHRUN, "2", two)):
                command = [*launcher, *COMMAND[1:], *words, "--accumulation", parts, "-o", str(out)]
                subprocess.run(
                    command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            yield [
                rule,
                "per micro-batch" if mode else "accumulated",
                f"{difference(one, two):.1e}",
            ]


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(ROOT)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        head = [
            "model",
            "prior",
            "tokens",
            "kept",
            "rule",
            "step, ms",
            "rule, ms",
            "share",
            "copies",
        ]
        print(table(head, list(costs(arguments.steps, folder))), flush=True)
        print()
        print(table(["resume", "loss", "weights"], [resumed(folder)]), flush=True)
        print()
        head = ["rule", "acts on", "two processes and one"]
        print(table(head, list(processes(folder))), flush=True)


if __name__ == "__main__":
    main()
