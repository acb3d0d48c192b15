"""Numbers of the whole model, measured once and recorded; long steps; what previews say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trio
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.errors import PlanError
from ipmerge_core.merging.merge import iter_merge
from ipmerge_core.merging.whole_model import is_due, iter_first_pass
from ipmerge_core.methods import METHODS
from ipmerge_core.methods.declarations import drained
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan

pytestmark = pytest.mark.shapes  # the methods' previews too

WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("metagpt", {}),
    ("nan", {}),
    ("nan", {"norm_of": "tau"}),
    ("ties", {"scope": "model", "density": 0.3}),
]
whole = pytest.mark.parametrize(("method", "choice"), WHOLE)


@pytest.fixture
def pair(trio: Trio) -> ModelPair:
    return ipm.open_pair(trio.mllm, trio.math, trio.base)


@pytest.fixture(scope="module")
def analysis(trio: Trio) -> ipm.Analysis:
    return ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))


def statistic_of(out: Path) -> tuple[float, ...] | None:
    found = json.loads((out / "ipmerge.json").read_text())["plan"]["statistic"]
    return None if found is None else tuple(found)


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


@whole
def test_the_manifest_says_what_the_first_pass_found(
    method: str, choice: dict[str, Any], pair: ModelPair, tmp_path: Path
) -> None:
    ipm.merge(ipm.make_plan(pair, method, **choice), tmp_path / "out")
    found = statistic_of(tmp_path / "out")
    models = [[m.read_matrix(n) for m, n in read(pair, match)] for match in pair.matrices]
    parameters = METHODS[method].complete(choice)
    expected = METHODS[method].statistic.over(
        lambda: [(b, v, [e], {}) for b, v, e in models], parameters
    )
    assert found == expected
    assert statistic_of_plain(pair, tmp_path) is None


def read(pair: ModelPair, match: Any) -> list[tuple[Any, str]]:
    return [(pair.base, match.name), (pair.mllm, match.mllm), (pair.math[0], match.math[0])]


def statistic_of_plain(pair: ModelPair, tmp_path: Path) -> tuple[float, ...] | None:
    ipm.merge(ipm.make_plan(pair, "linear"), tmp_path / "plain")
    return statistic_of(tmp_path / "plain")


@whole
def test_every_matrix_is_a_step_of_the_first_pass(
    method: str, choice: dict[str, Any], pair: ModelPair, tmp_path: Path
) -> None:
    steps = list(iter_merge(ipm.make_plan(pair, method, **choice), tmp_path / "out"))
    measured = [step for step in steps if step.action == "measured"]
    passes = METHODS[method].statistic.passes
    assert steps[: len(measured)] == measured
    assert len(measured) == measured[-1].total == passes * len(pair.matrices)
    assert [step.index for step in measured] == list(range(1, len(measured) + 1))
    assert measured[-1].nbytes_done == measured[-1].nbytes_total
    assert measured[0].tensor == pair.matrices[0].name
    assert len(steps) - len(measured) == len(pair.mllm.tensors)


@whole
def test_a_run_stopped_in_its_first_pass_is_resumed_to_the_same_bytes(
    method: str, choice: dict[str, Any], pair: ModelPair, tmp_path: Path
) -> None:
    plan = ipm.make_plan(pair, method, **choice)
    ipm.merge(plan, tmp_path / "whole")
    steps = iter_merge(plan, tmp_path / "cut")
    assert next(steps).action == "measured"
    steps.close()
    assert not (tmp_path / "cut").exists()
    ipm.merge(plan, tmp_path / "cut")
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")


def test_a_resumed_run_uses_what_it_has_measured(pair: ModelPair, tmp_path: Path) -> None:
    plan = ipm.make_plan(pair, "nan")
    ipm.merge(plan, tmp_path / "whole")
    steps = iter_merge(plan, tmp_path / "cut")
    for step in steps:
        if step.action == "merged":
            break
    steps.close()
    again = list(iter_merge(plan, tmp_path / "cut"))
    assert {step.action for step in again} <= {"resumed", "merged", "copied"}
    assert statistic_of(tmp_path / "cut") == statistic_of(tmp_path / "whole")
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")


def test_a_run_made_anew_measures_anew(pair: ModelPair, tmp_path: Path) -> None:
    plan = ipm.make_plan(pair, "nan")
    steps = iter_merge(plan, tmp_path / "out")
    for step in steps:
        if step.action == "merged":
            break
    steps.close()
    again = list(iter_merge(plan, tmp_path / "out", resume=False))
    assert again[0].action == "measured"


@whole
def test_a_measured_plan_holds_the_numbers_and_merges_to_the_same_bytes(
    method: str, choice: dict[str, Any], pair: ModelPair, tmp_path: Path
) -> None:
    plan = ipm.make_plan(pair, method, **choice)
    assert is_due(plan)
    measured = drained(iter_first_pass(plan))
    assert not is_due(measured)
    assert measured.hash != plan.hash
    assert drained(iter_first_pass(measured)) is measured
    measured.save(tmp_path / "plan.json")
    assert MergePlan.load(tmp_path / "plan.json") == measured
    ipm.merge(plan, tmp_path / "plain")
    steps = list(iter_merge(MergePlan.load(tmp_path / "plan.json"), tmp_path / "out"))
    assert all(step.action != "measured" for step in steps)
    assert statistic_of(tmp_path / "out") == measured.statistic
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")


def test_an_analysis_knows_the_norms_of_the_task_vectors(
    analysis: ipm.Analysis, pair: ModelPair
) -> None:
    for method, choice in (("metagpt", {}), ("nan", {"norm_of": "tau"})):
        known = ipm.make_plan(analysis, method, **choice)
        found = drained(iter_first_pass(ipm.make_plan(pair, method, **choice)))
        assert not is_due(known)
        assert known.statistic == pytest.approx(found.statistic, rel=1e-6)
    assert is_due(ipm.make_plan(analysis, "nan"))


def test_it_is_over_what_the_plan_merges_only(analysis: ipm.Analysis, pair: ModelPair) -> None:
    for source in (analysis, pair):
        part = ipm.make_plan(source, "metagpt", include=r"layers\.0\.mlp")
        found = drained(iter_first_pass(part)).statistic
        squares = [
            sum(r.mllm_norm2 for r in analysis.records if "layers.0.mlp" in r.name),
            sum(r.math_norm2 for r in analysis.records if "layers.0.mlp" in r.name),
        ]
        assert found[0] == pytest.approx(squares[0] / sum(squares), rel=1e-6)
    nothing = ipm.make_plan(analysis, "metagpt", exclude=".")
    assert nothing.statistic is None
    assert not is_due(nothing)


def test_several_experts_share_by_their_own_norms(trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base)
    plan = ipm.make_plan(ipm.analyse(pair), "metagpt")
    assert len(plan.statistic) == 3
    assert sum(plan.statistic) == pytest.approx(1)
    ipm.merge(plan, tmp_path / "out")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (trio.mllm, tmp_path / "out")
    )
    names = [m.mllm for m in pair.matrices]
    moved = sum(float((after[n] - before[n]).double().square().sum()) for n in names)
    size = sum(float(before[n].double().square().sum()) for n in names)
    assert plan.preview().relative_change == pytest.approx((moved / size) ** 0.5, rel=1e-4)


def test_the_command_line_measures_and_shows_both_phases(
    trio: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"--{role}={getattr(trio, role)}" for role in ("mllm", "math", "base")]
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    assert main(["plan", *models, "--method=nan", "--measure", "-o", plan]) == 0
    assert "measuring 100%" in capsys.readouterr().err
    assert MergePlan.load(plan).statistic is not None
    assert main(["plan", *models, "--method=nan", "-o", plan]) == 0
    assert main(["merge", plan, "-o", out]) == 0
    told = capsys.readouterr().err
    assert told.index("measuring 100%") < told.index("merging 100%")


# --- methods that work on a matrix for long ---


def test_wudi_tells_how_far_it_is_inside_a_matrix(pair: ModelPair, tmp_path: Path) -> None:
    plan = ipm.make_plan(pair, "wudi", iterations=5, include=r"layers\.0\.mlp")
    steps = list(iter_merge(plan, tmp_path / "out"))
    within = [step for step in steps if step.action == "merging"]
    assert len(within) == 5 * 3
    assert len({step.tensor for step in within}) == 3
    done = [step.nbytes_done for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].nbytes_total
    assert steps[-1].index == steps[-1].total == len(pair.mllm.tensors)


def test_wudi_can_be_stopped_inside_a_matrix_and_goes_on_to_the_same_bytes(
    pair: ModelPair, tmp_path: Path
) -> None:
    plan = ipm.make_plan(pair, "wudi", iterations=5, include=r"layers\.0\.mlp")
    ipm.merge(plan, tmp_path / "whole")
    steps = iter_merge(plan, tmp_path / "cut")
    seen = [next(steps)]
    while seen[-1].action != "merging" or len(seen) < 3:
        seen.append(next(steps))
    steps.close()
    assert not (tmp_path / "cut").exists()
    ipm.merge(plan, tmp_path / "cut")
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")


# --- what the plan leaves alone ---


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.data is None])
def test_every_tensor_that_a_plan_leaves_alone_keeps_its_bytes(
    method: str, analysis: ipm.Analysis, pair: ModelPair, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"last_kept_layer": -1} if method == "layer_swap" else {}
    more |= {"similarity_threshold": 0.0} if method == "ip_merging" else {}
    plan = ipm.make_plan(analysis, method, include=r"layers\.1\.", exclude="v_proj", **more)
    ipm.merge(plan, tmp_path / "out")
    before = load_file(Path(pair.mllm.id) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    chosen = {m.mllm for m in pair.matrices if m.name in {d.name for d in plan.selected}}
    assert len(chosen) == 6
    assert list(before) == list(after)
    for name in before:
        same = torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        assert same == (name not in chosen)


# --- previews ---

EXACT: list[tuple[str, dict[str, Any]]] = [
    ("ip_merging", {"similarity_threshold": 0.0, "lambda_": 3.0}),
    ("linear", {"alpha": 0.7}),
    ("linear", {"mllm_weight": 3.0, "math_weight": 1.0}),
    ("task_arithmetic", {"mllm_weight": 0.8, "math_weight": 0.4}),
    ("layer_swap", {"last_kept_layer": 0, "alpha": 0.5}),
    ("dare_linear", {"density": 1.0}),
    ("breadcrumbs", {"density": 1.0}),
    ("metagpt", {}),
    ("metagpt", {"scope": "tensor"}),
    ("nan", {"norm_of": "tau"}),
    ("nan", {"norm_of": "tau", "scope": "tensor", "global_scale": "1"}),
    ("nuslerp", {"t": 0.3}),
    ("linear", {"alpha": 0.5, "layer_gains": (0.0, 1.0)}),
    ("nuslerp", {"t": 0.5, "layer_gains": (0.2, 1.0)}),
    ("task_arithmetic", {"layer_gains": (0.0, 2.0), "exclude": "mlp"}),
]


def compared(plan: MergePlan, pair: ModelPair, out: Path) -> tuple[Any, dict[int, float]]:
    """The preview, and the change per layer that the merge really made."""
    ipm.merge(plan, out)
    before = load_file(Path(pair.mllm.id) / "model.safetensors")
    after = load_file(out / "model.safetensors")
    sums: dict[int, list[float]] = {}
    for match in pair.matrices:
        layer = sums.setdefault(match.layer, [0.0, 0.0])
        layer[0] += float((after[match.mllm] - before[match.mllm]).double().square().sum())
        layer[1] += float(before[match.mllm].double().square().sum())
    return plan.preview(), {layer: (a / b) ** 0.5 for layer, (a, b) in sums.items()}


@pytest.mark.parametrize(("method", "choice"), EXACT)
def test_a_preview_that_is_exact_is_what_the_merge_makes(
    method: str, choice: dict[str, Any], analysis: ipm.Analysis, pair: ModelPair, tmp_path: Path
) -> None:
    plan = ipm.make_plan(analysis, method, **choice)
    preview, made = compared(plan, pair, tmp_path / "out")
    assert preview.approximate == ""
    assert preview.layer_change == pytest.approx(made, rel=2e-4, abs=1e-7)


def test_a_measured_plan_is_previewed_exactly(
    analysis: ipm.Analysis, pair: ModelPair, tmp_path: Path
) -> None:
    plan = ipm.make_plan(analysis, "nan")
    with pytest.raises(PlanError, match="which the merge measures first"):
        plan.preview()
    preview, made = compared(drained(iter_first_pass(plan)), pair, tmp_path / "out")
    assert preview.layer_change == pytest.approx(made, rel=2e-4)


NEAR: list[tuple[str, dict[str, Any], float, str]] = [
    ("dare_linear", {"density": 0.5}, 0.08, "expected over the random drops"),
    ("dare_linear", {"density": 0.3, "mllm_density": 1.0, "rescale": "none"}, 0.08, "random"),
    ("dare_linear", {"density": 0.4, "rescale": "l1"}, 0.1, "expected over the random drops"),
    ("slerp", {"t": 0.3}, 0.03, "straight line"),
    ("karcher", {}, 0.03, "straight line"),
    ("karcher", {"alpha": 0.8}, 0.03, "straight line"),
    ("nuslerp", {"of": "weights", "t": 0.3}, 0.03, "straight line"),
]


@pytest.mark.parametrize(("method", "choice", "tolerance", "words"), NEAR)
def test_a_preview_that_is_near_says_why_and_is_near(
    method: str,
    choice: dict[str, Any],
    tolerance: float,
    words: str,
    analysis: ipm.Analysis,
    pair: ModelPair,
    tmp_path: Path,
) -> None:
    plan = ipm.make_plan(analysis, method, **choice)
    preview, made = compared(plan, pair, tmp_path / "out")
    assert words in preview.approximate
    assert preview.layer_change == pytest.approx(made, rel=tolerance)


PREVIEWED = {
    *("ip_merging", "linear", "task_arithmetic", "layer_swap", "dare_linear", "metagpt"),
    *("slerp", "nuslerp", "karcher"),
}


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.data is None])
def test_every_method_has_a_preview_or_says_why_not(method: str, analysis: ipm.Analysis) -> None:
    plan = ipm.make_plan(analysis, method)
    if method in PREVIEWED:
        assert plan.preview().relative_change >= 0
        return
    with pytest.raises(PlanError, match="not previewable: ") as caught:
        plan.preview()
    assert METHODS[method].reason_unknown(plan.parameters) in str(caught.value)


def test_the_command_line_says_exact_approximate_or_why_not(
    analysis: ipm.Analysis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack, plan = str(tmp_path / "pack.json"), str(tmp_path / "plan.json")
    analysis.save(pack)
    said = {}
    for method in ("task_arithmetic", "dare_linear", "ties"):
        assert main(["plan", pack, f"--method={method}", "-o", plan]) == 0
        said[method] = capsys.readouterr().out
    assert "(relative Frobenius norm)." in said["task_arithmetic"]
    assert (
        "(relative Frobenius norm) (approximate: expected over the random drops)."
        in said["dare_linear"]
    )
    assert "is not previewable: the kept elements depend on" in said["ties"]
    assert main(["plan", pack, "--method=ties", "--json", "-o", plan]) == 0
    assert "not previewable" in json.loads(capsys.readouterr().out)["preview"]


def test_a_quick_analysis_makes_projections_approximate(pair: ModelPair) -> None:
    quick = ipm.analyse(pair, quick=True)
    assert "quick" in ipm.make_plan(quick, similarity_threshold=0).preview().approximate
    assert ipm.make_plan(quick, "task_arithmetic").preview().approximate == ""
    some = ipm.make_plan(ipm.analyse(pair, rank=4), similarity_threshold=0)
    assert some.parameters["rank"] == 4  # the merge keeps as many
    assert some.preview().approximate == ""
