"""Anchors: the reference weights of task vectors, against the formulas in fp64."""

from __future__ import annotations

import json
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
from ipmerge_core.methods import METHODS
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.planning.scope import choose_anchor

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
    choice = {"method": "task_arithmetic", "math_weight": 0.4, **choice}
    plan = ipm.make_plan(pair, **{name: v for name, v in choice.items() if v is not None})
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


# --- the default ---


def test_a_plain_sum_is_injected_unless_it_scales_the_mllm(pair: ModelPair) -> None:
    assert ipm.make_plan(pair, "task_arithmetic").anchor == "inject"
    assert ipm.make_plan(pair, "task_arithmetic", mllm_weight=0.8).anchor == "two_base"
    for name, method in METHODS.items():
        assert method.anchor == {
            "task_arithmetic": "inject",
            **dict.fromkeys(("linear", "layer_swap", "slerp", "karcher"), "interp"),
            **dict.fromkeys(("fisher", "regmean"), "interp"),
        }.get(name, "two_base")


def test_what_is_injected_by_default_is_the_method_itself_bit_for_bit(
    trio: Trio, tmp_path: Path
) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    after = merged(pair, tmp_path / "out")
    folders = (trio.base, trio.mllm, trio.math)
    w0, wv, we = (load_file(folder / "model.safetensors") for folder in folders)
    for m in pair.matrices:
        models = w0[m.name], wv[m.mllm], we[m.math[0]]
        expected = METHODS["task_arithmetic"](*models, math_weight=0.4)
        assert torch.equal(after[m.mllm], expected)


def test_with_two_bases_too_a_plain_sum_is_injected(
    trio: Trio, pair: ModelPair, tmp_path: Path
) -> None:
    after = merged(pair, tmp_path / "out")
    w0, we = (load_file(folder / "model.safetensors") for folder in (trio.base, trio.math))
    wv = load_file(Path(pair.mllm.id) / "model.safetensors")
    for m in pair.matrices:
        expected = wv[m.mllm].double() + 0.4 * (we[m.math[0]].double() - w0[m.name].double())
        assert torch.allclose(after[m.mllm].double(), expected, rtol=0, atol=1e-7)


def test_averages_of_weights_take_every_model_as_it_is(pair: ModelPair, tmp_path: Path) -> None:
    folders = (Path(pair.mllm.id), Path(pair.math[0].id))
    wv, we = (load_file(folder / "model.safetensors") for folder in folders)
    for method in ("linear", "layer_swap", "slerp", "karcher"):
        extra = {"last_kept_layer": 0} if method == "layer_swap" else {}
        after = merged(pair, tmp_path / method, method=method, math_weight=None, **extra)
        for m in pair.matrices:
            models = wv[m.mllm], wv[m.mllm], we[m.math[0]]
            expected = METHODS[method](*models, tensor_name=m.name, **extra)
            assert torch.equal(after[m.mllm], expected)


def test_with_one_base_the_default_of_elections_is_the_root(trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    plain = merged(pair, tmp_path / "plain", method="ties")
    root = merged(pair, tmp_path / "root", method="ties", anchor="root")
    assert all(torch.equal(plain[name], root[name]) for name in plain)
    plan = ipm.make_plan(pair, "ties")
    assert plan.anchor == "two_base"
    assert plan.hash != ipm.make_plan(pair, "ties", anchor="inject").hash


# --- all four, for every method that has them ---

FOUR = [name for name, m in METHODS.items() if not m.needs_analysis and m.data is None]


@pytest.mark.parametrize("method", FOUR)
@pytest.mark.parametrize("anchor", ["two_base", "root", "inject", "interp"])
def test_every_method_merges_from_every_anchor_what_it_makes_of_matrices_moved_there(
    method: str, anchor: str, trio: Trio, pair: ModelPair, tmp_path: Path
) -> None:
    extra = {"last_kept_layer": 0} if method == "layer_swap" else {}
    choice = {"method": method, "anchor": anchor, "math_weight": None, **extra}
    after = merged(pair, tmp_path / "out", include=r"layers\.1\.", **choice)
    folders = (trio.base, Path(pair.base_mllm.id), Path(pair.mllm.id), trio.math)
    w0, bv, wv, we = (load_file(folder / "model.safetensors") for folder in folders)
    manifest = json.loads((tmp_path / "out" / "ipmerge.json").read_text())
    statistic = manifest["plan"]["statistic"]
    supplied = {"statistic": tuple(statistic)} if statistic else {}
    for m in (match for match in pair.matrices if match.layer == 1):
        names = (m.name, m.base_mllm, m.mllm, m.math[0])
        base, own, mllm, math = (
            w[n].double() for w, n in zip((w0, bv, wv, we), names, strict=True)
        )
        moved = {
            "two_base": (own, mllm, math - base + own),
            "root": (base, mllm, math),
            "inject": (mllm, mllm, math - base + mllm),
            "interp": (mllm, mllm, math),
        }[anchor]
        expected = METHODS[method](*moved, tensor_name=m.name, **supplied, **extra)
        error = (after[m.mllm].double() - expected).norm() / expected.norm()
        assert error < (1e-3 if method == "wudi" else 1e-5)


@pytest.mark.parametrize("method", ["metagpt", "nan"])
def test_weights_from_norms_are_measured_before_the_mllm_is_made_the_anchor(
    method: str, pair: ModelPair, tmp_path: Path
) -> None:
    statistics = []
    for anchor in ("two_base", "inject", "interp"):
        choice = {"norm_of": "tau"} if method == "nan" else {}
        merged(pair, tmp_path / anchor, method=method, anchor=anchor, math_weight=None, **choice)
        manifest = json.loads((tmp_path / anchor / "ipmerge.json").read_text())
        statistics.append(manifest["plan"]["statistic"])
    assert statistics[0] == statistics[1] == statistics[2]
    assert 0 < statistics[0][1] < 1


# --- previews ---


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "metagpt", "nuslerp"])
@pytest.mark.parametrize("anchor", ["two_base", "root", "inject", "interp"])
def test_the_preview_is_exact_from_every_anchor_on_one_base(
    method: str, anchor: str, trio: Trio, tmp_path: Path
) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    plan = ipm.make_plan(ipm.analyse(pair), method, anchor=anchor)
    ipm.merge(plan, tmp_path / "out")
    assert plan.preview().relative_change == pytest.approx(change_of(pair, tmp_path / "out"), 1e-4)


def change_of(pair: ModelPair, out: Path) -> float:
    before = load_file(Path(pair.mllm.id) / "model.safetensors")
    after = load_file(out / "model.safetensors")
    names = [m.mllm for m in pair.matrices]
    moved = sum(float((after[n].double() - before[n].double()).square().sum()) for n in names)
    return (moved / sum(float(before[n].double().square().sum()) for n in names)) ** 0.5


def test_the_preview_refuses_what_was_measured_from_other_bases(pair: ModelPair) -> None:
    analysis = ipm.analyse(pair)
    assert ipm.make_plan(analysis, "task_arithmetic").preview().relative_change > 0
    for anchor in ("root", "interp"):
        with pytest.raises(PlanError, match=f"task vectors of the anchor {anchor}"):
            ipm.make_plan(analysis, "task_arithmetic", anchor=anchor).preview()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"method": "metagpt", "scope": "tensor", "anchor": "inject"}, "scope=model"),
        ({"anchor": "inject", "mllm_weight": 0.9}, "is not scaled"),
        ({"anchor": "both"}, "expected inject or two_base or root or interp"),
    ],
)
def test_an_anchor_without_meaning_is_refused(
    choice: dict[str, Any], words: str, pair: ModelPair
) -> None:
    with pytest.raises(PlanError, match=words):
        ipm.make_plan(pair, **{"method": "task_arithmetic", **choice})


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_calibrated_weights_are_not_moved(method: str) -> None:
    parameters = METHODS[method].complete({})
    assert choose_anchor(METHODS[method], None, parameters) == "interp"
    assert choose_anchor(METHODS[method], "root", parameters) == "root"
    for anchor in ("inject", "two_base"):
        with pytest.raises(PlanError, match="exactly the weights that were calibrated"):
            choose_anchor(METHODS[method], anchor, parameters)


def test_ip_merging_has_an_anchor_of_its_own(trio: Trio) -> None:
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    with pytest.raises(PlanError, match="adds to the MLLM"):
        ipm.make_plan(analysis, anchor="inject")
