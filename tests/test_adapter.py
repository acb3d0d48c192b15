"""The LoRA adapter of a plan: the same change as the merge, in a folder that PEFT loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.adapters import export as adapter
from ipmerge_core.adapters.export import export_adapter, iter_adapter
from ipmerge_core.adapters.factors import in_rows, reduce_rank, sum_of
from ipmerge_core.cli import main
from ipmerge_core.errors import CheckpointError, PlanError
from ipmerge_core.merging.merge import reopen
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.planning.plan import MergePlan, make_plan
from ipmerge_core.spectral.similarity import Update

DEMO = Path(__file__).parents[1] / "assets" / "demo"

Plan = Callable[..., MergePlan]


@pytest.fixture
def plan_of(trio: Trio) -> Plan:
    """A plan over the tiny trio that merges every matrix unless told otherwise."""
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base))

    def make(**options: object) -> MergePlan:
        return make_plan(analysis, **{"similarity_threshold": 0.0, **options})

    return make


def factors(out: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The stored factors (B, A) by module."""
    stored = load_file(out / "adapter_model.safetensors")
    modules = {name.removesuffix(".lora_A.weight") for name in stored if "lora_A" in name}
    return {
        module.removeprefix("base_model.model."): (
            stored[f"{module}.lora_B.weight"],
            stored[f"{module}.lora_A.weight"],
        )
        for module in modules
    }


def test_the_adapter_is_the_change_that_the_merge_makes(plan_of, trio, tmp_path):
    plan = plan_of(lambda_=3.0)
    report = export_adapter(plan, tmp_path / "adapter")
    ipm.merge(plan, tmp_path / "merged")
    before, after = Checkpoint.open(trio.mllm), Checkpoint.open(tmp_path / "merged")
    stored = factors(tmp_path / "adapter")
    assert len(stored) == len(plan.selected) == len(report["matrices"])
    for tensor, entry in report["matrices"].items():
        B, A = stored[entry["module"]]
        change = after.read(tensor) - before.read(tensor)
        off = (3.0 * B @ A - change).norm()
        assert off <= 1.1e-3 * change.norm() + 1e-6 * before.read(tensor).norm()
        assert entry["residual"] <= 1e-3
        rank = entry["rank"]
        assert rank == entry["needed"] <= B.shape[1] == A.shape[0]
        assert not B[:, rank:].any()
        assert not A[rank:].any()


def test_the_scale_of_every_module_is_lambda(plan_of, tmp_path):
    export_adapter(plan_of(lambda_=2.5), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(2.5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    ranks = {len(A) for _, A in factors(tmp_path / "adapter").values()}
    assert ranks == {config["r"]}


def test_the_configuration_is_the_file_that_peft_writes(plan_of, tmp_path):
    export_adapter(plan_of(lambda_=2.5), tmp_path / "adapter")
    ours = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    LoraConfig.from_pretrained(tmp_path / "adapter").save_pretrained(tmp_path / "again")
    theirs = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {**theirs, "target_modules": sorted(theirs["target_modules"])} == ours
    assert ours["target_modules"] == sorted(ours["target_modules"])
    assert ours["base_model_name_or_path"] == plan_of().sources.mllm.id
    assert (ours["peft_type"], ours["inference_mode"], ours["bias"]) == ("LORA", True, "none")


def test_layer_gains_are_part_of_the_factors(plan_of, tmp_path):
    export_adapter(plan_of(lambda_=2.0), tmp_path / "even")
    export_adapter(plan_of(lambda_=2.0, layer_gains=(1.0, 0.5)), tmp_path / "fading")
    even, fading = factors(tmp_path / "even"), factors(tmp_path / "fading")
    last = next(name for name in even if "layers.2.mlp.up_proj" in name)
    first = last.replace("layers.2", "layers.0")
    for name, scale in [(first, 1.0), (last, 0.5)]:
        expected = scale * even[name][0] @ even[name][1]
        torch.testing.assert_close(fading[name][0] @ fading[name][1], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "parameters",
    [{"gamma_norm": "max"}, {"projector": "top_k", "top_k": 3}, {"rank": 5}, {"temperature": 4.0}],
    ids=str,
)
def test_every_variant_of_the_projection_can_be_exported(plan_of, trio, tmp_path, parameters):
    plan = plan_of(**parameters)
    report = export_adapter(plan, tmp_path / "adapter")
    ipm.merge(plan, tmp_path / "merged")
    tensor, entry = next(iter(report["matrices"].items()))
    B, A = factors(tmp_path / "adapter")[entry["module"]]
    change = Checkpoint.open(tmp_path / "merged").read(tensor)
    change = change - Checkpoint.open(trio.mllm).read(tensor)
    assert (B @ A - change).norm() <= 2e-3 * change.norm() + 1e-6


def test_only_selected_matrices_and_experts_enter(plan_of, tmp_path):
    threshold = sorted(record.similarity["first"] for record in plan_of().records)[-5]
    plan = plan_of(similarity_threshold=threshold)
    report = export_adapter(plan, tmp_path / "adapter")
    assert 0 < len(report["matrices"]) == len(plan.selected) < len(plan.decisions)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "README.md"])
def test_two_exports_give_the_same_bytes(plan_of, tmp_path, file):
    for name in ("one", "two"):
        export_adapter(plan_of(), tmp_path / name)
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_progress_comes_module_by_module_and_the_folder_when_all_is_done(plan_of, tmp_path):
    out = tmp_path / "adapter"
    steps = iter_adapter(plan_of(), out)
    first = next(steps)
    assert (first.index, first.total) == (1, 21)
    assert first.module.startswith("model.language_model.layers.0.")
    assert not out.exists()
    assert len(list(steps)) == 20
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ipmerge-adapter.json",
        "README.md",
    }


def test_a_matrix_that_needs_more_directions_is_cut_loudly(plan_of, tmp_path):
    with pytest.warns(UserWarning, match=r"matrices need a rank above max_rank = 1"):
        report = export_adapter(plan_of(temperature=1.0), tmp_path / "adapter", max_rank=1)
    assert report["over_max_rank"]
    worst = report["matrices"][report["over_max_rank"][0]]
    assert worst["rank"] == 1 < worst["needed"]
    assert 1e-3 < worst["residual"] < 1
    assert report["largest_residual"] >= worst["residual"]


def test_the_command_writes_the_same_adapter(plan_of, tmp_path, capsys):
    plan = plan_of()
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "adapter"
    assert main(["adapter", str(tmp_path / "plan.json"), "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["hash"] == plan.hash
    assert report["adapter"] == str(out)
    ipm.export_adapter(plan, tmp_path / "again")
    files = [folder / "adapter_model.safetensors" for folder in (out, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


# --- PEFT ---


def write_llava(folder: Path) -> Trio:
    """A real tiny LLaVA with its text base and an expert, saved by transformers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=20,
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    model = Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=19))
    base = text_weights()
    model.model.language_model.load_state_dict(
        {
            name.removeprefix("model."): weight
            for name, weight in fine_tuned(base, 1).items()
            if name.startswith("model.")
        }
    )
    model.save_pretrained(folder / "mllm")
    (folder / "mllm" / "tokenizer.json").write_text("{}")
    return Trio(
        base=write_model(folder / "base", base, TEXT_CONFIG),
        mllm=folder / "mllm",
        math=write_model(folder / "math", fine_tuned(base, 2), TEXT_CONFIG),
        math_2=folder,
    )


def test_the_adapter_s_card_names_its_model_on_the_hub(plan_of, tmp_path, monkeypatch):
    plan = plan_of()
    export_adapter(plan, tmp_path / "local")
    local = ModelCard.load(tmp_path / "local" / "README.md")
    assert local.data.to_dict() == {"library_name": "peft", "tags": ["lora", "merge", "ipmerge"]}
    mllm = replace(plan.sources.mllm, id="org/mllm", revision="a1b2")
    on_hub = replace(plan, sources=replace(plan.sources, mllm=mllm))
    monkeypatch.setattr(adapter, "reopen", lambda _: reopen(plan))
    export_adapter(on_hub, tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model == ["org/mllm"]
    assert "# IP-Merging as a LoRA adapter" in card.text


# PEFT 0.21 itself asks transformers 5.23 by a name that is on its way out.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_loads_the_adapter_on_the_mllm_and_merges_to_the_merged_model(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    trio = write_llava(tmp_path)
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    plan = make_plan(analysis, similarity_threshold=0.0, lambda_=4.0)
    ipm.merge(plan, tmp_path / "merged")
    report = export_adapter(plan, tmp_path / "adapter")
    model = AutoModelForImageTextToText.from_pretrained(trio.mllm)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    for module in (entry["module"] for entry in report["matrices"].values()):
        assert adapted.base_model.model.get_submodule(module).scaling == {"default": 4.0}
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    theirs = adapted.merge_and_unload().state_dict()
    assert theirs.keys() == ours.keys()
    changed = [name for name in ours if not torch.equal(ours[name], original[name])]
    assert len(changed) == 21
    for name in changed:
        change = ours[name] - original[name]
        assert (theirs[name] - ours[name]).norm() <= 2e-3 * change.norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_peft_combines_two_adapters_saves_and_loads_the_result(tmp_path, how):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    trio = write_llava(tmp_path)
    analysis = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    needed = []
    other = {"lambda_": 2.0} if how == "linear" else {"temperature": 6.0}  # one rank or two
    for name, parameters in (("one", {}), ("two", other)):
        plan = make_plan(analysis, similarity_threshold=0.0, **parameters)
        matrices = export_adapter(plan, tmp_path / name)["matrices"]
        needed.append({entry["needed"] for entry in matrices.values()})
    assert all(len(ranks) > 1 for ranks in needed)  # what PEFT could not save

    def model() -> object:
        return AutoModelForImageTextToText.from_pretrained(trio.mllm)

    both = PeftModel.from_pretrained(model(), tmp_path / "one", adapter_name="one")
    both.load_adapter(tmp_path / "two", adapter_name="two")
    more = {"svd_rank": 8} if how == "svd" else {}
    both.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type=how, **more)
    both.save_pretrained(tmp_path / "saved", selected_adapters=["sum"])
    again = PeftModel.from_pretrained(model(), tmp_path / "saved" / "sum")
    both.set_adapter("sum")
    text = {"input_ids": torch.arange(6)[None] % 5}
    with torch.no_grad():
        expected, found, plain = both(**text).logits, again(**text).logits, model()(**text).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-5


# --- truncation ---


def test_truncation_finds_the_least_rank_that_leaves_the_tolerance():
    strength = torch.tensor([1.0, 0.1, 0.01, 1e-4, 1e-6])
    left = torch.linalg.qr(torch.randn(9, 5)).Q * strength
    right = torch.linalg.qr(torch.randn(7, 5)).Q.T
    for tolerance, rank in [(0.2, 1), (0.05, 2), (1e-3, 3), (1e-5, 4), (1e-9, 5)]:
        cut = reduce_rank(Update(left, right, 2.0), tolerance, 64)
        assert (cut.needed, cut.rank, cut.B.shape) == (rank, rank, (9, rank))
        off = (cut.B @ cut.A / 2 - left @ right).norm() / (left @ right).norm()
        assert float(off) == pytest.approx(cut.residual, abs=1e-6)
        assert cut.residual <= tolerance
    forced = reduce_rank(Update(left, right), 1e-9, 2)
    assert forced.needed == 5
    assert forced.residual == pytest.approx(0.01, rel=0.01)


def test_an_update_of_zero_needs_no_direction():
    cut = reduce_rank(Update(torch.zeros(4, 2), torch.ones(2, 3)), 1e-3, 64)
    assert (cut.needed, cut.residual, cut.B.shape) == (0, 0.0, (4, 0))


def test_a_block_of_a_fused_matrix_leaves_its_other_rows_alone():
    update = Update(torch.ones(2, 1), torch.ones(1, 3))
    placed = in_rows(update, range(1, 3), 4)
    assert placed.matrix().sum(1).tolist() == [0, 3, 3, 0]
    assert in_rows(update, range(2), 2) is update


def test_a_sum_of_updates_applies_the_gain_of_each():
    one = Update(torch.eye(2, 1), torch.ones(1, 3), 2.0)
    other = Update(torch.ones(2, 2), torch.ones(2, 3)).scaled(-0.5)
    assert torch.equal(sum_of([one, other]).matrix(), one.matrix() + other.matrix())
    assert sum_of([one, other]).matrix().tolist() == [[1.0] * 3, [-1.0] * 3]


# --- refusals ---


def test_changes_of_full_rank_are_refused(plan_of, tmp_path):
    for options, words in [
        ({"method": "task_arithmetic"}, "change of Task arithmetic has full rank"),
        ({"ablation": "select_only"}, "IP-Merging with ablation 'select_only' has full rank"),
    ]:
        with pytest.raises(PlanError, match=words):
            export_adapter(plan_of(**options), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_impossible_wishes_are_refused(plan_of, tmp_path):
    for options, words in [
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"max_rank": 0}, "max_rank is 0"),
    ]:
        with pytest.raises(PlanError, match=words):
            export_adapter(plan_of(), tmp_path / "adapter", **options)
    with pytest.raises(PlanError, match="selects none of 21 matrices"):
        export_adapter(plan_of(similarity_threshold=1.0), tmp_path / "adapter")


def test_a_folder_with_content_is_refused(plan_of, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export_adapter(plan_of(), tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_an_empty_folder_is_taken(plan_of, tmp_path):
    (tmp_path / "adapter").mkdir()
    assert export_adapter(plan_of(), tmp_path / "adapter")["nbytes"] > 0


def test_an_update_that_is_zero_everywhere_is_refused(tmp_path):
    base = text_weights()
    mllm = write_model(
        tmp_path / "mllm", as_mllm(fine_tuned(base, 1)), {"text_config": TEXT_CONFIG}
    )
    still = {
        name: fine_tuned(base, 2)[name] if "layers.0." in name else base[name] for name in base
    }
    math = write_model(tmp_path / "math", still, TEXT_CONFIG)
    pair = ipm.open_pair(mllm, math, write_model(tmp_path / "base", base, TEXT_CONFIG))
    name = "model.layers.2.mlp.up_proj.weight"
    plan = make_plan(ipm.analyse(pair), similarity_threshold=1.0, overrides={name: "merge"})
    with pytest.raises(PlanError, match="update of every selected matrix is zero"):
        export_adapter(plan, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_servers_find_one_rank_and_the_names_of_the_language_model(tmp_path: Path) -> None:
    """LoRA servers read neither rank patterns nor alpha patterns, and strip this prefix."""
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    plan = ipm.make_plan(analysis, similarity_threshold=0.0, lambda_=4.0, gamma_norm="max")
    export_adapter(plan, tmp_path / "adapter", max_rank=64)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert not config["use_dora"]
    assert not config["use_rslora"]
    for name, tensor in tensors.items():
        found = re.fullmatch(
            r"base_model\.model\.(model\.language_model\.layers\.\d+\.(?:self_attn|mlp)\."
            r"(?:q|k|v|o|gate|up|down)_proj)\.lora_([AB])\.weight", name,
        )  # fmt: skip
        assert found, name
        assert found[1] in config["target_modules"]
        assert tensor.shape[0 if found[2] == "A" else 1] == config["r"]
