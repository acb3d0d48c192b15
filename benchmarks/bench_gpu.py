"""Analyse and merge a pair with the shapes of Qwen2.5-7B on one GPU, compared with direct SVDs.

    python benchmarks/bench_gpu.py [--folder bench-gpu] [--layers 28]

Writes the decoders of a base and two fine-tunes of it (28 layers, 196 matrices, bf16, 13 GB each)
below --folder, analyses all matrices exactly, merges all of them by IP-Merging, and prints wall
seconds and peak memory as Markdown tables. Everything written is removed at the end. Needs a CUDA
device; otherwise nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from bench_spectrum import Times, speed_row, synthetic, timed
from report import machine, table

import ipmerge_core as ipm
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.runtime import devices
from ipmerge_core.runtime.pipeline import keep_freed_memory

HIDDEN, FEED, NARROW = 3584, 18944, 512
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (NARROW, HIDDEN),
    "self_attn.v_proj": (NARROW, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED, HIDDEN),
    "mlp.up_proj": (FEED, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED),
}
PER_SHARD = 7  # layers
FEW = 4  # layers of the pair on which numbers of streams are compared


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="bench-gpu", help="scratch space, 55 GB for 28 layers")
    parser.add_argument("--layers", type=int, default=28)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device available; nothing was measured.")
        return
    keep_freed_memory()  # as the command line does
    print(f"{machine(torch.cuda.get_device_name())}, torch {torch.__version__}\n")
    folder = Path(options.folder).absolute()
    folder.mkdir(parents=True)
    try:
        by_shape(options.layers)
        by_streams(written(folder / "few", FEW))
        shutil.rmtree(folder / "few")
        whole(written(folder / "whole", options.layers), folder / "merged")
    finally:
        shutil.rmtree(folder)


def by_shape(layers: int) -> None:
    """Both task vectors of a matrix of each shape, and what all matrices would take one by one."""
    print("Seconds for both task vectors of a matrix, one at a time\n")
    head = ["matrix", "naive", "selection", "x", "all values", "values, bases, P", "exact*", "x"]
    print(table(head, []), flush=True)
    every: list[Times] = []
    with torch.inference_mode():
        for shape in dict.fromkeys(SHAPES.values()):
            times = timed(synthetic(*shape, "cuda"), naive_repeats=2)
            every += [times] * (layers * list(SHAPES.values()).count(shape))
            print(speed_row(f"{shape[0]} x {shape[1]}", times), flush=True)
    summed = Times(*(sum(column) for column in zip(*every, strict=True)))
    print(speed_row(f"all {len(every)}", summed))
    print("\n* selection, all values of every matrix, bases and P for the selected third\n")
    print(
        f"Compute of an exact analysis and of merging all, the column before exact* twice: "
        f"{2 * summed.bases:.1f} s; bar 60 s\n"
    )


def by_streams(pair: ModelPair) -> None:
    """Time the analysis with one matrix at a time and with several."""
    rows = []
    ipm.analyse(pair, device="cuda")  # the files into the system's cache, the libraries loaded
    for count in (1, 2, 3, 4):
        devices.STREAMS = count
        seconds, memory = measured(lambda: ipm.analyse(pair, device="cuda"))
        rows.append([str(count), f"{seconds:.1f}", f"{memory:.1f}"])
    devices.STREAMS = 3
    print(f"Analysis of {FEW} layers by the number of concurrent matrices, one stream each\n")
    print(table(["streams", "seconds", "peak GiB on the GPU"], rows), end="\n\n", flush=True)


def whole(pair: ModelPair, out: Path) -> None:
    """Time the exact analysis and IP-Merging of every matrix, files included."""
    found: list[ipm.Analysis] = []
    analysing = measured(lambda: found.append(ipm.analyse(pair, device="cuda")))
    plan = ipm.make_plan(found[0], similarity_threshold=0.0)
    merging = measured(lambda: ipm.merge(plan, out, device="cuda"))
    both = (analysing[0] + merging[0], max(analysing[1], merging[1]))
    rows = [
        [name, f"{seconds:.1f}", f"{memory:.1f}"]
        for name, (seconds, memory) in (
            ("exact analysis", analysing),
            ("IP-Merging of all", merging),
            ("both", both),
        )
    ]
    size = sum(model.nbytes for _, model in pair.roles()) / 1e9
    print(
        f"All {len(pair.matrices)} matrices with their files: {size:.0f} GB read twice from the "
        f"page cache, {pair.mllm.nbytes / 1e9:.0f} GB written, hashed and read back\n"
    )
    print(table(["step", "seconds", "peak GiB on the GPU"], rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\nPeak memory of the process, excluding the GPU: {peak:.1f} GB.")


def measured(run: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds of a call, and the most memory that it took on the GPU, in GiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_reserved() / 2**30


# --- the models ---


def written(folder: Path, layers: int) -> ModelPair:
    """Write a base and two fine-tunes of it, in shards, and open them."""
    for role in ("base", "mllm", "math"):
        (folder / role).mkdir(parents=True)
        config = {"model_type": "qwen2", "hidden_size": HIDDEN, "num_hidden_layers": layers}
        (folder / role / "config.json").write_text(json.dumps(config))
        where: dict[str, str] = {}
        for first in range(0, layers, PER_SHARD):
            shard = f"model-{first:05}.safetensors"
            weights = dict(_weights(role, range(first, min(first + PER_SHARD, layers))))
            save_file(weights, folder / role / shard, metadata={"format": "pt"})
            where |= dict.fromkeys(weights, shard)
        index = {"metadata": {}, "weight_map": where}
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))
    return ipm.open_pair(folder / "mllm", folder / "math", folder / "base")


def _weights(role: str, layers: range) -> Iterator[tuple[str, torch.Tensor]]:
    """The base from one seed per matrix; a fine-tune adds strong directions and noise from its."""
    for layer in layers:
        for number, (module, (m, n)) in enumerate(SHAPES.items()):
            seed = 100 * layer + number
            weight = 0.02 * _normal(seed, m, n)
            if role != "base":
                own = seed + {"mllm": 10**6, "math": 2 * 10**6}[role]
                planted = _normal(own, m, 16) @ _normal(own + 10**7, 16, n)
                weight += 2e-4 * (planted / 4 + _normal(own + 2 * 10**7, m, n))
            yield f"model.layers.{layer}.{module}.weight", weight.bfloat16().cpu()


def _normal(seed: int, *size: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda")


if __name__ == "__main__":
    main()
