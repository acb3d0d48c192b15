"""The same recipe by mergekit and by us: the largest difference, method by method.

    python benchmarks/compare_mergekit.py --mergekit /path/to/mergekit-yaml

mergekit 0.1.5 needs an environment of its own (its pins do not agree with ours); give the path of
its `mergekit-yaml` there. Both merge one tiny random trio of Llama shape in fp32. Methods that draw
random masks are left out: both are right and no two draws agree.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, table
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import ipmerge_core as ipm
from ipmerge_core.recipes import export_recipe

CHOICES: list[dict[str, object]] = [
    {"method": "task_arithmetic", "mllm_weight": 0.9, "math_weight": 0.4},
    {"method": "task_arithmetic", "math_weight": 1.0, "layer_gains": (0.0, 0.5, 1.0)},
    {"method": "ties", "density": 0.5, "math_weight": 0.4},
    {"method": "ties", "mllm_density": 0.9, "math_density": 0.3, "normalize": True, "scale": 0.8},
    {"method": "breadcrumbs", "density": 0.8, "gamma": 0.05},
    {"method": "linear", "alpha": 0.75},
    {"method": "slerp", "t": 0.25},
    {"method": "nuslerp", "t": 0.25},
    {"method": "nuslerp", "t": 0.25, "of": "weights"},
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", required=True, help="path of mergekit-yaml")
    program = parser.parse_args().mergekit
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        pair = write_trio(Path(folder))
        rows = [compare(program, Path(folder) / str(i), pair, c) for i, c in enumerate(CHOICES)]
    print(table(["plan", "largest difference", "largest change of a weight"], rows))


def compare(
    program: str, folder: Path, pair: ipm.ModelPair, choice: dict[str, object]
) -> list[str]:
    """Merge by both and compare every tensor."""
    folder.mkdir()
    plan = ipm.make_plan(pair, **choice)  # type: ignore[arg-type]
    (folder / "recipe.yaml").write_text(export_recipe(plan))
    ipm.merge(plan, folder / "ours")
    command = [program, "recipe.yaml", "theirs", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    ours = load_file(folder / "ours" / "model.safetensors")
    theirs = {}
    for shard in (folder / "theirs").glob("*.safetensors"):
        theirs |= load_file(shard)
    mllm = load_file(Path(pair.mllm.id) / "model.safetensors")
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    change = max(float((ours[name] - mllm[name]).abs().max()) for name in ours)
    words = ", ".join(f"{key}={value}" for key, value in choice.items() if key != "method")
    return [f"{choice['method']} {words}", f"{apart:.1e}", f"{change:.1e}"]


def write_trio(folder: Path) -> ipm.ModelPair:
    """Write a base and two fine-tunes of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, dtype="float32",
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    start = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    for role in ("mllm", "math"):
        with torch.no_grad():
            for name, weight in base.named_parameters():
                weight.copy_(start[name] + 0.002 * torch.randn_like(weight))
        base.save_pretrained(folder / role)
    return ipm.open_pair(folder / "mllm", folder / "math", folder / "base")


if __name__ == "__main__":
    main()
