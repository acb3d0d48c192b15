"""Compare merging with mergekit 0.1.5 and with plain file copies, on synthetic models.

    python benchmarks/bench_merge.py --mergekit /path/to/mergekit-yaml

Writes a base and two fine-tunes (Llama-shaped, bf16) below --folder, merges them with each tool in
turn in fresh processes, and prints wall time, peak memory, and ratios as Markdown tables. Runs are
alternated and the minimum is reported, so that other load affects both equally. Without --mergekit
only the figures of this package are printed. Everything written is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from report import machine, table

if TYPE_CHECKING:
    import torch  # imported where it is used: what a parent holds counts as its child's peak

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
    parser.add_argument("--mergekit", help="the mergekit-yaml command of a separate environment")
    parser.add_argument("--folder", default="bench-merge", help="scratch space, about 10 GB")
    parser.add_argument("--layers", type=int, default=12, help="12 make 0.74 B parameters")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--flat", type=int, nargs="*", default=[3, 38], help="layers to compare")
    parser.add_argument(
        "--methods",
        nargs="*",
        default=list(GAINS),
        help="names, or elementwise: all methods without data or decompositions",
    )
    parser.add_argument("--skip", nargs="*", default=[], help="speed, flat, equal, ranks")
    parser.add_argument("--write", nargs=6, help="only write models: folder, sizes, dtype")
    options = parser.parse_args()
    if options.write:
        trio, layers, hidden, feed, vocabulary, dtype = options.write
        write_trio(Path(trio), int(layers), int(hidden), int(feed), int(vocabulary), dtype)
        return
    if options.methods == ["elementwise"]:
        options.methods = elementwise_methods()
    print(machine())
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
    trio = written(folder / "trio", options.layers)
    size = (trio / "base" / "model.safetensors").stat().st_size
    ours: dict[str, list[Cost]] = {}
    theirs: dict[str, list[Cost]] = {}
    floors = []
    for _ in range(options.repeat):
        for method in options.methods:
            ours.setdefault(method, []).append(merge(trio, folder, method))
            floors.append(floor(trio, folder))
            if options.mergekit and method in GAINS:
                theirs.setdefault(method, []).append(
                    mergekit(options.mergekit, trio, folder, method)
                )
    bare = run([sys.executable, "-c", "import torch, ipmerge_core.merging.merge"])
    least = min(floors)
    print(f"\nBase and two fine-tunes of {size / 1e9:.2f} GB, minimum of {options.repeat}.\n")
    rows = []
    for method in options.methods:
        own = best(ours[method])
        other = best(theirs[method]) if method in theirs else None
        ratios = [f"{own.wall / other.wall:.3f}", f"{own.rss / other.rss:.3f}"] if other else []
        rows.append([method, "IPMerge", *shown(own), *(ratios or ["-", "-"])])
        if other:
            rows.append([method, "mergekit 0.1.5", *shown(other), "1", "1"])
    head = ["method", "tool", "wall s", "cpu s", "peak RSS GB", "wall ratio", "RSS ratio"]
    print(table(head, rows))
    first = options.methods[0]
    own = best(ours[first])
    print(
        f"\nLower bound, `cat` of the inputs and `cp` of the output: {least:.2f} s; {first} "
        f"takes {own.wall / least:.1f} times as long. Interpreter with imports: "
        f"{bare.wall:.1f} s, {bare.rss / 1e9:.2f} GB, so the merge itself adds "
        f"{(own.rss - bare.rss) / 1e9:.2f} GB."
    )
    if len(options.methods) > 1:
        print(f"\nWall time relative to {first}, with and without imports:\n")
        print(table(["method", "wall s", "ratio", "without imports"], ratios_to(own, ours, bare)))
    shutil.rmtree(trio)


def ratios_to(own: Cost, ours: dict[str, list[Cost]], bare: Cost) -> list[list[str]]:
    """Compare every method's wall time with one method's."""
    rows = []
    for method, costs in ours.items():
        wall = best(costs).wall
        merging = (wall - bare.wall) / max(own.wall - bare.wall, 1e-9)
        rows.append([method, f"{wall:.1f}", f"{wall / own.wall:.2f}", f"{merging:.2f}"])
    return rows


def elementwise_methods() -> list[str]:
    """List them, task arithmetic first, asked in a process of its own: it imports torch."""
    code = (
        "from ipmerge_core import METHODS\n"
        "print(*[n for n, m in METHODS.items() if not m.matrixwise and m.data is None])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return sorted(said.stdout.split(), key=lambda name: name != "task_arithmetic")


def flatness(folder: Path, options: argparse.Namespace) -> None:
    """Print the peak memory of task arithmetic for models of different size."""
    rows, peaks = [], []
    for layers in options.flat:
        trio = written(folder / f"flat{layers}", layers)
        size = (trio / "base" / "model.safetensors").stat().st_size
        peaks.append(merge(trio, folder, "task_arithmetic").rss)
        rows.append([f"{size / 1e9:.2f}", f"{peaks[-1] / 1e9:.3f}"])
        shutil.rmtree(trio)
    if peaks:
        print("\n" + table(["model GB", "peak RSS GB"], rows))
        print(f"\nLargest over smallest: {max(peaks) / min(peaks):.3f}.")


def equality(folder: Path, options: argparse.Namespace) -> None:
    """Print how far the two outputs are apart, in units of the last place of bf16.

    On fp32 models: differences of bf16 weights have many equal magnitudes. The unit is that of the
    larger of the result and the base, since a result near zero is a difference of two larger
    numbers. Even in fp32 a few magnitudes equal the trim's threshold. Both tools keep the same
    number of them; mergekit those that an unstable sort puts first, we the first in the matrix.
    """
    from safetensors import safe_open

    trio = written(folder / "equal", 1, dtype="float32")
    rows = []
    for method in (name for name in options.methods if name in GAINS):
        merge(trio, folder, method, keep=True)
        mergekit(options.mergekit, trio, folder, method, dtype="float32", keep=True)
        apart, tied, largest, total = 0, 0, 0.0, 0
        with (
            safe_open(trio / "base" / "model.safetensors", "pt") as base,
            safe_open(trio / "mllm" / "model.safetensors", "pt") as mllm,
            safe_open(trio / "math" / "model.safetensors", "pt") as math_model,
            safe_open(folder / "out-ours" / "model.safetensors", "pt") as own,
            safe_open(next((folder / "out-mergekit").glob("*.safetensors")), "pt") as other,
        ):
            for name in own.keys():  # noqa: SIM118 (a file, not a dict)
                if "_proj" in name:
                    root = base.get_tensor(name)
                    steps = ulps(own.get_tensor(name), other.get_tensor(name), root)
                    changes = [file.get_tensor(name) - root for file in (mllm, math_model)]
                    apart += int((steps > 1).sum())
                    tied += int(((steps > 1) & at_a_threshold(changes, 0.5)).sum())
                    largest = max(largest, float(steps.max()))
                    total += steps.numel()
        rows.append([method, f"{apart} of {total}", str(tied), f"{largest:.3f}"])
        shutil.rmtree(folder / "out-ours")
        shutil.rmtree(folder / "out-mergekit")
    head = [
        "method",
        "elements more than one bf16 ulp apart",
        "of which a magnitude equals the trim's threshold",
        "largest difference in bf16 ulp",
    ]
    print("\n" + table(head, rows))
    shutil.rmtree(trio)


def at_a_threshold(changes: list[torch.Tensor], density: float) -> torch.Tensor:
    """Mark elements of which one model's change is as large as the smallest that is kept."""
    marks = changes[0].new_zeros(changes[0].shape).bool()
    for change in changes:
        sizes = change.abs()
        kept = max(1, int(density * sizes.numel()))
        marks |= sizes == sizes.flatten().kthvalue(sizes.numel() - kept + 1).values
    return marks


def processes(folder: Path, options: argparse.Namespace) -> None:
    """Print two processes against one on a merge that decomposes matrices."""
    trio = written(folder / "ranks", 16, hidden=1024, feed=2752, vocabulary=1000)
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.repeat):
        for count in walls:
            walls[count].append(merge(trio, folder, "iso_c", processes=count).wall)
    start = run([sys.executable, "-c", "import torch, ipmerge_core.merging.merge"]).wall
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
    mllm, expert = GAINS[method]
    scale = (
        "  normalize: false\n  int8_mask: false\n" if method == "ties" else "  normalize: false\n"
    )
    config.write_text(
        f"merge_method: {method}\nbase_model: {trio / 'base'}\nmodels:\n"
        f"- model: {trio / 'mllm'}\n  parameters: {{weight: {mllm}{density}}}\n"
        f"- model: {trio / 'math'}\n  parameters: {{weight: {expert}{density}}}\n"
        f"parameters:\n{scale}dtype: {dtype}\nout_dtype: {dtype}\n"
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


def shown(cost: Cost) -> list[str]:
    """Three cells of the table."""
    return [f"{cost.wall:.1f}", f"{cost.cpu:.1f}", f"{cost.rss / 1e9:.2f}"]


def ulps(own: torch.Tensor, other: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Difference of two results in units of the last of bf16's eight significant bits."""
    largest = own.abs().maximum(other.float().abs()).maximum(base.abs())
    unit = 2.0 ** (largest.log2().floor() - 7)
    return ((own - other.float()).abs() / unit).nan_to_num(0.0)


# --- the models ---


def written(
    folder: Path,
    layers: int,
    hidden: int = HIDDEN,
    feed: int = FEED,
    vocabulary: int = VOCABULARY,
    dtype: str = "bfloat16",
) -> Path:
    """Write a trio in a process of its own."""
    sizes = [str(size) for size in (layers, hidden, feed, vocabulary)]
    run([sys.executable, __file__, "--write", str(folder), *sizes, dtype])
    return folder


def write_trio(
    folder: Path, layers: int, hidden: int, feed: int, vocabulary: int, dtype: str
) -> None:
    """Write base, mllm and math: the same random base with different noise on every matrix."""
    import torch
    from safetensors.torch import save_file

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
        "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": dtype,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(1 << 25, generator=generator)
    for role, seed in (("base", None), ("mllm", 2), ("math", 3)):
        (folder / role).mkdir(parents=True)
        (folder / role / "config.json").write_text(json.dumps(config))
        weights = {
            name: _weight(pool, shape, number, seed).to(getattr(torch, dtype))
            for number, (name, shape) in enumerate(shapes.items())
        }
        save_file(weights, folder / role / "model.safetensors", metadata={"format": "pt"})


def _weight(
    pool: torch.Tensor, shape: tuple[int, ...], number: int, seed: int | None
) -> torch.Tensor:
    """Cut a weight from a pool of random numbers; a fine-tune adds others, a twentieth as large."""

    def cut(offset: int) -> torch.Tensor:
        count, half = math.prod(shape), pool.numel() // 2
        start = offset * 7919 % half
        return pool[start : start + half].repeat(-(-count // half))[:count].view(shape)

    if len(shape) == 1:
        return pool.new_ones(shape)
    weight = 0.02 * cut(number)
    return weight if seed is None else weight + 0.001 * cut(number + 1000 * seed)


if __name__ == "__main__":
    main()
