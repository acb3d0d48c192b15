"""Kept updates of IP-Merging: the same bytes as without them, and nothing is decomposed again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model, write_trio

import ipmerge_core as ipm
from ipmerge_core.adapters.factor_set import iter_factor_set
from ipmerge_core.analysis.analyse import iter_pack_of
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.analysis.updates import UpdateStore, Variant
from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.methods.declarations import drained
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.spectral.similarity import Update


def analysed(pair: ModelPair, folder: Path, **options: Any) -> ipm.Analysis:
    """Analyse into a pack that leaves its updates in `folder / "updates"`."""
    pack, how = folder / "pack.json.gz", Options(**options)
    for _ in iter_pack_of(pair, pack, how, updates=folder / "updates"):
        pass
    return ipm.Analysis.load(pack)


def opened(trio: Trio, *more: Path, **options: Any) -> ModelPair:
    return ipm.open_pair(trio.mllm, [trio.math, *more], trio.base, **options)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def forbid_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a matrix was decomposed again")

    module = sys.modules["ipmerge_core.methods.projections"]
    monkeypatch.setattr(module, "svd", refused)
    monkeypatch.setattr(module, "existing", refused)


PLANS: list[dict[str, Any]] = [
    {},
    {"gamma_norm": "max", "lambda_": 4.0},
    {"similarity_threshold": 0.3, "layer_gains": (0.5, 2.0)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", PLANS, ids=["sum", "max", "selective"])
def test_a_merge_with_kept_updates_has_the_same_bytes_and_decomposes_nothing(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = write_trio(tmp_path / "models", dtype=dtype)
    second = write_model(
        tmp_path / "second", fine_tuned(text_weights(), 9), TEXT_CONFIG, dtype=dtype
    )
    analysis = analysed(opened(trio, second), tmp_path)
    plan = ipm.make_plan(analysis, **{"similarity_threshold": 0.0, **settings})
    assert plan.selected
    ipm.merge(plan, tmp_path / "without")
    forbid_decompositions(monkeypatch)
    ipm.merge(plan, tmp_path / "with", updates=tmp_path / "updates")
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    factors = drained(iter_factor_set(plan, opened(trio, second), updates=tmp_path / "updates"))
    assert len(factors.factors) == 2 * len(analysis.records) // 2


def test_what_an_analysis_cannot_leave_is_computed_once_by_the_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an own base of the MLLM the experts are moved before a merge."""
    trio = write_trio(tmp_path / "models")
    own = write_model(tmp_path / "own", fine_tuned(text_weights(), 6, scale=1e-4), TEXT_CONFIG)
    pair = opened(trio, base_mllm=own)
    plan = ipm.make_plan(analysed(pair, tmp_path), similarity_threshold=0.0)
    ipm.merge(plan, tmp_path / "without")
    first = list(iter_factor_set(plan, pair, updates=tmp_path / "updates"))
    assert {step.action for step in first} == {"decomposed"}
    forbid_decompositions(monkeypatch)
    again = list(iter_factor_set(plan, pair, updates=tmp_path / "updates"))
    assert {step.action for step in again} == {"kept"}
    ipm.merge(plan, tmp_path / "with", updates=tmp_path / "updates")
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")


def test_updates_of_other_weights_or_of_another_variant_are_not_used(tmp_path: Path) -> None:
    trio = write_trio(tmp_path / "models")
    pair = opened(trio)
    plan = ipm.make_plan(analysed(pair, tmp_path), similarity_threshold=0.0)

    def store(plan: MergePlan, pair: ModelPair, device: str = "cpu") -> UpdateStore:
        return UpdateStore(tmp_path / "updates", pair, Variant.of(plan.parameters), device)

    name = pair.matrices[0].name
    assert store(plan, pair).read(name, (0,)) is not None
    other = write_trio(tmp_path / "others", dtype=torch.bfloat16)
    assert store(plan, opened(other)).read(name, (0,)) is None
    assert store(plan, pair, "cuda").read(name, (0,)) is None  # rounded in another order
    warm = ipm.make_plan(ipm.analyse(pair, temperature=8.0), similarity_threshold=0.0)
    assert store(warm, pair).read(name, (0,)) is None
    assert store(plan, pair).size().matrices == len(pair.matrices)


def test_factors_that_are_larger_than_their_matrix_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = opened(write_trio(tmp_path / "models"))
    plan = ipm.make_plan(ipm.analyse(pair), similarity_threshold=0.0)
    monkeypatch.setattr("ipmerge_core.analysis.updates.SMALL", 0)
    store = UpdateStore(tmp_path, pair, Variant.of(plan.parameters))
    matrix = pair.matrices[0]
    m, n = matrix.shape
    wide, thin = (Update(torch.ones(m, q), torch.ones(q, n)) for q in (min(m, n), 1))
    assert not store.write(matrix.name, [wide])
    assert store.holds(matrix.name)
    assert store.read(matrix.name, (0,)) is None
    assert store.write(matrix.name, [thin])
    assert store.read(matrix.name, (0,)) is not None


@pytest.mark.parametrize("content", [b"", b"\x10" * 40], ids=["empty", "noise"])
def test_a_damaged_file_is_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    pair = opened(write_trio(tmp_path / "models"))
    plan = ipm.make_plan(analysed(pair, tmp_path), similarity_threshold=0.0)
    store = UpdateStore(tmp_path / "updates", pair, Variant.of(plan.parameters))
    (store.folder / "00000.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"00000.safetensors' cannot be read .* Delete the folder"):
        ipm.merge(plan, tmp_path / "out", updates=tmp_path / "updates")


@pytest.mark.parametrize("options", [{"quick": True}, {"rank": 3}])
def test_an_analysis_of_leading_directions_keeps_no_updates(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="leading directions"):
        analysed(opened(write_trio(tmp_path / "models")), tmp_path, **options)


def test_the_command_line_keeps_and_uses_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trio, kept = write_trio(tmp_path / "models"), str(tmp_path / "updates")
    models = ["--mllm", str(trio.mllm), "--math", str(trio.math), "--base", str(trio.base)]
    pack, plan = str(tmp_path / "p.json.gz"), str(tmp_path / "plan.json")
    assert main(["analyse", *models, "-o", pack, "--updates", kept, "--quiet"]) == 0
    assert main(["plan", pack, "--similarity-threshold", "0", "-o", plan]) == 0
    forbid_decompositions(monkeypatch)
    out = str(tmp_path / "out")
    assert main(["merge", plan, "-o", out, "--updates", kept, "--device", "cpu", "--quiet"]) == 0
    adapter = ["adapter", plan, "-o", str(tmp_path / "adapter"), "--updates", kept]
    assert main([*adapter, "--device", "cpu", "--max-rank", "64", "--quiet"]) == 0
    ties = str(tmp_path / "ties.json")
    assert main(["plan", pack, "--method", "ties", "-o", ties]) == 0
    capsys.readouterr()
    assert main(["merge", ties, "-o", out + "2", "--updates", kept]) == 2
    assert "--updates has no effect" in capsys.readouterr().err
