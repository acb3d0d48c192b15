"""What follows a merge of any method: AIM on the MLLM's inputs, and profiles over the layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ipmerge_core as ipm
from ipmerge_core.adapters.export import export_adapter
from ipmerge_core.calibration.calibrate import calibrate
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.samples import load_samples
from ipmerge_core.calibration.store import Measurements
from ipmerge_core.errors import PlanError
from ipmerge_core.merging.in_memory import iter_merged_tensors
from ipmerge_core.methods import METHODS
from ipmerge_core.planning.options import LAYER_PROFILES
from ipmerge_core.planning.scope import profile_gains
from ipmerge_core.spectral.protection import activation_informed
from ipmerge_core.ui.method_choice import MethodChoice, data_kind

DEMO = Path(__file__).parents[1] / "assets" / "demo"
SCOPE = "layers[.](0|3)[.](self_attn[.]q_proj|mlp[.]down_proj)"  # two kinds of matrices
FAST = {"wudi": {"closed_form": True}}
ABLE = [name for name, method in METHODS.items() if method.data != "fisher"]


@pytest.fixture(scope="module")
def pair():
    return ipm.open_pair(DEMO / "mllm", DEMO / "math", DEMO / "base")


@pytest.fixture(scope="module")
def analysis():
    return ipm.Analysis.load(DEMO / "pack.json.gz")


@pytest.fixture(scope="module")
def grams(pair, tmp_path_factory) -> Measurements:
    samples = [load_samples("demo", 3, takes_images=images) for images in (True, False)]
    folder = tmp_path_factory.mktemp("grams") / "out"
    return calibrate(pair, folder, CalibrationSettings("gram"), *samples)


def tensors_of(plan: ipm.MergePlan) -> dict[str, torch.Tensor]:
    return {step.name: step.tensor for step in iter_merged_tensors(plan) if step.tensor is not None}


@pytest.mark.parametrize("name", ABLE)
def test_aim_follows_its_definition_for_every_method(name, pair, analysis, grams):
    method, choice = METHODS[name], FAST.get(name, {})
    own = {"calibration": str(grams.folder)}
    if method.needs_analysis:
        choice = {**choice, "similarity_threshold": 0.0, "lambda_": 2.0}
    data = own if method.data else {}
    plain = ipm.make_plan(analysis, name, include=SCOPE, **data, **choice)
    informed = ipm.make_plan(analysis, name, include=SCOPE, input_share=0.3, **own, **choice)
    assert informed.digest != plain.digest
    before, after = tensors_of(plain), tensors_of(informed)
    assert set(before) == set(after)
    assert len(before) == 4
    names = {matrix.mllm: matrix.name for matrix in pair.matrices}
    for stored, merged in before.items():
        gram = grams.inputs(names[stored], [0])["mllm_gram"].double().numpy()
        activity = np.sqrt(np.diag(gram))
        kept = 1 - (1 - 0.3) * activity / activity.max()
        mllm = pair.mllm.read(stored).double().numpy()
        expected = mllm + (merged.double().numpy() - mllm) * kept[None, :]
        assert np.abs(after[stored].double().numpy() - expected).max() < 2e-6


@pytest.mark.parametrize("extras", [{"norms": "merge"}, {"embeddings": "merge-shared"}])
def test_aim_leaves_norms_and_embeddings_as_merged_without_it(extras, analysis, grams):
    own = {"include": "layers[.]0[.]|norm|embed|lm_head", **extras}
    plain = tensors_of(ipm.make_plan(analysis, "task_arithmetic", **own))
    data = {"calibration": str(grams.folder)}
    informed = tensors_of(
        ipm.make_plan(analysis, "task_arithmetic", input_share=0.2, **own, **data)
    )
    assert set(plain) == set(informed)
    differ = {name for name in plain if not torch.equal(plain[name], informed[name])}
    assert len(differ) == 7  # the projections
    assert len(plain) > 7


def test_a_channel_keeps_its_share_by_its_activity():
    W_v, W = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    gram = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    merged = activation_informed(W, W_v, gram, 0.2)
    assert torch.allclose(merged[0], torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64))
    assert torch.equal(activation_informed(W, W_v, gram.diagonal(), 0.2), merged)
    assert torch.equal(activation_informed(W, W_v, torch.zeros(3, 3), 0.2), W)
    assert torch.equal(activation_informed(W, W_v, gram, 1.0), W)


def test_aim_is_refused_where_it_has_no_activations(analysis, grams, tmp_path):
    own = {"calibration": str(grams.folder)}
    with pytest.raises(PlanError, match="calibrate --kind gram"):
        ipm.make_plan(analysis, "task_arithmetic", input_share=0.2)
    with pytest.raises(PlanError, match="Fisher information only"):
        ipm.make_plan(analysis, "fisher", input_share=0.2, **own)
    plan = ipm.make_plan(analysis, input_share=0.2, similarity_threshold=0.0, **own)
    with pytest.raises(PlanError, match="the change depends on the calibration"):
        plan.preview()
    with pytest.raises(PlanError, match="rescales the columns of the merged matrices"):
        export_adapter(plan, tmp_path / "adapter")


@pytest.mark.parametrize("more", [{"budget": 0.05}, {"input_share": 0.3}])
def test_updates_that_another_plan_kept_are_not_used(more, analysis, grams, tmp_path):
    data = {"calibration": str(grams.folder)} if "input_share" in more else {}
    usual = {"similarity_threshold": 0.0, "gamma_norm": "max", "include": SCOPE}
    kept = ipm.make_plan(analysis, **usual)
    export_adapter(kept, tmp_path / "adapter", updates=tmp_path / "kept", max_rank=128)
    for _ in iter_merged_tensors(kept, updates=tmp_path / "kept"):
        pass
    plan = ipm.make_plan(analysis, **usual, **data, **more)
    fresh = tensors_of(plan)
    steps = iter_merged_tensors(plan, updates=tmp_path / "kept")
    again = {step.name: step.tensor for step in steps if step.tensor is not None}
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)


def test_the_profiles_divide_the_layers():
    for layers in range(1, 9):
        found = {profile: profile_gains(profile, layers) for profile in LAYER_PROFILES}
        halves = zip(found["upper_half"], found["lower_half"], strict=True)
        assert [a + b for a, b in halves] == [1.0] * layers
        assert found["all"] == [1.0] * layers
        if layers > 1:  # a single layer is the first one
            assert found["rising"] == pytest.approx(found["falling"][::-1])
        assert sum(found["upper_half"]) == (layers + 1) // 2
    assert profile_gains("upper_half", 4) == [0, 0, 1, 1]


@pytest.mark.parametrize("method", ["task_arithmetic", "ip_merging", "karcher"])
def test_the_upper_half_is_the_plan_with_these_layer_gains(method, analysis):
    every = {"similarity_threshold": 0.0} if method == "ip_merging" else {}
    both = [
        ipm.make_plan(analysis, method, include=SCOPE, **every, **how)
        for how in ({"layer_profile": "upper_half"}, {"layer_gains": (0, 0, 1, 1)})
    ]
    if method != "karcher":
        first, second = (plan.preview() for plan in both)
        assert first.layer_change == second.layer_change
        assert first.layer_change[0] == 0 < first.layer_change[3]
    one, other = map(tensors_of, both)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_profile_multiplies_the_layer_gains(analysis):
    both = {"layer_gains": (2, 2), "layer_profile": "rising"}
    plan = ipm.make_plan(analysis, "task_arithmetic", **both)
    assert [plan.change_scale(n) for n in range(4)] == pytest.approx([0, 2 / 3, 4 / 3, 2])
    plan = ipm.make_plan(analysis, "ip_merging", lambda_=0.5, **both)
    gains = [plan.parameters_for(layer)["lambda_"] for layer in range(4)]
    assert gains == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_layers_that_a_profile_keeps_are_not_too_small_an_update(analysis):
    for profile in LAYER_PROFILES:
        plan = ipm.make_plan(analysis, "task_arithmetic", math_weight=1.0, layer_profile=profile)
        preview = plan.preview()
        assert preview.update_share > 0
        if profile not in ("rising", "falling"):
            assert preview.update_share == pytest.approx(1.0)
            assert preview.advice == ""
    none = ipm.make_plan(analysis, "task_arithmetic", math_weight=0.0).preview()
    assert none.update_share == 0.0


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("task_arithmetic", {"input_share": "0.2"}, "gram"),
        ("task_arithmetic", {"input_share": "1"}, None),
        ("task_arithmetic", {"input_share": "x"}, None),  # the check of the plan reports it
        ("", {"input_share": "0.2"}, "gram"),  # the plan of Explore
        ("fisher", {"input_share": "0.2"}, "fisher"),
    ],
)
def test_the_form_asks_for_the_calibration_that_aim_needs(name, options, kind):
    assert data_kind(MethodChoice(name, options=options)) == kind
