"""The estimate of a merge: one for the command line, the app and its API, advice included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Trio

import ipmerge_core as ipm
from ipmerge_core import cli
from ipmerge_core.merging import estimates
from ipmerge_core.merging.merge import estimate_merge
from ipmerge_core.methods import METHODS
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.models.shared_tokens import ROWS
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.format import format_estimate
from ipmerge_core.ui.merge.tab import readiness
from ipmerge_core.ui.method_choice import MethodChoice, chosen_plan
from ipmerge_core.ui.plan_choice import PlanChoice

PACK = "pack"  # the id of the demo trio's
FASTER = "it is faster on a GPU, or under `torchrun --nproc_per_node N"


@pytest.fixture
def pair(trio: Trio) -> ModelPair:
    return ipm.open_pair(trio.mllm, trio.math, trio.base)


def seconds(pair: ModelPair, out: Path, method: str, **options: object) -> float:
    return estimates.estimate_pair(ipm.make_plan(pair, method, **options), pair, out).seconds


def test_every_method_has_a_measured_rate():
    assert set(estimates.RATES) == set(METHODS)
    assert all(rate.work > 0 for rate in estimates.RATES.values())


@pytest.mark.parametrize("method", ["tsv", "wudi"])
def test_command_line_app_and_api_give_one_estimate_with_its_advice(
    method, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(estimates, "LONG", 0.0)
    monkeypatch.setattr(estimates, "TENSOR_SECONDS", 1.0)  # so that seconds are worth comparing
    plan = chosen_plan(PACK, PlanChoice(), MethodChoice(method))
    need = estimate_merge(plan, tmp_path / "out")
    assert FASTER in need.advice
    plan.save(tmp_path / "plan.json")
    command = ["merge", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out"), "--dry-run"]
    assert cli.main([*command, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"takes about {need.seconds:.0f} s on CPU" in said
    assert need.advice in said
    found = readiness(Backend(), PACK, PlanChoice(), MethodChoice(method), device="cpu")
    assert found.estimate is not None
    assert found.estimate.seconds == need.seconds
    assert found.estimate.advice == need.advice
    assert format_estimate(need.seconds, "cpu") in found.confirmation
    assert f"<dt>Advice</dt><dd>{METHODS[method].label}" in found.confirmation
    assert FASTER in found.confirmation


def test_a_short_merge_needs_no_advice(pair: ModelPair, tmp_path: Path) -> None:
    for method in ("tsv", "ties"):
        need = estimates.estimate_pair(ipm.make_plan(pair, method), pair, tmp_path)
        assert need.advice == ""


def test_steps_of_wudi_count_and_its_closed_form_has_none(pair: ModelPair, tmp_path: Path) -> None:
    none, few, many = (seconds(pair, tmp_path, "wudi", iterations=n) for n in (0, 100, 1000))
    assert none < few < many < 11 * few
    plan = ipm.make_plan(pair, "wudi", closed_form=True)
    plans = [replace(plan, parameters={**plan.parameters, "iterations": n}) for n in (100, 1000)]
    closed = [estimates.estimate_pair(made, pair, tmp_path).seconds for made in plans]
    assert closed[0] == closed[1] < few


def test_a_first_pass_counts(pair: ModelPair, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(estimates, "DISK_RATE", 1e30)
    monkeypatch.setattr(estimates, "TENSOR_SECONDS", 0)
    monkeypatch.setitem(estimates.RATES, "metagpt", estimates.Rate(0.0, 1.0))
    plan = ipm.make_plan(pair, "metagpt", scope="model")
    alone = ipm.make_plan(pair, "metagpt", scope="tensor")
    whole, single = (
        estimates.estimate_pair(made, pair, tmp_path).seconds for made in (plan, alone)
    )
    assert whole == pytest.approx(2 * single)


def test_norms_are_counted_as_task_arithmetic_where_a_method_says_nothing_of_them(
    pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(estimates.RATES, "tsv", estimates.Rate(1000.0, 1e30))
    monkeypatch.setitem(estimates.RATES, "task_arithmetic", estimates.Rate(1.0, 1e30))
    matrices = seconds(pair, tmp_path, "tsv")
    norms = seconds(pair, tmp_path, "tsv", norms="merge")
    assert matrices == pytest.approx(1000 * len(pair.matrices), rel=1e-3)
    assert norms - matrices == pytest.approx(len(pair.vectors), abs=0.9)


def test_rows_of_embeddings_are_counted_one_by_one(
    pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(estimates.RATES, "ties", estimates.Rate(1.0, 1e30))
    before = seconds(pair, tmp_path, "ties")
    first, *rest = pair.matrices
    monkeypatch.setattr(
        estimates, "chosen", lambda plan, pair: [(replace(first, module=ROWS), (0,))]
    )
    assert before == pytest.approx(1 + len(rest), abs=0.9)
    assert seconds(pair, tmp_path, "ties") == pytest.approx(first.shape[0], abs=0.9)
