"""Results of every method for fixed inputs, with the version of its mathematics.

`python tests/method_results.py` writes tests/method_results.json anew. `test_method_results.py`
fails if a result differs under the same version: increase `version` in `@merge_method`, which
changes the digest of plans and thus what caches and resumed runs compare, then write the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ipmerge_core.methods import METHODS, MergeMethod

FILE = Path(__file__).with_name("method_results.json")
NAME = "model.layers.7.mlp.up_proj.weight"
SHAPE = (12, 8)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A base and two fine-tuned matrices in fp64, from a formula that no library computes."""
    rows = torch.arange(SHAPE[0], dtype=torch.float64)[:, None]
    columns = torch.arange(SHAPE[1], dtype=torch.float64)[None]
    base = torch.sin(rows * 3 + columns * 7)
    mllm = base + 0.05 * torch.sin(rows * columns + 1) + 0.02 * torch.cos(rows * 5 - columns)
    math = base + 0.04 * torch.cos(rows + columns * columns) - 0.03 * torch.sin(rows * columns + 2)
    return base, mllm, math


def supplied(method: MergeMethod, parameters: dict[str, Any]) -> dict[str, Any]:
    """Measurements for methods that need data."""
    columns, kind = torch.arange(SHAPE[1], dtype=torch.float64), method.data_for(parameters)
    if kind == "gram":
        grams = [
            torch.diag(1 + columns * step) + 0.1 * torch.cos(columns[:, None] - columns)
            for step in (0.5, 0.25)
        ]
        return {"mllm_gram": grams[0], "math_gram": [grams[1]]}
    if kind == "fisher":
        values = [(matrix * 10).square() for matrix in inputs()[1:]]
        return {"mllm_fisher": values[0], "math_fisher": [values[1]]}
    return {}


def choices() -> dict[str, tuple[str, dict[str, Any]]]:
    """By label a method and parameters: the defaults, and each choice and switch by itself."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for method in METHODS.values():
        found[method.name] = (method.name, {})
        for parameter in method.parameters:
            others = parameter.choices or ((True, False) if parameter.kind == "bool" else ())
            for value in others:
                if value != parameter.default:
                    label = f"{method.name} {parameter.name}={value}"
                    found[label] = (method.name, {parameter.name: value})
    return found


def result(name: str, parameters: dict[str, Any]) -> list[float]:
    """Three numbers of the merged change: its norm and two of its projections."""
    base, mllm, math = inputs()
    method = METHODS[name]
    merged = method(
        base, mllm, math, tensor_name=NAME, **parameters, **supplied(method, parameters)
    )
    change = (merged - base).reshape(-1)
    places = torch.arange(len(change), dtype=torch.float64)
    return [
        float(change.norm()),
        float(change @ torch.sin(places)),
        float(change @ torch.cos(places * 2)),
    ]


def results() -> dict[str, dict[str, Any]]:
    return {
        label: {"version": METHODS[name].version, "change": result(name, parameters)}
        for label, (name, parameters) in choices().items()
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(results(), indent=1) + "\n", encoding="utf-8")
