"""Norm ratio and cosine of two task vectors: exact, streamed, and said by check and analyse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, as_mllm, fine_tuned, text_weights, write_model
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.models import differences
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.models.siblings import Finding
from ipmerge_core.models.task_vectors import UNEQUAL, TaskVectorProducts

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def written(folder: Path, dtype: torch.dtype, strength: float) -> ModelPair:
    """A trio whose expert's change is `strength` times as large as the MLLM's."""
    base = text_weights()
    mllm = fine_tuned(base, 1)
    other = fine_tuned(base, 2)
    math = {
        name: weight + strength * (0.6 * (mllm[name] - weight) + 0.8 * (other[name] - weight))
        for name, weight in base.items()
    }
    folders = []
    for name, weights, config in (
        ("mllm", as_mllm(mllm), {"model_type": "llava", "text_config": TEXT_CONFIG}),
        ("math", math, TEXT_CONFIG),
        ("base", base, TEXT_CONFIG),
    ):
        stored = {key: weight.to(dtype).contiguous() for key, weight in weights.items()}
        folders.append(write_model(folder / name, stored, config))
    return ipm.open_pair(*folders)


def dense(pair: ModelPair) -> TaskVectorProducts:
    """The same numbers from whole tensors in fp64."""
    mllm, math, base = (
        load_file(Path(model.id) / "model.safetensors")
        for model in (pair.mllm, pair.math[0], pair.base)
    )
    vision = torch.cat(
        [(mllm[m.mllm].double() - base[m.name].double()).reshape(-1) for m in pair.matrices]
    )
    expert = torch.cat(
        [(math[m.math[0]].double() - base[m.name].double()).reshape(-1) for m in pair.matrices]
    )
    return TaskVectorProducts(
        float(vision @ vision), float(expert @ expert), float(vision @ expert)
    )


def message_of(pair: ModelPair, *, exact: bool) -> Finding:
    (found,) = (f for f in pair.check(exact=exact) if f.subject == "math: task vector")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_streamed_products_are_those_of_the_whole_tensors(
    dtype: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences, "_PIECE", piece)
    pair = written(tmp_path, DTYPES[dtype], 2.0)
    expected = dense(pair)
    found = message_of(pair, exact=True)
    assert found.message == f"{expected.describe()} over all decoder matrices."
    analysis = ipm.analyse(pair)
    for ours, theirs in zip(analysis.products(0), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for record in analysis.records:
        assert record.products.cosine is not None
        assert -1 <= record.products.cosine <= 1


@pytest.mark.parametrize(("strength", "level"), [(1.0, "ok"), (40.0, "warning"), (0.02, "warning")])
def test_very_unequal_changes_are_a_warning_with_a_remedy(
    strength: float, level: str, tmp_path: Path
) -> None:
    pair = written(tmp_path, torch.float32, strength)
    found = message_of(pair, exact=True)
    ratio = dense(pair).norm_ratio
    assert ratio is not None
    assert (found.level == "warning") == (ratio > UNEQUAL or ratio < 1 / UNEQUAL)
    assert found.level == level
    assert ("ip_merging" in found.remedy) == (level == "warning")


def test_samples_are_said_to_be_samples() -> None:
    demo = Path(__file__).parents[1] / "assets" / "demo"
    pair = ipm.open_pair(*(demo / name for name in ("mllm", "math", "base")))
    assert message_of(pair, exact=False).message.endswith("in the sampled rows.")


def test_the_command_line_says_both_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pair = written(tmp_path, torch.float32, 2.0)
    words = dense(pair).describe()
    models = ["--mllm", pair.mllm.id, "--math", pair.math[0].id, "--base", pair.base.id]
    assert main(["check", *models, "--exact"]) == 0
    assert f"{words} over all decoder matrices" in capsys.readouterr().out
    pack = tmp_path / "pack.json"
    assert main(["analyse", *models, "-o", str(pack), "--quiet"]) == 0
    assert words in capsys.readouterr().out
    other = tmp_path / "other.json"
    assert main(["analyse", *models, "-o", str(other), "--quiet", "--json"]) == 0
    (numbers,) = json.loads(capsys.readouterr().out)["task_vectors"]
    assert numbers["norm_ratio"] == pytest.approx(dense(pair).norm_ratio, rel=1e-6)
    assert numbers["cosine"] == pytest.approx(dense(pair).cosine, rel=1e-6)


def test_nothing_is_said_of_a_change_that_is_zero() -> None:
    for products in (
        TaskVectorProducts(0.0, 1.0, 0.0),
        TaskVectorProducts(1.0, 0.0, 0.0),
        TaskVectorProducts(float("nan"), 1.0, 0.0),
    ):
        assert products.describe() == ""
    assert TaskVectorProducts(0.0, 1.0, 0.0).norm_ratio is None
