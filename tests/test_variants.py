"""Variants of IP-Merging where nothing is to be protected or added, and bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Trio
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core import cli
from ipmerge_core.adapters.export import export_adapter
from ipmerge_core.calibration.store import Measured, Measurements
from ipmerge_core.errors import PlanError
from ipmerge_core.merging.in_memory import iter_merged_tensors
from ipmerge_core.methods import METHODS
from ipmerge_core.planning.description import rounding_on
from ipmerge_core.spectral.kinds import KEPT_SHARES, TRUNCATIONS
from ipmerge_core.spectral.protection import energy_rank, input_filter, off_inputs, protection
from ipmerge_core.spectral.spectrum import svd
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.merge.tab import readiness
from ipmerge_core.ui.plan_choice import PlanChoice

DEMO = Path(__file__).parents[1] / "assets" / "demo"
MERGE = METHODS["ip_merging"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = draw(12, 8)
MLLM, MATH = BASE + 0.1 * draw(12, 8, seed=1), BASE + 0.1 * draw(12, 8, seed=2)


def gram(n: int, tokens: int, seed: int) -> torch.Tensor:
    inputs = draw(tokens, n, seed=seed) * torch.linspace(0.1, 3, n, dtype=torch.float64)
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("choice", [{"projector": "complement"}, {"projector": "protect"}])
def test_without_a_task_vector_of_the_mllm_the_expert_passes(choice):
    merged = MERGE(BASE, BASE, MATH, **choice)
    assert torch.allclose(merged, MATH, atol=1e-12)


def test_a_complement_of_all_energy_leaves_nothing_in_the_directions():
    merged = MERGE(BASE, MLLM, MATH, projector="complement", energy=1.0)
    assert float((merged - MLLM).norm()) < 1e-6  # dV has every direction
    low = BASE + 0.1 * draw(12, 1, seed=3) @ draw(1, 8, seed=4)
    change = MERGE(BASE, low, MATH, projector="complement", energy=1.0) - low
    direction = torch.linalg.svd(low - BASE).Vh[0]
    assert float((change @ direction).norm()) < 1e-6
    assert float(change.norm()) > 0.5 * float((MATH - BASE).norm())


def test_a_complement_of_no_energy_is_task_arithmetic():
    merged = MERGE(BASE, MLLM, MATH, projector="complement", energy=0.0)
    assert torch.allclose(merged, MLLM + MATH - BASE, atol=1e-12)


@pytest.mark.parametrize("choice", [{}, {"projector": "complement"}, {"ablation": "select_only"}])
def test_a_budget_is_the_relative_change(choice):
    for gain in (1.0, 3.0):
        change = MERGE(BASE, MLLM, MATH, budget=0.02, lambda_=gain, **choice) - MLLM
        assert float(change.norm() / MLLM.norm()) == pytest.approx(0.02 * gain)
    still = MERGE(BASE, MLLM, BASE, budget=0.02, **choice)
    assert torch.equal(still, MLLM)


def test_an_output_budget_is_the_relative_change_of_the_outputs():
    G = gram(8, 40, 5)
    given = {"mllm_gram": G, "math_gram": [G]}
    change = MERGE(BASE, MLLM, MATH, output_budget=0.03, ablation="select_only", **given) - MLLM
    size = torch.trace(change @ G @ change.T) / torch.trace(MLLM @ G @ MLLM.T)
    assert float(size.sqrt()) == pytest.approx(0.03)


def test_an_output_budget_bounds_the_change_of_the_weights():
    silent = torch.zeros(8, 8, dtype=torch.float64)
    silent[0, 0] = 1.0  # only the first input was seen
    change = MATH - BASE
    change[:, 0] *= 1e-4
    given = {"mllm_gram": silent, "math_gram": [silent], "ablation": "select_only"}
    moved = MERGE(BASE, MLLM, BASE + change, output_budget=0.03, **given) - MLLM
    assert float(moved.norm() / MLLM.norm()) == pytest.approx(0.06)
    zero = {**given, "mllm_gram": 0 * silent}
    with pytest.raises(PlanError, match="outputs on the measured inputs are zero"):
        MERGE(BASE, MLLM, MATH, output_budget=0.03, **zero)


@pytest.mark.parametrize(("shape", "rank"), [((300, 200), 200), ((120, 200), 40), ((64, 512), 1)])
@pytest.mark.parametrize("more", [{}, {"budget": 0.05}, {"output_budget": 0.05}])
def test_a_budget_does_not_scale_up_the_rounding_of_an_update_of_zero(shape, rank, more):
    rows, base = draw(rank, shape[1], seed=8), draw(*shape, seed=5)  # dM lies inside dV's rows
    base, mllm, expert = (
        (base + part).float()
        for part in (0, *(0.01 * draw(shape[0], rank, seed=seed) @ rows for seed in (6, 7)))
    )
    G = gram(shape[1], 600, 9).float()
    whole = {"projector": "complement", "energy": 1.0, "mllm_gram": G, "math_gram": [G]}
    assert torch.equal(MERGE(base, mllm, expert, **whole, **more), mllm)


def test_the_preview_of_a_budget_knows_which_updates_are_zero():
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    how = {"similarity_threshold": 0.0, "projector": "complement", "energy": 1.0, "budget": 0.05}
    plan = ipm.make_plan(analysis, **how)
    before = load_file(DEMO / "mllm" / "model.safetensors")
    matrices = {record.mllm_name for record in analysis.records}
    change = {
        step.name: (step.tensor.double() - before[step.name].double()).norm().item()
        for step in iter_merged_tensors(plan)
        if step.tensor is not None
    }
    assert sorted(change) == sorted(matrices)
    assert sum(value == 0 for value in change.values()) > 20
    sizes = {name: before[name].double().norm().item() for name in matrices}
    measured = math.hypot(*change.values()) / math.hypot(*sizes.values())
    assert plan.preview().relative_change == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("beta", [1e3, 1e6, 1e12])
def test_a_very_large_beta_is_not_taken_for_an_invalid_gram_matrix(beta):
    X = draw(300, 8, seed=9).float()
    own, other = (X @ X.T, gram(300, 400, 7).float())
    change = draw(20, 300, seed=10).float()
    for filtered in (input_filter(change, own, other, beta), off_inputs(change, own, beta)):
        assert bool(filtered.isfinite().all())
        before, after = (float(torch.trace(U @ own @ U.T)) for U in (change, filtered))
        assert after < 1e-3 * before


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_filter_never_moves_the_outputs_of_the_mllm_more_than_the_whole_change(beta, tokens):
    own, other, change = gram(8, tokens, 6), gram(8, tokens, 7), MATH - BASE
    for filtered in (input_filter(change, own, other, beta), off_inputs(change, own, beta)):
        moved = [float(torch.trace(U @ own @ U.T)) for U in (filtered, change)]
        assert moved[0] <= moved[1] * (1 + 1e-9)
    assert float(off_inputs(change, own, beta).norm()) <= float(change.norm()) * (1 + 1e-9)
    diagonal = off_inputs(change, own.diagonal(), beta)
    whole = off_inputs(change, torch.diag(own.diagonal()), beta)
    assert torch.allclose(diagonal, whole, atol=1e-12)


def test_a_gram_matrix_of_zeros_protects_nothing():
    zero, change = torch.zeros(8, 8, dtype=torch.float64), MATH - BASE
    assert torch.equal(off_inputs(change, zero, 5.0), change)
    assert torch.equal(input_filter(change, zero, gram(8, 40, 8), 5.0), change)
    assert torch.equal(input_filter(change, zero, zero, 5.0), change)


def test_a_factor_is_of_its_gram_matrices_and_beta():
    own, other, change = gram(8, 40, 6), gram(8, 40, 7), MATH - BASE
    first = input_filter(change, own, other, 1.0)
    assert not torch.allclose(first, input_filter(change, own, other, 2.0))
    assert not torch.allclose(first, off_inputs(change, own, 1.0))
    assert torch.equal(first, input_filter(change, own, other, 1.0))
    own.mul_(torch.linspace(1, 4, 8)).mul_(torch.linspace(1, 4, 8)[:, None])  # the same tensor
    assert not torch.allclose(first, input_filter(change, own, other, 1.0))


def test_every_expert_has_its_own_factor_of_the_same_gram_matrix(monkeypatch):
    own, others = gram(8, 40, 6), [gram(8, 40, seed) for seed in (7, 8)]
    counted, cholesky = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda matrix: counted.append(matrix) or cholesky(matrix)
    )
    for _ in range(3):  # q, k and v
        for other in others:
            input_filter(MATH - BASE, own, other, 1.0)
    assert len(counted) == 2
    alone = off_inputs(MATH - BASE, own, 1.0)
    assert len(counted) == 3
    del others[1]  # its factor is not that of no expert
    assert torch.equal(off_inputs(MATH - BASE, own, 1.0), alone)
    others.append(gram(8, 40, 8))
    others[0] += torch.eye(8, dtype=torch.float64)
    input_filter(MATH - BASE, own, others[0], 1.0)
    input_filter(MATH - BASE, own, others[1], 1.0)
    assert len(counted) == 5


@pytest.mark.parametrize("filtered", [off_inputs, lambda dM, G, beta: input_filter(dM, G, G, beta)])
def test_a_gram_matrix_with_a_negative_entry_on_its_diagonal_is_refused(filtered):
    for G in (torch.tensor([-1.0] * 8), torch.diag(torch.tensor([1.0] * 7 + [-20.0]))):
        with pytest.raises(PlanError, match="has the diagonal entry .* Run the calibration again"):
            filtered(MATH - BASE, G, 1.0)


def test_a_gram_matrix_that_is_not_one_is_refused():
    with pytest.raises(PlanError, match="not positive semidefinite"):
        off_inputs(
            MATH - BASE, torch.ones(8, 8) + torch.eye(8).roll(1, 0) + torch.eye(8).roll(1, 1), 20.0
        )


def test_energies_are_counted_with_ties():
    S = torch.ones(20)
    assert [energy_rank(S, share / 20) for share in (0, 1, 7, 19, 20)] == [0, 1, 7, 19, 20]
    assert energy_rank(torch.tensor([]), 0.5) == energy_rank(torch.zeros(3), 1.0) == 0
    assert energy_rank(torch.tensor([1.0]), 0.5, total=100.0) == 1  # never more than there are
    with pytest.raises(PlanError, match=r"expected a number in \[0, 1\]"):
        energy_rank(S, 1.5)


def test_protection_lies_between_0_and_1_and_lets_pass_what_the_expert_wants():
    dV, dM = svd(MLLM - BASE), svd(MATH - BASE)
    weights = protection(dV, dM)
    assert bool(((weights >= 0) & (weights <= 1)).all())
    wanted = energy_rank(dV.S, 0.9)
    assert 0 < wanted < len(dV.S)
    same = protection(dV, dV)  # identical changes: only directions of the last 10 % are held back
    assert float(same[:wanted].max()) < 1e-6
    torch.testing.assert_close(same[wanted:], dV.S[wanted:].double() / dV.S[0].double())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"budget": 2.0}, r"budget is 2.0; expected a finite number in \[0, 1\]"),
        ({"budget": -0.1}, "budget is -0.1"),
        ({"projector": "complement", "energy": 1.5}, r"energy is 1.5; expected .* in \[0, 1\]"),
        ({"projector": "off_inputs", "beta": -1.0}, "beta is -1.0"),
        ({"projector": "off_inputs"}, "calibrate --kind gram"),
        ({"output_budget": 0.1}, "calibrate --kind gram"),
        ({"budget": 0.1, "output_budget": 0.1}, "rescaled to one of them"),
        ({"energy": 0.3}, "only used with projector=complement"),
        ({"beta": 0.3}, "only used with projector=input_filter or off_inputs"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(choice, message, trio: Trio):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    with pytest.raises(PlanError, match=message):
        ipm.make_plan(analysis, **choice)


def test_what_is_not_of_low_rank_cannot_be_an_adapter(trio: Trio, tmp_path):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    for number, projector in enumerate(("complement", "protect")):
        plan = ipm.make_plan(analysis, similarity_threshold=0.0, projector=projector)
        with pytest.raises(PlanError, match=f"IP-Merging with {projector} has full rank"):
            export_adapter(plan, tmp_path / str(number))


def test_between_the_named_shares_the_preview_says_which_there_are(trio: Trio):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    plan = ipm.make_plan(analysis, projector="complement", energy=0.33)
    with pytest.raises(PlanError, match="at the energies 0.05, 0.1, ..., 1, and the plan has"):
        plan.preview()


@pytest.mark.parametrize(
    ("pack", "budget", "warns"),
    [
        ("taught/taught.pack.json.gz", 0.001, True),
        ("taught/taught.pack.json.gz", 0.01, False),
        ("demo/pack.json.gz", 0.001, False),  # fp32
    ],
)
def test_a_change_below_the_rounding_of_16_bits_is_reported(pack, budget, warns, capsys, tmp_path):
    path = DEMO.parent / pack
    plan = ipm.make_plan(ipm.Analysis.load(path), similarity_threshold=0.0, budget=budget)
    assert bool(rounding_on(plan)) == warns
    out = ["--similarity-threshold", "0", "-o", str(tmp_path / "plan.json")]
    assert cli.main(["plan", str(path), "--set", f"budget={budget}", *out]) == 0
    assert ("many weights would keep their values" in capsys.readouterr().out) == warns
    found = readiness(
        Backend(), "taught" if "taught" in pack else "pack", PlanChoice(0.0, budget=budget)
    )
    told = [each for each in found.findings if "stored in 16 bits" in each.message]
    assert bool(told) == warns
    assert all(each.remedy == "Use a larger gain or budget." for each in told)


def test_a_rank_has_an_effect_on_a_truncated_change():
    method = METHODS["ip_merging"]
    plain = {"ablation": "select_only", "rank": 2}
    assert method.without_effect(plain) == [
        "rank=2 (only used with ablation=none or rescale_only, or math_energy not 1.0)"
    ]
    truncated = {**plain, "math_energy": 0.99}
    assert method.without_effect(truncated) == []
    change = method(BASE, MLLM, MATH, **truncated) - MLLM
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2


def test_a_small_update_is_advised_on_from_its_size(trio: Trio):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    plan = ipm.make_plan(analysis, similarity_threshold=0.0, ablation="select_only", lambda_=0.1)
    preview = plan.preview()
    assert preview.update_share == pytest.approx(0.1)
    assert "less than 0.1 of the size" in preview.advice
    assert f"A budget of {preview.expert_change:.2g} at lambda 1 gives" in preview.advice
    advised = ipm.make_plan(
        analysis,
        similarity_threshold=0.0,
        ablation="select_only",
        budget=float(f"{preview.expert_change:.2g}"),
    )
    assert advised.preview().relative_change == pytest.approx(preview.expert_change, rel=0.05)
    large = ipm.make_plan(analysis, similarity_threshold=0.0, ablation="select_only")
    assert large.preview().advice == ""


def test_matrices_with_one_input_share_one_factorisation(tmp_path, monkeypatch):
    save_file(
        {"x": gram(8, 40, 6).float(), "y": gram(8, 40, 7).float()}, tmp_path / "g.safetensors"
    )
    places = {"q": ("g.safetensors", "x"), "o": ("g.safetensors", "y"), "k": ("g.safetensors", "x")}
    models = tuple(Measured(role, role, "f", 1, 1, 1.0, places) for role in ("mllm", "math"))
    found = Measurements(tmp_path, "gram", {}, models)
    counted = []
    factor = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: counted.append(0) or factor(A))
    for name in ("q", "o", "k"):
        inputs = found.inputs(name, [0])
        MERGE(BASE, MLLM, MATH, projector="input_filter", **inputs)
    assert len(counted) == 2


@pytest.mark.parametrize(
    "choice",
    [
        {"ablation": "select_only"},
        {"projector": "complement"},
        {"projector": "protect"},
        {"ablation": "rescale_only"},
        {},
    ],
)
def test_a_truncated_update_is_of_low_rank_and_an_adapter_holds_all_of_it(
    choice, trio: Trio, tmp_path
):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    usual = {"similarity_threshold": 0.0, "math_energy": 0.5, **choice}
    plan = ipm.make_plan(analysis, **usual)
    export_adapter(plan, tmp_path / "adapter", tolerance=1e-6)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {record.name: record.kept_directions[9] for record in analysis.records}
    ipm.merge(plan, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(trio.mllm / "model.safetensors")
    for record in analysis.records:
        place = record.name.removeprefix("model.").removesuffix(".weight")
        (module,) = [name for name in weights if f"{place}.lora_A" in name]
        A, B = weights[module], weights[module.replace("lora_A", "lora_B")]
        change = (merged[record.mllm_name].float() - before[record.mllm_name].float()).double()
        assert torch.linalg.matrix_rank(B.double() @ A.double(), rtol=1e-5) <= ranks[record.name]
        difference = float((B.double() @ A.double() - change).norm())
        assert difference <= 1e-3 * float(change.norm()) + 1e-5


def test_the_directions_that_are_kept_hold_the_share_of_the_energy(trio: Trio):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    for record in analysis.records:
        assert len(record.kept_directions) == len(KEPT_SHARES)
        for share, name, count in zip(
            KEPT_SHARES, TRUNCATIONS, record.kept_directions, strict=True
        ):
            held = record.updates[name].norm2
            assert held >= (share - 1e-4) * record.updates["select_only"].norm2 - 1e-9
            assert 1 <= count <= min(record.shape)
        assert list(record.kept_directions) == sorted(record.kept_directions)


def test_a_truncation_is_previewed_at_the_named_shares_only(trio: Trio):
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    plan = ipm.make_plan(analysis, ablation="select_only", math_energy=0.33)
    with pytest.raises(PlanError, match=r"truncations at the energies 0.05, 0.1, ..., 0.95"):
        plan.preview()
    plan = ipm.make_plan(analysis, projector="complement", math_energy=0.5)
    with pytest.raises(PlanError, match="truncations of the expert's task vector alone"):
        plan.preview()
    with pytest.raises(PlanError, match=r"math_energy is 0.0; expected a finite number in \(0, 1"):
        ipm.make_plan(analysis, math_energy=0.0)


def test_a_truncated_expert_without_a_task_vector_changes_nothing():
    for choice in ({"ablation": "select_only"}, {"projector": "complement"}, {}):
        assert torch.equal(MERGE(BASE, MLLM, BASE, math_energy=0.5, **choice), MLLM)
