"""Hybrids, mixtures and new layouts: every tensor of a merged model is what the formula says.

Models are built from transformers' own classes and compared in memory, by the names that the
library gives to parameters, which this package does not use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from family_layouts import rewrite
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.errors import PairingError, PlanError
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.planning.mergekit import export_recipe

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from families import compare_by_hand, merge_of
from family_models import HYBRIDS, build

FILE = "model.safetensors"
DEFAULT, ALL = "projections", "all-and-router"
SAMPLE = sorted(HYBRIDS.keys() - {"qwen3_omni_moe_thinker", "gemma4"})  # quick ones
Folders = dict[str, Path]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    return cache(lambda name: build(HYBRIDS[name], tmp_path_factory.mktemp(name)))


def opened(folders: Folders, **others: Path) -> ipm.ModelPair:
    chosen = {**folders, **others}
    return ipm.open_pair(chosen["mllm"], chosen["math"], chosen["base"])


@pytest.mark.parametrize("name", SAMPLE)
def test_every_parameter_of_a_merge_is_the_formula_or_the_mllms(
    name: str, models: Any, tmp_path: Path
) -> None:
    folders = models(name)
    for modules in (DEFAULT, ALL) if name in ("qwen3_5", "llama4") else (ALL,):
        merge_of(folders, tmp_path / modules, modules)
        found = compare_by_hand(HYBRIDS[name], folders, tmp_path / modules, modules)
        assert found.wrong == ()
        assert found.merged


@pytest.mark.parametrize("name", ["qwen3_5_moe", "llama4", "gpt_oss"])
def test_a_spectral_method_changes_what_the_plan_selects_and_nothing_else(
    name: str, models: Any, tmp_path: Path
) -> None:
    folders = models(name)
    pair = opened(folders)
    plan = ipm.make_plan(ipm.analyse(pair), similarity_threshold=0.0)
    ipm.merge(plan, tmp_path / "out")
    merged, chosen = Checkpoint.open(tmp_path / "out"), {d.name for d in plan.selected}
    for matrix in pair.matrices:
        before, after = pair.mllm.read_matrix(matrix.mllm), merged.read_matrix(matrix.mllm)
        assert torch.equal(before, after) != (matrix.name in chosen)
    assert all(merged.read_bytes(name) == pair.mllm.read_bytes(name) for name in pair.kept)


def test_one_expert_can_be_chosen_by_name(models: Any, tmp_path: Path) -> None:
    pair = opened(models("llama4"))
    (gate, up) = (m for m in pair.matrices if m.layer == 1 and "gate_up_proj[2].T" in m.name)
    only = {m.name: "merge" if m is up else "keep" for m in pair.matrices}
    ipm.merge(ipm.make_plan(pair, "task_arithmetic", overrides=only), tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    changed = [m for m in pair.matrices if not torch.equal(*each(pair, merged, m.mllm))]
    assert changed == [up]
    assert (gate.shape, up.shape) == ((96, 64), (96, 64))


def each(pair: ipm.ModelPair, merged: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return pair.mllm.read(name), merged.read(name)


# --- one mixture in several layouts ---


def stacked(weights: Weights, *, transposed: bool, fused: bool) -> Weights:
    """The experts of Qwen3-MoE in stacks, as other versions and families store them."""
    found = {name: w for name, w in weights.items() if ".experts." not in name}
    for layer in range(4):
        place = f"model.layers.{layer}.mlp.experts"
        parts = {
            kind: torch.stack([weights[f"{place}.{e}.{kind}_proj.weight"] for e in range(4)])
            for kind in ("gate", "up", "down")
        }
        if fused:
            parts["gate_up"] = torch.cat([parts.pop("gate"), parts.pop("up")], dim=1)
        for kind, part in parts.items():
            turned = part.transpose(1, 2) if transposed else part
            found[f"{place}.{kind}_proj"] = turned.contiguous()
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("role", ["base", "math"])
def test_stacked_and_separate_experts_match(
    role: str, transposed: bool, fused: bool, models: Any, tmp_path: Path
) -> None:
    folders = models("qwen3_vl_moe")
    source = rewrite(
        folders[role], tmp_path / role, lambda w: stacked(w, transposed=transposed, fused=fused)
    )
    usual, other = opened(folders), opened(folders, **{role: source})
    assert len(usual.matrices) == len(other.matrices)
    for one, two in zip(usual.matrices, other.matrices, strict=True):
        assert (one.module, one.shape) == (two.module, two.shape)
        for mine, theirs in zip(usual.read(one)[:3], other.read(two)[:3], strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(usual.read(one).math[0], other.read(two).math[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_stack_is_written_as_it_was_read(
    dtype: torch.dtype, models: Any, tmp_path: Path
) -> None:
    folders = models("qwen3_vl_moe")

    def turned(weights: Weights) -> Weights:
        return {
            n: (w.transpose(1, 2) if w.ndim == 3 else w).contiguous().to(dtype)
            for n, w in weights.items()
        }

    mllm = rewrite(folders["mllm"], tmp_path / "mllm", turned)
    pair = opened(folders, mllm=mllm)
    assert any(".T" in m.mllm for m in pair.matrices)
    plan = ipm.make_plan(pair, "task_arithmetic", math_weight=0.5, exclude="experts.2.up_proj")
    ipm.merge(plan, tmp_path / "out")
    merged, chosen = Checkpoint.open(tmp_path / "out"), {d.name for d in plan.selected}
    for matrix in pair.matrices:
        base, _, own, (math,), _ = pair.read(matrix)
        expected = own.float() + 0.5 * (math - base)
        expected = expected.to(dtype) if matrix.name in chosen else own
        torch.testing.assert_close(merged.read(matrix.mllm), expected, rtol=0, atol=1e-7)


def test_reading_an_expert_holds_one_matrix_at_a_time(models: Any) -> None:
    pair = opened(models("llama4"))
    matrix = next(m for m in pair.matrices if "gate_up_proj[2].T" in m.name)
    whole, one = pair.base.spec(matrix.name.partition("[")[0]), pair.base.spec(matrix.name)
    assert one.nbytes == whole.nbytes // 4  # the slice of the expert
    assert one.shape == matrix.shape


def test_a_plan_of_a_mixture_from_before_its_experts_merged_keeps_its_meaning(
    models: Any, tmp_path: Path
) -> None:
    pair = opened(models("qwen3_vl_moe"))
    now = ipm.make_plan(pair, "task_arithmetic", math_weight=0.5)
    attention = tuple(d for d in now.decisions if d.module in ("q", "k", "v", "o"))
    content = replace(now, decisions=attention).to_dict()
    del content["modules"]
    before = ipm.MergePlan.from_dict(content)
    ipm.merge(before, tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    for matrix in pair.matrices:
        same = torch.equal(*each(pair, merged, matrix.mllm))
        assert same == (matrix.module not in ("q", "k", "v", "o"))


def test_the_preview_counts_what_a_default_plan_merges(models: Any) -> None:
    analysis = ipm.analyse(opened(models("qwen3_5")))
    usual, every = (
        ipm.make_plan(analysis, similarity_threshold=0.0, modules=modules).preview()
        for modules in (DEFAULT, "all")
    )
    assert usual.n_matrices == every.n_matrices == len(analysis.records)
    assert set(usual.selected) < set(every.selected)
    assert usual.relative_change < every.relative_change


# --- what cannot be said or done ---


def test_methods_with_data_leave_experts_alone_and_adapters_refuse_them(
    models: Any, tmp_path: Path
) -> None:
    pair = opened(models("qwen3_5_moe"))
    plan = ipm.make_plan(ipm.analyse(pair), similarity_threshold=0.0)
    with pytest.raises(PlanError, match=r"matrices of experts, .* exclude='\[.\]experts'"):
        ipm.export_adapter(plan, tmp_path / "adapter")
    with pytest.raises(PlanError, match="calibration data, which are measured for q, k, v"):
        ipm.make_plan(pair, "regmean", modules="all", calibration=tmp_path)
    with pytest.raises(PlanError, match="restricted to names with '_proj.weight'"):
        export_recipe(ipm.make_plan(opened(models("llama4")), "linear"))


def more_experts(weights: Weights) -> Weights:
    extra = {n.replace("experts.3.", "experts.4."): w.clone() for n, w in weights.items()}
    return {**weights, **extra}


def other_layers(weights: Weights) -> Weights:
    old, new = "layers.1.self_attn.", "layers.1.linear_attn."
    return {n.replace(old, new): w for n, w in weights.items()}


@pytest.mark.parametrize(
    ("name", "role", "change", "words"),
    [
        ("qwen3_vl_moe", "math", more_experts, "has 5 experts and that of the base .* has 4"),
        ("qwen3_vl_moe", "base", more_experts, "has 4 experts and that of the base .* has 5"),
        (
            "qwen3_5",
            "math",
            other_layers,
            r"Layer 1 of .* has 'linear_attn.k_proj.weight' but .* which has 'self_attn.k_proj",
        ),
        ("qwen3_5", "base", other_layers, r"Layer 1 of .* has 'linear_attn.k_proj.weight' but"),
    ],
)
def test_models_with_other_layers_are_refused_in_one_sentence(
    name: str,
    role: str,
    change: Callable[[Weights], Weights],
    words: str,
    models: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = models(name)
    odd = {**folders, role: rewrite(folders[role], tmp_path / role, change)}
    with pytest.raises(PairingError, match=words):
        opened(odd)
    roles = [part for each in odd.items() for part in (f"--{each[0]}", str(each[1]))]
    out = tmp_path / "pack.json"
    assert main(["analyse", *roles, "-o", str(out)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.glob("pack*"))


def test_a_layer_that_predicts_later_tokens_is_kept(models: Any, tmp_path: Path) -> None:
    folders = models("ernie4_5_moe")

    def longer(weights: Weights) -> Weights:
        extra = {n.replace("layers.3.", "layers.4."): w.clone() for n, w in weights.items()}
        return {**weights, **extra, "model.layers.4.eh_proj.weight": torch.ones(64, 128)}

    base = rewrite(folders["base"], tmp_path / "base", longer)
    assert len(opened(folders, base=base).matrices) == len(opened(folders).matrices)


def test_the_share_of_what_merges_is_that_of_the_elements(models: Any) -> None:
    pair = opened(models("qwen3_vl_moe"))
    message = next(found.message for found in pair.check() if found.subject == "shapes")
    text = sum(w.numel() for n, w in load_file(models("qwen3_vl_moe")["mllm"] / FILE).items()
               if "visual" not in n)  # fmt: skip
    merged = sum(m.shape[0] * m.shape[1] for m in pair.matrices if m.module != "mlp.router")
    assert f"{merged / text:.0%}".replace("%", " %") + " by default" in message
