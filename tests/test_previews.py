"""A preview that claims to be exact is what the merged files say, however the pair was analysed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Weights, as_mllm, fine_tuned, text_weights, write_model
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core import cli
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.errors import PlanError
from ipmerge_core.merging.model_card import write_card
from ipmerge_core.methods import METHODS
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.planning.preview import Preview
from ipmerge_core.spectral.kinds import TEMPERATURE

ANALYSES: list[dict[str, Any]] = [
    {},
    {"temperature": 8.0},
    {"temperature": 0.5},
    {"rank": 4},
    {"rank": 1, "temperature": 8.0},
    {"rank": 1000},
    {"quick": True, "temperature": 8.0},
]
PLANS: list[dict[str, Any]] = [
    {},
    {"gamma_norm": "max"},
    {"temperature": 8.0},
    {"rank": None},
    {"rank": 16},
    {"projector": "top_k", "top_k": 3},
    {"ablation": "rescale_only"},
    {"ablation": "rescale_only", "rank": 4},
    {"ablation": "select_only"},
    {"layer_gains": (0.5, 2.0)},
    {"projector": "protect"},
    {"projector": "protect", "rank": 4},
    *({"projector": "complement", "energy": share} for share in (0.05, 0.5, 0.65, 0.95, 1.0)),
    {"projector": "complement", "rank": 4, "energy": 0.7},
    {"budget": 0.01},
    {"projector": "complement", "energy": 0.3, "budget": 0.02, "layer_gains": (0.5, 2.0)},
    {"ablation": "select_only", "budget": 0.02},
    *({"ablation": "select_only", "math_energy": share} for share in (0.05, 0.5, 0.85, 0.95)),
    {"ablation": "select_only", "math_energy": 0.6, "budget": 0.02, "layer_gains": (0.5, 2.0)},
]


def low_rank(weights: Weights, seed: int) -> Weights:
    """Tune as LoRA does: the change of every matrix has two directions, the rest is zero."""
    generator = torch.Generator().manual_seed(seed)
    tuned = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 2 and ".layers." in name:
            rows, columns = weight.shape
            left = torch.randn(rows, 2, generator=generator)
            right = torch.randn(2, columns, generator=generator)
            tuned[name] = weight + 0.004 * left @ right
    return tuned


@pytest.fixture(scope="module", params=["one", "two of low rank"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    """Models on disk: one expert, or two; whose changes have all directions, or a few."""
    folder, base = tmp_path_factory.mktemp("models"), text_weights()
    tune, count = (fine_tuned, 1) if request.param == "one" else (low_rank, 2)
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    write_model(folder / "mllm", as_mllm(tune(base, 1)), config)
    write_model(folder / "base", base, TEXT_CONFIG)
    experts = [
        write_model(folder / f"math{k}", tune(base, 2 + k), TEXT_CONFIG) for k in range(count)
    ]
    return ipm.open_pair(folder / "mllm", experts, folder / "base")


@pytest.fixture(scope="module")
def analysed(pair: ModelPair) -> Any:
    """One analysis for each set of options."""
    return cache(lambda options: ipm.analyse(pair, **json.loads(options)))


def measured(pair: ModelPair, out: Path) -> tuple[float, dict[int, float], float]:
    """The relative change of the files, by layer, and the cosine to the MLLM's own change."""
    base, before, after = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (pair.base.id, pair.mllm.id, out)
    )
    moved: dict[int, float] = {}
    size: dict[int, float] = {}
    products = torch.zeros(3, dtype=torch.float64)
    for m in pair.matrices:
        was, now, root = before[m.mllm].double(), after[m.mllm].double(), base[m.name].double()
        moved[m.layer] = moved.get(m.layer, 0.0) + float((now - was).square().sum())
        size[m.layer] = size.get(m.layer, 0.0) + float(was.square().sum())
        own, new = was - root, now - root
        products += torch.stack([(own * new).sum(), own.square().sum(), new.square().sum()])
    layers = {layer: (moved[layer] / size[layer]) ** 0.5 for layer in moved}
    keep = float(products[0] / (products[1] * products[2]).sqrt())
    return (sum(moved.values()) / sum(size.values())) ** 0.5, layers, keep


@pytest.fixture(scope="module")
def after_merging(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the files of a plan's merge say; plans of one digest make one merge."""
    plans: dict[str, MergePlan] = {}

    @cache
    def of_digest(digest: str) -> tuple[float, dict[int, float], float]:
        out = tmp_path_factory.mktemp("merged") / "out"
        ipm.merge(plans[digest], out)
        return measured(pair, out)

    return lambda plan: of_digest(plans.setdefault(plan.digest, plan).digest)


def claimed(plan: MergePlan) -> Preview | None:
    """The plan's preview where it claims to be exact."""
    try:
        preview = plan.preview()
    except PlanError:
        return None
    return None if preview.approximate else preview


@pytest.mark.parametrize("how", ANALYSES, ids=str)
def test_an_exact_preview_is_the_change_of_the_merged_files(
    how: dict[str, Any], analysed: Any, after_merging: Any
) -> None:
    analysis = analysed(json.dumps(how))
    exact = 0
    for choice in PLANS:
        plan = ipm.make_plan(analysis, similarity_threshold=0.0, lambda_=3.0, **choice)
        if (preview := claimed(plan)) is None:
            continue
        exact += 1
        change, layers, keep = after_merging(plan)
        assert preview.relative_change == pytest.approx(change, rel=1e-4), choice
        assert preview.layer_change == pytest.approx(layers, rel=1e-4), choice
        assert preview.keep == pytest.approx(keep, rel=1e-4), choice
    assert exact >= (1 if how.get("quick") else 5)


@pytest.mark.parametrize("how", ANALYSES, ids=str)
def test_a_plan_that_says_nothing_else_merges_as_its_analysis_measured(
    how: dict[str, Any], analysed: Any
) -> None:
    plan = ipm.make_plan(analysed(json.dumps(how)))
    assert plan.parameters["temperature"] == how.get("temperature", 32.0)
    assert plan.parameters["rank"] == how.get("rank")
    assert (plan.preview().approximate != "") == how.get("quick", False)


def test_packs_of_another_temperature_or_rank_give_other_digests(analysed: Any) -> None:
    hows = [how for how in ANALYSES if not how.get("quick")]
    plans = [ipm.make_plan(analysed(json.dumps(how)), similarity_threshold=0.0) for how in hows]
    assert len({plan.digest for plan in plans}) == len(plans)
    alike = [
        ipm.make_plan(
            analysed(json.dumps(how)), similarity_threshold=0.0, temperature=32.0, rank=None
        )
        for how in hows
    ]
    assert len({plan.digest for plan in alike}) == 1  # one merge, whatever it was analysed with


@pytest.mark.parametrize(
    ("how", "choice", "words"),
    [
        ({"temperature": 8.0}, {"temperature": 32.0}, "temperature 8 and the plan has temperature"),
        (
            {},
            {"temperature": 8.0},
            "Omit temperature from the plan to use that of the analysis, or",
        ),
        ({"rank": 4}, {"rank": None}, "rank 4 and the plan has rank none"),
        ({"rank": 4}, {"ablation": "rescale_only", "rank": 3}, "analyse the pair with rank 3"),
        (
            {"quick": True, "temperature": 8.0},
            {"temperature": 1.5},
            "temperature 8 and the plan has temperature 1.5",
        ),
    ],
)
def test_an_update_that_was_not_measured_has_no_preview_and_the_reason_is_said(
    how: dict[str, Any], choice: dict[str, Any], words: str, analysed: Any
) -> None:
    with pytest.raises(PlanError, match=words):
        ipm.make_plan(analysed(json.dumps(how)), **choice).preview()


@pytest.mark.parametrize("choice", [{"ablation": "select_only"}, {"method": "task_arithmetic"}])
def test_what_uses_no_direction_is_exact_from_every_analysis(
    choice: dict[str, Any], analysed: Any
) -> None:
    everything = {"similarity_threshold": 0.0, **choice}
    previews = [
        ipm.make_plan(analysed(json.dumps(how)), **everything).preview() for how in ANALYSES
    ]
    assert not any(preview.approximate for preview in previews)
    changes = [preview.relative_change for preview in previews]
    assert max(changes) == pytest.approx(min(changes), rel=1e-6)


def test_a_plan_file_keeps_how_its_analysis_was_made(analysed: Any, tmp_path: Path) -> None:
    plan = ipm.make_plan(analysed('{"temperature": 8.0}'))
    plan.save(tmp_path / "plan.json")
    again = MergePlan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.preview() == plan.preview()


def test_a_plan_that_does_not_say_how_its_analysis_was_made_claims_nothing(
    analysed: Any,
) -> None:
    plan = ipm.make_plan(analysed("{}"))
    content = json.loads(json.dumps(plan.to_dict()))
    del content["analysed"]
    old = MergePlan.from_dict(content)
    assert old.digest == plan.digest  # it merges as it did
    assert "does not record its analysis options" in old.preview().approximate
    assert old.preview().relative_change == plan.preview().relative_change
    assert not ipm.make_plan(analysed("{}"), ablation="select_only").preview().approximate


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": "hot"}, {"rank": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], analysed: Any) -> None:
    analysis: Analysis = analysed("{}")
    with pytest.raises(PlanError, match=f"{next(iter(options))} is"):
        ipm.make_plan(replace(analysis, parameters=options), temperature=1.0, rank=1)
    content = {**ipm.make_plan(analysis).to_dict(), "analysed": options}
    with pytest.raises(PlanError, match=f"{next(iter(options))} is"):
        MergePlan.from_dict(json.loads(json.dumps(content)))


def test_the_command_line_takes_the_analysis_options_and_says_so(
    pair: ModelPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--mllm", pair.mllm.id, "--base", pair.base.id]
    models += [word for expert in pair.math for word in ("--math", expert.id)]
    pack, plan = str(tmp_path / "pack.json.gz"), str(tmp_path / "plan.json")
    how = ["--temperature", "8", "--rank", "4", "--quiet"]
    assert cli.main(["analyse", *models, *how, "-o", pack]) == 0
    assert cli.main(["plan", pack, "--similarity-threshold", "0", "-o", plan]) == 0
    assert (
        "(relative Frobenius norm), with temperature 8 and rank 4 from the analysis."
        in capsys.readouterr().out
    )
    assert cli.main(["plan", pack, "--set", "rank=none", "-o", plan]) == 0
    assert "is not previewable: the analysis used" in capsys.readouterr().out


@pytest.mark.parametrize("quick", [False, True])
def test_the_model_card_says_whether_its_number_is_exact(quick: bool, analysed: Any) -> None:
    card = write_card(ipm.make_plan(analysed(json.dumps(ANALYSES[-1] if quick else {}))))
    assert "The decoder weights changed by" in card
    assert ("(approximate: the analysis was a quick one" in card) == quick


def test_the_method_and_the_analysis_have_one_default_temperature() -> None:
    assert METHODS["ip_merging"].complete({})["temperature"] == TEMPERATURE
