"""Layer gains scale what a merge changes, for every method, and no choice is ignored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_merge_numerics import SHORTER, Wide, plan_of, write_wide

import ipmerge_core as ipm
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS
from ipmerge_core.methods.geodesic import arc_coefficients
from ipmerge_core.planning.options import OPTIONS
from ipmerge_core.planning.plan import MergePlan

DEMO = Path(__file__).parents[1] / "assets" / "demo"
CHOICES: list[tuple[str, dict[str, Any]]] = [
    *((name, SHORTER.get(name, {})) for name in METHODS if name != "slerp"),
    ("sce", {"anchor": "inject"}),
    ("della", {"normalize": "none", "election": "unweighted"}),
    ("della", {"elect": False, "scale": 1.0}),
    ("knots_ties", {"normalize": "none"}),
    ("ties", {"normalize": "count", "scope": "model", "anchor": "inject"}),
    ("task_arithmetic", {"mllm_weight": 0.8}),
    ("linear", {"mllm_weight": 0.8, "math_weight": 0.4, "normalize": False}),
    ("ip_merging", {"gamma_norm": "max", "lambda_": 4.0}),
]
# Steps of rounding of the weights that a written number may be off: the change is computed in fp32
# from weights a hundred times as large.
PLACES = 4
UNREAD = ("breadcrumbs", "nan")  # without a preview by default


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    return write_wide(tmp_path_factory.mktemp("gains"), "fp32")


@pytest.fixture(scope="module")
def before(wide: Wide) -> dict[str, torch.Tensor]:
    return load_file(Path(wide.pair.mllm.id) / "model.safetensors")


def merged(plan: MergePlan, out: Path) -> dict[str, torch.Tensor]:
    ipm.merge(plan, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(("name", "choice"), CHOICES, ids=str)
def test_a_gain_multiplies_the_change_of_the_weights(
    name: str, choice: dict[str, Any], wide: Wide, before: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # Layer 1 only, whose q, k and down matrices stand for all shapes.
    scope = {"include": r"layers\.1\..*(q|k|down)_proj", **choice}
    whole = merged(plan_of(name, wide, scope), tmp_path / "whole")
    scaled = plan_of(name, wide, {**scope, "layer_gains": (0.0, 0.3)})
    faded = merged(scaled, tmp_path / "faded")
    changed = [key for key, weight in before.items() if not torch.equal(whole[key], weight)]
    assert len(changed) == 3
    for key in changed:
        weight = before[key].double()
        expected = weight + 0.3 * (whole[key].double() - weight)
        step = torch.finfo(torch.float32).eps * float(weight.abs().max())
        assert float((faded[key].double() - expected).abs().max()) <= PLACES * step
    nothing = plan_of(name, wide, {**scope, "layer_gains": (0.0,)})
    kept = merged(nothing, tmp_path / "kept")
    assert all(torch.equal(kept[key], weight) for key, weight in before.items())


@pytest.mark.parametrize("gain", [0.0, 0.25, 1.0])
def test_slerp_turns_by_that_share_of_its_angle(gain: float) -> None:
    pair = ipm.open_pair(*(DEMO / name for name in ("mllm", "math", "base")))
    plan = ipm.make_plan(pair, "slerp", t=0.8, layer_gains=(gain,))
    for cosine in (0.2, 0.9):
        turned = arc_coefficients(cosine, plan.parameters_for(0)["t"])
        assert turned == pytest.approx(arc_coefficients(cosine, 0.8 * gain))
    assert plan.change_scale(0) == 1


def test_a_preview_follows_the_gains_of_every_method_that_has_one() -> None:
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    for name, method in METHODS.items():
        if method.affine is None or method.data is not None or name == "slerp":
            continue
        if name in UNREAD:
            continue
        threshold = {"similarity_threshold": 0.0} if method.needs_analysis else {}
        whole = ipm.make_plan(analysis, name, **threshold).preview()
        faded = ipm.make_plan(analysis, name, **threshold, layer_gains=(0.0, 2.0)).preview()
        for layer, change in whole.layer_change.items():
            assert faded.layer_change[layer] == pytest.approx(2.0 * layer / 3 * change, rel=1e-9)


def hash_of(plan: MergePlan, gains: list[object]) -> str:
    """The hash of a plan whose gains are hashed as given."""
    parameters = dict(sorted(METHODS[plan.method].as_hashed(plan.parameters).items()))
    chosen = [[d.name, list(d.experts)] for d in plan.decisions if d.experts]
    fingerprints = [source.fingerprint for source in plan.sources.all()]
    hashed = [plan.method, parameters, gains, chosen, fingerprints]
    return hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:8]


def test_gains_that_mean_something_else_than_before_have_another_digest() -> None:
    pair = ipm.open_pair(*(DEMO / name for name in ("mllm", "math", "base")))
    plan = ipm.make_plan(pair, "ties", layer_gains=(0.5, 1.0))
    content = plan.to_dict()
    assert MergePlan.from_dict(content).digest == plan.digest
    sources = plan.sources._each(lambda source: replace(source, content=None))
    older = replace(plan, sources=sources)  # of the time without a second hash of the weights
    assert hash_of(older, [0.5, 1.0, "change"]) == older.hash
    # The hash of the same values when gains multiplied the weights of the experts.
    former = hash_of(older, [0.5, 1.0])
    with pytest.raises(ValueError, match=f"but the file has '{former}'"):
        MergePlan.from_dict({**older.to_dict(), "hash": former})


# --- values that a method does not use ---


SELECTION = [("similarity_threshold", 0.99), ("similarity_threshold", 1e-4), ("similarity", "max")]


@pytest.mark.parametrize("name", METHODS)
def test_every_choice_of_every_method_acts_or_is_refused(name: str, wide: Wide) -> None:
    method = METHODS[name]
    analysis = ipm.analyse(wide.pair)
    data = {"calibration": wide.calibration(method.data)} if method.data else {}
    plain = ipm.make_plan(analysis, name, **data)
    choices: list[tuple[str, Any]] = [*SELECTION, ("lambda_", 2.0)]
    choices += [(option.name, other_value(option)) for option in OPTIONS.values()]
    for option, value in choices:
        other = plan_or_refusal(analysis, name, {**data, option: value})
        if isinstance(other, str):
            assert str(value) in other or option in other or "support" in other
            continue
        selects = option in ("similarity_threshold", "similarity")
        kept = [each.experts for each in plain.decisions] == [e.experts for e in other.decisions]
        # A threshold may select the same matrices, and an anchor be the default.
        same = (selects and method.needs_analysis and kept) or other.anchor == value
        assert other.digest != plain.digest or same


def plan_or_refusal(source: ipm.Analysis, name: str, values: dict[str, Any]) -> MergePlan | str:
    """The plan with these values, or the message that refuses them."""
    try:
        return ipm.make_plan(source, name, **values)
    except PlanError as error:
        return str(error)


def other_value(option: Any) -> Any:
    return {
        "pattern": "mlp",
        "factors": (0.5,),
        "share": 0.5,
        "choice": list(option.choices)[-1] if option.choices else None,
        "rules": {"model.layers.0.self_attn.q_proj.weight": "keep"},
    }[option.kind]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("ties", {"similarity_threshold": 0.99}, "similarity_threshold=0.99 has no effect"),
        ("slerp", {"similarity": "weighted"}, "similarity=weighted has no effect"),
        ("ip_merging", {"top_k": 8}, r"top_k=8 \(only used with projector=top_k\)"),
        ("ip_merging", {"projector": "top_k", "gamma_norm": "max"}, "with projector=softmax"),
        ("ip_merging", {"ablation": "select_only", "rank": 2}, "ablation=none or rescale_only"),
        ("ip_merging", {"ablation": "rescale_only", "temperature": 8.0}, "with ablation=none"),
        ("linear", {"alpha": 0.5, "mllm_weight": 1.0, "math_weight": 0.3}, "mllm_weight=none"),
        ("della", {"elect": False, "normalize": "count"}, "only used with elect=true"),
        ("wudi", {"closed_form": True, "iterations": 9}, "only used with closed_form=false"),
    ],
)
def test_a_value_without_effect_is_refused_by_name(
    name: str, values: dict[str, Any], words: str
) -> None:
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    with pytest.raises(PlanError, match=words):
        ipm.make_plan(analysis, name, **values)


def test_the_options_of_an_analysis_may_be_of_no_use_to_a_plan() -> None:
    pair = ipm.open_pair(*(DEMO / name for name in ("mllm", "math", "base")))
    analysis = ipm.analyse(pair, temperature=8.0, quick=True)
    plan = ipm.make_plan(analysis, ablation="select_only", similarity_threshold=0.0)
    assert plan.parameters["temperature"] == 8.0
    assert plan.preview().relative_change > 0
