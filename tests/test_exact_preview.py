"""The numbers under a drag are those of the merge itself: page = Python = bytes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trio
from node_runner import previews_on_page
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.ui.plan_choice import read_commit

ROW = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
PLANS = [
    {"s": 0.7, "lambda": 4, "similarity": "first", "variant": "sum"},
    {"s": 0.5, "lambda": 2, "similarity": "max", "variant": "max"},
    {"s": 0.2, "lambda": 0.5, "similarity": "weighted", "variant": "rescale_only"},
    {"s": 0.0, "lambda": 1, "similarity": "first", "variant": "select_only"},
    {"s": 0.2, "lambda": 2, "similarity": "first", "variant": "protect"},
    {"s": 0.0, "lambda": 1, "similarity": "first", "variant": "complement_40"},
    {"s": 0.3, "lambda": 2, "similarity": "max", "variant": "complement_95", "budget": 0.01},
    {"s": 0.0, "lambda": 1, "similarity": "first", "variant": "sum", "budget": 0.02},
    {"s": 0.0, "lambda": 1, "similarity": "first", "variant": "truncated_70"},
    {"s": 0.3, "lambda": 2, "similarity": "max", "variant": "truncated_5", "budget": 0.01},
    {
        "s": 0.75,
        "lambda": 8,
        "similarity": "first",
        "variant": "max",
        "overrides": {**dict.fromkeys(ROW, "merge"), "model.layers.1.mlp.down_proj.weight": "keep"},
    },
]


@pytest.fixture(scope="module", params=["one expert", "two experts", "another temperature, rank"])
def analysed(request: pytest.FixtureRequest, trio: Trio) -> Analysis:
    experts = [trio.math] if request.param == "one expert" else [trio.math, trio.math_2]
    options = {"temperature": 8.0, "rank": 5} if "rank" in request.param else {}
    return ipm.analyse(ipm.open_pair(trio.mllm, experts, trio.base), **options)


def test_the_page_previews_what_python_previews_and_what_a_merge_does(
    analysed: Analysis, trio: Trio, tmp_path: Path
):
    seen = previews_on_page(analysed.to_dict(), PLANS)
    before, base = (load_file(folder / "model.safetensors") for folder in (trio.mllm, trio.base))
    for number, (raw, page) in enumerate(zip(PLANS, seen, strict=True)):
        choice = read_commit({"overrides": {}, **raw}, analysed.to_dict())
        plan = ipm.make_plan(analysed, **choice.arguments)
        preview = plan.preview()
        assert tuple(page["selected"]) == preview.selected
        assert page["relative_change"] == pytest.approx(preview.relative_change, rel=1e-9)
        assert page["keep"] == pytest.approx(preview.keep, rel=1e-9)
        assert page["update_share"] == pytest.approx(preview.update_share, rel=1e-12)
        assert page["expert_change"] == pytest.approx(preview.expert_change, rel=1e-12)

        out = tmp_path / f"merged-{number}"
        ipm.merge(plan, out)
        measured = measure(before, load_file(out / "model.safetensors"), base, analysed)
        assert set(page["selected"]) == measured["changed"]
        assert page["relative_change"] == pytest.approx(measured["change"], rel=1e-4)
        assert page["keep"] == pytest.approx(measured["keep"], rel=1e-4)
        layers = {int(layer): change for layer, change in page["layer_change"].items()}
        assert layers == pytest.approx(measured["layers"], rel=1e-4)


def measure(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    analysed: Analysis,
) -> dict[str, Any]:
    """Read from the weights, in float64, what the preview promises."""
    changed, sums, norms = set(), {}, {}
    old_task, new_task = [], []
    for record in analysed.records:
        if record.expert:
            continue
        old, new = before[record.mllm_name].double(), after[record.mllm_name].double()
        if not torch.equal(old, new):
            changed.add(record.name)
        sums[record.layer] = sums.get(record.layer, 0.0) + float((new - old).norm() ** 2)
        norms[record.layer] = norms.get(record.layer, 0.0) + float(old.norm() ** 2)
        old_task.append((old - base[record.name].double()).flatten())
        new_task.append((new - base[record.name].double()).flatten())
    return {
        "changed": changed,
        "change": (sum(sums.values()) / sum(norms.values())) ** 0.5,
        "layers": {layer: (sums[layer] / norms[layer]) ** 0.5 for layer in sums},
        "keep": float(torch.cosine_similarity(torch.cat(new_task), torch.cat(old_task), dim=0)),
    }
