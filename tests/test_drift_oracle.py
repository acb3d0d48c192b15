"""What the optimizer gets in a whole run, against the formulas in fp64 from the model files.

The names of both models are matched by their text alone, and the loss is computed from logits: none
of the package's matching, encoding of batches into losses, or rules is used.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_drift_training import DEMO, request_of, run
from torch import Tensor

from ipmerge_core.finetuning import train
from ipmerge_core.finetuning.settings import PriorSettings

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
PROJECTION = re.compile(r"layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.weight$")
STRENGTH = 0.7


def formula(rule: str, g: Tensor, d: Tensor) -> Tensor:
    norms = g.norm() / d.norm()
    cosine = (g * d).sum() / (g.norm() * d.norm())
    scale = {"absolute": 1.0, "grad_norm": norms, "adaptive": (1 + cosine) / 2 * norms}[rule]
    return g - STRENGTH * scale * d


def gradients_of(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the gradient of each micro-batch in fp64: of the mean over all learned tokens."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(DEMO / "mllm", dtype=torch.float64)
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    found = []
    for batch in batches:
        inputs = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
        labels = inputs.pop("labels")[:, 1:]
        log = torch.log_softmax(model(**inputs, use_cache=False).logits[:, :-1], -1)
        chosen = log.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        model.zero_grad()
        (-chosen[labels != -100].sum() / count).backward()
        named = model.named_parameters()
        found.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    return found


@pytest.mark.parametrize("per_micro_batch", [False, True])
@pytest.mark.parametrize(
    ("rule", "base"),
    [("absolute", ""), ("grad_norm", "base"), ("adaptive", ""), ("adaptive", "base")],
)
def test_the_optimizer_gets_the_gradient_of_the_formula(
    rule: Any, base: str, per_micro_batch: bool, tmp_path: Path, monkeypatch: Any
):
    from accelerate import Accelerator
    from transformers import Trainer

    batches: list[dict[str, Tensor]] = []
    got: dict[str, Tensor] = {}
    loaded: list[Any] = []
    step, clip, load = Trainer.training_step, Accelerator.clip_grad_norm_, train._load_model

    def record_batch(trainer: Any, model: Any, inputs: Any, *rest: Any) -> Tensor:
        batches.append({n: v for n, v in inputs.items() if isinstance(v, Tensor)})
        return step(trainer, model, inputs, *rest)

    def record_gradient(accelerator: Any, *arguments: Any, **how: Any) -> Any:
        named = loaded[0].named_parameters()
        got.update({n: p.grad.double() for n, p in named if p.grad is not None})
        return clip(accelerator, *arguments, **how)

    def record_model(*arguments: Any) -> Any:
        loaded.append(load(*arguments))
        return loaded[0]

    monkeypatch.setattr(Trainer, "training_step", record_batch)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", record_gradient)
    monkeypatch.setattr(train, "_load_model", record_model)
    prior = PriorSettings(rule=rule, strength=STRENGTH, per_micro_batch=per_micro_batch)
    request = request_of(tmp_path / "out", prior, max_steps=1, accumulation=2)
    run(replace(request, math_base=str(DEMO / base) if base else None))

    files = {n: load_file(DEMO / n / "model.safetensors") for n in ("mllm", "math", "base")}
    wanted = gradients_of(batches)
    priors = 0
    assert len(batches) == 2
    for name, found in got.items():
        parts = [each[name] for each in wanted]
        expected = sum(parts[1:], parts[0])
        text = PROJECTION.search(name)
        if text is not None and "vision" not in name:
            origin = files["base" if base else "mllm"]
            start = origin[f"{'' if base else 'language_model.'}model.{text[0]}"]
            d = files["math"][f"model.{text[0]}"].double() - start.double()
            tilted = [formula(rule, g, d) for g in (parts if per_micro_batch else [expected])]
            expected = sum(tilted[1:], tilted[0])
            priors += 1
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm()), name
    assert priors == 28
