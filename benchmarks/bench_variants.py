"""Measure the variants of IP-Merging: their cost in an analysis, and previews against merged files.

    python benchmarks/bench_variants.py [--width 1024] [--skip cost previews]

The first table is the CPU time of comparing one matrix of a synthetic pair (as in
`bench_analysis.py`), with the updates off the MLLM's directions and truncated, and without. The
second merges the demo models with every variant, stored in fp32 and in bf16, and compares the
change of the files with the preview. The MLLM is stored in fp32 in both cases: a merged file in
bf16 is rounded once more, which no preview contains.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from bench_analysis import write_pair
from report import machine, table

import ipmerge_core as ipm
from ipmerge_core.analysis import comparison, update_norms
from ipmerge_core.models.pairing import ModelPair

DEMO = Path(__file__).parents[1] / "assets" / "demo"
VARIANTS: list[dict[str, Any]] = [
    {},
    {"gamma_norm": "max"},
    {"projector": "protect"},
    *({"projector": "complement", "energy": share} for share in (0.05, 0.5, 0.8, 0.95)),
    *({"ablation": "select_only", "math_energy": share} for share in (0.05, 0.5, 0.95)),
    {"budget": 0.01},
    {"projector": "complement", "budget": 0.01},
]
REPEATS = 3


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--skip", nargs="*", default=[], help="cost, previews")
    options = parser.parse_args()
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        if "cost" not in options.skip:
            head = ["matrix", "shape", "without, CPU s", "with, CPU s", "added"]
            place = Path(folder) / "pair"
            place.mkdir()
            pair = write_pair(place, options.width)
            print(table(head, list(costs(pair))), end="\n\n")
        if "previews" not in options.skip:
            head = ["variant", "stored", "preview", "files", "relative difference"]
            print(table(head, list(previews(Path(folder)))))


def costs(pair: ModelPair) -> Iterator[list[str]]:
    """Time the comparison of each kind of matrix, and of all."""
    total = [0.0, 0.0]
    seen = set()
    for matrix in pair.matrices:
        if matrix.module in seen:
            continue
        seen.add(matrix.module)
        weights = pair.read(matrix, range(len(pair.math)))

        def run() -> None:
            list(comparison.compare(matrix, weights, comparison.Options()))  # noqa: B023

        runs = [(plain(run), timed(run)) for _ in range(REPEATS)]
        found = [min(each) for each in zip(*runs, strict=True)]
        total = [a + b for a, b in zip(total, found, strict=True)]
        yield [matrix.module, " x ".join(map(str, matrix.shape)), *times(*found)]
    yield ["all", "", *times(*total)]


def times(without: float, whole: float) -> list[str]:
    """Format two times and the part that the second adds."""
    return [f"{without:.2f}", f"{whole:.2f}", f"{whole / without - 1:+.1%}"]


def plain(run: Any) -> float:  # noqa: ANN401
    """Time a comparison without the updates off the MLLM's directions."""
    nothing = mock.patch.object(
        update_norms, "protection", lambda mllm, _: torch.zeros_like(mllm.S, dtype=torch.float64)
    )
    with nothing, mock.patch.object(comparison, "_energy_ranks", return_value=()):
        return timed(run)


def timed(run: Any) -> float:  # noqa: ANN401
    """Return the CPU seconds of a call."""
    start = process_time()
    run()
    return process_time() - start


def previews(folder: Path) -> Iterator[list[str]]:
    """Merge the demo models with every variant and compare the change with the preview."""
    for dtype in (torch.float32, torch.bfloat16):
        models = [
            stored_as(DEMO / role, folder / f"{role}-{dtype}", kept)
            for role, kept in (("mllm", torch.float32), ("math", dtype), ("base", dtype))
        ]
        analysis = ipm.analyse(ipm.open_pair(*models))
        before = load_file(models[0] / "model.safetensors")
        for number, choice in enumerate(VARIANTS):
            plan = ipm.make_plan(analysis, similarity_threshold=0.0, **choice)
            out = folder / f"out-{dtype}-{number}"
            ipm.merge(plan, out)
            after = load_file(out / "model.safetensors")
            expected, found = plan.preview().relative_change, change(analysis, before, after)
            words = ", ".join(f"{name} {value}" for name, value in choice.items()) or "exact"
            name = str(dtype).removeprefix("torch.")
            apart = f"{abs(found / expected - 1):.1e}"
            yield [words, name, f"{expected:.4%}", f"{found:.4%}", apart]


def stored_as(model: Path, out: Path, dtype: torch.dtype) -> Path:
    """Copy a model with all weights in a dtype."""
    out.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            weights = {name: w.to(dtype) for name, w in load_file(file).items()}
            save_file(weights, out / file.name, {"format": "pt"})
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def change(
    analysis: ipm.Analysis, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> float:
    """Compute the relative change of the decoder's matrices in fp64."""
    moved = size = 0.0
    for record in analysis.records:
        old, new = (weights[record.mllm_name].double() for weights in (before, after))
        moved += float((new - old).square().sum())
        size += float(old.square().sum())
    return (moved / size) ** 0.5


if __name__ == "__main__":
    main()
