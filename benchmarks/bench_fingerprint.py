"""Measure what it costs to notice that the weights of a model have changed.

    python benchmarks/bench_fingerprint.py [--gigabytes 2]

Writes a model of bf16 matrices below --folder and prints the time of its fingerprint (2 blocks of
every tensor), of `Checkpoint.content` (16 blocks), and of hashing all bytes, with and without the
file in the page cache, and how many rewritten eighths of a matrix each of them notices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import machine, table
from safetensors.torch import save_file

from ipmerge_core.models.checkpoint import Checkpoint

ROWS, COLUMNS = 2048, 2048  # 8 MB in bf16


def all_bytes(model: Checkpoint) -> str:
    """Hash every byte of every tensor."""
    digest = hashlib.sha256()
    for name in model.tensors:
        for piece in model.iter_bytes(name):
            digest.update(piece)
    return digest.hexdigest()


WAYS: dict[str, Callable[[Checkpoint], object]] = {
    "fingerprint, 2 blocks": lambda model: model.fingerprint,
    "content, 16 blocks": lambda model: model.content,
    "all bytes, SHA-256": all_bytes,
}


def write_model(folder: Path, count: int) -> None:
    """Write a model of that many random matrices, on the disk itself."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{n}.mlp.up_proj.weight": torch.randn(
            ROWS, COLUMNS, generator=generator
        ).bfloat16()
        for n in range(count)
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with (folder / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())


def seconds(folder: Path, way: Callable[[Checkpoint], object], *, cached: bool) -> float:
    """Time one way to hash a model, with or without its file in the page cache."""
    if not cached:
        with (folder / "model.safetensors").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    model = Checkpoint.open(folder)
    started = time.perf_counter()
    way(model)
    return time.perf_counter() - started


def noticed(folder: Path, way: Callable[[Checkpoint], object]) -> int:
    """Rewrite each eighth of the first matrix and count those that change the value."""
    model = Checkpoint.open(folder)
    before, spec = way(model), next(iter(model.tensors.values()))
    eighth, found = spec.nbytes // 8, 0
    for part in range(8):
        with (folder / spec.shard).open("r+b") as file:
            file.seek(spec.start + part * eighth)
            old = file.read(eighth)
            for data in (bytes(byte ^ 1 for byte in old), old):
                file.seek(spec.start + part * eighth)
                file.write(data)
                file.flush()
                found += way(Checkpoint.open(folder)) != before
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    count = max(1, round(options.gigabytes * 1e9 / (2 * ROWS * COLUMNS)))
    small = folder / "one"
    small.mkdir()
    try:
        write_model(folder, count)
        write_model(small, 1)
        rows = [
            [
                name,
                f"{seconds(folder, way, cached=False):.2f} s",
                f"{seconds(folder, way, cached=True):.2f} s",
                f"{noticed(small, way)} of 8",
            ]
            for name, way in WAYS.items()
        ]
        print(f"{machine()}; {count} matrices, {count * 2 * ROWS * COLUMNS / 1e9:.1f} GB\n")
        head = ["hash of", "not cached", "cached", "rewritten eighths noticed"]
        print(table(head, rows))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
