"""An adapter names the modules that transformers has in memory, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, TEXT, build, rewrite, set_config

import ipmerge_core as ipm
from ipmerge_core.adapters.export import export_adapter
from ipmerge_core.errors import ModelLoadError, PlanError
from ipmerge_core.inference.module_names import module_names
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import open_pair

EYES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def instruct_blip() -> Any:
    from transformers import InstructBlipConfig

    return InstructBlipConfig(
        vision_config=EYES,
        qformer_config={
            "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "encoder_hidden_size": 32,
        },
        text_config={**TEXT, "model_type": "llama"},
        num_query_tokens=2,
        image_token_index=95,
    )  # fmt: skip


def emu3() -> Any:
    from transformers import Emu3Config

    return Emu3Config(
        vq_config={
            "num_res_blocks": 1, "base_channels": 32, "channel_multiplier": [1, 1],
            "attn_resolutions": [], "embed_dim": 4, "latent_channels": 4, "codebook_size": 8,
            "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32,
            "num_hidden_layers": 1,
        },
        text_config={**TEXT, "model_type": "emu3_text_model"},
        vocabulary_map={"<image>": 90} | {f"<|visual token {n:06}|>": 80 + n for n in range(8)},
    )  # fmt: skip


def write(config: Any, folder: Path) -> list[Path]:
    """Write a random MLLM, and its language model and a fine-tune of it as text models."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

    torch.manual_seed(3)
    mllm = AutoModelForImageTextToText.from_config(config)
    mllm.save_pretrained(folder / "mllm")
    text = AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))
    decoder = next(part for part in mllm.modules() if {"layers", "embed_tokens"} <= {*dir(part)})
    for name in ("base", "math"):
        text.model.load_state_dict(
            {
                key: weight + 0.002 * torch.randn_like(weight)
                for key, weight in decoder.state_dict().items()
            }
        )
        text.save_pretrained(folder / name)
    return [folder / name for name in ("mllm", "math", "base")]


# PEFT 0.21 itself asks transformers 5.23 by a name that is on its way out.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("make", [instruct_blip, emu3])
def test_peft_loads_the_adapter_and_its_logits_are_those_of_the_merge(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    config = make()
    pair = open_pair(*write(config, tmp_path))
    plan = ipm.make_plan(ipm.analyse(pair), similarity_threshold=0.0, lambda_=4.0)
    ipm.merge(plan, tmp_path / "out")
    report = export_adapter(plan, tmp_path / "adapter", tolerance=1e-5)
    assert len(report["matrices"]) == len(pair.matrices) == 28

    def model(folder: Path) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder).eval()

    plain = model(tmp_path / "mllm")
    inputs = {"input_ids": torch.arange(3, 11)[None]}
    if make is instruct_blip:
        inputs["input_ids"][0, :2] = config.image_token_index
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28)
        inputs["qformer_input_ids"] = torch.arange(4)[None]
    with torch.no_grad():
        before = plain(**inputs).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        found, expected = adapted(**inputs).logits, model(tmp_path / "out")(**inputs).logits
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("LLaVA-1.5 (Vicuna)", "hub"),
        ("LLaVA-1.5 (Vicuna)", "modules"),
        ("Qwen2.5-VL", "hub"),
        ("Qwen2.5-VL", "modules"),
        ("Qwen3-VL, mixture of experts", "modules"),
        ("Idefics3", "modules"),
        ("Mllama (Llama 3.2 Vision)", "hub"),
        ("LLaVA with a fused text model (Phi-3)", "hub"),
    ],
)
def test_each_name_is_the_module_that_holds_the_weight(
    name: str, layout: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    folders = build(FAMILIES[name], tmp_path)
    pair = open_pair(folders[layout], folders["math"], folders["base"])
    tensors = {matrix.mllm.partition("[")[0] for matrix in pair.matrices}
    loaded = AutoModelForImageTextToText.from_pretrained(folders[layout])
    for tensor, module in module_names(pair.mllm, tensors).items():
        assert torch.equal(loaded.get_submodule(module).weight.data, pair.mllm.read(tensor))


def test_experts_that_are_stacked_in_memory_are_no_linear_layers(tmp_path: Path) -> None:
    folders = build(FAMILIES["Qwen3-VL, mixture of experts"], tmp_path)
    model = Checkpoint.open(folders["modules"])
    stack = next(name for name in model.tensors if name.endswith("experts.down_proj"))
    with pytest.raises(PlanError, match=r"part of the stack .*\. Write the merged model instead"):
        module_names(model, [stack])


def test_the_code_of_an_unknown_type_names_its_own_modules(tmp_path: Path) -> None:
    folders = build(FAMILIES["LLaVA-1.5 (Vicuna)"], tmp_path)
    set_config(folders["LLaVA repository"], model_type="llava_llama")
    pair = open_pair(folders["LLaVA repository"], folders["math"], folders["base"])
    (tensor,) = [m.mllm for m in pair.matrices if (m.layer, m.module) == (1, "q")]
    assert module_names(pair.mllm, [tensor]) == {tensor: "model.layers.1.self_attn.q_proj"}


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    folders = build(FAMILIES["LLaVA-1.5 (Vicuna)"], tmp_path)
    name = "language_model.model.layers.3.self_attn.q_proj.weight"
    other = rewrite(folders["hub"], tmp_path / "other", dict)
    text = {**Checkpoint.open(other).config["text_config"], "num_hidden_layers": 3}
    set_config(other, text_config=text)
    with pytest.raises(PlanError, match=rf"'{name}' of .* which does not exist\. Do config.json"):
        module_names(Checkpoint.open(other), [name])
    set_config(other, text_config={**text, "hidden_size": 64, "num_hidden_layers": 4})
    with pytest.raises(
        PlanError, match=r"\(32, 32\) belongs to '.*' in memory.*the shape \(32, 64"
    ):
        module_names(Checkpoint.open(other), [name])
    set_config(other, text_config={**text, "num_hidden_layers": 10**7})
    with pytest.raises(ModelLoadError, match="num_hidden_layers = 10000000"):
        module_names(Checkpoint.open(other), [name])
