"""A plan decides by one rule, says exactly what it will change, and survives the disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ipmerge_core as ipm
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.errors import PlanError, UnknownMethodError
from ipmerge_core.planning.plan import MergePlan

FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def analysis(trio: Trio) -> Analysis:
    return ipm.analyse(ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base))


def selected(plan: MergePlan) -> set[tuple[str, int]]:
    return {(decision.name, k) for decision in plan.decisions for k in decision.experts}


@pytest.mark.parametrize("kind", ["first", "max", "weighted"])
def test_a_matrix_merges_iff_its_similarity_reaches_the_threshold(
    kind: str, analysis: Analysis
) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0.7, similarity=kind)
    expected = {(r.name, r.expert) for r in analysis.records if r.similarity[kind] >= 0.7}
    assert selected(plan) == expected
    assert 0 < len(expected) < len(analysis.records)


def test_the_threshold_itself_is_included(analysis: Analysis) -> None:
    value = analysis.records[0].similarity["first"]
    assert (FIRST, 0) in selected(ipm.make_plan(analysis, similarity_threshold=value))
    above = ipm.make_plan(analysis, similarity_threshold=min(1.0, value + 1e-9))
    assert (FIRST, 0) not in selected(above)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
@given(low=st.floats(0, 1), high=st.floats(0, 1))
def test_raising_the_threshold_never_selects_more(
    low: float, high: float, analysis: Analysis
) -> None:
    low, high = sorted((low, high))
    fewer = selected(ipm.make_plan(analysis, similarity_threshold=high))
    assert fewer <= selected(ipm.make_plan(analysis, similarity_threshold=low))


def test_overrides_win_over_the_threshold(analysis: Analysis) -> None:
    everything = ipm.make_plan(analysis, similarity_threshold=0, overrides={FIRST: "keep"})
    assert len(everything.selected) == len(everything.decisions) - 1
    nothing = ipm.make_plan(analysis, similarity_threshold=1, overrides={FIRST: "merge"})
    assert [decision.name for decision in nothing.selected] == [FIRST]


def test_the_change_grows_in_proportion_to_lambda(analysis: Analysis) -> None:
    one = ipm.make_plan(analysis, lambda_=1).preview()
    three = ipm.make_plan(analysis, lambda_=3).preview()
    assert three.relative_change == pytest.approx(3 * one.relative_change)
    assert three.keep < one.keep
    assert three.absorb > one.absorb


def test_nothing_selected_changes_nothing(analysis: Analysis) -> None:
    preview = ipm.make_plan(analysis, similarity_threshold=1.0).preview()
    assert preview.selected == ()
    assert preview.parameters_touched == preview.bytes_rewritten == 0
    assert preview.relative_change == 0
    assert set(preview.layer_change.values()) == {0}
    assert preview.keep == pytest.approx(1.0)
    assert preview.absorb is None


def test_the_preview_counts_parameters_and_bytes(analysis: Analysis) -> None:
    preview = ipm.make_plan(analysis, similarity_threshold=0).preview()
    assert preview.n_matrices == len(preview.selected) == 21
    assert preview.parameters_touched == preview.decoder_parameters
    assert preview.bytes_rewritten == 4 * preview.parameters_touched
    assert preview.decoder_parameters < preview.llm_parameters


def test_task_arithmetic_needs_no_decomposition(trio: Trio) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    plan = ipm.make_plan(pair, method="task_arithmetic", math_weight=0.5)
    assert len(plan.selected) == 21
    assert plan.similarity_threshold is None
    with pytest.raises(PlanError, match="cannot be previewed"):
        plan.preview()


def test_selection_by_similarity_needs_an_analysis(trio: Trio) -> None:
    with pytest.raises(PlanError, match="Analyse the pair first"):
        ipm.make_plan(ipm.open_pair(trio.mllm, trio.math, trio.base))


def test_a_plan_survives_the_disk(analysis: Analysis, tmp_path: Path) -> None:
    plan = ipm.make_plan(
        analysis, similarity_threshold=0.5, lambda_=2, gamma_norm="max", overrides={FIRST: "keep"}
    )
    plan.save(tmp_path / "plan.json")
    again = MergePlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.preview() == plan.preview()


def test_a_plan_holds_no_spectra(analysis: Analysis) -> None:
    assert all(record.mllm_sigma == () for record in ipm.make_plan(analysis).records)


def test_plans_that_do_the_same_have_one_hash(analysis: Analysis) -> None:
    values = sorted(record.similarity["first"] for record in analysis.records)
    low, high = values[10] + 1e-6, values[11] - 1e-6
    one = ipm.make_plan(analysis, similarity_threshold=low)
    assert one.hash == ipm.make_plan(analysis, similarity_threshold=high).hash
    assert one.hash != ipm.make_plan(analysis, similarity_threshold=low, lambda_=2).hash


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"similarity_threshold": 1.2}, r"threshold is 1.2; expected a number in \[0, 1\]"),
        ({"similarity_threshold": -0.1}, "similarity threshold"),
        ({"similarity_threshold": float("nan")}, "similarity threshold"),
        ({"similarity_threshold": "high"}, "expected a number in"),
        ({"lambda_": -1.0}, r"lambda is -1.0; expected a finite number in \[0, inf\)"),
        ({"lambda_": float("inf")}, "lambda is inf"),
        ({"similarity": "last"}, "Unknown similarity 'last'. Available: first, max, weighted"),
        ({"overrides": {FIRST: "maybe"}}, "is 'maybe'; expected merge or keep"),
        (
            {"overrides": {"model.nothing": "keep"}},
            "'model.nothing', which is not a decoder matrix",
        ),
        ({"gamma_norm": "mean"}, "gamma_norm is 'mean'; expected one of sum, max"),
        ({"speed": 1}, "IP-Merging has no parameter 'speed'"),
        ({"rank": 0}, "rank is 0; expected an integer in"),
        ({"method": "task_arithmetic", "lambda_": 2.0}, "Task arithmetic has no parameter lambda"),
        ({"method": "task_arithmetic", "math_weight": float("nan")}, "math_weight is nan"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(
    arguments: dict[str, object], words: str, analysis: Analysis
) -> None:
    with pytest.raises(PlanError, match=words):
        ipm.make_plan(analysis, **arguments)


def test_a_misspelt_method_is_answered_with_the_nearest(analysis: Analysis) -> None:
    with pytest.raises(UnknownMethodError, match="Did you mean 'ip_merging'"):
        ipm.make_plan(analysis, method="ip_mergin")


@pytest.mark.parametrize("parameters", [{"temperature": 8.0}, {"projector": "top_k"}])
def test_directions_that_were_not_measured_are_not_previewed(
    parameters: dict[str, object], analysis: Analysis
) -> None:
    with pytest.raises(PlanError, match="not previewable"):
        ipm.make_plan(analysis, **parameters).preview()


def test_a_plan_that_was_tampered_with_is_refused(analysis: Analysis, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ipm.make_plan(analysis).save(path)
    content = json.loads(path.read_text())
    content["parameters"]["lambda_"] = 7.0
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="its hash is .* but the file has"):
        MergePlan.load(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "ipmerge-plan", "version": 99}'])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="is not a plan of this version"):
        MergePlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="Cannot read the plan"):
        MergePlan.load(tmp_path / "nowhere.json")


# --- plans of earlier versions ---


def as_it_was(plan: MergePlan) -> dict[str, Any]:
    """A plan's file of the time when normalize was true or false and methods had fewer options."""
    content = json.loads(json.dumps(plan.to_dict()))
    for source in [content["sources"]["mllm"], content["sources"]["base"]]:
        del source["content"]
    for source in content["sources"]["math"]:
        del source["content"]
    del content["method_version"]
    parameters = content["parameters"]
    if "normalize" in parameters:
        parameters["normalize"] = parameters["normalize"] == "weights"
    for method, later in (
        ("dare_ties", ["election"]),
        ("della", ["election"]),
        ("knots_ties", ["trim"]),
        ("ip_merging", ["energy", "beta", "budget", "output_budget", "math_energy"]),
    ):
        for name in later if plan.method == method else ():
            del parameters[name]
    fingerprints = [source.fingerprint for source in plan.sources.all()]
    chosen = [[d.name, list(d.experts)] for d in plan.decisions if d.experts]
    hashed: list[Any] = [plan.method, dict(sorted(parameters.items())), [], chosen, fingerprints]
    if plan.anchor != "two_base":
        hashed.append(plan.anchor)
    return {**content, "hash": hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:8]}


@pytest.mark.parametrize(
    ("method", "choice"),
    [
        ("ip_merging", {"gamma_norm": "max"}),
        ("task_arithmetic", {}),
        ("ties", {}),
        ("ties", {"normalize": "weights", "election": "majority", "trim": "official"}),
        ("dare_ties", {"normalize": "weights"}),
        ("dare_ties", {"normalize": "none"}),
        ("della", {}),
        ("della", {"normalize": "none", "elect": False}),
        ("knots_ties", {}),
    ],
)
def test_a_plan_of_an_earlier_version_opens_and_merges_the_same(
    method: str, choice: dict[str, Any], analysis: Analysis, tmp_path: Path
) -> None:
    plan = ipm.make_plan(analysis, method, **choice)
    (tmp_path / "plan.json").write_text(json.dumps(as_it_was(plan)))
    old = MergePlan.load(tmp_path / "plan.json")
    same = replace(plan, sources=plan.sources._each(lambda source: replace(source, content=None)))
    assert old.digest == same.digest
    assert old == same


def test_what_is_new_in_a_plan_is_in_its_hash(analysis: Analysis) -> None:
    choices: list[dict[str, Any]] = [
        {}, {"normalize": "weights"}, {"normalize": "count"}, {"election": "majority"},
        {"election": "unweighted"},
    ]  # fmt: skip
    plans = [ipm.make_plan(analysis, "dare_ties", **choice) for choice in choices]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert plans[1].digest == ipm.make_plan(analysis, "dare_ties", normalize=True).digest


# --- scopes ---


def test_include_and_exclude_choose_matrices_by_name(analysis: Analysis) -> None:
    plan = ipm.make_plan(
        analysis, similarity_threshold=0, include=r"mlp", exclude=r"layers\.1\.|up_proj"
    )
    names = {decision.name for decision in plan.selected}
    assert names == {
        f"model.layers.{layer}.mlp.{module}_proj.weight"
        for layer in (0, 2)
        for module in ("gate", "down")
    }
    assert MergePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_an_override_wins_over_the_scope(analysis: Analysis) -> None:
    plan = ipm.make_plan(analysis, exclude=".", overrides={FIRST: "merge"})
    assert [decision.name for decision in plan.selected] == [FIRST]


def test_a_pattern_that_is_none_is_refused(analysis: Analysis) -> None:
    with pytest.raises(
        PlanError, match="The include pattern '\\(' is not a valid regular expression"
    ):
        ipm.make_plan(analysis, include="(")


def test_layer_gains_fade_the_update_in(analysis: Analysis) -> None:
    flat = ipm.make_plan(analysis, similarity_threshold=0).preview().layer_change
    plan = ipm.make_plan(analysis, similarity_threshold=0, layer_gains=(0, 1))
    faded = plan.preview().layer_change
    for layer, factor in {0: 0.0, 1: 0.5, 2: 1.0}.items():
        assert faded[layer] == pytest.approx(factor * flat[layer])
    assert plan.parameters_for(1)["lambda_"] == 0.5


@pytest.mark.parametrize("factors", [(-1.0,), (float("nan"), 1.0), ("x",)])
def test_impossible_layer_gains_are_refused(factors: tuple, analysis: Analysis) -> None:
    with pytest.raises(PlanError, match="A layer gain is"):
        ipm.make_plan(analysis, layer_gains=factors)


def test_plans_of_a_pack_of_version_1_take_every_direction_as_they_did():
    # Written by the version that made such packs, from the demo trio; so are hashes and changes.
    analysis = ipm.Analysis.load(Path(__file__).parent / "pack_version_1.json.gz")
    assert analysis.parameters["directions"] == "all"
    assert analysis.records[0].mllm_directions is None
    stronger = {"similarity_threshold": 0.1, "lambda_": 8.0, "gamma_norm": "max"}
    for choice, name, change in (
        ({}, "17a97113", 0.007829405515212962),
        (stronger, "3d325188", 0.07541334405462403),
    ):
        plan = ipm.make_plan(analysis, **choice)
        assert (plan.hash, plan.parameters["directions"]) == (name, "all")
        assert plan.preview().relative_change == change
        assert not plan.preview().approximate
    with pytest.raises(PlanError, match="used directions all and the plan has directions existing"):
        ipm.make_plan(analysis, directions="existing").preview()


def test_more_layer_gains_than_layers_are_refused(analysis: Analysis) -> None:
    layers = len({record.layer for record in analysis.records})
    ipm.make_plan(analysis, "task_arithmetic", layer_gains=[1.0] * layers)
    with pytest.raises(PlanError, match=f"has {layers + 1} factors and the model {layers} layers"):
        ipm.make_plan(analysis, "task_arithmetic", layer_gains=[1.0] * (layers + 1))
