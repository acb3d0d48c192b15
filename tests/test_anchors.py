"""Anchors: what changes are measured from, against the formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model
from safetensors.torch import load_file
from torch import Tensor

import ipmerge_core as ipm
from ipmerge_core.errors import PlanError
from ipmerge_core.pairing import ModelPair
from ipmerge_core.plan import MergePlan
from ipmerge_core.recipes import export_recipe

Truth = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of W0, B_v, W_v, W_e
TRUTHS: dict[str, Truth] = {
    "two_base": lambda w0, bv, wv, we: bv + (wv - bv) + 0.4 * (we - w0),
    "root": lambda w0, _bv, wv, we: w0 + (wv - w0) + 0.4 * (we - w0),
    "inject": lambda w0, _bv, wv, we: wv + 0.4 * (we - w0),
    "interp": lambda _w0, _bv, wv, we: wv + 0.4 * (we - wv),
}
WEIGHTED: dict[str, Truth] = {
    "two_base": lambda w0, bv, wv, we: bv + 0.8 * (wv - bv) + 0.4 * (we - w0),
    "root": lambda w0, _bv, wv, we: w0 + 0.8 * (wv - w0) + 0.4 * (we - w0),
}
CASES = [(1.0, anchor, truth) for anchor, truth in TRUTHS.items()]
CASES += [(0.8, anchor, truth) for anchor, truth in WEIGHTED.items()]


@pytest.fixture(scope="module")
def two_bases(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An MLLM, and the base of its own that it was tuned from."""
    folder = tmp_path_factory.mktemp("own")
    root = fine_tuned(text_weights(), 8)
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    mllm = write_model(folder / "mllm", as_mllm(fine_tuned(root, 1)), config)
    return mllm, write_model(folder / "root", root, TEXT_CONFIG)


@pytest.fixture(scope="module")
def pair(trio: Trio, two_bases: tuple[Path, Path]) -> ModelPair:
    return ipm.open_pair(two_bases[0], trio.math, trio.base, base_mllm=two_bases[1])


def merged(pair: ModelPair, out: Path, **choice: Any) -> dict[str, Tensor]:
    plan = ipm.make_plan(pair, **{"method": "task_arithmetic", "math_weight": 0.4, **choice})
    plan.save(out.with_suffix(".json"))
    ipm.merge(MergePlan.load(out.with_suffix(".json")), out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(("mllm_weight", "anchor", "truth"), CASES)
def test_task_arithmetic_is_the_formula_of_its_anchor(
    mllm_weight: float, anchor: str, truth: Truth, trio: Trio, pair: ModelPair, tmp_path: Path
) -> None:
    after = merged(pair, tmp_path / "out", anchor=anchor, mllm_weight=mllm_weight)
    folders = (trio.base, Path(pair.base_mllm.id), Path(pair.mllm.id), trio.math)
    w0, bv, wv, we = (load_file(folder / "model.safetensors") for folder in folders)
    for match in pair.matrices:
        expected = truth(
            w0[match.name].double(),
            bv[match.base_mllm].double(),
            wv[match.mllm].double(),
            we[match.math[0]].double(),
        )
        error = (after[match.mllm].double() - expected).norm() / expected.norm()
        assert error < 1e-6


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "della"])
@pytest.mark.parametrize("anchor", ["inject", "interp"])
def test_without_weight_on_the_expert_the_mllm_is_left_bit_for_bit(
    anchor: str, method: str, pair: ModelPair, tmp_path: Path
) -> None:
    after = merged(pair, tmp_path / "out", method=method, anchor=anchor, math_weight=0.0)
    before = load_file(Path(pair.mllm.id) / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_injecting_does_not_depend_on_the_mllms_base(
    trio: Trio, two_bases: tuple[Path, Path], pair: ModelPair, tmp_path: Path
) -> None:
    other = ipm.open_pair(two_bases[0], trio.math, trio.base)
    choice = {"method": "ties", "anchor": "inject", "density": 0.5}
    one, two = merged(pair, tmp_path / "one", **choice), merged(other, tmp_path / "two", **choice)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_with_one_base_the_default_is_the_root(trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    plain = merged(pair, tmp_path / "plain", method="ties")
    root = merged(pair, tmp_path / "root", method="ties", anchor="root")
    assert all(torch.equal(plain[name], root[name]) for name in plain)
    plan = ipm.make_plan(pair, "ties")
    assert plan.anchor == "two_base"
    assert plan.hash != ipm.make_plan(pair, "ties", anchor="inject").hash


def test_the_preview_is_exact_for_injecting_and_refuses_what_was_not_measured(trio: Trio) -> None:
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    plain = ipm.make_plan(analysis, "task_arithmetic")
    injected = ipm.make_plan(analysis, "task_arithmetic", anchor="inject")
    assert injected.preview() == plain.preview()
    between = ipm.make_plan(analysis, "task_arithmetic", anchor="interp")
    with pytest.raises(PlanError, match="no exact preview"):
        between.preview()
    with pytest.raises(PlanError, match="anchor is inject"):
        export_recipe(injected)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"method": "tsv", "anchor": "inject"}, "own base"),
        ({"method": "linear", "anchor": "inject"}, "math_weight"),
        ({"method": "metagpt", "anchor": "interp"}, "math_weight"),
        ({"anchor": "inject", "mllm_weight": 0.9}, "stays whole"),
        ({"anchor": "both"}, "expected two_base or root or inject or interp"),
    ],
)
def test_an_anchor_without_meaning_is_refused(
    choice: dict[str, Any], words: str, pair: ModelPair
) -> None:
    with pytest.raises(PlanError, match=words):
        ipm.make_plan(pair, **{"method": "task_arithmetic", **choice})
