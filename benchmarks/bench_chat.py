"""Print the figures of the live chat: factors, memory, time to the first token, gains in one batch.

    python benchmarks/bench_chat.py [--only residual bf16 batch ...] [--items 900]

In: the demo trio, and random models made here. Out: the bytes and ranks of the factors with the
share of equal replies on the evaluation items; the time from a change of lambda to the first token;
eight gains in one batch against one reply; memory of the base with a merge; a merge with kept
updates against its analysis; the rows of every family that equal their column loaded alone; and,
with a CUDA GPU, milliseconds per token of models of 7e9 parameters.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "assets" / "demo")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil  # noqa: E402
import torch  # noqa: E402
from chat_families import CHAT_FAMILIES  # noqa: E402
from chat_gpu import print_gpu  # noqa: E402
from draws import PER_TASK, evaluation_problems  # noqa: E402
from live_families import compare_family  # noqa: E402
from report import machine, table  # noqa: E402

import ipmerge_core as ipm  # noqa: E402
from ipmerge_core.adapters.columns import Column, Row  # noqa: E402
from ipmerge_core.adapters.factor_set import EXACT, FactorSet, iter_factor_set  # noqa: E402
from ipmerge_core.adapters.live import LiveModel  # noqa: E402
from ipmerge_core.analysis.analyse import iter_pack_of  # noqa: E402
from ipmerge_core.analysis.comparison import Options  # noqa: E402
from ipmerge_core.evaluation.batched_answers import LONGEST_REPLY, answer_all  # noqa: E402
from ipmerge_core.inference.encoding import ModelProcessor  # noqa: E402
from ipmerge_core.inference.loading import load_model  # noqa: E402
from ipmerge_core.inference.prompts import Message  # noqa: E402
from ipmerge_core.inference.sampling import GenerationSettings  # noqa: E402
from ipmerge_core.methods.declarations import drained  # noqa: E402
from ipmerge_core.models.pairing import ModelPair  # noqa: E402
from ipmerge_core.planning.plan import MergePlan, reopen  # noqa: E402
from ipmerge_core.tasks.demo import TASKS, Problem, problems  # noqa: E402

DEMO = ROOT / "assets" / "demo"
GAINS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0)
RESIDUALS = (1e-2, 1e-3, EXACT)
WIDTH, FEED, LAYERS = 1024, 2816, 2  # of the model on which merge and analysis are compared


class Demo:
    """The demo trio with a live model and the plan of its recorded answers."""

    def __init__(self) -> None:
        self.analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
        self.plan = self.make(4.0)
        self.pair: ModelPair = reopen(self.plan)
        self.live = LiveModel(load_model(DEMO / "mllm"))

    def make(self, lambda_: float) -> MergePlan:
        """Make the plan with another lambda."""
        return ipm.make_plan(
            self.analysis, similarity_threshold=0.0, lambda_=lambda_, gamma_norm="max"
        )

    def factors(self, residual: float) -> FactorSet:
        """Compute factors and put them next to the model."""
        found: FactorSet = drained(iter_factor_set(self.plan, self.pair, tolerance=residual))
        self.live.add_factors(found, self.pair)
        return found


def replies(live: LiveModel, column: Column, asked: Sequence[Problem]) -> list[str]:
    """Answer the evaluation items in batches with one column."""
    processor = ModelProcessor(live.loaded.folder, takes_images=True).processor
    found: list[str] = []
    for start in range(0, len(asked), 100):
        part = asked[start : start + 100]
        install, remove = live.installed([column])  # of all rows, also when some have ended
        install()
        try:
            found += answer_all(live.loaded.model, processor, part, batch_size=100)
        finally:
            remove()
    return found


def print_residual(demo: Demo, items: int) -> None:
    """Bytes, ranks and equal replies of the factors at several residuals."""
    asked = evaluation_problems(TASKS, PER_TASK["validation"], "validation", 0)[:items]
    with tempfile.TemporaryDirectory() as folder:
        ipm.merge(demo.plan, Path(folder) / "merged")
        merged = load_model(Path(folder) / "merged")
        processor = ModelProcessor(merged.folder, takes_images=True).processor
        expected = answer_all(merged.model, processor, asked, batch_size=100)
    base = replies(demo.live, demo.live.base(), asked)
    print(f"{sum(a != b for a, b in zip(base, expected, strict=True))} of {len(asked)} replies ")
    print("of the merged folder differ from the base.\n")
    rows, ranks = [], {}
    for residual in RESIDUALS:
        factors = demo.factors(residual)
        found = replies(demo.live, demo.live.plan_column("plan", demo.plan, factors), asked)
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        share = factors.nbytes / demo.pair.mllm.nbytes
        rows.append(
            [
                f"{residual:g}" if residual else "exact",
                f"{factors.nbytes}",
                f"{share:.2%}",
                f"{factors.largest_residual:.1e}",
                f"{equal} of {len(asked)}",
            ]
        )
        ranks[residual] = {name: low.rank for (name, _), low in factors.factors.items()}
        demo.live.drop_factors(factors)
    head = ["residual", "bytes", "share of the model", "largest residual", "equal replies"]
    print(table(head, rows), "\n")
    shapes = {m.name: sum(m.shape) for m in demo.pair.matrices}
    head = ["matrix", *(f"rank, bytes at {r:g}" for r in RESIDUALS[:2])]
    body = [
        [name, *(f"{ranks[r][name]}, {4 * ranks[r][name] * size}" for r in RESIDUALS[:2])]
        for name, size in shapes.items()
    ]
    print(table(head, body), "\n")


def print_bf16(demo: Demo, items: int) -> None:
    """Equal replies of the live merge and of the merged folder, both loaded in bf16."""
    asked = evaluation_problems(TASKS, PER_TASK["validation"], "validation", 0)[:items]
    live = LiveModel(load_model(DEMO / "mllm", precision="bf16"))
    factors: FactorSet = drained(iter_factor_set(demo.plan, demo.pair, tolerance=1e-3))
    live.add_factors(factors, demo.pair)
    found = replies(live, live.plan_column("plan", demo.plan, factors), asked)
    with tempfile.TemporaryDirectory() as folder:
        ipm.merge(demo.plan, Path(folder) / "merged")
        merged = LiveModel(load_model(Path(folder) / "merged", precision="bf16"))
        folders = replies(merged, merged.base(), asked)
    exact = replies(demo.live, demo.live.plan_column("plan", demo.plan, demo.factors(1e-3)), asked)
    rows = [
        ["live in bf16", "merged folder in bf16", share_equal(found, folders)],
        ["live in bf16", "live in fp32", share_equal(found, exact)],
        ["merged folder in bf16", "live in fp32", share_equal(folders, exact)],
    ]
    print(table(["replies", "compared with", "equal"], rows), "\n")


def share_equal(a: Sequence[str], b: Sequence[str]) -> str:
    """Count equal replies."""
    return f"{sum(x == y for x, y in zip(a, b, strict=True))} of {len(a)}"


def question() -> list[Message]:
    """One question of the demo with its image."""
    problem = problems("mul", 1, seed=3)[0]
    return [Message("user", problem.question, (problem.image,))]


def print_batch(demo: Demo) -> None:
    """Time from a change of lambda to the first token, and eight gains against one reply."""
    factors, asked = demo.factors(1e-3), question()
    how = GenerationSettings(max_new_tokens=LONGEST_REPLY)

    def first_token(lambda_: float) -> float:
        started = time.perf_counter()
        column = demo.live.plan_column("plan", demo.make(lambda_), factors)
        for states in demo.live.stream(
            [Row(demo.live.base(), asked, how), Row(column, asked, how)]
        ):
            if states[1].ids:
                return time.perf_counter() - started
        raise AssertionError("no token")

    first_token(1.0)
    seconds = [first_token(lambda_) for lambda_ in GAINS[1:] for _ in range(3)]
    print(f"Change of lambda to the first token, two columns: median {median(seconds):.3f} s, ")
    print(f"largest {max(seconds):.3f} s of {len(seconds)}.\n")
    column = demo.live.plan_column("plan", demo.make(1.0), factors)

    def timed(gains: Sequence[float]) -> tuple[float, int]:
        started = time.perf_counter()
        *_, states = demo.live.strip(column, gains, asked, how)
        return time.perf_counter() - started, max(len(state.ids) for state in states)

    one = [timed([GAINS[-1]]) for _ in range(7)]
    strip = [timed(GAINS) for _ in range(7)]
    a, b = min(s for s, _ in one), min(s for s, _ in strip)
    print(f"One reply of {one[0][1]} tokens: {a:.3f} s. Eight gains in one batch, the longest of ")
    print(f"{strip[0][1]} tokens: {b:.3f} s, {b / a:.2f} times.\n")


def print_memory(demo: Demo) -> None:
    """Memory of the base with a merge, as bytes of tensors and of the process."""
    factors = demo.factors(1e-2)
    model = sum(p.nbytes for p in demo.live.loaded.model.parameters())
    own = demo.live.add_factors(factors, demo.pair)
    print(f"Weights of the base {model}, with factors at residual 1e-2 {model + own}: ")
    print(f"{(model + own) / model:.3f} times. The process holds ")
    print(f"{psutil.Process().memory_info().rss / 1e6:.0f} MB with its libraries.\n")


def print_families() -> None:
    """Rows that equal their column loaded alone, token by token in fp32, for every family."""
    rows = []
    for name in CHAT_FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = compare_family(name, Path(folder))
        pairs = zip(found.states, found.expected, strict=True)
        batched = sum(state.is_batched for state in found.states)
        equal = sum(state.ids == ids for state, ids in pairs)
        rows.append([name, f"{equal} of {len(found.states)}", f"{batched}"])
    print(table(["family", "equal rows", "in a batch"], rows), "\n")


def print_merge() -> None:
    """A merge of the selected third with kept updates against its analysis."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = random_pair(folder)
        analysed = seconds_of(lambda: _analyse(pair, folder / "plain.json.gz", None))
        kept = seconds_of(lambda: _analyse(pair, folder / "pack.json.gz", folder / "updates"))
        analysis = ipm.Analysis.load(folder / "pack.json.gz")
        found = sorted(r.similarity["first"] for r in analysis.records)
        plan = ipm.make_plan(analysis, similarity_threshold=found[-(len(found) // 3)])
        without = seconds_of(lambda: ipm.merge(plan, folder / "without"))
        merged = seconds_of(lambda: ipm.merge(plan, folder / "with", updates=folder / "updates"))
        same = all(
            (folder / "with" / path.name).read_bytes() == path.read_bytes()
            for path in (folder / "without").glob("*.safetensors")
        )
        nbytes = sum(p.stat().st_size for p in (folder / "updates").rglob("*.safetensors"))
        rows = [
            ["analysis", f"{analysed:.2f}", "1"],
            ["analysis that keeps updates", f"{kept:.2f}", f"{kept / analysed:.2f}"],
            [f"merge of {len(plan.selected)} of {len(plan.decisions)}", f"{without:.2f}",
             f"{without / analysed:.2f}"],
            ["the same with kept updates", f"{merged:.2f}", f"{merged / analysed:.2f}"],
        ]  # fmt: skip
        print(f"Llama layers of width {WIDTH}, {LAYERS} layers, bf16, CPU; updates of both ")
        print(f"variants take {nbytes / 1e6:.0f} MB; equal bytes: {same}.\n")
        print(table(["run", "processor seconds", "of the analysis"], rows), "\n")


def random_pair(folder: Path) -> ModelPair:
    """Write a random trio whose task vectors have decaying spectra, and open it."""
    from conftest import as_mllm, write_model

    config = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FEED,
        "num_hidden_layers": LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    }  # fmt: skip
    shapes = {f"self_attn.{p}_proj": (WIDTH, WIDTH) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (FEED, WIDTH), "mlp.up_proj": (FEED, WIDTH)}
    shapes |= {"mlp.down_proj": (WIDTH, FEED)}
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {
        "model.embed_tokens.weight": 0.02 * noise(64, WIDTH),
        "lm_head.weight": noise(64, WIDTH),
    }
    base["model.norm.weight"] = torch.ones(WIDTH)
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            base[f"model.layers.{layer}.{name}.weight"] = 0.02 * noise(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = torch.ones(WIDTH)
    shared = {name: noise(32, value.shape[1]) for name, value in base.items() if "proj" in name}

    def tuned() -> dict[str, torch.Tensor]:
        changed = dict(base)
        for name, right in shared.items():
            common = (noise(base[name].shape[0], 32) / torch.arange(1, 33)) @ right
            changed[name] = base[name] + 1e-4 * common + 1e-4 * noise(*base[name].shape)
        return changed

    how = {"dtype": torch.bfloat16}
    mllm = {"model_type": "llava", "text_config": config}
    return ipm.open_pair(
        write_model(folder / "mllm", as_mllm(tuned()), mllm, **how),
        write_model(folder / "math", tuned(), config, **how),
        write_model(folder / "base", base, config, **how),
    )


def _analyse(pair: ModelPair, pack: Path, updates: Path | None) -> None:
    for _ in iter_pack_of(pair, pack, Options(), updates=updates):
        pass


def seconds_of(run: Callable[[], object]) -> float:
    """Return the processor seconds of one run, which other load hardly changes."""
    gc.collect()
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    """Parse the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("residual", "bf16", "batch", "memory", "merge", "families", "gpu")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--items", type=int, default=900, help="evaluation items of the demo")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    has_gpu = torch.cuda.is_available()
    print(machine(torch.cuda.get_device_name() if has_gpu else "no GPU"), "\n")
    demo = Demo()
    if "residual" in arguments.only:
        print_residual(demo, arguments.items)
    if "bf16" in arguments.only:
        print_bf16(demo, arguments.items)
    if "batch" in arguments.only:
        print_batch(demo)
    if "memory" in arguments.only:
        print_memory(demo)
    if "merge" in arguments.only:
        print_merge()
    if "families" in arguments.only:
        print_families()
    if "gpu" in arguments.only and has_gpu:
        print_gpu()


if __name__ == "__main__":
    main()
