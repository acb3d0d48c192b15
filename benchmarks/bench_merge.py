"""Merging beside mergekit 0.1.5 and beside the machine's floor, on one synthetic trio.

    python benchmarks/bench_merge.py --mergekit /path/to/mergekit-yaml

Writes a base and two fine-tunes (Llama-shaped, bf16) below --folder, merges them with each tool in
turn in fresh processes, and prints wall time, peak memory, and ratios as Markdown tables. Runs are
alternated and the minimum is kept, so that a busy machine hurts both alike. Without --mergekit only
our own figures are printed. Everything written is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
HIDDEN, FEED, VOCABULARY = 2048, 5504, 32000
GAINS = {"task_arithmetic": (1.0, 0.3), "ties": (1.0, 0.3)}


class Cost(NamedTuple):
    """Wall seconds, processor seconds, peak resident bytes of one process."""

    wall: float
    cpu: float
    rss: int


def main() -> None:
    """Parse, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="the mergekit-yaml command of an environment of its own")
    parser.add_argument("--folder", default="bench-merge", help="scratch space, about 10 GB")
    parser.add_argument("--layers", type=int, default=12, help="12 make 0.74 B parameters")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--flat", type=int, nargs="*", default=[2, 36], help="layers to compare")
    parser.add_argument("--skip", nargs="*", default=[], help="speed, flat, equal, ranks")
    options = parser.parse_args()
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True)
    try:
        if "speed" not in options.skip:
            speed(folder, options)
        if "flat" not in options.skip:
            flatness(folder, options)
        if "equal" not in options.skip and options.mergekit:
            equality(folder, options)
        if "ranks" not in options.skip:
            processes(folder, options)
    finally:
        shutil.rmtree(folder)


def speed(folder: Path, options: argparse.Namespace) -> None:
    """Print wall time and memory of both tools, and the floor."""
    trio = write_trio(folder / "trio", options.layers)
    size = (trio / "base" / "model.safetensors").stat().st_size
    ours: dict[str, list[Cost]] = {}
    theirs: dict[str, list[Cost]] = {}
    floors = []
    for _ in range(options.repeat):
        for method in GAINS:
            ours.setdefault(method, []).append(merge(trio, folder, method))
            floors.append(floor(trio, folder))
            if options.mergekit:
                theirs.setdefault(method, []).append(
                    mergekit(options.mergekit, trio, folder, method)
                )
    bare = run([sys.executable, "-c", "import torch, ipmerge_core.merging"])
    least = min(floors)
    print(f"\nBase and two fine-tunes of {size / 1e9:.2f} GB, minimum of {options.repeat}.\n")
    print("| method | tool | wall s | cpu s | peak RSS GB | wall / mergekit | RSS / mergekit |")
    print("|---|---|---|---|---|---|---|")
    for method in GAINS:
        own = best(ours[method])
        other = best(theirs[method]) if theirs else None
        ratios = f"{own.wall / other.wall:.3f} | {own.rss / other.rss:.3f}" if other else "- | -"
        print(f"| {method} | IPMerge | {shown(own)} | {ratios} |")
        if other:
            print(f"| {method} | mergekit | {shown(other)} | 1 | 1 |")
    own = best(ours["task_arithmetic"])
    print(
        f"\nFloor, `cat` of the inputs and `cp` of the output: {least:.2f} s; task arithmetic "
        f"takes {own.wall / least:.1f} times that. Interpreter with its imports: "
        f"{bare.wall:.1f} s, {bare.rss / 1e9:.2f} GB, so the merge itself adds "
        f"{(own.rss - bare.rss) / 1e9:.2f} GB."
    )
    shutil.rmtree(trio)


def flatness(folder: Path, options: argparse.Namespace) -> None:
    """Print the peak memory of task arithmetic for models of different size."""
    print("\n| model GB | peak RSS GB |\n|---|---|")
    peaks = []
    for layers in options.flat:
        trio = write_trio(folder / f"flat{layers}", layers)
        size = (trio / "base" / "model.safetensors").stat().st_size
        peaks.append(merge(trio, folder, "task_arithmetic").rss)
        print(f"| {size / 1e9:.2f} | {peaks[-1] / 1e9:.3f} |")
        shutil.rmtree(trio)
    if peaks:
        print(f"\nLargest over smallest: {max(peaks) / min(peaks):.3f}.")


def equality(folder: Path, options: argparse.Namespace) -> None:
    """Print how far the two outputs are apart, in units of the last place of bf16."""
    trio = write_trio(folder / "equal", 1)
    print("\n| method | elements that differ | largest difference in bf16 ulp |\n|---|---|---|")
    for method in GAINS:
        merge(trio, folder, method, keep=True)
        mergekit(options.mergekit, trio, folder, method, dtype="float32", keep=True)
        apart, largest, total = 0, 0, 0
        with (
            safe_open(folder / "out-ours" / "model.safetensors", "pt") as own,
            safe_open(next((folder / "out-mergekit").glob("*.safetensors")), "pt") as other,
        ):
            for name in own.keys():  # noqa: SIM118 (a file, not a dict)
                if "_proj" in name:
                    steps = ulps(own.get_tensor(name), other.get_tensor(name))
                    apart += int((steps > 0).sum())
                    largest = max(largest, int(steps.max()))
                    total += steps.numel()
        print(f"| {method} | {apart / total:.4%} | {largest} |")
        shutil.rmtree(folder / "out-ours")
        shutil.rmtree(folder / "out-mergekit")
    shutil.rmtree(trio)


def processes(folder: Path, options: argparse.Namespace) -> None:
    """Print two processes against one on a merge that decomposes matrices."""
    trio = write_trio(folder / "ranks", 4, hidden=1024, feed=2752, vocabulary=1000)
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.repeat):
        for count in walls:
            walls[count].append(merge(trio, folder, "iso_c", processes=count).wall)
    start = run([sys.executable, "-c", "import torch, ipmerge_core.merging"]).wall
    one, two = min(walls[1]), min(walls[2])
    print(
        f"\nIsotropic merging (a decomposition per matrix): one process {one:.1f} s, two "
        f"{two:.1f} s, ratio {two / one:.2f}, of which imports {start:.1f} s."
    )
    shutil.rmtree(trio)


# --- the tools ---


def merge(trio: Path, folder: Path, method: str, *, processes: int = 1, keep: bool = False) -> Cost:
    """Merge with this package, by its command line, in fresh processes."""
    plan, out = folder / "plan.json", folder / "out-ours"
    gains = GAINS.get(method)
    choice = [f"--set=mllm_weight={gains[0]}", f"--set=math_weight={gains[1]}"] if gains else []
    choice += ["--set=density=0.5"] if method == "ties" else []
    models = [f"--{role}={trio / role}" for role in ("mllm", "math", "base")]
    command = [sys.executable, "-m", "ipmerge_core"]
    run([*command, "plan", *models, f"--method={method}", *choice, "-o", str(plan)])
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        command = [sys.executable, *launcher, f"--nproc_per_node={processes}", "-m", "ipmerge_core"]
    cost = run([*command, "merge", str(plan), "-o", str(out), "--quiet"])
    manifest = json.loads((out / "ipmerge.json").read_text())
    assert manifest["processes"] == processes, "the launcher did not start what was asked for"
    if not keep:
        shutil.rmtree(out)
    return cost


def mergekit(
    tool: str, trio: Path, folder: Path, method: str, *, dtype: str = "bfloat16", keep: bool = False
) -> Cost:
    """Merge with mergekit, from a configuration with the same gains."""
    out, config = folder / "out-mergekit", folder / "mergekit.yml"
    density = ", density: 0.5" if method == "ties" else ""
    mllm, math = GAINS[method]
    scale = (
        "  normalize: false\n  int8_mask: false\n" if method == "ties" else "  normalize: false\n"
    )
    config.write_text(
        f"merge_method: {method}\nbase_model: {trio / 'base'}\nmodels:\n"
        f"- model: {trio / 'mllm'}\n  parameters: {{weight: {mllm}{density}}}\n"
        f"- model: {trio / 'math'}\n  parameters: {{weight: {math}{density}}}\n"
        f"parameters:\n{scale}dtype: {dtype}\nout_dtype: bfloat16\n"
    )
    cost = run([tool, str(config), str(out), "--no-copy-tokenizer"], threads=None)
    if not keep:
        shutil.rmtree(out)
    return cost


def floor(trio: Path, folder: Path) -> float:
    """Seconds to read the inputs and to write an output of the same size, with nothing between."""
    files = [str(trio / role / "model.safetensors") for role in ("base", "mllm", "math")]
    started = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    subprocess.run(["cp", files[0], str(folder / "copy")], check=True)
    seconds = time.perf_counter() - started
    (folder / "copy").unlink()
    return seconds


def run(command: list[str], threads: str | None = "1") -> Cost:
    """Run a command and its children to the end; its output is shown only if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = threads
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said}")
    return Cost(time.perf_counter() - started, _cpu(used), used.ru_maxrss * 1024)


def _cpu(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime


def best(costs: list[Cost]) -> Cost:
    """Least wall and processor time, largest memory."""
    return Cost(min(c.wall for c in costs), min(c.cpu for c in costs), max(c.rss for c in costs))


def shown(cost: Cost) -> str:
    """Three cells of the table."""
    return f"{cost.wall:.1f} | {cost.cpu:.1f} | {cost.rss / 1e9:.2f}"


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Steps between two bf16 tensors on the line of all bf16 numbers."""
    lines = []
    for tensor in (a, b):
        bits = tensor.view(torch.int16).to(torch.int32)
        lines.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (lines[0] - lines[1]).abs()


# --- the models ---


def write_trio(
    folder: Path, layers: int, hidden: int = HIDDEN, feed: int = FEED, vocabulary: int = VOCABULARY
) -> Path:
    """Write base, mllm and math: the same random base with different noise on every matrix."""
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        for name in "qkvo":
            shapes[f"{block}self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{block}mlp.gate_proj.weight"] = (feed, hidden)
        shapes[f"{block}mlp.up_proj.weight"] = (feed, hidden)
        shapes[f"{block}mlp.down_proj.weight"] = (hidden, feed)
        shapes[f"{block}input_layernorm.weight"] = (hidden,)
        shapes[f"{block}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": feed, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(1 << 24, generator=generator)
    for role, seed in (("base", None), ("mllm", 2), ("math", 3)):
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text(json.dumps(config))
        weights = {
            name: _weight(pool, shape, n, seed) for n, (name, shape) in enumerate(shapes.items())
        }
        save_file(weights, folder / role / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weight(
    pool: torch.Tensor, shape: tuple[int, ...], number: int, seed: int | None
) -> torch.Tensor:
    """Cut a weight from a pool of random numbers; a fine-tune adds others, a twentieth as large."""

    def cut(offset: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        start = offset * 7919 % (pool.numel() // 2)
        rows = -(-count // (pool.numel() // 2))
        return pool[start : start + pool.numel() // 2].repeat(rows)[:count].view(shape)

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = 0.02 * cut(number)
    if seed is not None:
        weight = weight + 0.001 * cut(number + 1000 * seed)
    return weight.to(torch.bfloat16)


if __name__ == "__main__":
    main()
