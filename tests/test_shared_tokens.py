"""Beside the matrices: norms and biases, and the rows of tokens that all models share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, Weights, as_mllm, fine_tuned, text_weights, write_model
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.errors import PlanError
from ipmerge_core.merging.merge import estimate_merge
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.shared_tokens import read_tokens
from ipmerge_core.planning.mergekit import export_recipe
from ipmerge_core.planning.plan import MergePlan

TASK = {"method": "task_arithmetic", "mllm_weight": 1.0, "math_weight": 0.5}
EMBEDDING = "model.embed_tokens.weight"


def rows(*values: list[float]) -> torch.Tensor:
    """Widen rows of two to the models' width with zeros."""
    wide = torch.zeros(len(values), 16)
    wide[:, :2] = torch.tensor(values)
    return wide


def bare_weights(seed: int = 0) -> Weights:
    """A text model with biases and other norms, its vocabulary left out."""
    generator = torch.Generator().manual_seed(seed + 50)
    weights = {name: w for name, w in text_weights().items() if w.ndim == 1 or ".layers." in name}
    for layer in range(3):
        weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.zeros(16)
    if seed:
        weights = fine_tuned(weights, seed)
    return {
        name: w + 0.1 * torch.randn(w.shape, generator=generator) if w.ndim == 1 else w
        for name, w in weights.items()
    }


def write(
    folder: Path, weights: Weights, tokens: dict[str, int], added: tuple[str, ...], mllm: bool
) -> Path:
    inner = {**TEXT_CONFIG, "tie_word_embeddings": "lm_head.weight" not in weights}
    config = {"model_type": "llava", "text_config": inner} if mllm else inner
    write_model(folder, as_mllm(weights) if mllm else weights, config)
    new = [{"id": len(tokens) + i, "content": token} for i, token in enumerate(added)]
    content = {"model": {"type": "BPE", "vocab": tokens}, "added_tokens": new}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def write_shifted(folder: Path, *, head: bool = False) -> Trio:
    """The oracle's trio: an added image token, another order of rows, a token of the expert's."""
    base, mllm, math = bare_weights(), bare_weights(1), bare_weights(2)
    base[EMBEDDING] = rows([1, 1], [2, 2], [3, 3])
    mllm[EMBEDDING] = rows([1.5, 1], [2, 2.5], [3, 3.25], [9, 9], [8, 8])  # the last is padding
    math[EMBEDDING] = rows([2, 3], [1, 0], [7, 7])
    if head:
        for weights in (base, mllm, math):
            weights["lm_head.weight"] = weights[EMBEDDING] + 1
    abc = {"a": 0, "b": 1, "c": 2}
    return Trio(
        base=write(folder / "base", base, abc, (), mllm=False),
        mllm=write(folder / "mllm", mllm, abc, ("<image>",), mllm=True),
        math=write(folder / "math", math, {"b": 0, "a": 1, "d": 2}, (), mllm=False),
        math_2=folder,
    )


def merged_of(trio: Trio, out: Path, **choice: Any) -> tuple[dict[str, Any], Weights]:
    plan = ipm.make_plan(ipm.open_pair(trio.mllm, trio.math, trio.base), **{**TASK, **choice})
    plan.save(out.with_suffix(".json"))
    manifest = ipm.merge(MergePlan.load(out.with_suffix(".json")), out)
    return manifest, load_file(out / "model.safetensors")


@pytest.fixture
def shifted(tmp_path: Path) -> Trio:
    return write_shifted(tmp_path / "shifted")


def test_rows_merge_by_token_and_not_by_number(shifted: Trio, tmp_path: Path) -> None:
    manifest, after = merged_of(shifted, tmp_path / "out", embeddings="merge-shared")
    expected = rows([1.5, 0.5], [2, 3], [3, 3.25], [9, 9], [8, 8])
    assert torch.equal(after[f"language_model.{EMBEDDING}"], expected)
    entry = manifest["tensors"][f"language_model.{EMBEDDING}"]
    assert (entry["action"], entry["rows"], entry["experts"]) == ("merged", 2, [0])


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs", "slerp", "sce"])
def test_a_row_without_a_counterpart_is_the_mllms_whatever_the_method(
    method: str, shifted: Trio, tmp_path: Path
) -> None:
    choice = {"method": method, "embeddings": "merge-shared", "norms": "merge"}
    pair = ipm.open_pair(shifted.mllm, shifted.math, shifted.base)
    ipm.merge(ipm.make_plan(pair, **choice), tmp_path / "out")
    name = f"language_model.{EMBEDDING}"
    before = load_file(shifted.mllm / "model.safetensors")[name]
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(after[2:], before[2:])
    assert not torch.equal(after[:2], before[:2])


def test_a_tied_head_that_is_stored_stays_equal_to_the_embedding(tmp_path: Path) -> None:
    trio = write_shifted(tmp_path / "tied", head=True)
    config = json.loads((trio.mllm / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (trio.mllm / "config.json").write_text(json.dumps(config))
    weights = load_file(trio.mllm / "model.safetensors")
    weights["language_model.lm_head.weight"] = weights[f"language_model.{EMBEDDING}"].clone()
    tokenizer = (trio.mllm / "tokenizer.json").read_text()
    tied = write_model(tmp_path / "tied" / "mllm_2", weights, config)
    (tied / "tokenizer.json").write_text(tokenizer)
    _, after = merged_of(
        trio._replace(mllm=tied),
        tmp_path / "out",
        method="dare_linear",
        embeddings="merge-shared",
        density=0.5,
    )
    head, embedding = (f"language_model.{name}" for name in ("lm_head.weight", EMBEDDING))
    assert torch.equal(after[head], after[embedding])
    assert not torch.equal(after[head], weights[head])


def test_a_head_of_its_own_merges_with_the_heads(tmp_path: Path) -> None:
    trio = write_shifted(tmp_path / "head", head=True)
    _, after = merged_of(trio, tmp_path / "out", embeddings="merge-shared")
    expected = rows([1.5, 0.5], [2, 3], [3, 3.25], [9, 9], [8, 8]) + 1
    assert torch.equal(after["language_model.lm_head.weight"], expected)


def test_norms_and_biases_merge_as_vectors(shifted: Trio, tmp_path: Path) -> None:
    manifest, after = merged_of(shifted, tmp_path / "out", norms="merge")
    models = [load_file(folder / "model.safetensors") for folder in shifted[:3]]
    names = [name for name, weight in models[0].items() if weight.ndim == 1]
    assert len(names) == 3 * 3 + 1  # two norms and a bias per layer, and the last norm
    for name in names:
        base, mllm, math = (
            model[f"language_model.{name}" if i == 1 else name].double()
            for i, model in enumerate(models)
        )
        truth = mllm + 0.5 * (math - base)
        torch.testing.assert_close(
            after[f"language_model.{name}"].double(), truth, rtol=1e-6, atol=1e-7
        )
        assert manifest["tensors"][f"language_model.{name}"]["action"] == "merged"
    embedding = manifest["tensors"][f"language_model.{EMBEDDING}"]
    assert embedding["reason"].startswith("vocabulary")


def test_the_default_keeps_them_and_patterns_hold_for_them(shifted: Trio, tmp_path: Path) -> None:
    kept, after = merged_of(shifted, tmp_path / "kept")
    bias = "language_model.model.layers.0.self_attn.q_proj.bias"
    assert kept["tensors"][bias]["reason"] == "bias: only matrices are merged"
    before = load_file(shifted.mllm / "model.safetensors")
    assert all(torch.equal(after[n], w) for n, w in before.items() if w.ndim == 1)
    some, _ = merged_of(shifted, tmp_path / "some", norms="merge", exclude="bias|embed")
    assert some["tensors"][bias]["reason"] == "not selected"
    assert some["tensors"]["language_model.model.norm.weight"]["action"] == "merged"


def test_the_preview_says_what_is_not_in_its_numbers(shifted: Trio) -> None:
    analysis = ipm.analyse(ipm.open_pair(shifted.mllm, shifted.math, shifted.base))
    plain = ipm.make_plan(analysis, **TASK).preview()
    plan = ipm.make_plan(analysis, **TASK, norms="merge", embeddings="merge-shared")
    assert plain.not_counted == ()
    told = plan.preview()
    assert told.relative_change == plain.relative_change
    assert "norms and biases" in told.not_counted[0]
    assert told.not_counted[1].startswith("2 rows")
    with pytest.raises(PlanError, match="norms and biases"):
        export_recipe(plan)


def test_the_estimate_counts_what_is_read_beside(shifted: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(shifted.mllm, shifted.math, shifted.base)
    plain = estimate_merge(ipm.make_plan(pair, **TASK), tmp_path / "out")
    more = estimate_merge(ipm.make_plan(pair, **TASK, norms="merge"), tmp_path / "out")
    assert more.nbytes_read == plain.nbytes_read + 2 * 10 * 16 * 4  # the vectors of two models


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"norms": "drop"}, "expected keep or merge"),
        ({"embeddings": "merge"}, "expected keep or merge-shared"),
    ],
)
def test_a_policy_that_is_none_is_refused(
    choice: dict[str, Any], words: str, shifted: Trio
) -> None:
    pair = ipm.open_pair(shifted.mllm, shifted.math, shifted.base)
    with pytest.raises(PlanError, match=words):
        ipm.make_plan(pair, **{"method": "task_arithmetic", **choice})


def test_what_works_on_whole_matrices_only_says_so(shifted: Trio) -> None:
    analysis = ipm.analyse(ipm.open_pair(shifted.mllm, shifted.math, shifted.base))
    for choice in ({"norms": "merge"}, {"embeddings": "merge-shared"}):
        with pytest.raises(PlanError, match="operates on whole matrices"):
            ipm.make_plan(analysis, "ip_merging", **choice)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "knots_ties", "wudi"])
def test_methods_of_directions_take_the_mean_of_what_vectors_changed(
    method: str, shifted: Trio, tmp_path: Path
) -> None:
    pair = ipm.open_pair(shifted.mllm, shifted.math, shifted.base)
    choice = {"norms": "merge", "embeddings": "merge-shared", "math_weight": 0.5}
    ipm.merge(ipm.make_plan(pair, method, **choice), tmp_path / "out")
    base, mllm, math, after = (
        load_file(folder / "model.safetensors")
        for folder in (shifted.base, shifted.mllm, shifted.math, tmp_path / "out")
    )
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.norm.weight"):
        host = f"language_model.{name}"
        expected = base[name] + (mllm[host] - base[name]) / 2 + 0.25 * (math[name] - base[name])
        assert torch.allclose(after[host], expected, atol=1e-6)
    rows = f"language_model.{EMBEDDING}"
    assert torch.equal(after[rows][2:], mllm[rows][2:])
    assert not torch.equal(after[rows][:2], mllm[rows][:2])


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"model": {"vocab": {"x": 0}}}', None])
def test_a_tokenizer_that_cannot_serve_is_refused(text: str | None, shifted: Trio) -> None:
    path = shifted.math / "tokenizer.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    pair = ipm.open_pair(shifted.mllm, shifted.math, shifted.base)
    with pytest.raises(PlanError, match=r"tokenizer|no token in common"):
        ipm.make_plan(pair, **TASK, embeddings="merge-shared")


def test_a_tokenizer_that_changed_after_the_plan_is_refused(shifted: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(shifted.mllm, shifted.math, shifted.base)
    plan = ipm.make_plan(pair, **TASK, embeddings="merge-shared")
    path = shifted.math / "tokenizer.json"
    path.write_text(path.read_text().replace('"d"', '"c"'))
    with pytest.raises(PlanError, match="Make a new plan"):
        ipm.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_of_unigram_models_are_numbered_by_place(shifted: Trio) -> None:
    content = {"model": {"vocab": [["x", -1.0], ["y", -2.0]]}, "added_tokens": None}
    (shifted.base / "tokenizer.json").write_text(json.dumps(content))
    assert read_tokens(Checkpoint.open(shifted.base)) == {"x": 0, "y": 1}
