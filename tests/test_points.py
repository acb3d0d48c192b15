"""The plans of sweeps and ablations: what varies, what stays, and controls of equal size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ipmerge_core as ipm
from ipmerge_core.calibration.calibrate import calibrate
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.samples import load_samples
from ipmerge_core.errors import PlanError
from ipmerge_core.evaluation.controls import permuted_tensors
from ipmerge_core.evaluation.points import (
    MOST_POINTS,
    UNMERGED,
    Axis,
    ablation_points,
    sweep_points,
)
from ipmerge_core.methods import METHODS
from ipmerge_core.models.pairing import open_pair

DEMO = Path(__file__).parents[1] / "assets" / "demo"


@pytest.fixture(scope="module")
def analysis():
    return ipm.Analysis.load(DEMO / "pack.json.gz")


@pytest.fixture(scope="module")
def pair():
    return open_pair(DEMO / "mllm", DEMO / "math", DEMO / "base")


@pytest.fixture(scope="module")
def grams(pair, tmp_path_factory):
    samples = [load_samples("demo", 2, takes_images=images) for images in (True, False)]
    out = tmp_path_factory.mktemp("grams") / "out"
    return calibrate(pair, out, CalibrationSettings("gram"), *samples).folder


def merged_matrices(plan, pair):
    """The merged matrices of a plan, computed by its method."""
    found = {}
    for decision in plan.selected:
        models = [
            model.read_matrix(name)
            for model, name in (
                (pair.base, decision.name),
                (pair.mllm, f"language_model.{decision.name}"),
                (pair.math[0], decision.name),
            )
        ]
        names = {match.name: match.mllm for match in pair.matrices}
        found[names[decision.name]] = METHODS[plan.method](
            *models, **plan.parameters_for(decision.layer)
        ).to(models[1].dtype)
    return found


# --- sweeps ---


@pytest.mark.parametrize(
    ("axis", "needs"),
    [
        (Axis("input_share", (0.2, 1.0)), [True, False]),
        (Axis("projector", ("complement", "off_inputs")), [False, True]),
        (Axis("output_budget", (0.0, 0.05)), [False, True]),
    ],
)
def test_a_sweep_takes_a_calibration_that_some_of_its_points_need(axis, needs, analysis, grams):
    points = sweep_points(analysis, [axis], calibration=grams)
    assert [bool(point.plan.calibration) for point in points[1:]] == needs
    with pytest.raises(PlanError, match="does not use calibration data"):
        sweep_points(analysis, [Axis("lambda_", (1.0, 2.0))], calibration=grams)
    with pytest.raises(PlanError, match=f"with {axis.parameter}=.* requires the Gram matrices"):
        sweep_points(analysis, [axis])


def test_a_sweep_starts_with_the_unmerged_model_and_varies_one_parameter(analysis):
    points = sweep_points(analysis, [Axis("lambda_", (0.5, 2.0))], similarity_threshold=0.1)
    assert [point.label for point in points] == [UNMERGED, "lambda 0.5", "lambda 2"]
    assert points[0].plan is None
    assert points[0].key == ""
    assert [point.plan.parameters["lambda_"] for point in points[1:]] == [0.5, 2.0]
    assert {point.plan.similarity_threshold for point in points[1:]} == {0.1}
    assert len({point.key for point in points}) == 3


def test_a_sweep_over_two_parameters_has_a_point_for_every_combination(analysis):
    axes = [Axis("similarity_threshold", (0.0, 0.2)), Axis("lambda_", (1.0, 4.0, 8.0))]
    points = sweep_points(analysis, axes)[1:]
    assert [tuple(point.values.values()) for point in points] == [
        (s, g) for s in (0.0, 0.2) for g in (1.0, 4.0, 8.0)
    ]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp"])
def test_parameters_of_other_methods_can_be_varied(analysis, method):
    parameter = METHODS[method].parameters[0]
    points = sweep_points(analysis, [Axis(parameter.name, (0.25, 0.5))], method=method)
    assert [point.plan.parameters[parameter.name] for point in points[1:]] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("axes", "fixed", "message"),
    [
        ([], {}, "one or two parameters; got 0"),
        ([Axis("lambda_", (1.0,))] * 3, {}, "got 3"),
        ([Axis("lambda_", ())], {}, "has no values"),
        ([Axis("lambda_", (1.0, 1.0))], {}, "given twice"),
        ([Axis("lambda_", (1.0,)), Axis("lambda_", (2.0,))], {}, "varied twice"),
        ([Axis("lambda_", (1.0,))], {"lambda_": 2.0}, "has a fixed value too"),
        ([Axis("lambda_", (-1.0,))], {}, "lambda"),
        ([Axis("similarity_threshold", (1.5,))], {}, "1.5"),
        ([Axis("colour", (1.0,))], {}, "colour"),
        ([Axis("lambda_", tuple(map(float, range(MOST_POINTS + 1))))], {}, f"{MOST_POINTS + 1}"),
        ([Axis("density", (0.5,))], {"method": "task_arithmetic"}, "density"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_is_computed(
    analysis, axes, fixed, message
):
    with pytest.raises(PlanError, match=message):
        sweep_points(analysis, axes, **fixed)


# --- ablation ---


@pytest.mark.parametrize(
    "fixed",
    [
        {"lambda_": 4.0, "similarity_threshold": 0.1},
        {"gamma_norm": "max", "similarity_threshold": 0.0},
    ],
)
def test_the_ablation_removes_one_part_at_a_time(analysis, fixed):
    points = {point.label: point for point in ablation_points(analysis, (0, 1), **fixed)}
    full = points["full"].plan
    assert points["selection only"].plan.parameters["ablation"] == "select_only"
    assert points["selection and rescaling"].plan.parameters["ablation"] == "rescale_only"
    for name in ("selection only", "selection and rescaling"):
        assert points[name].plan.selected == full.selected
    early, late = (points[f"{span} only"].plan for span in ("layer 0", "layers 1 to 3"))
    assert {d.name for d in early.selected} | {d.name for d in late.selected} == {
        d.name for d in full.selected
    }
    assert {d.layer for d in early.selected} == {0}
    assert points["gamma permuted, seed 1"].plan is full
    keys = [point.key for point in points.values()]
    assert len(set(keys)) == len(keys)


def test_task_arithmetic_of_the_ablation_changes_the_decoder_as_much(analysis):
    points = ablation_points(analysis, lambda_=4.0, similarity_threshold=0.1)
    full = next(point.plan for point in points if point.label == "full")
    arithmetic = next(point.plan for point in points if point.label.startswith("task arithmetic"))
    assert arithmetic.method == "task_arithmetic"
    sizes = [plan.preview().relative_change for plan in (full, arithmetic)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-9)
    assert sizes[0] > 0


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"method": "ties"}, "removes parts of IP-Merging"),
        ({"ablation": "select_only"}, "removes parts of IP-Merging"),
        ({"similarity_threshold": 1.0}, "selects no matrix"),
    ],
)
def test_an_ablation_of_nothing_is_refused(analysis, fixed, message):
    with pytest.raises(PlanError, match=message):
        ablation_points(analysis, **fixed)


# --- the permuted control ---


@pytest.mark.parametrize("gamma_norm", ["sum", "max"])
def test_the_permuted_control_changes_each_matrix_by_as_much_and_in_other_directions(
    analysis, pair, gamma_norm
):
    plan = ipm.make_plan(analysis, similarity_threshold=0.2, lambda_=4.0, gamma_norm=gamma_norm)
    merged = merged_matrices(plan, pair)
    first, again, other = (dict(permuted_tensors(plan, pair, merged, seed)) for seed in (0, 0, 1))
    assert list(first) == list(merged)
    for name, planned in merged.items():
        before = pair.mllm.read_matrix(name)
        size = torch.linalg.norm(planned - before)
        assert torch.linalg.norm(first[name] - before) == pytest.approx(float(size), rel=1e-4)
        assert torch.equal(first[name], again[name])
        for different in (planned, other[name]):
            assert torch.linalg.norm(first[name] - different) > 0.1 * size


@pytest.mark.parametrize(
    "fixed", [{"method": "task_arithmetic"}, {"ablation": "rescale_only"}, {"projector": "top_k"}]
)
def test_a_plan_without_weights_of_directions_has_no_permuted_control(analysis, pair, fixed):
    plan = ipm.make_plan(analysis, **fixed)
    with pytest.raises(PlanError, match="no weights of directions"):
        next(permuted_tensors(plan, pair, {}, 0))


def test_a_plan_of_several_experts_has_no_permuted_control(analysis, pair):
    plan = ipm.make_plan(analysis, similarity_threshold=0.2)
    sources = replace(plan.sources, math=plan.sources.math * 2)
    with pytest.raises(PlanError, match="several experts"):
        next(permuted_tensors(replace(plan, sources=sources), pair, {}, 0))
