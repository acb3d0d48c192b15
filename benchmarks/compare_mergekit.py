"""The same recipe by mergekit and by us: the largest difference, method by method.

    python benchmarks/compare_mergekit.py --mergekit /path/to/mergekit-yaml [--record FILE]

mergekit 0.1.5 needs an environment of its own (its pins do not agree with ours); make one from
requirements-bench.txt and give the path of its `mergekit-yaml`. Both merge one tiny random family
of Llama shape in fp32. Methods that draw random masks are left out: both are right and no two draws
agree. With --record the models and what mergekit made of them are kept in one small file, which
`tests/test_mergekit.py` compares with in every run of the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from report import machine, table
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.planning.mergekit import export_recipe

CHOICES: list[dict[str, Any]] = [
    {"method": "task_arithmetic", "mllm_weight": 0.9, "math_weight": 0.4},
    {"method": "task_arithmetic", "math_weight": 1.0, "layer_gains": (0.0, 0.5, 1.0)},
    {"method": "task_arithmetic", "math_weight": 0.3, "experts": 2},
    {"method": "ties", "density": 0.5, "math_weight": 0.4},
    {"method": "ties", "mllm_density": 0.9, "math_density": 0.3, "normalize": True, "scale": 0.8},
    {"method": "ties", "density": 0.5, "math_weight": 0.8, "experts": 2},
    {"method": "breadcrumbs", "density": 0.8, "gamma": 0.05},
    {"method": "breadcrumbs", "mllm_density": 1.0, "math_density": 0.6, "gamma": 0.1},
    {"method": "dare_linear", "density": 1.0, "rescale": "l1"},
    {"method": "dare_ties", "density": 1.0, "rescale": "none", "mllm_weight": 0.8},
    {"method": "della", "density": 1.0, "rescale": "none"},
    {"method": "sce"},
    {"method": "sce", "select_topk": 0.3},
    {"method": "linear", "alpha": 0.75},
    {"method": "linear", "mllm_weight": 0.6, "math_weight": 0.6, "normalize": False},
    {"method": "slerp", "t": 0.25},
    {"method": "nuslerp", "t": 0.25},
    {"method": "nuslerp", "t": 0.25, "of": "weights"},
    {"method": "nuslerp", "t": 0.25, "per": "row"},
    {"method": "nuslerp", "t": 0.25, "per": "column"},
    {"method": "karcher"},
    {"method": "karcher", "experts": 2},
]
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4,
    "intermediate_size": 6, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 6, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "hidden_act": "silu", "torch_dtype": "float32", "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
ROLES = ("base", "mllm", "math", "math_2")


def main() -> None:
    """Print the table, and record what mergekit made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", required=True, help="path of mergekit-yaml")
    parser.add_argument("--record", metavar="FILE", help="keep models and results, safetensors")
    options = parser.parse_args()
    print(f"{machine()}\n")
    models = random_models()
    recorded = {role: flat(models[role]) for role in ROLES}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, choice in enumerate(CHOICES):
            folder = Path(name) / str(number)
            ours, recipe = merge(choice, models, folder)
            theirs = merge_by_mergekit(options.mergekit, recipe, folder)
            recorded[str(number)] = flat(theirs)
            rows.append([words_of(choice), *differences(choice, ours, theirs, models["mllm"])])
    print(table(["plan", "largest difference", "largest change of a weight"], rows))
    if options.record:
        about = {
            "made_by": "mergekit 0.1.5",
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "command": "python benchmarks/compare_mergekit.py --mergekit .. --record ..",
            "choices": json.dumps(CHOICES),
        }
        save_file(recorded, options.record, about)


def random_models() -> dict[str, dict[str, torch.Tensor]]:
    """Make a base and three fine-tunes of it: weights by role and name."""
    generator = torch.Generator().manual_seed(0)
    models: dict[str, dict[str, torch.Tensor]] = {}
    for role in ROLES:
        models[role] = {}
        for name, shape in shapes().items():
            noise = torch.randn(shape, generator=generator)
            base = models["base"][name] if role != "base" else 0.2 * noise
            models[role][name] = base if role == "base" else base + 0.02 * noise
    return models


def shapes() -> dict[str, tuple[int, ...]]:
    """List the tensors of a Llama of this configuration."""
    hidden, feed, vocabulary = 4, 6, 6
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(3):
        block = f"model.layers.{layer}."
        for letter, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            found[f"{block}self_attn.{letter}_proj.weight"] = (rows, hidden)
        found[f"{block}mlp.gate_proj.weight"] = (feed, hidden)
        found[f"{block}mlp.up_proj.weight"] = (feed, hidden)
        found[f"{block}mlp.down_proj.weight"] = (hidden, feed)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{block}{norm}.weight"] = (hidden,)
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Put the tensors behind each other, in the order of `shapes`."""
    return torch.cat([weights[name].flatten() for name in shapes()])


def unflat(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Undo `flat`."""
    sizes = [math.prod(shape) for shape in shapes().values()]
    parts = values.split(sizes)
    return {
        name: part.view(shape).clone()
        for (name, shape), part in zip(shapes().items(), parts, strict=True)
    }


def merge(
    choice: dict[str, Any], models: dict[str, dict[str, torch.Tensor]], folder: Path
) -> tuple[dict[str, torch.Tensor], str]:
    """Merge with this package; return the weights and the same plan as a recipe."""
    for role, weights in models.items():
        (folder / role).mkdir(parents=True)
        save_file(weights, folder / role / "model.safetensors", {"format": "pt"})
        (folder / role / "config.json").write_text(json.dumps(CONFIG))
    experts = [folder / "math", folder / "math_2"][: choice.get("experts", 1)]
    pair = ipm.open_pair(folder / "mllm", experts, folder / "base")
    plan = ipm.make_plan(pair, **{name: v for name, v in choice.items() if name != "experts"})
    ipm.merge(plan, folder / "ours")
    return load_file(folder / "ours" / "model.safetensors"), export_recipe(plan)


def merge_by_mergekit(program: str, recipe: str, folder: Path) -> dict[str, torch.Tensor]:
    """Merge with mergekit."""
    (folder / "recipe.yaml").write_text(recipe)
    command = [program, "recipe.yaml", "theirs", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    found: dict[str, torch.Tensor] = {}
    for shard in sorted((folder / "theirs").glob("*.safetensors")):
        found |= load_file(shard)
    return found


def differences(
    choice: dict[str, Any],
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    mllm: dict[str, torch.Tensor],
) -> list[str]:
    """Compare every tensor, or the matrices where mergekit cannot be limited to them."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    names = [n for n in ours if "_proj" in n or choice["method"] not in ("sce", "karcher")]
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in names)
    change = max(float((ours[name] - mllm[name]).abs().max()) for name in names)
    return [f"{apart:.1e}", f"{change:.1e}"]


def words_of(choice: dict[str, Any]) -> str:
    """Write a choice in one cell."""
    words = ", ".join(f"{key}={value}" for key, value in choice.items() if key != "method")
    return f"{choice['method']} {words}".strip()


if __name__ == "__main__":
    main()
