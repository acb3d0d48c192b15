"""The prior meets the right parameter in every family and name layout, and says where it cannot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import LAYERS as TRIO_LAYERS
from conftest import TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model
from family_layouts import FAMILIES, LAYERS, build

from ipmerge_core.errors import CheckpointError, PairingError, PlanError, ShapeError
from ipmerge_core.finetuning.guidance import find_guided, measure_distances
from ipmerge_core.finetuning.matching import match_prior
from ipmerge_core.finetuning.prior import PLACEMENTS, ReasoningPrior
from ipmerge_core.finetuning.result import stored_parameters
from ipmerge_core.finetuning.scope import SETS, Scope
from ipmerge_core.inference.loading import load_weights
from ipmerge_core.inference.module_names import parameter_names
from ipmerge_core.models.checkpoint import Checkpoint

DEMO = Path(__file__).parents[1] / "assets" / "demo"

PROJECTION = re.compile(
    r"(^|\.)layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down|qkv|gate_up)_proj\.(weight|bias)$"
)
MIXTURES = {name for name in FAMILIES if "mixture" in name}
LAYOUTS = [
    (name, layout)
    for name, family in FAMILIES.items()
    for layout in family.layouts
    if name not in MIXTURES
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    made: dict[str, dict[str, Path]] = {}

    class Lazy(dict):  # type: ignore[type-arg]
        def __missing__(self, name: str) -> dict[str, Path]:
            self[name] = build(FAMILIES[name], tmp_path_factory.mktemp("family"))
            return self[name]

    return Lazy(made)


def opened(trio: Trio, role: str = "math") -> tuple[Checkpoint, Checkpoint]:
    return Checkpoint.open(trio.mllm), Checkpoint.open(getattr(trio, role))


def projections(expert: Checkpoint) -> int:
    """The number of parameters that the default scope selects, by the expert's own names."""
    parts = {"qkv": 3, "gate_up": 2}
    found = [PROJECTION.search(name) for name in expert.tensors]
    return sum(parts.get(match[3], 1) for match in found if match)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_parameter_of_every_layout_meets_its_own_prior(name, layout, folders):
    mllm, expert = (Checkpoint.open(folders[name][role]) for role in (layout, "math"))
    match = match_prior(mllm, expert, Scope())
    assert len(match.entries) == projections(expert) >= 7 * LAYERS
    if layout.endswith("repository"):
        return  # which transformers does not load: training refuses it
    model = load_weights(mllm).float().requires_grad_(True)
    names = parameter_names(model, list(mllm.tensors))
    prior = ReasoningPrior(match).compute()
    assert 0 < prior.relative_norm < 0.2  # a wrong match is an unrelated matrix: 1.4
    guided = find_guided(model, prior, names, lambda _: 1.0)
    assert len({(each.name, str(each.rows)) for each in guided}) == len(match.entries)
    for each in guided:
        wanted = expert.read(each.entry.expert).float()
        found = each.part(each.parameter).detach() + prior.get(each.number)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "LLaVA with a fused text model (Phi-3)"])
def test_every_trained_tensor_has_a_place_in_the_files(name, folders):
    for layout in FAMILIES[name].layouts:
        mllm = Checkpoint.open(folders[name][layout])
        model = load_weights(mllm).requires_grad_(False)
        model.get_decoder().requires_grad_(True)
        stored = stored_parameters(model, mllm, parameter_names(model, list(mllm.tensors)))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert set(stored.values()) == trained


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_the_experts_of_a_mixture_are_refused_by_name_and_its_attention_is_not(name, folders):
    mllm, expert = (Checkpoint.open(folders[name][role]) for role in ("modules", "math"))
    model = load_weights(mllm).float()
    names = parameter_names(model, list(mllm.tensors))
    prior = ReasoningPrior(match_prior(mllm, expert, Scope())).compute()
    with pytest.raises(PairingError, match=r"experts.*select other modules"):
        find_guided(model, prior, names, lambda _: 1.0)
    attention = ReasoningPrior(match_prior(mllm, expert, Scope(("attn",)))).compute()
    assert len(find_guided(model, attention, names, lambda _: 1.0)) == 4 * LAYERS


def test_qwen_has_three_biases_per_layer_unless_they_are_left_out(folders):
    mllm, expert = (Checkpoint.open(folders["Qwen2.5-VL"][role]) for role in ("hub", "math"))
    assert len(match_prior(mllm, expert, Scope()).entries) == (7 + 3) * LAYERS
    assert len(match_prior(mllm, expert, Scope(biases=False)).entries) == 7 * LAYERS


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (Scope(("attn",)), 4 * TRIO_LAYERS),
        (Scope(("mlp",)), 3 * TRIO_LAYERS),
        (Scope(("norm",)), 2 * TRIO_LAYERS + 1),
        (Scope(("embed", "head")), 2),
        (Scope(("full",)), 9 * TRIO_LAYERS + 3),
        (Scope(("re:q_proj",)), TRIO_LAYERS),
        (Scope(first_layer=1), 7 * (TRIO_LAYERS - 1)),
        (Scope(first_layer=1, last_layer=1), 7),
        (Scope(("attn", "norm"), last_layer=0), 4 + 2 + 1),  # the final norm has no layer
    ],
)
def test_module_sets_and_layer_ranges_select_what_they_name(scope, expected, trio: Trio):
    assert len(match_prior(*opened(trio), scope).entries) == expected


def test_hierarchical_priors_start_from_the_base_of_the_expert(trio: Trio):
    mllm, expert = opened(trio)
    base = Checkpoint.open(trio.base)
    match = match_prior(mllm, expert, Scope(), base)
    prior = ReasoningPrior(match).compute()
    entry = match.entries[0]
    wanted = expert.read(entry.expert) - base.read(entry.expert)
    torch.testing.assert_close(prior.get(0), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_placements_give_one_prior_and_at_most_one_copy(dtype, tmp_path, monkeypatch):
    base = text_weights()
    mllm, math = (
        Checkpoint.open(write_model(tmp_path / n, fine_tuned(base, s), TEXT_CONFIG, dtype=dtype))
        for n, s in (("mllm", 1), ("math", 2))
    )
    match = match_prior(mllm, math, Scope())
    priors = {place: ReasoningPrior(match, place).compute() for place in PLACEMENTS}
    assert {place: prior.nbytes for place, prior in priors.items()} == {
        "cpu": match.numel * dtype.itemsize,
        "device": match.numel * dtype.itemsize,
        "files": 0,
    }
    for number in range(len(match.entries)):
        found = [prior.get(number).to(dtype) for prior in priors.values()]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_normalizing_scales_to_the_norm_of_each_weight(trio: Trio):
    match = match_prior(*opened(trio), Scope())
    plain, scaled = (ReasoningPrior(match, normalize=n).compute() for n in (False, True))
    assert scaled.relative_norm == pytest.approx(plain.relative_norm)
    for number, own in enumerate(scaled.weight_norms):
        assert float(scaled.get(number).norm()) == pytest.approx(own, rel=1e-5)
        assert scaled.norms[number] == pytest.approx(own)


def test_distances_are_those_of_the_files(trio: Trio):
    mllm, expert = opened(trio)
    match = match_prior(mllm, expert, Scope(("re:layers.0.self_attn.q_proj",)))
    prior = ReasoningPrior(match).compute()
    entry = match.entries[0]
    start, target = (m.read(a).float() for m, a in ((mllm, entry.mllm), (expert, entry.expert)))
    module = torch.nn.Linear(1, 1)
    module.weight = torch.nn.Parameter(start + 0.25 * (target - start))
    guided = find_guided(module, prior, {entry.mllm: "weight"}, lambda _: 1.0)
    found = measure_distances(guided, prior)
    whole = float((target - start).norm() / start.norm())
    assert found.to_start == pytest.approx(0.25 * whole, rel=1e-4)
    assert found.to_expert == pytest.approx(0.75 * whole, rel=1e-4)
    assert found.moved_cosine == pytest.approx(1.0, abs=1e-5)


# --- bad input ---


def test_an_expert_with_other_shapes_or_layers_is_refused(trio: Trio, tmp_path):
    weights = text_weights()
    wide = {n: torch.cat([w, w]) if n.endswith("up_proj.weight") else w for n, w in weights.items()}
    short = {n: w for n, w in weights.items() if ".layers.2." not in n}
    lacking = {n: w for n, w in weights.items() if not n.endswith("1.self_attn.q_proj.weight")}
    mllm = Checkpoint.open(trio.mllm)
    for name, changed, error, message in (
        ("wide", wide, ShapeError, r"\(24, 16\).*\(48, 16\).*equal shapes"),
        ("short", short, PairingError, "3 decoder layers.*has 2"),
        ("lacking", lacking, PairingError, "q_proj.*no counterpart"),
    ):
        expert = Checkpoint.open(write_model(tmp_path / name, changed, TEXT_CONFIG))
        with pytest.raises(error, match=message):
            match_prior(mllm, expert, Scope())


def test_another_vocabulary_matters_only_where_it_is_selected(trio: Trio, tmp_path):
    weights = text_weights()
    grown = {
        name: torch.cat([w, w[:2]]) if "embed" in name or "lm_head" in name else w
        for name, w in weights.items()
    }
    expert = Checkpoint.open(write_model(tmp_path / "grown", fine_tuned(grown, 2), TEXT_CONFIG))
    mllm = Checkpoint.open(trio.mllm)
    assert match_prior(mllm, expert, Scope()).entries
    with pytest.raises(ShapeError, match="leave out embed and head"):
        match_prior(mllm, expert, Scope(("embed",)))


def test_nothing_to_follow_is_an_error_and_never_zero_parameters(trio: Trio):
    mllm, expert = opened(trio)
    with pytest.raises(PairingError, match="No parameter.*it has 3 layers"):
        match_prior(mllm, expert, Scope(first_layer=3))
    with pytest.raises(PairingError, match="No parameter"):
        match_prior(mllm, expert, Scope(("re:nothing_like_this",)))
    same = match_prior(mllm, mllm, Scope())
    with pytest.raises(PairingError, match="equals.*no direction to follow"):
        ReasoningPrior(same).compute()


def test_an_unrelated_expert_is_refused(trio: Trio, tmp_path):
    alien = Checkpoint.open(write_model(tmp_path / "alien", text_weights(9), TEXT_CONFIG))
    prior = ReasoningPrior(match_prior(Checkpoint.open(trio.mllm), alien, Scope())).compute()
    with pytest.raises(PairingError, match="share one base"):
        prior.refuse_unrelated()


def test_damaged_weights_of_the_expert_are_named(trio: Trio, tmp_path):
    weights = fine_tuned(text_weights(), 2)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    expert = Checkpoint.open(write_model(tmp_path / "nan", weights, TEXT_CONFIG))
    match = match_prior(Checkpoint.open(trio.mllm), expert, Scope())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*1 NaN"):
        ReasoningPrior(match).compute()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scope(()), "No modules"),
        (lambda: Scope(("attention",)), "Unknown modules 'attention'.*attn"),
        (lambda: Scope(("re:(",)), "not a valid regular expression"),
        (lambda: Scope(strengths=(("[", 1.0),)), "not a valid regular expression"),
        (lambda: Scope(first_layer=2, last_layer=1), "first <= last"),
        (lambda: Scope(first_layer=-1), "first layer is -1"),
    ],
)
def test_invalid_scopes_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_the_sets_are_those_of_the_command_line():
    assert Scope(("full",)).sets == frozenset(SETS)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (Scope(("attn", "re:no_such")), "'re:no_such' select no parameter"),
        (Scope(("attn", "mlp"), strengths=(("q_porj", 2.0),)), "'q_porj' of a strength is found"),
        (Scope(("attn",), strengths=(("mlp", 0.0),)), "'mlp' of a strength is found"),
    ],
)
def test_a_name_or_a_pattern_without_effect_is_refused(scope, message):
    with pytest.raises(PairingError, match=message):
        match_prior(Checkpoint.open(DEMO / "mllm"), Checkpoint.open(DEMO / "math"), scope)


def test_of_an_expert_with_a_vision_tower_the_language_model_is_matched():
    mllm = Checkpoint.open(DEMO / "mllm")
    match = match_prior(mllm, mllm, Scope())
    assert [entry.expert for entry in match.entries] == [entry.mllm for entry in match.entries]
    assert len(match.entries) == 28
