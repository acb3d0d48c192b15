"""Open, merge and load a tiny model of every family, and write the table of docs/families.md.

Run: python benchmarks/families.py [FAMILY ...] [--write]

"merges right": task arithmetic with half the expert's task vector, for all matrices; each parameter
of the decoder is compared in memory with mllm + 0.5 (math - base), or for all others bit by bit
with the MLLM's, by the names that transformers gives to parameters.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from chat_models import chat_support
from family_models import FAMILIES, TO_TEXT, TOWER, Family, build, decoder_of, quiet, rename
from huggingface_hub.errors import StrictDataclassError
from report import machine, table

import ipmerge_core as ipm
from ipmerge_core.errors import IPMergeError
from ipmerge_core.models.matrix_kinds import is_expert

DOC = Path(__file__).parents[1] / "docs" / "families.md"
START, STOP = "<!-- made by benchmarks/families.py -->", "<!-- end of the table -->"
HEAD = ("family", "text model", "opens, matrices", "merges right", "loads", "LoRA loads", "chats")
TOLERANCE = 2e-6
_LAST = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "qkv_proj", "input_linear", "output_linear", "w1", "w2", "w3")
_UNBUILT = (AttributeError, ImportError, RuntimeError, TypeError, ValueError)
_LONGEST = 110  # characters of a cause in the table


class Outcome(NamedTuple):
    """The parameters of a merged decoder that should have merged, and those that are wrong."""

    merged: tuple[str, ...]
    wrong: tuple[str, ...]


def merge_of(folders: Mapping[str, Path], out: Path, modules: str) -> None:
    """Merge half the expert's task vector into the model."""
    pair = ipm.open_pair(folders["mllm"], folders["math"], folders["base"])
    plan = ipm.make_plan(pair, "task_arithmetic", math_weight=0.5, modules=modules)
    ipm.merge(plan, out)


def compare_by_hand(
    family: Family, folders: Mapping[str, Path], out: Path, modules: str
) -> Outcome:
    """Compare every parameter of the merged model with the formula, or with the MLLM's."""
    text = {role: load_text(folders[role]) for role in ("base", "math")}
    mllm, merged = load(family, folders["mllm"]), load(family, out)
    base, math = (named_in_layers(text[role]) for role in ("base", "math"))
    own = named_in_layers(mllm)
    wanted, wrong = [], []
    inside = named_in_layers(merged)
    for name, found in inside.items():
        expected = own[name]
        shared = name in base and base[name].shape == found.shape
        if shared and should_merge(name, found, modules):
            expected = expected + 0.5 * (math[name] - base[name])
            wanted.append(name)
            right = torch.allclose(found, expected, rtol=0, atol=TOLERANCE)
        else:
            right = torch.equal(found, expected)
        if not right:
            wrong.append(name)
    known = {parameter.data_ptr() for parameter in inside.values()}
    before = dict(mllm.named_parameters())
    for name, parameter in merged.named_parameters():
        if parameter.data_ptr() not in known and not torch.equal(parameter, before[name]):
            wrong.append(name)
    return Outcome(tuple(wanted), tuple(wrong))


def should_merge(name: str, parameter: torch.Tensor, modules: str) -> bool:
    """Whether a parameter of a layer is one that a plan with these modules merges."""
    path = name.removesuffix(".weight").split(".")
    if parameter.ndim == 3:
        return "experts" in path or path[-1] in ("input_linear", "output_linear")
    router = "router" in path or path[-1] in ("gate", "shared_expert_gate")
    if parameter.ndim != 2 or not name.endswith(".weight"):
        return False
    if modules != "projections":
        return modules == "all-and-router" or not router
    return path[-1] in (*_LAST, *_FUSED) or path[-2:] == ["self_attn", "out_proj"]


def named_in_layers(model: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Return the parameters of the text layers by text layer and name; no cross-attention."""
    crossed = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    layers = [layer for n, layer in enumerate(decoder_of(model).layers) if n not in crossed]
    return {
        f"{n}.{name}": parameter.data
        for n, layer in enumerate(layers)
        for name, parameter in layer.named_parameters()
    }


def load_text(folder: Path) -> Any:  # noqa: ANN401
    """Load a text model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load(family: Family, folder: Path) -> Any:  # noqa: ANN401
    """Load a multimodal model, or the text model in a tower; no tensor may be missing or left."""
    import transformers

    found = getattr(transformers, family.model)
    if family.config == TOWER:
        found = transformers.AutoModelForCausalLM
        copy = Path(tempfile.mkdtemp()) / "text"
        shutil.copytree(folder, copy)
        rename(copy, TO_TEXT, {})
        folder = copy
    model, info = found.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    left = [*info["missing_keys"], *info["unexpected_keys"]]
    assert not left, f"tensors are missing or not used: {left[:3]}"
    return model


# --- one row of the table ---


def row_of(name: str, family: Family, folder: Path) -> list[str]:
    """Build a family and try everything with it; a cell is "yes", or the cause."""
    text = family.text_config.removesuffix("Config").removesuffix("Text")
    try:
        folders = build(family, folder)
    except (*_UNBUILT, StrictDataclassError) as error:
        return [name, text, cause(error).replace("**no**", "not built"), *[""] * 4]
    out = folder / "out"
    opens = tried(lambda: opened(folders))
    if opens.startswith("**no**"):
        return [name, text, opens, *[""] * 4]
    merged = tried(lambda: merge_of(folders, out, "all-and-router"))
    right = merged if merged != "yes" else tried(lambda: judged(family, folders, out))
    loads = tried(lambda: load(family, out) and None) if merged == "yes" else ""
    row = [name, text, opens, right, loads]
    if family.config == TOWER:  # no class loads these names
        return [*row, "text tower", "text tower"]
    return [*row, tried(lambda: adapt(family, folders)), tried(lambda: chat(out))]


def opened(folders: Mapping[str, Path]) -> str:
    """Open a pair and return the number of its matrices and the share of the merged elements."""
    pair = ipm.open_pair(folders["mllm"], folders["math"], folders["base"])
    return f"yes, {len(pair.matrices)}"


def judged(family: Family, folders: Mapping[str, Path], out: Path) -> None:
    """Raise AssertionError naming a parameter that is not what it should be."""
    found = compare_by_hand(family, folders, out, "all-and-router")
    assert not found.wrong, f"{len(found.wrong)} differ, {found.wrong[0]} first"


def adapt(family: Family, folders: Mapping[str, Path]) -> str:
    """Export IP-Merging's update as an adapter and load it with PEFT."""
    from peft import PeftModel

    pair = ipm.open_pair(folders["mllm"], folders["math"], folders["base"])
    mixture = any(is_expert(matrix.module) for matrix in pair.matrices)
    scope = {"exclude": "[.]experts"} if mixture else {}
    plan = ipm.make_plan(ipm.analyse(pair), similarity_threshold=0.0, **scope)
    out = folders["mllm"].parent / "adapter"
    ipm.export_adapter(plan, out)
    PeftModel.from_pretrained(load(family, folders["mllm"]), out)
    return "yes, without experts" if mixture else "yes"


def chat(out: Path) -> str:
    """Return whether models of this type chat without torchvision, or why not."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    found = chat_support(config["model_type"])
    return "yes" if found == "chats" else f"**no**: {found}"


def tried(run: Callable[[], str | None]) -> str:
    """Return "yes" or what a trial returns; otherwise the cause of its failure."""
    try:
        return run() or "yes"
    except (IPMergeError, AssertionError, RuntimeError, ValueError, TypeError, KeyError) as error:
        return cause(error)


def cause(error: Exception) -> str:
    """Return why something failed, in one cell of a table."""
    words = " ".join(str(error).split()).replace("|", "/")
    # Folders differ from run to run.
    words = re.sub(rf"{re.escape(tempfile.gettempdir())}[\w/]*/", "", words)
    words = re.sub(r"'[^' ]*/(\w+)'", r"'\1'", words)
    short = words[:_LONGEST] + "..." * (len(words) > _LONGEST)
    return f"**no**: {type(error).__name__}: {short}"


def main() -> int:
    """Print the table, and write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names; by default all")
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    rows = []
    for name in args.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(name, FAMILIES[name], Path(folder)))
        print(" | ".join(rows[-1]), flush=True)
    made = f"{machine()}\n\n{table(HEAD, rows)}\n\n{summary(rows)}"
    print(f"\n{made}")
    if args.write:
        page = DOC.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(STOP)[2]
        DOC.write_text(f"{before}{START}\n\n{made}\n\n{STOP}{after}", encoding="utf-8")
    return 0


def summary(rows: list[list[str]]) -> str:
    """Count the families that open, merge right and load."""
    opened, right, loads = (
        sum(row[column].startswith("yes") for row in rows) for column in (2, 3, 4)
    )
    return f"{len(rows)} families: {opened} open, {right} merge right, {loads} load."


if __name__ == "__main__":
    raise SystemExit(main())
