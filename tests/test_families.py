"""Every family in every name layout is matched to its text model, tensor by tensor."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from family_layouts import FAMILIES, LAYERS, build, rewrite, set_config

import ipmerge_core as ipm
from ipmerge_core.errors import PairingError, ShapeError
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.decoders import CROSS_ATTENTION
from ipmerge_core.models.matrix_kinds import MODULES, is_router
from ipmerge_core.models.pairing import VOCABULARY, ModelPair, open_pair

DOC = Path(__file__).parents[1] / "docs" / "families.md"
CASES = [(name, layout) for name, family in FAMILIES.items() for layout in family.layouts]
MOE_FAMILY = "Qwen3-VL, mixture of experts"
PHI = "LLaVA with a fused text model (Phi-3)"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> object:
    @cache
    def written(name: str) -> dict[str, Path]:
        return build(FAMILIES[name], tmp_path_factory.mktemp("family"))

    return written


def pair_of(models: object, name: str, layout: str) -> ModelPair:
    folders = models(name)
    return open_pair(folders[layout], folders["math"], folders["base"])


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_matrix_finds_its_counterpart_and_every_tensor_a_reason(
    name: str, layout: str, models: object
) -> None:
    pair = pair_of(models, name, layout)
    experts = [f"mlp.experts.{kind}_proj" for kind in ("gate", "up", "down") for _ in range(2)]
    mixture = (*MODULES[:4], "mlp.router", *experts)
    modules = mixture if name == MOE_FAMILY else MODULES
    assert [(m.layer, m.module) for m in pair.matrices] == [
        (layer, module) for layer in range(LAYERS) for module in modules
    ]
    for matrix in pair.matrices:  # the planted weights: a wrong match would lie 1.4 away
        base, mllm = pair.base.read_matrix(matrix.name), pair.mllm.read_matrix(matrix.mllm)
        assert float((mllm - base).norm() / base.norm()) < 0.1
    stored = {matrix.mllm.partition("[")[0] for matrix in pair.matrices}
    assert stored | set(pair.kept) == set(pair.mllm.tensors)
    assert not stored & set(pair.kept)
    for tensor, reason in pair.kept.items():
        eyes = re.search(r"vision|visual|projector|connector|image_newline|mm_proj|mlp1", tensor)
        assert (reason == "outside the language model") == bool(eyes), (tensor, reason)
    refusals = [finding for finding in pair.check() if finding.level == "refusal"]
    assert not refusals


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_loads_in_transformers_with_the_merged_weights(
    name: str, models: object, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    layout = FAMILIES[name].layouts[0]
    pair = pair_of(models, name, layout)
    plan = ipm.make_plan(pair, method="task_arithmetic", math_weight=0.5)
    ipm.merge(plan, tmp_path / "out")
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged, text = Checkpoint.open(tmp_path / "out"), loaded.get_decoder()
    crossed = getattr(loaded.config.get_text_config(), "cross_attention_layers", None) or []
    places = [n for n in range(len(text.layers)) if n not in crossed]
    for matrix in pair.matrices:
        base, mllm = pair.base.read(matrix.name), pair.mllm.read(matrix.mllm)
        math = pair.math[0].read(matrix.math[0])
        expected = mllm if is_router(matrix.module) else mllm + 0.5 * (math - base)
        torch.testing.assert_close(merged.read(matrix.mllm), expected)
        if matrix.module == "o":
            found = text.layers[places[matrix.layer]].self_attn.o_proj.weight
            torch.testing.assert_close(found.data, expected)
    for tensor in pair.kept:
        assert merged.read_bytes(tensor) == pair.mllm.read_bytes(tensor)


def test_the_table_of_families_is_made_from_these_tests(models: object) -> None:
    rows = ["| family | text model | layouts, by the decoder's prefix | merged | kept or special |"]
    rows += ["|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        prefixes = {
            layout: pair_of(models, name, layout).matrices[0].mllm.partition("layers.")[0]
            for layout in family.layouts
        }
        layouts = "; ".join(f"{layout}: `{prefix}`" for layout, prefix in prefixes.items())
        merged = "q, k, v, o, gate, up, down" + " of experts" * (name == MOE_FAMILY)
        text = family.text_config.removesuffix("Config").removesuffix("Text")
        rows.append(f"| {name} | {text} | {layouts} | {merged} | {family.note or 'as below'} |")
    table = "\n".join(rows)
    assert table in DOC.read_text(encoding="utf-8"), f"paste into {DOC.name}:\n\n{table}\n"


# --- treatments ---


def test_cross_attention_layers_shift_the_numbers_and_are_kept(models: object) -> None:
    pair = pair_of(models, "Mllama (Llama 3.2 Vision)", "hub")
    layers = [m.mllm.partition("layers.")[2].partition(".")[0] for m in pair.matrices[::7]]
    assert layers == ["0", "2", "4", "5"]
    crossed = [name for name, reason in pair.kept.items() if reason == CROSS_ATTENTION]
    assert crossed
    assert all(".layers.1." in name or ".layers.3." in name for name in crossed)


def test_experts_of_a_mixture_merge_by_default_and_its_router_when_asked(models: object) -> None:
    pair = pair_of(models, MOE_FAMILY, "modules")
    usual = {d.name for d in ipm.make_plan(pair, method="linear").selected}
    assert all((m.name in usual) == (m.module != "mlp.router") for m in pair.matrices)
    asked = ipm.make_plan(pair, method="linear", modules="all-and-router")
    assert len(asked.selected) == len(pair.matrices)
    finding = next(finding for finding in pair.check() if finding.subject == "shapes")
    assert finding.level == "ok"
    assert "with modules=all-and-router also mlp.router. Kept:" in finding.message


@pytest.mark.parametrize("side", ["base", "math"])
def test_a_fused_mllm_matches_a_text_model_that_is_not(
    side: str, models: object, tmp_path: Path
) -> None:
    folders = models(PHI)

    def split(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = {}
        for name, weight in weights.items():
            if "qkv_proj" in name:
                sizes = dict(zip("qkv", (32, 16, 16), strict=True))
                fused = "qkv_proj"
            elif "gate_up_proj" in name:
                sizes, fused = {"gate": 48, "up": 48}, "gate_up_proj"
            else:
                parts[name] = weight
                continue
            cut = weight.split(list(sizes.values()))
            for module, rows in zip(sizes, cut, strict=True):
                parts[name.replace(fused, f"{module}_proj")] = rows.clone()
        return parts

    unfused = rewrite(folders[side], tmp_path / side, split)
    chosen = {"base": folders["base"], "math": folders["math"], side: unfused}
    pair = open_pair(folders["hub"], chosen["math"], chosen["base"])
    together = open_pair(folders["hub"], folders["math"], folders["base"])
    assert len(pair.matrices) == len(together.matrices) == 7 * LAYERS
    plan = ipm.make_plan(pair, method="task_arithmetic", overrides={pair.matrices[1].name: "keep"})
    ipm.merge(plan, tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    for matrix in pair.matrices:
        mllm = pair.mllm.read(matrix.mllm)
        change = pair.math[0].read(matrix.math[0]) - pair.base.read(matrix.name)
        expected = mllm if matrix == pair.matrices[1] else mllm + 0.3 * change
        torch.testing.assert_close(merged.read(matrix.mllm), expected)


def test_a_fused_projection_that_does_not_fit_its_heads_is_refused(
    models: object, tmp_path: Path
) -> None:
    folders = models(PHI)
    odd = rewrite(folders["base"], tmp_path / "odd", dict)
    set_config(odd, num_key_value_heads=4)
    with pytest.raises(ShapeError, match="qkv_proj.weight' of .* has 64 rows; 4 query heads"):
        open_pair(folders["hub"], folders["math"], odd)


def test_a_text_model_without_a_head_and_with_old_buffers_matches(
    models: object, tmp_path: Path
) -> None:
    folders = models("LLaVA-1.5 (Vicuna)")

    def headless(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {n.removeprefix("model."): w for n, w in weights.items() if "lm_head" not in n}
        buffers = {
            f"layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(LAYERS)
        }
        return bare | buffers

    base = rewrite(folders["base"], tmp_path / "base", headless)
    assert len(open_pair(folders["hub"], folders["math"], base).matrices) == 7 * LAYERS
    assert len(open_pair(folders["hub"], base, folders["base"]).matrices) == 7 * LAYERS


def test_extra_rows_of_the_vocabulary_stay_the_mllms(models: object, tmp_path: Path) -> None:
    folders = models("LLaVA-1.5 (Vicuna)")

    def longer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [n for n in weights if "embed_tokens" in n or "lm_head" in n]
        rows = {n: torch.cat([weights[n], torch.ones(8, 32)]) for n in names}
        return weights | rows

    mllm = rewrite(folders["hub"], tmp_path / "longer", longer)
    pair = open_pair(mllm, folders["math"], folders["base"])
    ipm.merge(ipm.make_plan(pair, method="task_arithmetic"), tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    kept = [name for name, reason in pair.kept.items() if reason == VOCABULARY]
    assert len(kept) == 2
    assert all(merged.spec(name).shape == (104, 32) for name in kept)
    assert all(merged.read_bytes(name) == pair.mllm.read_bytes(name) for name in kept)


# --- refused by name ---


def refused(models: object, tmp_path: Path, change: object, words: str) -> None:
    folders = models("LLaVA-1.5 (Vicuna)")
    odd = rewrite(folders["base"], tmp_path / "odd", change)
    with pytest.raises(PairingError, match=words):
        open_pair(folders["hub"], folders["math"], odd)


def renamed(old: str, new: str) -> object:
    return lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            renamed("self_attn.q_proj", "attention.wqkv"),
            r"has 'attention.wqkv.weight' but .*hub' does not, which has 'self_attn.q_proj.weight'",
        ),
        (
            renamed("self_attn.q_proj.weight", "self_attn.q_proj.qweight"),
            r"q_proj.qweight' of .* is quantised",
        ),
        (
            renamed("layers.2.self_attn", "layers.2.linear_attn"),
            r"Layer 2 of .*odd' has 'linear_attn.k_proj.weight' but .*hub' does not, which has 's",
        ),
        (renamed("model.layers", "transformer.h"), "has no decoder matrices named like"),
        (renamed("layers.1.", "layers.7."), "layers up to 7 .* but no layer 1. Is a shard"),
        (renamed("_proj.", "_linear."), r"Layer 0 of .* has 'mlp.down_linear.weight' but .*hub'"),
        (renamed("mlp.up_proj", "mlp.fc1"), r"mlp.fc1.weight' of .*odd' .*as in OPT"),
        (renamed("self_attn.q_proj", "encoder_attn.q_proj"), r"odd' is an encoder-decoder model"),
        (
            lambda weights: (
                weights | {f"draft.{n}": w.clone() for n, w in weights.items() if "layers" in n}
            ),
            None,
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    change: object, words: str | None, models: object, tmp_path: Path
) -> None:
    if words is not None:
        refused(models, tmp_path, change, words)
        return
    folders = models("LLaVA-1.5 (Vicuna)")
    twin = rewrite(folders["math"], tmp_path / "twin", change)
    with pytest.raises(PairingError, match="has 2 decoders that match the base .* equally well"):
        open_pair(folders["hub"], twin, folders["base"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda weights: {n: w for n, w in weights.items() if "1.input_layernorm" not in n},
            r"'input_layernorm.weight' of layer 1 of .*math' has no counterpart in .*odd'",
        ),
        (
            lambda weights: weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
            r"'self_attn.q_norm.weight' of layer 0 of .*odd' has no counterpart in .*hub'",
        ),
    ],
)
def test_a_vector_that_not_every_model_has_is_kept_with_a_warning(
    change: object, words: str, models: object, tmp_path: Path
) -> None:
    folders = models("LLaVA-1.5 (Vicuna)")
    odd = rewrite(folders["base"], tmp_path / "odd", change)
    pair = open_pair(folders["hub"], folders["math"], odd)
    finding = next(found for found in pair.check() if found.subject == "counterparts")
    assert finding.level == "warning"
    assert re.search(words.replace("math", "hub"), finding.message)
    assert len(pair.vectors) == 2 * LAYERS + 1 - words.count("input_layernorm")


def test_integer_matrices_are_refused_as_quantised(models: object, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    refused(
        models,
        tmp_path,
        lambda weights: weights | {name: weights[name].to(torch.int8)},
        "q_proj.weight' of .* is quantised \\(I8\\)",
    )


def test_python_files_come_along_only_where_the_config_needs_them(
    models: object, tmp_path: Path
) -> None:
    folders = models("InternVL")
    own = rewrite(folders["InternVL repository"], tmp_path / "own", dict)
    (own / "modeling.py").write_text("raise SystemExit('never run')")
    plan = ipm.make_plan(open_pair(own, folders["math"], folders["base"]), method="linear")
    ipm.merge(plan, tmp_path / "plain")
    assert not (tmp_path / "plain" / "modeling.py").exists()
    set_config(own, auto_map={"AutoModel": "modeling.X"})
    plan = ipm.make_plan(open_pair(own, folders["math"], folders["base"]), method="linear")
    ipm.merge(plan, tmp_path / "mapped")
    assert (tmp_path / "mapped" / "modeling.py").exists()
    assert json.loads((tmp_path / "mapped" / "config.json").read_text())["auto_map"]
