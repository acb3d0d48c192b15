"""Adapters as experts and as MLLMs: checked, analysed and merged like folded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import LAYERS, TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model
from peft_adapters import Made, edit_config, make_adapter
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.analysis.analyse import iter_pack
from ipmerge_core.analysis.records import LayerRecord
from ipmerge_core.cli import main
from ipmerge_core.errors import PairingError
from ipmerge_core.merging.merge import reopen
from ipmerge_core.models.opening import open_model
from ipmerge_core.planning.plan import make_plan
from ipmerge_core.planning.relocation import relocate
from ipmerge_core.ui.analyse.models_form import AnalysisRequest, Checked, check_request

METHODS = ("ip_merging", "task_arithmetic", "tsv", "iso_c", "iso_cts", "knots_ties", "ties")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trio, Made, Path]:
    """A trio in one dtype, an adapter of rank 2 on q and v, and its weights folded in fp32."""
    folder, dtype = tmp_path_factory.mktemp("experts"), request.param
    base = text_weights()
    trio = Trio(
        base=write_model(folder / "base", base, TEXT_CONFIG, dtype=dtype),
        mllm=write_model(
            folder / "mllm",
            as_mllm(fine_tuned(base, 1, scale=0.02)),
            {"model_type": "llava", "text_config": TEXT_CONFIG},
            dtype=dtype,
        ),
        math=folder,
        math_2=folder,
    )
    made = make_adapter(trio.base, folder / "adapter", strength=0.045)
    folded = write_model(folder / "folded", made.merged, TEXT_CONFIG)
    return trio, made, folded


def test_the_check_names_the_rank_and_the_matrices(models: tuple[Trio, Made, Path]) -> None:
    trio, made, _ = models
    found = {f.subject: f for f in ipm.open_pair(trio.mllm, made.folder, trio.base).check()}
    assert found["math: adapter"].level == "ok"
    assert "adapter of rank 2 on 6 matrices of '" in found["math: adapter"].message
    assert not [f for f in found.values() if f.level == "refusal"]
    assert "k_proj" in found["math: distance to its base"].message  # equals the base's


def by_name(records: tuple[LayerRecord, ...]) -> dict[str, LayerRecord]:
    return {record.name: record for record in records}


def test_an_analysis_finds_the_directions_of_the_folded_weights(
    models: tuple[Trio, Made, Path],
) -> None:
    trio, made, folded = models
    known = by_name(ipm.analyse(ipm.open_pair(trio.mllm, made.folder, trio.base)).records)
    plain = by_name(ipm.analyse(ipm.open_pair(trio.mllm, folded, trio.base)).records)
    for name, record in known.items():
        other = plain[name]
        assert record.index == other.index
        assert record.math_directions == (2 if ("q_proj" in name or "v_proj" in name) else 0)
        if record.math_directions != other.math_directions:
            continue  # a direction below the rounding of the folded files
        for kind, value in record.similarity.items():
            assert value == pytest.approx(other.similarity[kind], abs=1e-5)
        assert record.rho == pytest.approx(other.rho, rel=1e-4)
        assert record.math_nuclear == pytest.approx(other.math_nuclear, rel=1e-4)
        assert record.inner == pytest.approx(other.inner, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_with_an_adapter_is_that_with_its_folded_weights(
    method: str, models: tuple[Trio, Made, Path], tmp_path: Path
) -> None:
    trio, made, folded = models
    merged = {}
    for label, expert in (("adapter", made.folder), ("folded", folded)):
        pair = ipm.open_pair(trio.mllm, expert, trio.base)
        source = ipm.analyse(pair) if method == "ip_merging" else pair
        asked = {"similarity_threshold": 0.0} if method == "ip_merging" else {}
        ipm.merge(make_plan(source, method=method, **asked), tmp_path / label)
        merged[label] = load_file(tmp_path / label / "model.safetensors")
    base = load_file(trio.mllm / "model.safetensors")
    for name, ours in merged["adapter"].items():
        theirs = merged["folded"][name]
        assert ours.dtype == theirs.dtype
        assert ours.isfinite().all()
        size = (theirs.double() - base[name].double()).norm()
        off = (ours.double() - theirs.double()).norm()
        step = torch.finfo(ours.dtype).eps * theirs.double().norm()
        if method.startswith("iso") and ours.dtype == torch.bfloat16:
            continue  # folded files have fewer directions above their rounding
        assert off <= 1e-3 * size + 0.05 * step
    changed = [name for name in base if not torch.equal(base[name], merged["adapter"][name])]
    assert any("q_proj" in name for name in changed)


def test_the_manifest_and_the_card_name_the_adapter(
    models: tuple[Trio, Made, Path], tmp_path: Path
) -> None:
    trio, made, _ = models
    pair = ipm.open_pair(trio.mllm, made.folder, trio.base)
    plan = make_plan(pair, method="task_arithmetic")
    manifest = ipm.merge(plan, tmp_path / "out")
    assert manifest["computed"]["math"].startswith("adapter of rank 2 on 6 matrices of '")
    assert "adapter of rank 2 on 6 matrices" in (tmp_path / "out" / "README.md").read_text()
    assert reopen(plan).math[0].fingerprint == pair.math[0].fingerprint
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_lora_folded_into_q_and_v_only_is_accepted(models: tuple[Trio, Made, Path]) -> None:
    trio, _, folded = models
    findings = ipm.open_pair(trio.mllm, folded, trio.base).check()
    assert not [finding for finding in findings if finding.level == "refusal"]


@pytest.mark.parametrize("layers", [[0], [LAYERS - 1], [1]])
def test_lora_in_one_layer_only_is_accepted(layers: list[int], trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(
        trio.base, tmp_path / "adapter", target_modules=["v_proj"], layers_to_transform=layers
    )
    folded = write_model(tmp_path / "folded", made.merged, TEXT_CONFIG)
    for expert in (made.folder, folded):
        findings = ipm.open_pair(trio.mllm, expert, trio.base).check()
        assert not [finding for finding in findings if finding.level == "refusal"]


def test_an_adapter_that_changes_nothing_is_refused(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter", strength=0.0)
    findings = ipm.open_pair(trio.mllm, made.folder, trio.base).check()
    assert any("its task vector is zero" in f.message for f in findings if f.level == "refusal")


def test_the_command_line_takes_an_adapter(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter")
    named = ["--mllm", str(trio.mllm), "--math", str(made.folder)]
    assert main(["check", *named, "--base", str(trio.base)]) == 0
    assert "adapter of rank 2 on 6 matrices of 'base'" in capsys.readouterr().out
    assert main(["check", *named]) == 0  # the base is the adapter's
    assert "adapter of rank 2 on 6 matrices of 'base'" in capsys.readouterr().out


def test_an_adapter_of_another_base_exits_with_2_and_writes_nothing(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**TEXT_CONFIG, "hidden_size": 8, "num_attention_heads": 2}
    other = {
        name: weight[tuple(slice(size // 2) for size in weight.shape)]
        for name, weight in text_weights().items()
    }
    write_model(tmp_path / "small", other, {**small, "intermediate_size": 12, "vocab_size": 10})
    made = make_adapter(trio.base, tmp_path / "adapter")
    out = tmp_path / "pack.json.gz"
    named = ["--mllm", str(trio.mllm), "--math", str(made.folder), "--out", str(out)]
    assert main(["analyse", *named, "--base", str(tmp_path / "small")]) == 2
    assert "Use the model that it was trained on" in capsys.readouterr().err
    assert not out.exists()


def test_without_a_base_an_adapter_has_to_name_it(trio: Trio) -> None:
    with pytest.raises(PairingError, match="No base given.*unless a math model is an adapter"):
        ipm.open_pair(trio.mllm, trio.math)


def test_the_app_checks_and_analyses_an_adapter(
    models: tuple[Trio, Made, Path], tmp_path: Path
) -> None:
    trio, made, _ = models
    asked = AnalysisRequest(str(trio.mllm), (str(made.folder),), str(trio.base))
    *_, found = check_request(asked, hub_only=False, device="cpu")
    assert isinstance(found, Checked)
    assert found.ready
    assert found.pinned is not None
    messages = [f.message for f in found.findings if f.subject == "math: adapter"]
    assert "adapter of rank 2 on 6 matrices of 'base'" in messages[0]
    pack = tmp_path / "pack.json.gz"
    for _ in iter_pack(*found.pinned[:1], list(found.pinned.math), found.pinned.base, pack):
        pass
    records = ipm.Analysis.load(pack).records
    assert {record.math_directions for record in records} == {0, 2}


def test_a_plan_follows_an_adapter_that_has_moved(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter")
    plan = make_plan(ipm.open_pair(trio.mllm, made.folder, trio.base), method="task_arithmetic")
    moved = made.folder.rename(tmp_path / "moved")
    sources = relocate(plan.sources, math=[str(moved)])
    assert sources.math[0].id == str(moved)
    edit_config(moved, lora_alpha=7)
    with pytest.raises(PairingError, match="are not those of the math"):
        relocate(plan.sources, math=[str(moved)])


def test_an_adapter_written_during_a_run_is_noticed(trio: Trio, tmp_path: Path) -> None:
    made = make_adapter(trio.base, tmp_path / "adapter")
    pair = ipm.open_pair(trio.mllm, made.folder, trio.base)
    before = pair.stamps()
    pair.check_unchanged(before)
    edit_config(made.folder, lora_alpha=7)
    with pytest.raises(PairingError, match="'adapter_config.json' of .*adapter' was written"):
        pair.check_unchanged(before)


def test_an_exported_adapter_is_accepted_as_the_mllm(trio: Trio, tmp_path: Path) -> None:
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    plan = make_plan(analysis, similarity_threshold=0.0, lambda_=2.0)
    ipm.export_adapter(plan, tmp_path / "adapter", max_rank=16, tolerance=1e-6)
    ipm.merge(plan, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    model = open_model(tmp_path / "adapter")
    for name, value in merged.items():
        torch.testing.assert_close(model.read(name), value, rtol=1e-4, atol=1e-5)
