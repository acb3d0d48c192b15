"""A merged folder is the MLLM with the selected matrices replaced, exactly as the preview said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model, write_trio
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.analysis.records import Analysis, Source, Sources
from ipmerge_core.errors import CheckpointError, IPMergeError, PairingError
from ipmerge_core.merging import computing as merging
from ipmerge_core.merging.merge import estimate_merge, iter_merge
from ipmerge_core.merging.model_card import write_card
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.planning.plan import MergePlan

PLANS = [
    {"similarity_threshold": 0.7, "lambda_": 4.0},
    {"similarity_threshold": 0.5, "lambda_": 2.0, "gamma_norm": "max", "similarity": "max"},
    {"similarity_threshold": 0.8, "lambda_": 0.5, "ablation": "rescale_only"},
    {"similarity_threshold": 0.0, "lambda_": 1.0, "ablation": "select_only"},
    {"method": "task_arithmetic", "mllm_weight": 0.9, "math_weight": 0.6},
    {"similarity_threshold": 0.0, "layer_gains": (0.0, 2.0), "exclude": "mlp"},
]


@pytest.fixture(scope="module")
def analysis(trio: Trio) -> Analysis:
    return ipm.analyse(ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("choice", PLANS)
def test_the_merge_changes_exactly_what_the_preview_said(
    choice: dict[str, object], trio: Trio, analysis: Analysis, tmp_path: Path
) -> None:
    plan = ipm.make_plan(analysis, **choice)
    preview = plan.preview()
    ipm.merge(plan, tmp_path / "out")
    before, after, base = weights(trio.mllm), weights(tmp_path / "out"), weights(trio.base)
    records = {record.name: record for record in analysis.records}
    change, norm = {}, {}
    merged_task, mllm_task = [], []
    for name, record in records.items():
        old, new = before[record.mllm_name].double(), after[record.mllm_name].double()
        layer = record.layer
        change[layer] = change.get(layer, 0.0) + float((new - old).norm() ** 2)
        norm[layer] = norm.get(layer, 0.0) + float(old.norm() ** 2)
        merged_task.append((new - base[name].double()).flatten())
        mllm_task.append((old - base[name].double()).flatten())
    total = (sum(change.values()) / sum(norm.values())) ** 0.5
    assert preview.relative_change == pytest.approx(total, rel=1e-4)
    for layer, expected in preview.layer_change.items():
        assert expected == pytest.approx((change[layer] / norm[layer]) ** 0.5, rel=1e-4)
    keep = torch.cosine_similarity(torch.cat(merged_task), torch.cat(mllm_task), dim=0)
    assert preview.keep == pytest.approx(float(keep), rel=1e-4)


def test_unselected_tensors_and_files_are_byte_identical(
    trio: Trio, analysis: Analysis, tmp_path: Path
) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0.8)
    manifest = ipm.merge(plan, tmp_path / "out")
    mllm, merged = Checkpoint.open(trio.mllm), Checkpoint.open(tmp_path / "out")
    assert list(merged.tensors.values()) == list(mllm.tensors.values())
    touched = {name for name in mllm.tensors if mllm.read_bytes(name) != merged.read_bytes(name)}
    chosen = {decision.name for decision in plan.selected}
    assert touched == {record.mllm_name for record in analysis.records if record.name in chosen}
    assert touched == {n for n, t in manifest["tensors"].items() if t["action"] == "merged"}
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trio.mllm / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lambda_zero_returns_the_mllm_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    trio = write_trio(tmp_path / "trio", dtype=dtype)
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    ipm.merge(ipm.make_plan(analysis, similarity_threshold=0, lambda_=0), tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trio.mllm / name).read_bytes()


def test_the_result_keeps_dtype_and_shards(tmp_path: Path) -> None:
    trio = write_trio(tmp_path / "trio", dtype=torch.bfloat16, shards=3)
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    ipm.merge(ipm.make_plan(analysis, similarity_threshold=0), tmp_path / "out")
    mllm, merged = Checkpoint.open(trio.mllm), Checkpoint.open(tmp_path / "out")
    assert merged.tensors == mllm.tensors
    assert merged.shards == mllm.shards
    assert merged.fingerprint != mllm.fingerprint


def test_merging_twice_gives_the_same_bytes(analysis: Analysis, tmp_path: Path) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0.5)
    for out in ("one", "two"):
        ipm.merge(plan, tmp_path / out)
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert files[0] == files[1]


def test_a_stopped_merge_goes_on_and_ends_the_same(analysis: Analysis, tmp_path: Path) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0.5)
    ipm.merge(plan, tmp_path / "whole")
    steps = iter_merge(plan, tmp_path / "out")
    for _ in range(7):
        next(steps)
    steps.close()
    assert not (tmp_path / "out").exists()
    again = list(iter_merge(plan, tmp_path / "out"))
    assert sum(step.action == "resumed" for step in again) >= 7
    assert again[-1].nbytes_done == again[-1].nbytes_total
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_several_experts_add_up(trio: Trio, analysis: Analysis, tmp_path: Path) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0)
    ipm.merge(plan, tmp_path / "out")
    merged, name = weights(tmp_path / "out"), analysis.records[0].name
    mllm = weights(trio.mllm)["language_model." + name]
    parts = [
        ipm.METHODS["ip_merging"](weights(trio.base)[name], mllm, weights(expert)[name]) - mllm
        for expert in (trio.math, trio.math_2)
    ]
    torch.testing.assert_close(merged["language_model." + name], mllm + parts[0] + parts[1])


def test_an_expert_of_another_base_is_moved_to_the_mllms(trio: Trio, tmp_path: Path) -> None:
    root_weights = fine_tuned(text_weights(), 8)
    root = write_model(tmp_path / "root", root_weights, TEXT_CONFIG)
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    mllm = write_model(tmp_path / "m", as_mllm(fine_tuned(root_weights, 1)), config)
    pair = ipm.open_pair(mllm, trio.math, trio.base, base_mllm=root)
    ipm.merge(ipm.make_plan(pair, method="task_arithmetic", math_weight=0.5), tmp_path / "out")
    name = pair.matrices[0].name
    step = 0.5 * (weights(trio.math)[name] - weights(trio.base)[name])
    expected = weights(mllm)["language_model." + name] + step
    torch.testing.assert_close(weights(tmp_path / "out")["language_model." + name], expected)


def test_the_manifest_repeats_the_plan_and_names_every_tensor(
    trio: Trio, analysis: Analysis, tmp_path: Path
) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0.5)
    manifest = ipm.merge(plan, tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "ipmerge.json").read_text())
    assert manifest["plan"]["hash"] == plan.hash
    assert manifest["sources"]["mllm"]["fingerprint"] == Checkpoint.open(trio.mllm).fingerprint
    assert set(manifest["tensors"]) == set(Checkpoint.open(trio.mllm).tensors)
    kept = manifest["tensors"]["multi_modal_projector.linear_1.weight"]
    assert kept["reason"] == "outside the language model"


def test_the_model_card_names_the_parents_and_cannot_carry_markup(
    trio: Trio, tmp_path: Path
) -> None:
    evil = tmp_path / "<img onerror=x>|`"
    write_model(evil, fine_tuned(text_weights(), 2), TEXT_CONFIG)
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, evil, trio.base))
    plan = ipm.make_plan(analysis, similarity_threshold=0.5)
    ipm.merge(plan, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert plan.hash in text
    assert "<img" not in text
    assert ModelCard(text).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["merge", "ipmerge"],
    }


def test_the_model_card_s_metadata_names_the_parents_on_the_hub(analysis: Analysis) -> None:
    mllm, base, evil = (Source(n, "a1b2", "f") for n in ("org/mllm", "org/base", "x\n---\n<img>"))
    sources = Sources(mllm, base, Source("a/folder", None, "f"), (evil,))
    plan = replace(ipm.make_plan(analysis, similarity_threshold=0.5), sources=sources)
    card = ModelCard(write_card(plan))
    assert card.data.base_model == ["org/mllm", "org/base"]
    assert card.text.startswith("\n# A merged vision-language model")
    assert "<img" not in str(card)


def test_the_estimate_reads_headers_only(
    trio: Trio, analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0.5)
    monkeypatch.setattr(Checkpoint, "read", None)
    need = estimate_merge(plan, tmp_path / "out")
    assert need.n_merged == len(plan.selected)
    assert need.nbytes_written >= Checkpoint.open(trio.mllm).nbytes
    assert not list(tmp_path.iterdir())


# --- bad input: one sentence, and nothing is written ---


def refused(
    plan: MergePlan, tmp_path: Path, error: type[IPMergeError], words: str, **how: bool
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=words):
        ipm.merge(plan, tmp_path / "out", **how)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_is_not_empty_is_refused(analysis: Analysis, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(ipm.make_plan(analysis), tmp_path, CheckpointError, "exists and is not empty")


def test_weights_that_changed_since_the_plan_are_refused(own_trio: Trio, tmp_path: Path) -> None:
    analysis = ipm.analyse(ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base))
    plan = ipm.make_plan(analysis)
    save_file(fine_tuned(text_weights(), 11), own_trio.math / "model.safetensors")
    refused(plan, tmp_path, PairingError, "have changed since the plan was made")


@pytest.mark.parametrize(
    ("method", "choice"),
    [
        ("task_arithmetic", {}),
        ("ties", {}),
        ("ties", {"scope": "model"}),
        ("dare_ties", {}),
        ("breadcrumbs", {}),
        ("slerp", {}),
        ("metagpt", {}),
        ("tsv", {}),
    ],
)
def test_nan_weights_are_refused_and_leave_nothing(
    method: str, choice: dict[str, Any], own_trio: Trio, tmp_path: Path
) -> None:
    changed = weights(own_trio.math)
    changed["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(changed, own_trio.math / "model.safetensors")
    pair = ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base)
    plan = ipm.make_plan(pair, method, **choice)
    words = "up_proj.weight' .* holds 1 NaN or infinite values"
    refused(plan, tmp_path, CheckpointError, words, force=True)


def test_a_gain_that_overflows_the_stored_dtype_is_refused(tmp_path: Path) -> None:
    trio = write_trio(tmp_path / "trio", dtype=torch.float16)
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    plan = ipm.make_plan(pair, method="task_arithmetic", math_weight=1e9)
    refused(plan, tmp_path, CheckpointError, "has infinite or NaN values in F16")


def test_a_missing_source_is_named(own_trio: Trio, tmp_path: Path) -> None:
    analysis = ipm.analyse(ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base))
    plan = ipm.make_plan(analysis)
    own_trio.math.rename(own_trio.math.with_name("moved"))
    refused(plan, tmp_path, CheckpointError, "The model folder")


def test_a_device_that_is_too_small_hands_the_matrix_to_the_cpu(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ipm.make_plan(ipm.open_pair(trio.mllm, trio.math, trio.base), "ties")
    ipm.merge(plan, tmp_path / "expected")
    original, calls = merging.merging_of, []

    def small(*given: Any, **keywords: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return original(*given, **keywords)

    monkeypatch.setattr(merging, "merging_of", small)
    with pytest.warns(
        UserWarning, match="does not fit into the memory of cpu; falling back to the CPU"
    ):
        ipm.merge(plan, tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "expected").keys()
    for name, tensor in weights(tmp_path / "expected").items():
        assert torch.equal(tensor, weights(tmp_path / "out")[name])
